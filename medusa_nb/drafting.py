"""Guessing: where the candidates of a step come from.

A draft turns the state after the last accepted token into a candidate tree for each text. Everything
stays on the model's device, in fixed shapes.
"""

from typing import NamedTuple

import torch

from medusa_nb.errors import InputError
from medusa_nb.fast_heads import FastHeads
from medusa_nb.heads import MedusaHeads
from medusa_nb.ngrams import ngram_guesses
from medusa_nb.tree import Tree


class State(NamedTuple):
    """Where B texts stand: ``root`` ``[B]`` is each one's last token, certain but not yet read by the model;
    ``hidden`` ``[B, D]`` the state it was said from; ``lengths`` ``[B]`` the tokens read so far; ``text``
    ``[B, capacity]`` all tokens up to the root at place ``lengths`` (None where nobody looks at it)."""

    root: torch.Tensor
    hidden: torch.Tensor
    lengths: torch.Tensor
    text: torch.Tensor | None = None


class Candidates(NamedTuple):
    """Candidate trees of B texts with N nodes each, parents before children, the root first.

    ``tokens`` ``[B, N]``, ``parents`` ``[B, N]`` (the root is its own), ``depths`` ``[B, N]`` and
    ``ancestors`` ``[B, N, N]``: row i is True at i itself and at every node above it. ``copied`` ``[B, N]`` tells
    guesses copied from the text from those of heads; None where nothing is copied.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    copied: torch.Tensor | None = None


class Level(NamedTuple):
    """One depth of a static tree: ``above`` ``[P, depth]`` are the paths (node numbers, the root first) of the
    nodes that have children, and child i is guess ``rank[i]`` below path ``parent[i]``."""

    above: torch.Tensor
    parent: torch.Tensor
    rank: torch.Tensor


class TreeDraft:
    """The same tree at every step, filled with each head's best guesses."""

    reads_text = False

    def __init__(self, heads: MedusaHeads | None, tree: Tree, device: torch.device | str):
        self.heads, self.tree = heads, tree
        self.fast = None if heads is None else FastHeads.of(heads)
        self.size, self.depth, self.width = len(tree), tree.depth, tree.width
        self.parents = torch.tensor([max(0, parent) for parent in tree.parents], device=device)
        self.depths = tree.depths().to(device)
        self.ancestors = tree.mask().to(device)
        self.levels, order = [], [0]
        for depth in range(tree.depth):
            children = [node for node in range(len(tree)) if len(tree.paths[node]) == depth + 1]
            parents = sorted({tree.parents[node] for node in children})
            above = [[node for node in order if tree.mask()[parent, node]] for parent in parents]
            self.levels.append(
                Level(
                    torch.tensor([[order.index(node) for node in path] for path in above], device=device),
                    torch.tensor([parents.index(tree.parents[node]) for node in children], device=device),
                    torch.tensor([tree.paths[node][-1] for node in children], device=device),
                )
            )
            order += children
        self.place = torch.tensor([order.index(node) for node in range(len(tree))], device=device)

    def __call__(self, state: State) -> Candidates:
        shape = (x.expand(len(state.root), *x.shape) for x in (self.parents, self.depths, self.ancestors))
        return Candidates(self.fill(state), *shape)

    def fill(self, state: State) -> torch.Tensor:
        """The candidates' tokens ``[B, N]``: the root, then depth by depth each node's guess by its head and rank."""
        tokens = state.root.unsqueeze(1)
        if self.size == 1:
            return tokens
        guess = Guesser(self.heads, self.fast, state, self.depth, self.width)
        for k, level in enumerate(self.levels):
            ids, _ = guess(k, tokens[:, level.above])
            tokens = torch.cat([tokens, ids[:, level.parent, level.rank]], dim=1)
        return tokens[:, self.place]


class Guesser:
    """What the first ``count`` heads guess below given paths, from where B texts stand.

    Heads that do not see the path guess the same below every path, so theirs are computed all at once.
    """

    def __init__(self, heads: MedusaHeads, fast: FastHeads | None, state: State, count: int, width: int):
        self.heads, self.fast, self.hidden, self.width = heads, fast, state.hidden, width
        if fast is not None:
            self.near = fast.near(state.hidden, state.root, count)
        else:
            self.blocks = heads.blocks(state.hidden, count)  # [count, B, D]
        self.known = None if heads.sees_path else self.best(heads.project(self.blocks, 0))

    def __call__(self, k: int, paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Head k's best guesses and their log-probabilities ``[B, P, width]`` below ``paths`` ``[B, P, k + 1]``."""
        if self.fast is not None:
            return self.best(self.fast.after(k, self.hidden, self.near[k], paths))
        if self.known is None:
            return self.best(self.heads.after(k, self.blocks[k], paths))
        return tuple(x[k].unsqueeze(1).expand(-1, paths.shape[1], -1) for x in self.known)

    def best(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = logits.float().log_softmax(-1).topk(self.width, dim=-1)
        return self.heads.tokens(top.indices), top.values


class DynamicDraft:
    """A tree that is grown anew at every step: the ``size`` nodes that promise most right now.

    Depth by depth, the ``beam`` most promising nodes (by default a quarter of ``size``: the cheapest that finds
    nearly all of what more would find) get their heads' ``branch`` best guesses as children; if
    ``ngram_worth`` is given, one path of tokens copied from the text joins them. A node's worth is the
    probability that its whole path is right: the product of the heads' own probabilities, or what n-grams of
    that length were worth on calibration text (:func:`medusa_nb.ngrams.ngram_worth`). No node is worth more
    than its parent, so the best ``size`` nodes of all always form a tree (as in EAGLE-2, arXiv 2406.16858,
    section 4).

    Args:
        depth: how deep the heads guess, at most as many as there are; copied paths may go deeper.
        ngram_worth: ``[longest + 1, L]``; None for no n-grams.

    Raises:
        InputError: there are no heads, or no guess fits into a tree of this size.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        size: int,
        device,
        ngram_worth: torch.Tensor | None = None,
        depth: int | None = None,
        beam: int | None = None,
        branch: int = 8,
    ):
        if heads is None or size < 2:
            raise InputError(f"a tree of {size} nodes that grows needs heads and at least 2 nodes")
        self.heads, self.size, self.beam = heads, size, beam or max(1, size // 4)
        self.fast = FastHeads.of(heads)
        self.reads_text = ngram_worth is not None
        self.copied = ngram_worth.shape[1] if self.reads_text else 0
        self.longest = len(ngram_worth) - 1 if self.reads_text else 0
        self.log_worth = ngram_worth.log().to(device) if self.reads_text else None
        self.levels = min(heads.num_heads, size - 1, depth or heads.num_heads)
        tokens = len(heads.shared[0].weight if heads.vocabulary is None else heads.vocabulary)
        self.branch = min(size - 1, max(branch, -(-(size - 1) // self.levels)), tokens)  # enough to fill the tree
        depths, parents = [0], 1
        for k in range(self.levels):
            depths += [k + 1] * (parents * self.branch)
            parents = min(self.beam, parents * self.branch)
        if len(depths) < size:
            raise InputError(f"heads that guess only {tokens} tokens cannot fill a tree of {size} nodes; ask for fewer")
        self.depths = torch.tensor(depths + list(range(1, self.copied + 1)), device=device)
        self.depth = max(self.levels, min(self.copied, size - 1))

    def __call__(self, state: State) -> Candidates:
        tokens, worth, paths = self.grow(state)
        if self.reads_text:
            tokens, worth, paths = self.copy(state, tokens, worth, paths)
        worth = worth - 1e-4 * self.depths  # a certain child must not come before its parent
        chosen = worth.topk(self.size, dim=1).indices
        chosen = -(-chosen).topk(self.size, dim=1).values  # [B, N], in order: parents before children; faster than sort
        paths = paths.gather(1, chosen.unsqueeze(2).expand(-1, -1, paths.shape[2]))
        depths = self.depths[chosen]
        ancestors = (paths.unsqueeze(3) == chosen[:, None, None]).any(2)
        parents = paths.gather(2, (depths - 1).clamp(min=0).unsqueeze(2))
        parents = (parents == chosen.unsqueeze(1)).int().argmax(2)
        copied = chosen >= self.depths.shape[0] - self.copied
        return Candidates(tokens.gather(1, chosen), parents, depths, ancestors, copied)

    def grow(self, state: State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All nodes the heads propose: token ids and log worth ``[B, M]``, and paths ``[B, M, depth + 1]``.

        A path holds the numbers of the nodes above and the node's own, the root's 0 first, -1 beyond its end.
        """
        texts, device = len(state.root), state.root.device
        guess = Guesser(self.heads, self.fast, state, self.levels, self.branch)
        words = state.root.view(-1, 1, 1)  # [B, P, k + 1]: the tokens down to each node that gets children
        worth = torch.zeros(texts, 1, device=device)
        paths = torch.zeros(texts, 1, 1, dtype=torch.long, device=device)
        nodes, count = [(state.root.unsqueeze(1), worth, self.pad(paths))], 1
        for k in range(self.levels):
            ids, values = guess(k, words)  # [B, P, branch]
            ids, values = ids.flatten(1), (worth.unsqueeze(2) + values).flatten(1)
            words, paths = words.repeat_interleave(self.branch, 1), paths.repeat_interleave(self.branch, 1)
            number = torch.arange(count, count + ids.shape[1], device=device).expand(texts, -1)
            words, paths = torch.cat([words, ids.unsqueeze(2)], 2), torch.cat([paths, number.unsqueeze(2)], 2)
            nodes.append((ids, values, self.pad(paths)))
            count += ids.shape[1]
            worth, best = values.topk(min(self.beam, values.shape[1]), dim=1)
            words, paths = (x.gather(1, best.unsqueeze(2).expand(-1, -1, k + 2)) for x in (words, paths))
        return tuple(torch.cat(parts, 1) for parts in zip(*nodes, strict=True))

    def copy(self, state: State, tokens, worth, paths) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same with the path of copied tokens; where a head guessed its first token, both grow from one node."""
        texts, count, device = *tokens.shape, tokens.device
        copied, matched = ngram_guesses(state.text, state.lengths, self.copied, self.longest)
        promise = self.log_worth[matched]  # [B, L]
        first = slice(1, 1 + self.branch)
        same = (tokens[:, first] == copied[:, :1]) & torch.isfinite(promise[:, :1])  # [B, branch]
        merged = torch.where(same, worth[:, first].maximum(promise[:, :1]), worth[:, first])
        worth = torch.cat([worth[:, :1], merged, worth[:, 1 + self.branch :]], 1)
        own = torch.arange(count, count + self.copied, device=device).expand(texts, -1)
        start = torch.where(same.any(1), 1 + same.int().argmax(1), own[:, 0]).unsqueeze(1)
        promise = torch.cat([promise[:, :1].masked_fill(same.any(1, keepdim=True), -torch.inf), promise[:, 1:]], 1)
        down = torch.cat([torch.zeros_like(start), start, own[:, 1:]], 1).unsqueeze(1).expand(-1, self.copied, -1)
        beyond = torch.ones(self.copied, self.copied + 1, device=device).triu(2).bool()
        down = self.pad(down.masked_fill(beyond, -1)[:, :, : self.depth + 1])
        return torch.cat([tokens, copied], 1), torch.cat([worth, promise], 1), torch.cat([paths, down], 1)

    def pad(self, paths: torch.Tensor) -> torch.Tensor:
        """Fill paths up with -1 to the depth a tree can have."""
        return torch.nn.functional.pad(paths, (0, self.depth + 1 - paths.shape[2]), value=-1)


def growing_draft(
    heads: MedusaHeads, shape: tuple[int, int], ngram_worth: torch.Tensor, frequent: torch.Tensor
) -> DynamicDraft:
    """The tree that heads and n-grams grow; heads without a draft vocabulary guess only ``frequent`` ids.

    ``shape`` is the number of nodes and how deep the heads guess.
    """
    heads = heads.limited_to(frequent) if heads.vocabulary is None else heads
    return DynamicDraft(heads, shape[0], heads.weight.device, ngram_worth, shape[1])


def refuse_deep(tree: Tree, heads: MedusaHeads | None) -> None:
    """Raise :class:`InputError` for a tree that is deeper than there are heads."""
    available = heads.num_heads if heads is not None else 0
    if tree.depth > available:
        raise InputError(
            f"the tree is {tree.depth} guesses deep, but there are {available} heads; prune it to that depth"
        )
