"""Sampling with heads draws from the distribution of plain sampling."""

import math
from collections import Counter

import pytest
import torch
from conftest import small_llama
from test_decoding import prompt, random_heads

from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.sampling import RowSampler, Sampler, TypicalAcceptance, stream
from medusa_nb.tree import tree_from_paths


def test_draws_follow_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
    sampler = Sampler(temperature=0.7, top_k=4, top_p=0.95)
    draws = sampler(logits.expand(20_000, -1))
    share = torch.bincount(draws, minlength=5) / len(draws)
    expected = sampler.probabilities(logits.unsqueeze(0))[0]
    assert expected[4] == 0
    assert share[expected == 0].sum() == 0
    assert (share - expected).abs().max() < 0.012


def chi_square(observed: Counter, expected: dict[tuple, float], total: int) -> float:
    """Pearson's statistic per degree of freedom, rare outcomes (expected below 5) pooled."""
    rare = [key for key, p in expected.items() if p * total < 5]
    cells = [(observed[key], p * total) for key, p in expected.items() if key not in rare]
    pooled = sum(expected[key] for key in rare) * total
    if pooled > 5:
        cells.append((sum(observed[key] for key in rare), pooled))
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells) / (len(cells) - 1)


def two_tokens(model, ids, sampler) -> dict[tuple, float]:
    """The exact distribution of the second and third new token given the first, from the model itself."""
    first = sampler.probabilities(model(ids).logits[:, -1])[0]
    table = {}
    for a in first.nonzero()[:, 0].tolist():
        second = sampler.probabilities(model(torch.cat([ids, torch.tensor([[a]])], 1)).logits[:, -1])[0]
        for b in second.nonzero()[:, 0].tolist():
            table[a, b] = (first[a] * second[b]).item()
    return table


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=0.8, top_k=6), dict(top_p=0.7)])
def test_sampling_with_heads_preserves_the_distribution(options):
    model = small_llama(vocab_size=12, std=0.25)
    heads, ids = random_heads(model, 2), prompt(6) % 12
    tree = tree_from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
    sampler = Sampler(**options, seed=1)
    decoder = Decoder(model, heads, tree, slots=500, capacity=24, choose=sampler)
    observed, passes = Counter(), 0
    for _ in range(12):
        for result in decoder.generate([ids[0]] * 500, 3, eos_token_id=[]):
            observed[tuple(result.new_tokens[:2])] += 1
            passes += len(result.steps)
    expected = two_tokens(model, ids, sampler)
    assert set(observed) <= set(expected)
    assert len(expected) > 5
    assert chi_square(observed, expected, 6000) < 1.6
    assert passes < 3 * 6000  # some guesses were accepted, so the test is about them, too


def test_a_wrong_rule_would_be_noticed():
    model = small_llama(vocab_size=12, std=0.25)
    ids, sampler = prompt(6) % 12, Sampler(seed=1)
    expected = two_tokens(model, ids, sampler)
    greedy = max(expected, key=expected.get)
    draws = torch.multinomial(torch.tensor(list(expected.values())), 6000, replacement=True).tolist()
    observed = Counter(list(expected)[i] for i in draws)
    for key in list(expected)[::4]:  # as if half of some outcomes were replaced by the likeliest
        moved = observed[key] // 2 if key != greedy else 0
        observed[key] -= moved
        observed[greedy] += moved
    assert chi_square(observed, expected, 6000) > 1.6


def test_typical_acceptance_keeps_what_is_probable_enough():
    model = small_llama(vocab_size=12, std=0.25)
    heads, ids, sampler = random_heads(model, 2), prompt(6) % 12, Sampler(seed=1)
    tree = tree_from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
    lengths = {}
    for epsilon in (0.0, 0.05, 0.99):
        typical = TypicalAcceptance(sampler, epsilon, delta=1.0)
        decoder = Decoder(model, heads, tree, capacity=64, choose=sampler, accept=typical)
        [result] = decoder.generate([ids[0]], 40, eos_token_id=[])
        lengths[epsilon] = max(result.tokens_per_pass)
        text = ids[0].tolist()
        for step in result.steps:
            for place, token in enumerate(step.emitted):
                p = sampler.probabilities(model(torch.tensor([text])).logits[:, -1])[0]
                bound = min(epsilon, math.exp(-torch.special.entr(p).sum().item()))
                guessed = place < len(step.path) - 1
                assert not guessed or p[token] > bound - 1e-5
                text.append(token)
    assert lengths[0.0] == 3  # everything passes: the deepest path is always taken
    assert lengths[0.99] <= lengths[0.0]


def test_rows_have_their_own_streams():
    logits = torch.zeros(3, 50)
    sampler = RowSampler()
    sampler.streams = [stream("a"), stream("b"), stream("a")]
    first = [sampler(logits).tolist() for _ in range(4)]
    assert all(row[0] == row[2] for row in first)
    assert any(row[0] != row[1] for row in first)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)])
def test_settings_that_make_no_sense(options):
    with pytest.raises(InputError, match="choose one|top_k is"):
        Sampler(**options)
