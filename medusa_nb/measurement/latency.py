"""What a pass costs: t(n) of n tokens in one pass, eager or compiled, and the time of reading all weights once."""

import statistics
import time
from collections.abc import Hashable

import torch

from medusa_nb.base_model import context_length
from medusa_nb.decoding import Decoder
from medusa_nb.drafting import Candidates, State, StaticTree
from medusa_nb.measurement.timing import synchronize
from medusa_nb.training.calibration import Calibration
from medusa_nb.tree import Tree, expected_tokens

WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class BlindDraft(StaticTree):
    """A tree of arbitrary tokens that cost nothing, for timing what a step costs besides drafting."""

    def __init__(self, size: int, vocabulary: int, device: torch.device | str):
        super().__init__(None, device=device)
        star = Tree(((), *((rank,) for rank in range(size - 1))))
        self.size, self.depth, self.vocabulary = size, star.depth, vocabulary
        self.parents = torch.zeros(size, dtype=torch.long, device=device)
        self.depths, self.mask = star.depths().to(device), star.mask().to(device)
        self.none_copied = torch.zeros(size, dtype=torch.bool, device=device)
        self.offsets = torch.arange(size, device=device)

    def __call__(self, state: State) -> Candidates:
        tokens = (state.token.unsqueeze(1) + self.offsets) % self.vocabulary
        fixed = (self.parents, self.depths, self.mask, self.none_copied)
        return Candidates(tokens, *(values.expand(len(tokens), *values.shape) for values in fixed))


def blind_decoder(model, size: int, max_length: int, compiled: bool = False) -> Decoder:
    """A decoder that verifies ``size`` arbitrary tokens at every step."""
    head = model.get_output_embeddings().weight
    decoder = Decoder(model, max_length=max_length, draft=BlindDraft(size, head.shape[0], head.device))
    if compiled:
        decoder.compile()
    return decoder


def measure_latency(model, widths=WIDTHS, past: int = 200, repeats: int = 25, compiled: bool = False) -> dict:
    """t(n): median seconds of one step with n candidates after ``past`` cached tokens, drafting left out.

    The widths take turns, so that a slow moment of the machine hits all of them.
    """
    limit = context_length(model) or past + max(widths)
    past = max(1, min(past, limit - max(widths)))
    return time_steps({n: blind_decoder(model, n, past, compiled) for n in widths}, past, repeats)


class StepTimer:
    """Times single steps of decoders after ``past`` tokens, the host's read included.

    In a round they take turns in runs of ten steps; the first three of each run warm the caches and are not counted.
    """

    def __init__(self, decoders: dict[Hashable, Decoder], past: int):
        self.decoders, self.past, self.states = decoders, past, {}
        self.seconds: dict[Hashable, list[float]] = {n: [] for n in decoders}
        for n, decoder in decoders.items():
            prompt = torch.arange(past, device=decoder.verifier.device) % 1000
            prompt = prompt % decoder.model.get_output_embeddings().weight.shape[0]
            self.states[n] = decoder.start([prompt])

    @torch.no_grad()
    def round(self) -> None:
        """Let every decoder take its ten steps."""
        for n, decoder in self.decoders.items():
            for run in range(10):
                synchronize()
                started = time.perf_counter()
                _, record = decoder.run(self.states[n], decoder.span(self.past))
                record.steps()
                if run >= 3:
                    self.seconds[n].append(time.perf_counter() - started)

    def medians(self) -> dict[Hashable, float]:
        """Median seconds of a step of each decoder, over all rounds."""
        return {n: statistics.median(values) for n, values in self.seconds.items()}


def time_steps(decoders: dict[Hashable, Decoder], past: int, repeats: int = 25) -> dict[Hashable, float]:
    """Median seconds of at least ``repeats`` steps of each decoder, see :class:`StepTimer`."""
    timer = StepTimer(decoders, past)
    while any(len(values) < repeats for values in timer.seconds.values()):
        timer.round()
    return timer.medians()


def weight_bytes(model) -> int:
    """Bytes of all weights that a pass reads; an embedding that is only looked up does not count."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    if embedding.data_ptr() != head.data_ptr():
        sizes.pop(embedding.data_ptr(), None)
    return sum(sizes.values())


def read_seconds(model, repeats: int = 9) -> float:
    """Median seconds of reading as many bytes as the model's weights once: the least that a pass can take."""
    memory, times = torch.ones(weight_bytes(model) // 4, device=model.device), []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        memory.sum()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def fastest_size(calibration: Calibration, latency: dict[int, float], draft_seconds: float = 0.0) -> int:
    """The tree size with the most expected tokens a second: maximises tokens(n) / (t(n) + draft).

    Args:
        latency: t(n) in seconds for the sizes that may be chosen, and for 1.
        draft_seconds: what drafting adds to a step.
    """

    def rate(size: int) -> float:
        tokens = expected_tokens(calibration.tree(size), calibration.rank_counts)
        return tokens / (latency[size] + (draft_seconds if size > 1 else 0.0))

    return max(latency, key=rate)
