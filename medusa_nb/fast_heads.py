"""Trained heads laid out for a decoding step: the same guesses from fewer bytes.

A step that guesses is bound by reading weights from memory, and most of them need not be read:

- A linear layer over several vectors is the sum of one for each: ``W [x, e0, e1] = A x + B e0 + C e1``. What the state
  and the root add is the same below every path and computed once, for all heads together.
- What a guess adds depends on nothing but its token, and a draft vocabulary has few: it is looked up in a table.
"""

import torch
import torch.nn.functional as F
from torch import nn

from medusa_nb.heads import MedusaHeads


class FastHeads(nn.Module):
    """Heads that see the path and have a draft vocabulary, in parts.

    They must have no block before the one that reads the path; weights that change later are not noticed. The tables
    are K (K - 1) / 2 of the size ``[V', D]``.
    """

    def __init__(self, heads: MedusaHeads):
        super().__init__()
        wide, embedding = heads.weight.shape[-1], heads.shared[1].weight.detach()
        near = wide + embedding.shape[1]  # the columns that read the state and the root
        words = embedding[heads.vocabulary].to(heads.weight.dtype)
        self.heads = (heads,)  # in a tuple: their weights are not this module's
        self.register_buffer("start", torch.cat([weight.detach()[:, :near] for weight in heads.path_weight]))
        rows = (
            heads.shared_rows.expand(heads.num_heads, -1, -1) if heads.projection is None else heads.projection.detach()
        )
        self.register_buffer("project", rows)
        for k, weight in enumerate(heads.path_weight):
            parts = weight.detach()[:, near:].split(embedding.shape[1], dim=1)
            self.register_buffer(f"table{k}", torch.stack([F.linear(words, part) for part in parts]) if k else None)

    @classmethod
    def of(cls, heads: MedusaHeads) -> "FastHeads | None":
        """These heads laid out anew, None if they are of another kind."""
        fits = heads.sees_path and heads.vocabulary is not None and not heads.num_layers
        return cls(heads) if fits else None

    def near(self, hidden: torch.Tensor, root: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """What states ``[B, D]`` and roots ``[B]`` add to the first ``count`` heads' blocks: so many ``[B, D]``."""
        heads = self.heads[0]
        read = torch.cat([hidden, heads.shared[1](root).to(hidden.dtype)], -1)
        added = (
            F.linear(read, self.start[: count * hidden.shape[-1]]).unflatten(1, (count, -1)) + heads.path_bias[:count]
        )
        return added.unbind(1)

    def after(self, k: int, hidden: torch.Tensor, near: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, P, V']`` of head k below paths ``[B, P, k + 1]``; ``near`` is its part of :meth:`near`."""
        total = near.unsqueeze(1).float().expand(-1, path.shape[1], -1)
        places = self.heads[0].places(path[..., 1:])
        for j in range(k):
            total = total + getattr(self, f"table{k}")[j][places[..., j]].float()
        x = hidden.unsqueeze(1) + F.silu(total).to(hidden.dtype)
        return F.linear(x, self.project[k])
