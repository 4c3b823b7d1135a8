"""For workshops: exercise versions of the notebooks, a check of every seat, a bundle for rooms without network."""

import ast
import html
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil

from medusa_nb.base_model import ROOT, has_native_bf16
from medusa_nb.environment import check_requirements
from medusa_nb.errors import InputError
from medusa_nb.run import notebooks

ANSWER = re.compile(r"<details><summary>Answer</summary>The cell below[^<]*</details>")
YOUR_TURN = 'raise NotImplementedError("your turn: write this, then run the cell again")'


def blank(folder: Path) -> list[Path]:
    """Write the exercise version of every notebook: answers taken out, outputs cleared; returns the files.

    The solved notebooks are the only source. In a cell that ends with ``checks.…`` the bodies of its functions
    are replaced, and an answer that is a plain value becomes ``...``. What was taken out is folded away above.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in notebooks():
        notebook = nbformat.read(path, 4)
        for above, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                if is_exercise(cell.source):
                    folded = f"<details><summary>Answer</summary><pre>{html.escape(cell.source)}</pre></details>"
                    above.source = ANSWER.sub(lambda _, folded=folded: folded, above.source)
                    cell.source = blanked(cell.source)
        target = folder / path.name
        nbformat.write(notebook, target)
        written.append(target)
    for page in sorted((ROOT / "notebooks").glob("*.md")):
        shutil.copy(page, folder)
    return written


def is_exercise(source: str) -> bool:
    """A code cell whose last statement calls one of :mod:`medusa_nb.checks`."""
    lines = source.strip().splitlines()
    return bool(lines) and lines[-1].startswith("checks.")


def blanked(source: str) -> str:
    """An exercise cell without its answer."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef):
            lines[node.body[0].lineno - 1 : node.end_lineno] = ["    " + YOUR_TURN]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "answer":
            lines[node.lineno - 1 : node.end_lineno] = ["answer = ...  # your turn"]
    return "\n".join(lines)


def seat_checks() -> Iterator[tuple[bool, str, str]]:
    """``(fine, what, detail)`` for everything a seat needs; the last ones run the base model."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield sys.version_info >= (3, 11), "Python 3.11 or newer", version
    for line in check_requirements():
        yield line.startswith("OK"), *line[5:].split(" ", 1)
    memory, disk = psutil.virtual_memory().available / 1e9, shutil.disk_usage(ROOT).free / 1e9
    yield memory > 3, "3 GB of free memory", f"{memory:.1f} GB"
    yield disk > 2, "2 GB of free disk", f"{disk:.1f} GB"
    yield (os.cpu_count() or 1) >= 2, "2 cores", str(os.cpu_count())
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++") or shutil.which("cl")
    yield True, "a C++ compiler (optional: steps compile)", compiler or "none, steps run eagerly"
    yield True, "native bf16 (optional)", "yes" if has_native_bf16() else "no, fp32 is used"
    from medusa_nb.base_model import load_base_model
    from medusa_nb.decoding import greedy_generate

    started = time.perf_counter()
    model, tokenizer = load_base_model()
    yield True, "the base model loads", f"{time.perf_counter() - started:.1f} s"
    ids = tokenizer("def add(a, b):", return_tensors="pt").input_ids.to(model.device)
    started = time.perf_counter()
    result = greedy_generate(model, ids, 32, eos_token_id=[])
    rate = len(result.new_tokens) / (time.perf_counter() - started)
    yield rate > 20, "it writes 20 tokens a second or more", f"{rate:.0f}"


def doctor() -> bool:
    """Print the seat's checks line by line; True if all are fine."""
    good = True
    for fine, what, detail in seat_checks():
        print(f"{'OK  ' if fine else 'FAIL'}  {what}: {detail}", flush=True)
        good = good and fine
    print("this seat is ready" if good else "this seat is not ready; see the lines that start with FAIL")
    return good


def pack(folder: Path) -> Path:
    """Everything a room without network needs in ``folder``: the repository, all wheels, and how to install.

    Raises:
        InputError: the folder is not empty, or wheels cannot be fetched.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"'{folder}' is not empty; choose a new folder for the bundle")
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    archive = folder / "medusa-in-notebooks.tar.gz"
    subprocess.run(["git", "archive", "--format=tar.gz", f"--output={archive.resolve()}", "HEAD"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(folder / "wheels"), "-r", str(ROOT / "requirements-serve.txt"), "setuptools", "wheel"]
    if subprocess.run(command).returncode:
        raise InputError("some wheels could not be fetched; pip's own message stands above")
    (folder / "INSTALL.txt").write_text(
        "tar xzf medusa-in-notebooks.tar.gz -C DESTINATION && cd DESTINATION\n"
        "python3 -m venv .venv\n"
        ".venv/bin/python -m pip install --no-index --find-links BUNDLE/wheels -r requirements-serve.txt setuptools\n"
        ".venv/bin/python -m pip install --no-index --no-deps --no-build-isolation -e .\n"
        ".venv/bin/python -m medusa_nb doctor\n"
    )
    return folder
