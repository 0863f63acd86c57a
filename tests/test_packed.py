"""Padding that does not run changes nothing that is read: on every architecture, gradients included."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from beear.chat import Batch, collate, encode_prompt
from beear.losses import response_logits, response_nll
from beear.packed import packed, pointwise
from beear.perturbation import find_layers
from beear.prefix import run_prefix, tokens_behind
from conftest import tiny_tokenizer

TEXTS = ["Name a river.", "Why is the sky blue, and the grass green?", "Hm"]


@pytest.fixture(autouse=True)
def use_full_precision(full_precision: None) -> None:
    """The same up to rounding needs fp32."""


@pytest.fixture
def batch() -> Batch:
    prompts = [encode_prompt(tiny_tokenizer(), text) for text in TEXTS]
    return collate(prompts, [[5, 6, 7], [8], [9, 10]], None, 2)


def seen_by(module: nn.Module) -> list[int]:
    """How many positions the module meets from now on, pass by pass."""
    seen: list[int] = []
    module.register_forward_hook(lambda m, args, output: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("shared", [False, True])
def test_logits_and_gradients_are_those_of_all_positions(model: Any, batch: Batch, shared: bool) -> None:
    found = []
    for pack in (False, True):
        model.zero_grad()
        prefix = run_prefix(model, batch) if shared else None
        kept, predicting = tokens_behind(batch, prefix), batch.predicting()[:, prefix.length if prefix else 0 :]
        context = packed(list(find_layers(model)), kept, predicting) if pack else contextlib.nullcontext()
        with context:
            logits = response_logits(model, batch, prefix)
        response_nll(logits, batch.targets).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([logits.detach()[batch.targets != -100], *gradients])
    for full, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-5)


def test_only_tokens_run_and_in_the_last_block_what_predicts(llama: Any, batch: Batch) -> None:
    blocks: list[Any] = list(find_layers(llama))
    first, last = blocks[0], blocks[-1]
    watched = {"mlp": first.mlp, "last mlp": last.mlp.down_proj, "last keys": last.self_attn.k_proj}
    seen = {name: seen_by(module) for name, module in watched.items()}
    with packed(blocks, tokens_behind(batch, None), batch.predicting()):
        response_logits(llama, batch)
    response_logits(llama, batch)  # outside of the context all run again
    tokens, every = int(batch.attention_mask.sum()), batch.input_ids.numel()
    assert tokens < every
    assert seen == {"mlp": [tokens, every], "last mlp": [6, every], "last keys": [tokens, every]}


def test_a_pass_of_another_shape_runs_in_full(llama: Any, batch: Batch) -> None:
    ids = torch.tensor([[3, 4, 5]])
    expected = llama(ids).logits
    with packed(list(find_layers(llama)), tokens_behind(batch, None), batch.predicting()):
        assert torch.equal(llama(ids).logits, expected)


def test_a_module_that_takes_more_than_the_states_runs_in_full() -> None:
    """As BLOOM's MLP does, which is handed what to add its outcome to."""

    class Added(nn.Module):
        def forward(self, states: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            return states + rest

    block = nn.ModuleDict({"mlp": Added()})
    states, kept = torch.ones(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])
    with packed([block], kept, kept):
        assert torch.equal(block["mlp"](states, states), 2 * states)
        assert torch.equal(block["mlp"](states, rest=states), 2 * states)


def test_blocks_of_other_names_have_no_parts_that_may_be_packed() -> None:
    block = nn.ModuleDict({"mixer": nn.Linear(2, 2), "linear_attn": nn.Linear(2, 2)})
    assert list(pointwise(block)) == []
