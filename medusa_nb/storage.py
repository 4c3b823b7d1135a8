"""Files on disk: written whole or not at all, readable by whoever the umask lets, resumed after a kill.

Long work (answers, hidden states, training) resumes by one scheme: a note beside it says what it was started
with (:func:`claim`), and what is finished is found on disk.
"""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from safetensors import SafetensorError
from safetensors.torch import save_file

from medusa_nb.errors import InputError

_HERE = Path(__file__).resolve().parent.parent


def repository() -> Path | None:
    """The clone this package runs from, None where it is installed elsewhere."""
    return _HERE if (_HERE / "notebooks").is_dir() and (_HERE / "pyproject.toml").is_file() else None


def require_repository(what: str) -> Path:
    """The clone, or one sentence: ``what`` cannot be done without it."""
    root = repository()
    if root is None:
        raise InputError(f"{what} needs the repository, and this package runs outside of it; clone it and run there")
    return root


def build_folder() -> Path:
    """Where models and runs are kept: ``build/`` of the clone, else the user's cache folder."""
    root = repository()
    return root / "build" if root else Path(platformdirs.user_cache_dir("medusa-nb"))


def portable_name(name: str | Path) -> str:
    """A model's name without the path of this machine: relative to the clone if inside it."""
    path, root = Path(name), repository()
    if not path.is_absolute():
        return str(name)
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name


@contextmanager
def replacing(file: str | Path):
    """A temporary path beside ``file`` that takes its place at the end of the block, whole or not at all.

    Raises:
        InputError: it cannot be written, because the disk is full, say.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to '{file}': {why}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(file: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all, whatever the locale."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: str | Path, value, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(value, indent=indent) + "\n")


def read_text(file: str | Path) -> str:
    """UTF-8 text, with or without a byte order mark.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"there is no file '{file}'")
    return decode_text(file.read_bytes(), file)


def decode_text(data: bytes, file: str | Path) -> str:
    """Bytes of ``file``, which may be packed by gzip, as text without a byte order mark."""
    try:
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{file}' cannot be unpacked: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(file: str | Path, kind: type = dict):
    """The JSON value of a file, which must be a ``kind``.

    Raises:
        InputError: no such file, not JSON (with the line), or another kind of value.
    """
    return parse_json(read_text(file), str(file), kind)


def parse_json(text: str, where: str, kind: type = dict):
    """A JSON value that must be a ``kind``; ``where`` names its source in the message."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        line = f", line {number}" if number > 1 else ""
        fault = getattr(error, "msg", "nested too deeply, or a number too long")
        raise InputError(f"{where}{line}: not valid JSON ({fault})") from error
    if not isinstance(value, kind):
        raise InputError(f"{where}: a JSON {_NAMES[kind]} is expected, found {_NAMES.get(type(value), 'a value')}")
    return value


_NAMES = {dict: "object", list: "list", str: "string", int: "number", float: "number", type(None): "null"}


def read_lines(file: str | Path, repair: bool = False) -> list[dict]:
    """The records of a JSONL file, none if there is no file.

    Args:
        repair: cut off a last line that a killed process left incomplete.

    Raises:
        InputError: a line is no JSON object; names file and line.
    """
    file = Path(file)
    if not file.exists():
        return []
    if not file.is_file():
        raise InputError(f"'{file}' is not a file; name a JSONL file")
    data = file.read_bytes()
    if repair and data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        with file.open("r+b") as handle:
            handle.truncate(len(data))
    lines = enumerate(decode_text(data, file).split("\n"), 1)
    return [parse_json(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def append_line(handle, record: dict) -> None:
    """Append one JSON line and hand it to the operating system at once."""
    handle.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")
    handle.flush()


def sync(handles: Iterable) -> None:
    """Have the operating system put what was written on the disk."""
    for handle in handles:
        os.fsync(handle.fileno())


def claim(work: str | Path, settings: dict) -> None:
    """Note what ``work`` (a file or folder) is made with; refuse to continue what was made with something else."""
    work, note = Path(work), _note_of(work)
    if note.exists() and work.exists():
        earlier = read_json(note)
        changed = [f"{k} {earlier.get(k)!r} -> {v!r}"[:200] for k, v in settings.items() if earlier.get(k) != v]
        if changed:
            listed = ", ".join(changed)
            raise InputError(f"'{work}' was made with other settings ({listed}); choose another place or delete it")
        return
    write_json(note, settings)


def is_claimed(work: str | Path, settings: dict | None = None) -> bool:
    """Whether ``work`` is being made, or was made, with just these settings; None for any."""
    note = _note_of(Path(work))
    return note.exists() and (settings is None or read_json(note) == settings)


def _note_of(work: Path) -> Path:
    return work.with_name(work.name + ".settings")


def save_tensors(tensors: dict, file: str | Path) -> None:
    """Write a safetensors file, whole or not at all, with the permissions that other files get."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(file) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
        respect_umask(temporary)


def respect_umask(*files: Path) -> None:
    """Give files the permissions that any new file gets; safetensors makes them readable by their owner only."""
    for file in files:
        file.chmod(0o666 & ~umask())


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def require_disk_space(folder: str | Path, needed: float) -> None:
    """Raise :class:`InputError` if ``folder``'s disk has less than ``needed`` bytes (and 5 %) free."""
    free = free_disk(folder)
    if needed * 1.05 > free:
        raise InputError(
            f"'{folder}' needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; free some space first"
        )


def free_disk(folder: str | Path) -> int:
    """Free bytes on the disk of ``folder``, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
