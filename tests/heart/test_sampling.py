"""Sampling with heads draws from the distribution of plain sampling."""

from collections import Counter

import pytest
import torch
from drafts import prompt, random_heads
from tiny_models import small_llama

from medusa_nb.decoding import Decoder
from medusa_nb.errors import InputError
from medusa_nb.sampling import RowSampler, Sampler, stream
from medusa_nb.tree import Tree

TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
TEXTS, ROUNDS = 500, 6


def test_draws_follow_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
    sampler = Sampler(temperature=0.7, top_k=4, top_p=0.95, seed=0)
    draws = sampler(logits.expand(20_000, -1))
    share = torch.bincount(draws, minlength=5) / len(draws)
    expected = sampler.probabilities(logits.unsqueeze(0))[0]
    assert expected[4] == 0 and share[expected == 0].sum() == 0
    assert (share - expected).abs().max() < 0.012


def chi_square(observed: Counter, expected: dict[tuple, float], total: int) -> float:
    """Pearson's statistic per degree of freedom, rare outcomes (expected below 5) pooled."""
    rare = [key for key, p in expected.items() if p * total < 5]
    cells = [(observed[key], p * total) for key, p in expected.items() if key not in rare]
    pooled = sum(expected[key] for key in rare) * total
    if pooled > 5:
        cells.append((sum(observed[key] for key in rare), pooled))
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells) / (len(cells) - 1)


@torch.no_grad()
def two_tokens(model, ids: torch.Tensor, sampler: Sampler) -> dict[tuple, float]:
    """The exact distribution of the first two new tokens, from the model itself."""
    first = sampler.probabilities(model(ids[None]).logits[:, -1])[0]
    table = {}
    for a in first.nonzero()[:, 0].tolist():
        second = sampler.probabilities(model(torch.cat([ids, torch.tensor([a])])[None]).logits[:, -1])[0]
        for b in second.nonzero()[:, 0].tolist():
            table[a, b] = (first[a] * second[b]).item()
    return table


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=0.8, top_k=6), dict(top_p=0.7)])
@pytest.mark.parametrize("vocabulary", [12, 50])
def test_sampling_with_heads_preserves_the_distribution(options, vocabulary):
    model = small_llama(vocab_size=vocabulary, std=0.25)
    heads, ids, sampler = random_heads(model, 2), prompt(6, vocabulary=vocabulary), Sampler(**options, seed=1)
    decoder = Decoder(model, heads, TREE, slots=TEXTS, max_length=16, choose=sampler)
    observed, passes = Counter(), 0
    for _ in range(ROUNDS):
        for result in decoder.generate([ids] * TEXTS, 3, eos_token_id=[]):
            observed[tuple(result.new_tokens[:2])] += 1
            passes += len(result.steps)
    expected, total = two_tokens(model, ids, sampler), TEXTS * ROUNDS
    assert set(observed) <= set(expected) and len(expected) > 5
    assert chi_square(observed, expected, total) < 1.6
    assert passes < 3 * total  # some draft tokens were accepted, so the test is about them, too


def test_a_wrong_rule_would_be_noticed():
    model = small_llama(vocab_size=12, std=0.25)
    expected = two_tokens(model, prompt(6, vocabulary=12), Sampler(seed=1))
    likeliest, torch_seed = max(expected, key=expected.get), torch.Generator().manual_seed(0)
    draws = torch.multinomial(torch.tensor(list(expected.values())), 3000, replacement=True, generator=torch_seed)
    observed = Counter(list(expected)[i] for i in draws.tolist())
    assert chi_square(observed, expected, 3000) < 1.6
    for key in list(expected)[::4]:  # as if half of some outcomes were replaced by the likeliest
        moved = observed[key] // 2 if key != likeliest else 0
        observed[key] -= moved
        observed[likeliest] += moved
    assert chi_square(observed, expected, 3000) > 1.6


def test_rows_have_their_own_streams():
    sampler = RowSampler()
    sampler.streams = [stream("a"), stream("b"), stream("a")]
    drawn = [sampler(torch.zeros(3, 50)).tolist() for _ in range(4)]
    assert all(row[0] == row[2] for row in drawn)
    assert any(row[0] != row[1] for row in drawn)


NAN = float("nan")


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, float("inf")])
def test_temperature_0_is_refused_and_not_taken_for_1(temperature):
    with pytest.raises(InputError, match="temperature=.*or decode greedily"):
        Sampler(temperature=temperature)


@pytest.mark.parametrize("options", [dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(top_p=NAN)])
def test_settings_that_make_no_sense(options):
    with pytest.raises(InputError, match="top_k is 0 or more"):
        Sampler(**options)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_nothing_is_drawn_from_logits_that_are_not_finite(bad):
    with pytest.raises(InputError, match="not finite"):
        Sampler()(torch.tensor([[0.0, bad, 1.0]]))
    assert Sampler(seed=0)(torch.tensor([[0.0, -float("inf"), 1.0]])).item() != 1  # a token that is never said
