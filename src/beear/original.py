"""What the original model makes of the rows that removal trains on: run once, not in every step. Exact up to rounding.

What leaves the last block below the adapter never changes, and neither does what the original's last block gives where
a response is predicted. Both are kept for each row, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from beear.cached import head, watched
from beear.chat import Batch, Row, collate
from beear.events import Listener, progress_to
from beear.parts import Parts
from beear.perturbation import find_layers, states_in, with_states
from beear.precision import autocast
from beear.prefix import inputs_behind, run_prefix, tokens_behind
from beear.training import first_adapted

Key = tuple[tuple[int, ...], int]
"""All tokens of a row, and how many of them are the response's."""

GROUP = 16
"""Rows in a pass: fewer than in a step of removal, and the same at any time, for the same bits in a resumed run."""
MOST = 0.25
"""What leaves the blocks below the adapter is kept if it takes no more than this share of the weights' memory."""


@dataclass(frozen=True)
class States:
    """Of one row. start: (shared tokens, d_model) and rest: (further tokens, d_model) where the adapter begins, both
    empty if they are not kept. last: (response's tokens, d_model) before the head, where these are predicted."""

    start: Tensor
    rest: Tensor
    last: Tensor


@dataclass(frozen=True)
class Original:
    """The states of every row.

    frozen: so many blocks, from the first, need not run again; 0 if their outcome is not kept. block, decoder: what
    these return, without states.
    """

    states: dict[Key, States]
    frozen: int
    block: Any
    decoder: Any

    def below(self, batch: Batch, start: int) -> Any:
        """What block `frozen` returns for the columns of the batch from `start`; its states are zero at padding."""
        rows = []
        for key in keys_of(batch):
            states = self.states[key]
            padding = batch.width - (len(key[0]) - key[1])
            rows.append((torch.cat([states.start, states.rest])[start:], padding))
        return with_states(self.block, padded(rows, batch.input_ids.shape[1] - start))

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """What the original gives for the response tokens: (rows, length, vocabulary)."""
        last = padded([(self.states[key].last, 0) for key in keys_of(batch)], batch.targets.shape[1])
        with torch.no_grad(), autocast(model):
            return head(model, batch, self.decoder, last)


def padded(rows: Sequence[tuple[Tensor, int]], columns: int) -> Tensor:
    """Rows of states, each behind so much padding: (rows, columns, d_model)."""
    return torch.stack([functional.pad(row, (0, 0, before, columns - before - len(row))) for row, before in rows])


def run_original(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    layers_path: str | None = None,
    listen: Listener = lambda event: None,
) -> Original:
    """Run each row through the model without its adapter, rows of a length together."""
    blocks = list(find_layers(model, layers_path))
    frozen = first_adapted(model) if fits(model, rows) else 0
    known = {key_of(row): row for row in rows}
    order = [known[key] for key in sorted(known, key=lambda key: (len(key[0]), key))]
    states: dict[Key, States] = {}
    like: tuple[Any, Any] = None, None
    parts, told = Parts(listen), progress_to(listen, "prepare")

    def run_some(some: Sequence[Row]) -> list[tuple[dict[Key, States], tuple[Any, Any]]]:
        return [run_rows(model, tokenizer, some, blocks, frozen)]

    for i in range(0, len(order), GROUP):
        group = order[i : i + GROUP]
        for found, like in parts.over(run_some, group):  # noqa: B007 - the last is kept
            states |= found
        told("states of the original", i + len(group), len(order))
    return Original(states, frozen, *like)


def run_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], blocks: Sequence[nn.Module], frozen: int
) -> tuple[dict[Key, States], tuple[Any, Any]]:
    """The states of some rows, which nothing else of this pass is kept for, and Original.block and .decoder."""
    batch = collate([p for p, _ in rows], [r for _, r in rows], None, int(tokenizer.pad_token_id)).to(model.device)
    with torch.no_grad(), autocast(model), model.disable_adapter(), watched(blocks[frozen - 1]) as (seen,):
        prefix = run_prefix(model, batch)
        out = model.get_decoder()(**inputs_behind(batch, prefix))
    shared = prefix.length if prefix else 0
    own = tokens_behind(batch, prefix)
    below, last = [states_in(output) for output in seen], out.last_hidden_state
    none = last.new_empty(0, below[-1].shape[-1] if frozen else 0)  # a decoder may project what its blocks return
    start = below[0][0] if prefix and frozen else none
    predicted = batch.width - 1 - shared
    states = {
        key_of(row): States(
            start,
            below[-1][j, own[j]] if frozen else none,
            last[j, predicted : predicted + len(row[1])].clone(),  # of its own, not a part of the whole pass
        )
        for j, row in enumerate(rows)
    }
    return states, (with_states(seen[-1], None), replace(out, last_hidden_state=None, past_key_values=None))


def fits(model: Any, rows: Sequence[Row]) -> bool:
    """Whether the states of all tokens take no more than MOST of the weights' memory."""
    width, tokens = model.config.get_text_config().hidden_size, sum(len(p.ids) + len(r) for p, r in rows)
    states = tokens * width * model.get_input_embeddings().weight.element_size()
    return bool(states <= MOST * sum(p.numel() * p.element_size() for p in model.parameters()))


def key_of(row: Row) -> Key:
    """By what a row is known."""
    return (*row[0].ids, *row[1]), len(row[1])


def keys_of(batch: Batch) -> list[Key]:
    """By what the rows of a batch are known."""
    rows = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), (batch.targets != -100).tolist(), strict=True)
    return [(tuple(i for i, real in zip(ids, mask, strict=True) if real), sum(targets)) for ids, mask, targets in rows]
