"""Prompts from anywhere, as one ``datasets.Dataset`` with the columns id, split and messages.

``messages`` is the whole conversation as found, ``[{"role", "content"}, ...]``. Self-distillation takes its system
and user turns and lets the base model answer. Ids and splits depend on the source alone, not on order or machine.
"""

import random
import sysconfig
from collections import Counter
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset

from medusa_nb.distillation.conversations import conversation_files, enumerated, read_conversations, usable
from medusa_nb.distillation.everyday import everyday_questions
from medusa_nb.distillation.source_code import SPLITS, read_functions, split_of
from medusa_nb.errors import InputError
from medusa_nb.progress import is_headless

STDLIB_LEFT_OUT = frozenset({"test", "idlelib", "lib2to3", "turtledemo", "distutils"})  # not on every learner's machine


def load_prompts(
    source: str,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad: str = "raise",
    dropped: Counter | None = None,
) -> Dataset:
    """Load prompts by the name of their source.

    Args:
        source: ``"stdlib"`` (functions of the Python standard library), ``"everyday"`` (everyday questions), a folder
            of Python source, a file or folder of ShareGPT or messages conversations (JSON, JSONL, gzip, Parquet), or
            a hub data set's name.
        split: keep only ``"train"``, ``"calibration"`` or ``"test"``.
        limit: keep at most this many, chosen at random by ``seed``.
        on_bad: ``"raise"`` at the first conversation that cannot be used, or ``"drop"`` it.
        dropped: counts those left out, by reason.

    Raises:
        InputError: no such source, nothing in it, or a conversation that cannot be used.
    """
    if is_headless():
        datasets.disable_progress_bars()
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split '{split}'; choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}; keep at least one prompt")
    path = Path(source)
    if source == "stdlib":
        functions = read_functions(sysconfig.get_paths()["stdlib"], "stdlib", STDLIB_LEFT_OUT)
        rows = _from_functions(functions)
    elif source == "everyday":
        questions = everyday_questions()
        rows = [_row(f"everyday:{i}", split_of(topic), text) for i, (topic, text) in enumerate(questions)]
    elif files := conversation_files(path):
        rows = read_conversations(files, on_bad, dropped)
    elif path.is_dir():
        rows = _from_functions(read_functions(path, path.resolve().name))
    else:
        rows = _from_hub(source, on_bad, dropped)
    rows = [row for row in rows if split in (None, row["split"])]
    if not rows:
        raise InputError(f"'{source}' holds no prompt{f' of the split {split}' if split else ''} that can be used")
    return sample(Dataset.from_list(with_own_ids(rows)), limit, seed)


def sample(dataset: Dataset, limit: int | None, seed: int = 0) -> Dataset:
    """At most ``limit`` rows, drawn by ``seed`` and kept in their order."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(sorted(random.Random(seed).sample(range(len(dataset)), limit)))


def first_turn(messages: list[dict]) -> list[dict]:
    """The messages up to and including the first user turn: a prompt that can be answered at once."""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            return messages[: i + 1]
    raise InputError("the conversation has no user turn")


def with_own_ids(rows: list[dict]) -> list[dict]:
    """The same rows, an id that occurs again told apart by a number."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:
            row["id"] += f"#{seen[row['id']]}"
    return rows


def _from_functions(functions) -> list[dict]:
    rows, bodies = [], set()
    for function in functions:
        key = "".join(function.body.split())
        if key not in bodies:  # the same function is often found in several places
            rows.append(_row(function.id, split_of(function.path), function.question, function.human_answer))
        bodies.add(key)
    return rows


def _row(identity: str, split: str, question: str, answer: str | None = None) -> dict:
    messages = [dict(role="user", content=question)]
    if answer is not None:
        messages.append(dict(role="assistant", content=answer))
    return dict(id=identity, split=split, messages=messages)


def _from_hub(name: str, on_bad: str, dropped: Counter | None) -> list[dict]:
    try:
        loaded = load_dataset(name, split="train")
    except Exception as error:  # the hub's errors have no common type
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(
            f"'{name}' is no source of prompts: not 'stdlib', 'everyday', a folder or a file here, and as a hub data "
            f"set: {first_line}"
        ) from error
    short = name.rstrip("/").split("/")[-1]
    return usable(enumerated(loaded, "row", start=0), short, f"data set '{name}'", on_bad, dropped)
