"""Honest numbers: paired, interleaved, repeated, synchronised; ratios of sums, never means of ratios."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from medusa_nb.decoding import Decoder, Generation, Step
from medusa_nb.distillation.records import is_loop
from medusa_nb.errors import InputError
from medusa_nb.progress import progress

Decode = Callable[[torch.Tensor], Generation]
Interval = tuple[float, float]


def synchronize() -> None:
    """Wait for an accelerator to finish, so that a clock read afterwards tells the truth."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


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


def decode_with(decoder: Decoder, max_new_tokens: int, eos: list[int], **options) -> Decode:
    """A function that decodes one prompt ``[1, T]`` with a decoder, for :func:`compare`."""
    return lambda ids: decoder.generate([ids[0]], max_new_tokens, eos, **options)[0]


def decode_all(decoder: Decoder, prompts: list[torch.Tensor], max_new_tokens: int, eos: list[int]) -> "Timing":
    """Decode prompts ``[1, T]``, as many at once as there are slots: for counting tokens per pass, not for time."""
    texts = [ids[0] for ids in prompts]
    groups = [texts[i : i + decoder.slots] for i in range(0, len(texts), decoder.slots)]
    answers = [answer for group in groups for answer in decoder.generate(group, max_new_tokens, eos)]
    return Timing("", generations=answers)


@dataclass
class Timing:
    """All runs of one decoder: ``seconds[p][r]`` for prompt p in repeat r, and prompt p's text.

    ``keep`` are the numbers of the prompts that count, all by default.
    """

    name: str
    seconds: list[list[float]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    keep: list[int] | None = None

    @property
    def counted(self) -> list[int]:
        return list(range(len(self.generations))) if self.keep is None else self.keep

    def table(self) -> np.ndarray:
        """``[P, 3]`` over the prompts that count: new tokens, passes after the prompt's, seconds (median repeat)."""
        rows = []
        for p in self.counted:
            passes = self.generations[p].tokens_per_pass
            seconds = statistics.median(self.seconds[p]) if self.seconds else 0.0
            rows.append((sum(passes), len(passes) - 1, seconds))
        return np.array(rows, dtype=float).reshape(-1, 3)

    def tokens_per_pass(self) -> float:
        """Total tokens by total passes; the prompt's pass and its one token are left out."""
        return _tokens_per_pass(self.table())

    def tokens_per_second(self) -> float:
        return _tokens_per_second(self.table())

    def without_loops(self) -> "Timing":
        """The same, without the answers that run into a repetition loop (all of them where none would be left)."""
        keep = [p for p in self.counted if not is_loop(self.generations[p].new_tokens)]
        return Timing(self.name, self.seconds, self.generations, keep or self.counted)

    def at_least(self, tokens: int) -> "Timing":
        """The same, only the answers of at least so many tokens."""
        keep = [p for p in self.counted if len(self.generations[p].new_tokens) >= tokens]
        return Timing(self.name, self.seconds, self.generations, keep or self.counted)

    def like(self, other: "Timing") -> "Timing":
        """The same, only the prompts that count in ``other``."""
        return Timing(self.name, self.seconds, self.generations, other.counted)


def _tokens_per_pass(table: np.ndarray) -> float:
    passes = table[:, 1].sum()
    return float((table[:, 0] - 1).sum() / passes) if passes else 1.0


def _tokens_per_second(table: np.ndarray) -> float:
    return float(table[:, 0].sum() / table[:, 2].sum())


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
    if repeats < 1:
        raise InputError(f"repeats={repeats}; measure at least once")
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


def speedup(fast: Timing, slow: Timing) -> float:
    """Ratio of tokens per second over the same prompts."""
    return fast.tokens_per_second() / slow.like(fast).tokens_per_second()


def speedup_interval(fast: Timing, slow: Timing) -> Interval:
    """95 % interval of :func:`speedup` over prompts."""
    tables = fast.table(), slow.like(fast).table()
    return bootstrap(lambda rows: _tokens_per_second(tables[0][rows]) / _tokens_per_second(tables[1][rows]), tables[0])


def tokens_interval(timing: Timing) -> Interval:
    """95 % interval of tokens per pass over prompts."""
    table = timing.table()
    return bootstrap(lambda rows: _tokens_per_pass(table[rows]), table)


def tokens_difference(one: Timing, other: Timing) -> tuple[float, Interval]:
    """How many tokens per pass more ``one`` has than ``other`` on the same prompts, and its 95 % interval."""
    tables = one.table(), other.like(one).table()
    gap = _tokens_per_pass(tables[0]) - _tokens_per_pass(tables[1])
    return gap, bootstrap(lambda rows: _tokens_per_pass(tables[0][rows]) - _tokens_per_pass(tables[1][rows]), tables[0])


def bootstrap(statistic: Callable[[np.ndarray], float], table: np.ndarray, samples: int = 2000) -> Interval:
    """95 % interval of a statistic of row numbers, prompts drawn with replacement (always the same draws)."""
    generator, count = np.random.default_rng(0), len(table)
    draws = [statistic(generator.integers(count, size=count)) for _ in range(samples)]
    return tuple(np.percentile(draws, (2.5, 97.5)).tolist())
