"""Prompts from anywhere, as one ``datasets.Dataset`` with the columns id, split and messages.

``messages`` is the whole conversation as found, ``[{"role", "content"}, ...]``; self-distillation
uses its system and user turns and lets the base model answer. Ids and splits are stable: they depend
on the source alone, not on the order or the machine.
"""

import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset

from medusa_nb.errors import InputError
from medusa_nb.progress import is_headless
from medusa_nb.source_code import SPLITS, read_functions, split_of

STDLIB_LEFT_OUT = frozenset({"test", "idlelib", "lib2to3", "turtledemo"})  # not on every learner's machine
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")


def load_prompts(source: str, split: str | None = None, limit: int | None = None, seed: int = 0) -> Dataset:
    """Load prompts by the name of their source.

    Args:
        source: ``"stdlib"`` (functions of the Python standard library), ``"prose"`` (the language
            reference that ships with Python), a folder of Python source, a ``.json`` or ``.jsonl``
            file of ShareGPT or messages conversations, or a hub data set's name.
        split: keep only ``"train"``, ``"calibration"`` or ``"test"``.
        limit: keep at most this many, chosen at random by ``seed``.
    """
    if is_headless():
        datasets.disable_progress_bars()
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split '{split}'; choose one of {', '.join(SPLITS)}")
    if source == "stdlib":
        dataset = from_standard_library()
    elif source == "prose":
        dataset = from_prose()
    elif Path(source).is_dir():
        dataset = from_source_folder(source)
    elif Path(source).suffix in (".json", ".jsonl"):
        dataset = from_file(source)
    else:
        dataset = from_hub(source)
    if split is not None:
        dataset = dataset.filter(lambda name: name == split, input_columns="split")
    return sample(dataset, limit, seed)


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


def from_standard_library() -> Dataset:
    """Documented functions of the standard library: the user writes signature and docstring."""
    functions = read_functions(sysconfig.get_paths()["stdlib"], "stdlib", left_out=STDLIB_LEFT_OUT)
    return _from_functions(functions, "standard library")


def from_source_folder(folder: str | Path, name: str | None = None) -> Dataset:
    """Documented functions of your own source folder; ids start with ``name`` (the folder's name)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder")
    return _from_functions(read_functions(folder, name or folder.resolve().name), f"folder '{folder}'")


def _from_functions(functions, source: str) -> Dataset:
    rows, bodies = [], set()
    for function in functions:
        key = "".join(function.body.split())
        if key in bodies:
            continue
        bodies.add(key)
        turns = [("user", function.prompt), ("assistant", function.body)]
        rows.append(_row(function.id, split_of(function.path), turns))
    return _dataset(rows, f"no documented Python function in the {source}")


def from_prose(min_chars: int = 80, max_chars: int = 400) -> Dataset:
    """Paragraphs of Python's language reference, which ships as prose with every Python.

    Out of the domain of code completion; there is no reference answer, only a user turn.
    """
    from pydoc_data.topics import topics

    rows = []
    for topic, text in sorted(topics.items()):
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if not p.startswith((" ", ".", "*", "-"))]
        chosen = [p for p in paragraphs if min_chars <= len(p) <= max_chars and p.endswith(".")]
        rows += [_row(f"prose:{topic}:{i}", split_of(topic), [("user", p)]) for i, p in enumerate(chosen)]
    return _dataset(rows, "no prose in pydoc_data.topics")


def from_file(file: str | Path, on_bad: str = "raise") -> Dataset:
    """Conversations of a JSON or JSONL file, in ShareGPT or in messages form (told apart per record).

    Args:
        file: ``.json`` (a list of records) or ``.jsonl`` (a record a line).
        on_bad: ``"raise"`` at the first conversation that cannot be used, or ``"drop"`` it.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"there is no file '{file}'")
    rows = []
    for where, record in _records(file):
        try:
            rows.append(_conversation(record, file.stem, where))
        except InputError as error:
            if on_bad != "drop":
                raise InputError(f"{file}, {where}: {error}; mend it, or load with on_bad='drop'") from error
    return _dataset(rows, f"'{file}' holds no conversation")


def from_hub(name: str, split: str = "train", **arguments) -> Dataset:
    """Conversations of a hub data set (or of a folder of data files, as ``load_dataset`` takes it)."""
    try:
        loaded = load_dataset(name, split=split, **arguments)
    except Exception as error:  # the hub's errors have no common type
        first_line = str(error).strip().split("\n")[0]
        raise InputError(
            f"'{name}' is no source of prompts: not 'stdlib', 'prose', a folder or a .json/.jsonl file here, "
            f"and as a hub data set: {first_line}"
        ) from error
    short = name.rstrip("/").split("/")[-1]
    rows = []
    for i, record in enumerate(loaded):
        try:
            rows.append(_conversation(record, short, f"row {i}"))
        except InputError as error:
            raise InputError(f"data set '{name}', row {i}: {error}; filter it out or mend it") from error
    return _dataset(rows, f"the data set '{name}' has no rows")


def _records(file: Path) -> Iterable[tuple[str, object]]:
    """``(place, record)`` of a file; places name a line (JSONL) or the number of an entry (JSON)."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{file}, line {number}: not valid JSON ({error.msg})") from error
        return
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(entries, list):
        raise InputError(f"{file}: a list of conversations is expected, found {type(entries).__name__}")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _conversation(record, source: str, where: str) -> dict:
    """One row from a ShareGPT (``conversations``, from/value) or messages (role/content) record."""
    turns = record.get("messages", record.get("conversations")) if isinstance(record, dict) else record
    if not isinstance(turns, list):
        raise InputError("no list under 'messages' or 'conversations'")
    read = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise InputError(f"a turn is a {type(turn).__name__} instead of a role and a content")
        role, content = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES or not isinstance(content, str):
            raise InputError(f"a turn has the role {role!r} and a content of type {type(content).__name__}")
        read.append((SHAREGPT_ROLES[role], content))
    while read and read[0][0] == "assistant":  # ShareGPT exports may start with the model's turn
        read.pop(0)
    if not any(role == "user" and content.strip() for role, content in read):
        raise InputError("the conversation has no user turn")
    given = record.get("id") if isinstance(record, dict) else None
    identity = f"{source}:{given if given is not None else where.replace(' ', '-')}"
    return _row(identity, split_of(identity), read)


def _row(identity: str, split: str, turns: list[tuple[str, str]]) -> dict:
    return dict(id=identity, split=split, messages=[dict(role=role, content=content) for role, content in turns])


def _dataset(rows: list[dict], empty: str) -> Dataset:
    if not rows:
        raise InputError(f"{empty}; nothing to work with")
    seen: Counter = Counter()
    for row in rows:
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:
            row["id"] += f"#{seen[row['id']]}"
    return Dataset.from_list(rows)
