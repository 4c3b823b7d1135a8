"""The checks pass right answers and name the likely mistake of wrong ones."""

import pytest
import torch
import torch.nn.functional as F

from medusa_nb import checks
from medusa_nb.checks import NotYet
from medusa_nb.features import IGNORED, head_labels


def walk(tree, tokens, said):
    """The acceptance walk, as obvious as can be."""
    path = [0]
    while fitting := [c for c in tree.children[path[-1]] if tokens[c] == said[path[-1]]]:
        path.append(fitting[0])
    return path


def anywhere(tree, tokens, said):
    """Wrong: keeps every right guess, also behind a wrong one."""
    return [0, *(n for n in range(1, len(tree)) if tokens[n] == said[tree.parents[n]])]


def labelled(used=lambda own, t: own[t + 1], shift=0, runs_on=False, fill=True):
    """Labels of a conversation with one typical mistake."""

    def answer(ids, own, num_heads):
        positions, labels = [t for t in range(len(ids) - 1) if used(own, t)], []
        for t in positions:
            row = []
            for i in range(t + 1 + shift, t + 2 + shift + num_heads):
                if i >= len(ids) or not (own[i] or runs_on):
                    break
                row.append(ids[i])
            labels.append(row + [IGNORED] * (num_heads + 1 - len(row)) * fill)
        return positions, labels

    return answer


def confidence(axis):
    """Each head's best token, and its probability by a softmax over ``axis``."""

    def answer(logits):
        best = logits.argmax(-1)
        return best, logits.softmax(axis).gather(1, best[:, None])[:, 0]

    return answer


RIGHT = [
    lambda: checks.break_even(2.0, 1.0, 2.0),
    lambda: checks.loop_detector(
        lambda t: any(t[-n:] == t[-2 * n : -n] == t[-3 * n : -2 * n] for n in range(1, len(t) // 3 + 1))
    ),
    lambda: checks.head_label(lambda ids, t, k: ids[t + k + 2]),
    lambda: checks.residual_block(lambda x, w, b: x + F.silu(x @ w.T + b)),
    lambda: checks.tree_mask(lambda tree: tree.mask()),
    lambda: checks.acceptance_walk(walk),
    lambda: checks.slack_end(lambda latency: next(n for n in latency if latency[2 * n] / latency[n] >= 1.8)),
    lambda: checks.share_at_limit(lambda rows: sum(r["finish_reason"] == "length" for r in rows) / len(rows)),
    lambda: checks.conversation_labels(head_labels),
    lambda: checks.head_confidence(lambda logits: (logits.argmax(-1), logits.softmax(-1).max(-1).values)),
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
    (lambda: checks.break_even(..., 1.0, 2.0), "your turn"),
    (lambda: checks.slack_end(lambda latency: 32), "off by one"),
    (lambda: checks.slack_end(lambda latency: latency[16] / latency[8]), "is the width"),
    (lambda: checks.slack_end(lambda latency: 1), "cheap ones"),
    (lambda: checks.slack_end(lambda latency: 8), "from small to large"),
    (
        lambda: checks.share_at_limit(lambda rows: sum(r["finish_reason"] == "stop" for r in rows) / len(rows)),
        "themselves",
    ),
    (lambda: checks.share_at_limit(lambda rows: sum(r["completion_tokens"] == 50 for r in rows) / len(rows)), "go by"),
    (lambda: checks.share_at_limit(lambda rows: 50 / 116), "share of tokens"),
    (lambda: checks.share_at_limit(lambda rows: 1), "number of answers"),
    (lambda: checks.share_at_limit(lambda rows: 0), "divide the answers"),
    (lambda: checks.conversation_labels(labelled(shift=1)), "column is the base model's"),
    (lambda: checks.conversation_labels(lambda *_: ([2, 3, 6], [[13], [14], [0]])), "off by one: position"),
    (lambda: checks.conversation_labels(labelled(used=lambda own, t: True)), "user's words"),
    (lambda: checks.conversation_labels(labelled(used=lambda own, t: False)), "used are the positions"),
    (lambda: checks.conversation_labels(labelled(runs_on=True)), "next turn"),
    (lambda: checks.conversation_labels(labelled(fill=False)), "fill up"),
    (lambda: checks.conversation_labels(lambda *_: ([1, 2, 5], [[12, 13, 0], [13, 0, 0], [16, 0, 0]])), "then -100"),
    (lambda: checks.head_confidence(confidence(0)), "wrong axis"),
    (lambda: checks.head_confidence(lambda x: (x.argmax(-1), x.max(-1).values)), "those are logits"),
    (lambda: checks.head_confidence(lambda x: (x.argmin(-1), x.softmax(-1).max(-1).values)), "argmax"),
    (lambda: checks.head_confidence(lambda x: (x.argmax(0), x.softmax(0).max(0).values)), "per head"),
    (lambda: checks.head_confidence(lambda x: (x.argmax(-1), x.softmax(-1).min(-1).values)), "value at the best"),
    (lambda: checks.acceptance_walk(lambda *a: walk(*a)[1:]), "root is certain"),
    (lambda: checks.acceptance_walk(lambda *a: walk(*a)[:-1]), "off by one: the last right"),
    (lambda: checks.acceptance_walk(lambda tree, tokens, said: [0, 2, 4, 5]), "off by one: token 4"),
    (lambda: checks.acceptance_walk(lambda *a: [0, 1]), "go to the child"),
    (lambda: checks.acceptance_walk(anywhere), "behind a wrong one"),
    (lambda: checks.acceptance_walk(lambda *a: walk(*a)[:3]), "may be right"),
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
