"""The benchmark: every way of decoding on the same prompts, side by side, and where each step's time goes."""

import statistics
import time
from dataclasses import dataclass, field

import torch
from transformers.generation import BaseStreamer

from medusa_nb.decoding import Decoder
from medusa_nb.drafting import StaticTree
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement.identity import identity
from medusa_nb.measurement.latency import StepTimer, blind_decoder, read_seconds, weight_bytes
from medusa_nb.measurement.machine import machine
from medusa_nb.measurement.timing import (
    Timing,
    compare,
    decode_with,
    speedup,
    speedup_interval,
    tokens_interval,
    transformers_generate,
)
from medusa_nb.path_heads import PathHeads
from medusa_nb.training.calibration import Calibration

GENERATE, LOOKUP = "model.generate", "prompt lookup (transformers)"
EAGER_LOOP, LOOP = "our loop, eager", "our loop, compiled"
EAGER_PLAIN, PLAIN = "plain Medusa, eager", "plain Medusa, compiled"
EAGER_FULL, FULL = "full version, eager", "full version, compiled"
STEPS_UP = ("+ draft vocabulary", "+ heads see the path", "+ growing tree", "+ copied tokens")  # compiled, one by one


WAYS = {"eager": {"plain": EAGER_PLAIN, "full": EAGER_FULL}, "compiled": {"plain": PLAIN, "full": FULL}}


class TimeToFirstToken(BaseStreamer):
    """Notes each answer's time to first token: the seconds that the prompt's own pass costs."""

    def __init__(self):
        self.seconds: list[float] = []
        self.seen: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every pass's tokens."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        self.seconds.append(self.seen[1] - self.seen[0])
        self.seen.clear()


@dataclass
class Contestants:
    """Ways of decoding by name: ``decoders`` are ours, ``calls`` all of them.

    ``loops`` says for each decoder which loop without heads it is compared with; ``blind`` are decoders that draft
    for nothing, by tree size and whether they are compiled; ``first_tokens`` hears from each of our decoders.
    """

    decoders: dict[str, Decoder]
    calls: dict
    loops: dict[str, str]
    blind: dict[tuple[int, bool], Decoder]
    first_tokens: dict[str, TimeToFirstToken] = field(default_factory=dict)


def prepare(
    model,
    plain: tuple[MedusaHeads, Calibration],
    full: tuple[PathHeads, Calibration],
    *,
    size: int,
    max_length: int,
    max_new_tokens: int,
    eos: list[int],
    compiled: bool = True,
    steps_up: bool = False,
) -> Contestants:
    """Make all contestants for one model and dtype; every tree has ``size`` nodes.

    Args:
        plain, full: plain heads and heads that see the path, each with its calibration.
        compiled: also compiled, where a compiler works.
        steps_up: also prompt lookup, and what each idea beyond the paper adds, one at a time (compiled if there are
            compiled ones).
    """
    (plain_heads, plain_known), (heads, known) = plain, full
    drafts = {
        EAGER_LOOP: lambda: None,
        EAGER_PLAIN: lambda: StaticTree(plain_heads, plain_known.tree(size), model.device),
        EAGER_FULL: lambda: known.growing_tree(heads, size),
    }
    names = {EAGER_LOOP: False, EAGER_PLAIN: False, EAGER_FULL: False}
    if compiled:
        drafts |= {LOOP: drafts[EAGER_LOOP], PLAIN: drafts[EAGER_PLAIN], FULL: drafts[EAGER_FULL]}
        names |= {LOOP: True, PLAIN: True}
    if steps_up:
        limited = plain_heads.limited_to(plain_known.frequent)
        drafts |= {
            STEPS_UP[0]: lambda: StaticTree(limited, plain_known.tree(size), model.device),
            STEPS_UP[1]: lambda: StaticTree(heads, known.tree(size), model.device),
            STEPS_UP[2]: lambda: known.growing_tree(heads, size, copy=False),
        }
        names |= dict.fromkeys(STEPS_UP[:3], compiled)
    names |= {FULL: True} if compiled else {}
    decoders = {name: Decoder(model, max_length=max_length, draft=drafts[name]()) for name in names}
    blind = {(n, how): blind_decoder(model, n, max_length, how) for n in (1, size) for how in set(names.values())}
    for name, wanted in names.items():
        if wanted:
            decoders[name].compile()
    loops = {name: LOOP if how else EAGER_LOOP for name, how in names.items()}
    calls = {GENERATE: lambda ids: transformers_generate(model, ids, max_new_tokens, eos)}
    if steps_up:
        calls[LOOKUP] = lambda ids: transformers_generate(model, ids, max_new_tokens, eos, prompt_lookup_num_tokens=10)
    watches = {name: TimeToFirstToken() for name in decoders}
    calls |= {name: decode_with(d, max_new_tokens, eos, streamer=watches[name]) for name, d in decoders.items()}
    return Contestants(decoders, calls, loops, blind, watches)


def run(contestants: Contestants, model, prompts: list[torch.Tensor], repeats: int, at_least: int = 0) -> dict:
    """Measure all contestants on ``prompts``; returns a report that can be written as JSON.

    Single steps are timed between the prompts, after as many tokens as these have on average, so that whole answers
    and their parts share the machine's good and bad moments. Answers that loop, or have fewer than ``at_least``
    tokens, are left out of all figures but identity. A row has tokens per pass, tokens a second, milliseconds per pass
    and their parts, the speedup over ``model.generate`` and over the same loop without heads (each with its interval
    over prompts), the share of the achievable, and identity of the text.
    """
    past = round(sum(ids.shape[1] for ids in prompts) / len(prompts))
    watched: dict = {**contestants.decoders, **contestants.blind}
    timer = StepTimer(watched, past)
    for watch in contestants.first_tokens.values():
        watch.seconds.clear()
    timings = compare(contestants.calls, prompts, repeats, after_each=timer.round)
    counted = timings[EAGER_LOOP].without_loops().at_least(at_least)
    steps, rows = timer.medians(), {}
    for name, timing in timings.items():
        row = gains(timing.like(counted), generate=timings[GENERATE])
        row["identical"] = identity(model, timing, timings[EAGER_LOOP])
        if decoder := contestants.decoders.get(name):
            loop = contestants.loops[name]
            compiled, size = loop == LOOP, decoder.draft.size
            row |= gains(timing.like(counted), loop=timings[loop])
            verify = steps[size, compiled] if size > 1 else steps[name]
            row |= parts(timing.like(counted), contestants.first_tokens[name], repeats, steps[name], verify)
            row |= dict(tree=size, compile_seconds=round(decoder.compile_seconds or 0.0, 1))
            if size > 1:
                achievable = row["tokens_per_pass"] * steps[1, compiled] / steps[size, compiled]
                row["share_of_achievable"] = round(row["vs_loop"] / achievable, 3)
        rows[name] = row
    size = weight_bytes(model)
    return dict(
        machine=machine(model),
        prompts=len(prompts),
        counted=len(counted.counted),
        repeats=repeats,
        weights_gb=round(size / 1e9, 4),
        read_ms=round(read_seconds(model) * 1e3, 3),
        steps_ms={f"t({n}) {'compiled' if c else 'eager'}": round(steps[n, c] * 1e3, 3) for n, c in contestants.blind},
        rows=rows,
    )


def measure(model, plain, full, prompts: list[torch.Tensor], repeats: int, at_least: int = 0, **how) -> dict:
    """:func:`prepare` and :func:`run` in one, for prompts ``[1, T]``; ``how`` are the options of :func:`prepare`."""
    longest = max(ids.shape[1] for ids in prompts) + how["max_new_tokens"]
    return run(prepare(model, plain, full, max_length=longest, **how), model, prompts, repeats, at_least)


def heads_rows(report: dict) -> dict[str, dict[str, dict]]:
    """The rows of a report that have heads, by how they ran (eager, compiled) and kind (plain, full)."""
    rows = report["rows"]
    ways = {way: {kind: rows[name] for kind, name in names.items() if name in rows} for way, names in WAYS.items()}
    return {way: found for way, found in ways.items() if found}


def gains(timing: Timing, **baselines: Timing) -> dict:
    """Tokens per pass, speed, and the speedup over each baseline, ``vs_<name>``; ratios with their 95 % interval."""
    row: dict = dict(tokens_per_pass=round(timing.tokens_per_pass(), 3))
    row["tokens_per_pass_interval"] = rounded(tokens_interval(timing))
    if timing.seconds:
        row["tokens_per_second"] = round(timing.tokens_per_second(), 1)
    for name, slow in baselines.items():
        row[f"vs_{name}"] = round(speedup(timing, slow), 3)
        row[f"vs_{name}_interval"] = rounded(speedup_interval(timing, slow))
    return row


def rounded(interval: tuple[float, float]) -> list[float]:
    """An interval for JSON."""
    return [round(value, 3) for value in interval]


def parts(timing: Timing, watch: TimeToFirstToken, repeats: int, step: float, verify: float) -> dict:
    """Milliseconds of all answers by passes after the prompt's, and where they go.

    ``step`` and ``verify`` are the seconds of a whole step and of one that drafts for nothing. The rest is what the
    host does between steps, and how much slower these are than in a row of the same.
    """
    table = timing.table()
    passes = max(1.0, table[:, 1].sum())
    firsts = watch.seconds[1:]  # the first answer of all was the warm-up
    first = sum(statistics.median(firsts[p * repeats : (p + 1) * repeats]) for p in timing.counted)
    whole, prompt = table[:, 2].sum() / passes, first / passes
    values = dict(
        ms_per_pass=whole,
        ms_verify_accept=verify,
        ms_draft=step - verify,
        ms_prompt=prompt,
        ms_rest=whole - prompt - step,
    )
    return {name: round(float(value) * 1e3, 3) for name, value in values.items()}


COLUMNS = {
    "tokens per pass": "tokens_per_pass",
    "tokens/s": "tokens_per_second",
    "× generate": "vs_generate",
    "× the same loop": "vs_loop",
    "share of achievable": "share_of_achievable",
    "ms per pass": "ms_per_pass",
    "verify + accept": "ms_verify_accept",
    "draft": "ms_draft",
    "prompt": "ms_prompt",
    "rest": "ms_rest",
}


def markdown(report: dict, columns: tuple[str, ...] = tuple(COLUMNS)) -> str:
    """A report as a Markdown table; ratios with their intervals."""
    lines = ["| | " + " | ".join(columns) + " | identical text |", "|---" * (len(columns) + 2) + "|"]
    for name, row in report["rows"].items():
        cells = []
        for column in columns:
            key = COLUMNS[column]
            text = f"{row[key]:,.2f}" if key in row else ""
            if text and f"{key}_interval" in row:
                text += " ({:.2f} to {:.2f})".format(*row[f"{key}_interval"])
            cells.append(text)
        same = row["identical"]
        ties = f", {same['ties']} near-ties" if same["ties"] else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {same['identical']} of {same['prompts']}{ties} |")
    return "\n".join(lines)
