"""A key-value buffer with one slot per text, whose rejected rows can be removed.

Guesses are written behind the accepted text; after verification the rows of the accepted path move
together and whatever stands behind them is overwritten later. Every text has its own length, so several
texts can grow side by side at their own pace. It plugs into transformers' own ``Cache``: no model changes.
"""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Place:
    """Where the next keys and values go, and what attention reads; the same for all layers.

    ``rows`` ``[B * T]`` are row numbers of the flattened slots; ``span`` is how many rows of each of the
    first ``texts`` slots are read.
    """

    slots: int
    capacity: int
    rows: torch.Tensor | None = None
    texts: int = 0
    span: int = 0

    @property
    def size(self) -> int:
        """How many rows all slots have together."""
        return self.slots * self.capacity


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: for each the buffer ``[rows, heads, head_dim]`` and where its block starts."""

    is_compileable = False  # we compile the step ourselves; transformers need not prepare for it
    is_sliding = False

    def __init__(self, place: Place, keys: tuple[torch.Tensor, int], values: tuple[torch.Tensor, int]):
        super().__init__()
        self.place, self.blocks = place, (keys, values)
        self.dtype, self.device, self.is_initialized = keys[0].dtype, keys[0].device, True

    def lazy_initialization(self, key_states, value_states):
        """Nothing is left to do: the cache made the buffers."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Write ``[B, heads, T, head_dim]`` at the current place; return what attention reads."""
        for (buffer, first), states in zip(self.blocks, (key_states, value_states), strict=True):
            buffer.index_copy_(0, first + self.place.rows, states.transpose(1, 2).flatten(0, 1))
        return tuple(self._read(buffer[first : first + self.place.size]) for buffer, first in self.blocks)

    def fill(self, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write one text's ``[heads, T, head_dim]`` into the T rows from ``start`` on."""
        for (buffer, first), states in zip(self.blocks, (key_states, value_states), strict=True):
            buffer[first + start : first + start + states.shape[1]] = states.transpose(0, 1)

    def _read(self, block: torch.Tensor) -> torch.Tensor:
        slots = block.unflatten(0, (self.place.slots, self.place.capacity))
        return slots[: self.place.texts, : self.place.span].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.place.capacity


class SlotCache(Cache):
    """A ``transformers.Cache`` for ``slots`` texts of at most ``capacity`` tokens each.

    What all layers keep in the same shape lies in one buffer, block by block, so that accepted rows of all layers
    move at once.
    """

    def __init__(self, slots: int, capacity: int):
        self.place, self.buffers = Place(slots, capacity), []
        super().__init__(layers=[])

    def write_at(self, slots: torch.Tensor, starts: torch.Tensor, count: int, span: int) -> None:
        """Let the next pass write ``count`` rows from ``starts`` ``[B]`` in ``slots`` ``[B]`` and read ``span``."""
        rows = self.rows(slots, starts, torch.arange(count, device=starts.device))
        self.place.rows, self.place.texts, self.place.span = rows.flatten(), len(slots), span

    def rows(self, slots: torch.Tensor, starts: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` numbers of rows in a block: ``starts`` ``[B]`` plus ``offsets`` ``[T]`` or ``[B, T]``."""
        return (slots * self.place.capacity + starts).unsqueeze(1) + offsets

    def fill(self, slots: list[int], read: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start texts in ``slots`` with each layer's keys and values ``[B, heads, T, head_dim]`` of their prompts."""
        if not self.layers:
            self._make_layers(read)
        for layer, (key_states, value_states) in zip(self.layers, read, strict=True):
            for line, slot in enumerate(slots):
                layer.fill(slot * self.place.capacity, key_states[line], value_states[line])

    def _make_layers(self, like: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """A block for each layer's keys and for its values, in one buffer for each shape ``[heads, head_dim]``."""
        shapes = [(states.shape[1], states.shape[3]) for pair in like for states in pair]
        # zeros, because a masked row still takes part in the arithmetic and must not be NaN
        buffers = {
            shape: like[0][0].new_zeros(shapes.count(shape) * self.place.size, *shape)
            for shape in dict.fromkeys(shapes)
        }
        blocks = [(buffers[s], shapes[:i].count(s) * self.place.size) for i, s in enumerate(shapes)]
        self.layers = [SlotLayer(self.place, *pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
        self.buffers = list(buffers.values())

    def keep(self, slots: torch.Tensor, starts: torch.Tensor, path: torch.Tensor) -> None:
        """Of the rows written from ``starts`` on, move those of ``path`` ``[B, P]`` together, in its order."""
        target = self.rows(slots, starts, torch.arange(path.shape[1], device=path.device))
        self._move(self.rows(slots, starts, path).flatten(), target.flatten())

    def move_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` rows of one slot to another."""
        offsets = torch.arange(length, device=self.buffers[0].device)
        self._move(offsets + source * self.place.capacity, offsets + target * self.place.capacity)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy rows ``source`` of every block to its rows ``target``."""
        for buffer in self.buffers:
            first = torch.arange(0, len(buffer), self.place.size, device=buffer.device).unsqueeze(1)
            buffer.index_copy_(0, (first + target).flatten(), buffer[(first + source).flatten()])
