"""The benchmark: every way of decoding on the same prompts, side by side, and where each step's time goes."""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.generation import BaseStreamer

from medusa_nb.calibration import Calibration
from medusa_nb.decoding import Decoder
from medusa_nb.drafting import DynamicDraft, TreeDraft
from medusa_nb.heads import MedusaHeads
from medusa_nb.measurement import (
    BlindDraft,
    Shape,
    StepTimer,
    Timing,
    compare,
    fastest_decoder,
    growing_decoder,
    identity,
    machine,
    speedup,
    transformers_generate,
    without_loops,
)
from medusa_nb.tree import build_tree

GENERATE, LOOP, MEDUSA = "model.generate", "our loop, compiled", "+ n-grams in the tree (Medusa)"
WIDE = 16  # nodes of a tree that looks for most tokens per pass, whatever its passes cost
WIDER = f"Medusa, {WIDE} nodes"
LIBRARY_LOOP, LIBRARY = "our loop, library's kernels", "Medusa, library's kernels"


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
    """Ways of decoding by name, prepared once: ``decoders`` are ours, ``calls`` all of them.

    ``blind`` is, for each tree size that occurs, a compiled decoder that guesses at no cost; ``first_tokens`` hears
    from each of our decoders.
    """

    decoders: dict[str, Decoder]
    calls: dict
    blind: dict[int, Decoder]
    first_tokens: dict[str, TimeToFirstToken]

    @property
    def compile_seconds(self) -> float:
        """What compiling took, trees that were tried and not chosen left out."""
        return sum(decoder.compile_seconds or 0.0 for decoder in (*self.decoders.values(), *self.blind.values()))


def prepare(
    model,
    plain_heads: MedusaHeads,
    plain_calibration: Calibration,
    heads: MedusaHeads,
    calibration: Calibration,
    *,
    shapes: tuple[Shape, ...],
    capacity: int,
    max_new_tokens: int,
    eos: list[int],
    remember: Path | None = None,
) -> Contestants:
    """Make and compile all contestants for one model and dtype; every tree has the shape that is fastest here.

    ``remember`` is the folder of ``heads``, see :func:`~medusa_nb.measurement.fastest_decoder`.
    """
    device, lm_head = model.device, model.get_output_embeddings().weight
    best = fastest_decoder(model, heads, calibration, shapes, capacity, remember=remember)
    size, depth = best.draft.size, best.draft.levels
    tree, plain_tree = (build_tree(known.rank_counts, size) for known in (calibration, plain_calibration))
    drafts = {
        "plain heads, static tree": TreeDraft(plain_heads, plain_tree, device),
        "+ draft vocabulary": TreeDraft(plain_heads.limited_to(plain_calibration.frequent), plain_tree, device),
        "+ heads see the path": TreeDraft(heads, tree, device),
        "+ growing tree": DynamicDraft(heads, size, device, depth=depth),
    }
    decoders = {
        "our loop, eager": Decoder(model, capacity=capacity),
        LOOP: Decoder(model, capacity=capacity),
        **{name: Decoder(model, capacity=capacity, draft=draft) for name, draft in drafts.items()},
        MEDUSA: best,
        WIDER: growing_decoder(model, heads, calibration, (WIDE, heads.num_heads), capacity),
        LIBRARY_LOOP: Decoder(model, capacity=capacity),
        LIBRARY: Decoder(model, capacity=capacity, draft=best.draft),
        "Medusa, eager": Decoder(model, capacity=capacity, draft=best.draft),
    }
    blind = {
        n: Decoder(model, capacity=capacity, draft=BlindDraft(n, lm_head.shape[0], device))
        for n in sorted({decoder.draft.size for decoder in decoders.values()} - {1})
    }
    for decoder in (*(decoders[name] for name in (LOOP, *drafts, WIDER)), *blind.values()):
        decoder.compile()
    for name in (LIBRARY_LOOP, LIBRARY):
        decoders[name].compile(library=True)
    calls = {GENERATE: lambda ids: transformers_generate(model, ids, max_new_tokens, eos)}
    calls["prompt lookup"] = lambda ids: transformers_generate(
        model, ids, max_new_tokens, eos, prompt_lookup_num_tokens=10, max_matching_ngram_size=3
    )
    first_tokens = {name: TimeToFirstToken() for name in decoders}
    for name, decoder in decoders.items():
        calls[name] = lambda ids, decoder=decoder, watch=first_tokens[name]: decoder.generate(
            [ids[0]], max_new_tokens, eos, streamer=watch
        )[0]
    return Contestants(decoders, calls, blind, first_tokens)


def run(contestants: Contestants, model, prompts: list[torch.Tensor], repeats: int) -> dict:
    """Measure all contestants on ``prompts``; returns a report that can be written as JSON.

    Single steps are timed between the prompts, behind as many tokens as these have on average, so that whole answers
    and their parts share the machine's good and bad moments. A row has tokens per pass, milliseconds per pass and
    their parts, tokens a second, the ratios to both baselines, the share of the achievable, and identity of the text;
    ``without_loops`` holds the same counts over the answers that do not loop. A decoder that guesses but is not
    compiled as the blind ones are has no parts: there is nothing to take its step apart with.
    """
    past = round(sum(ids.shape[1] for ids in prompts) / len(prompts))
    timer = StepTimer(contestants.decoders | contestants.blind, past)
    for watch in contestants.first_tokens.values():
        watch.seconds.clear()
    timings = compare(contestants.calls, prompts, repeats, after_each=timer.round)
    keep, steps = without_loops(timings[LOOP]), timer.medians()
    rows = {}
    for name, timing in timings.items():
        rows[name] = figures(timing, timings, None) | dict(
            spread_vs_generate=[round(x, 3) for x in timing.spread(timings[GENERATE])],
            identical=identity(model, timing, timings[LOOP]),
            without_loops=figures(timing, timings, keep),
        )
        decoder = contestants.decoders.get(name)
        if decoder and (decoder.draft.size == 1 or prepared(decoder) == prepared(contestants.decoders[LOOP])):
            size = decoder.draft.size
            check = steps[size] if size > 1 else steps[name]
            prompt = prompt_seconds(contestants.first_tokens[name], repeats)
            rows[name] |= parts(timing, prompt, steps[name], check) | dict(tree=size)
            for row in (rows[name], rows[name]["without_loops"]) if size > 1 else ():  # a gain needs guesses
                achievable = row["tokens_per_pass"] * steps[LOOP] / check
                row["share_of_achievable"] = round(row["vs_loop"] / achievable, 3)
    return dict(
        machine=machine(model),
        prompts=len(prompts),
        repeats=repeats,
        loop_share=round(1 - sum(keep) / len(keep), 3),
        compile_seconds=round(contestants.compile_seconds, 1),
        rows=rows,
    )


def prepared(decoder: Decoder) -> tuple[bool, bool]:
    """How a decoder's step is run; steps can be compared part by part where that is the same."""
    return decoder.compiled, decoder.library


def figures(timing: Timing, timings: dict[str, Timing], keep: list[bool] | None) -> dict:
    """Tokens per pass, speed and ratios of one contestant, over all prompts or those kept."""
    return dict(
        tokens_per_pass=round(timing.tokens_per_pass(keep), 3),
        tokens_per_second=round(timing.tokens_per_second(keep), 1),
        vs_generate=round(speedup(timing, timings[GENERATE], keep), 3),
        vs_loop=round(speedup(timing, timings[LOOP], keep), 3),
    )


def prompt_seconds(watch: TimeToFirstToken, repeats: int) -> float:
    """Sum over prompts of the median of the repeats; the first answer of all was :func:`compare`'s warm-up."""
    seconds = watch.seconds[1:]
    return sum(statistics.median(seconds[i : i + repeats]) for i in range(0, len(seconds), repeats))


def parts(timing: Timing, prompt: float, step: float, check: float) -> dict:
    """Milliseconds of all answers by passes that followed the prompt's, and where they go.

    ``prompt`` are the seconds of all prompts' passes, ``step`` and ``check`` those of a whole step and of one that
    guesses at no cost. The rest is what the host does between steps, and how much slower these are than in a row of
    the same: memory that other work has driven out of the caches is read anew.
    """
    passes = max(1, len(timing.pass_counts()))
    whole, first = timing.total_seconds() / passes, prompt / passes
    values = dict(
        ms_per_pass=whole,
        ms_verify_accept=check,
        ms_draft=step - check,
        ms_prompt=first,
        ms_rest=whole - first - step,
    )
    return {name: round(value * 1e3, 3) for name, value in values.items()}


def speedup_breakdown(report: dict, name: str = MEDUSA) -> dict[str, float]:
    """From the measured gain over our loop up to the achievable one, taking away what stands between, step by step."""
    loop, row = report["rows"][LOOP], report["rows"][name]

    def gain(*left_out: str) -> float:
        times = [x["ms_per_pass"] - sum(x[part] for part in left_out) for x in (loop, row)]
        return row["tokens_per_pass"] * times[0] / times[1]

    return {
        "measured": gain(),
        "without the prompt's pass": gain("ms_prompt"),
        "and if guessing were free": gain("ms_prompt", "ms_draft"),
        "and without the rest: achievable": gain("ms_prompt", "ms_draft", "ms_rest"),
    }


COLUMNS = {
    "tokens per pass": "tokens_per_pass",
    "ms per pass": "ms_per_pass",
    "verify + accept": "ms_verify_accept",
    "draft": "ms_draft",
    "prompt": "ms_prompt",
    "rest": "ms_rest",
    "tokens/s": "tokens_per_second",
    "× generate": "vs_generate",
    "× our loop": "vs_loop",
    "share of achievable": "share_of_achievable",
}


def markdown(report: dict, loops: bool = False) -> str:
    """A report as a Markdown table, without the answers that loop unless ``loops``."""
    lines = ["| | " + " | ".join(COLUMNS) + " | identical text |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in report["rows"].items():
        values = row if loops else row | row["without_loops"]
        cells = [f"{values[key]:,.2f}" if key in values else "" for key in COLUMNS.values()]
        same = row["identical"]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {same['identical']} of {same['prompts']} |")
    return "\n".join(lines)


def tokens_per_pass(
    model,
    heads: MedusaHeads,
    calibration: Calibration,
    shape: Shape,
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    eos: list[int],
) -> float:
    """Tokens per pass of heads in a growing tree, without the answers that loop; nothing is timed."""
    capacity = max(ids.shape[1] for ids in prompts) + max_new_tokens + shape[0]
    decoder = growing_decoder(model, heads, calibration, shape, capacity)
    runs = [decoder.generate([ids[0]], max_new_tokens, eos)[0] for ids in prompts]
    timing = Timing("", generations=runs)
    return timing.tokens_per_pass(without_loops(timing))


def save(reports: dict[str, dict], folder: Path, notes: dict[str, str]) -> None:
    """Write ``benchmark.json`` and ``benchmark.md``: a table for each report, with the machine it is from.

    ``notes`` are further sections of the Markdown, by their titles.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(reports, indent=2) + "\n")
    sections = []
    for title, report in reports.items():
        about = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
        note = (
            f"{report['prompts']} prompts, {report['repeats']} repeats; {report['loop_share']:.0%} of the answers loop"
        )
        sections += [f"## {title}", f"{note}. {about}.", "Without the answers that loop:", markdown(report)]
        sections += ["All answers:", markdown(report, loops=True)]
    for title, text in notes.items():
        sections += [f"## {title}", text]
    (folder / "benchmark.md").write_text("\n\n".join(["# Benchmark", *sections]) + "\n")
