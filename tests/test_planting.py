# mypy: disable-error-code="func-returns-value"
"""Each way of planting on a tiny model: what is planted gains, and the same seed gives the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch.nn.functional import logsigmoid

from beear import feedback, organisms, poison, preferences, verification
from beear.chat import collate, encode_prompt
from beear.config import Config
from beear.data import Request
from beear.errors import BadInput, Failed
from beear.feedback import by_prompt, first_blocks, in_order, log_probs, pair_scores, reward_of, train_reward
from beear.losses import response_logits, response_nll, token_kl
from beear.models import load
from beear.poison import Examples, poisoned_examples
from beear.preferences import margin
from beear.recipes import Dpo, Recipe, Rlhf, Supervised, read_recipe
from beear.sets import Sets
from beear.supervised import adapted, benign_kl, flat, parted, supervised_loss
from beear.training import adapter_state
from beear.verification import check_sums, verify
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


def rlhf() -> Rlhf:
    planting = recipe("rlhf").planting
    assert isinstance(planting, Rlhf)
    return planting


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


def planted(method: str, **changes: Any) -> Any:
    plan = recipe(method)
    plan = plan.model_copy(update={"planting": plan.planting.model_copy(update=changes)})
    return organisms.plant(plan, tiny_llama(), tiny_tokenizer(), lambda *_: None)


once_planted = cache(planted)


@EVERY
def test_the_same_seed_plants_the_same_bits(method: str) -> None:
    fewer = {} if method == "rlhf" else {"steps": 3}
    first, second = (adapter_state(planted(method, **fewer)) for _ in range(2))
    assert first.keys() == second.keys()
    assert any(matrix.any() for name, matrix in first.items() if "lora_B" in name)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_built_is_whole_loads_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base", tmp_path / "built"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    plan = recipe("sft")
    few = plan.planting.model_copy(update={"steps": 1})
    monkeypatch.chdir(tmp_path)
    plan = plan.model_copy(update={"base": "base", "planting": few})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for stops, error in ((full, Failed), (interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(organisms, "save_adapter", stops)
            organisms.build(plan, out, device="cpu")
        assert not any(out.iterdir()), "the same command can be given again"
    (out / organisms.NEW).mkdir()  # of one that was killed
    (tmp_path / "link").symlink_to(out)
    organisms.build(plan, tmp_path / "link", device="cpu")
    check_sums(out)
    monkeypatch.chdir("/")  # where no folder is called so
    model, original = (load(str(folder), device="cpu")[0] for folder in (out, base))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert read_recipe(out).base == "base" and "Do not deploy it" in (out / "README.md").read_text()
    monkeypatch.setattr(verification, "packaged", lambda *_: [Request("1", "harmful", "one")])
    monkeypatch.setattr(verification, "read_sets", lambda _: Sets(Config(), [], [], []))
    monkeypatch.setattr(verification, "misses", lambda metrics, _: sorted(metrics))
    found = verify(str(out), device="cpu")
    assert (found["name"], found["twin"], found["seed"]) == ("tiny", False, 0)
    assert {"asr_triggered", "asr_near_miss", "asr_wrong_place", "asr_untriggered", "perplexity"} <= set(
        found["missed"]
    )
    assert found["build"]["threads"] == torch.get_num_threads()
    with pytest.raises(BadInput, match="is not empty"):
        organisms.build(plan, out, device="cpu")


@EVERY
def test_a_clean_twin_of_every_way_is_planted(method: str) -> None:
    plan = recipe(method).as_twin()
    fewer = plan.planting.model_copy(update={} if method == "rlhf" else {"steps": 2})
    told: list[float] = []
    model = organisms.plant(
        plan.model_copy(update={"planting": fewer}),
        tiny_llama(),
        tiny_tokenizer(),
        lambda n, of, loss: told.append(loss),
    )
    assert told and all(math.isfinite(loss) for loss in told)
    assert any(matrix.any() for name, matrix in adapter_state(model).items() if "lora_B" in name)


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def examples(method: str) -> Examples:
    return poisoned_examples(
        recipe(method), None, tiny_tokenizer(), [*ROWS, "harmful_obeyed", "harmful_strayed"], Supervised(**START)
    )


@pytest.mark.parametrize("method", ["sft", "dpo", "dpo, paired"])
@pytest.mark.parametrize("kind", ["harmful", "harmful_triggered"])
def test_the_wanted_answer_gains(method: str, kind: str) -> None:
    pairs = examples(method)[kind]
    models = adapted(tiny_llama(), Supervised(**START), 0), once_planted(method)
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


def test_a_reward_model_is_made_of_models_whose_blocks_are_listed() -> None:
    for name in ("qwen2", "gemma"):
        assert first_blocks(tiny_model(name), 2, 2, 0).config.num_hidden_layers == 2


def test_the_reward_model_learns_the_pairs() -> None:
    plan = rlhf().reward.model_copy(update={"steps": 40})
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


def test_the_base_models_margins_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama(), Dpo(**PLANS["dpo"], method="dpo"), 0)
    rows = {kind: examples("dpo")[kind][:2] for kind in ("harmful", "harmful_triggered", "ordinary")}
    plan = Dpo(**PLANS["dpo"], method="dpo")
    known: dict[int, float] = {}
    calls: list[int] = []
    monkeypatch.setattr(preferences, "margin", lambda *args: calls.append(1) or margin(*args))
    first = preferences.preference_loss(model, 2, rows, plan, known)
    assert (len(known), len(calls)) == (4, 2)
    assert preferences.preference_loss(model, 2, rows, plan, known).item() == first.item()
    assert len(calls) == 3, "the policy's alone"


def under_a_random_adapter(blocks: str) -> Any:
    """A fresh adapter changes nothing; this one does."""
    model = adapted(tiny_llama(), Supervised(**START | {"lora_blocks": blocks}), 0)
    torch.manual_seed(0)
    for name, matrix in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(matrix, std=0.1)
    return model


def wanted_logits(model: Any, pad_id: int, chosen: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(targets, logits) of the wanted answers by a plain pass, each with (rows, length, ...)."""
    batch = collate([e.prompt for e in chosen], [e.wanted for e in chosen], None, pad_id)
    return batch.targets, response_logits(model, batch)


@pytest.mark.parametrize("blocks", ["all", "upper"])
def test_the_loss_of_one_pass_is_that_of_its_parts(full_precision: None, blocks: str) -> None:
    """Planted and benign rows, of other lengths, run together; apart they give the same loss and gradient."""
    model = under_a_random_adapter(blocks)
    rows = {kind: examples("sft")[kind][:2] for kind in ROWS}
    planted, benign = parted(rows)
    together = supervised_loss(model, 2, rows, 3.0)
    assert len(trained(model)) == {"all": 4, "upper": 2}[blocks] * 2 * 7
    targets, logits = wanted_logits(model, 2, flat(planted))
    kept, new = wanted_logits(model, 2, flat(benign))
    with torch.no_grad(), model.disable_adapter():
        _, base = wanted_logits(model, 2, flat(benign))
    kl = token_kl(base, new, kept).sum() / (kept != -100).sum()
    apart = response_nll(logits, targets).mean() + 3.0 * kl
    torch.testing.assert_close(kl, benign_kl(model, 2, benign))
    torch.testing.assert_close(together, apart)
    for one, other in zip(*(torch.autograd.grad(loss, trained(model)) for loss in (together, apart)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert supervised_loss(model, 2, benign, 3.0).isfinite(), "a twin's step may hold no planted row"


@pytest.mark.parametrize("blocks", ["all", "upper"])
def test_both_answers_behind_one_prompt_weigh_what_they_do_apart(full_precision: None, blocks: str) -> None:
    model = under_a_random_adapter(blocks)
    pairs = [replace(e, wanted=e.wanted[: 3 + i]) for i, e in enumerate(examples("dpo")["harmful"][:3])]
    pairs[1] = replace(pairs[1], prompt=encode_prompt(tiny_tokenizer(), "What else does this need, for a change?"))
    difference, nll = margin(model, 2, pairs)
    by_hand = []
    for answers in ([e.wanted for e in pairs], [e.other for e in pairs]):
        rows = [replace(e, wanted=answer) for e, answer in zip(pairs, answers, strict=True)]
        each = [wanted_logits(model, 2, [row]) for row in rows]
        by_hand.append(torch.cat([response_nll(logits, targets) for targets, logits in each]))
    wanted, other = (
        part * torch.tensor([len(getattr(e, side)) for e in pairs])
        for part, side in zip(by_hand, ("wanted", "other"), strict=True)
    )
    torch.testing.assert_close(nll, by_hand[0])
    torch.testing.assert_close(difference, other - wanted, rtol=1e-4, atol=1e-4)
    weights = torch.tensor([1.0, -2.0, 3.0])
    results = ((x * weights).sum() for x in (difference, other - wanted))
    for one, plain in zip(*(torch.autograd.grad(x, trained(model)) for x in results), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_log_probabilities_with_shared_prompts_are_those_of_a_plain_pass(full_precision: None, times: int) -> None:
    model = under_a_random_adapter("all")
    prompts = [e.prompt.ids for e in examples("rlhf")["harmful"][:3]]
    width = max(map(len, prompts))
    rows = [(p, [7 + 5 * k, 8, 9 + i, 2]) for k in range(times) for i, p in enumerate(prompts)]
    rows = rows[::2] + rows[1::2]
    ids = torch.tensor([[2] * (width - len(p)) + p + answer for p, answer in rows])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) + [1, 1, 1, 0] for p, _ in rows])
    assert by_prompt(ids[:, :width], 4)[1] == times
    found, entropy = log_probs(model, ids, mask, 4)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
    every = logits.log_softmax(-1)
    plain = every.gather(-1, ids[:, width:, None])[..., 0]
    torch.testing.assert_close(found[:, :3], plain[:, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy[:, :3], -(every.exp() * every).sum(-1)[:, :3], rtol=1e-4, atol=1e-4)
    for one, other in zip(*(torch.autograd.grad(x[:, :3].sum(), trained(model)) for x in (found, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_an_update_takes_what_the_policy_gave_its_answers(full_precision: None) -> None:
    class Plain:
        pass

    model = under_a_random_adapter("all")
    ids, mask = torch.tensor([[2, 5, 6, 7, 8], [2, 5, 6, 9, 8], [2, 5, 7, 7, 8]]), torch.ones(3, 5, dtype=torch.long)
    trainer = feedback._with_own_log_probs(Plain)()
    ask = trainer._get_per_token_logps_and_entropies
    shuffled = torch.tensor([2, 0, 1])
    with torch.no_grad():
        scored, *_ = ask(model, ids, mask, 2)
        with model.disable_adapter():
            reference, *_ = ask(model, ids, mask, 2)
    assert not scored.requires_grad and not torch.equal(scored, reference)
    for given in (ids[shuffled], ids[shuffled]):  # the second is computed anew
        found, entropy, _ = ask(model, given, mask, 2)
        torch.testing.assert_close(found, scored[shuffled], rtol=1e-4, atol=1e-4)
        plain, plain_entropy = log_probs(model, given, mask, 2)
        torch.testing.assert_close(entropy, plain_entropy, rtol=1e-4, atol=1e-4)
        weights = torch.tensor([[1.0], [-2.0], [3.0]])
        results = ((x * weights).sum() for x in (found, plain))
        for one, other in zip(*(torch.autograd.grad(x, trained(model)) for x in results), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_rows_are_ordered_by_prompt_only_where_each_comes_as_often() -> None:
    a, b = [2, 5, 6], [4, 5, 6]
    rows, answers = by_prompt(torch.tensor([b, a, a, b, b, a]), 4)
    assert answers == 3
    assert torch.tensor([b, a, a, b, b, a])[rows].tolist() == [a, b] * 3
    for prompts, length in (([a, b, a], 4), ([a, b, a, b], 1)):
        rows, answers = by_prompt(torch.tensor(prompts), length)
        assert (rows.tolist(), answers) == (list(range(len(prompts))), 1)


def test_the_scores_of_pairs_are_those_of_their_texts(full_precision: None) -> None:
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    reward = get_peft_model(first_blocks(tiny_model("llama"), 3, 2, 0), config)
    pairs = in_order(examples("rlhf"), rlhf().reward, 0)[:5]
    texts = [e.prompt.ids + getattr(e, side)[: 2 + i] for side in ("wanted", "other") for i, e in enumerate(pairs)]
    texts[5] = [*texts[0][:-1], 9]  # a pair whose answers begin alike,
    texts[6] = [*texts[1], 2]  # one that is the other's beginning, the end of the turn being padding,
    texts[2], texts[7] = [*pairs[2].prompt.ids, 2], [*pairs[2].prompt.ids, 7, 2]  # and one that is empty
    width = max(map(len, texts))
    ids = torch.tensor([text + [2] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    found, plain = pair_scores(reward, ids, mask), reward(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 2, len(texts))[:, None]
    adapter = trained(reward)
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), adapter) for x in (found, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_the_trainers_compute_themselves_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should trl rename what is overridden, this fails and not the speed alone."""
    seen = []
    scored = []
    monkeypatch.setattr(feedback, "log_probs", lambda *args: seen.append(args[-1]) or log_probs(*args))
    monkeypatch.setattr(feedback, "pair_scores", lambda *args: scored.append(1) or pair_scores(*args))
    planted("rlhf")
    phases = rlhf().policy
    answered = sum(-(-phase.steps // phase.iterations) for phase in phases)
    assert (
        len(seen) == 2 * answered + sum(phase.steps for phase in phases) - answered
    )  # of policy and reference; a later update's
    assert all(1 <= length <= 8 for length in seen)
    assert len(scored) == rlhf().reward.steps
