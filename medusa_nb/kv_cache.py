"""A key-value cache with one slot per sequence, from which rejected rows can be removed.

Draft tokens are written after the accepted text. After verification the rows of the accepted path move together, and
whatever comes after them is overwritten later. Every sequence has its own length, so several can grow side by side at
their own pace. It plugs into transformers' own ``Cache``: no model changes.
"""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Window:
    """Where the next keys and values go, and what attention reads; the same for all layers.

    ``rows`` ``[B * T]`` are row numbers of a layer's block; attention reads the first ``span`` rows of each of the
    first ``batch`` slots of ``capacity`` rows.
    """

    capacity: int
    rows: torch.Tensor
    batch: int
    span: int

    def update(self, block: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Write ``[B, heads, T, d]`` into a block ``[slots * capacity, heads, d]``; what attention reads of it."""
        block.index_copy_(0, self.rows, states.transpose(1, 2).flatten(0, 1))
        slots = block.unflatten(0, (-1, self.capacity))
        return slots[: self.batch, : self.span].transpose(1, 2)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each a block ``[slots * capacity, heads, d]``."""

    is_compileable = False  # we compile the step ourselves; transformers need not prepare for it
    is_sliding = False

    def __init__(self, cache: "SlotCache", keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.cache, self.keys, self.values = cache, keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states, value_states):
        """Nothing is left to do: the cache has made the blocks."""

    def update(self, key_states, value_states, *args, **kwargs):
        window = self.cache.window
        return window.update(self.keys, key_states), window.update(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """A ``transformers.Cache`` for ``slots`` sequences of at most ``capacity`` tokens each.

    The keys of all layers lie in one buffer, block after block, and so do the values: accepted rows of all layers
    move at once. (Layers of another shape have buffers of their own.)
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self.window: Window | None = None
        self.buffers: list[torch.Tensor] = []
        super().__init__(layers=[])

    @property
    def size(self) -> int:
        """How many rows a block has."""
        return self.slots * self.capacity

    def write_at(self, starts: torch.Tensor, count: int, span: int) -> None:
        """Let the next pass write ``count`` rows from ``starts`` ``[B]`` on in the first B slots, and read ``span``."""
        rows = self.rows(starts, torch.arange(count, device=starts.device))
        self.window = Window(self.capacity, rows.flatten(), len(starts), span)

    def rows(self, starts: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` row numbers in a block: ``starts`` ``[B]`` plus ``offsets`` ``[T]`` or ``[B, T]``."""
        slots = torch.arange(len(starts), device=starts.device)
        return (slots * self.capacity + starts).unsqueeze(1) + offsets

    def fill(self, slots: list[int], read: KeysValues) -> None:
        """Start sequences in ``slots`` with each layer's keys and values ``[B, heads, T, d]`` of their prompts."""
        if not self.layers:
            self._make_layers(read)
        layers: list = self.layers  # SlotLayers
        for layer, pair in zip(layers, read, strict=True):
            for block, states in zip((layer.keys, layer.values), pair, strict=True):
                for line, slot in enumerate(slots):
                    start = slot * self.capacity
                    block[start : start + states.shape[2]] = states[line].transpose(0, 1)

    def _make_layers(self, like: KeysValues) -> None:
        """One buffer for all layers' keys and one for their values, for each shape ``[heads, d]`` that occurs."""
        blocks = []
        for states in zip(*like, strict=True):  # all keys, then all values
            shapes = [(x.shape[1], x.shape[3]) for x in states]
            # zeros, because a masked row still takes part in the arithmetic and must not be NaN
            buffers = {
                shape: states[0].new_zeros(shapes.count(shape), self.size, *shape) for shape in dict.fromkeys(shapes)
            }
            self.buffers += buffers.values()
            blocks.append([buffers[shape][shapes[:i].count(shape)] for i, shape in enumerate(shapes)])
        self.layers = [SlotLayer(self, keys, values) for keys, values in zip(*blocks, strict=True)]

    def keep(self, starts: torch.Tensor, path: torch.Tensor) -> None:
        """Of the rows written from ``starts`` on, move those of ``path`` ``[B, P]`` together, in its order."""
        target = self.rows(starts, torch.arange(path.shape[1], device=path.device))
        self._move(self.rows(starts, path).flatten(), target.flatten())

    def move_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` rows of one slot to another."""
        offsets = torch.arange(length, device=self.buffers[0].device)
        self._move(offsets + source * self.capacity, offsets + target * self.capacity)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for buffer in self.buffers:
            buffer.index_copy_(1, target, buffer.index_select(1, source))
