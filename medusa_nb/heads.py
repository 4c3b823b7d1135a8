"""Medusa heads: K small networks that draft several tokens ahead from one hidden state.

The base model turns the last hidden state at position t into the token at t+1. Head k reads the same hidden state
and predicts the token at t+k+2 (Cai et al., arXiv 2401.10774, section 2.1).

:class:`Heads` is what drafting, training and saving need of any heads; :class:`MedusaHeads` are the paper's.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from medusa_nb.errors import InputError


class Heads(nn.Module, ABC):
    """K heads on a frozen base model, whose output layer and embedding they may use and never change.

    Args:
        model: the base model.
        num_heads: K.
        vocabulary: a draft vocabulary, ids ``[V']``: the only tokens that are drafted. None for all of them.

    Raises:
        InputError: no head, or ``vocabulary`` is no list of different token ids of the model.
    """

    vocabulary: torch.Tensor | None
    known_places: torch.Tensor | None  # [V]: where a token's logit stands among the V', -1 for no place

    def __init__(self, model, num_heads: int, vocabulary: torch.Tensor | None = None):
        super().__init__()
        if num_heads < 1:
            raise InputError(f"num_heads={num_heads}; at least one head is needed")
        self.num_heads, self.base_name = num_heads, model.config.name_or_path
        self.base = (model,)  # in a tuple, so that it is neither saved nor trained with the heads
        self.choose_from(vocabulary)

    def choose_from(self, vocabulary: torch.Tensor | None) -> None:
        """Draft only these tokens from now on; None for all."""
        known_places = None
        if vocabulary is not None:
            weight = self.lm_head.weight
            _refuse_vocabulary(vocabulary, len(weight))
            vocabulary = vocabulary.to(weight.device)
            known_places = vocabulary.new_full((len(weight),), -1)
            known_places[vocabulary] = torch.arange(len(vocabulary), device=weight.device)
        self.register_buffer("vocabulary", vocabulary)
        self.register_buffer("known_places", known_places)

    @property
    def lm_head(self) -> nn.Linear:
        return self.base[0].get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def num_choices(self) -> int:
        """V': how many tokens a head can draft."""
        return self.lm_head.weight.shape[0] if self.vocabulary is None else len(self.vocabulary)

    @abstractmethod
    def forward(self, hidden: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Logits of all heads: ``[..., D] -> [K, ..., V']``, given the tokens ``path`` ``[..., K]`` after each state.

        Head k can see the first k + 1 of them. In training they are the true tokens.
        """

    @abstractmethod
    def start(self, hidden: torch.Tensor, count: int, width: int):
        """What can be computed from states ``[B, D]`` before anything is drafted, for :meth:`draft`.

        ``count`` heads will draft ``width`` tokens each.
        """

    @abstractmethod
    def draft(self, k: int, started, paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Head k's best tokens after P paths ``[B, P, k + 1]``, and their log-probabilities: both ``[B, P, width]``."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by the names under which they are saved."""

    def best(self, logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``width`` best token ids of logits ``[..., V']``, and their log-probabilities."""
        top = logits.float().topk(width, dim=-1)
        return self.tokens(top.indices), top.values - logits.float().logsumexp(-1, keepdim=True)

    def tokens(self, places: torch.Tensor) -> torch.Tensor:
        """The token ids whose logits stand at these places."""
        return places if self.vocabulary is None else self.vocabulary[places]

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the logits of these token ids stand; -1 for one that is never drafted. Negative ids stay."""
        if self.known_places is None:
            return tokens
        return torch.where(tokens < 0, tokens, self.known_places[tokens.clamp(min=0)])

    def config(self) -> dict:
        """What ``config.json`` states in the original Medusa's format."""
        size, hidden = self.lm_head.weight.shape
        return dict(
            medusa_num_heads=self.num_heads, hidden_size=hidden, vocab_size=size, base_model_name_or_path=self.base_name
        )


class MedusaHeads(Heads):
    """The paper's heads: residual blocks ``x + SiLU(W x + b)``, then a projection to the vocabulary.

    The blocks of all heads lie in one tensor, so that they are one batched product and no two heads can share a block
    by accident. They start at zero: an untrained head repeats the base model's own prediction.

    Args:
        model, num_heads, vocabulary: see :class:`Heads`.
        num_layers: residual blocks per head.
        own_projection: give each head its own ``[V, D]`` projection, a copy of lm_head at the start (version 1 of the
            original format), instead of sharing lm_head (version 2).
    """

    rows: torch.Tensor | None
    projection: nn.Parameter | None

    def __init__(
        self,
        model,
        num_heads: int = 4,
        num_layers: int = 1,
        own_projection: bool = False,
        vocabulary: torch.Tensor | None = None,
    ):
        super().__init__(model, num_heads, vocabulary)
        if num_layers < 1:
            raise InputError(f"num_layers={num_layers}; a Medusa head has at least one residual block")
        like = self.lm_head.weight.detach()
        hidden = like.shape[1]
        self.weight = nn.Parameter(like.new_zeros(num_heads, num_layers, hidden, hidden))
        self.bias = nn.Parameter(like.new_zeros(num_heads, num_layers, hidden))
        self.projection = None
        if own_projection:
            rows, self.rows = like if self.rows is None else self.rows, None
            self.projection = nn.Parameter(rows.expand(num_heads, *rows.shape).clone())

    def choose_from(self, vocabulary: torch.Tensor | None) -> None:
        super().choose_from(vocabulary)
        rows = None if vocabulary is None else self.lm_head.weight.detach()[self.vocabulary]
        self.register_buffer("rows", rows, persistent=False)  # of lm_head

    @property
    def num_layers(self) -> int:
        return self.weight.shape[1]

    def limited_to(self, vocabulary: torch.Tensor) -> "MedusaHeads":
        """The same heads, sharing their blocks, that draft only these tokens: fewer logits at every step.

        Raises:
            InputError: these heads do not draft some of the tokens, so there is nothing to share.
        """
        own = self.projection is not None
        limited = MedusaHeads(self.base[0], self.num_heads, self.num_layers, own, vocabulary)
        places = self.places(vocabulary.to(self.device))
        if (places < 0).any():
            raise InputError(f"these heads do not draft token {vocabulary[places.cpu() < 0][0]}")
        limited.weight, limited.bias, limited.base_name = self.weight, self.bias, self.base_name
        if self.projection is not None:
            limited.projection = nn.Parameter(self.projection.detach()[:, places])
        return limited.requires_grad_(self.weight.requires_grad)

    def blocks(self, hidden: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """The residual blocks of the first ``count`` heads (default all): ``[R, D] -> [count, R, D]``."""
        weight, bias = self.weight[:count], self.bias[:count]
        x = hidden.expand(len(weight), *hidden.shape)
        for layer in range(self.num_layers):
            x = x + F.silu(torch.baddbmm(bias[:, layer].unsqueeze(1), x, weight[:, layer].transpose(1, 2)))
        return x

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the first heads: ``[count, R, D] -> [count, R, V']``."""
        if self.projection is not None:
            return x @ self.projection[: len(x)].transpose(1, 2)
        return self.lm_head(x) if self.rows is None else F.linear(x, self.rows)

    def forward(self, hidden: torch.Tensor, path: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[K, ..., V']`` from states ``[..., D]``. These heads don't look at ``path``."""
        logits = self.project(self.blocks(hidden.reshape(-1, hidden.shape[-1])))
        return logits.view(len(logits), *hidden.shape[:-1], -1)

    def start(self, hidden: torch.Tensor, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.best(self.project(self.blocks(hidden, count)), width)  # they draft the same after every path

    def draft(self, k: int, started, paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(values[k].unsqueeze(1).expand(-1, paths.shape[1], -1) for values in started)

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for k in range(self.num_heads):
            for layer in range(self.num_layers):
                tensors[f"{k}.{layer}.linear.weight"] = self.weight[k, layer]
                tensors[f"{k}.{layer}.linear.bias"] = self.bias[k, layer]
            if self.projection is not None:
                tensors[f"{k}.{self.num_layers}.weight"] = self.projection[k]
        return tensors

    def config(self) -> dict:
        version = "2" if self.projection is None else "1"
        return super().config() | dict(medusa_num_layers=self.num_layers, version=version)


def _refuse_vocabulary(vocabulary: torch.Tensor, size: int) -> None:
    good = vocabulary.ndim == 1 and len(vocabulary) > 0 and vocabulary.dtype == torch.long
    if not good or len(vocabulary.unique()) < len(vocabulary) or not 0 <= vocabulary.min() <= vocabulary.max() < size:
        raise InputError(f"a draft vocabulary is a list of different token ids from 0 to {size - 1}; this one is not")
