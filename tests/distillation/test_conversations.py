"""Conversations as people keep them, and what is said about those that cannot be used."""

import gzip
import json
import os
from collections import Counter

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from medusa_nb.distillation.prompts import load_prompts
from medusa_nb.errors import InputError

QUESTION = dict(role="user", content="Why?")
ANSWER = dict(role="assistant", content="Because.")
HUMAN = {"from": "human", "value": "Hi"}


def lines(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(file, **options) -> list[dict]:
    return list(load_prompts(str(file), **options))


def test_sharegpt_records_of_a_json_file(tmp_path):
    turns = [("gpt", "Hello!"), ("human", "Hi"), ("gpt", "What?"), ("human", "Go"), ("gpt", "on")]
    records = [
        dict(id="a", conversations=[{"from": role, "value": text} for role, text in turns]),
        dict(conversations=[{"from": "system", "value": "Be brief."}, HUMAN]),
    ]
    (tmp_path / "chats.json").write_text(json.dumps(records, indent=1))
    rows = read(tmp_path / "chats.json")
    assert [row["id"] for row in rows] == ["chats:a", "chats:entry-2"]
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert rows[0]["messages"][0]["content"] == "Hi"
    assert [m["role"] for m in rows[1]["messages"]] == ["system", "user"]


def test_messages_records_of_a_jsonl_file(tmp_path):
    file = lines(tmp_path / "log.jsonl", dict(messages=[QUESTION, ANSWER]), dict(id=7, messages=[QUESTION]))
    rows = read(file)
    assert [row["id"] for row in rows] == ["log:line-1", "log:7"]
    assert rows[0]["messages"] == [QUESTION, ANSWER]


def test_a_file_of_one_line_keeps_its_id_when_it_grows(tmp_path):
    file = lines(tmp_path / "log.jsonl", dict(messages=[QUESTION]))
    assert [row["id"] for row in read(file)] == ["log:line-1"]


def test_equal_ids_are_told_apart(tmp_path):
    file = lines(tmp_path / "log.jsonl", *[dict(id="x", messages=[QUESTION])] * 3)
    assert [row["id"] for row in read(file)] == ["log:x", "log:x#2", "log:x#3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"messages": []}\n{"messages": [\n', "a.jsonl, line 1: the conversation has no user turn"),
        ("a.jsonl", json.dumps(dict(messages=[QUESTION])) + "\n\n{oops}\n", "line 3: not valid JSON"),
        ("a.json", '[\n{"messages": 1},\n{]', "line 3: not valid JSON"),
        ("a.json", '{"text": []}', "a list of conversations is expected, found an object with text"),
        ("a.json", "[]", "holds no prompt that can be used"),
        ("a.jsonl", "\n", "holds no prompt that can be used"),
        ("a.txt", "What is a tree?\n", "not valid JSON"),
        ("a.jsonl", json.dumps(dict(messages=[ANSWER])), "line 1: the conversation has no user turn"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role="user", content=" ")])), "no user turn"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role="robot", content="x")])), "line 1: .*role 'robot'"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role="user", content=3)])), "content of type int"),
        ("a.jsonl", json.dumps(dict(messages=["Why?"])), "line 1: a turn is a str"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role=["user"], content="x")])), "line 1"),
        ("a.json", json.dumps([dict(text="x")]), "entry 1: no list of turns"),
        ("a.json", json.dumps([3]), "entry 1: no list of turns"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", "[" + "9" * 5000 + "]", "a number too long"),
        ("a.parquet", "not Parquet", "cannot be read as Parquet"),
        ("a.jsonl.gz", "oops", "not valid JSON"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_gzip_file_cut_short(tmp_path):
    packed = gzip.compress(json.dumps([dict(messages=[QUESTION])]).encode())
    for cut in (packed[:-9], packed[:12], packed[:-1]):
        (tmp_path / "a.json.gz").write_bytes(cut)
        with pytest.raises(InputError, match="cannot be unpacked"):
            read(tmp_path / "a.json.gz")


def test_an_empty_conversation_stops_with_the_option_that_the_command_has(tmp_path):  # case 13
    (tmp_path / "a.json").write_text(json.dumps([dict(conversations=[HUMAN]), dict(conversations=[])]))
    with pytest.raises(InputError, match="entry 2: the conversation has no user turn; .*--on-bad drop"):
        read(tmp_path / "a.json")


def test_on_bad_drop_counts_by_reason(tmp_path):  # case 13
    records = [dict(messages=[QUESTION]), dict(messages=[ANSWER]), dict(conversations=[]), dict(text="x")]
    file = lines(tmp_path / "a.jsonl", *records)
    with file.open("a") as handle:
        handle.write('{"messages": [\n')
    dropped: Counter = Counter()
    assert [row["id"] for row in read(file, on_bad="drop", dropped=dropped)] == ["a:line-1"]
    assert dropped["the conversation has no user turn"] == 2
    assert sum(dropped.values()) == 4 and len(dropped) == 3
    with pytest.raises(InputError, match="choose raise or drop"):
        read(file, on_bad="ignore")


def test_columns_and_roles_that_arrow_filled_with_null(tmp_path):  # case 14
    mixed = [
        dict(messages=None, conversations=[HUMAN]),
        dict(messages=[{"role": None, "from": "human", "content": None, "value": "Hi"}], id=None),
        dict(messages=[QUESTION, {"role": "assistant", "content": None}]),
    ]
    for row in read(lines(tmp_path / "a.jsonl", *mixed)):
        assert row["messages"][0]["role"] == "user" and row["messages"][0]["content"] in ("Hi", "Why?")


def test_mixed_files_joined_by_arrow(tmp_path):  # case 14
    table = pyarrow.Table.from_pylist([dict(conversations=[HUMAN], messages=None), dict(messages=[QUESTION])])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [row["messages"][0]["content"] for row in read(tmp_path / "a.parquet")] == ["Hi", "Why?"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_byte_order_mark_in_front(tmp_path, name):  # case 15
    data = b"\xef\xbb\xbf" + json.dumps(dict(messages=[QUESTION])).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert len(read(tmp_path / name)) == 1


def test_half_a_surrogate_pair(tmp_path):  # case 16
    (tmp_path / "a.jsonl").write_text(r'{"id": "\ud83d", "messages": [{"role": "user", "content": "a \ud83d"}]}' + "\n")
    [row] = read(tmp_path / "a.jsonl")
    assert row["messages"][0]["content"] == "a \ufffd" and row["id"] == "a:\ufffd"
    (tmp_path / "a.jsonl").write_text(r'{"messages": [{"role": "user", "content": "\ud83d\ude00"}]}' + "\n")
    assert read(tmp_path / "a.jsonl")[0]["messages"][0]["content"] == "\U0001f600"


def test_content_in_parts(tmp_path):  # case 18
    parts = [dict(type="text", text="Wh"), dict(type="text", text="y", image_url=None), "?"]
    assert read(lines(tmp_path / "a.jsonl", dict(messages=[QUESTION | dict(content=parts)])))[0]["messages"] == [
        QUESTION
    ]
    picture = dict(messages=[dict(role="user", content=[dict(type="image_url", image_url="x")])])
    with pytest.raises(InputError, match="a part of type 'image_url'; only text can be used"):
        read(lines(tmp_path / "a.jsonl", picture))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.txt", "a", "a.jsonl.gz", "a.json.gz", "a.gz"])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_json_and_jsonl_under_any_name_packed_or_not(tmp_path, name, form):  # case 18
    records = [dict(messages=[QUESTION, ANSWER]), dict(conversations=[HUMAN])]
    text = json.dumps(records, indent=1) if form == "list" else "\r\n".join(map(json.dumps, records))
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [row["messages"][0]["content"] for row in read(tmp_path / name)] == ["Why?", "Hi"]


@pytest.mark.parametrize("below", ["", "data"])
def test_a_folder_of_parquet_and_others(tmp_path, below):  # case 18
    folder = tmp_path / "chats" / below
    folder.mkdir(parents=True)
    for number in range(2):
        table = pyarrow.Table.from_pylist([dict(messages=[QUESTION], picture=b"1")] * 3)
        parquet.write_table(table, folder / f"train-{number}.parquet")
    lines(folder / "more.jsonl", dict(messages=[QUESTION]))
    (tmp_path / "chats" / "README.md").write_text("a data card")
    (tmp_path / "chats" / ".cache").mkdir()
    (tmp_path / "chats" / ".cache" / "x.json").write_text("{}")
    rows = read(tmp_path / "chats")
    assert len(rows) == 7 == len({row["id"] for row in rows})


def test_a_folder_of_python_source_with_json_beside_it_is_source(tmp_path):
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text('def f():\n    """Do."""\n    return 1\n')
    assert [row["id"].split(":")[1] for row in read(tmp_path)] == ["sub/a.py"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read(tmp_path / "none.jsonl")


def test_a_file_in_latin_1(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"messages": [{"role": "user", "content": "é"}]}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text .*save it as UTF-8"):
        read(tmp_path / "a.jsonl")


TEXT = st.text(max_size=8) | st.sampled_from(["user", "human", "gpt", "assistant", "system", "text", "\ud83d", "\x00"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=6)
NAMES = st.sampled_from(["role", "from", "content", "value", "type", "text", "id"])
TURNS = st.dictionaries(NAMES, VALUES, max_size=4) | st.fixed_dictionaries(dict(role=TEXT, content=VALUES)) | VALUES
GOOD = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": st.text(max_size=8)})
RECORDS = st.dictionaries(
    st.sampled_from(["messages", "conversations", "id", "x"]), st.lists(TURNS | GOOD, max_size=4) | VALUES
)
FILES = st.lists(RECORDS | VALUES, max_size=4)


@settings(
    max_examples=int(os.environ.get("MEDUSA_NB_TRIES", 200)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(records=[{"a\x1eb\u2028": 0}], form="lines", drop=False, noise=b"")  # names with line breaks
@given(records=FILES, form=st.sampled_from(["list", "lines", "cut", "bytes"]), drop=st.booleans(), noise=st.binary())
def test_any_file_gives_rows_or_one_sentence(tmp_path, records, form, drop, noise):
    text = json.dumps(records) if form == "list" else "\n".join(map(json.dumps, records))
    data = text.encode()
    if form == "cut":
        data = data[: len(data) * 2 // 3]
    if form == "bytes":
        data = data[: len(data) // 2] + noise + data[len(data) // 2 :]
    file = tmp_path / "a.jsonl"
    file.write_bytes(data)
    dropped: Counter = Counter()
    try:
        rows = list(load_prompts(str(file), on_bad="drop" if drop else "raise", dropped=dropped))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        json.dumps(row, ensure_ascii=False).encode()
        assert any(turn["role"] == "user" and turn["content"].strip() for turn in row["messages"])
        assert row["messages"][0]["role"] != "assistant"
