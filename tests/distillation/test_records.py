"""The file of answers: it belongs to its settings, grows line by line, and is not taken for something else."""

import gzip
import json

import pytest
from datasets import Dataset

from medusa_nb.distillation.records import AnswerFile, Conversation, asked_turns, is_loop, load_answers, loop_period
from medusa_nb.errors import InputError


def record(name, split="train", loop=False, text="é") -> dict:
    turns = [dict(role="user", content="Why?"), dict(role="assistant", content=text)]
    counts = dict(finish_reason="stop", prompt_tokens=4, completion_tokens=5, loop=loop)
    return dict(id=name, split=split, messages=turns, **counts)


def text_of(*records) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)


def write(file, *records, how=None):
    with AnswerFile(file, how or dict(model="m"), 9) as answers:
        for row in records:
            answers.add(row)
    return answers.report


def test_answers_of_a_split_without_loops(tmp_path):
    file = tmp_path / "a.jsonl"
    write(file, record("1"), record("2", loop=True), record("3", "test"))
    assert [row["id"] for row in load_answers(file)] == ["1", "2", "3"]
    assert [row["id"] for row in load_answers(file, "train", loops=False)] == ["1"]
    with pytest.raises(InputError, match="no answered conversation of the split 'calibration'"):
        load_answers(file, "calibration")
    with pytest.raises(InputError, match="there is no file .*`distill` make one"):
        load_answers(tmp_path / "none.jsonl")


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_answers_packed_or_not_under_any_name_with_or_without_a_byte_order_mark(tmp_path, pack):  # cases 15, 18
    for name in ("a.jsonl.gz", "a.jsonl", "answers"):
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / name).write_bytes(pack(mark + text_of(record("1")).encode()))
            assert load_answers(tmp_path / name) == [record("1")]


def test_prompts_given_in_place_of_answers(tmp_path):  # case 17
    (tmp_path / "chats.jsonl").write_text('{"conversations": [{"from": "human", "value": "Hi"}]}\n')
    with pytest.raises(InputError, match="a prompt, not an answer .*medusa-nb distill answers.jsonl --prompts chats"):
        load_answers(tmp_path / "chats.jsonl")
    (tmp_path / "other.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(InputError, match="record 1 is no answer"):
        load_answers(tmp_path / "other.jsonl")


@pytest.mark.parametrize("text", ['{"id": 1', '{"messages": []}', '[\n {"messages": []}\n]', "notes\nof mine"])
def test_a_file_of_something_else_is_neither_written_to_nor_shortened(tmp_path, text):
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(InputError):
        write(file, record("1"))
    assert file.read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_the_output_is_a_folder_or_below_a_file_or_packed(tmp_path):  # case 21
    with pytest.raises(InputError, match="is a folder; name a JSONL file"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*choose another place"):
        write(tmp_path / "file" / "a.jsonl")
    with pytest.raises(InputError, match="name a .jsonl file and pack it later"):
        write(tmp_path / "a.jsonl.gz")
    with pytest.raises(InputError, match="no prompt to answer"):
        AnswerFile(tmp_path / "a.jsonl", {}, 0)


def test_other_settings_are_refused_once_something_is_answered(tmp_path):
    file = tmp_path / "a.jsonl"
    write(file)
    write(file, record("1"), how=dict(model="other"))
    with pytest.raises(InputError, match="other settings .model 'other' -> 'm'.*choose another place or delete it"):
        write(file, record("2"))
    assert write(file, record("2"), how=dict(model="other"))["resumed"] == 1


def test_a_torn_last_line_of_our_own_is_cut_off(tmp_path):
    file = tmp_path / "a.jsonl"
    write(file, record("1"), record("2"))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": "3", "mess')
    assert write(file)["resumed"] == 2
    assert file.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    write(file, record("1"))
    file.write_text(text_of(record("1")) + "oops\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: not valid JSON"):
        write(file)


def test_rows_still_open(tmp_path):
    rows = [dict(record(name), messages=[dict(role="user", content="x")]) for name in "abc"]
    rows += [dict(record("d"), messages=[dict(role="system", content="x")])]
    write(tmp_path / "a.jsonl", record("a"))
    with AnswerFile(tmp_path / "a.jsonl", dict(model="m"), 4) as answers:
        answers.drop("b", "empty answer")
        assert [row["id"] for row in answers.still_open(Dataset.from_list(rows))] == ["c"]
    assert answers.report["dropped"] == {"empty answer": 1, "the conversation has no user turn": 1}


def test_turns_are_asked_one_by_one_and_nothing_after_the_last_question():
    roles = ("system", "user", "assistant", "system", "user", "assistant", "system")
    turns = asked_turns([dict(role=role, content=f"{i} \ud83d") for i, role in enumerate(roles)])
    assert [turn["content"] for turn in turns] == [f"{i} \ufffd" for i in (0, 1, 3, 4)]
    conversation = Conversation("x", "train", turns)
    for asked in (2, 5):
        assert len(conversation.ask()) == asked
        conversation.answer(dict(role="assistant", content="a"), "stop", 10, 2, loop=asked == 2)
    found = conversation.record()
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "system", "user", "assistant"]
    assert (found["prompt_tokens"], found["completion_tokens"], found["loop"]) == (20, 4, True)


@pytest.mark.parametrize(
    "tokens",
    [[1] * 40, list(range(20)) + [1, 2, 3] * 13, list(range(50, 70)) * 3, [7] * 40 + list(range(20)), [1, 2] * 17],
)
def test_loops(tokens):
    assert is_loop(tokens)


@pytest.mark.parametrize(
    "tokens", [[], [1], [1] * 20, list(range(200)), list(range(40)) * 2, [1, 2, 3] * 5 + list(range(100, 150))]
)
def test_no_loops(tokens):
    assert not is_loop(tokens)


def test_the_period_of_a_loop():
    assert loop_period([9, *[1, 2, 3] * 20]) == 3
