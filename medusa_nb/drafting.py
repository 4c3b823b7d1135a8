"""Guessing: where the candidates of a step come from.

A draft turns the state after the last accepted token into a candidate tree for each text. Everything
stays on the model's device, in fixed shapes.
"""

from collections import Counter
from typing import NamedTuple

import torch

from medusa_nb.errors import InputError
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
    ``ancestors`` ``[B, N, N]``: row i is True at i itself and at every node above it.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor


class DraftVocabulary:
    """The token ids that may be guessed, and their rows of lm_head: fewer logits to compute at every step.

    Rare tokens are then never guessed, which costs little: the base model still says them itself
    (FR-Spec, arXiv 2502.14856).
    """

    def __init__(self, heads: MedusaHeads, ids: torch.Tensor):
        if heads.projection is not None:
            raise InputError("these heads have their own projections; a draft vocabulary is for the shared lm_head")
        lm_head = heads.shared[0].weight
        self.ids = ids.to(lm_head.device)
        self.projection = lm_head.detach()[self.ids].clone()


def frequent_tokens(answers: list[list[int]], count: int) -> torch.Tensor:
    """The ``count`` ids that occur most often in answers, in ascending order."""
    tally = Counter(token for answer in answers for token in answer)
    return torch.tensor(sorted(token for token, _ in tally.most_common(count)))


class TreeDraft:
    """The same tree at every step, filled with each head's best guesses, of a draft vocabulary if given."""

    reads_text = False

    def __init__(
        self,
        heads: MedusaHeads | None,
        tree: Tree,
        device: torch.device | str,
        vocabulary: DraftVocabulary | None = None,
    ):
        self.heads, self.tree, self.vocabulary = heads, tree, vocabulary
        self.size, self.depth = len(tree), tree.depth
        self.guess_index = tree.guess_index.to(device)
        self.parents = torch.tensor([max(0, parent) for parent in tree.parents], device=device)
        self.depths = tree.depths().to(device)
        self.ancestors = tree.mask().to(device)

    def __call__(self, state: State) -> Candidates:
        shape = (x.expand(len(state.root), *x.shape) for x in (self.parents, self.depths, self.ancestors))
        return Candidates(self.fill(state), *shape)

    def fill(self, state: State) -> torch.Tensor:
        """The candidates' tokens ``[B, N]``."""
        return guess(self.heads, state.hidden, state.root, self.tree, self.guess_index, self.vocabulary)


def guess(
    heads: MedusaHeads | None, hidden: torch.Tensor, root: torch.Tensor, tree: Tree, guess_index=None, vocabulary=None
) -> torch.Tensor:
    """The tree's candidate tokens ``[B, N]``: the root, then each node's guess by its head and rank.

    ``hidden`` ``[B, D]`` is the state that said the root ``[B]``, so head 0 guesses the token after it.
    """
    if len(tree) == 1:
        return root.unsqueeze(1)
    guess_index = tree.guess_index.to(root.device) if guess_index is None else guess_index
    logits = heads(hidden, tree.depth, root, vocabulary.projection if vocabulary else None)
    top = logits.topk(tree.width, dim=-1).indices  # [depth, B, width]
    top = vocabulary.ids[top] if vocabulary else top
    return torch.cat([root.unsqueeze(1), top.transpose(0, 1).flatten(1)[:, guess_index]], dim=1)


class DynamicDraft:
    """The ``size`` nodes that promise most right now, chosen at every step from a pool.

    The pool holds the heads' guesses along the paths of a large tree and, if ``ngram_worth`` is given, one
    path of tokens copied from the text. A node's worth is the probability that its whole path is right: the
    product of the heads' own probabilities, or what n-grams of that length were worth on calibration text
    (:func:`medusa_nb.ngrams.ngram_worth`). No node is worth more than its parent, so the best nodes always
    form a tree (best-first as in EAGLE-2, arXiv 2406.16858, section 4.1).

    Args:
        pool: a tree with at least ``size`` nodes; what it leaves out is never guessed.
        ngram_worth: ``[longest + 1, L]``; None for no n-grams.
    """

    def __init__(self, heads: MedusaHeads, pool: Tree, size: int, device, ngram_worth: torch.Tensor | None = None):
        refuse_deep(pool, heads)
        if size > len(pool):
            raise InputError(f"a tree of {size} nodes cannot be chosen from a pool of {len(pool)}; enlarge the pool")
        self.heads, self.tree, self.size = heads, pool, size
        self.reads_text = ngram_worth is not None
        copied = ngram_worth.shape[1] if self.reads_text else 0
        self.longest = len(ngram_worth) - 1 if self.reads_text else 0
        self.depth = min(max(pool.depth, copied), size - 1)
        chain = [0, *range(len(pool), len(pool) + copied - 1)][:copied]  # the copied path hangs from the root
        self.parents = torch.tensor([max(0, parent) for parent in pool.parents] + chain, device=device)
        self.depths = torch.cat([pool.depths(), 1 + torch.arange(copied)]).to(device)
        ancestors = torch.block_diag(pool.mask().int(), torch.ones(copied, copied).tril().int()).bool()
        ancestors[:, 0] = True
        self.ancestors = ancestors[: len(self.parents), : len(self.parents)].to(device)
        self.guess_index = pool.guess_index.to(device)
        self.above = self.ancestors[: len(pool), : len(pool)].float().T.contiguous()
        self.log_worth = ngram_worth.log().to(device) if self.reads_text else None

    def __call__(self, state: State) -> Candidates:
        logits = self.heads(state.hidden, self.tree.depth, state.root).float()
        top = logits.log_softmax(-1).topk(self.tree.width, dim=-1)  # [depth, B, width]
        values, ids = (x.transpose(0, 1).flatten(1)[:, self.guess_index] for x in top)
        tokens = torch.cat([state.root.unsqueeze(1), ids], dim=1)
        worth = torch.cat([torch.zeros_like(values[:, :1]), values], dim=1) @ self.above  # logs, summed along paths
        if self.reads_text:
            copied, matched = ngram_guesses(state.text, state.lengths, self.log_worth.shape[1], self.longest)
            tokens, worth = torch.cat([tokens, copied], dim=1), torch.cat([worth, self.log_worth[matched]], dim=1)
        worth = worth - 1e-4 * self.depths  # a certain child must not come before its parent
        chosen = worth.topk(self.size, dim=1).indices.sort(dim=1).values  # [B, N], parents before children
        number = torch.zeros_like(tokens).scatter(
            1, chosen, torch.arange(self.size, device=chosen.device).expand_as(chosen)
        )
        parents = number.gather(1, self.parents[chosen])
        ancestors = self.ancestors[chosen.unsqueeze(2), chosen.unsqueeze(1)]
        return Candidates(tokens.gather(1, chosen), parents, self.depths[chosen], ancestors)


def refuse_deep(tree: Tree, heads: MedusaHeads | None) -> None:
    """Raise :class:`InputError` for a tree that is deeper than there are heads."""
    available = 0 if heads is None else heads.num_heads
    if tree.depth > available:
        raise InputError(
            f"the tree is {tree.depth} guesses deep, but there are {available} heads; prune it to that depth"
        )
