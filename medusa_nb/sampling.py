"""Choosing a token other than greedily: temperature, top-k, top-p.

The same choice serves plain decoding and decoding with heads. Speculative sampling accepts a guess with
the probability min(1, p / q) and otherwise draws from what p has left (Leviathan et al., arXiv 2211.17192).
Guesses of a tree are fixed, not drawn, so q is 1 at a guess: drawing the token from p and keeping a guess
where it is that token is the same rule, and every emitted token is distributed as p.
"""

import zlib

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
        if not temperature > 0:
            raise InputError(f"temperature={temperature}; choose one above 0, or decode greedily")
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
        rows = logits.float().flatten(0, -2)
        return self.filters(None, rows).softmax(-1).view(logits.shape)

    def numbers(self, shape: torch.Size) -> torch.Tensor:
        """Uniform random numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        cumulative = self.probabilities(logits).double().cumsum(-1)
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


class TypicalAcceptance:
    """Accept guesses the base model finds probable enough. **Not lossless**: the text's distribution changes.

    A guess is kept if its probability is above ``min(epsilon, delta * exp(-entropy))``: where the model itself
    is undecided, more passes (Cai et al., arXiv 2401.10774, section 2.3.1). Pass it as ``accept``, with a
    :class:`Sampler` as ``choose``.
    """

    def __init__(self, sampler: Sampler, epsilon: float = 0.09, delta: float = 0.3):
        self.sampler, self.epsilon, self.delta = sampler, epsilon, delta

    def __call__(self, logits: torch.Tensor, said: torch.Tensor, candidates) -> torch.Tensor:
        p = self.sampler.probabilities(logits)  # [B, N, V]
        entropy = torch.special.entr(p).sum(-1)
        bound = torch.minimum(torch.tensor(self.epsilon, device=p.device), self.delta * torch.exp(-entropy))
        above = candidates.parents.unsqueeze(2).expand(-1, -1, p.shape[2])
        own = p.gather(1, above).gather(2, candidates.tokens.unsqueeze(2))[..., 0]
        return own > bound.gather(1, candidates.parents)


def stream(*parts) -> torch.Generator:
    """A stream of random numbers that depends on ``parts`` (numbers or words) only."""
    return torch.Generator().manual_seed(zlib.crc32(":".join(map(str, parts)).encode()))
