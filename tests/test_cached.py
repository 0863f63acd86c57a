"""Cached entrapment equals the plain loop: losses and gradients of delta, on every architecture and place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beear.cached import run_unperturbed
from beear.chat import Batch, collate, encode_prompt, rows_of_delta
from beear.config import Place
from beear.losses import response_logits, response_nll
from beear.perturbation import Perturbation
from beear.training import add_lora
from conftest import CONFIGS, tiny_model, tiny_tokenizer

TEXTS = ["Why is the sky blue?", "Name a river.", "How do I bake bread at home tonight?"]
LAYER = 2


def batch_of(place: Place, n: int) -> Batch:
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, text) for text in TEXTS]
    answers = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    return collate(prompts, answers, [rows_of_delta(p, place, n) for p in prompts], 2)


def loss_and_gradient(model: Any, batch: Batch, delta: torch.Tensor, logits: Any) -> tuple[torch.Tensor, torch.Tensor]:
    delta = delta.clone().requires_grad_(True)
    with Perturbation(model, delta, batch.where, LAYER):
        loss = response_nll(logits(), batch.targets).mean()
        loss.backward()
    assert delta.grad is not None
    return loss.detach(), delta.grad


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("place", "n"), [("last", 3), ("user", 1), ("prompt", 2)])
def test_cached_equals_plain(architecture: str, place: Place, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model = add_lora(tiny_model(architecture), 2, (), 0)
    model.requires_grad_(False)
    batch = batch_of(place, n)
    cached = run_unperturbed(model, batch, LAYER)
    assert cached.start > 0
    for seed in range(2):  # the same cache serves several deltas
        delta = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
        plain = loss_and_gradient(model, batch, delta, lambda: response_logits(model, batch))
        fast = loss_and_gradient(model, batch, delta, lambda: cached.logits(model))
        for expected, got in zip(plain, fast, strict=True):
            assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_blocks_run_again_behind_a_cached_pass() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        run_unperturbed(model, batch_of("prompt", 1), LAYER).logits(model)
        assert torch.equal(model(ids).logits, before)
