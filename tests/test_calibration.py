"""Calibration: counted as its parts count, and the same after a round trip."""

from collections import Counter

import pytest
import torch

from medusa_nb.calibration import FILE, SPEEDS, Calibration, calibrate, draft_vocabulary, frequent_tokens
from medusa_nb.errors import InputError
from medusa_nb.features import cache_features, encode_conversation
from medusa_nb.heads import MedusaHeads
from medusa_nb.training import rank_table
from medusa_nb.tree import count_ranks


@pytest.fixture(scope="module")
def rows():
    answers = ["return a + b", "return a + b\n    return a + b\n    return a", "pass"]
    turns = [dict(role="user", content="def f(a, b):")]
    return [{"messages": [*turns, dict(role="assistant", content=f"    {text}\n")]} for text in answers]


@pytest.fixture(scope="module")
def known(tiny_model, tokenizer, rows, tmp_path_factory):
    heads = MedusaHeads.for_model(tiny_model, 2)
    features = cache_features(tiny_model, tokenizer, rows, tmp_path_factory.mktemp("features"), 2)
    return calibrate(heads, features, tokenizer, rows, rows, prompts=2), count_ranks(rank_table(heads, features))


def test_what_is_counted(known, tokenizer, rows):
    known, counts = known
    assert known.rank_counts == counts
    said = [encode_conversation(tokenizer, row["messages"]) for row in rows]
    assert known.prompts == [x.ids[: x.own.index(True)] for x in said[:2]]
    own = {i for x in said for i, mine in zip(x.ids, x.own, strict=True) if mine}
    assert set(known.frequent.tolist()) == own
    assert known.ngram_worth[3, 0] > 0.5 and known.ngram_worth[0].eq(0).all()  # "return a + b" comes again


def test_it_comes_back_as_it_went(known, tmp_path):
    known, _ = known
    (tmp_path / SPEEDS).write_text("{}")
    known.save(tmp_path)
    again = Calibration.load(tmp_path)
    assert (again.rank_counts, again.prompts) == (known.rank_counts, known.prompts)
    assert torch.allclose(again.ngram_worth, known.ngram_worth, atol=1e-4)
    assert torch.equal(again.frequent, known.frequent)
    assert not (tmp_path / SPEEDS).exists()


@pytest.mark.parametrize("text", [None, "{", "{}", "[1]"])
def test_a_missing_or_damaged_file(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="calibration.json"):
        Calibration.load(tmp_path)


def test_the_most_frequent_tokens_of_the_draft_vocabulary():
    known = Calibration(Counter(), torch.zeros(1, 1), torch.tensor([7, 2, 9]), [])
    assert known.most_frequent(2).tolist() == [7, 2]
    for count in (0, 4):
        with pytest.raises(InputError, match="the calibration knows 3; choose 1 to 3"):
            known.most_frequent(count)
    by_id = Calibration(Counter(), torch.zeros(1, 1), torch.tensor([2, 7, 9]), [])
    assert by_id.most_frequent(3).tolist() == [2, 7, 9]  # all of them: their order does not matter
    with pytest.raises(InputError, match="does not say which tokens are most frequent"):
        by_id.most_frequent(2)


def test_a_draft_vocabulary_of_nothing_is_refused(tokenizer):
    with pytest.raises(InputError, match="of 0 tokens is none"):
        draft_vocabulary(tokenizer, [], 0)
    assert draft_vocabulary(tokenizer, [], None) is None


def test_frequent_tokens_are_those_said_most():
    assert frequent_tokens([[5, 5, 2], [2, 9, 5]], 2).tolist() == [5, 2]
    assert frequent_tokens([[9, 2], [5]], 5).tolist() == [2, 5, 9]
