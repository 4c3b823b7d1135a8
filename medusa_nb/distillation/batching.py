"""Continuous batching: many prompts through one batch that is always full.

A sequence that ends leaves its slot at once and the next prompt takes it, so no pass works for a finished sequence or
waits for the longest one.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from medusa_nb.drafting import State, StaticTree
from medusa_nb.sampling import RowSampler, stream
from medusa_nb.verification import Verifier, greedy


@dataclass
class Request:
    """A prompt on its way: ``tokens`` are its answer so far, without the ``end`` token; ``about`` is the caller's.

    ``states`` are the hidden states ``[D]`` that each token (the end token, too) was predicted from, if they are kept.
    """

    about: Any
    prompt: list[int]
    max_new_tokens: int
    seed: str = ""
    tokens: list[int] = field(default_factory=list)
    end: int | None = None
    states: list[torch.Tensor] = field(default_factory=list)

    def take(self, token: int, ends: set[int]) -> bool:
        """Add a token; say whether the answer goes on."""
        if token in ends:
            self.end = token
        else:
            self.tokens.append(token)
        return self.end is None and len(self.tokens) < self.max_new_tokens


@torch.no_grad()
def answer_all(
    model,
    waiting: deque[Request],
    slots: int,
    capacity: int,
    eos: list[int],
    temperature: float = 0.0,
    keep_states: bool = False,
) -> Iterator[Request]:
    """Yield requests as they finish. The caller may append more of them to ``waiting`` meanwhile.

    Args:
        slots: how many sequences are decoded at once.
        capacity: room for the longest prompt and its answer.
        temperature: 0 is greedy.
        keep_states: keep the hidden states, see :class:`Request`.
    """
    sampler = RowSampler(temperature) if temperature else None
    verifier = Verifier(model, slots, capacity, sampler or greedy)
    draft = StaticTree(None, device=verifier.device)
    ends = set(eos)
    few = max(1, slots // 8)  # so many prompts are read together, padded to the longest of them
    active: list[Request] = []
    streams: list[torch.Generator] = []
    state: State | None = None
    while active or waiting:
        free = slots - len(active)
        if state is None or waiting and free >= few:
            new = [waiting.popleft() for _ in range(min(free, few, len(waiting)))]
            fresh = [stream(request.seed) for request in new]
            if sampler:
                sampler.streams = fresh
            into = list(range(len(active), len(active) + len(new)))
            read = verifier.read_prompts([torch.tensor(request.prompt) for request in new], into)
            first = len(active)
            state = read if state is None else State(*map(torch.cat, zip(state[:3], read[:3], strict=True)))
            active, streams = active + new, streams + fresh
        else:
            if sampler:
                sampler.streams = streams
            longest = max(len(request.prompt) + len(request.tokens) for request in active)
            said, hidden = verifier.verify(draft(state), state.lengths, span=longest)
            state, first = State(said[:, 0], hidden[:, 0], state.lengths + 1), 0
        tokens = state.token.tolist()[first:]
        if keep_states:
            for request, hidden in zip(active[first:], state.hidden[first:].cpu(), strict=True):
                request.states.append(hidden)
        going = [True] * first + [r.take(token, ends) for r, token in zip(active[first:], tokens, strict=True)]
        if not all(going):
            yield from (request for request, on in zip(active, going, strict=True) if not on)
            order = close_gaps(going)
            for target, source in enumerate(order):
                if target != source:
                    request = active[source]
                    verifier.cache.move_slot(source, target, len(request.prompt) + len(request.tokens))
            active, streams = [active[i] for i in order], [streams[i] for i in order]
            state = State(*(x[order] for x in state[:3])) if order else None


def close_gaps(going: list[bool]) -> list[int]:
    """Numbers of the slots that go on, the last ones moved into the places of those that ended."""
    count = sum(going)
    late = [i for i in range(count, len(going)) if going[i]]
    return [i if going[i] else late.pop(0) for i in range(count)]
