"""Choosing a token other than greedily: temperature, top-k, top-p.

The same choice serves plain decoding and decoding with heads. Speculative sampling accepts a draft token with the
probability min(1, p / q) and otherwise draws from what p has left (Leviathan et al., arXiv 2211.17192). The tokens of
a tree are fixed, not drawn, so q is 1 there. Then the rule is simply: draw the token from p, and keep a draft token
where it is the one that was drawn. Every emitted token is distributed as p.
"""

import math
import zlib
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from medusa_nb.errors import InputError


class Sampler:
    """Draws token ids from logits ``[..., V]``: ``[...]``.

    Args:
        temperature: above 0; 1 leaves the distribution as it is.
        top_k: only the k most probable tokens; 0 for all.
        top_p: only the most probable tokens that together reach this probability; 1 for all.
        seed: of the numbers drawn; torch's global generator by default.
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None):
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature={temperature}; choose a number above 0, or decode greedily")
        if top_k < 0 or not 0 < top_p <= 1:
            raise InputError(f"top_k={top_k}, top_p={top_p}; top_k is 0 or more, top_p above 0 and at most 1")
        self.filters = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What is drawn from: the filtered and renormalised distribution ``[..., V]``, in fp32."""
        rows: Any = logits.float().flatten(0, -2)
        none: Any = None  # the filters do not look at the text
        return self.filters(none, rows).softmax(-1).view(logits.shape)

    def numbers(self, shape: torch.Size) -> torch.Tensor:
        """Uniform random numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        probabilities = self.probabilities(logits)
        if not torch.isfinite(probabilities).all():
            raise InputError(
                "there is no distribution to draw from: the logits are not finite; load the model in float32"
            )
        cumulative = probabilities.double().cumsum(-1)
        drawn = self.numbers(logits.shape[:-1]).to(logits.device).double().unsqueeze(-1) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, drawn, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


class RowSampler(Sampler):
    """A sampler whose rows are different texts, each with its own stream of random numbers.

    What a text says then depends on its own seed only, not on the texts it is batched with.
    ``streams`` holds a generator for each row of the next logits ``[B, ..., V]``.
    """

    streams: list[torch.Generator]

    def numbers(self, shape: torch.Size) -> torch.Tensor:
        return torch.stack([torch.rand(shape[1:], generator=stream) for stream in self.streams])


def stream(*parts) -> torch.Generator:
    """A stream of random numbers that depends on ``parts`` (numbers or words) only."""
    return torch.Generator().manual_seed(zlib.crc32(":".join(map(str, parts)).encode()))
