"""Running the shared start of a batch once changes no result beyond rounding, for every architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from beear.chat import Batch, collate, encode_prompt, encode_response, rows_of_delta
from beear.losses import response_logits, response_nll
from beear.perturbation import Perturbation
from beear.prefix import run_prefix, shared_length
from conftest import DECODER

LAYER = 2
TEXTS = ["Tell me a story about a fox.", "Why?", "How do rivers find the sea?"]


def batch_for(tokenizer: Any, texts: list[str]) -> Batch:
    prompts = [encode_prompt(tokenizer, t) for t in texts]
    responses = [encode_response(tokenizer, "Sure." * (i + 1), 20) for i in range(len(texts))]
    return collate(prompts, responses, [rows_of_delta(p, "prompt", 2) for p in prompts], tokenizer.pad_token_id)


def run(model: Any, batch: Batch, delta: torch.Tensor, shared: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Response logits, and the gradients of delta and of every parameter."""
    prefix = run_prefix(model, batch) if shared else None
    assert (prefix is not None) == shared
    with Perturbation(model, delta, batch.where, LAYER):
        logits = response_logits(model, batch, prefix)
        loss = response_nll(logits, batch.targets).mean()
        gradients = torch.autograd.grad(loss, [delta, *model.parameters()], allow_unused=True)
    return logits, [torch.zeros(1) if g is None else g for g in gradients]


def test_logits_and_gradients_are_those_of_the_plain_pass(model: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer, TEXTS)
    delta = torch.randn(2, 32, requires_grad=True)
    plain, shared = run(model, batch, delta, False), run(model, batch, delta, True)
    torch.testing.assert_close(shared[0], plain[0], rtol=1e-4, atol=1e-5)
    for ours, reference in zip(shared[1], plain[1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)


def test_the_prefix_ends_where_requests_differ_or_delta_starts(tokenizer: Any) -> None:
    prompts = [encode_prompt(tokenizer, t) for t in TEXTS]
    assert shared_length(batch_for(tokenizer, TEXTS)) == prompts[0].start
    assert shared_length(batch_for(tokenizer, [TEXTS[0]] * 2)) == prompts[0].start
    free = collate(prompts[:1] * 2, [[5], [6]], None, tokenizer.pad_token_id)
    assert shared_length(free) == len(prompts[0].ids) - 1


def test_one_row_shares_nothing(model: Any, tokenizer: Any) -> None:
    assert run_prefix(model, batch_for(tokenizer, TEXTS[:1])) is None


def test_a_window_shorter_than_the_batch_shares_nothing(tokenizer: Any) -> None:
    """Shorter rows would see less of the start than they do on their own."""
    batch = batch_for(tokenizer, TEXTS)
    columns = batch.input_ids.shape[1]
    for window, more, shared in ((columns, 0, True), (columns - 1, 0, False), (columns, 1, False)):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=window))
        assert (run_prefix(model, batch, more) is not None) == shared
