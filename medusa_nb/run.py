"""Run the notebooks headlessly, in order, and keep what they show and what they measured."""

import hashlib
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
import psutil
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from medusa_nb.base_model import ROOT
from medusa_nb.errors import InputError
from medusa_nb.progress import HEADLESS
from medusa_nb.walk import DOMAINS

NOTEBOOKS = ROOT / "notebooks"
TOOK = re.compile(r"\*Took [^*]*? on two CPU cores, [^*]*? GB of memory")

ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})  # what goes to a kernel and comes back
WALK = ("01", "02", "03", "04")  # what one run executes; later notebooks build on its artefacts


def notebooks() -> list[Path]:
    """All notebooks in their order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def walk() -> list[Path]:
    """The notebooks of the walk in their order."""
    return [notebook for notebook in notebooks() if notebook.stem.startswith(WALK)]


def find(name: str) -> Path:
    """A notebook by its name or the number it starts with."""
    matches = [n for n in notebooks() if n.stem == name or n.stem.split("_")[0] == name]
    if not matches:
        raise InputError(f"there is no notebook '{name}'; there are {', '.join(n.stem for n in notebooks())}")
    return matches[0]


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Refuse names the notebook does not know, and notebooks without exactly one parameters cell."""
    cells = nbformat.read(notebook, 4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters', exactly one is needed")
    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in known:
            raise InputError(f"{notebook.name} has no parameter '{name}'; it has {', '.join(known)}")


def execute(notebook: Path, parameters: dict, out: Path, timeout: int = 1800) -> Path:
    """Run one notebook in a fresh kernel; returns the executed copy in ``out``.

    Raises:
        InputError: unknown parameter, a cell failed (its number and error are named; the copy up to
            there is kept), or a cell did not run.
    """
    check_parameters(notebook, parameters)
    out.mkdir(parents=True, exist_ok=True)
    target = out / notebook.name
    kernel_environment = {HEADLESS: "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    before = {name: os.environ.get(name) for name in kernel_environment}
    os.environ.update(kernel_environment)
    try:
        with peak_memory() as peak:
            papermill.execute_notebook(
                str(notebook),
                str(target),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(NOTEBOOKS),
                execution_timeout=timeout,
                progress_bar=sys.stderr.isatty(),
                config=ENCRYPTED,
            )
    except PapermillExecutionError as error:
        raise InputError(
            f"{notebook.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; "
            f"the notebook up to there is '{target}'"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    executed = nbformat.read(target, 4)
    executed.metadata["peak_memory_gb"] = round(peak["bytes"] / 1e9, 2)
    nbformat.write(executed, target)
    for cell in executed.cells:
        if cell.cell_type == "code" and cell.source.strip() and not cell.execution_count:
            raise InputError(
                f"{notebook.name} ended early: a cell did not run; it starts with {cell.source.splitlines()[0]!r}"
            )
    return target


@contextmanager
def peak_memory(every: float = 1.0) -> Iterator[dict[str, int]]:
    """Sample the resident memory of this process's children; afterwards ``["bytes"]`` holds the largest sum seen."""
    peak, ended = {"bytes": 0}, threading.Event()

    def sample() -> None:
        while not ended.wait(every):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    total += child.memory_info().rss
            peak["bytes"] = max(peak["bytes"], total)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()


def run_walk(run: str = "learner", only: list[str] | None = None, parameters: dict | None = None) -> Path:
    """Execute the walk (or some of its notebooks); returns the folder with notebooks and results.json."""
    out = ROOT / "build" / "run" / run
    work = ROOT / "build" / "walk" / run
    chosen = [find(name) for name in only] if only else walk()
    if not only:
        shutil.rmtree(work, ignore_errors=True)
    wanted = parameters or {}
    known = {n: set(papermill.inspect_notebook(str(n))) for n in chosen}
    everything = sorted(set().union(*known.values()))
    if unknown := sorted(set(wanted) - set(everything)):
        names = ", ".join(everything)
        raise InputError(f"no notebook of this run has a parameter '{unknown[0]}'; they have {names}")
    started = time.time()
    for notebook in chosen:
        begun = time.time()
        print(f"{notebook.stem} ...", end=" ", flush=True)
        own = {name: value for name, value in wanted.items() if name in known[notebook]}
        execute(notebook, {"run": run, "work": str(work)} | own, out)
        print(f"{(time.time() - begun) / 60:.1f} min", flush=True)
    print(f"walk done in {(time.time() - started) / 60:.1f} min; executed notebooks in {out.relative_to(ROOT)}")
    if (work / "results.json").exists():
        shutil.copy(work / "results.json", out / "results.json")
    return out


def keep_outputs(out: Path, only: list[str] | None = None) -> None:
    """Copy the outputs of the walk (or of ``only`` some notebooks), executed in ``out``, into ``notebooks/``.

    Papermill's traces are removed. How long the notebook took, and its largest resident memory, go into its first
    cell, and the versions it ran with into its metadata.
    """
    names = [find(name).name for name in only] if only else [notebook.name for notebook in walk()]
    for executed in sorted(out / name for name in names):
        notebook = nbformat.read(executed, 4)
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        minutes = max(1, round((notebook.metadata.pop("papermill", {}).get("duration") or 0) / 60))
        memory = f"{notebook.metadata.pop('peak_memory_gb', 0):.1f} GB of memory"
        took = f"*Took {minutes} minute{'s' if minutes > 1 else ''} on two CPU cores, {memory}"
        notebook.cells[0].source = re.sub(TOOK, took, notebook.cells[0].source)
        notebook.metadata["executed_with"] = provenance()
        count = 0
        for cell in notebook.cells:
            cell.metadata = {"tags": ["parameters"]} if "parameters" in cell.metadata.get("tags", []) else {}
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = count
        nbformat.write(notebook, NOTEBOOKS / executed.name)


def provenance() -> dict[str, str]:
    """Versions of what a notebook runs with, and a hash of this package's code."""
    code = hashlib.sha256()
    for file in sorted((ROOT / "medusa_nb").glob("*.py")):
        code.update(file.read_bytes())
    versions = {name: version(name) for name in ("torch", "transformers", "datasets", "papermill")}
    return versions | dict(python=platform.python_version(), medusa_nb=code.hexdigest()[:12])


def result_table(results: dict) -> str:
    """The walk's main figures as plain text."""
    lines = [" " * 24 + "".join(f"  {title}" for title in DOMAINS)]
    for dtype, part in results.get("speed", {}).items():
        for name, key in (
            ("tokens per pass", "tokens_per_pass"),
            ("speedup, generate", "speedup_vs_generate"),
            ("speedup, our loop", "speedup_vs_greedy_loop"),
        ):
            values = {title: part.get(domain, {}).get(key) for title, domain in DOMAINS.items()}
            cells = ("" if value is None else f"{value:.2f}" for value in values.values())
            row = "".join(f"  {cell:>{len(title)}}" for title, cell in zip(values, cells, strict=True))
            lines.append(f"{name + ' ' + dtype:24}{row}")
        same = part.get("identical_to_greedy", {})
        lines.append(
            f"identical text {dtype}: {same.get('identical')} of {same.get('prompts')}, gaps {same.get('gaps')}"
        )
    return "\n".join(lines)
