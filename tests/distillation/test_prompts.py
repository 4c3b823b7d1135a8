"""Prompts by the name of their source."""

import pytest
from datasets import Dataset

from medusa_nb.distillation import prompts as module
from medusa_nb.distillation.prompts import first_turn, load_prompts, sample
from medusa_nb.errors import InputError


def test_everyday_questions_are_user_turns_of_all_splits():
    rows = load_prompts("everyday")
    assert len(rows) > 300 and len(set(rows["id"])) == len(rows)
    assert all([m["role"] for m in messages] == ["user"] for messages in rows["messages"])
    assert set(rows["split"]) == {"train", "calibration", "test"}


def test_a_hub_data_set_that_holds_a_bad_row(monkeypatch):
    good, bad = (dict(messages=[dict(role=role, content="x")]) for role in ("user", "assistant"))
    monkeypatch.setattr(module, "load_dataset", lambda name, split: [good, bad])
    with pytest.raises(InputError, match="data set 'someone/chats', row 1: the conversation has no user turn"):
        load_prompts("someone/chats")
    assert load_prompts("someone/chats", on_bad="drop")["id"] == ["chats:row-0"]


def test_no_such_source():
    with pytest.raises(InputError, match="'no/such-data-set' is no source of prompts"):
        load_prompts("no/such-data-set")


def test_a_folder_without_functions(tmp_path):
    with pytest.raises(InputError, match="holds no prompt that can be used"):
        load_prompts(str(tmp_path))


def test_no_such_split():
    with pytest.raises(InputError, match="unknown split 'validation'; choose one of train"):
        load_prompts("everyday", split="validation")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit):  # case 21
    with pytest.raises(InputError, match="keep at least one prompt"):
        load_prompts("everyday", limit=limit)


def test_limit_draws_by_seed_and_keeps_the_order():
    rows = Dataset.from_list([dict(id=str(i)) for i in range(50)])
    drawn = [list(map(int, sample(rows, 10, seed)["id"])) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert sample(rows, None) is rows
    assert len(sample(rows, 99)) == 50


def test_first_turn():
    turns = [dict(role=role, content="x") for role in ("system", "user", "assistant", "user")]
    assert first_turn(turns) == turns[:2]
    with pytest.raises(InputError, match="no user turn"):
        first_turn(turns[:1])
