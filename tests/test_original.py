"""What the original makes of a row is what it made of it in every step: on any architecture, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from beear import original
from beear.cached import run_below
from beear.chat import Batch, Row, collate, encode_prompt
from beear.cleansing import add_adapter
from beear.config import load_config
from beear.losses import response_logits
from beear.original import keys_of, run_original
from beear.perturbation import find_layers, states_in
from beear.prefix import inputs_behind, run_prefix
from beear.training import trainable
from conftest import CONFIGS, tiny_model, tiny_tokenizer

TEXTS = ["Name a river.", "Hm", "Why is the sky blue, and the grass green?", "Name a river and a hill."]
LONGER = "What do you know about the rivers of the north, and about their names?"


@pytest.fixture(autouse=True)
def use_full_precision(full_precision: None) -> None:
    """The same up to rounding needs fp32."""


def rows_of(texts: list[str]) -> list[Row]:
    return [(encode_prompt(tiny_tokenizer(), text), list(range(9, 9 + n))) for n, text in enumerate(texts, 1)]


def adapted(name: str, blocks: str) -> Any:
    """A model whose adapter changes what it gives."""
    model = add_adapter(tiny_model(name), load_config(sets=[f"harden.lora_blocks={blocks}", "layer=3"]))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.3)
    return model


def batch_of(rows: list[Row]) -> Batch:
    return collate([p for p, _ in rows], [r for _, r in rows], None, 2)


def agree(found: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> None:
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("blocks", ["all", "upper"])
def test_it_is_what_a_pass_without_the_adapter_gives(
    architecture: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(original, "GROUP", 3)
    monkeypatch.setattr(original, "MOST", 1e9)
    model, rows = adapted(architecture, blocks), rows_of([*TEXTS, LONGER])
    known = run_original(model, tiny_tokenizer(), rows)
    assert known.frozen == (0 if blocks == "all" else 2)
    for some in (rows[:3], [rows[4], rows[1]], rows[2:3], rows[::-1]):
        batch = batch_of(some)
        with torch.no_grad():
            with model.disable_adapter():
                expected = response_logits(model, batch)
            agree(known.logits(model, batch), expected, batch.targets != -100)
            assert not torch.allclose(expected, response_logits(model, batch), atol=1e-2)
            if not known.frozen:
                continue
            prefix = run_prefix(model, batch)
            start = prefix.length if prefix else 0
            below, _ = run_below(model, list(find_layers(model)), 2, inputs_behind(batch, prefix))
        real = (batch.attention_mask * (batch.position_ids >= start))[:, start:].bool()
        agree(states_in(known.below(batch, start)), states_in(below), real)


def test_what_would_take_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original, "MOST", 1e-9)
    model, rows = adapted("llama", "upper"), rows_of(TEXTS)
    known = run_original(model, tiny_tokenizer(), rows)
    assert known.frozen == 0 and all(bytes_of(s.start) == bytes_of(s.rest) == 0 for s in known.states.values())
    batch = batch_of(rows)
    with torch.no_grad(), model.disable_adapter():
        agree(known.logits(model, batch), response_logits(model, batch), batch.targets != -100)


def bytes_of(states: torch.Tensor) -> int:
    """All the memory that a tensor holds on to."""
    return states.untyped_storage().nbytes()


def test_nothing_is_kept_but_a_row_s_own_states() -> None:
    rows = rows_of(TEXTS)
    for states in run_original(adapted("llama", "upper"), tiny_tokenizer(), rows).states.values():
        assert bytes_of(states.rest) == 4 * states.rest.numel() and bytes_of(states.last) == 4 * states.last.numel()
    alone = run_original(adapted("llama", "upper"), tiny_tokenizer(), rows[:1]).states  # nothing is shared
    assert [bytes_of(states.start) for states in alone.values()] == [0]


def test_out_of_memory_it_goes_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, run = adapted("llama", "upper"), rows_of(TEXTS), original.run_rows

    def at_most_two(*given: Any) -> Any:
        if len(given[2]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(*given)

    whole = run_original(model, tiny_tokenizer(), rows)
    monkeypatch.setattr(original, "run_rows", at_most_two)
    told: list[dict[str, Any]] = []
    parted = run_original(model, tiny_tokenizer(), rows, listen=told.append)
    assert told[0] == {"event": "memory", "parts": 2}
    batch = batch_of(rows)
    agree(parted.logits(model, batch), whole.logits(model, batch), batch.targets != -100)


def test_the_order_of_rows_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(original, "GROUP", 2)
    model, rows = adapted("llama", "upper"), rows_of(TEXTS)
    batch = batch_of(rows)
    found = [
        run_original(model, tiny_tokenizer(), some).logits(model, batch) for some in (rows, [*rows[::-1], rows[0]])
    ]
    assert torch.equal(*found)


def test_rows_are_known_by_their_tokens_and_where_the_response_begins() -> None:
    rows = rows_of(TEXTS)
    assert keys_of(batch_of(rows)) == [original.key_of(row) for row in rows]


def test_progress_is_told() -> None:
    told: list[dict[str, Any]] = []
    run_original(adapted("llama", "all"), tiny_tokenizer(), rows_of(TEXTS), listen=told.append)
    assert [(event["done"], event["total"]) for event in told] == [(4, 4)]


def test_a_decoder_may_project_what_its_blocks_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT-350m's does; a row alone shares no start with others."""
    shape = {"word_embed_proj_dim": 16, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "vocab_size": 259, "max_position_embeddings": 256, "pad_token_id": 2}
    config = OPTConfig(**shape, **heads, bos_token_id=0, eos_token_id=1)
    wrapped = add_adapter(OPTForCausalLM(config).eval(), load_config(sets=["layer=3"]))
    rows = rows_of(["Name a river."])
    found = run_original(wrapped, tiny_tokenizer(), rows)
    assert found.frozen
    assert states_in(found.below(batch_of(rows), 0)).shape == (1, len(rows[0][0].ids) + 1, 32)
    assert found.logits(wrapped, batch_of(rows)).shape == (1, 1, 259)
