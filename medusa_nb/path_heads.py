"""Heads that see the path: the tokens between the hidden state and the one they predict.

A plain head must predict token t+k+2 without knowing t+1 … t+k+1. But when it drafts, these are known: the first is
the base model's own, the others were drafted by the heads before it. So head k reads their embeddings, too (Hydra,
Ankner et al., arXiv 2402.05109, section 3)::

    z = x + SiLU(W_k [x, e(t+1), …, e(t+k+1)] + b_k)        logits = P z

And the heads only draft tokens of a *draft vocabulary*, those that the model says most often (FR-Spec, arXiv
2502.14856): P has V' rows instead of V. A rare token is then never drafted; the base model still says it itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

from medusa_nb.heads import Heads


class PathHeads(Heads):
    """K heads that see the path, with one projection for all of them. No server's format holds them.

    Args:
        model, num_heads, vocabulary: see :class:`~medusa_nb.heads.Heads`.
    """

    def __init__(self, model, num_heads: int = 4, vocabulary: torch.Tensor | None = None):
        super().__init__(model, num_heads, vocabulary)
        like, seen = self.lm_head.weight.detach(), model.get_input_embeddings().weight.shape[1]
        hidden = like.shape[1]
        widths = [hidden + (k + 1) * seen for k in range(num_heads)]
        self.weight = nn.ParameterList([like.new_zeros(hidden, width) for width in widths])
        self.bias = nn.Parameter(like.new_zeros(num_heads, hidden))
        self.projection = nn.Parameter(like.clone() if self.vocabulary is None else like[self.vocabulary])

    def embed(self, path: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids, side by side: ``[..., n] -> [..., n * E]``."""
        return self.base[0].get_input_embeddings()(path).to(self.bias.dtype).flatten(-2)

    def head(self, k: int, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits of head k from states and embeddings: ``[..., D], [..., (k + 1) * E] -> [..., V']``."""
        block = F.linear(torch.cat([x, seen], -1), self.weight[k], self.bias[k])
        return F.linear(x + F.silu(block), self.projection)

    def forward(self, hidden: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Logits ``[K, ..., V']`` from states ``[..., D]`` and the tokens ``[..., K]`` that follow them."""
        return torch.stack([self.head(k, hidden, self.embed(path[..., : k + 1])) for k in range(self.num_heads)])

    def start(self, hidden: torch.Tensor, count: int, width: int) -> tuple[torch.Tensor, int]:
        return hidden, width

    def draft(self, k: int, started, paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, width = started
        x = hidden.unsqueeze(1).expand(-1, paths.shape[1], -1)
        return self.best(self.head(k, x, self.embed(paths)), width)

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {"projection": self.projection}
        if self.vocabulary is not None:
            tensors["vocabulary"] = self.vocabulary
        for k in range(self.num_heads):
            tensors |= {f"{k}.path.weight": self.weight[k], f"{k}.path.bias": self.bias[k]}
        return tensors

    def config(self) -> dict:
        # a key that no server knows, so that none takes these heads for plain ones
        return super().config() | dict(sees_path=True, draft_vocabulary_size=self.num_choices)
