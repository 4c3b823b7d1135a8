"""Conversations as people keep them: ShareGPT and messages records, in JSON, JSONL, gzip or Parquet.

A record becomes ``{"id", "split", "messages"}``. What cannot be used is an error that names the place, or, if so
wished, left out and counted.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from datasets import load_dataset

from medusa_nb.chat import clean_text
from medusa_nb.distillation.source_code import split_of
from medusa_nb.errors import InputError
from medusa_nb.storage import decode_text, parse_json

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".parquet")
Place = tuple[str, object]  # where a record stands, and the record


def holds_conversations(path: Path) -> bool:
    """Whether a path is a file of conversations, or a folder of such files."""
    if path.is_dir():
        return not any(path.glob("*.py")) and any(file.name.endswith(ENDINGS) for file in path.iterdir())
    return path.name.endswith(ENDINGS)


def read_conversations(path: Path, on_bad: str = "raise", dropped: Counter | None = None) -> list[dict]:
    """The conversations of a file, or of all files in a folder.

    Args:
        on_bad: ``"raise"`` at the first record that cannot be used, or ``"drop"`` it.
        dropped: counts the reasons of those that are left out.
    """
    files = sorted(f for f in path.iterdir() if f.name.endswith(ENDINGS)) if path.is_dir() else [path]
    rows = []
    for file in files:
        if not file.is_file():
            raise InputError(f"there is no file '{file}'")
        stem = file.name.split(".")[0]
        rows += usable((place for place in _records(file)), stem, str(file), on_bad, dropped)
    return rows


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
    """One row from a ShareGPT (``conversations``, from/value) or messages (role/content) record; null is absent."""
    turns = _first(record, "messages", "conversations", "conversation") if isinstance(record, dict) else record
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
        raise InputError(f"a turn has the role {str(role)[:40]!r}; {', '.join(dict.fromkeys(ROLES))} are known")
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
        return enumerated(load_dataset("parquet", data_files=str(file), split="train"), "row", start=0)
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{file}' cannot be read: {str(error) or 'it is cut short'}") from error
    text = decode_text(data, file)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if file.name.endswith((".json", ".json.gz")) and not _is_json(lines[0][1] if lines else ""):
            line = getattr(error, "lineno", 1)
            raise InputError(
                f"{file}, line {line}: not valid JSON ({getattr(error, 'msg', 'nested too deeply')})"
            ) from error
        return [(f"line {number}", parse_json(line, f"{file}, line {number}", object)) for number, line in lines]
    if isinstance(value, dict) and not any(name in value for name in ("messages", "conversations", "conversation")):
        raise InputError(
            f"{file}: a list of conversations is expected, found an object with {', '.join(value) or 'nothing'}"
        )
    return enumerated(value if isinstance(value, list) else [value], "entry", start=1)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def enumerated(records: Iterable, word: str, start: int) -> Iterable[Place]:
    """``("entry 3", record)`` and so on."""
    return ((f"{word} {number}", record) for number, record in enumerate(records, start))
