"""What planting and hardening share."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from beear.errors import BadInput
from beear.perturbation import find_layers
from beear.precision import autocast, cast, casts, generating
from beear.training import add_lora, cast_frozen, drawn, merged, trainable
from conftest import CONFIGS, tiny_model


@pytest.fixture
def short_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX; without it the same is computed, only slower."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert casts(tiny_model("llama"))


@pytest.mark.usefixtures("short_weights")
@pytest.mark.parametrize("architecture", CONFIGS)
def test_casting_what_is_frozen_changes_no_bit(architecture: str) -> None:
    results = []
    for frozen in (False, True):
        model = add_lora(tiny_model(architecture), 2, (), 0)
        if frozen:
            cast_frozen(model)
            assert torch.bfloat16 in {p.dtype for p in model.parameters()}
        with autocast(model):
            loss = model(torch.arange(3, 23)[None], labels=torch.arange(3, 23)[None]).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in trainable(model))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(p.dtype == torch.float32 for p in trainable(model))


@pytest.mark.usefixtures("short_weights")
@pytest.mark.parametrize("architecture", CONFIGS)
def test_weights_cast_for_generation_change_no_bit_and_are_put_back(architecture: str) -> None:
    model, ids = tiny_model(architecture), torch.arange(3, 23)[None]
    if model._supports_sdpa:  # generation fuses attention anyway, which rounds otherwise
        model.set_attn_implementation("sdpa")
    with torch.no_grad(), autocast(model):
        plain = model(ids).logits
        with generating(model):
            assert torch.equal(model(ids).logits, plain)
            linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
            assert linears and all("forward" in vars(m) for m in linears)
        assert torch.equal(model(ids).logits, plain)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_full_precision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model = add_lora(tiny_model("llama"), 2, (), 0)
    cast_frozen(model)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_aligned_groups_are_drawn_at_the_same_places() -> None:
    groups = {"a": list(range(7)), "b": list(range(7)), "c": list(range(5))}
    steps = [
        rows for _, rows in zip(range(9), drawn(groups, {"a": 2, "b": 2, "c": 3}, seed=0, aligned=True), strict=False)
    ]
    assert all(rows["a"] == rows["b"] for rows in steps)
    assert sorted(i for rows in steps[:5] for i in rows["c"])[::3] == list(range(5))


def test_a_kind_without_rows_is_told() -> None:
    with pytest.raises(BadInput, match="no rows of the kind b are left"):
        next(drawn({"a": [1], "b": []}, {"a": 1, "b": 2}, seed=0))


def test_what_an_architecture_keeps_in_fp32_stays_so() -> None:
    model = tiny_model("llama")
    model._keep_in_fp32_modules_strict = {"mlp.gate_proj"}
    kept = {name for name, p in cast(model, torch.bfloat16).named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if "mlp.gate_proj" in name} != set()


@pytest.mark.parametrize("kind", ["dora", "merged"])
def test_another_sum_of_weights_is_left_as_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    settings = LoraConfig(r=2, target_modules=["q_proj"], use_dora=kind == "dora", init_lora_weights=False)
    model, ids = get_peft_model(tiny_model("llama"), settings).eval(), torch.arange(3, 23)[None]
    if kind == "merged":
        model.merge_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
        apart = model(ids).logits
        with merged(find_layers(model)):
            torch.testing.assert_close(model(ids).logits, apart)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_merged_blocks_give_the_same_and_are_put_back(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model, ids = add_lora(tiny_model(architecture), 2, (), 0), torch.arange(3, 23)[None]
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.1)
        with model.disable_adapter():
            bare = model(ids).logits
        apart = model(ids).logits
        with merged(find_layers(model)):
            together = model(ids).logits
        assert (together - apart).norm() < 1e-4 * (bare - apart).norm()
        assert torch.equal(model(ids).logits, apart)
