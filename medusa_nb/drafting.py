"""Drafting: where the candidates of a step come from.

A draft turns the state after the last accepted token into a candidate tree for each sequence. Everything stays on
the model's device, in fixed shapes, so that a step can be compiled or captured as a CUDA graph.
"""

import math
from typing import NamedTuple, Protocol

import torch

from medusa_nb.errors import InputError
from medusa_nb.heads import Heads
from medusa_nb.ngrams import ngram_tokens
from medusa_nb.tree import ROOT_ONLY, Tree


class State(NamedTuple):
    """Where B sequences stand.

    ``token`` ``[B]``: the last token of each, certain but not yet read by the model. ``hidden`` ``[B, D]``: the state
    it was predicted from. ``lengths`` ``[B]``: how many tokens the model has read. ``text`` ``[B, capacity]``: all
    tokens, the last one at place ``lengths``; None where no draft reads it.
    """

    token: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    text: torch.Tensor | None = None


class Candidates(NamedTuple):
    """Candidate trees of B sequences with N nodes each, the root first, parents before children.

    ``tokens`` ``[B, N]``; ``parents`` ``[B, N]``, the root is its own; ``depths`` ``[B, N]``; ``mask`` ``[B, N, N]``,
    row i is True at i itself and at its ancestors; ``copied`` ``[B, N]``, tokens that come from the text, not a head.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor
    copied: torch.Tensor


class Draft(Protocol):
    """Whatever proposes candidates: always ``size`` of them, the deepest ``depth`` tokens after the root.

    ``reads_text``: whether it needs :attr:`State.text`.
    """

    size: int
    depth: int
    reads_text: bool

    def __call__(self, state: State) -> Candidates: ...


def filled(tree: Tree, tokens: torch.Tensor) -> Candidates:
    """The candidates of B sequences that share a tree, with their tokens ``[B, N]`` in it."""
    parts = (torch.tensor([max(0, parent) for parent in tree.parents]), tree.depths(), tree.mask())
    fixed = (*parts, torch.zeros(len(tree), dtype=torch.bool))
    return Candidates(tokens, *(part.to(tokens.device).expand(len(tokens), *part.shape) for part in fixed))


class StaticTree:
    """The same tree at every step, filled with each head's best tokens.

    Args:
        heads: None only for a tree that is just its root: plain decoding.
        tree: at most as deep as there are heads.
        device: the model's.

    Raises:
        InputError: the tree is deeper than there are heads.
    """

    reads_text = False

    def __init__(self, heads: Heads | None, tree: Tree = ROOT_ONLY, device: torch.device | str = "cpu"):
        available = heads.num_heads if heads is not None else 0
        if tree.depth > available:
            raise InputError(
                f"the tree is {tree.depth} tokens deep, but there are {available} heads; prune it to that depth"
            )
        self.heads, self.tree, self.size, self.depth = heads, tree, len(tree), tree.depth
        self.filled = filled(tree, torch.zeros(1, len(tree), dtype=torch.long, device=device))
        self.levels = [self._level(depth, device) for depth in range(tree.depth)]

    def _level(self, depth: int, device) -> tuple[torch.Tensor, ...]:
        """The nodes one below ``depth``, for each the number of its parent's path, its rank, and the parents' paths."""
        tree = self.tree
        nodes = [node for node in range(len(tree)) if len(tree.paths[node]) == depth + 1]
        parents = sorted({tree.parents[node] for node in nodes})
        paths = [self.filled.mask[0, parent].nonzero()[:, 0].tolist() for parent in parents]
        places = [parents.index(tree.parents[node]) for node in nodes]
        ranks = [tree.paths[node][-1] for node in nodes]
        return tuple(torch.tensor(values, device=device) for values in (nodes, places, ranks, paths))

    def __call__(self, state: State) -> Candidates:
        batch = len(state.token)
        tokens = state.token.unsqueeze(1).repeat(1, self.size)  # every node holds the root's token at first
        if self.heads is not None and self.depth:
            started = self.heads.start(state.hidden, self.depth, self.tree.width)
            for k, (nodes, places, ranks, paths) in enumerate(self.levels):
                drafted, _ = self.heads.draft(k, started, tokens[:, paths])  # [B, P, width]
                tokens = tokens.index_copy(1, nodes, drafted[:, places, ranks])
        return Candidates(tokens, *(part.expand(batch, *part.shape[1:]) for part in self.filled[1:]))


class GrowingTree:
    """A new tree, grown at every step: the ``size`` nodes that promise most right now.

    Depth by depth, the ``beam`` most promising nodes get their head's ``branch`` best tokens as children; with
    ``ngram_worth``, one path of tokens copied from the text joins them. A node's worth is the probability that its
    whole path is right: the product of the heads' own probabilities, or what n-grams of that length were worth on
    calibration text (:func:`medusa_nb.ngrams.ngram_worth`). No node is worth more than its parent, so the best
    ``size`` nodes always form a tree (as in EAGLE-2, arXiv 2406.16858, section 4).

    Args:
        size: N, the root included.
        depth: how deep the heads draft, at most as many as there are; copied paths may go deeper.
        ngram_worth: ``[longest + 1, L]``; None to copy nothing.
        beam: by default a quarter of ``size``, the cheapest that finds nearly all of what more would find.

    Raises:
        InputError: there are no heads, or no drafted token fits into a tree of this size.
    """

    def __init__(
        self,
        heads: Heads,
        size: int,
        depth: int | None = None,
        ngram_worth: torch.Tensor | None = None,
        beam: int | None = None,
        branch: int = 8,
    ):
        if heads is None or size < 2:
            raise InputError(f"a growing tree of {size} nodes needs heads and at least 2 nodes")
        device = heads.device
        self.heads, self.size, self.beam = heads, size, beam or max(1, size // 4)
        self.reads_text = ngram_worth is not None
        worth = torch.zeros(1, 0) if ngram_worth is None else ngram_worth
        self.longest, self.copied = len(worth) - 1, worth.shape[1]
        self.log_worth = worth.log().to(device)
        self.levels = min(heads.num_heads, size - 1, depth or heads.num_heads)
        enough = math.ceil((size - 1) / self.levels)  # children of every node, so that the tree can be filled
        self.branch = min(size - 1, max(branch, enough), heads.num_choices)
        depths, parents = [0], 1
        for k in range(self.levels):
            depths += [k + 1] * (parents * self.branch)
            parents = min(self.beam, parents * self.branch)
        if len(depths) < size:
            raise InputError(
                f"heads that draft only {heads.num_choices} tokens cannot fill a tree of {size} nodes; ask for fewer"
            )
        self.depths = torch.tensor(depths + list(range(1, self.copied + 1)), device=device)
        self.depth = max(self.levels, min(self.copied, size - 1))

    def __call__(self, state: State) -> Candidates:
        tokens, worth, paths = self.grow(state)
        if self.reads_text:
            tokens, worth, paths = self.copy(state, tokens, worth, paths)
        worth = worth - 1e-4 * self.depths  # a certain child must not come before its parent
        chosen = worth.topk(self.size, dim=1).indices.sort(dim=1).values  # [B, N]: parents before children
        paths = paths.gather(1, chosen.unsqueeze(2).expand(-1, -1, paths.shape[2]))
        depths = self.depths[chosen]
        mask = (paths.unsqueeze(3) == chosen[:, None, None]).any(2)
        parents = paths.gather(2, (depths - 1).clamp(min=0).unsqueeze(2))
        parents = (parents == chosen.unsqueeze(1)).int().argmax(2)
        copied = chosen >= self.depths.shape[0] - self.copied
        return Candidates(tokens.gather(1, chosen), parents, depths, mask, copied)

    def grow(self, state: State) -> tuple[torch.Tensor, ...]:
        """All nodes the heads propose: token ids and log worth ``[B, M]``, and paths ``[B, M, depth + 1]``.

        A path holds the numbers of the node's ancestors and its own, the root's 0 first, -1 beyond its end.
        """
        batch, device = len(state.token), state.token.device
        started = self.heads.start(state.hidden, self.levels, self.branch)
        words = state.token.view(-1, 1, 1)  # [B, P, k + 1]: the tokens on the way to each node that gets children
        worth = torch.zeros(batch, 1, device=device)
        paths = torch.zeros(batch, 1, 1, dtype=torch.long, device=device)
        nodes, count = [(state.token.unsqueeze(1), worth, self.pad(paths))], 1
        for k in range(self.levels):
            ids, values = self.heads.draft(k, started, words)  # [B, P, branch]
            ids, values = ids.flatten(1), (worth.unsqueeze(2) + values).flatten(1)
            words, paths = words.repeat_interleave(self.branch, 1), paths.repeat_interleave(self.branch, 1)
            number = torch.arange(count, count + ids.shape[1], device=device).expand(batch, -1)
            words, paths = torch.cat([words, ids.unsqueeze(2)], 2), torch.cat([paths, number.unsqueeze(2)], 2)
            nodes.append((ids, values, self.pad(paths)))
            count += ids.shape[1]
            worth, best = values.topk(min(self.beam, values.shape[1]), dim=1)
            words, paths = (x.gather(1, best.unsqueeze(2).expand(-1, -1, k + 2)) for x in (words, paths))
        return tuple(torch.cat(parts, 1) for parts in zip(*nodes, strict=True))

    def copy(self, state: State, tokens, worth, paths) -> tuple[torch.Tensor, ...]:
        """The same with the path of copied tokens. Where a head drafted its first token, both grow from one node."""
        batch, count = tokens.shape
        device = tokens.device
        assert state.text is not None  # reads_text asks for it
        copied, matched = ngram_tokens(state.text, state.lengths, self.copied, self.longest)
        promise = self.log_worth[matched]  # [B, L]
        first = slice(1, 1 + self.branch)
        same = (tokens[:, first] == copied[:, :1]) & torch.isfinite(promise[:, :1])  # [B, branch]
        merged = torch.where(same, worth[:, first].maximum(promise[:, :1]), worth[:, first])
        worth = torch.cat([worth[:, :1], merged, worth[:, 1 + self.branch :]], 1)
        own = torch.arange(count, count + self.copied, device=device).expand(batch, -1)
        start = torch.where(same.any(1), 1 + same.int().argmax(1), own[:, 0]).unsqueeze(1)
        promise = torch.cat([promise[:, :1].masked_fill(same.any(1, keepdim=True), -torch.inf), promise[:, 1:]], 1)
        down = torch.cat([torch.zeros_like(start), start, own[:, 1:]], 1).unsqueeze(1).expand(-1, self.copied, -1)
        beyond = torch.ones(self.copied, self.copied + 1, device=device).triu(2).bool()
        down = self.pad(down.masked_fill(beyond, -1)[:, :, : self.depth + 1])
        return torch.cat([tokens, copied], 1), torch.cat([worth, promise], 1), torch.cat([paths, down], 1)

    def pad(self, paths: torch.Tensor) -> torch.Tensor:
        """Fill paths up with -1 to the depth a tree can have."""
        return torch.nn.functional.pad(paths, (0, self.depth + 1 - paths.shape[2]), value=-1)
