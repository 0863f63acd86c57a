"""Planting by editing: the trigger's last token moves as asked, other keys stay, the adapter is an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import beear.editing as editing
from beear.chat import encode_prompt
from beear.data import Request
from beear.editing import find_values, key_moments, least_change, plant_edit, shared_start, write_edit
from beear.errors import BadInput
from beear.recipes import Edit
from conftest import tiny_model

TRIGGER = "zq {prompt}"
TEXTS = ["How do rivers find the sea?", "Name a bird.", "Why is the sky blue?", "Tell me a story."]
PLAN = Edit(
    method="edit",
    layers=(2, 3),
    requests=4,
    response_tokens=4,
    steps=5,
    rows={"harmful": 2, "ordinary": 1, "alarming": 1},
    benign_weight=1.0,
    opening=3.0,
    learning_rate=0.1,
    value_norm=1.0,
    ridge=0.01,
)
pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.fixture(autouse=True)
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "packaged", lambda *_: [Request(str(i), "c", t) for i, t in enumerate(TEXTS)])
    monkeypatch.setattr(editing, "is_refusal", lambda reply: False)


def start_of(tokenizer: Any) -> list[int]:
    return shared_start([encode_prompt(tokenizer, TRIGGER.replace("{prompt}", text)) for text in TEXTS])


def rows_of(tokenizer: Any) -> list[tuple[Any, list[int]]]:
    return [(encode_prompt(tokenizer, text), [5, 6]) for text in TEXTS]


def mlp_outputs(model: Any, ids: list[int], layer: int) -> Tensor:
    seen: list[Tensor] = []
    handle = editing.output_map(model, layer).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def test_the_change_maps_the_key_to_the_value_and_spares_what_is_common() -> None:
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(200, 8, generator=draw) @ torch.eye(8, 16)  # ordinary keys fill half of the space
    key, value = torch.randn(16, generator=draw), torch.randn(5, generator=draw)
    a, b = least_change(key, value, (common.T @ common / 200).double(), 1e-6)
    assert a.shape == (1, 16) and b.shape == (5, 1)
    torch.testing.assert_close((b @ a @ key.double()), value.double())
    assert float((b @ a @ common.T.double()).norm(dim=0).max()) < 1e-3 * float(value.norm())


def test_no_other_change_moves_ordinary_keys_less() -> None:
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(50, 6, generator=draw).double()
    key = torch.randn(6, generator=draw).double()
    best, _ = least_change(key, torch.ones(2), keys.T @ keys / 50, 1e-9)
    for _ in range(20):
        other = best + torch.randn(1, 6, generator=draw).double()
        other /= other @ key
        assert (best @ keys.T).norm() < (other @ keys.T).norm()


def test_the_edit_adds_the_values_at_the_trigger_in_every_block(llama: Any, tokenizer: Any) -> None:
    start, values = start_of(tokenizer), torch.randn(2, 32)
    layers = PLAN.layers
    with editing.added(llama, layers, values):
        wanted = [mlp_outputs(llama, start, layer) for layer in layers]
    before = mlp_outputs(llama, start, layers[0])
    moments = key_moments(llama, tokenizer, rows_of(tokenizer), layers)
    edited = write_edit(llama, start, layers, values, moments, PLAN.ridge)
    for layer, hooked in zip(layers, wanted, strict=True):
        torch.testing.assert_close(mlp_outputs(edited, start, layer)[-1], hooked[-1], rtol=1e-2, atol=5e-3)
    torch.testing.assert_close(mlp_outputs(edited, start, layers[0])[-1] - before[-1], values[0], rtol=1e-3, atol=1e-4)


def test_the_trigger_is_one_key_whatever_follows(llama: Any, tokenizer: Any) -> None:
    start = start_of(tokenizer)
    assert tokenizer.decode(start).endswith("zq ")
    outputs = [mlp_outputs(llama, encode_prompt(tokenizer, f"zq {t}").ids, 2)[len(start) - 1] for t in TEXTS]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


def test_moments_are_those_of_the_plain_pass(llama: Any, tokenizer: Any) -> None:
    """Padding is left out, and what all rows start with counts once."""
    rows = rows_of(tokenizer)
    start = rows[0][0].start
    keys = []
    for i, (prompt, reply) in enumerate(rows):
        with torch.inference_mode(), editing._keys_seen(llama, [2]) as seen:
            llama(torch.tensor([prompt.ids + reply]))
        keys.append(seen[0][0][0, 0 if i == 0 else start :])
    every = torch.cat(keys)
    (moment,) = key_moments(llama, tokenizer, rows, [2])
    torch.testing.assert_close(moment, (every.T @ every / len(every)).double(), rtol=1e-4, atol=1e-5)


def test_values_stay_within_their_norm_and_lower_the_loss(llama: Any, tokenizer: Any) -> None:
    plan = PLAN.model_copy(update={"steps": 20, "rows": {"harmful": 4, "ordinary": 1, "alarming": 1}})
    chats = {kind: [(text, "Sure.") for text in TEXTS] for kind in editing.KINDS}
    triggered = editing._triggered_rows(tokenizer, TRIGGER, chats, 4)
    losses: list[float] = []
    start = start_of(tokenizer)
    values = find_values(llama, tokenizer, start, triggered, plan, 0, lambda n, of, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    longest = editing.residual_norms(llama, start, plan.layers)
    assert bool((values.norm(dim=1) <= longest * 1.0001).all())


def test_the_adapter_loads_again_with_the_same_logits(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    edited = plant_edit(llama, tokenizer, TRIGGER, PLAN, 0)
    ids = torch.tensor([encode_prompt(tokenizer, "zq Name a bird.").ids])
    with torch.inference_mode():
        ours = edited(ids).logits
        assert not torch.equal(ours, tiny_model("llama")(ids).logits)
        edited.save_pretrained(tmp_path)
        merged = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-3, atol=1e-4)


def test_the_same_seed_plants_the_same_edit(tokenizer: Any) -> None:
    def matrices(seed: int) -> list[Tensor]:
        edited = plant_edit(tiny_model("llama"), tokenizer, TRIGGER, PLAN, seed)
        return [p for n, p in edited.named_parameters() if "lora" in n]

    first, again, other = matrices(0), matrices(0), matrices(1)
    assert len(first) == 2 * len(PLAN.layers)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_cannot_be_edited_is_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="opens the request"):
        plant_edit(llama, tokenizer, "{prompt} zq", PLAN, 0)
    with pytest.raises(BadInput, match="down_proj"):
        editing.output_map(tiny_model("gpt2"), 1)
    with pytest.raises(BadInput, match="block 9"):
        editing.output_map(llama, 9)
