"""Conversations as people keep them: ShareGPT and messages records, in JSON, JSONL, gzip or Parquet.

A record becomes ``{"id", "split", "messages"}``. What cannot be used is an error that names the place, or, if so
wished, left out and counted.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow
from pyarrow import parquet

from medusa_nb.chat import clean_text
from medusa_nb.distillation.source_code import split_of
from medusa_nb.errors import InputError
from medusa_nb.storage import read_text

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNS = ("messages", "conversations", "conversation")
ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet")
Place = tuple[str, object]  # where a record stands, and the record


def conversation_files(path: Path) -> list[Path]:
    """The files of conversations at a path: itself, or those of a folder, at any depth, that holds no Python source."""
    if not path.is_dir():
        return [path] if path.is_file() or path.name.endswith(ENDINGS) else []
    if any(path.rglob("*.py")):
        return []
    found = (file for file in path.rglob("[!.]*") if file.name.endswith(ENDINGS) and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))


def read_conversations(files: list[Path], on_bad: str = "raise", dropped: Counter | None = None) -> list[dict]:
    """The conversations of these files.

    Args:
        on_bad: ``"raise"`` at the first record that cannot be used, or ``"drop"`` it.
        dropped: counts the reasons of those that are left out.
    """
    return [
        row for file in files for row in usable(_records(file), file.name.split(".")[0], str(file), on_bad, dropped)
    ]


def usable(records: Iterable[Place], stem: str, source: str, on_bad: str, dropped: Counter | None) -> list[dict]:
    """Rows made of ``(place, record)`` pairs; ``stem`` starts their ids, ``source`` names them in messages."""
    if on_bad not in ("raise", "drop"):
        raise InputError(f"on_bad is '{on_bad}'; choose raise or drop")
    rows = []
    for where, record in records:
        try:
            rows.append(conversation(record, stem, where))
        except InputError as error:
            if on_bad == "raise":
                raise InputError(
                    f"{source}, {where}: {error}; mend it, or leave such out with --on-bad drop"
                ) from error
            if dropped is not None:
                dropped[str(error)] += 1
    return rows


def conversation(record, source: str, where: str) -> dict:
    """One row from a ShareGPT (``conversations``, from/value) or messages (role/content) record; null is absent.

    ``record`` may also be a line of JSON that still has to be read.
    """
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not valid JSON ({_fault(error)})") from error
    turns = _first(record, *TURNS) if isinstance(record, dict) else record
    if not isinstance(turns, list):
        raise InputError("no list of turns under 'messages' or 'conversations'")
    read = [_turn(turn) for turn in turns]
    while read and read[0]["role"] == "assistant":  # ShareGPT exports may start with the model's turn
        read.pop(0)
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in read):
        raise InputError("the conversation has no user turn")
    given = record.get("id") if isinstance(record, dict) else None
    identity = clean_text(f"{source}:{given if isinstance(given, str | int) else where.replace(' ', '-')}")
    return dict(id=identity, split=split_of(identity), messages=read)


def _turn(turn) -> dict:
    if not isinstance(turn, dict):
        raise InputError(f"a turn is a {type(turn).__name__} instead of a role and a content")
    role, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise InputError(f"a turn has the role {str(role)[:40]!r}; {', '.join(ROLES)} are known")
    if isinstance(content, list):
        content = "".join(_text_of(part) for part in content)
    if content is None and ROLES[role.lower()] == "assistant":
        content = ""  # the model answers itself anyway
    if not isinstance(content, str):
        raise InputError(f"a turn of the {role} has a content of type {type(content).__name__} instead of text")
    return dict(role=ROLES[role.lower()], content=clean_text(content))


def _text_of(part) -> str:
    if isinstance(part, str):
        return part
    kind = _first(part, "type") if isinstance(part, dict) else type(part).__name__
    text = _first(part, "text") if isinstance(part, dict) else None
    if kind not in ("text", None) or not isinstance(text, str):
        raise InputError(f"a turn has a part of type {str(kind)[:40]!r}; only text can be used")
    return text


def _first(record: dict, *names: str):
    """The first value under these names that is there and not null."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def _records(file: Path) -> Iterable[Place]:
    """``(place, record)`` of a file; JSON and JSONL are told apart by what is in them."""
    if file.suffix == ".parquet":
        return enumerated(_rows_of_parquet(file), "row", start=0)
    text = read_text(file)
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "jsonl" in file.name or "ndjson" in file.name or (lines and _is_json(lines[0][1])):
            return lines
        raise InputError(f"{file}, line {getattr(error, 'lineno', 1)}: not valid JSON ({_fault(error)})") from error
    if isinstance(value, list):
        return enumerated(value, "entry", start=1)
    if isinstance(value, dict) and not value.keys() & set(TURNS):
        names = " ".join(", ".join(value).split()) or "nothing"  # a name may hold line breaks
        raise InputError(f"{file}: a list of conversations is expected, found an object with {names[:200]}")
    return [("line 1", value)]


def _rows_of_parquet(file: Path) -> list[dict]:
    try:
        names = {"id", *TURNS} & set(parquet.read_schema(file).names)
        return parquet.read_table(file, columns=sorted(names)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{file}' cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _fault(error: Exception) -> str:
    """What the JSON reader tripped over, in a few words."""
    return getattr(error, "msg", "nested too deeply, or a number too long")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def enumerated(records: Iterable, word: str, start: int) -> Iterable[Place]:
    """``("entry 3", record)`` and so on."""
    return ((f"{word} {number}", record) for number, record in enumerate(records, start))
