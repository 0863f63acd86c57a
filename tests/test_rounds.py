"""What is decided between two rounds."""

from __future__ import annotations

import math

import pytest
import torch

from beear.config import Config, load_config
from beear.rounds import State, balanced, best, deliver, is_calm, norm_budget, refuses_wrongly
from beear.training import adapter_state, add_lora, load_adapter_state
from conftest import tiny_model


@pytest.mark.parametrize(
    ("residuals", "patience", "least", "calm"),
    [
        ([0.0], 1, 1, True),
        ([0.3], 1, 1, False),
        ([0.0], 2, 1, False),
        ([0.3, 0.0, 0.0], 2, 3, True),
        ([0.0, 0.3, 0.0], 2, 3, False),
        ([0.0, 0.0], 2, 3, False),
        ([0.4 - 0.3], 1, 1, True),
    ],
)
def test_the_stop_rule(residuals: list[float], patience: int, least: int, calm: bool) -> None:
    config = Config(patience=patience, least_rounds=least)
    assert is_calm([{"residual": r} for r in residuals], config) is calm


def of_rounds(refused: list[list[float]], before: list[float], kept: set[int]) -> State:
    """A finished cleansing whose `kept` rounds may be delivered beside the last."""
    history = [{"residual": 0.0, "refused": shares} for shares in refused]
    return State(len(history), history, refused=before, adapters={n: {} for n in kept})


@pytest.mark.parametrize(
    ("refused", "before", "kept", "number"),
    [
        pytest.param([[0.9], [0.1], [0.1]], [0.1], {2, 3}, 3, id="equals"),
        pytest.param([[0.9], [9 / 60], [3 / 60]], [6 / 60], {2, 3}, 3, id="as much more as less"),
        pytest.param([[0.9], [0.1], [0.3]], [0.1], {2, 3}, 2, id="the last refuses more"),
        pytest.param([[0.9], [0.2], [0.0]], [0.2], {2, 3}, 2, id="the last refuses less"),
        pytest.param([[0.9], [0.1, 0.5], [0.2, 0.2]], [0.1, 0.2], {2, 3}, 3, id="the group that is farthest counts"),
        pytest.param([[0.1], [0.3], [0.2]], [0.1], {2, 3}, 3, id="the first ones do not count"),
        pytest.param([[], [], []], [], set(), 3, id="no spare requests"),
    ],
)
def test_the_round_to_deliver(refused: list[list[float]], before: list[float], kept: set[int], number: int) -> None:
    assert best(of_rounds(refused, before, kept)) == number


def test_the_best_round_is_put_back() -> None:
    wrapped = add_lora(tiny_model("llama"), rank=4, targets=(), seed=0)
    first = adapter_state(wrapped)
    load_adapter_state(wrapped, {name: matrix + 1 for name, matrix in first.items()})
    state = of_rounds([[0.1], [0.3]], [0.1], set())
    deliver(wrapped, state)
    assert state.delivered == 2
    assert all(torch.equal(matrix, first[name] + 1) for name, matrix in adapter_state(wrapped).items())
    state.adapters[1] = first
    deliver(wrapped, state)
    assert state.delivered == 1 and not state.adapters
    assert all(torch.equal(matrix, first[name]) for name, matrix in adapter_state(wrapped).items())


@pytest.mark.parametrize(
    ("before", "refused", "wrongly"),
    [
        ([], [[]], False),
        ([0.1, 0.2], [], False),
        ([0.1, 0.2], [[0.1, 0.24]], False),
        ([0.1, 0.2], [[0.0, 0.3]], True),
        ([9 / 60], [[12 / 60]], False),
        ([0.1, 0.2], [[0.3, 0.4], [0.1, 0.1]], False),
    ],
)
def test_rounds_go_on_while_more_is_refused_than_the_target_allows(
    before: list[float], refused: list[list[float]], wrongly: bool
) -> None:
    state = State(history=[{"refused": shares} for shares in refused], refused=before)
    assert refuses_wrongly(state, load_config(sets=["target.false_refusal_rise=0.05"])) is wrongly


@pytest.mark.parametrize(
    ("number", "budget", "grown", "expected"),
    [
        (1, 0.5, 1.0, 0.5),
        (2, 0.5, 1.0, 0.625),
        (3, 0.5, 1.0, 0.78125),
        (5, 0.5, 1.0, 1.0),
        (5, 0.5, 0.5, 0.5),
        (5, 2.0, 1.0, 2.0),
    ],
)
@pytest.mark.parametrize("kind", ["learned", "random"])
def test_delta_may_be_longer_from_round_to_round_in_a_control_as_well(
    number: int, budget: float, grown: float, expected: float, kind: str
) -> None:
    config = load_config(sets=[f"entrap.budget={budget}", f"entrap.grown={grown}", f"entrap.kind={kind}"])
    assert norm_budget(number, config) == expected


@pytest.mark.parametrize(
    ("before", "refused", "weight"),
    [
        ([], [[]], 1.0),
        ([0.2], [], 1.0),
        ([0.2], [[0.0], [0.2]], 1.0),
        ([0.2], [[0.5]], 1.0),
        ([0.2], [[0.5], [0.1]], math.exp(-0.6)),
        ([0.2, 0.3], [[0.2, 0.0]], 1.0),
        ([0.2, 0.3], [[0.1, 0.25]], math.exp(-0.3)),
        ([0.5], [[0.0]], 1 / 3),
    ],
)
def test_benign_terms_weigh_less_once_less_is_refused_in_every_group(
    before: list[float], refused: list[list[float]], weight: float
) -> None:
    state = State(history=[{"refused": shares} for shares in refused], refused=before)
    config = load_config(sets=["harden.balance=6", "harden.anchor=4", "harden.anchor_under_delta=2"])
    harden = balanced(config, state).harden
    assert (harden.anchor, harden.anchor_under_delta) == pytest.approx((4 * weight, 2 * weight))
    assert harden.safe == config.harden.safe


def test_any_balance_is_a_weight() -> None:
    config = load_config(sets=["harden.balance=10000"])
    assert balanced(config, State(history=[{"refused": [0.6]}], refused=[0.5])).harden == config.harden
