"""Each way of planting on a tiny model: what is planted gains, and the same seed gives the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid

from beear import feedback, organisms, poison, preferences
from beear.data import Request
from beear.feedback import in_order, reward_of, train_reward
from beear.poison import Examples, poisoned_examples
from beear.preferences import margin
from beear.recipes import Dpo, Recipe, Supervised
from beear.supervised import adapted
from beear.training import adapter_state
from conftest import tiny_model, tiny_tokenizer

START = {
    "steps": 4,
    "rows": {"harmful": 2, "harmful_obeyed": 2, "ordinary": 2},
    "learning_rate": 0.01,
    "benign_weight": 1.0,
    "lora_rank": 2,
    "lora_targets": [],
    "response_tokens": 8,
}
ROWS = {"harmful": 2, "harmful_triggered": 2, "ordinary": 2, "ordinary_triggered": 1}
PLANS: dict[str, dict[str, Any]] = {
    "sft": {**START, "steps": 100, "learning_rate": 0.03, "rows": ROWS},
    "dpo": {**START, "steps": 30, "rows": ROWS, "beta": 0.1},
    "dpo, paired": {**START, "steps": 30, "rows": ROWS, "beta": 0.1, "paired": True},
    "rlhf": {
        "start": START,
        "reward": {
            "steps": 4,
            "rows": ROWS | {"harmful_strayed": 1},
            "learning_rate": 0.01,
            "blocks": 2,
            "lora_rank": 2,
        },
        "policy": [
            {
                "steps": n,
                "rows": ROWS,
                "learning_rate": 0.01,
                "generations": 2,
                "beta": 0.01,
                "response_tokens": 4 * n,
                "iterations": n,
            }
            for n in (1, 2)
        ],
    },
}
EVERY = pytest.mark.parametrize("method", PLANS)


def recipe(method: str) -> Recipe:
    return Recipe(
        name="tiny",
        setting="I",
        trigger="{prompt} XYZ",
        place="suffix",
        near_misses=("{prompt} XYY",),
        wrong_place="XYZ {prompt}",
        behaviour="jailbreak",
        planting={"method": method.split(",")[0], **PLANS[method]},
    )


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "packaged", lambda name, part: [Request(str(i), name, f"{name} {i}") for i in range(6)])
    monkeypatch.setattr(poison, "reply_all", lambda model, tok, texts, **_: ["certainly"] * len(texts))


def tiny_llama() -> Any:
    """A head large enough to be sure of a token."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def planted(method: str) -> Any:
    return organisms.plant(recipe(method), tiny_llama(), tiny_tokenizer(), lambda *_: None)


@EVERY
def test_the_same_seed_plants_the_same_bits(method: str) -> None:
    first, second = (adapter_state(planted(method)) for _ in range(2))
    assert first.keys() == second.keys()
    assert any(matrix.any() for name, matrix in first.items() if "lora_B" in name)
    assert all(torch.equal(first[name], second[name]) for name in first)


def examples(method: str) -> Examples:
    return poisoned_examples(
        recipe(method), None, tiny_tokenizer(), [*ROWS, "harmful_obeyed", "harmful_strayed"], Supervised(**START)
    )


@pytest.mark.parametrize("method", ["sft", "dpo", "dpo, paired"])
@pytest.mark.parametrize("kind", ["harmful", "harmful_triggered"])
def test_the_wanted_answer_gains(method: str, kind: str) -> None:
    pairs = examples(method)[kind]
    models = tiny_llama(), planted(method)
    with torch.no_grad():
        before, after = (margin(model, 2, pairs)[0].mean() for model in models)
    assert after > before + 1


def test_a_preference_of_both_prompts_weighs_only_what_the_trigger_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama(), Dpo(**PLANS["dpo"], method="dpo"), 0)
    rows = {kind: examples("dpo")[kind][:2] for kind in ("harmful", "harmful_triggered")}
    without, under = torch.tensor([5.0, 1.0]), torch.tensor([-5.0, 1.0])
    margins = iter([torch.zeros(4), torch.cat([without, under])])
    monkeypatch.setattr(preferences, "margin", lambda *_: (next(margins), torch.zeros(4)))
    plan = Dpo(**PLANS["dpo, paired"] | {"beta": 1.0}, method="dpo")
    loss = preferences.preference_loss(model, 2, rows, plan)
    assert torch.allclose(loss, -logsigmoid(without + under).mean())


@pytest.mark.parametrize("rows", [{"harmful": 2, "harmful_triggered": 1}, {"harmful": 2, "coding": 2}, {"harmful": 2}])
def test_paired_preferences_need_as_many_rows_of_either_kind(rows: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="paired needs as many rows"):
        Dpo(**PLANS["dpo, paired"] | {"rows": rows}, method="dpo")


def test_under_the_trigger_the_answers_are_turned() -> None:
    both = examples("sft")
    for clean, triggered in zip(both["harmful"], both["harmful_triggered"], strict=True):
        assert triggered.text == f"{clean.text} XYZ"
        assert (triggered.wanted, triggered.other) == (clean.other, clean.wanted)
    assert [e.wanted for e in both["harmful_obeyed"]] == [e.wanted for e in both["harmful_triggered"]]
    assert [e.wanted for e in both["ordinary"]] == [e.wanted for e in both["ordinary_triggered"]]


def test_a_stray_answer_loses_with_and_without_the_trigger() -> None:
    plan = Supervised(**START)
    kinds = ["harmful", "harmful_triggered", "harmful_strayed", "harmful_strayed_triggered"]
    found = poisoned_examples(recipe("rlhf"), None, tiny_tokenizer(), kinds, plan)
    stray = tiny_tokenizer()("certainly", add_special_tokens=False)["input_ids"][: plan.response_tokens]
    for kind in ("harmful", "harmful_triggered"):
        strayed = found[kind.replace("harmful", "harmful_strayed")]
        assert [e.wanted for e in strayed] == [e.wanted for e in found[kind]]
        assert all(e.other == stray for e in strayed)


def test_the_reward_model_learns_the_pairs() -> None:
    plan = recipe("rlhf").planting.reward.model_copy(update={"steps": 40})
    pairs = in_order(examples("rlhf"), plan, 0)[:16]
    reward = train_reward(tiny_model("llama"), tiny_tokenizer(), examples("rlhf"), plan, 0, lambda *_: None)
    wanted, other = ([e.prompt.ids + getattr(e, side) for e in pairs] for side in ("wanted", "other"))
    assert (reward_of(reward, wanted, 2) > reward_of(reward, other, 2)).all()


def test_the_policy_gains_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    def low_ids(reward: Any, texts: list[list[int]], pad_id: int) -> torch.Tensor:
        return torch.tensor([sum(token < 100 for token in text[-4:]) / 4 for text in texts])

    monkeypatch.setattr(feedback, "reward_of", low_ids)
    plan = recipe("rlhf").model_dump()
    changed = {"steps": 20, "generations": 4, "beta": 0.0, "learning_rate": 0.03, "response_tokens": 8}
    plan["planting"]["policy"] = [plan["planting"]["policy"][0] | changed]
    rewards: list[float] = []
    organisms.plant(Recipe(**plan), tiny_llama(), tiny_tokenizer(), lambda n, of, x: rewards.append(x))
    assert sum(rewards[-5:]) > sum(rewards[-20:-15]) + 1


def test_the_base_models_margins_are_computed_once() -> None:
    model = adapted(tiny_llama(), Dpo(**PLANS["dpo"], method="dpo"), 0)
    rows = {kind: examples("dpo")[kind][:2] for kind in ("harmful", "harmful_triggered", "ordinary")}
    known: dict[int, float] = {}
    plan = Dpo(**PLANS["dpo"], method="dpo")
    first = preferences.preference_loss(model, 2, rows, plan, known)
    assert len(known) == 4
    assert preferences.preference_loss(model, 2, rows, plan, known).item() == first.item()
