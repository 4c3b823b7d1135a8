"""Calibration: counted as a plain loop counts, and the same after a round trip."""

from collections import Counter

import pytest
import torch

from medusa_nb.errors import InputError
from medusa_nb.heads import MedusaHeads
from medusa_nb.path_heads import PathHeads
from medusa_nb.training.calibration import FILE, Calibration, calibrate, draft_vocabulary
from medusa_nb.training.features import cache_features, encode_answer
from medusa_nb.training.loss import rank_table

pytest_plugins = ["training_setting"]


@pytest.fixture(scope="module")
def said():
    answers = ["return a + b", "return a + b\n    return a + b\n    return a", "pass"]
    return [
        {"messages": [dict(role="user", content="def f(a, b):"), dict(role="assistant", content=f"    {text}\n")]}
        for text in answers
    ]


@pytest.fixture(scope="module")
def known(tiny_model, tokenizer, said, tmp_path_factory):
    heads = PathHeads(tiny_model, 3, draft_vocabulary(tokenizer, said, 100)).requires_grad_(False)
    torch.manual_seed(0)
    torch.nn.init.normal_(heads.projection, std=0.3)
    ranks = rank_table(heads, cache_features(tiny_model, tokenizer, said, tmp_path_factory.mktemp("f") / "f", 3))
    return calibrate(heads, ranks, tokenizer, said, said), ranks


def test_rank_counts_equal_brute_force(known):
    calibration, ranks = known
    expected: Counter = Counter()
    for row in ranks.tolist():
        for depth in range(len(row) + 1):
            if all(0 <= rank < 32 for rank in row[:depth]):
                expected[tuple(row[:depth])] += 1
    assert calibration.rank_counts == expected and expected[()] == len(ranks)


def test_a_label_that_is_not_there_or_never_drafted_counts_for_nothing(tiny_model, tokenizer, said):
    ranks = torch.tensor([[0, 2, -1], [0, 2**30, 1], [31, 32, 0]])
    counts = calibrate(MedusaHeads(tiny_model, 3), ranks, tokenizer, said, said).rank_counts
    assert counts == Counter({(): 3, (0,): 2, (0, 2): 1, (31,): 1})


def test_copied_tokens_and_the_most_frequent_ones(known, tokenizer, said):
    calibration, _ = known
    own = Counter(
        token
        for row in said
        for e in [encode_answer(tokenizer, row)]
        for token, mine in zip(e.ids, e.own, strict=True)
        if mine
    )
    frequent = calibration.frequent.tolist()
    assert set(frequent) == set(own) and [own[i] for i in frequent] == sorted(own.values(), reverse=True)
    assert calibration.ngram_worth[3, 0] >= 0.5 and calibration.ngram_worth[0].eq(0).all()  # "return a + b" comes again


def test_heads_with_a_draft_vocabulary_keep_it(tiny_model, tokenizer, said):
    words = torch.tensor([9, 4, 77])
    heads = PathHeads(tiny_model, 1, words)
    assert torch.equal(calibrate(heads, torch.zeros(1, 1).long(), tokenizer, said, said).frequent, words)


def test_it_comes_back_as_it_went(known, tmp_path):
    calibration, _ = known
    calibration.save(tmp_path)
    again = Calibration.load(tmp_path)
    assert again.rank_counts == calibration.rank_counts and torch.equal(again.frequent, calibration.frequent)
    torch.testing.assert_close(again.ngram_worth, calibration.ngram_worth, atol=1e-4, rtol=0)
    assert again.tree(8).paths == calibration.tree(8).paths and len(again.tree(8)) == 8


@pytest.mark.parametrize(
    "text", [None, "{", "{}", "[1]", '{"rank_counts": [[1, 2]], "ngram_worth": [], "frequent": []}']
)
def test_a_missing_or_damaged_file(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="calibration.json"):
        Calibration.load(tmp_path)


def test_the_draft_vocabulary_is_what_was_said_most_and_then_by_id(tokenizer, said):
    every = draft_vocabulary(tokenizer, said, 10**6).tolist()
    own = Counter()
    for row in said:
        encoded = encode_answer(tokenizer, row)
        own.update(token for token, mine in zip(encoded.ids, encoded.own, strict=True) if mine)
    assert every == sorted(own, key=lambda token: (-own[token], token))
    assert draft_vocabulary(tokenizer, said, 3).tolist() == every[:3]


@pytest.mark.parametrize("count", [0, -1])
def test_a_draft_vocabulary_of_nothing_is_refused(tokenizer, said, count):
    with pytest.raises(InputError, match=f"of {count} tokens is none"):
        draft_vocabulary(tokenizer, said, count)
