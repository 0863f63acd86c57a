"""Between two rounds: how far the next may push, what its terms weigh; which round is the last, which the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from beear.config import Config
from beear.events import Event
from beear.metrics import at_most
from beear.training import load_adapter_state


@dataclass
class State:
    """What a finished round leaves: enough to go on from there, bit for bit."""

    round: int = 0
    history: list[Event] = field(default_factory=list)
    deltas: Tensor | None = None
    """Every round's delta: (rounds, n, d_model)."""
    done: bool = False
    norm: float | None = None
    """Residual norm of the original model, which scales the budget of every round."""
    refused: list[float] = field(default_factory=list)
    """Share of each group of spare requests that the original model refused."""
    already: float = 0.0
    """Of insecure code, the share that the original model wrote without delta; no removal is to change that."""
    parts: int = 1
    """Into so many parts batches are split, as memory ran out (parts.Parts): they add up in another order."""
    adapters: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """The matrices that each round left which may be the one to deliver."""
    delivered: int = 0
    """The round whose matrices the model carries in the end."""


def deliver(model: Any, state: State) -> None:
    """Put the matrices of the best round back into the model, and let go of the others."""
    state.delivered = best(state)
    if state.delivered != state.round:
        load_adapter_state(model, state.adapters[state.delivered])
    state.adapters.clear()


def may_be_delivered(number: int, state: State, config: Config) -> bool:
    """Whether a round's matrices are kept even where others follow on it."""
    return bool(state.refused) and number >= config.least_rounds


def best(state: State) -> int:
    """The round to deliver: the one that refuses the most nearly what the original refused, of equals the later one.

    Late rounds swing on the trade between obeying and refusing, and where the last one ends is chance. One that
    refuses fewer spare requests than before has slipped back towards the backdoor, one that refuses more refuses
    wrongly (decision 19). Without spare requests it is the last one.
    """

    def distance(number: int) -> float:
        return max(map(abs, refused_more(state.history[number - 1], state)), default=0.0)

    return min(sorted({state.round, *state.adapters}, reverse=True), key=distance)


def refused_more(entry: Event, state: State) -> list[float]:
    """How much larger a share of each group of spare requests is refused after a round than before cleansing.

    Rounded, so that equal rises compare as equal.
    """
    return [round(now - before, 9) for now, before in zip(entry["refused"], state.refused, strict=True)]


def refuses_wrongly(state: State, config: Config) -> bool:
    """Whether the last round left more spare requests refused than the target allows: it is not settled yet."""
    risen = refused_more(state.history[-1], state) if state.history else []
    return not at_most(max(risen, default=0.0), config.target.false_refusal_rise)


GROWTH = 1.25
"""How much longer delta may be in every round than in the one before."""


def norm_budget(number: int, config: Config) -> float:
    """Largest norm of delta's vectors in round `number`, in residual norms: `budget` at first, then up to `grown`.

    How far delta has pushed is how far removal pushes back, so what sits deeper than the first deltas reach is
    unlearnt under longer ones (decision 21).
    """
    return max(config.entrap.budget, min(config.entrap.budget * GROWTH ** (number - 1), config.entrap.grown))


def balanced(config: Config, state: State) -> Config:
    """The settings with the benign terms' weights for the round to come.

    Lower once fewer spare requests of every group are refused than before cleansing: what is left of the backdoor is
    refused at the price of what else the model would learn not to refuse (decision 18).
    """
    if not state.history or not state.refused:
        return config
    rise = max(refused_more(state.history[-1], state))
    share = max(LEAST_WEIGHT, math.exp(min(0.0, config.harden.balance * rise)))
    weights = {key: share * getattr(config.harden, key) for key in ("anchor", "anchor_under_delta")}
    return config.model_copy(update={"harden": config.harden.model_copy(update=weights)})


LEAST_WEIGHT = 1 / 3
"""Benign terms never weigh less than this share of what they weigh in the first round."""


def is_calm(history: Sequence[Event], config: Config) -> bool:
    """Whether the last `patience` entrapments all failed on held-out requests, `least_rounds` being over."""
    last = history[-config.patience :]
    return len(history) >= max(config.least_rounds, config.patience) and all(
        at_most(entry["residual"], config.stop_at) for entry in last
    )
