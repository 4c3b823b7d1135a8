"""Copied tokens are what the obvious search finds, and their worth is a count."""

import random

import pytest
import torch

from medusa_nb.ngrams import ngram_tokens, ngram_worth


def slow_ngram(text: list[int], count: int, longest: int) -> tuple[list[int], int]:
    """The obvious way: try long endings first, and of equal ones the latest earlier place."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for end in range(len(text) - 2, n - 2, -1):
            if text[end - n + 1 : end + 1] == text[-n:]:
                follow = text[end + 1 :]
                return [follow[i % len(follow)] for i in range(count)], n
    return [], 0


@pytest.mark.parametrize("seed", range(40))
def test_ngram_tokens_equal_the_obvious_search(seed):
    source = random.Random(seed)
    texts = [[source.randrange(4) for _ in range(source.randint(1, 25))] for _ in range(6)]
    padded = torch.tensor([text + [source.randrange(4) for _ in range(30 - len(text))] for text in texts])
    ends = torch.tensor([len(text) - 1 for text in texts])
    drafted, matched = ngram_tokens(padded, ends, count=5, longest=3)
    for text, row, n in zip(texts, drafted.tolist(), matched.tolist(), strict=True):
        expected, length = slow_ngram(text, 5, 3)
        assert n == length
        assert not length or row == expected


def test_ngram_worth_by_hand():
    ids = [1, 2, 3, 4, 1, 2, 3, 5]  # from 4 on: '1' repeats; then 1 matches, 2 match, 3 match and fail
    worth = ngram_worth([ids], [4], count=2, longest=3)
    assert worth[0].tolist() == [0, 0]
    assert worth[1].tolist() == pytest.approx([1 / 2, 1 / 2])  # after '1': guessed 2, 3, both right
    assert worth[2].tolist() == pytest.approx([1 / 2, 0])  # after '1 2': guessed 3, 4; 4 is wrong
    assert worth[3].tolist() == [0, 0]  # after '1 2 3': guessed 4, wrong
