"""A key-value buffer whose rejected rows can be removed.

Guesses are written behind the accepted text; after verification the rows of the accepted path move
together and the rest is forgotten. It plugs into transformers' own ``Cache``, so no model changes.
"""

from functools import partial

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class BufferLayer(CacheLayerMixin):
    """Keys and values of one layer in a buffer ``[B, heads, capacity, head_dim]``, ``length`` rows used."""

    is_compileable = False
    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states, value_states):
        batch, heads, _, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the new rows behind the used ones; return all used rows, without copying them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, start: int, rows: torch.Tensor | None, count: int) -> None:
        """After ``start``, keep ``rows`` (numbers from ``start``; None: the first ``count``)."""
        end = start + count
        if rows is not None:
            self.keys[:, :, start:end] = self.keys[:, :, start + rows]
            self.values[:, :, start:end] = self.values[:, :, start + rows]
        self.length = end

    def select_rows(self, order: torch.Tensor) -> None:
        """Make row i of the batch what row ``order[i]`` was; only rows that move are copied."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        if len(moved):
            for buffer in (self.keys, self.values):
                buffer[moved, :, : self.length] = buffer[order[moved], :, : self.length]
        self.keys, self.values = self.keys[: len(order)], self.values[: len(order)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class BufferCache(Cache):
    """A ``transformers.Cache`` of :class:`BufferLayer`, with room for ``capacity`` tokens."""

    def __init__(self, capacity: int):
        super().__init__(layer_class_to_replicate=partial(BufferLayer, capacity))

    def keep(self, start: int, path: list[int]) -> None:
        """Of the rows written since ``start``, keep those of ``path``, in its order."""
        contiguous = path == list(range(len(path)))
        rows = None if contiguous else torch.tensor(path, device=self.layers[0].device)
        for layer in self.layers:
            layer.keep(start, rows, len(path))

    def select_rows(self, order: torch.Tensor) -> None:
        """Keep the rows of the batch that ``order`` numbers, in its order."""
        for layer in self.layers:
            layer.select_rows(order)
