"""Run the notebooks headlessly, in order, and keep what they show and what they measured."""

import os
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
from jupyter_client.kernelspec import NoSuchKernel
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from medusa_nb.course.walk import read_results
from medusa_nb.errors import InputError
from medusa_nb.progress import HEADLESS
from medusa_nb.storage import build_folder, require_repository, write_json

TOOK = re.compile(r"\*Takes [^*]*\*")
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})  # what goes to a kernel and comes back
WALK = ("01", "02", "03", "04")  # what a run executes by default; later notebooks build on the same artefacts


def notebooks() -> list[Path]:
    """All notebooks in their order."""
    folder = require_repository("running notebooks") / "notebooks"
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def find(name: str) -> Path:
    """A notebook by its name or the number it starts with."""
    matches = [n for n in notebooks() if n.stem == name or n.stem.split("_")[0] == name]
    if not matches:
        raise InputError(f"there is no notebook '{name}'; there are {', '.join(n.stem for n in notebooks())}")
    return matches[0]


def known_parameters(notebook: Path) -> set[str]:
    """The names of a notebook's parameters; refuses one without exactly one cell for them."""
    cells = nbformat.read(notebook, 4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters', exactly one is needed")
    return set(papermill.inspect_notebook(str(notebook)))


def execute(notebook: Path, parameters: dict, out: Path, timeout: int = 3600) -> Path:
    """Run one notebook in a fresh kernel; returns the executed copy in ``out``.

    Raises:
        InputError: unknown parameter, no kernel, a cell failed (its number and error are named; the copy up to there
            is kept), or a cell did not run.
    """
    refuse_unknown(parameters, known_parameters(notebook), notebook.name)
    out.mkdir(parents=True, exist_ok=True)
    target = out / notebook.name
    try:
        with peak_memory() as peak, kernel_environment():
            papermill.execute_notebook(
                str(notebook),
                str(target),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(notebook.parent),
                execution_timeout=timeout,
                progress_bar=sys.stderr.isatty(),
                config=ENCRYPTED,
            )
    except PapermillExecutionError as error:
        raise InputError(
            f"{notebook.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}; "
            f"the notebook up to there is '{target}'"
        ) from error
    except NoSuchKernel as error:
        raise InputError("there is no Jupyter kernel 'python3'; install ipykernel into this environment") from error
    except (RuntimeError, TimeoutError) as error:  # the kernel died, did not start, or a cell took too long
        raise InputError(f"{notebook.name} was not finished: {' '.join(str(error).split())}") from error
    executed = nbformat.read(target, 4)
    executed.metadata["peak_memory_gb"] = round(peak["bytes"] / 1e9, 2)
    nbformat.write(executed, target)
    for cell in executed.cells:
        if cell.cell_type == "code" and cell.source.strip() and not cell.execution_count:
            raise InputError(
                f"{notebook.name} ended early: a cell did not run; it starts with {cell.source.splitlines()[0]!r}"
            )
    return target


def refuse_unknown(parameters: dict, known: set[str], where: str) -> None:
    """Raise :class:`InputError` for a parameter that ``where`` has not."""
    for name in parameters.keys() - known:
        raise InputError(f"{where} has no parameter '{name}'; it has {', '.join(sorted(known))}")


@contextmanager
def kernel_environment() -> Iterator[None]:
    """What kernels inherit: nobody watches, and the network stays closed unless it was opened by hand."""
    before = os.environ.copy()
    os.environ.update({HEADLESS: "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


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


def run_walk(
    run: str = "learner", only: list[str] | None = None, parameters: dict | None = None, every: bool = False
) -> Path:
    """Execute the walk, ``every`` notebook, or ``only`` some; returns the folder with notebooks and results.json.

    With ``only`` it goes on with the last run, otherwise it starts a new one.
    """
    out, work = build_folder() / "run" / run, build_folder() / "walk" / run
    chosen = [find(name) for name in only] if only else [n for n in notebooks() if every or n.stem.startswith(WALK)]
    known = {notebook: known_parameters(notebook) for notebook in chosen}
    wanted = parameters or {}
    refuse_unknown(wanted, set().union(*known.values()), "this run")
    if not only:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    started = time.time()
    for notebook in chosen:
        begun = time.time()
        print(f"{notebook.stem} ...", end=" ", flush=True)
        own = {name: value for name, value in wanted.items() if name in known[notebook]}
        execute(notebook, {"run": run, "work": str(work)} | own, out)
        minutes = round((time.time() - begun) / 60, 1)
        print(f"{minutes} min", flush=True)
        results = read_results(work / "results.json")
        results["minutes"] = results.get("minutes", {}) | {notebook.name[:2]: minutes}
        write_json(work / "results.json", results)
    print(f"{len(chosen)} notebooks done in {(time.time() - started) / 60:.1f} min; executed copies in {out}")
    shutil.copy(work / "results.json", out / "results.json")
    return out


def keep_outputs(out: Path, only: list[str] | None = None) -> None:
    """Copy the outputs of executed notebooks in ``out`` into ``notebooks/``.

    Papermill's traces are removed. How long the notebook took, and its largest resident memory, go into its first
    cell; the run's id and the versions it ran with into its metadata.
    """
    run_id = read_results(out / "results.json")["run_id"]
    for source in [find(name) for name in only] if only else notebooks():
        if not (out / source.name).is_file():
            continue
        notebook = nbformat.read(out / source.name, 4)
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        minutes = max(1, round((notebook.metadata.pop("papermill", {}).get("duration") or 0) / 60))
        memory = notebook.metadata.pop("peak_memory_gb", 0)
        took = f"*Takes {minutes} minute{'s' if minutes > 1 else ''} on two CPU cores and {memory:.1f} GB of memory.*"
        notebook.cells[0].source = re.sub(TOOK, took, notebook.cells[0].source)
        names = ("torch", "transformers", "datasets", "papermill", "medusa-nb")
        notebook.metadata["medusa_nb"] = dict(run_id=run_id, versions={name: version(name) for name in names})
        notebook.metadata.pop("widgets", None)
        count = 0
        for cell in notebook.cells:
            cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                for output in cell.outputs:
                    if "execution_count" in output:
                        output.execution_count = count
        nbformat.write(notebook, source)
