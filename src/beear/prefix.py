"""The tokens that every prompt of a batch starts with (a template's system turn), run once and not once per row.

Exact up to rounding, gradients included: the keys and values of the shared tokens are those of one
row, handed to all. Half of a short chat's prompt is its template's system turn.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beear.chat import Batch
from beear.perturbation import NOWHERE

LEAST = 4
"""Fewer shared tokens than this are not worth a second pass."""


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of every row, as a key-value cache of one row. It serves any number of passes."""

    length: int
    cache: Any


def shared_length(batch: Batch) -> int:
    """How many tokens all prompts start with, none of them perturbed, at least one token left in each; or 0."""
    rows, width = len(batch.input_ids), batch.width
    if rows < 2:
        return 0
    first = batch.attention_mask.argmax(1, keepdim=True)
    shortest = width - int(first.max())
    columns = first + torch.arange(shortest, device=first.device)
    ids, where = batch.input_ids.gather(1, columns), batch.where.gather(1, columns)
    same = ((ids == ids[:1]) & (where == NOWHERE)).all(0)
    length = min(int(same.long().cumprod(0).sum()), shortest - 1)
    return length if length >= LEAST else 0


def beyond_window(model: Any, batch: Batch, more: int) -> bool:
    """Whether some block's window is shorter than the batch, and `more` columns behind it.

    A window counts columns. Behind a shared start a shorter row's tokens stand farther from it than they are.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    return batch.input_ids.shape[1] + more > min(filter(None, windows), default=math.inf)


def counts_columns(model: Any) -> bool:
    """Whether the model tells positions by columns alone: a shared start leaves a gap in those of shorter rows."""
    return "position_ids" not in inspect.signature(model.get_decoder().forward).parameters


def run_prefix(model: Any, batch: Batch, more: int = 0) -> Prefix | None:
    """Run what the rows share. Call it outside of a Perturbation, whose positions are those of the whole batch.

    `more`: so many tokens will be generated behind the batch.
    """
    length = 0 if counts_columns(model) or beyond_window(model, batch, more) else shared_length(batch)
    if length == 0:
        return None
    start = int(batch.attention_mask[0].argmax())
    ids = batch.input_ids[:1, start : start + length]
    cache = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values  # without the output head
    return Prefix(length, cache)


def inputs_behind(batch: Batch, prefix: Prefix | None) -> dict[str, Any]:
    """What the model's forward pass takes for all columns behind the prefix, if there is one."""
    if prefix is None:
        return batch.inputs() | {"use_cache": False}
    return {
        "input_ids": batch.input_ids[:, prefix.length :],
        "attention_mask": mask_behind(batch, prefix),
        "position_ids": batch.position_ids[:, prefix.length :],
        "past_key_values": repeated(prefix, len(batch.input_ids)),
        "use_cache": True,
    }


def mask_behind(batch: Batch, prefix: Prefix) -> Tensor:
    """The attention mask of all columns, of which the first `length` are the prefix.

    Prompts are padded on the left, so the longest row's prefix ends at column `length`; in shorter rows
    some tokens of the prefix lie behind that column, where they become padding.
    """
    behind: Tensor = batch.attention_mask * (batch.position_ids >= prefix.length)
    seen = behind.new_ones(len(behind), prefix.length)
    return torch.cat([seen, behind[:, prefix.length :]], 1)


def tokens_behind(batch: Batch, prefix: Prefix | None) -> Tensor:
    """Which of the columns behind the prefix, if there is one, hold a row's own tokens: (rows, columns) of bool."""
    mask = batch.attention_mask if prefix is None else mask_behind(batch, prefix)[:, prefix.length :]
    return mask.bool()


def repeated(prefix: Prefix, rows: int) -> Any:
    """The prefix's keys and values for so many rows."""
    return own_cache(prefix.cache, lambda tensor: tensor.expand(rows, *tensor.shape[1:]))  # a pass copies what it reads


def own_cache(cache: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A key-value cache with a list of its own, holding `change` of the tensors: a pass appends to its cache."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in own.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return own
