"""The candidate tree: which combinations of draft tokens are worth verifying in one forward pass.

A node is a tuple of ranks: ``(0, 2)`` is head 0's best token followed by head 1's third best. What a node is worth
is a count: how often, on calibration text, the true tokens had exactly these ranks. So the best tree of n nodes is
the n most frequent prefixes, and nobody has to assume that heads err independently. Which n is best depends on the
machine (Sequoia, arXiv 2402.12374, section 3.2).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from medusa_nb.errors import InputError

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A candidate tree. Node 0 is the root, the token the base model has already chosen.

    ``paths[i]`` is the rank tuple of node i (empty for the root), ``parents[i]`` the number of its parent (-1 for
    the root). Parents come before their children.

    Raises:
        InputError: the root is missing, a node stands twice, or a parent is missing or comes after its child.
    """

    paths: tuple[Ranks, ...]
    parents: tuple[int, ...] = field(init=False)
    children: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self):
        number = {path: i for i, path in enumerate(self.paths)}
        if not self.paths or self.paths[0] != () or len(number) != len(self.paths):
            raise InputError("a tree starts with the root () and names each node once")
        for i, path in enumerate(self.paths[1:], 1):
            if number.get(path[:-1], i) >= i:
                raise InputError(f"node {path} comes before its parent {path[:-1]}, or the parent is missing")
        parents = (-1, *(number[path[:-1]] for path in self.paths[1:]))
        children: list[list[int]] = [[] for _ in self.paths]
        for i, parent in enumerate(parents[1:], 1):
            children[parent].append(i)
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "children", tuple(map(tuple, children)))

    @classmethod
    def chain(cls, depth: int) -> "Tree":
        """A tree with a single path, each head's best token: list decoding."""
        return cls(tuple((0,) * i for i in range(depth + 1)))

    @classmethod
    def from_paths(cls, paths: Iterable[Ranks]) -> "Tree":
        """A tree from rank tuples in any order; the root may be left out."""
        return cls(tuple(sorted({(), *map(tuple, paths)}, key=lambda path: (len(path), path))))

    @classmethod
    def from_parents(cls, parents: Iterable[int]) -> "Tree":
        """The tree whose nodes have these parents. The root's entry is ignored; siblings are ranked in their order."""
        paths: list[Ranks] = [()]
        born: Counter = Counter()
        for parent in list(parents)[1:]:
            paths.append((*paths[parent], born[parent]))
            born[parent] += 1
        return cls(tuple(paths))

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def depth(self) -> int:
        """How many draft tokens the longest path holds: the number of heads the tree needs."""
        return max(map(len, self.paths))

    @cached_property
    def width(self) -> int:
        """The largest number of tokens the tree takes from one head: the k of its top-k."""
        return max((rank + 1 for path in self.paths for rank in path), default=0)

    def mask(self) -> torch.Tensor:
        """The tree mask ``[N, N]``, bool: row i may attend to column j if j is node i or an ancestor of it."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for i, parent in enumerate(self.parents[1:], 1):
            mask[i] |= mask[parent]
        return mask

    def depths(self) -> torch.Tensor:
        """``[N]``: how many tokens after the root each node stands."""
        return torch.tensor([len(path) for path in self.paths])


ROOT_ONLY = Tree(((),))


def build_tree(rank_counts: Counter, size: int) -> Tree:
    """The tree of ``size`` nodes that is right most often.

    Args:
        rank_counts: for each tuple of ranks, at how many calibration positions the true tokens' ranks start with it:
            ``{(0,): 900, (0, 2): 130, ...}``. See :func:`count_ranks`.
        size: N, the number of tokens one pass verifies, the root included.
    """
    if size < 1:
        raise InputError(f"a tree has at least its root; size={size} is too small")
    worth = {path: count for path, count in rank_counts.items() if path}
    chosen: list[Ranks] = [()]
    for path in sorted(worth, key=lambda p: (-worth[p], len(p), p)):
        if len(chosen) == size:
            break
        if path[:-1] in chosen:
            chosen.append(path)
    return Tree(tuple(chosen))


def count_ranks(ranks: torch.Tensor, max_rank: int = 32) -> Counter:
    """Count rank prefixes over calibration positions.

    Args:
        ranks: ``[P, K]``, the rank each head gave the true token at each position (0 is best), negative where the
            answer ended before that head's token.
        max_rank: tokens of this rank or worse are never drafted.

    Returns:
        A counter of prefixes; ``()`` counts all positions.
    """
    counts: Counter = Counter()
    for row in ranks.tolist():
        counts[()] += 1
        for k, rank in enumerate(row):
            if not 0 <= rank < max_rank:
                break
            counts[tuple(row[: k + 1])] += 1
    return counts


def expected_tokens(tree: Tree, rank_counts: Counter) -> float:
    """Tokens per pass this tree would have given on the calibration positions.

    One for the base model's own next token, plus each node's share of the positions where it is right.
    """
    if not rank_counts.get(()):
        raise InputError("rank_counts has no entry () with the number of positions; use count_ranks")
    return 1 + sum(rank_counts[path] for path in tree.paths[1:]) / rank_counts[()]
