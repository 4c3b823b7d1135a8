"""Path blocks taken apart, so that a decoding step has less to multiply.

A linear layer that reads several vectors is the sum of one layer for each: ``W [x, e0, e1] = A x + B e0 + C e1``. What
the state and the root add is the same below every path and computed for all heads at once. What a guess adds depends
on nothing but its token, and of a draft vocabulary there are few: K (K - 1) / 2 tables ``[V', D]`` hold it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from medusa_nb.heads import MedusaHeads


class PathTables(nn.Module):
    """The path blocks of trained heads with a draft vocabulary, in parts.

    Heads must have no block before the one that reads the path; weights that change later are not noticed.
    """

    def __init__(self, heads: MedusaHeads):
        super().__init__()
        wide, embedding = heads.weight.shape[-1], heads.shared[1].weight.detach()
        near = wide + embedding.shape[1]  # the columns that read the state and the root
        words = embedding[heads.vocabulary].to(heads.weight.dtype)
        self.heads = (heads,)  # in a tuple: their weights are not this module's
        self.register_buffer("weight", torch.cat([weight.detach()[:, :near] for weight in heads.path_weight]))
        for k, weight in enumerate(heads.path_weight):
            parts = weight.detach()[:, near:].split(embedding.shape[1], dim=1)
            self.register_buffer(f"table{k}", torch.stack([F.linear(words, part) for part in parts]) if k else None)

    @classmethod
    def of(cls, heads: MedusaHeads) -> "PathTables | None":
        """The tables of these heads, None if they are of another kind."""
        fits = heads.sees_path and heads.vocabulary is not None and not heads.num_layers
        return cls(heads) if fits else None

    def near(self, hidden: torch.Tensor, root: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """What states ``[B, D]`` and roots ``[B]`` add to the first ``count`` heads' blocks: so many ``[B, D]``."""
        heads = self.heads[0]
        read = torch.cat([hidden, heads.shared[1](root).to(hidden.dtype)], -1)
        rows = count * hidden.shape[-1]
        return F.linear(read, self.weight[:rows], heads.path_bias[:count].flatten()).unflatten(1, (count, -1)).unbind(1)

    def after(self, k: int, hidden: torch.Tensor, near: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, P, V']`` of head k below paths ``[B, P, k + 1]``; ``near`` is its part of :meth:`near`."""
        heads, total = self.heads[0], near.unsqueeze(1).float().expand(-1, path.shape[1], -1)
        places = heads.places(path[..., 1:])
        for j in range(k):
            total = total + getattr(self, f"table{k}")[j][places[..., j]].float()
        x = hidden.unsqueeze(1) + F.silu(total).to(hidden.dtype)
        return heads.project(x.flatten(0, 1).unsqueeze(0), k).view(*x.shape[:2], -1)
