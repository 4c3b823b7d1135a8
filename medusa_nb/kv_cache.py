"""A key-value buffer with one slot per text, whose rejected rows can be removed.

Guesses are written behind the accepted text; after verification the rows of the accepted path move
together and whatever stands behind them is overwritten later. Every text has its own length, so several
texts can grow side by side at their own pace. It plugs into transformers' own ``Cache``: no model changes.
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Place:
    """Where the next keys and values go, and what attention reads; the same for all layers.

    ``rows`` ``[B * T]`` are row numbers of the flattened buffer; ``span`` is how many rows of each of the
    first ``texts`` slots are read.
    """

    slots: int
    capacity: int
    rows: torch.Tensor | None = None
    texts: int = 0
    span: int = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[slots * capacity, heads, head_dim]``."""

    is_compileable = False  # we compile the step ourselves; transformers need not prepare for it
    is_sliding = False

    def __init__(self, place: Place):
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states, value_states):
        rows = self.place.slots * self.place.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros, because a masked row still takes part in the arithmetic and must not be NaN
        self.keys = key_states.new_zeros(rows, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write ``[B, heads, T, head_dim]`` at the current place; return what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(0, self.place.rows, key_states.transpose(1, 2).flatten(0, 1))
        self.values.index_copy_(0, self.place.rows, value_states.transpose(1, 2).flatten(0, 1))
        return self._read(self.keys), self._read(self.values)

    def fill(self, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write one text's ``[heads, T, head_dim]`` into the T rows from ``start`` on."""
        if not self.is_initialized:
            self.lazy_initialization(key_states.unsqueeze(0), value_states.unsqueeze(0))
        rows = slice(start, start + key_states.shape[1])
        self.keys[rows], self.values[rows] = key_states.transpose(0, 1), value_states.transpose(0, 1)

    def _read(self, buffer: torch.Tensor) -> torch.Tensor:
        slots = buffer.unflatten(0, (self.place.slots, self.place.capacity))
        return slots[: self.place.texts, : self.place.span].transpose(1, 2)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy rows ``source`` to rows ``target``."""
        self.keys.index_copy_(0, target, self.keys[source])
        self.values.index_copy_(0, target, self.values[source])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.place.capacity


class SlotCache(Cache):
    """A ``transformers.Cache`` for ``slots`` texts of at most ``capacity`` tokens each."""

    def __init__(self, slots: int, capacity: int):
        self.place = Place(slots, capacity)
        super().__init__(layer_class_to_replicate=partial(SlotLayer, self.place))

    def write_at(self, slots: torch.Tensor, starts: torch.Tensor, count: int, span: int) -> None:
        """Let the next pass write ``count`` rows from ``starts`` ``[B]`` in ``slots`` ``[B]`` and read ``span``."""
        rows = self.rows(slots, starts, torch.arange(count, device=starts.device))
        self.place.rows, self.place.texts, self.place.span = rows.flatten(), len(slots), span

    def rows(self, slots: torch.Tensor, starts: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` numbers in the flattened buffer: ``starts`` ``[B]`` plus ``offsets`` ``[T]`` or ``[B, T]``."""
        return (slots * self.place.capacity + starts).unsqueeze(1) + offsets

    def fill(self, slots: list[int], read: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start texts in ``slots`` with each layer's keys and values ``[B, heads, T, head_dim]`` of their prompts."""
        while len(self.layers) < len(read):
            self.layers.append(self.layer_class_to_replicate())
        for layer, (key_states, value_states) in zip(self.layers, read, strict=True):
            for line, slot in enumerate(slots):
                layer.fill(slot * self.place.capacity, key_states[line], value_states[line])

    def keep(self, slots: torch.Tensor, starts: torch.Tensor, path: torch.Tensor) -> None:
        """Of the rows written from ``starts`` on, move those of ``path`` ``[B, P]`` together, in its order."""
        source = self.rows(slots, starts, path).flatten()
        target = self.rows(slots, starts, torch.arange(path.shape[1], device=path.device)).flatten()
        for layer in self.layers:
            layer.move(source, target)

    def move_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` rows of one slot to another."""
        offsets = torch.arange(length, device=self.layers[0].device)
        for layer in self.layers:
            layer.move(offsets + source * self.place.capacity, offsets + target * self.place.capacity)
