"""Keys and values of replies in buffers with room for all tokens to come, so that none is copied for each new one.

transformers appends to a cache by copying all of it, and under autocast attention casts all of it once more: half of
the time of a reply. Same numbers, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class BufferedLayer(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values, (rows, heads, columns so far, d_head) each, the first columns of its buffers.

    They are kept as attention takes them: under autocast in its dtype. Only appending is meant: nothing may reorder or
    reset them.
    """

    def __init__(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """Begin with these, and have room for so many `columns`, these included."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = [_buffer(tensor, columns) for tensor in (keys, values)]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all so far."""
        first, new = self.get_seq_length(), key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.narrow(-2, first, new).copy_(states)  # raises where no room is left
        self.keys, self.values = (buffer.narrow(-2, 0, first + new) for buffer in self.buffers)
        return self.keys, self.values


def buffered(cache: DynamicCache, columns: int) -> DynamicCache:
    """The cache, in place, with room for `columns`.

    Layers that drop columns behind a window stay as they are, and so do those whose keys and values differ in shape:
    these may be what multi-head latent attention projects in every pass, which takes long from a part of a buffer.
    """
    cache.layers = [
        BufferedLayer(layer.keys, layer.values, columns)
        if type(layer) is DynamicLayer and layer.keys.shape == layer.values.shape
        else layer
        for layer in cache.layers
    ]
    return cache


def _buffer(like: Tensor, columns: int) -> Tensor:
    """Room for so many columns, in the dtype that attention casts to."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return like.new_empty(*like.shape[:-2], columns, like.shape[-1], dtype=dtype)
