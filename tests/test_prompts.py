"""Prompts from source folders, files and data sets: stable ids, and errors that name the place."""

import json
import sysconfig
from pathlib import Path

import pytest
from datasets import Dataset

from medusa_nb.errors import InputError
from medusa_nb.prompts import from_file, from_hub, from_source_folder, load_prompts, sample
from medusa_nb.source_code import SPLITS, split_of

MODULE = '''
class Box:
    @property
    def size(self):
        """The number of things."""
        return len(self.things)

def add(a, b):
    """Add two numbers.

    Both may be floats.
    """
    def inner():
        """Part of its parent."""
        return a
    return inner() + b

def undocumented(a):
    return a

def only_documented():
    """Nothing else."""
'''


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "box.py").write_text(MODULE)
    (folder / "sub" / "deep.py").write_text('def deep():\n    """Go down."""\n    return 1\n')
    (folder / "broken.py").write_text("def (:\n")
    return folder


def by_id(dataset) -> dict:
    return {row["id"]: row for row in dataset}


def write_lines(file: Path, *records) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


QUESTION = dict(role="user", content="Why?")
ANSWER = dict(role="assistant", content="Because.")


def test_source_folder(package):
    rows = by_id(from_source_folder(package))
    assert set(rows) == {"mine:box.py:Box.size", "mine:box.py:add", "mine:sub/deep.py:deep"}
    assert rows["mine:box.py:Box.size"]["messages"] == [
        dict(role="user", content='@property\ndef size(self):\n    """The number of things."""'),
        dict(role="assistant", content="    return len(self.things)"),
    ]
    assert rows["mine:box.py:add"]["messages"][0]["content"].endswith('Both may be floats.\n    """')
    assert by_id(load_prompts(str(package))) == rows


def test_ids_and_splits_are_stable_when_a_file_is_added(package):
    before = by_id(from_source_folder(package))
    (package / "aaa.py").write_text('def first():\n    """Comes before all others."""\n    return 2\n')
    after = by_id(from_source_folder(package))
    assert len(after) == len(before) + 1
    assert {name: after[name] for name in before} == before


def test_splits_are_by_file_and_cover_all(tmp_path):
    for number in range(60):
        body = "".join(f'def f{i}():\n    """Do."""\n    return {number * 10 + i}\n\n' for i in range(3))
        (tmp_path / f"m{number}.py").write_text(body)
    splits = {}
    for row in from_source_folder(tmp_path, "many"):
        splits.setdefault(row["id"].split(":")[1], set()).add(row["split"])
    assert len(splits) == 60
    for path, found in splits.items():
        assert found == {split_of(path)}
    assert set.union(*splits.values()) == set(SPLITS)
    parts = {name: set(by_id(load_prompts(str(tmp_path), name))) for name in SPLITS}
    assert sum(map(len, parts.values())) == 180 == len(set.union(*parts.values()))


def test_split_shares():
    counts = {name: 0 for name in SPLITS}
    for i in range(5000):
        counts[split_of(f"package/module_{i}.py")] += 1
    for name, share in SPLITS.items():
        assert abs(counts[name] / 5000 - share) < 0.03


@pytest.mark.parametrize("package", ["json", "email", "asyncio", "unittest"])
def test_prompt_and_body_are_python(package):
    rows = from_source_folder(Path(sysconfig.get_paths()["stdlib"]) / package)
    for row in rows:
        compile("\n".join(m["content"] for m in row["messages"]), row["id"], "exec", dont_inherit=True)
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert len(set(rows["id"])) == len(rows) >= 5


def test_equal_bodies_are_read_once(tmp_path):
    (tmp_path / "a.py").write_text('def f():\n    """One."""\n    return 1\n')
    (tmp_path / "b.py").write_text('def g():\n    """Two."""\n    return  1\n')
    assert from_source_folder(tmp_path, "x")["id"] == ["x:a.py:f"]


def test_prose_has_only_user_turns():
    rows = load_prompts("prose")
    assert len(rows) > 50
    assert all([m["role"] for m in messages] == ["user"] for messages in rows["messages"])


def test_sharegpt_json(tmp_path):
    file = tmp_path / "chats.json"
    turns = [("gpt", "Hello!"), ("human", "Hi"), ("gpt", "What?"), ("human", "Go"), ("gpt", "on")]
    records = [
        dict(id="a", conversations=[{"from": role, "value": text} for role, text in turns]),
        dict(conversations=[{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]),
    ]
    file.write_text(json.dumps(records))
    rows = list(from_file(file))
    assert [row["id"] for row in rows] == ["chats:a", "chats:entry-2"]
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert rows[0]["messages"][0]["content"] == "Hi"
    assert [m["role"] for m in rows[1]["messages"]] == ["system", "user"]


def test_messages_jsonl(tmp_path):
    file = write_lines(tmp_path / "log.jsonl", dict(messages=[QUESTION, ANSWER]), dict(id=7, messages=[QUESTION]))
    rows = list(load_prompts(str(file)))
    assert [row["id"] for row in rows] == ["log:line-1", "log:7"]
    assert rows[0]["messages"] == [QUESTION, ANSWER]
    assert all(row["split"] == split_of(row["id"]) for row in rows)


def test_equal_ids_are_told_apart(tmp_path):
    file = write_lines(tmp_path / "log.jsonl", *[dict(id="x", messages=[QUESTION])] * 3)
    assert from_file(file)["id"] == ["log:x", "log:x#2", "log:x#3"]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_hub_loader_on_a_local_folder(tmp_path, form):
    folder = tmp_path / "chats"
    folder.mkdir()
    records = [dict(messages=[QUESTION, ANSWER]), dict(messages=[QUESTION])]
    if form == "parquet":
        Dataset.from_list(records).to_parquet(str(folder / "train.parquet"))
    else:
        write_lines(folder / "train.jsonl", *records)
    rows = list(from_hub(str(folder), cache_dir=str(tmp_path / "cache")))
    assert [row["id"] for row in rows] == ["chats:row-0", "chats:row-1"]
    assert [row["messages"] for row in rows] == [[QUESTION, ANSWER], [QUESTION]]


def test_hub_loader_names_the_bad_row(tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    write_lines(folder / "train.jsonl", dict(messages=[QUESTION]), dict(messages=[ANSWER]))
    with pytest.raises(InputError, match="row 1.*no user turn"):
        from_hub(str(folder), cache_dir=str(tmp_path / "cache"))


def test_limit_draws_by_seed_and_keeps_the_order():
    rows = Dataset.from_list([dict(id=str(i)) for i in range(50)])
    drawn = [list(map(int, sample(rows, 10, seed)["id"])) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert sample(rows, None) is rows
    assert len(sample(rows, 99)) == 50


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"messages": []}\n{"messages": [\n', "a.jsonl, line (1|2)"),
        ("a.jsonl", json.dumps(dict(messages=[QUESTION])) + "\n\n{oops}\n", "line 3: not valid JSON"),
        ("a.json", '[\n{"messages": 1},\n{]', "line 3: not valid JSON"),
        ("a.json", '{"messages": []}', "a list of conversations is expected"),
        ("a.json", "[]", "holds no conversation"),
        ("a.jsonl", "\n", "holds no conversation"),
        ("a.jsonl", json.dumps(dict(messages=[ANSWER])), "line 1: the conversation has no user turn"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role="user", content=" ")])), "no user turn"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role="robot", content="x")])), "line 1: .*role 'robot'"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role="user", content=3)])), "content of type int"),
        ("a.jsonl", json.dumps(dict(messages=["Why?"])), "line 1"),
        ("a.jsonl", json.dumps(dict(messages=[dict(role=["user"], content="x")])), "line 1"),
        ("a.json", json.dumps([dict(text="x")]), "entry 1: no list under"),
        ("a.json", json.dumps([3]), "entry 1: no list under"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        from_file(tmp_path / name)


def test_bad_conversations_can_be_dropped(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", dict(messages=[ANSWER]), dict(messages=[QUESTION]))
    assert from_file(file, on_bad="drop")["id"] == ["a:line-2"]


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_prompts(str(tmp_path / "none.jsonl"))


def test_unknown_source():
    with pytest.raises(InputError, match="'no/such-data-set' is no source of prompts"):
        load_prompts("no/such-data-set")


def test_unknown_split(package):
    with pytest.raises(InputError, match="unknown split 'validation'"):
        load_prompts(str(package), split="validation")


def test_folder_without_functions(tmp_path):
    with pytest.raises(InputError, match="no documented Python function"):
        from_source_folder(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        from_source_folder(tmp_path / "none")
