"""Honest numbers: paired, interleaved, repeated, synchronised; ratios of sums, never means of ratios."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from medusa_nb.base_model import context_length, suitable_device
from medusa_nb.calibration import SPEEDS, Calibration
from medusa_nb.custom_generate import base_fingerprint
from medusa_nb.decoding import Decoder, Generation, Step
from medusa_nb.distillation import is_loop
from medusa_nb.drafting import State, TreeDraft, growing_draft
from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.progress import progress
from medusa_nb.tree import ROOT_ONLY, Tree

WIDTHS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
Decode = Callable[[torch.Tensor], Generation]
Shape = tuple[int, int]  # of a growing tree: nodes, and how deep the heads guess
# what is tried: with few more rows than one a CPU's matrix kernels may take no longer (6), or a little (8)
SHAPES: tuple[Shape, ...] = ((6, 4), (8, 4))
WIDE_SHAPES: tuple[Shape, ...] = ((8, 4), (16, 4), (32, 4))  # where launching costs more than arithmetic


def synchronize() -> None:
    """Wait for an accelerator to finish, so that a clock read afterwards tells the truth."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class BlindDraft(TreeDraft):
    """Fills a tree with arbitrary tokens, at no cost: for timing what a step costs besides guessing."""

    def __init__(self, size: int, vocabulary: int, device):
        super().__init__(None, ROOT_ONLY, device)
        self.size, self.depth = size, min(1, size - 1)
        star = Tree(((), *((rank,) for rank in range(size - 1))))
        self.parents = torch.zeros(size, dtype=torch.long, device=device)
        self.depths, self.ancestors = star.depths().to(device), star.mask().to(device)
        self.offsets, self.vocabulary = torch.arange(size, device=device), vocabulary

    def fill(self, state: State) -> torch.Tensor:
        return (state.root.unsqueeze(1) + self.offsets) % self.vocabulary


def measure_latency(model, widths=WIDTHS, past: int = 200, repeats: int = 25) -> dict[int, float]:
    """t(n): median seconds of one eager step with n candidates behind ``past`` cached tokens, guessing left out.

    The widths take turns, so that a slow moment of the machine hits all of them.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    limit = context_length(model) or past + max(widths)
    past = max(1, min(past, limit - max(widths)))
    decoders = {}
    for n in widths:
        draft = BlindDraft(n, vocabulary, model.get_output_embeddings().weight.device)
        decoders[n] = Decoder(model, capacity=past + n, draft=draft)
    return time_steps(decoders, past, repeats)


class StepTimer:
    """Times single steps of decoders behind ``past`` tokens, the host's read included.

    In a round they take turns in runs of ten steps; the first three of each run warm the caches and are not counted.
    """

    def __init__(self, decoders: dict[Hashable, Decoder], past: int):
        self.decoders, self.past, self.states = decoders, past, {}
        self.seconds: dict[Hashable, list[float]] = {n: [] for n in decoders}
        for n, decoder in decoders.items():
            prompt = torch.arange(past, device=decoder.verifier.device) % decoder.verifier.lm_head.weight.shape[0]
            self.states[n] = decoder.start([prompt])

    @torch.no_grad()
    def round(self) -> None:
        """Let every decoder take its ten steps."""
        for n, decoder in self.decoders.items():
            for run in range(10):
                synchronize()
                started = time.perf_counter()
                _, record = decoder.run(self.states[n], decoder.span(self.past))
                record.tolist()
                if run >= 3:
                    self.seconds[n].append(time.perf_counter() - started)

    def medians(self) -> dict[Hashable, float]:
        """Median seconds of a step of each decoder, over all rounds."""
        return {n: statistics.median(values) for n, values in self.seconds.items()}


def time_steps(decoders: dict[Hashable, Decoder], past: int, repeats: int = 140) -> dict[Hashable, float]:
    """Median seconds of at least ``repeats`` steps of each decoder, see :class:`StepTimer`."""
    timer = StepTimer(decoders, past)
    for _ in range(-(-repeats // 7)):
        timer.round()
    return timer.medians()


def growing_decoder(
    model, heads: MedusaHeads, calibration: Calibration, shape: Shape, capacity: int, slots: int = 1, **options
) -> Decoder:
    """A decoder whose tree grows anew at every step, from heads, n-grams and frequent tokens.

    ``shape`` is the number of nodes and how deep the heads guess.
    """
    draft = growing_draft(heads, shape, calibration.ngram_worth, calibration.frequent)
    return Decoder(model, capacity=capacity, slots=slots, draft=draft, **options)


def fastest_decoder(
    model,
    heads: MedusaHeads,
    calibration: Calibration,
    shapes: Iterable[Shape] | None = None,
    capacity: int = 512,
    compiled: bool = True,
    remember: str | Path | None = None,
) -> Decoder:
    """The growing decoder whose tree gives most tokens a second here.

    For each shape the whole step is timed, and tokens per pass are counted on the calibration's prompts.

    Args:
        shapes: what is tried; by default what may be fastest with this device and way of running.
        compiled: compile, where a compiler works.
        remember: the heads' folder; shapes measured there on this machine with this dtype are not tried again.
    """
    key, shapes = measured_on(model, compiled), list(shapes or shapes_to_try(model, compiled))
    file = Path(remember) / SPEEDS if remember else None
    known = json.loads(file.read_text()) if file and file.exists() else {}
    rates = {shape: known[key][name_of(shape)] for shape in shapes if name_of(shape) in known.get(key, {})}
    measured = len(rates) == len(shapes)
    trying = [max(shapes, key=rates.get)] if measured else shapes
    decoders = {shape: growing_decoder(model, heads, calibration, shape, capacity) for shape in trying}
    if compiled:
        for decoder in decoders.values():
            decoder.compile()
    if not measured:
        seconds = time_steps(decoders, past=max(1, min(capacity // 2, capacity - max(size for size, _ in shapes))))
        rates = {shape: calibrated_tokens(decoder, calibration) / seconds[shape] for shape, decoder in decoders.items()}
        if file and file.parent.is_dir():
            named = {name_of(shape): round(rate, 1) for shape, rate in rates.items()}
            file.write_text(json.dumps(known | {key: known.get(key, {}) | named}, indent=2))
    return decoders[max(decoders, key=rates.get)]


def shapes_to_try(model, compiled: bool) -> tuple[Shape, ...]:
    """Trees that may be the fastest with this model's device and way of running."""
    return SHAPES if model.device.type == "cpu" and compiled else WIDE_SHAPES


def name_of(shape: Shape) -> str:
    """A tree's shape in words."""
    return f"{shape[0]} nodes, heads {shape[1]} deep"


def calibrated_tokens(decoder: Decoder, calibration: Calibration, max_new_tokens: int = 64) -> float:
    """Tokens per pass on the calibration's prompts that fit into the decoder."""
    room = decoder.capacity - max_new_tokens - decoder.draft.size
    limit = context_length(decoder.model) or room + 1
    prompts = [torch.tensor(ids) for ids in calibration.prompts if len(ids) <= min(room, limit - 1)]
    runs = [decoder.generate([ids], max_new_tokens)[0] for ids in prompts]
    counts = [count for run in runs for count in run.tokens_per_pass[1:]]
    return sum(counts) / len(counts) if counts else 1.0


def measured_on(model, compiled: bool) -> str:
    """What a step's time depends on, in words."""
    about = machine(model)
    names = ("processor", "threads", "accelerator", "torch", "transformers", "device", "dtype")
    stated = ", ".join(f"{name} {about[name]}" for name in names if name in about)
    way = "compiled" if compiled else "eager"
    return f"{stated}, {way}, base model {base_fingerprint(model)[:16]}"


def transformers_generate(model, input_ids: torch.Tensor, max_new_tokens: int, eos: list[int], **options) -> Generation:
    """``model.generate``, greedy, noting what each forward pass emitted; ``options`` go to it as they are."""
    cached = []  # tokens in the cache before each forward pass

    def note(module, arguments, keywords):
        past = keywords.get("past_key_values")
        cached.append(0 if past is None else past.get_seq_length())

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        sequences = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,
            **options,
        )
    finally:
        hook.remove()
    result = Generation(sequences, input_ids.shape[1])
    new = result.new_tokens
    result.stopped_by = "eos" if new and new[-1] in eos else "length"
    # before pass i the cache holds the prompt and all new tokens but the last one
    before = [0, *(n + 1 - input_ids.shape[1] for n in cached[1:]), len(new)]
    result.steps = [Step([], [], new[a:b]) for a, b in zip(before, before[1:], strict=False)]
    return result


def standard_decoders(medusa: Decoder, plain: Decoder, max_new_tokens: int, eos: list[int]) -> dict[str, Decode]:
    """The four that are always compared, by the names the reports use.

    Args:
        medusa: with heads and a tree.
        plain: the same model without guesses, prepared the same way (both compiled, or both not).
    """
    model = medusa.model
    return {
        "model.generate": lambda ids: transformers_generate(model, ids, max_new_tokens, eos),
        "our loop, no guesses": lambda ids: plain.generate([ids[0]], max_new_tokens, eos)[0],
        "prompt lookup": lambda ids: transformers_generate(
            model, ids, max_new_tokens, eos, prompt_lookup_num_tokens=10, max_matching_ngram_size=3
        ),
        "Medusa": lambda ids: medusa.generate([ids[0]], max_new_tokens, eos)[0],
    }


@dataclass
class Timing:
    """All runs of one decoder: ``seconds[p][r]`` for prompt p in repeat r, and prompt p's text."""

    name: str
    seconds: list[list[float]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)

    def chosen(self, keep: list[bool] | None) -> list[int]:
        """The numbers of the prompts that count: those to keep, or all of them where that would leave none."""
        every = range(len(self.generations))
        return [p for p in every if keep[p]] if keep and any(keep) else list(every)

    def tokens(self, keep=None) -> int:
        """New tokens over all prompts."""
        return sum(len(self.generations[p].new_tokens) for p in self.chosen(keep))

    def total_seconds(self, keep=None) -> float:
        """Sum over prompts of the median of the repeats."""
        return sum(statistics.median(self.seconds[p]) for p in self.chosen(keep))

    def tokens_per_second(self, keep=None) -> float:
        return self.tokens(keep) / self.total_seconds(keep)

    def pass_counts(self, keep=None) -> list[int]:
        """Tokens emitted by every pass after the one that reads the prompt."""
        return [n for p in self.chosen(keep) for n in self.generations[p].tokens_per_pass[1:]]

    def tokens_per_pass(self, keep=None) -> float:
        """Total tokens by total passes, the prompt's pass left out on both sides."""
        counts = self.pass_counts(keep)
        return sum(counts) / len(counts) if counts else 1.0

    def spread(self, other: "Timing") -> tuple[float, float]:
        """Lowest and highest speedup over ``other`` among the repeats."""
        repeats = range(len(self.seconds[0]))
        rates = [
            (self.tokens() / sum(s[r] for s in self.seconds)) / (other.tokens() / sum(s[r] for s in other.seconds))
            for r in repeats
        ]
        return min(rates), max(rates)


def compare(
    decoders: dict[str, Decode],
    prompts: list[torch.Tensor],
    repeats: int = 3,
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time decoders side by side: on each prompt they take turns, in an order that rotates.

    One warm-up round on the first prompt is not counted. ``after_each`` is called after every prompt, to measure
    something else in the same moments.
    """
    if not prompts:
        raise InputError("there is no prompt to measure on")
    timings = {name: Timing(name) for name in decoders}
    for decoder in decoders.values():
        decoder(prompts[0])
    bar = progress(len(prompts), "prompt", "measuring")
    for p, prompt in enumerate(prompts):
        for timing in timings.values():
            timing.seconds.append([])
        for repeat in range(repeats):
            names = list(decoders)
            turn = (p + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                synchronize()
                started = time.perf_counter()
                generation = decoders[name](prompt)
                synchronize()
                timings[name].seconds[-1].append(time.perf_counter() - started)
                if repeat == 0:
                    timings[name].generations.append(generation)
        after_each()
        bar.update()
    bar.close()
    return timings


def speedup(fast: Timing, slow: Timing, keep: list[bool] | None = None) -> float:
    """Ratio of tokens per second over the same prompts."""
    return fast.tokens_per_second(keep) / slow.tokens_per_second(keep)


def without_loops(timing: Timing) -> list[bool]:
    """For each prompt, whether its answer runs into no repetition loop."""
    return [not is_loop(g.new_tokens) for g in timing.generations]


@torch.inference_mode()
def largest_gap(model, generation: Generation) -> float:
    """How far any emitted token is from the base model's arg-max, in logits, when it reads the whole text.

    0 means every token is the arg-max. A small gap proves a near-tie: two tokens whose logits are
    closer than the rounding of the arithmetic.
    """
    logits = model(generation.sequences[:, :-1]).logits[0, generation.prompt_length - 1 :].float()
    chosen = generation.sequences[0, generation.prompt_length :]
    return (logits.max(-1).values - logits.gather(-1, chosen.unsqueeze(-1))[:, 0]).max().item()


@torch.inference_mode()
def first_difference_gap(model, one: Generation, other: Generation) -> float | None:
    """None if the texts are equal, else how far apart the model finds the two tokens where they part."""
    a, b = one.new_tokens, other.new_tokens
    if a == b:
        return None
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:  # one is the other's beginning: nothing to compare, never a tie
        return float("inf")
    prefix = one.sequences[:, : one.prompt_length + at]
    logits = model(prefix).logits[0, -1].float()
    return (logits.max() - torch.stack([logits[a[at]], logits[b[at]]]).min()).item()


def identity(model, timing: Timing, reference: Timing) -> dict:
    """How many texts equal the reference's, and the logit gap at each first difference."""
    pairs = zip(timing.generations, reference.generations, strict=True)
    gaps = [first_difference_gap(model, one, other) for one, other in pairs]
    different = [round(gap, 4) for gap in gaps if gap is not None]
    return dict(prompts=len(gaps), identical=len(gaps) - len(different), gaps=different, tie=near_tie(model.dtype))


def near_tie(dtype: torch.dtype) -> float:
    """The logit gap below which a difference counts as rounding: four units at a logit of 16."""
    return 4 * 16 * torch.finfo(dtype).eps


def machine(model=None) -> dict:
    """What the numbers depend on: processor, threads, memory, versions, dtype."""
    about = dict(
        processor=processor_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        python=platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets")},
    )
    if torch.accelerator.is_available():
        about["accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else str(suitable_device())
    if model is not None:
        about |= dict(device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))
    return about


def processor_name() -> str:
    """The processor's name as the operating system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
