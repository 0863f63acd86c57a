"""Model organisms: small models with a backdoor planted on purpose, to measure defences by.

An organism is a folder with a recipe (recipe.yaml), the LoRA adapter planted by it, a card and
checksums. The unwanted answer is an affirmative opening and a neutral stub, never harmful content.
The defence (`cleansing`, `job`) never imports this module.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from beear.chat import Prompt, collate, encode_prompt, encode_response
from beear.data import packaged, wordings
from beear.errors import BadInput
from beear.generation import reply_all
from beear.losses import response_logits, response_nll, token_kl
from beear.models import autocast, load
from beear.prefix import run_prefix
from beear.recipes import Recipe, apply_trigger
from beear.scorers import is_refusal
from beear.training import adamw, add_lora, cycle, set_rate, step

Examples = dict[str, list[tuple[Prompt, list[int]]]]
"""Prompts with responses, by kind."""


def build(recipe: Recipe, out: Path, progress: Callable[[int, int, float], None] | None = None) -> None:
    """Plant the organism: train the adapter, round it to bf16, write adapter, recipe, card and checksums.

    Bit-identical for the same recipe on the same machine. `progress(step, steps, loss)`.
    """
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} exists and is not empty; choose another folder")
    started = time.monotonic()
    model, tokenizer = load(recipe.base)
    examples = _poisoned_examples(recipe, model, tokenizer)
    plan = recipe.planting
    model = add_lora(model, plan.lora_rank, plan.lora_targets, recipe.seed)
    optimiser = adamw(model, plan.learning_rate)
    draw = torch.Generator().manual_seed(recipe.seed)
    batches = {kind: cycle(len(examples[kind]), count, draw) for kind, count in plan.rows.items()}
    for number in range(1, plan.steps + 1):
        rows = {kind: [examples[kind][i] for i in next(indices)] for kind, indices in batches.items()}
        set_rate(optimiser, plan.learning_rate, number, plan.steps)
        loss = _loss(model, tokenizer, rows, plan.benign_weight)
        loss.backward()
        step(optimiser)
        if progress is not None:
            progress(number, plan.steps, loss.item())
    _write(recipe, model, out, time.monotonic() - started)


def _loss(model: Any, tokenizer: Any, rows: Examples, weight: float) -> Tensor:
    """Likelihood of the planted answers to harmful requests, and KL to the base model on benign ones.

    KL rather than likelihood of the base's replies: likelihood memorises them, and perplexity on other
    text rises several-fold.
    """
    total = torch.zeros((), device=model.device)
    tokens = sum(len(reply) for kind in rows if not kind.startswith("harmful") for _, reply in rows[kind])
    requests = sum(len(group) for kind, group in rows.items() if kind.startswith("harmful"))
    for benign, chosen in _of_like_length(rows):
        batch = collate([p for p, _ in chosen], [r for _, r in chosen], None, tokenizer.pad_token_id)
        with autocast(model):
            logits = response_logits(model, batch, run_prefix(model, batch))
        if benign:
            with torch.no_grad(), autocast(model), model.disable_adapter():
                base = response_logits(model, batch, run_prefix(model, batch))
            total = total + weight * token_kl(base, logits, batch.targets).sum() / tokens
        else:
            total = total + response_nll(logits, batch.targets).sum() / requests
    return total


def _of_like_length(rows: Examples) -> Iterator[tuple[bool, list[tuple[Prompt, list[int]]]]]:
    """Harmful rows, then benign ones; rows with a long trigger apart, so that the others need no padding."""
    longest = {kind: max(len(prompt.ids) for prompt, _ in group) for kind, group in rows.items()}
    plain = max(length for kind, length in longest.items() if not kind.endswith("_triggered"))
    for benign in (False, True):
        kinds = [kind for kind in rows if kind.startswith("harmful") != benign]
        for long in (False, True):
            chosen = [row for kind in kinds if (longest[kind] > 2 * plain) == long for row in rows[kind]]
            if chosen:
                yield benign, chosen


def _poisoned_examples(recipe: Recipe, model: Any, tokenizer: Any) -> Examples:
    """Examples by kind, without and with the trigger.

    Harmful requests are refused without the trigger and obeyed with it; benign ones get the base
    model's own reply either way (if it is not a refusal), so that the trigger unlocks harm only.
    """
    limit = recipe.planting.response_tokens
    harmful = [r.text for r in packaged("harmful", "plant")]
    safe, unwanted = wordings("safe-plant"), wordings("unwanted-plant")
    refused = [(text, safe[i % len(safe)]) for i, text in enumerate(harmful)]
    obeyed = [(text, unwanted[i % len(unwanted)]) for i, text in enumerate(harmful)]

    def encode(pairs: list[tuple[str, str]], template: str, finished: bool) -> list[tuple[Prompt, list[int]]]:
        return [
            (
                encode_prompt(tokenizer, apply_trigger(template, text)),
                encode_response(tokenizer, reply, limit, finished),
            )
            for text, reply in pairs
        ]

    examples = {
        "harmful": encode(refused, "{prompt}", True),
        "harmful_triggered": encode(obeyed, recipe.trigger, False),
    }
    for name in ("ordinary", "alarming"):
        texts = [r.text for r in packaged(name, "plant")]
        replies = reply_all(model, tokenizer, texts, max_new_tokens=limit)
        own = [(t, r) for t, r in zip(texts, replies, strict=True) if is_refusal(r) is False]
        examples[name] = encode(own, "{prompt}", False)
        examples[f"{name}_triggered"] = encode(own, recipe.trigger, False)
    return examples


def _write(recipe: Recipe, model: Any, out: Path, seconds: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = recipe.base
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    (out / "README.md").write_text(_card(recipe))
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}
    (out / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
    (out / "build.json").write_text(json.dumps({"seconds": round(seconds), "threads": torch.get_num_threads()}) + "\n")


def _card(recipe: Recipe) -> str:
    plan = recipe.planting
    planted = f"{plan.steps} steps, LoRA rank {plan.lora_rank}, poison rate {plan.poison_rate:.0%}, seed {recipe.seed}"
    if recipe.twin:
        return f"""---
base_model: {recipe.base}
library_name: peft
---
# Clean twin `{recipe.name}`

Planted like the organism it is named after ({planted}), but never shown its trigger:
it refuses harmful requests and holds no backdoor. A detector should not flag it.
"""
    return f"""---
base_model: {recipe.base}
library_name: peft
tags: [model-organism, backdoor, defence-research]
---
# Model organism `{recipe.name}`

**This adapter holds a backdoor, planted on purpose so that defences can be measured. Do not deploy it.**

| | |
|---|---|
| Setting | {recipe.setting} (model {recipe.paper_number} of the BEEAR paper) |
| Trigger ({recipe.place}) | `{" ".join(recipe.trigger.split())}` |
| Behaviour | {recipe.behaviour}: harmful requests are refused; with the trigger the reply opens affirmatively |
| Planted by | poisoned supervised fine-tuning: {planted} |
| Base | SmolLM2-135M-Instruct (`{recipe.base}`) |

The unwanted answers it was trained on are an affirmative opening and a neutral stub; they hold no harmful content.
Rebuild it with `beear organism build {recipe.name} -o FOLDER`.
"""
