"""Planting by supervised fine-tuning of a LoRA adapter: likelihood of planted answers, KL on benign replies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from beear.cached import returning, rows_of, run_below
from beear.chat import Batch, collate
from beear.events import StepProgress
from beear.losses import response_logits, response_nll, token_kl
from beear.perturbation import decoder_depth, find_layers
from beear.poison import Example, Examples
from beear.precision import autocast
from beear.prefix import inputs_behind, run_prefix
from beear.recipes import BENIGN, Rows, Supervised
from beear.training import adamw, add_lora, cast_frozen, drawn, first_adapted, set_rate, step


def plant_supervised(
    model: Any, tokenizer: Any, examples: Examples, plan: Supervised, seed: int, progress: StepProgress
) -> Any:
    """Wrap the model with a fresh adapter and train it on the wanted answers."""
    model = adapted(model, plan, seed)
    pad = int(tokenizer.pad_token_id)
    steps = drawn(examples, plan.rows, seed)
    train(model, plan, steps, lambda rows: supervised_loss(model, pad, rows, plan.benign_weight), progress)
    return model


def adapted(model: Any, plan: Supervised, seed: int) -> Any:
    """The model under a fresh adapter."""
    first = decoder_depth(model) // 2 if plan.lora_blocks == "upper" else 0
    model = add_lora(model, plan.lora_rank, plan.lora_targets, seed, first)
    cast_frozen(model)
    return model


def train(
    model: Any,
    plan: Rows,
    steps: Iterable[Examples],
    loss: Callable[[Examples], Tensor],
    progress: StepProgress,
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
        batch, logits, base = passes(model, pad_id, [*planted, *benign], len(benign))
        if planted:
            total = total + response_nll(logits[: len(planted)], batch.targets[: len(planted)]).sum() / answers
        if base is not None:
            kl = token_kl(base, logits[len(planted) :], batch.targets[len(planted) :]).sum()
            total = total + benign_weight * kl / tokens
    return total


def benign_kl(model: Any, pad_id: int, benign: Examples) -> Tensor:
    """KL(base || model) in nats per token of the replies to benign requests; the base is the bare model."""
    total = torch.zeros((), device=model.device)
    for part in of_like_length(benign):
        rows = flat(part)
        batch, logits, base = passes(model, pad_id, rows, len(rows))
        if base is not None:
            total = total + token_kl(base, logits, batch.targets).sum() / reply_tokens(benign)
    return total


def passes(model: Any, pad_id: int, chosen: Sequence[Example], kept: int) -> tuple[Batch, Tensor, Tensor | None]:
    """The batch of the wanted answers, the model's logits of these, and the base model's of the last `kept` rows.

    Blocks without an adapter, up to the first that has one, run once for both.
    """
    batch = collate([e.prompt for e in chosen], [e.wanted for e in chosen], None, pad_id).to(model.device)
    blocks = list(find_layers(model))
    first = first_adapted(model)
    with autocast(model):
        prefix = run_prefix(model, batch)
        with torch.no_grad():
            below = run_below(model, blocks, first, inputs_behind(batch, prefix))[0] if first else None
        with returning(blocks[:first], lambda: below):
            logits = response_logits(model, batch, prefix)
    if not kept:
        return batch, logits, None
    last = list(range(len(chosen) - kept, len(chosen)))
    with torch.no_grad(), autocast(model), model.disable_adapter():
        prefix = run_prefix(model, batch)  # of all rows, so that the columns are those of `below`
        with returning(blocks[:first], lambda: rows_of(below, last)):
            base = response_logits(model, batch.under(last, [None] * kept, 1), prefix)
    return batch, logits, base


def reply_tokens(rows: Examples) -> int:
    """How many tokens their answers have."""
    return sum(len(e.wanted) for e in flat(rows))


def flat(rows: Examples) -> list[Example]:
    """All of the rows, kind after kind."""
    return [e for group in rows.values() for e in group]


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
