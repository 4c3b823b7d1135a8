"""Feedback on a learner's answers: each check passes, says that it is your turn, or names the likely mistake.

Inputs are random and new at every call, so an answer that fits one example does not pass.
"""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medusa_nb.distillation.records import is_loop
from medusa_nb.training.features import IGNORED
from medusa_nb.tree import Tree

Mistakes = list[tuple[Callable, str]]


class NotYet(AssertionError):
    """The answer is not right yet; the message names the likely mistake."""


def _judge(answer: Callable, cases: list[tuple], right: Callable, mistakes: Mistakes, otherwise: str) -> None:
    """Compare a learner's function with the right one, and with what usually goes wrong."""
    got = []
    for case in cases:
        try:
            value = answer(*case)
        except NotImplementedError:
            value = None
        except Exception as error:  # whatever a learner's code raises is shown to the learner
            raise NotYet(f"your function stopped with {type(error).__name__}: {error}") from error
        if value is None or value is ...:
            print("✎ your turn: write the function above and run the cell again")
            return
        got.append(value)
    if all(_same(value, right(*case)) for value, case in zip(got, cases, strict=True)):
        print("✓ right")
        return
    for wrong, message in mistakes:
        if all(_same(value, wrong(*case)) for value, case in zip(got, cases, strict=True)):
            raise NotYet(message)
    raise NotYet(otherwise)


def _same(one, other) -> bool:
    """Equal up to rounding, whether numbers, lists or tensors."""
    try:
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=1e-5))


def _lists(count: int, length: int, top: int) -> list[list[int]]:
    return [[random.randrange(top) for _ in range(length)] for _ in range(count)]


def _random_parents(size: int) -> list[int]:
    """A tree with siblings and some depth: the root's parent is -1, parents come before children."""
    return [-1, 0, 0, 1, *(random.randrange(max(1, i - 4), i) for i in range(4, size))]


def kept_tokens(answer: Callable) -> None:
    """01: how many draft tokens are kept, given what the model says at each place."""
    cases = [(draft, draft[:n] + [draft[n] + 1] + draft[n + 1 :]) for n, draft in enumerate(_lists(5, 6, 50))]
    cases += [([3, 4], [3, 4]), ([7, 8, 9], [1, 8, 9])]

    def right(draft, said):
        return next((i for i, (a, b) in enumerate(zip(draft, said, strict=False)) if a != b), len(draft))

    mistakes = [
        (
            lambda d, s: sum(a == b for a, b in zip(d, s, strict=False)),
            "a right token after a wrong one does not count: stop there",
        ),
        (lambda d, s: right(d, s) + 1, "off by one: the model's own token is not one of the draft's"),
    ]
    _judge(
        answer,
        cases,
        right,
        mistakes,
        "count the draft tokens that equal what the model says, up to the first that does not",
    )


def break_even(answer: Callable) -> None:
    """01: how many tokens a pass over n tokens must emit to pay for itself."""
    cases = [(random.uniform(1, 9), random.uniform(10, 90)) for _ in range(4)]
    mistakes = [(lambda t1, tn: t1 / tn, "that is the inverse: a slower pass must emit more than one token")]
    mistakes += [
        (lambda t1, tn: tn - t1, "a difference of times is a time; how many passes of one token fit into t(n)?")
    ]
    _judge(
        answer,
        cases,
        lambda t1, tn: tn / t1,
        mistakes,
        "plain decoding would emit t(n) / t(1) tokens in the time of one wide pass",
    )


def loop_detector(answer: Callable) -> None:
    """02: whether a list of tokens ends in the same block three times in a row."""

    def right(tokens):
        sizes = range(1, len(tokens) // 3 + 1)
        return any(tokens[-n:] == tokens[-2 * n : -n] == tokens[-3 * n : -2 * n] for n in sizes)

    def blocks(most, times):
        return lambda t: any(
            all(t[-n:] == t[len(t) - (i + 1) * n : len(t) - i * n] for i in range(times))
            for n in range(1, min(most, len(t) // times) + 1)
        )

    cases = []
    for n in (1, 2, 3, 5):
        block, before = list(range(100, 100 + n)), [random.randrange(50) for _ in range(4)]
        cases += [(before + block * 3,), (before + block * 2,), (before + block * 3 + [51],), (block * 2 + before,)]
    mistakes = [
        (blocks(99, 2), "two times in a row is not yet a loop: three are asked for"),
        (blocks(1, 3), "the block may be longer than one token: 1 2 1 2 1 2 is a loop, too"),
        (blocks(2, 3), "the block may be longer than two tokens: try every length up to a third of the text"),
        (lambda t: is_loop(t), "only blocks that are repeated at the very end count here"),
    ]
    _judge(
        answer,
        cases,
        right,
        mistakes,
        "compare the last three blocks of every length up to a third of the list; only the end counts",
    )


def residual_block(answer: Callable) -> None:
    """03: ``x + SiLU(W x + b)``."""
    cases = [(torch.randn(5, 4), torch.randn(4, 4), torch.randn(4)) for _ in range(2)]
    mistakes = [
        (
            lambda x, w, b: F.silu(F.linear(x, w, b)),
            "the residual is missing: add x, so that an untrained head is the base model",
        ),
        (lambda x, w, b: x + F.silu(x @ w + b), "the weight is transposed: a linear layer computes x @ W.T + b"),
        (lambda x, w, b: x + F.linear(x, w, b), "the nonlinearity is missing: SiLU goes around W x + b"),
    ]
    _judge(answer, cases, lambda x, w, b: x + F.silu(F.linear(x, w, b)), mistakes, "the block is x + SiLU(x @ W.T + b)")


def head_loss(answer: Callable) -> None:
    """03: mean cross entropy over the positions that have a label."""
    cases = []
    for _ in range(2):
        labels = torch.randint(0, 7, (6,))
        labels[random.randrange(6)] = labels[random.randrange(6)] = IGNORED
        cases.append((torch.randn(6, 7), labels))

    def picked(logits, labels):
        return -logits.log_softmax(-1)[torch.arange(6), labels.clamp(min=0)] * (labels != IGNORED)

    mistakes = [
        (lambda x, y: picked(x, y).mean(), "divide by how many positions have a label, not by all of them"),
        (lambda x, y: picked(x, y).sum(), "that is the sum; divide by how many positions have a label"),
        (
            lambda x, y: F.cross_entropy(x, y.clamp(min=0)),
            f"positions with the label {IGNORED} have nothing to predict: leave them out",
        ),
    ]
    _judge(
        answer,
        cases,
        lambda x, y: F.cross_entropy(x, y, ignore_index=IGNORED),
        mistakes,
        "average -log p(label) where there is a label",
    )


def shifted_labels(answer: Callable) -> None:
    """03, bug hunt: the labels of head k for a whole sequence."""
    cases = [(torch.tensor(ids), k) for k, ids in enumerate(_lists(4, 9, 1000))]

    def shifted(by):
        return lambda ids, k: torch.cat([ids[k + by :], torch.full((k + by,), IGNORED)])

    mistakes = [
        (shifted(1), "still shifted by one: these are the labels of the base model and of head k - 1"),
        (shifted(3), "one too far: head k looks k + 2 places ahead"),
        (lambda ids, k: torch.roll(ids, -(k + 2)), "the end wraps around: the last k + 2 positions have no label"),
    ]
    _judge(
        answer,
        cases,
        shifted(2),
        mistakes,
        f"label t of head k is ids[t + k + 2], and {IGNORED} where that is past the end",
    )


def tree_mask(answer: Callable) -> None:
    """04: row i may see column j if j is node i or one of its ancestors."""
    cases = [(_random_parents(8),) for _ in range(3)]

    def right(parents):
        return Tree.from_parents(parents).mask()

    mistakes = [
        (lambda p: right(p).T, "transposed: rows look, columns are looked at"),
        (lambda p: torch.ones(len(p), len(p)).tril(), "that is the plain causal mask: siblings would see each other"),
        (lambda p: right(p) & ~torch.eye(len(p), dtype=torch.bool), "every node must also see itself"),
        (lambda p: right(p) & (torch.eye(len(p)) + F.one_hot(torch.tensor(p).clamp(min=0), len(p)) > 0), "not only the parent: all ancestors, up to the root"),
    ]  # fmt: skip
    _judge(
        answer, cases, right, mistakes, "walk up from each node to the root and allow exactly what you meet, and itself"
    )


def acceptance_walk(answer: Callable) -> None:
    """04: the accepted nodes of a tree, from its tokens and what the base model says after each node."""
    cases = []
    for _ in range(6):
        parents = _random_parents(9)
        tokens = random.sample(range(100), 9)
        said = [random.choice([tokens[c] for c in range(9) if parents[c] == i] or [-1]) for i in range(9)]
        cases.append((parents, tokens, [s if random.random() < 0.8 else -1 for s in said]))

    def right(parents, tokens, said, more=0):
        path = [0]
        while step := [c for c in range(len(parents)) if parents[c] == path[-1] and tokens[c] == said[path[-1]]]:
            path.append(step[0])
        return path

    mistakes = [
        (lambda p, t, s: right(p, t, s)[1:], "the root is certain: the path starts with node 0"),
        (lambda p, t, s: right(p, t, s)[:-1] or [0], "the last accepted node is missing"),
        (lambda p, t, s: [i for i in range(len(p)) if i == 0 or t[i] == s[p[i]]], "a right token after a wrong one is worthless: its parent was not accepted"),
    ]  # fmt: skip
    _judge(
        answer,
        cases,
        right,
        mistakes,
        "from the node you stand on, go to the child whose token is what the model says *there*; stop if there is none",
    )


def cache_crop(answer: Callable) -> None:
    """04: the rows of a cache that stay: the text's, then those of the accepted path."""
    cases = [(torch.randn(2, 9, 3), 4, path) for path in ([0, 2, 4], [0], [0, 1], [0, 3])]
    mistakes = [
        (
            lambda rows, length, path: rows[:, : length + len(path)],
            "the accepted rows need not be the first ones: pick those of the path",
        ),
        (lambda rows, length, path: rows[:, [length + i for i in path]], "the text's own rows must stay, too"),
        (
            lambda rows, length, path: rows[:, list(range(length)) + path],
            "a node's row stands `length` places further: the text comes first",
        ),
    ]
    right = lambda rows, length, path: rows[:, list(range(length)) + [length + i for i in path]]  # noqa: E731
    _judge(
        answer, cases, right, mistakes, "keep rows 0 to length - 1, then row length + i for every node i of the path"
    )


def tree_positions(answer: Callable) -> None:
    """04, bug hunt: the position of every candidate."""
    cases = [(random.randrange(5, 99), _random_parents(8)) for _ in range(3)]

    def depth(parents):
        return Tree.from_parents(parents).depths()

    mistakes = [
        (
            lambda n, p: n + torch.arange(len(p)),
            "still by number: siblings continue the same text, so they share a position",
        ),
        (lambda n, p: depth(p), "the text before the tree counts, too: the root stands at position `length`"),
        (lambda n, p: n + depth(p) + 1, "off by one: the root itself stands at position `length`"),
    ]
    _judge(answer, cases, lambda n, p: n + depth(p), mistakes, "a candidate's position is the root's plus its depth")


def tokens_per_pass(answer: Callable) -> None:
    """04: tokens per pass over several texts."""
    cases = [([[random.randrange(1, 5) for _ in range(n)] for n in (2, 9, 30)],) for _ in range(3)]
    mistakes = [
        (
            lambda texts: sum(sum(t) / len(t) for t in texts) / len(texts),
            "a mean of ratios: sum tokens and passes over all texts first, then divide",
        ),
        (lambda texts: sum(map(sum, texts)) / len(texts), "divide by passes, not by texts"),
    ]
    right = lambda texts: sum(map(sum, texts)) / sum(map(len, texts))  # noqa: E731
    _judge(answer, cases, right, mistakes, "divide all tokens by all passes")


def achievable(answer: Callable) -> None:
    """05: the speedup that tokens per pass allow when a plain pass costs t1, a wide one tn, and drafting d."""
    cases = [tuple(random.uniform(1, 5) for _ in range(4)) for _ in range(4)]
    mistakes = [
        (lambda tokens, t1, tn, d: tokens, "tokens per pass is not a speedup: the wide pass also takes longer"),
        (
            lambda tokens, t1, tn, d: tokens / t1,
            "how long would plain decoding take for these tokens? Divide that by what a step costs",
        ),
        (lambda tokens, t1, tn, d: tokens * t1 / tn, "drafting takes time, too"),
        (lambda tokens, t1, tn, d: tokens * (tn + d) / t1, "that is the inverse price: a dearer step halves the gain"),
    ]
    _judge(
        answer,
        cases,
        lambda tokens, t1, tn, d: tokens * t1 / (tn + d),
        mistakes,
        "plain decoding needs tokens * t1 for what one step emits in tn + d",
    )
