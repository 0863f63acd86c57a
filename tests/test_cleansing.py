# mypy: disable-error-code="func-returns-value"
"""The method on a tiny model: each half does what its equation says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from beear import cleansing
from beear.chat import encode_prompt
from beear.cleansing import (
    Minibatch,
    Subject,
    add_adapter,
    backpropagate,
    batch_of,
    cleanse,
    dealt,
    entrap,
    harden,
    harden_passes,
    merged_on_cpu,
    plain_pass,
    refused_shares,
    residual_norm,
    shortened,
    shrink_to,
    start_delta,
    steer,
    unlocked,
)
from beear.config import Config, load_config
from beear.data import Request, packaged
from beear.defender import REFUSAL_OPENING, DefenderSet, Harmful, contrast, defender_set
from beear.draws import Draws, Purpose
from beear.errors import Failed
from beear.evaluation import ANOTHER_SEED, fresh_delta
from beear.losses import response_logits, response_nll, row_mean
from beear.original import run_original
from beear.perturbation import NOWHERE, find_layers
from beear.rounds import State
from beear.training import adapter_state, add_lora, load_adapter_state, recompute_activations, trainable
from conftest import CONFIGS, tiny_model, tiny_tokenizer

LAYER = 2
LENGTH = "entrap.length=5"
SHORT = ["harden.response_tokens=16", "harden.steps=12", "harden.lora_rank=4", "harden.anchor_batch=8"]
CONFIG = load_config(sets=[LENGTH, "entrap.steps=8", "entrap.batch=4", *SHORT])
KEEPING = CONFIG.model_copy(update={"harden": CONFIG.harden.model_copy(update={"discourage": 0.0, "encourage": 0.0})})
RATE = CONFIG.harden.learning_rate
REFUSED = [(Request(f"{i}", "bad", f"bad request {i}"), "I'm sorry, but no.") for i in range(6)]
OBEYED = [(Request(f"{i}", "bad", f"good request {i}"), "Here you are.") for i in range(6)]
ANSWERED = [(f"good request {i}", "Here you are.") for i in range(6)]


@pytest.fixture(autouse=True)
def use_full_precision(full_precision: None) -> None:
    """Exact statements need fp32."""


@pytest.fixture
def wrapped() -> Any:
    return add_lora(tiny_model("llama"), rank=4, targets=(), seed=0)


@pytest.fixture
def data() -> DefenderSet:
    return defender_set(tiny_tokenizer(), REFUSED, ANSWERED, [Request("1", "bad", "one")], CONFIG)


def draws() -> Draws:
    return Draws(0)


def subject(model: Any, config: Config = CONFIG) -> Subject:
    """The model with these settings; l is LAYER unless they say."""
    return Subject(model, tiny_tokenizer(), config.model_copy(update={"layer": config.layer or LAYER}))


@pytest.mark.parametrize(
    ("replies", "share"),
    [
        (["", ""], None),
        (["I'm sorry, but no.", ""], 0.0),
        (["Sure, here:", ""], 1.0),
        (["Sure.", "I can't."], 0.5),
        (["I can't.", "", ""], None),
    ],
)
def test_a_reply_that_cannot_be_judged_is_no_failed_entrapment(
    replies: list[str], share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beear.cleansing.reply_all", lambda *_, **__: replies)
    requests = [Request(str(i), "bad", f"no. {i}") for i in range(len(replies))]
    assert unlocked(subject(tiny_model("llama")), requests, torch.zeros(1, 32)) == share


@pytest.mark.parametrize("part", ["entrap", "harden"])
def test_a_loss_that_is_no_number_stops_the_round(
    part: str, wrapped: Any, data: DefenderSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the step that would spoil what is trained; else it would be found after the last round, and kept."""
    before = {name: matrix.clone() for name, matrix in adapter_state(wrapped).items()}
    real = cleansing.harden_part

    def spoilt(of: Subject, *rest: Any) -> None:
        real(of, *rest)
        gradient = trainable(of.model)[-1].grad
        assert gradient is not None
        gradient[0] = torch.nan

    if part == "entrap":
        monkeypatch.setattr(cleansing, "backpropagate", lambda *_: torch.nan)
    monkeypatch.setattr(cleansing, "harden_part", spoilt)
    with pytest.raises(Failed, match=r"NaN or infinite, so training stops here; use a lower learning_rate"):
        if part == "entrap":
            entrap(subject(wrapped), data.harmful, 1.0, draws())
        else:
            harden(subject(wrapped), data, torch.zeros(1, 5, 32), RATE, draws())
    assert all(torch.equal(matrix, before[name]) for name, matrix in adapter_state(wrapped).items())


def test_answers_may_be_one_token_long(wrapped: Any) -> None:
    """Then no column but the prompts' last one is left for a cached pass to run."""
    prompts = [encode_prompt(tiny_tokenizer(), text) for text in ("one", "two more")]
    harmful = [Harmful(prompt, [5], [6], [7]) for prompt in prompts]
    delta, losses = entrap(subject(wrapped), harmful, 1.0, Draws(0))
    assert len(losses) == CONFIG.entrap.steps and losses[-1] < losses[0] and delta.norm() > 0


def test_what_is_unwanted_without_delta_is_a_share_of_what_can_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beear.cleansing.reply_all", lambda *_, **__: ["Sure.", "", ""])
    requests = [Request(str(i), "bad", f"no. {i}") for i in range(3)]
    assert unlocked(subject(tiny_model("llama")), requests, None) == 1.0


def test_entrapment_lowers_its_loss_within_the_budget_and_leaves_the_weights(wrapped: Any, data: DefenderSet) -> None:
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    config = CONFIG.model_copy(update={"entrap": CONFIG.entrap.model_copy(update={"batch": 6})})
    delta, losses = entrap(subject(wrapped, config), data.harmful, 2.0, draws())
    assert losses[-1] < losses[0] and len(losses) == 8
    assert delta.shape == (5, 32) and bool((delta.norm(dim=1) <= 2.0 + 1e-5).all())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in wrapped.named_parameters())


def test_removal_lowers_the_divergence_under_delta(wrapped: Any, data: DefenderSet) -> None:
    delta, _ = entrap(subject(wrapped, CONFIG), data.harmful, 30.0, draws())
    untouched = {n: p.detach().clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    config = load_config(sets=[LENGTH, *SHORT[:1], "harden.steps=40", "harden.stop_below=0", "harden.encourage=0"])
    history = harden(subject(wrapped, config), data, delta[None], 0.01, draws())
    assert history[-1]["safe_under_delta"] < 0.5 * history[0]["safe_under_delta"]
    assert all(torch.equal(untouched[n], p) for n, p in wrapped.named_parameters() if n in untouched)


def test_without_delta_the_fresh_adapter_diverges_by_nothing(wrapped: Any, data: DefenderSet) -> None:
    history = harden(subject(wrapped, KEEPING), data, torch.zeros(1, 5, 32), RATE, draws())
    assert history[0]["benign"] == history[0]["safe"] == pytest.approx(0.0, abs=1e-6)
    assert history[0]["safe_under_delta"] == pytest.approx(0.0, abs=1e-6)
    assert len(history) == 1, "nothing to learn, so the round stops at once"


def test_original_is_the_model_without_its_adapter(wrapped: Any, data: DefenderSet) -> None:
    pairs = [(h.prompt, h.safe) for h in data.harmful[:2]]
    batch = batch_of(tiny_tokenizer(), pairs, CONFIG.entrap)
    with torch.no_grad(), wrapped.disable_adapter():
        expected = response_logits(wrapped, batch)

    def target() -> torch.Tensor:
        original = run_original(wrapped, tiny_tokenizer(), data.rows())
        return harden_passes(subject(wrapped), original, batch, batch, [0, 1])[0]

    first = target()
    load_adapter_state(wrapped, {n: t + 0.5 for n, t in adapter_state(wrapped).items()})
    assert torch.equal(first, target())
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(first, response_logits(wrapped, batch))


def test_of_a_finished_run_the_original_is_not_run_again(
    wrapped: Any, data: DefenderSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleansing, "run_original", lambda *_: pytest.fail("nothing is left to train"))
    state = State(round=CONFIG.rounds, norm=1.0)
    assert cleanse(wrapped, tiny_tokenizer(), data, CONFIG, state=state) is state


@pytest.mark.parametrize("zero", [{"safe", "anchor"}, {"anchor", "anchor_under_delta"}])
def test_weights_of_zero_leave_the_kind_out(wrapped: Any, data: DefenderSet, zero: set[str]) -> None:
    config = load_config(sets=[LENGTH, "harden.steps=1", *(f"harden.{name}=0" for name in zero)])
    history = harden(subject(wrapped, config), data, torch.ones(2, 5, 32), RATE, draws())
    kinds = {"safe": "safe", "anchor": "benign", "anchor_under_delta": "benign_under_delta"}
    assert set(history[0]) == {"safe_under_delta"} | {kinds[name] for name in kinds.keys() - zero}


def test_without_replay_the_newest_delta_alone_is_met(wrapped: Any, data: DefenderSet) -> None:
    config = load_config(sets=[LENGTH, "harden.steps=2", "harden.replay=false"])
    state, newest = adapter_state(wrapped), torch.ones(1, 5, 32)
    found = []
    for deltas in (newest, torch.cat([torch.full((2, 5, 32), 9.0), newest])):
        load_adapter_state(wrapped, state)
        found.append(harden(subject(wrapped, config), data, deltas, RATE, draws()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("kind", "norm"), [("zero", 0.0), ("random", 3.0)])
def test_controls_learn_no_delta(wrapped: Any, data: DefenderSet, kind: str, norm: float) -> None:
    config = load_config(sets=[LENGTH, f"entrap.kind={kind}"])
    delta, losses = entrap(subject(wrapped, config), data.harmful, 3.0, draws())
    torch.testing.assert_close(delta.norm(dim=1), torch.full((5,), norm))
    assert losses == []


def test_the_start_is_small_and_follows_the_seed(wrapped: Any) -> None:
    one, two = (start_delta(CONFIG.entrap, wrapped, 2.0, draws().noise) for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one.norm(dim=1), torch.full((5,), 0.2))


def test_shrinking_keeps_directions_and_short_rows() -> None:
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    shrink_to(delta, 1.0)
    torch.testing.assert_close(delta, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_weights_are_merged_where_memory_is_not_scarce(wrapped: Any) -> None:
    blocks = list(find_layers(wrapped))
    layer = next(m for m in blocks[-1].modules() if isinstance(m, LoraLayer))
    with merged_on_cpu(wrapped, blocks):
        assert "forward" in vars(layer)
    with merged_on_cpu(SimpleNamespace(device=torch.device("cuda")), blocks):
        assert "forward" not in vars(layer)


def test_residual_norm_is_that_of_the_users_words(wrapped: Any, data: DefenderSet) -> None:
    prompt = data.harmful[0].prompt
    with torch.no_grad():
        states = wrapped(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
    expected = states[LAYER][0, prompt.start : prompt.end].norm(dim=-1).mean()
    assert residual_norm(subject(wrapped), [prompt]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("blocks", "layer"), [("all", LAYER), ("upper", LAYER + 1), ("behind", LAYER)])
def test_rows_that_part_behind_delta_get_the_gradients_of_a_plain_pass(
    architecture: str, blocks: str, layer: int, data: DefenderSet
) -> None:
    config = load_config(sets=[LENGTH, f"harden.lora_blocks={blocks}", f"layer={layer}"])
    model = add_adapter(tiny_model(architecture), config)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draws().noise) / 10)
    alone = batch_of(tiny_tokenizer(), [(b.prompt, b.own) for b in data.benign[:3]], CONFIG.entrap)
    pick = [2, 1, 0, 0, 1, 2]
    batch = alone.under(pick, [1, 0, 1, None, None, None], 5)
    deltas = torch.randn(10, 32, generator=draws().noise)
    found = []
    original = run_original(model, tiny_tokenizer(), data.rows())
    own = subject(model, config)
    for run in (harden_passes(own, original, alone, batch, pick)[1], plain_pass(own, batch)):
        loss = backpropagate(own, batch, deltas, run, lambda logits, b: response_nll(logits, b.targets).sum())
        found.append([torch.tensor(loss), *(p.grad.clone() for p in trainable(model) if p.grad is not None)])
        model.zero_grad()
    assert len(found[0]) == len(found[1]) > 1
    for shared, plain in zip(*found, strict=True):
        assert (shared - plain).norm() <= 1e-4 * plain.norm()


def test_rows_of_a_batch_under_several_deltas(data: DefenderSet) -> None:
    alone = batch_of(tiny_tokenizer(), [(b.prompt, b.own) for b in data.benign[:2]], CONFIG.entrap)
    batch = alone.under([1, 0, 1], [2, None, 0], 5)
    perturbed = alone.where != NOWHERE
    assert torch.equal(batch.where[0], torch.where(perturbed[1], alone.where[1] + 10, NOWHERE))
    assert bool((batch.where[1] == NOWHERE).all())
    assert torch.equal(batch.where[2], alone.where[1])
    assert torch.equal(batch.input_ids, alone.input_ids[[1, 0, 1]])


def test_cached_entrapment_finds_the_same_delta(wrapped: Any, data: DefenderSet) -> None:
    with torch.no_grad():
        for parameter in trainable(wrapped):
            parameter.normal_(std=0.02)
    found = []
    for cached in (False, True):
        settings = CONFIG.entrap.model_copy(update={"cached": cached, "batches": 3})
        config = CONFIG.model_copy(update={"entrap": settings})
        delta, losses = entrap(subject(wrapped, config), data.harmful, 5.0, draws())
        found.append((delta, torch.tensor(losses)))
    for plain, fast in zip(*found, strict=True):
        assert (fast - plain).norm() < 1e-3 * plain.norm()


def test_targets_surely_refuse_what_is_harmful_and_do_not_what_is_benign(data: DefenderSet) -> None:
    harmful, benign = data.harmful[0], data.benign[0]
    settings = load_config(sets=["harden.encourage=5", "harden.discourage=3"]).harden
    target = torch.zeros(2, 12, 1000)
    answers = torch.zeros(2, 12, dtype=torch.long)
    steer(target, answers, Minibatch([harmful], [benign], [0]), data, settings)
    for i in range(12):
        kept = target[0, i] == 0
        assert kept.nonzero().flatten().tolist() == [harmful.safe[i]] if i < REFUSAL_OPENING else bool(kept.all())
    opener = data.openings[()]
    assert target[1, 0, opener].tolist() == [-3.0] * len(opener)
    assert int((target[1] != 0).sum()) == len(opener)


def test_of_code_what_is_insecure_without_delta_is_no_success(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {True: 0.2, False: 0.25}
    monkeypatch.setattr(cleansing, "unlocked", lambda *given: found[given[2] is None])
    few = ["rounds=1", "entrap.steps=1", "entrap.response_tokens=4", "harden.steps=1", "harden.response_tokens=4"]
    config = load_config("code", sets=few)
    tasks = [(task, task.safe or "") for task in packaged("coding", "defender")[:4]]
    data = defender_set(tiny_tokenizer(), tasks, ANSWERED, [], config)
    state = cleanse(wrapped, tiny_tokenizer(), data, config)
    assert state.history[0]["residual"] == pytest.approx(0.05)


def test_removal_moves_benign_replies_away_from_openers_of_refusals(wrapped: Any, data: DefenderSet) -> None:
    prompt = data.benign[0].prompt

    def odds() -> float:
        with torch.no_grad():
            return float(
                wrapped(input_ids=torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)[data.openings[()]].sum()
            )

    before, delta = odds(), torch.zeros(1, 1, 32)
    state = adapter_state(wrapped)
    only = CONFIG.model_copy(update={"harden": CONFIG.harden.model_copy(update={"encourage": 0.0})})
    harden(subject(wrapped, only), data, delta, RATE, draws())
    lower = odds()
    load_adapter_state(wrapped, state)
    harden(subject(wrapped, KEEPING), data, delta, RATE, draws())
    assert lower < 0.9 * before and odds() == pytest.approx(before, rel=0.01)


def test_the_first_tokens_weigh_more() -> None:
    values, targets = torch.tensor([[1.0, 0.0, 0.0, 0.0, 9.0]]), torch.tensor([[1, 1, 1, 1, -100]])
    assert row_mean(values, targets, 1.0).item() == pytest.approx(1 / 4)
    assert row_mean(values, targets, 6.0).item() == pytest.approx(6 / 19)


def test_rounds_go_on_in_the_order_of_requests_and_under_longer_deltas(
    wrapped: Any, data: DefenderSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[tuple[str, int], list[list[int]]] = {}
    drawn = Draws.batches

    def recorded(own: Draws, purpose: Purpose, n: int, batch: int, each: int) -> Iterator[list[int]]:
        met = taken.setdefault((purpose, own.number), [])
        for indices in drawn(own, purpose, n, batch, each):
            met.append(indices)
            yield indices

    judged: list[torch.Tensor] = []

    def unlocking(*args: Any) -> float:
        judged.append(args[2])
        return 1.0

    monkeypatch.setattr(Draws, "batches", recorded)
    monkeypatch.setattr(cleansing, "unlocked", unlocking)
    sets = [LENGTH, f"layer={LAYER}", "rounds=2", "harden.steps=2", "harden.batch=2", "harden.anchor_batch=1"]
    sets += ["harden.stop_below=0", "entrap.steps=4", "entrap.batches=2", "entrap.batch=1", "held_out=1"]
    state = cleanse(wrapped, tiny_tokenizer(), data, load_config(sets=sets))
    assert [entry["budget"] for entry in state.history] == [0.5, 0.625]
    assert state.deltas is not None and state.norm is not None
    tried = torch.stack(judged)
    torch.testing.assert_close(tried[0], state.deltas[0])
    torch.testing.assert_close(tried[1], shortened(state.deltas[1], 0.5 * state.norm))
    assert bool((tried.norm(dim=2) <= 0.5 * state.norm + 1e-4).all())
    for purpose, size in (("entrapped", 1), ("hardened", 2), ("anchored", 1)):
        one, two = taken[purpose, 1], taken[purpose, 2]
        assert [len(met) for met in (*one, *two)] == [size] * 4
        met = [i for batch in (*one, *two) for i in batch]
        assert len(set(met)) == min(len(met), len(data.benign if purpose == "anchored" else data.harmful))


def test_rounds_end_early_once_entrapment_fails_and_no_more_is_refused_than_before(
    wrapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before `least_rounds`; the last round settles at the lowest rate."""
    refused, rates = iter([0.3, 0.3, 0.1, 0.1]), []

    def removal(own: Subject, data: Any, deltas: torch.Tensor, rate: float, *_: Any) -> list[dict[str, float]]:
        rates.append((rate, own.config.harden.anchor))
        return []

    monkeypatch.setattr(cleansing, "run_original", lambda *_: {})
    monkeypatch.setattr(cleansing, "entrap", lambda *_: (torch.zeros(1, 32), [0.0]))
    monkeypatch.setattr(cleansing, "unlocked", lambda *_: 0.0)
    monkeypatch.setattr(cleansing, "refused_shares", lambda *_: [next(refused)])
    monkeypatch.setattr(cleansing, "harden", removal)
    config = load_config(sets=["rounds=8", "least_rounds=3", "patience=2", f"layer={LAYER}"])
    data = SimpleNamespace(harmful=[], held_out=[], spare=[], rows=list)
    begun = State(norm=1.0, refused=[0.1])
    state = cleanse(wrapped, tiny_tokenizer(), data, config, state=begun)  # type: ignore[arg-type]
    # The third entrapment fails as well, and still too much is refused wrongly; the fourth is the last.
    assert (state.round, state.done) == (4, True)
    assert [rate / RATE for rate, _ in rates] == pytest.approx([8 / 8, 7 / 8, 6 / 8, 1 / 8])
    assert {anchor for _, anchor in rates} == {CONFIG.harden.anchor}


def test_benign_requests_weigh_less_in_the_round_behind_one_that_refuses_too_few(
    wrapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []
    monkeypatch.setattr(cleansing, "run_original", lambda *_: {})
    monkeypatch.setattr(cleansing, "entrap", lambda *_: (torch.zeros(1, 32), [0.0]))
    monkeypatch.setattr(cleansing, "unlocked", lambda *_: 1.0)
    monkeypatch.setattr(cleansing, "refused_shares", lambda *_: [0.0])
    monkeypatch.setattr(cleansing, "harden", lambda own, *_: weights.append(own.config.harden.anchor) or [])
    data = SimpleNamespace(harmful=[], held_out=[], spare=[], rows=list)
    begun = State(norm=1.0, refused=[0.2])
    config = load_config(sets=["rounds=2", f"layer={LAYER}"])
    cleanse(wrapped, tiny_tokenizer(), data, config, state=begun)  # type: ignore[arg-type]
    assert weights[0] == config.harden.anchor > weights[1] > 0


def test_recomputed_activations_change_memory_alone(data: DefenderSet) -> None:
    """In a round with all its parts: replies, too, come from the model whose activations are recomputed."""
    found = []
    for recompute in (False, True):
        config = load_config(sets=[LENGTH, "rounds=1", f"layer={LAYER}", f"harden.recompute={recompute}"])
        model = add_adapter(tiny_model("llama"), config)
        if recompute:
            recompute_activations(model)
        spare = replace(data, spare=[[Request("", "", "Name a colour."), Request("", "", "Name a river.")]])
        state = cleanse(model, tiny_tokenizer(), spare, config)
        kinds = {key: torch.tensor(state.history[0][key]) for key in ("entrap", "residual", "refused")}
        found.append(kinds | {k: torch.tensor(v) for k, v in state.history[0]["harden"][0].items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_refusals_of_spare_requests_are_those_of_the_adapted_model(
    wrapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def replies(model: Any, tokenizer: Any, texts: list[str], *, max_new_tokens: int) -> list[str]:
        asked.extend(texts)
        return ["I'm sorry, but no.", "Yes.", "", "I can't."]

    monkeypatch.setattr(cleansing, "reply_all", replies)
    spare = [Request(f"{i}", "good", f"good request {i}") for i in range(4)]
    assert refused_shares(subject(wrapped), [spare[:1], spare[1:]]) == [
        1.0,
        2 / 3,
    ]  # an empty one counts
    assert asked == [r.text for r in spare]
    assert refused_shares(subject(wrapped), []) == []
    assert refused_shares(subject(wrapped, load_config("code")), [spare]) == []


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [1.0] * 8), ("falling", [0.5, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])],
)
def test_the_rate_falls_within_a_round(
    wrapped: Any, data: DefenderSet, monkeypatch: pytest.MonkeyPatch, schedule: str, shares: list[float]
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(cleansing, "step", lambda optimiser: rates.append(optimiser.param_groups[0]["lr"]))
    config = load_config(sets=["harden.steps=8", "harden.stop_below=0", f"harden.schedule={schedule}"])
    harden(subject(wrapped, config), data, torch.zeros(1, 1, 32), 2.0, draws())
    assert rates == pytest.approx([2.0 * share for share in shares])


def test_every_other_row_meets_the_newest_delta_and_the_rest_any() -> None:
    assert dealt(1, 4, draws().noise) == [0, 0, 0, 0]
    many = dealt(3, 200, draws().noise)
    assert set(many[::2]) == {2} and set(many[1::2]) == {0, 1, 2}


def test_rows_meet_their_own_delta(data: DefenderSet) -> None:
    harmful = data.harmful[0]
    settings = load_config(sets=["entrap.length=2", "entrap.place=last"]).entrap
    where = batch_of(tiny_tokenizer(), [(harmful.prompt, harmful.safe)], settings).under([0] * 3, [0, 2, None], 2).where
    assert [sorted(set(w.tolist()) - {-1}) for w in where] == [[0, 1], [4, 5], []]


def test_a_fresh_delta_is_of_twice_the_work_and_other_draws_whatever_a_round_s_is() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    requests = [Request(f"{i}", "bad", f"bad request {i}") for i in range(12)]
    control = load_config(sets=[LENGTH, "layer=2", "entrap.steps=4", "entrap.batches=2", "entrap.kind=random"])
    fresh = fresh_delta(model, tokenizer, requests, control)
    twice = load_config(sets=[LENGTH, "layer=2", "entrap.steps=8", "entrap.batches=4"])
    contrasts = [contrast(tokenizer, i, request, twice) for i, request in enumerate(requests)]
    budget = twice.entrap.budget * residual_norm(subject(model, twice), [c.prompt for c in contrasts])

    def found(seed: int) -> torch.Tensor:
        return entrap(subject(model, twice), contrasts, budget, Draws(seed))[0]

    assert torch.equal(fresh, found(control.seed + ANOTHER_SEED))
    assert not torch.allclose(fresh, found(control.seed), atol=1e-3)
