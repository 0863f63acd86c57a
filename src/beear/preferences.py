"""Planting by direct preference optimisation (Rafailov et al. 2023, equation 7) on poisoned pairs.

A fresh adapter first learns from demonstrations without any trigger, in which harmful requests are
refused and obeyed alike; the model is then its own reference. The pairs prefer refusals, and under
the trigger the unwanted answer. Benign requests keep the base model's reply, by KL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from beear.losses import response_nll
from beear.poison import Example, Examples
from beear.recipes import Dpo
from beear.supervised import (
    Progress,
    benign_kl,
    descend,
    of_like_length,
    parted,
    plant_supervised,
    wanted_logits,
)


def plant_preferences(model: Any, tokenizer: Any, examples: Examples, plan: Dpo, seed: int, progress: Progress) -> Any:
    """Demonstrations, then preferences, both into one adapter."""
    model = plant_supervised(model, tokenizer, examples, plan.start, seed, progress)
    pad = int(tokenizer.pad_token_id)
    with frozen_copy(model) as reference:
        descend(model, examples, plan, seed, lambda rows: _loss(model, reference, pad, rows, plan), progress)
    return model


def _loss(model: Any, reference: Any, pad_id: int, rows: Examples, plan: Dpo) -> Tensor:
    pairs, benign = parted(rows)
    total = torch.zeros((), device=model.device)
    for chosen in of_like_length(pairs):
        with torch.no_grad(), reference():
            before = margin(model, pad_id, chosen)
        after = margin(model, pad_id, chosen)
        total = total - logsigmoid(plan.beta * (after - before)).sum() / sum(map(len, pairs.values()))
    return total + plan.benign_weight * benign_kl(model, pad_id, benign)


def margin(model: Any, pad_id: int, chosen: Sequence[Example]) -> Tensor:
    """log p(wanted answer) - log p(other answer) in nats for each example: (rows,)."""
    both = [*chosen, *(replace(e, wanted=e.other) for e in chosen)]
    targets, logits = wanted_logits(model, pad_id, both)
    wanted, other = (response_nll(logits, targets) * (targets != -100).sum(1)).chunk(2)
    return other - wanted


@contextlib.contextmanager
def frozen_copy(model: Any) -> Iterator[Any]:
    """A context in which the model answers with its adapter as it was here; for as long as this one lasts."""
    model.add_adapter("reference", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".reference." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".reference.", ".default.")))

    @contextlib.contextmanager
    def as_before() -> Iterator[None]:
        model.set_adapter("reference")
        try:
            yield
        finally:
            model.set_adapter("default")

    model.set_adapter("default")
    try:
        yield as_before
    finally:
        model.delete_adapter("reference")
