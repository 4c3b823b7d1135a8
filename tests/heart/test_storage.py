"""Files that are written whole or not at all, readable by whoever the umask lets, resumed after a kill."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medusa_nb import storage
from medusa_nb.errors import InputError
from medusa_nb.storage import (
    append_line,
    claim,
    decode_text,
    free_disk,
    is_claimed,
    parse_json,
    portable_name,
    read_json,
    read_lines,
    read_text,
    replacing,
    require_disk_space,
    require_repository,
    save_tensors,
    write_json,
    write_text,
)

REPOSITORY = Path(__file__).parents[2]


def run_python(code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """A Python of its own, in the repository."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_tensors_get_the_permissions_that_any_other_file_gets(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        write_json(tmp_path / "a.json", {})
        (tmp_path / "plain").write_text("")
        assert storage.umask() == mask
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "a.json") == mode(tmp_path / "plain") == 0o666 & ~mask


def test_tensors_come_back_whatever_they_share(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = dict(a=base, b=base, row=base[1], turned=base.T, wanted=torch.nn.Parameter(base))
    save_tensors(tensors, tmp_path / "new" / "a.safetensors")
    read = load_file(tmp_path / "new" / "a.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["a"] and read_text(tmp_path / "a") == "old"


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    code = """
        import os, signal, sys
        from medusa_nb.storage import replacing
        with replacing(sys.argv[1]) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    write_text(tmp_path / "a", "old")
    assert run_python(code, tmp_path / "a").returncode == -signal.SIGKILL
    assert read_text(tmp_path / "a") == "old"


@pytest.mark.parametrize("write", ["write_text(file, 'x' * 5000)", "save_tensors({'a': torch.zeros(5000)}, file)"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, write):
    """A limit on the size of files stands in for the disk; the error takes the same way."""
    code = f"""
        import resource, signal, sys, torch
        from medusa_nb.errors import InputError
        from medusa_nb.storage import save_tensors, write_text
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        file = sys.argv[1]
        try:
            {write}
        except InputError as error:
            sys.stdout.buffer.write(str(error).encode()[:900])
    """
    (tmp_path / "a").write_text("old")
    done = run_python(code, tmp_path / "a")
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode()
    assert said.startswith(f"cannot write to '{tmp_path / 'a'}': ") and "File too large" in said and "\n" not in said
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_no_space_left_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="cannot write to .*No space left on device; free some space"):
        write_json(tmp_path / "a", [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["a file/b", "a folder"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    for write in (lambda file: write_text(file, "x"), lambda file: save_tensors({"a": torch.ones(1)}, file)):
        with pytest.raises(InputError, match="cannot write to .*choose another place") as caught:
            write(tmp_path / place)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["a file", "a folder"] and os.listdir(tmp_path / "a folder") == []


def test_a_latin_1_locale_changes_nothing(tmp_path):
    """CASES 20: files are UTF-8 whatever the locale."""
    code = """
        import locale, sys
        from medusa_nb.storage import append_line, read_json, read_lines, read_text, write_json, write_text
        folder = sys.argv[1]
        assert locale.getpreferredencoding().upper().startswith(("ISO", "ANSI", "ASCII", "US")), locale.getencoding()
        text = "Gr\\u00f6\\u00dfe \\u4e2d \\U0001f642"
        write_text(f"{folder}/text", text)
        write_json(f"{folder}/json", dict(text=text))
        with open(f"{folder}/lines", "w", encoding="utf-8") as handle:
            append_line(handle, dict(text=text))
        assert read_text(f"{folder}/text") == text
        assert read_json(f"{folder}/json") == dict(text=text) == read_lines(f"{folder}/lines")[0]
    """
    done = run_python(code, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr.decode()
    assert read_text(tmp_path / "text") == "Größe 中 🙂" == read_lines(tmp_path / "lines")[0]["text"]


def test_every_file_that_the_package_opens_names_its_encoding():
    """CASES 20, the kind."""
    rules = ["--isolated", "--no-cache", "--preview", "--select", "PLW1514"]
    command = [sys.executable, "-m", "ruff", "check", *rules, "medusa_nb"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf{}", b"{}", b"\n{}\n"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert read_json(tmp_path / "a") == {}
    assert read_lines(tmp_path / "a") == [{}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":\n}', "^here, line 2: not valid JSON"),
        ("{", "^here: not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "a JSON object is expected, found list"),
        ('"a"', "a JSON object is expected, found string"),
        ("null", "a JSON object is expected, found null"),
        ("3", "a JSON object is expected, found number"),
        ("true", "a JSON object is expected, found "),
        ("9" * 5000, "not valid JSON|a JSON object is expected"),
    ],
)
def test_what_is_no_json_object_is_named(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_json(text, "here")
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "a")
    with pytest.raises(InputError, match="there is no file"):
        read_text(tmp_path / "b")
    with pytest.raises(InputError, match="cannot be unpacked"):
        decode_text(b"\x1f\x8bxxx", "a")


def test_lines_and_where_one_is_wrong(tmp_path):
    file = tmp_path / "a.jsonl"
    assert read_lines(file) == []
    file.write_text('{"a": 1}\n\n  \n{"b": "\u2028"}\n', encoding="utf-8")
    assert read_lines(file) == [{"a": 1}, {"b": "\u2028"}]
    file.write_text('{"a": 1}\n[2]\n', encoding="utf-8")
    with pytest.raises(InputError, match="a.jsonl, line 2: a JSON object is expected"):
        read_lines(file)
    with pytest.raises(InputError, match="is not a file"):
        read_lines(tmp_path)


def test_a_torn_last_line_is_cut_off_on_request_only(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": "ä"}\n{"b": "ö'.encode()[:-1])
    with pytest.raises(InputError):
        read_lines(file)
    assert read_lines(file, repair=True) == [{"a": "ä"}]
    assert file.read_bytes() == '{"a": "ä"}\n'.encode()
    file.write_bytes(b'{"a"')
    assert read_lines(file, repair=True) == [] and file.read_bytes() == b""


def test_a_lone_surrogate_can_be_appended(tmp_path):
    with (tmp_path / "a").open("w", encoding="utf-8") as handle:
        append_line(handle, dict(text="a \ud83d b", other="\n"))
        append_line(handle, dict(text="next"))
    rows = read_lines(tmp_path / "a")
    assert [row["text"][:2] for row in rows] == ["a ", "ne"]


def test_work_goes_on_with_its_own_settings_only(tmp_path):
    work, settings = tmp_path / "work", dict(limit=3, words=["a"], rate=0.1, none=None)
    claim(work, settings)
    claim(work, settings | dict(limit=4))  # nothing was made yet: the note may change
    work.mkdir()
    claim(work, settings | dict(limit=4))
    assert is_claimed(work, settings | dict(limit=4)) and not is_claimed(work, settings)
    with pytest.raises(InputError, match=r"made with other settings \(limit 4 -> 3, rate 0.1 -> 0.2\)"):
        claim(work, settings | dict(rate=0.2))
    assert not is_claimed(tmp_path / "other", settings)


def test_disk_space_is_asked_for_before_anything_is_written(tmp_path):
    require_disk_space(tmp_path / "not" / "there", 1)
    assert free_disk(tmp_path / "not" / "there") > 1
    with pytest.raises(InputError, match="needs .* GB and its disk has .* GB free") as caught:
        require_disk_space(tmp_path / "not" / "there", 1e18)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_names_have_no_path_of_this_machine(tmp_path):
    assert portable_name("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert portable_name(tmp_path / "model") == "model"
    assert portable_name(REPOSITORY / "build" / "models" / "x") == "build/models/x"


def test_outside_a_clone(tmp_path, monkeypatch):
    """CASES 31: the package installed elsewhere says so, and keeps its models in the user's cache."""
    assert storage.repository() == REPOSITORY == require_repository("x")
    monkeypatch.setattr(storage, "_HERE", tmp_path)
    assert storage.repository() is None
    assert not storage.build_folder().is_relative_to(tmp_path) and "medusa-nb" in str(storage.build_folder())
    with pytest.raises(InputError, match="the walk needs the repository"):
        require_repository("the walk")
    assert portable_name(tmp_path / "model") == "model"


def test_json_is_readable_by_anyone(tmp_path):
    write_json(tmp_path / "a", dict(text="ö"))
    assert json.loads((tmp_path / "a").read_bytes()) == dict(text="ö")
    assert (tmp_path / "a").read_bytes().endswith(b"\n")
