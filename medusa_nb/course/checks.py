"""Feedback on a learner's answers: each check passes, says that it is your turn, or names the likely mistake.

Inputs are random and new at every call, so an answer that fits one example does not pass.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from operator import eq

import torch
import torch.nn.functional as F

from medusa_nb.distillation.records import is_loop
from medusa_nb.training.features import IGNORED
from medusa_nb.tree import Tree


class NotYet(AssertionError):
    """The answer is not right yet; the message names the likely mistake."""


@dataclass
class Exercise:
    """A check: call it with the learner's function.

    Args:
        cases: makes random arguments, a tuple for each call of the function.
        right: a function that is right.
        mistakes: what to say to each wrong function that is often written.
        hint: what to say to any other.
    """

    cases: Callable[[], list[tuple]]
    right: Callable
    mistakes: dict[str, Callable]
    hint: str

    def __call__(self, answer: Callable) -> None:
        """Print "right" or "your turn".

        Raises:
            NotYet: the function is wrong; says how.
        """
        cases = self.cases()
        got = [_outcome(answer, case) for case in cases]
        missing = [case for case, value in zip(cases, got, strict=True) if value is None or value is ...]
        if len(missing) == len(cases):
            print("✎ your turn: write the function above and run the cell again")
        elif missing:
            raise NotYet(
                f"your function returns nothing for {str(missing[0])[:80]}; every way through it must end in a return"
            )
        elif _agree(self.right, cases, got):
            print("✓ right")
        else:
            raise NotYet(next((said for said, wrong in self.mistakes.items() if _agree(wrong, cases, got)), self.hint))


def _outcome(answer: Callable, case: tuple):
    """What a learner's function returns; it may do to its arguments what it likes."""
    try:
        return answer(*copy.deepcopy(case))
    except NotImplementedError:
        return None
    except Exception as error:  # whatever a learner's code raises is shown to the learner
        raise NotYet(f"your function stopped with {type(error).__name__}: {error}") from error


def _agree(function: Callable, cases: list[tuple], values: list) -> bool:
    """Whether these values are what a function returns, up to rounding; numbers, lists and tensors alike."""
    try:
        pairs = [
            [torch.as_tensor(x, dtype=torch.float64) for x in (function(*case), value)]
            for case, value in zip(cases, values, strict=True)
        ]
    except (TypeError, ValueError, RuntimeError):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def _list(length: int, top: int) -> list[int]:
    return [random.randrange(top) for _ in range(length)]


def _parents(size: int) -> list[int]:
    """A random tree whose two branches both go on: the root's parent is -1, parents come before children."""
    return [-1, 0, 0, 1, 2, *(random.randrange(max(1, i - 4), i) for i in range(5, size))]


# 01: how many draft tokens are kept, given what the model says at each place


def _drafts() -> list[tuple]:
    cases: list[tuple] = [([3, 4], [3, 4]), ([7, 8, 9], [1, 8, 9])]
    for wrong in range(5):
        draft = _list(6, 50)
        cases.append((draft, [token + (place == wrong) for place, token in enumerate(draft)]))
    return cases


def _kept(draft: list[int], said: list[int]) -> int:
    return next((i for i, token in enumerate(draft) if token != said[i]), len(draft))


kept_tokens = Exercise(
    _drafts,
    _kept,
    {
        "a right token after a wrong one does not count: stop there": lambda draft, said: sum(map(eq, draft, said)),
        "off by one: the model's own token is not one of the draft's": lambda draft, said: _kept(draft, said) + 1,
        "the draft is kept only up to the first difference": lambda draft, said: len(draft),
    },
    "count the draft tokens that equal what the model says, up to the first that does not",
)

# 01: how many tokens a pass over n tokens must emit to pay for itself

break_even = Exercise(
    lambda: [(random.uniform(1, 9), random.uniform(10, 90)) for _ in range(4)],
    lambda t1, tn: tn / t1,
    {
        "that is the inverse: a slower pass must emit more than one token": lambda t1, tn: t1 / tn,
        "a difference of times is a time; how many passes of one token fit into t(n)?": lambda t1, tn: tn - t1,
        "that counts the extra tokens only; the first one must be paid for, too": lambda t1, tn: tn / t1 - 1,
    },
    "plain decoding would emit t(n) / t(1) tokens in the time of one wide pass",
)

# 02: whether a list of tokens ends in the same block three times in a row


def _repetitions() -> list[tuple]:
    cases: list[tuple] = []
    for size in (1, 2, 3, 5):
        block, before = list(range(100, 100 + size)), _list(4, 50)
        looping = [before + block * 3, block * 3, before + block * 4]
        others = [before + block * 2, before + block * 3 + [51], block * 2 + before]
        cases += [(tokens,) for tokens in looping + others]
    return cases


def _loops(tokens: list[int], longest: int, times: int = 3) -> bool:
    sizes = range(1, min(longest, len(tokens) // times) + 1)
    return any(tokens[-size * times :] == tokens[-size:] * times for size in sizes)


loop_detector = Exercise(
    _repetitions,
    lambda tokens: _loops(tokens, len(tokens)),
    {
        "two times in a row is not yet a loop: three are asked for": lambda tokens: _loops(tokens, len(tokens), 2),
        "the block may be longer than one token: 1 2 1 2 1 2 is a loop, too": lambda tokens: _loops(tokens, 1),
        "the block may be longer than two tokens: try every length up to a third": lambda tokens: _loops(tokens, 2),
        "three blocks and nothing else are missed; range(1, n) ends at n - 1": lambda t: _loops(t, (len(t) - 1) // 3),
        "only blocks that are repeated at the very end count here": is_loop,
    },
    "compare the last three blocks of every length up to a third of the list; only the end counts",
)

# 03: the residual block x + SiLU(W x + b)

residual_block = Exercise(
    lambda: [(torch.randn(5, 4), torch.randn(4, 4), torch.randn(4)) for _ in range(2)],
    lambda x, w, b: x + F.silu(x @ w.T + b),
    {
        "the residual is missing: an untrained head is the base model": lambda x, w, b: F.silu(x @ w.T + b),
        "the weight is transposed: a linear layer computes x @ W.T + b": lambda x, w, b: x + F.silu(x @ w + b),
        "the nonlinearity is missing: SiLU goes around W x + b": lambda x, w, b: x + x @ w.T + b,
        "the bias is missing": lambda x, w, b: x + F.silu(x @ w.T),
    },
    "the block is x + SiLU(x @ W.T + b)",
)

# 03: mean cross entropy over the positions that have a label


def _labelled() -> list[tuple]:
    labels = torch.randint(0, 7, (6,))
    labels[random.sample(range(6), 2)] = IGNORED
    return [(torch.randn(6, 7), labels), (torch.randn(6, 7), labels.roll(1))]


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


head_loss = Exercise(
    _labelled,
    F.cross_entropy,
    {
        "divide by how many positions have a label, not by all of them": lambda x, y: _losses(x, y).mean(),
        "that is the sum; divide by how many positions have a label": lambda x, y: _losses(x, y).sum(),
        "a loss is positive: the minus is missing": lambda x, y: -F.cross_entropy(x, y),
        "where the label is -100 there is nothing to predict": lambda x, y: F.cross_entropy(x, y.clamp(min=0)),
    },
    "average -log p(label) where there is a label",
)

# 03, bug hunt: the labels of head k for a whole sequence


def _shifted(ids: torch.Tensor, by: int) -> torch.Tensor:
    return torch.cat([ids[by:], torch.full((by,), IGNORED)])


shifted_labels = Exercise(
    lambda: [(torch.tensor(_list(9, 1000)), k) for k in range(4)],
    lambda ids, k: _shifted(ids, k + 2),
    {
        "still shifted by one: these are the labels of head k - 1": lambda ids, k: _shifted(ids, k + 1),
        "one too far: head k looks k + 2 places ahead": lambda ids, k: _shifted(ids, k + 3),
        "the end wraps around: the last k + 2 positions have no label": lambda ids, k: ids.roll(-(k + 2)),
        "these are head 0's: head k looks k places further": lambda ids, k: _shifted(ids, 2),
        "every position has an entry: fill up with -100": lambda ids, k: ids[k + 2 :],
    },
    "label t of head k is ids[t + k + 2], and -100 where that is past the end",
)

# 04: row i may see column j if j is node i or one of its ancestors


def _mask(parents: list[int]) -> torch.Tensor:
    return Tree.from_parents(parents).mask()


def _self_and_parent(parents: list[int]) -> torch.Tensor:
    mask = torch.eye(len(parents), dtype=torch.bool)
    mask[range(1, len(parents)), parents[1:]] = True
    return mask


tree_mask = Exercise(
    lambda: [(_parents(8),) for _ in range(3)],
    _mask,
    {
        "transposed: rows look, columns are looked at": lambda parents: _mask(parents).T,
        "that is the plain causal mask: siblings would see each other": lambda parents: torch.ones(8, 8).tril(),
        "every node must also see itself": lambda parents: _mask(parents).fill_diagonal_(False),
        "not only the parent: all ancestors, up to the root": _self_and_parent,
    },
    "walk up from each node to the root and allow exactly what you meet, and itself",
)

# 04: the accepted nodes of a tree, from its tokens and what the base model says after each node


def _verified_trees() -> list[tuple]:
    cases: list[tuple] = []
    for rejected in (None, 0, 1, 2, None, None):  # the node after which no child fits
        parents, tokens = _parents(9), random.sample(range(100), 9)
        said = [random.choice([t for t, p in zip(tokens, parents, strict=True) if p == i] or [-1]) for i in range(9)]
        cases.append((parents, tokens, [-1 if i == rejected else token for i, token in enumerate(said)]))
    return cases


def _accepted(parents: list[int], tokens: list[int], said: list[int]) -> list[int]:
    path = [0]
    for node in range(1, len(parents)):  # parents come before their children
        if parents[node] == path[-1] and tokens[node] == said[path[-1]]:
            path.append(node)
    return path


def _fitting(parents: list[int], tokens: list[int], said: list[int]) -> list[int]:
    return [node for node, parent in enumerate(parents) if node == 0 or tokens[node] == said[parent]]


acceptance_walk = Exercise(
    _verified_trees,
    _accepted,
    {
        "the root is certain: the path starts with node 0": lambda *case: _accepted(*case)[1:],
        "the last accepted node is missing": lambda *case: _accepted(*case)[:-1] or [0],
        "a right token after a wrong one is worthless: its parent was not accepted": _fitting,
        "the path goes on: from the child you come to, look at its children": lambda *case: _accepted(*case)[:2],
    },
    "from the node you stand on, go to the child whose token is what the model says *there*; stop if there is none",
)

# 04: the rows of a cache that stay: the text's, then those of the accepted path


def _caches() -> list[tuple]:
    lengths = random.sample(range(1, 6), 4)  # all different: no fixed length fits
    paths = ([0, 2, 4], [0], [0, 1], [0, 3])
    return [(torch.randn(2, 10, 3), length, path) for length, path in zip(lengths, paths, strict=True)]


cache_crop = Exercise(
    _caches,
    lambda rows, length, path: rows[:, [*range(length), *(length + node for node in path)]],
    {
        "accepted rows need not be the first ones: pick the path's": lambda rows, n, path: rows[:, : n + len(path)],
        "the text's own rows must stay, too": lambda rows, n, path: rows[:, [n + node for node in path]],
        "a node's row stands `length` places further": lambda rows, n, path: rows[:, [*range(n), *path]],
        "the accepted nodes' rows must stay, too": lambda rows, n, path: rows[:, :n],
    },
    "keep rows 0 to length - 1, then row length + i for every node i of the path",
)

# 04: tokens per pass over several texts


def _mean_of_ratios(texts: list[list[int]]) -> float:
    return sum(sum(text) / len(text) for text in texts) / len(texts)


tokens_per_pass = Exercise(
    lambda: [([[random.randrange(1, 5) for _ in range(passes)] for passes in (2, 9, 30)],) for _ in range(3)],
    lambda texts: sum(map(sum, texts)) / sum(map(len, texts)),
    {
        "a mean of ratios: sum tokens and passes over all texts first, then divide": _mean_of_ratios,
        "divide by passes, not by texts": lambda texts: sum(map(sum, texts)) / len(texts),
        "that is passes per token: divide the other way round": lambda t: sum(map(len, t)) / sum(map(sum, t)),
    },
    "divide all tokens by all passes",
)

# 04, bug hunt: the position of every candidate


def _depths(parents: list[int]) -> torch.Tensor:
    return Tree.from_parents(parents).depths()


tree_positions = Exercise(
    lambda: [(random.randrange(5, 99), _parents(8)) for _ in range(3)],
    lambda length, parents: length + _depths(parents),
    {
        "still by number: siblings continue the same text and share a position": lambda n, p: n + torch.arange(len(p)),
        "the text counts, too: the root stands at position `length`": lambda n, p: _depths(p),
        "off by one: the root itself stands at position `length`": lambda n, p: n + _depths(p) + 1,
    },
    "a candidate's position is the root's plus its depth",
)

# 05: the speedup that tokens per pass allow when a plain pass costs t1, a wide one tn, and drafting d

achievable = Exercise(
    lambda: [tuple(random.uniform(1, 5) for _ in range(4)) for _ in range(4)],
    lambda tokens, t1, tn, d: tokens * t1 / (tn + d),
    {
        "tokens per pass is not a speedup: the wide pass also takes longer": lambda tokens, t1, tn, d: tokens,
        "how long does plain decoding take for them? Divide that by a step's time": lambda tokens, t1, tn, d: (
            tokens / t1
        ),
        "drafting takes time, too": lambda tokens, t1, tn, d: tokens * t1 / tn,
        "upside down: a step that takes longer gains less": lambda tokens, t1, tn, d: tokens * (tn + d) / t1,
    },
    "plain decoding needs tokens * t1 for what one step emits in tn + d",
)
