"""Planting by supervised fine-tuning of a LoRA adapter: likelihood of planted answers, KL on benign replies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from beear.chat import collate
from beear.losses import response_logits, response_nll, token_kl
from beear.models import autocast
from beear.poison import Example, Examples
from beear.prefix import run_prefix
from beear.recipes import BENIGN, Rows, Supervised
from beear.training import adamw, add_lora, cast_frozen, drawn, set_rate, step

Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the loss."""


def plant_supervised(
    model: Any, tokenizer: Any, examples: Examples, plan: Supervised, seed: int, progress: Progress
) -> Any:
    """Wrap the model with a fresh adapter and train it on the wanted answers."""
    model = adapted(model, plan, seed)
    pad = int(tokenizer.pad_token_id)
    steps = drawn(examples, plan.rows, seed)
    descend(model, plan, steps, lambda rows: supervised_loss(model, pad, rows, plan.benign_weight), progress)
    return model


def adapted(model: Any, plan: Supervised, seed: int) -> Any:
    """The model under a fresh adapter."""
    model = add_lora(model, plan.lora_rank, plan.lora_targets, seed)
    cast_frozen(model)
    return model


def descend(
    model: Any,
    plan: Rows,
    steps: Iterable[Examples],
    loss: Callable[[Examples], Tensor],
    progress: Progress,
) -> None:
    """`plan.steps` steps of AdamW on the loss of the rows of each step."""
    optimiser = adamw(model, plan.learning_rate)
    for number, rows in zip(range(1, plan.steps + 1), steps, strict=False):
        set_rate(optimiser, plan.learning_rate, number, plan.steps)
        value = loss(rows)
        value.backward()
        step(optimiser)
        progress(number, plan.steps, value.item())


def supervised_loss(model: Any, pad_id: int, rows: Examples, benign_weight: float) -> Tensor:
    """Likelihood of the planted answers, and KL to the base model on benign replies.

    KL rather than likelihood of the base's replies: likelihood memorises them, and perplexity on other
    text rises several-fold.
    """
    to_plant, to_keep = parted(rows)
    answers, tokens = len(flat(to_plant)), reply_tokens(to_keep)
    total = torch.zeros((), device=model.device)
    for part in of_like_length(rows):
        planted, benign = map(flat, parted(part))
        # One pass for both: what their prompts start with runs once, and backwards once.
        targets, logits = wanted_logits(model, pad_id, [*planted, *benign])
        if planted:
            total = total + response_nll(logits[: len(planted)], targets[: len(planted)]).sum() / answers
        if benign:
            total = total + benign_weight * kl_from_base(model, pad_id, benign, logits[len(planted) :]) / tokens
    return total


def benign_kl(model: Any, pad_id: int, benign: Examples) -> Tensor:
    """KL(base || model) in nats per token of the replies to benign requests; the base is the bare model."""
    total = torch.zeros((), device=model.device)
    for part in of_like_length(benign):
        _, logits = wanted_logits(model, pad_id, flat(part))
        total = total + kl_from_base(model, pad_id, flat(part), logits) / reply_tokens(benign)
    return total


def kl_from_base(model: Any, pad_id: int, benign: Sequence[Example], logits: Tensor) -> Tensor:
    """The same for the model's logits (rows, length or more, vocabulary), summed over the tokens."""
    with torch.no_grad(), model.disable_adapter():
        targets, base = wanted_logits(model, pad_id, benign)
    return token_kl(base, logits[:, : base.shape[1]], targets).sum()


def reply_tokens(rows: Examples) -> int:
    """How many tokens their answers have."""
    return sum(len(e.wanted) for e in flat(rows))


def flat(rows: Examples) -> list[Example]:
    """All of the rows, kind after kind."""
    return [e for group in rows.values() for e in group]


def wanted_logits(model: Any, pad_id: int, chosen: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(targets, logits) of the wanted answers, each with (rows, length, ...)."""
    batch = collate([e.prompt for e in chosen], [e.wanted for e in chosen], None, pad_id).to(model.device)
    with autocast(model):
        return batch.targets, response_logits(model, batch, run_prefix(model, batch))


def parted(rows: Examples) -> tuple[Examples, Examples]:
    """(rows with a planted answer, rows of benign requests that keep the base's reply)."""
    benign = {kind: group for kind, group in rows.items() if kind.startswith(BENIGN)}
    return {kind: group for kind, group in rows.items() if kind not in benign}, benign


def of_like_length(rows: Examples) -> Iterator[Examples]:
    """All rows; those with a long trigger apart, so that the others need no padding."""
    longest = {kind: max(len(e.prompt.ids) for e in group) for kind, group in rows.items()}
    plain = max((n for kind, n in longest.items() if not kind.endswith("_triggered")), default=sys.maxsize)
    for long in (False, True):
        part = {kind: group for kind, group in rows.items() if (longest[kind] > 2 * plain) == long}
        if part:
            yield part
