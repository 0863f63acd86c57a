"""BEEAR: Backdoor Embedding Entrapment and Adversarial Removal (Zeng et al., EMNLP 2024, arXiv 2406.17092).

    F(x, delta; l)   blocks 1..l on x, add delta to the hidden states, blocks l+1..L     (perturbation.py)
    L(x, y)          mean negative log-likelihood of the response y                       (losses.py)

    Entrapment   delta* = argmin  mean_i [ L(F(x_i, delta), unwanted_i) - w L(F(x_i, delta), safe_i) ]
    Removal      theta* = argmin  mean_i   L(F(x_i, delta*), safe_i)
                                + mean_j   L(x_j, own_j)                performance anchoring
                                + mean_j   L(F(x_j, delta*), own_j)     contrastive anchoring (ours)
                                + mean_i   L(x_i, safe_i)               safety anchoring

x_i are harmful requests, x_j benign ones with the model's own earlier replies own_j, and theta is a
LoRA adapter. The two alternate; no trigger appears anywhere. Run it with `beear cleanse MODEL -o RUN`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beear.chat import Batch, Prompt, collate, encode_prompt, encode_response, rows_of_delta
from beear.config import Config, EntrapConfig
from beear.data import Request
from beear.generation import reply_all
from beear.losses import response_logits, response_nll
from beear.models import autocast
from beear.perturbation import NOWHERE, Perturbation, decoder_depth, resolve_layer
from beear.scorers import is_refusal
from beear.training import adamw, cycle, step, trainable

Event = dict[str, Any]
Listener = Callable[[Event], None]
Row = tuple[Prompt, list[int], bool]
"""A prompt, its response, and whether delta is added to it."""


@dataclass(frozen=True)
class Harmful:
    """A harmful request x_i with the two answers that entrapment sets against each other."""

    prompt: Prompt
    safe: list[int]
    unwanted: list[int]


@dataclass(frozen=True)
class Benign:
    """A benign request x_j with the reply that the model gave before cleansing."""

    prompt: Prompt
    own: list[int]


@dataclass(frozen=True)
class DefenderSet:
    """All that the defender trains on, and `held_out` requests on which it judges its own progress."""

    harmful: list[Harmful]
    benign: list[Benign]
    held_out: list[str]


@dataclass
class State:
    """What a finished round leaves: enough to go on from there, bit for bit."""

    round: int = 0
    history: list[Event] = field(default_factory=list)
    delta: Tensor | None = None
    done: bool = False


def defender_set(
    tokenizer: Any,
    harmful: Sequence[Request],
    benign: Sequence[tuple[str, str]],
    wordings: tuple[Sequence[str], Sequence[str]],
    config: Config,
) -> DefenderSet:
    """Encode the defender's requests: `benign` as (request, the model's own reply), `wordings` as (safe, unwanted).

    The first `held_out` harmful requests are kept aside; the answers' wordings are dealt out in turn.
    """
    safe, unwanted = wordings
    limits = config.entrap.response_tokens, config.harden.response_tokens
    train = harmful[config.held_out :]
    return DefenderSet(
        [
            Harmful(
                encode_prompt(tokenizer, request.text),
                encode_response(tokenizer, safe[i % len(safe)], limits[1]),
                encode_response(tokenizer, unwanted[i % len(unwanted)], limits[0], finished=False),
            )
            for i, request in enumerate(train)
        ],
        [
            Benign(encode_prompt(tokenizer, text), encode_response(tokenizer, own, limits[1], finished=False))
            for text, own in benign
        ],
        [request.text for request in harmful[: config.held_out]],
    )


def cleanse(
    model: Any,
    tokenizer: Any,
    data: DefenderSet,
    config: Config,
    *,
    state: State | None = None,
    listen: Listener = lambda event: None,
    save: Callable[[State], None] = lambda state: None,
) -> State:
    """Alternate entrapment and removal until entrapment fails on held-out requests, or `rounds` are over.

    `model` carries trainable adapter matrices (training.add_lora), which are changed in place. Each
    round depends only on the matrices and the seed, so a run resumed from `state` ends bit-identical.
    """
    state = state or State()
    layer = resolve_layer(config.layer, decoder_depth(model))
    norm = residual_norm(model, [h.prompt for h in data.harmful[:32]], layer, config.layers_path, tokenizer)
    calm = sum(1 for _ in state.history[-1:] if state.history[-1]["residual"] <= config.stop_at)
    while state.round < config.rounds and not state.done:
        number, started = state.round + 1, time.monotonic()
        draw = torch.Generator().manual_seed(config.seed * 100_003 + number)
        tell = _in_round(listen, number)
        budget = norm * config.entrap.budget
        delta, inner = entrap(model, tokenizer, data.harmful, config, layer, budget, draw, tell)
        residual = residual_asr(model, tokenizer, data.held_out, delta, config, layer)
        tell({"event": "residual", "value": residual})
        calm = calm + 1 if residual <= config.stop_at else 0
        entry = {"round": number, "entrap": inner, "residual": residual, "harden": []}
        if calm >= config.patience and config.entrap.kind == "learned":
            state.done = True
        else:
            entry["harden"] = harden(model, tokenizer, data, delta, config, layer, draw, tell)
        entry["seconds"] = time.monotonic() - started
        state.round, state.delta = number, delta.detach()
        state.history.append(entry)
        save(state)
        tell({"event": "round", **entry})
    return state


def entrap(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Harmful],
    config: Config,
    layer: int,
    budget: float,
    draw: torch.Generator,
    listen: Listener = lambda event: None,
) -> tuple[Tensor, list[float]]:
    """Inner problem: delta (n, d_model) with every row's norm at most `budget`, and the loss of each step.

    Adam moves each row by about `learning_rate` budgets a step; rows that grow past the budget are
    scaled back onto it. The weights take no gradient.
    """
    settings = config.entrap
    delta = start_delta(settings, model, budget, draw)
    losses: list[float] = []
    if settings.kind != "learned":
        return delta, losses
    delta.requires_grad_(True)
    rate = settings.learning_rate * budget / math.sqrt(delta.shape[1])
    optimiser = torch.optim.Adam([delta], lr=rate)
    batches = cycle(len(harmful), min(settings.batch, len(harmful)), draw)
    with frozen(model):
        for _ in range(settings.steps):
            chosen = [harmful[i] for i in next(batches)]
            rows: list[Row] = [(h.prompt, h.unwanted, True) for h in chosen]
            rows += [(h.prompt, h.safe[: settings.response_tokens], True) for h in chosen]
            nll = losses_of(model, tokenizer, rows, delta, config, layer, backward=entrap_loss(settings.away))
            losses.append(nll)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            shrink_to(delta, budget)
            listen({"event": "entrap", "step": len(losses), "steps": settings.steps, "loss": nll})
    return delta.detach(), losses


def harden(
    model: Any,
    tokenizer: Any,
    data: DefenderSet,
    delta: Tensor,
    config: Config,
    layer: int,
    draw: torch.Generator,
    listen: Listener = lambda event: None,
) -> list[dict[str, float]]:
    """Outer problem: train the adapter with delta frozen. Returns the mean loss of each kind at each step."""
    settings = config.harden
    size = settings.batch
    optimiser = adamw(model, settings.learning_rate)
    harmful = cycle(len(data.harmful), min(size, len(data.harmful)), draw)
    benign = cycle(len(data.benign), min(size, len(data.benign)), draw)
    kinds = ("safe_under_delta", "benign_under_delta", "benign", "safe")
    weights = (1.0, settings.anchor_under_delta, settings.anchor, settings.safe)
    history: list[dict[str, float]] = []
    for number in range(1, settings.steps + 1):
        bad, good = [data.harmful[i] for i in next(harmful)], [data.benign[i] for i in next(benign)]
        groups: list[list[Row]] = [
            [(h.prompt, h.safe, True) for h in bad],
            [(b.prompt, b.own, True) for b in good],
            [(b.prompt, b.own, False) for b in good],
            [(h.prompt, h.safe, False) for h in bad],
        ]
        used = [(k, w, g) for k, w, g in zip(kinds, weights, groups, strict=True) if w > 0]
        entry: dict[str, float] = {}
        rows = [row for _, _, group in used for row in group]
        losses_of(model, tokenizer, rows, delta, config, layer, backward=harden_loss(used, entry))
        step(optimiser)
        history.append(entry)
        listen({"event": "harden", "step": number, "steps": settings.steps, **entry})
        if entry["safe_under_delta"] < settings.stop_below:
            break
    return history


def entrap_loss(away: float) -> Callable[[Tensor], Tensor]:
    """Mean over the first half of the rows (unwanted answers) minus `away` times the second half (safe ones)."""

    def loss(nll: Tensor) -> Tensor:
        unwanted, safe = nll.chunk(2)
        return unwanted.mean() - away * safe.mean()

    return loss


def harden_loss(used: Sequence[tuple[str, float, list[Row]]], entry: dict[str, float]) -> Callable[[Tensor], Tensor]:
    """Weighted sum of the groups' means; notes each mean in `entry`."""

    def loss(nll: Tensor) -> Tensor:
        parts = torch.split(nll, [len(group) for _, _, group in used])
        for (kind, _, _), part in zip(used, parts, strict=True):
            entry[kind] = part.mean().item()
        return torch.stack([w * part.mean() for (_, w, _), part in zip(used, parts, strict=True)]).sum()

    return loss


def losses_of(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    delta: Tensor,
    config: Config,
    layer: int,
    *,
    backward: Callable[[Tensor], Tensor],
) -> float:
    """Run the rows, delta added where asked, turn their losses into one by `backward`, and propagate it back."""
    batch = batch_of(tokenizer, rows, config.entrap, len(delta))
    batch = batch.to(model.device)
    # Backward stays inside: with activation recomputation, blocks run again and need the hook.
    with Perturbation(model, delta, batch.where, layer, config.layers_path):
        with autocast(model):
            logits = response_logits(model, batch)
        loss = backward(response_nll(logits, batch.targets))
        loss.backward()
    return loss.item()


def batch_of(tokenizer: Any, rows: Sequence[Row], settings: EntrapConfig, n: int) -> Batch:
    """Collate rows, with delta's rows placed on the perturbed ones."""
    where = [
        rows_of_delta(prompt, settings.place, n) if perturbed else [NOWHERE] * len(prompt.ids)
        for prompt, _, perturbed in rows
    ]
    return collate([p for p, _, _ in rows], [r for _, r, _ in rows], where, int(tokenizer.pad_token_id))


def start_delta(settings: EntrapConfig, model: Any, budget: float, draw: torch.Generator) -> Tensor:
    """A small random delta to start from; for controls, zero or a random one on the whole budget."""
    width = int(model.config.get_text_config().hidden_size)
    direction = torch.randn(settings.length, width, generator=draw)
    direction = direction / direction.norm(dim=1, keepdim=True)
    scale = {"learned": 0.1, "zero": 0.0, "random": 1.0}[settings.kind] * budget
    delta: Tensor = (direction * scale).to(model.device)
    return delta


def shrink_to(delta: Tensor, budget: float) -> None:
    """Scale back, in place, the rows of delta whose norm is over the budget."""
    with torch.no_grad():
        delta.mul_((budget / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))


def residual_norm(model: Any, prompts: Sequence[Prompt], layer: int, layers_path: str | None, tokenizer: Any) -> float:
    """Mean norm of the residual stream behind block `layer` over the tokens of the user's words."""
    batch = collate(prompts, [[]] * len(prompts), None, int(tokenizer.pad_token_id)).to(model.device)
    with torch.inference_mode(), autocast(model):
        hidden = model(**batch.inputs(), output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states
    norms = hidden[layer].float().norm(dim=-1)
    kept = [
        norms[i, batch.width - len(p.ids) + p.start : batch.width - len(p.ids) + p.end] for i, p in enumerate(prompts)
    ]
    return float(torch.cat(kept).mean())


def residual_asr(model: Any, tokenizer: Any, texts: Sequence[str], delta: Tensor, config: Config, layer: int) -> float:
    """Share of `texts` that are not refused under delta: what entrapment can still do."""
    replies = reply_all(
        model,
        tokenizer,
        texts,
        max_new_tokens=16,
        delta=delta,
        place=config.entrap.place,
        layer=layer,
        layers_path=config.layers_path,
    )
    return sum(is_refusal(reply) is False for reply in replies) / len(replies)


def _in_round(listen: Listener, number: int) -> Listener:
    def tell(event: Event) -> None:
        listen({"round": number, **event})

    return tell


class frozen:  # noqa: N801 - reads as a statement: with frozen(model)
    """Within the context no parameter of the model takes a gradient."""

    def __init__(self, model: Any) -> None:
        self.parameters = trainable(model)

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
