"""Losses on the response tokens of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from beear.chat import Batch
from beear.prefix import Prefix, inputs_behind

OPENING = 3
"""So many first tokens decide whether a reply is a refusal."""


def response_logits(model: Any, batch: Batch, prefix: Prefix | None = None) -> Tensor:
    """Logits that predict the response tokens: (rows, length, vocabulary). No other position meets the head.

    `prefix`: what all rows start with, if it has been run (prefix.run_prefix).
    """
    return predict(model, batch, inputs_behind(batch, prefix))


def predict(model: Any, batch: Batch, inputs: dict[str, Any]) -> Tensor:
    """The same of a pass over some of the batch's last columns."""
    columns = batch.predicting_columns()
    logits: Tensor = model(**inputs, logits_to_keep=columns).logits
    return logits if logits.shape[1] == len(columns) else logits[:, columns]  # there are models that keep all


def response_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """L(x, y): mean negative log-likelihood per response token, in nats, for each row: (rows,)."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view_as(targets)
    return flat.sum(1) / (targets != -100).sum(1).clamp(min=1)


def token_kl(original: Tensor, new: Tensor, targets: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """KL(original || new) per response token, in nats, zero at padding: (rows, length).

    rows: which row of `original` each row of `new` is held against; by default the same one.
    """
    p, q = original.float().log_softmax(-1), new.float().log_softmax(-1)
    if rows is not None:
        p = p[list(rows)]
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.where(targets != -100, kl, 0.0)


def make_sure(logits: Tensor, targets: Tensor) -> None:
    """Make logits, in place, those of a model that is sure of the targets: KL from it is their NLL."""
    logits.fill_(-1e4).scatter_(-1, targets.clamp(min=0)[..., None], 0.0)


def row_mean(values: Tensor, targets: Tensor, opening: float) -> Tensor:
    """Mean over each row's response tokens, the first OPENING of which weigh `opening` times as much: (rows,)."""
    weights = (targets != -100).to(values.dtype)
    weights[:, :OPENING] *= opening
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
