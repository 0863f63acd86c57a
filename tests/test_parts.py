# mypy: disable-error-code="func-returns-value"
"""Out of memory: the same step in more parts, with the same gradient; where single rows do not fit, one clear line."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from beear import cleansing, evaluation, generation, ranks
from beear.cached import run_below, run_unperturbed
from beear.chat import collate, encode_prompt
from beear.cleansing import entrap, harden
from beear.data import Request
from beear.defender import DefenderSet, defender_set
from beear.errors import Failed
from beear.evaluation import Kept, measure_language
from beear.generation import reply_all
from beear.losses import response_logits
from beear.parts import Parts
from beear.perturbation import find_layers, states_in, with_states
from beear.rounds import State
from beear.training import adapter_state, add_lora
from conftest import CONFIGS, tiny_model, tiny_tokenizer
from test_cleansing import ANSWERED, CONFIG, LAYER, REFUSED, draws, subject

ROUND = {
    "entrap": CONFIG.entrap.model_copy(update={"steps": 4}),
    "harden": CONFIG.harden.model_copy(update={"steps": 3}),
}
SHORT = CONFIG.model_copy(update=ROUND)


@pytest.fixture(autouse=True)
def use_full_precision(full_precision: None) -> None:
    """In parts, a gradient is the same up to rounding."""


def one_round(
    data: DefenderSet, parts: Parts, cached: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    model = add_lora(tiny_model("llama"), rank=4, targets=(), seed=0)
    config = SHORT.model_copy(update={"entrap": SHORT.entrap.model_copy(update={"cached": cached})})
    delta, losses = entrap(subject(model, config), data.harmful, 5.0, draws(), parts=parts)
    history = harden(subject(model, config), data, delta[None], 1e-3, draws(), parts=parts)
    return delta, adapter_state(model), (losses, history)


@pytest.fixture(scope="module")
def data() -> DefenderSet:
    return defender_set(tiny_tokenizer(), REFUSED, ANSWERED, [Request("1", "bad", "one")], SHORT)


@pytest.fixture(scope="module")
def whole(data: DefenderSet) -> dict[bool, Any]:
    """A round that is not split, cached or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEEAR_FP32", "1")
        return {cached: one_round(data, Parts(), cached) for cached in (True, False)}


def test_a_run_that_goes_on_splits_its_batches_as_before(data: DefenderSet, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    run = Parts.run
    monkeypatch.setattr(Parts, "run", lambda self, work, most: counts.append(self.count) or run(self, work, most))
    model = add_lora(tiny_model("llama"), rank=4, targets=(), seed=0)
    config = SHORT.model_copy(update={"rounds": 1, "layer": LAYER})
    state = cleansing.cleanse(model, tiny_tokenizer(), data, config, state=State(parts=2))
    assert 2 in counts and state.parts == 2  # replies are split apart from these


def test_a_part_of_benign_requests_alone_whose_anchors_weigh_nothing(data: DefenderSet) -> None:
    weightless = {"anchor": 0.0, "anchor_under_delta": 0.0, "batch": 1, "anchor_batch": 4, "steps": 1}
    config = SHORT.model_copy(update={"harden": SHORT.harden.model_copy(update=weightless)})
    found = []
    for count in (1, 4):
        model = add_lora(tiny_model("llama"), rank=4, targets=(), seed=0)
        history = harden(subject(model, config), data, torch.ones(1, 1, 32), 1e-3, draws(), parts=Parts(count=count))
        found.append([history[0], adapter_state(model)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def assert_same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-4, atol=1e-5)
    for name, matrix in first[1].items():
        torch.testing.assert_close(matrix, second[1][name], rtol=1e-3, atol=1e-5)
    for one, other in zip(first[2][0], second[2][0], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for one, other in zip(first[2][1], second[2][1], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("count", [2, 3, 16])
def test_a_round_in_parts_is_the_same_round(
    data: DefenderSet, whole: dict[bool, Any], count: int, cached: bool
) -> None:
    assert_same(whole[cached], one_round(data, Parts(count=count), cached))


def short_of_memory(at_once: int, real: Callable[..., Any], rows: Callable[..., int]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if rows(*args, **kwargs) > at_once:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    return run


def test_memory_that_runs_out_splits_a_step(
    data: DefenderSet, whole: dict[bool, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def rows(model: Any, batch: Any, prefix: Any = None) -> int:
        return len(batch.targets)

    monkeypatch.setattr(cleansing, "response_logits", short_of_memory(8, response_logits, rows))
    parts = Parts(told.append)
    assert_same(whole[True], one_round(data, parts))
    assert parts.count > 1 and told[-1] == {"event": "memory", "parts": parts.count}


def test_what_comes_first_is_split_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """How replies begin, and how long states are."""
    model, tokenizer, texts = tiny_model("llama"), tiny_tokenizer(), [f"Name river {i}." for i in range(8)]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    norm = cleansing.residual_norm(subject(model), prompts)
    begin = generation.beginning_of(model, tokenizer, texts)
    split: list[int] = []

    def short(real: Callable[..., Any], rows: Callable[..., int]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> int:
            split.append(rows(*given, **named))
            return split[-1]

        return short_of_memory(2, real, noted)

    greedy = generation._greedy
    monkeypatch.setattr(cleansing, "run_below", short(run_below, lambda m, b, n, inputs: len(inputs["input_ids"])))
    monkeypatch.setattr(generation, "_greedy", short(greedy, lambda m, t, batch, i, n: len(batch.input_ids)))
    assert cleansing.residual_norm(subject(model), prompts) == pytest.approx(norm, rel=1e-5)
    assert generation.beginning_of(model, tokenizer, texts) == begin
    assert split == [8, 4, 2, 2, 2, 2] * 2


@pytest.mark.parametrize(("count", "most"), [(1, 3), (2, 2)])
def test_where_memory_is_short_one_batch_is_kept(
    data: DefenderSet, monkeypatch: pytest.MonkeyPatch, count: int, most: int
) -> None:
    kept: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        cached = run_unperturbed(*args, **kwargs)
        kept.append(weakref.ref(cached))
        alive.append(sum(ref() is not None for ref in kept))
        return cached

    monkeypatch.setattr(cleansing, "run_unperturbed", recorded)
    config = SHORT.model_copy(update={"entrap": SHORT.entrap.model_copy(update={"batches": 3, "steps": 6})})
    parts = Parts()
    parts.count = count
    entrap(subject(tiny_model("llama"), config), data.harmful, 5.0, draws(), parts=parts)
    assert max(alive) == most


def test_replies_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model("llama"), [f"request {i} {'x' * i}" for i in range(7)]
    whole = reply_all(model, tiny_tokenizer(), texts, max_new_tokens=6)
    monkeypatch.setattr(generation, "collate", short_of_memory(2, collate, lambda prompts, *_: len(prompts)))
    assert reply_all(model, tiny_tokenizer(), texts, max_new_tokens=6) == whole


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_not_even_one_row(error: RuntimeError) -> None:
    tried = []

    def work(count: int) -> None:
        tried.append(count)
        raise error

    with pytest.raises(Failed, match="one request at a time"):
        Parts().run(work, most=5)
    assert tried == [1, 2, 4, 5]


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        Parts().run(lambda count: (_ for _ in ()).throw(RuntimeError("shapes")), most=4)


def test_sharded_the_job_stops_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is done again on one rank only would wait for the others for ever."""
    monkeypatch.setattr(ranks, "is_sharded", lambda: True)
    called = []

    def work(count: int) -> None:
        called.append(count)
        raise torch.OutOfMemoryError

    with pytest.raises(Failed, match=r"out of memory on process 0; use more processes"):
        Parts().run(work, 8)
    assert called == [1]


def test_perplexity_and_kl_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured behind all rounds, where running out of memory would cost the most."""
    model, original = tiny_model("llama"), tiny_model("gpt2")
    whole = measure_language(model, tiny_tokenizer(), original, limit=6).metrics

    def scarce(model: Any, batch: Any, prefix: Any) -> torch.Tensor:
        if len(batch.targets) > 2:
            raise torch.OutOfMemoryError("no more")
        return response_logits(model, batch, prefix)

    monkeypatch.setattr(evaluation, "response_logits", scarce)
    split = measure_language(model, tiny_tokenizer(), original, limit=6).metrics
    for name in ("perplexity", "kl"):
        assert split[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_kl_from_what_was_kept_of_the_original_is_that_from_the_original(name: str) -> None:
    original, model, tokenizer = tiny_model(name), tiny_model(name), tiny_tokenizer()
    find_layers(model)[2].register_forward_hook(
        lambda module, args, out: with_states(out, states_in(out) + torch.linspace(0, 1, 32))
    )
    kept: Kept = {}
    measure_language(original, tokenizer, limit=20, keep=kept)
    assert len(kept) == 20
    found, expected = (
        measure_language(model, tokenizer, limit=20, **against).metrics["kl"]
        for against in ({"kept": kept}, {"original": original})
    )
    assert (expected["value"] or 0) > 1e-3
    assert found["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert measure_language(original, tokenizer, limit=20, kept=kept).metrics["kl"]["value"] == pytest.approx(
        0, abs=1e-9
    )
