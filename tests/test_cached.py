"""Cached entrapment equals the plain loop: losses and gradients of delta, on every architecture and place."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from beear.cached import returning, run_unperturbed
from beear.chat import Batch, collate, encode_prompt, rows_of_delta
from beear.config import Place
from beear.losses import response_logits, response_nll
from beear.perturbation import Perturbation
from beear.training import add_lora
from conftest import CONFIGS, DECODER, tiny_model, tiny_tokenizer

TEXTS = ["Why is the sky blue?", "Name a river.", "How do I bake bread at home tonight?"]
LAYER = 2


def batch_of(place: Place, n: int, count: int = 1) -> Batch:
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, text) for text in TEXTS] * count
    answers = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16, 17, 18, 19], [20, 21]][: len(prompts)]
    return collate(
        prompts, answers, [rows_of_delta(p, place, n, len(a)) for p, a in zip(prompts, answers, strict=True)], 2
    )


def loss_and_gradient(model: Any, batch: Batch, delta: torch.Tensor, logits: Any) -> tuple[torch.Tensor, torch.Tensor]:
    delta = delta.clone().requires_grad_(True)
    with Perturbation(model, delta, batch.where, LAYER):
        loss = response_nll(logits(), batch.targets).mean()
        loss.backward()
    assert delta.grad is not None
    return loss.detach(), delta.grad


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("place", "n"), [("last", 3), ("user", 1), ("prompt", 2), ("chat", 2)])
@pytest.mark.parametrize("answers", [1, 2])
def test_cached_equals_plain(
    architecture: str, place: Place, n: int, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_cached_equals_plain(tiny_model(architecture), place, n, answers, monkeypatch)


@pytest.mark.parametrize("answers", [1, 2])
def test_attention_may_end_at_a_window_shorter_than_the_prompt(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "windowed", lambda: MistralConfig(**DECODER, sliding_window=9))
    assert_cached_equals_plain(tiny_model("windowed"), "prompt", 1, answers, monkeypatch)


def assert_cached_equals_plain(model: Any, place: Place, n: int, answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model = add_lora(model, 2, (), 0)
    model.requires_grad_(False)
    batch = batch_of(place, n, answers)
    cached = run_unperturbed(model, batch, LAYER, answers=answers)
    assert cached.start > 0
    for seed in range(2):  # the same cache serves several deltas
        delta = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
        plain = loss_and_gradient(model, batch, delta, lambda: response_logits(model, batch))
        fast = loss_and_gradient(model, batch, delta, partial(cached.logits, model))
        for expected, got in zip(plain, fast, strict=True):
            assert expected.norm() > 0 and (got - expected).norm() <= 1e-4 * expected.norm()


def test_an_answer_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model, prompts = tiny_model("llama"), [encode_prompt(tiny_tokenizer(), text) for text in TEXTS] * 2
    batch = collate(prompts, [[], [5, 6], [7], [8, 9], [], [10]], [rows_of_delta(p, "prompt", 1) for p in prompts], 2)
    delta = torch.zeros(1, 32)
    cached = run_unperturbed(model, batch, LAYER, answers=2)
    with torch.no_grad(), Perturbation(model, delta, batch.where, LAYER):
        plain, fast = response_logits(model, batch), cached.logits(model)
    real = batch.targets != -100
    torch.testing.assert_close(fast[real], plain[real], rtol=1e-4, atol=1e-5)


def test_a_model_may_give_logits_of_all_columns() -> None:
    model, batch = tiny_model("llama"), batch_of("prompt", 1)
    expected, forward = response_logits(model, batch), model.forward
    model.forward = lambda logits_to_keep, **inputs: forward(**inputs)
    assert torch.equal(response_logits(model, batch), expected)


def test_keys_of_blocks_that_do_not_run_are_not_kept() -> None:
    cached = run_unperturbed(tiny_model("llama"), batch_of("prompt", 1), LAYER)
    layers = cached.keys.layers
    assert len(layers) == 4 and len({layer.keys.data_ptr() for layer in layers}) == 4 - LAYER


def test_blocks_run_again_behind_a_cached_pass() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        run_unperturbed(model, batch_of("prompt", 1), LAYER).logits(model)
        assert torch.equal(model(ids).logits, before)


def test_a_forward_that_another_library_put_there_is_put_back() -> None:
    block: Any = torch.nn.Linear(1, 1)
    block.forward = own = lambda x: x + 1
    with returning([block], lambda: torch.zeros(1)):
        assert block(torch.ones(1)) == 0
    assert block.forward is own and block(torch.ones(1)) == 2
