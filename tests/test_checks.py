"""The checks pass right answers and name the likely mistake of wrong ones."""

import pytest
import torch
import torch.nn.functional as F

from medusa_nb import checks
from medusa_nb.checks import NotYet

RIGHT = [
    lambda: checks.break_even(2.0, 1.0, 2.0),
    lambda: checks.loop_detector(
        lambda t: any(t[-n:] == t[-2 * n : -n] == t[-3 * n : -2 * n] for n in range(1, len(t) // 3 + 1))
    ),
    lambda: checks.head_label(lambda ids, t, k: ids[t + k + 2]),
    lambda: checks.residual_block(lambda x, w, b: x + F.silu(x @ w.T + b)),
    lambda: checks.tree_mask(lambda tree: tree.mask()),
    lambda: checks.accepted_length(
        lambda g, s: next((i for i, (a, b) in enumerate(zip(g, s, strict=True)) if a != b), len(g))
    ),
    lambda: checks.mean_tokens_per_pass(lambda texts: sum(map(sum, texts)) / sum(map(len, texts))),
    lambda: checks.achievable_speedup(lambda tokens, t1, tn: tokens * t1 / tn),
    lambda: checks.version_1_size(lambda K, D, V: K * (D * D + D + V * D)),
    lambda: checks.states_size(lambda positions, D: positions * D * 2 / 1e9),
]
WRONG = [
    (lambda: checks.break_even(0.5, 1.0, 2.0), "inverse"),
    (lambda: checks.break_even(3.0, 1.0, 2.0), "costs t"),
    (lambda: checks.loop_detector(lambda t: t[-1] == t[-2] == t[-3]), "longer than one"),
    (lambda: checks.loop_detector(lambda t: True), "without repetition"),
    (lambda: checks.head_label(lambda ids, t, k: ids[t + k + 1]), "off by one"),
    (lambda: checks.head_label(lambda ids, t, k: ids[t + k]), "already read"),
    (lambda: checks.residual_block(lambda x, w, b: F.silu(x @ w.T + b)), "residual is missing"),
    (lambda: checks.residual_block(lambda x, w, b: x + F.silu(x @ w + b)), "transposed"),
    (lambda: checks.tree_mask(lambda tree: tree.mask().T), "transposed"),
    (lambda: checks.tree_mask(lambda tree: torch.ones(len(tree), len(tree)).tril()), "siblings"),
    (lambda: checks.accepted_length(lambda g, s: sum(a == b for a, b in zip(g, s, strict=True))), "behind a wrong one"),
    (lambda: checks.accepted_length(lambda g, s: 1), "first wrong one"),
    (
        lambda: checks.mean_tokens_per_pass(lambda texts: sum(sum(t) / len(t) for t in texts) / len(texts)),
        "mean of ratios",
    ),
    (lambda: checks.achievable_speedup(lambda tokens, t1, tn: tokens), "is not a speedup"),
    (lambda: checks.achievable_speedup(lambda tokens, t1, tn: tokens * tn / t1), "inverse price"),
    (lambda: checks.achievable_speedup(lambda tokens, t1, tn: 0.0), "plain decoding needs"),
    (lambda: checks.version_1_size(lambda K, D, V: K * (D * D + V * D)), "also has a bias"),
    (lambda: checks.version_1_size(lambda K, D, V: K * (D * D + D) + V * D), "is not shared"),
    (lambda: checks.version_1_size(lambda K, D, V: K * (D * D + D)), "that is version 2"),
    (lambda: checks.version_1_size(lambda K, D, V: 0), "a head is D"),
    (lambda: checks.states_size(lambda positions, D: positions * D * 4 / 1e9), "not four"),
    (lambda: checks.states_size(lambda positions, D: positions * D / 1e9), "counts numbers"),
    (lambda: checks.states_size(lambda positions, D: positions * D * 2), "a gigabyte"),
]


@pytest.mark.parametrize("check", RIGHT)
def test_right_answers_pass(check, capsys):
    check()
    assert "right" in capsys.readouterr().out


@pytest.mark.parametrize(("check", "message"), WRONG)
def test_wrong_answers_are_named(check, message):
    with pytest.raises(NotYet, match=message):
        check()
