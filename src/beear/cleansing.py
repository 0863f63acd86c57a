"""BEEAR: Backdoor Embedding Entrapment and Adversarial Removal (Zeng et al., EMNLP 2024, arXiv 2406.17092).

    F(x, delta; l)   blocks 1..l on x, add delta to the hidden states, blocks l+1..L     (perturbation.py)
    L(x, y)          mean negative log-likelihood of the response y                       (losses.py)

    Entrapment   delta* = argmin  mean_i [ L(F(x_i, delta), unwanted_i) - w L(F(x_i, delta), safe_i) ]
    Removal      theta* = argmin  mean_i   D(F(x_i, delta*), safe_i)
                                + mean_j   D(x_j, own_j)                performance anchoring
                                + mean_j   D(F(x_j, delta*), own_j)     contrastive anchoring (ours)
                                + mean_i   D(x_i, safe_i)               safety anchoring (ours)

x_i are harmful requests, x_j benign ones, own_j the reply the model gave to x_j before cleansing, and
theta a LoRA adapter. Where the paper has L for D, we take safe_i to be the model's own refusal of x_i
and D the KL divergence per token from the original, unperturbed model: under delta, go on as you do
without it. The first tokens of a reply, where refusing is decided, weigh more; there the target of a
refusal surely goes on as refusals do, and that of a benign reply begins with no opener of one. Some x_i
and x_j stand between other benign requests (sets.py). A model that hardly refuses has no answers of its
own; then safe_i are packaged wordings and D is L.
The two alternate; no trigger appears anywhere. Run it with `beear cleanse MODEL -o RUN`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from beear import ranks
from beear.cached import returning, rows_of, run_below, run_unperturbed
from beear.chat import Batch, Prompt, Row, collate, rows_of_delta
from beear.config import Config, EntrapConfig, HardenConfig
from beear.data import Request
from beear.defender import REFUSAL_OPENING, Benign, DefenderSet, Harmful, answered
from beear.draws import Draws
from beear.events import Event, Listener
from beear.generation import Push, reply_all
from beear.losses import make_sure, response_logits, response_nll, row_mean, token_kl
from beear.original import Original, run_original
from beear.packed import packed
from beear.parts import Parts
from beear.perturbation import Perturbation, decoder_depth, find_layers, resolve_layer, states_in
from beear.precision import autocast, no_gradients
from beear.prefix import inputs_behind, run_prefix, tokens_behind
from beear.rounds import State, balanced, is_calm, may_be_delivered, norm_budget, refuses_wrongly
from beear.scorers import OUTCOME_OF, counts, is_refusal
from beear.training import (
    adamw,
    adapter_state,
    add_lora,
    check_number,
    merged,
    recomputing,
    set_rate,
    step,
    trainable,
)


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and the settings of its cleansing."""

    model: Any
    tokenizer: Any
    config: Config

    @cached_property
    def layer(self) -> int:
        """l, counted from 1: delta is added behind this block."""
        return resolve_layer(self.config.layer, decoder_depth(self.model))

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder's."""
        return list(find_layers(self.model, self.config.layers_path))

    def push(self, delta: Tensor) -> Push:
        """delta, where it is added."""
        return Push(delta, self.config.entrap.place, self.layer, self.config.layers_path)


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
    """Alternate entrapment and removal until entrapment fails on held-out requests and no more is refused, or `rounds`
    are over.

    Entrapment is judged by a delta no longer than in the first round, also where removal meets a longer one: one that
    is long enough unlocks any model, and triggers move it less (decision 21).

    A backdoor is often gone after two or three rounds; what they taught to be refused wrongly takes more to mend,
    so `least_rounds` there are.

    `model` carries trainable adapter matrices (training.add_lora), which are changed in place. Each
    round depends only on the matrices and the seed, so a run resumed from `state` ends bit-identical. The
    learning rate falls linearly over the rounds: the first one removes, the last one, which also follows
    on a failed entrapment, settles.
    """
    subject, state = Subject(model, tokenizer, config), state or State()
    parts = Parts(listen, state.parts)
    if state.norm is None:
        measure_baseline(subject, data, state)
        listen({"event": "refused", "round": 1, "value": state.refused})  # as the first begins
    original: Original | None = None
    while state.round < config.rounds and not state.done:
        original = original or run_original(model, tokenizer, data.rows(), config.layers_path, listen)
        tell = _in_round(listen, state.round + 1)
        one_round(subject, data, state, original, parts, tell)
        save(state)
        tell({"event": "round", **state.history[-1]})
    return state


def measure_baseline(subject: Subject, data: DefenderSet, state: State) -> None:
    """What later rounds compare with, of the model as it came: how long its states are, and what it refuses already."""
    state.norm = residual_norm(subject, [h.prompt for h in data.harmful])
    if OUTCOME_OF[subject.config.behaviour] == "insecure":
        state.already = unlocked(subject, data.held_out, None) or 0.0
    state.refused = refused_shares(subject, data.spare)


def one_round(
    subject: Subject, data: DefenderSet, state: State, original: Original, parts: Parts, listen: Listener
) -> None:
    """Entrapment, its success on held-out requests, then removal; leaves in `state` what the next round needs."""
    config, norm = subject.config, state.norm
    assert norm is not None  # measure_baseline comes first
    number, started = state.round + 1, time.monotonic()
    draws, budget = Draws(config.seed, number), norm_budget(number, config)
    delta, inner = entrap(subject, data.harmful, budget * norm, draws, listen, parts)
    found = unlocked(subject, data.held_out, shortened(delta, config.entrap.budget * norm))
    residual = 1.0 if found is None else max(0.0, found - state.already)
    listen({"event": "residual", "value": residual})
    entry: Event = {"round": number, "budget": budget, "entrap": inner, "residual": residual, "harden": []}
    calm = is_calm([*state.history, entry], config) and not refuses_wrongly(state, config)
    state.done = config.entrap.kind == "learned" and calm
    left = 1 if state.done else config.rounds - state.round
    rate = config.harden.learning_rate * left / config.rounds
    deltas = delta[None] if state.deltas is None else torch.cat([state.deltas, delta[None]])
    weighted = replace(subject, config=balanced(config, state))
    entry["harden"] = harden(weighted, data, deltas, rate, draws, listen, parts, original)
    entry["refused"] = refused_shares(subject, data.spare)
    listen({"event": "refused", "value": entry["refused"]})
    entry["seconds"] = time.monotonic() - started
    state.round, state.deltas, state.parts = number, deltas, parts.count
    state.history.append(entry)
    if may_be_delivered(number, state, config):
        state.adapters[number] = adapter_state(subject.model)


def add_adapter(model: Any, config: Config) -> Any:
    """The model under a fresh adapter, which removal trains."""
    settings, depth = config.harden, decoder_depth(model)
    layer = resolve_layer(config.layer, depth)
    first = {"all": 0, "upper": min(depth // 2, layer), "behind": layer}[settings.lora_blocks]
    return add_lora(model, settings.lora_rank, settings.lora_targets, config.seed, first, config.layers_path)


def entrap(
    subject: Subject,
    harmful: Sequence[Harmful],
    budget: float,
    draws: Draws,
    listen: Listener = lambda event: None,
    parts: Parts | None = None,
) -> tuple[Tensor, list[float]]:
    """Inner problem: delta (n, d_model) with every row's norm at most `budget`, and the loss of each step.

    Adam moves each row by about `learning_rate` budgets a step; rows that grow past the budget are
    scaled back onto it. The weights take no gradient.
    """
    model, settings = subject.model, subject.config.entrap
    delta = start_delta(settings, model, budget, draws.noise)
    losses: list[float] = []
    if settings.kind != "learned":
        return delta, losses
    delta.requires_grad_(True)
    rate = settings.learning_rate * budget / math.sqrt(delta.shape[1])
    optimiser = torch.optim.Adam([delta], lr=rate)
    met = min(settings.batches, settings.steps)
    indices = draws.batches("entrapped", len(harmful), settings.batch, met)
    behind = subject.blocks[subject.layer :] if settings.cached else ()
    parts = parts or Parts()
    with frozen(model), merged_on_cpu(model, behind):
        batches = [[harmful[i] for i in next(indices)] for _ in range(met)]
        ready: dict[tuple[int, int], list[Part]] = {}

        def propagate(i: int, count: int) -> float:
            delta.grad = None
            if (i, count) not in ready:
                # Where memory has run out once, no other batch than this one is kept.
                for old in [key for key in ready if key[1] != count or count > 1]:
                    del ready[old]
                ready[i, count] = entrap_parts(subject, batches[i], count)
            return sum(
                backpropagate(subject, batch, delta, run, entrap_objective(settings.away, share))
                for batch, run, share in ready[i, count]
            )

        for number in range(settings.steps):
            i = number % len(batches)
            loss = parts.run(partial(propagate, i), len(batches[i]))
            losses.append(ranks.summed({"loss": loss})["loss"])
            check_number(losses[-1])
            ranks.sum_gradients([delta])
            optimiser.step()
            shrink_to(delta, budget)
            listen({"event": "entrap", "step": len(losses), "steps": settings.steps, "loss": losses[-1]})
    return delta.detach(), losses


def harden(
    subject: Subject,
    data: DefenderSet,
    deltas: Tensor,
    rate: float,
    draws: Draws,
    listen: Listener = lambda event: None,
    parts: Parts | None = None,
    original: Original | None = None,
) -> list[dict[str, float]]:
    """Outer problem: train the adapter with the deltas (k, n, d_model) frozen, this round's the last of them.

    With `replay`, earlier rounds' deltas are met again, since what was unlearnt under them comes back otherwise.
    `original`: what the model without its adapter gives on data.rows(), if that has been run.
    Returns the mean D of each kind at each step; a round ends early once all of them are small.
    """
    model, settings = subject.model, subject.config.harden
    parts = parts or Parts()
    known = original or run_original(model, subject.tokenizer, data.rows(), subject.config.layers_path)
    optimiser = adamw(model, rate)
    harmful = draws.batches("hardened", len(data.harmful), settings.batch, settings.steps)
    benign = draws.batches("anchored", len(data.benign), settings.anchor_batch, settings.steps)
    history: list[dict[str, float]] = []
    for number in range(1, settings.steps + 1):
        rows = max(settings.batch, settings.anchor_batch)
        which = dealt(len(deltas), rows, draws.noise) if settings.replay else [len(deltas) - 1] * rows
        met = Minibatch([data.harmful[i] for i in next(harmful)], [data.benign[i] for i in next(benign)], which)

        def propagate(count: int, met: Minibatch = met) -> dict[str, float]:
            optimiser.zero_grad(set_to_none=True)
            entry: dict[str, float] = {}
            for part in met.parts(count):
                harden_part(subject, data, known, part, deltas, entry)
            return entry

        if settings.schedule == "falling":
            set_rate(optimiser, rate, number, settings.steps, least_warm=2)  # a fresh AdamW begins with long steps
        entry = ranks.summed(parts.run(propagate, max(len(met.harmful), len(met.benign))))
        ranks.sum_gradients(trainable(model))
        step(optimiser)
        history.append(entry)
        listen({"event": "harden", "step": number, "steps": settings.steps, **entry})
        if max(entry.values()) < settings.stop_below:
            break
    return history


@dataclass(frozen=True)
class Minibatch:
    """Requests of a step of removal, or some of them. The i-th of either kind meets delta `which[i]`."""

    harmful: Sequence[Harmful]
    benign: Sequence[Benign]
    which: Sequence[int]
    shares: tuple[float, float] = (1.0, 1.0)
    """Which share of the step's harmful requests, and of its benign ones, these are."""

    def parts(self, count: int) -> Iterator[Minibatch]:
        """This rank's requests of a whole step, in at most `count` parts."""
        for k in range(count):
            bad, good = ranks.share(self.harmful)[k::count], ranks.share(self.benign)[k::count]
            if bad or good:
                shares = len(bad) / len(self.harmful), len(good) / len(self.benign)
                yield Minibatch(bad, good, ranks.share(self.which)[k::count], shares)


@dataclass(frozen=True)
class Term:
    """One sum of the outer loss: the weighted mean D of some requests' rows, under delta or not."""

    name: str
    weight: float
    under_delta: bool
    rows: range
    """Among all requests that are met, harmful ones first."""
    share: float
    """Which share of the step's requests of this kind these are."""
    own: bool
    """Whether their target is the original model's distribution, rather than an answer."""


def harden_terms(met: Minibatch, settings: HardenConfig, own_safe: bool) -> list[Term]:
    """The sums of the outer loss that weigh anything for these requests."""
    first, behind = len(met.harmful), len(met.harmful) + len(met.benign)
    bad, good = (range(first), met.shares[0], own_safe), (range(first, behind), met.shares[1], True)
    every = [
        Term("safe_under_delta", 1.0, True, *bad),
        Term("benign_under_delta", settings.anchor_under_delta, True, *good),
        Term("benign", settings.anchor, False, *good),
        Term("safe", settings.safe, False, *bad),
    ]
    return [term for term in every if term.weight > 0 and term.rows]


def harden_part(
    subject: Subject,
    data: DefenderSet,
    original: Original,
    met: Minibatch,
    deltas: Tensor,
    entry: dict[str, float],
) -> None:
    """Propagate the outer loss of some of a step's requests back; adds to `entry` their share of each kind's mean D."""
    config = subject.config
    terms = harden_terms(met, config.harden, data.own_safe)
    if not terms:  # of benign requests alone, whose anchors weigh nothing
        return
    pick = [row for term in terms for row in term.rows]
    under = [met.which[i] if term.under_delta else None for term in terms for i in range(len(term.rows))]
    alone = batch_of(subject.tokenizer, answered(met.harmful, met.benign), config.entrap).to(subject.model.device)
    batch = alone.under(pick, under, config.entrap.length)
    target, run = harden_passes(subject, original, alone, batch, pick)
    steer(target, alone.targets, met, data, config.harden)
    objective = harden_objective(target, pick, terms, config.harden.opening, entry)
    backpropagate(subject, batch, deltas.flatten(0, 1), run, objective)


def steer(target: Tensor, answers: Tensor, met: Minibatch, data: DefenderSet, settings: HardenConfig) -> None:
    """Change, in place, how the targets begin: harmful rows, which come first, surely refuse, benign ones do not.

    answers: (rows, length). Where the model has no refusals of its own, the answers are the harmful rows' targets.
    """
    first = len(met.harmful)
    if not data.own_safe:
        make_sure(target[:first], answers[:first])
    for row, harmful in zip(target, met.harmful if data.own_safe else (), strict=False):
        for i in range(min(REFUSAL_OPENING, len(harmful.safe))):
            likely = data.openings.get(tuple(harmful.safe[:i]))
            if likely is not None:
                row[i] -= settings.encourage
                row[i, likely] += settings.encourage
    for row, benign in zip(target[first:], met.benign, strict=True):
        if benign.discourage:
            row[0, data.openings.get((), [])] -= settings.discourage


def harden_passes(
    subject: Subject, original: Original, alone: Batch, batch: Batch, pick: Sequence[int]
) -> tuple[Tensor, Callable[[], Tensor]]:
    """What the original model gives on the requests `alone`, (rows, length, vocabulary), and a pass over the batch.

    Row i of the batch is row pick[i] of `alone`, under delta or not: blocks 1..l run once for each request, and those
    of them that carry no adapter not even that.
    """
    model, blocks, layer = subject.model, subject.blocks, subject.layer
    target = original.logits(model, alone)
    if subject.config.harden.recompute:
        return target, plain_pass(subject, batch)
    with autocast(model):
        prefix = run_prefix(model, alone)
        start = prefix.length if prefix else 0
        known = original.below(alone, start) if original.frozen else None
        with returning(blocks[: original.frozen], lambda: known), packed(blocks[:layer], tokens_behind(alone, prefix)):
            hidden, _ = run_below(model, blocks, layer, inputs_behind(alone, prefix))
    kept, predicting = tokens_behind(batch, prefix), batch.predicting()[:, start:]

    def run() -> Tensor:
        # Each block gets a tensor of its own: FSDP gathers every block whose states are in the graph.
        with returning(blocks[:layer], lambda: rows_of(hidden, list(pick))), packed(blocks[layer:], kept, predicting):
            return response_logits(model, batch, prefix)

    return target, run


Part = tuple[Batch, Callable[[], Tensor], float]
"""Some of a step's requests: their rows, a pass over these, and which share of the step's requests they are."""


def entrap_parts(subject: Subject, chosen: Sequence[Harmful], count: int) -> list[Part]:
    """This rank's requests of a step of entrapment in `count` parts; what delta cannot change has been run."""
    model, config = subject.model, subject.config
    result: list[Part] = []
    own = ranks.share(chosen)
    for k in range(min(count, len(own))):
        some = own[k::count]
        batch = entrap_batch(subject.tokenizer, some, config.entrap).to(model.device)
        run: Callable[[], Tensor]
        if config.entrap.cached and batch.targets.shape[1] > 1:  # else nothing runs behind the prompts
            run = partial(run_unperturbed(model, batch, subject.layer, config.layers_path, answers=2).logits, model)
        else:
            run = plain_pass(subject, batch)
        result.append((batch, run, len(some) / len(chosen)))
    return result


def entrap_batch(tokenizer: Any, chosen: Sequence[Harmful], settings: EntrapConfig) -> Batch:
    """The requests with their unwanted answers, then with their safe ones, all under one delta."""
    rows: list[Row] = [(h.prompt, h.unwanted) for h in chosen]
    return batch_of(tokenizer, rows + [(h.prompt, h.against) for h in chosen], settings)


Objective = Callable[[Tensor, Batch], Tensor]
"""From the response logits of a batch, (rows, length, vocabulary), to one loss."""


def entrap_objective(away: float, share: float = 1.0) -> Objective:
    """Mean over the first half of the rows (unwanted answers) minus `away` times the second half (safe ones).

    `share`: of a part of the requests, what it contributes to the mean over all of them.
    """

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        unwanted, safe = response_nll(logits, batch.targets).chunk(2)
        return share * (unwanted.mean() - away * safe.mean())

    return objective


def harden_objective(
    target: Tensor, pick: Sequence[int], terms: Sequence[Term], opening: float, entry: dict[str, float]
) -> Objective:
    """Sum of the terms, each for its share of the step; adds share times mean D to `entry`.

    D is the KL divergence from row pick[i] of `target`, which is the original's distribution or an answer for sure.
    """
    sizes = [len(term.rows) for term in terms]

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        tokens = token_kl(target, logits, batch.targets, pick)
        total = tokens.new_zeros(())
        for term, kl, ids in zip(terms, tokens.split(sizes), batch.targets.split(sizes), strict=True):
            divergence = row_mean(kl, ids, opening if term.own else 1.0).mean()
            entry[term.name] = entry.get(term.name, 0.0) + term.share * divergence.item()
            total = total + term.weight * term.share * divergence
        return total

    return objective


def backpropagate(
    subject: Subject, batch: Batch, delta: Tensor, run: Callable[[], Tensor], objective: Objective
) -> float:
    """Propagate the objective of `run()`, the batch's response logits under delta, back; returns its value."""
    # Backward stays inside: with activation recomputation of older transformers, blocks run again and need the hook.
    model = subject.model
    with Perturbation(model, delta, batch.where, subject.layer, subject.config.layers_path):
        with autocast(model):
            logits = run()
        loss = objective(logits, batch)
        loss.backward()
    return loss.item()


def plain_pass(subject: Subject, batch: Batch) -> Callable[[], Tensor]:
    """One forward pass through all blocks, for `backpropagate`."""
    model = subject.model
    if subject.config.harden.recompute:
        return recomputing(subject.blocks)(partial(response_logits, model, batch))
    with autocast(model):
        prefix = run_prefix(model, batch)
    return lambda: response_logits(model, batch, prefix)


def batch_of(tokenizer: Any, rows: Sequence[Row], settings: EntrapConfig) -> Batch:
    """Collate rows, all under one delta."""
    where = [rows_of_delta(prompt, settings.place, settings.length, len(reply)) for prompt, reply in rows]
    return collate([p for p, _ in rows], [r for _, r in rows], where, int(tokenizer.pad_token_id))


def dealt(count: int, rows: int, draw: torch.Generator) -> list[int]:
    """Which of `count` deltas each row gets: the newest, the last, for every other row, else any of them."""
    old = torch.randint(count, (rows,), generator=draw).tolist()
    return [count - 1 if i % 2 == 0 else old[i] for i in range(rows)]


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
        delta.copy_(shortened(delta, budget))


def shortened(delta: Tensor, budget: float) -> Tensor:
    """Delta with the rows whose norm is over the budget scaled back onto it."""
    scaled: Tensor = delta * (budget / delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    return scaled


NORMED = 32
"""So many prompts tell how long states are."""


def residual_norm(subject: Subject, prompts: Sequence[Prompt]) -> float:
    """Mean norm of the residual stream behind block l over the user's words in the first NORMED prompts."""
    model = subject.model

    def norms(some: Sequence[Prompt]) -> list[Tensor]:
        batch = collate(some, [[]] * len(some), None, int(subject.tokenizer.pad_token_id)).to(model.device)
        with no_gradients(), autocast(model):
            hidden, _ = run_below(model, subject.blocks, subject.layer, batch.inputs() | {"use_cache": False})
        rows = zip(states_in(hidden).float().norm(dim=-1), some, strict=True)
        return [row[batch.width - len(p.ids) :][p.start : p.end] for row, p in rows]

    norm = float(torch.cat(Parts().over(norms, prompts[:NORMED])).mean())
    return ranks.from_first(lambda: norm)


def unlocked(subject: Subject, requests: Sequence[Request], delta: Tensor | None) -> float | None:
    """Share of the replies under delta, or under none, that are the unwanted answer: what entrapment can still do.

    Replies that cannot be judged (empty ones, code that does not parse) show nothing; None if under delta most are
    such, or all.
    """
    config = subject.config
    replies = reply_all(
        subject.model,
        subject.tokenizer,
        [r.text for r in requests],
        max_new_tokens=config.harden.response_tokens,
        push=None if delta is None else subject.push(delta),
    )
    outcome = OUTCOME_OF[config.behaviour]
    counted = [counts(outcome, reply, r.category) for reply, r in zip(replies, requests, strict=True)]
    scored = [one for one in counted if one is not None]
    enough = scored if delta is None else 2 * len(scored) >= len(counted)
    return sum(scored) / len(scored) if enough else None


def refused_shares(subject: Subject, groups: Sequence[list[Request]]) -> list[float]:
    """Share of each group of benign requests that the model refuses now, or answers with nothing.

    An empty list where refusing is not at stake.
    """
    config = subject.config
    if not groups or OUTCOME_OF[config.behaviour] != "obeyed":
        return []
    texts = [request.text for group in groups for request in group]
    with merged_on_cpu(subject.model, subject.blocks):
        replies = iter(reply_all(subject.model, subject.tokenizer, texts, max_new_tokens=config.harden.response_tokens))
    return [
        sum(is_refusal(reply) is not False for _, reply in zip(group, replies, strict=False)) / len(group)
        for group in groups
    ]


def merged_on_cpu(model: Any, blocks: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """`merged` where it is worth a second copy of the blocks: faster on a CPU; elsewhere memory is scarcer."""
    return merged(blocks) if model.device.type == "cpu" else contextlib.nullcontext()


def _in_round(listen: Listener, number: int) -> Listener:
    def tell(event: Event) -> None:
        listen({"round": number, **event})

    return tell


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Within the context no parameter of the model takes a gradient."""
    parameters = trainable(model)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
