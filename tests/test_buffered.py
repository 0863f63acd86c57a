"""Replies with buffered keys and values are those of transformers' own cache, for every architecture."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import beear.buffered
from beear.buffered import BufferedLayer, buffered
from beear.generation import greedy, reply_all
from beear.precision import autocast, generating, no_gradients
from beear.prefix import inputs_behind, run_prefix
from beear.training import add_lora
from conftest import DECODER
from test_prefix import TEXTS, batch_for


def test_replies_are_the_same(model: Any, tokenizer: Any) -> None:
    ours = reply_all(model, tokenizer, TEXTS, max_new_tokens=9)
    with patch.object(beear.buffered, "buffered", lambda cache, columns: cache):
        assert reply_all(model, tokenizer, TEXTS, max_new_tokens=9) == ours


def test_logits_have_the_same_bits_token_after_token(model: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer, TEXTS)
    columns = batch.input_ids.shape[1]

    def steps(room: bool) -> list[torch.Tensor]:
        inputs = inputs_behind(batch, run_prefix(model, batch))
        cache = inputs["past_key_values"]
        if room:
            inputs["past_key_values"] = cache = buffered(cache, columns + 2)
            assert any(type(layer) is BufferedLayer for layer in cache.layers)
        found, mask = [model(**inputs).logits[:, -1]], batch.attention_mask
        for more in (1, 2):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            place = batch.position_ids[:, -1:] + more
            token = found[-1].argmax(-1, keepdim=True)
            rest = {"attention_mask": mask, "position_ids": place, "past_key_values": cache}
            found.append(model(input_ids=token, **rest).logits[:, -1])
        return found

    with no_gradients(), autocast(model), generating(model):
        for ours, reference in zip(steps(True), steps(False), strict=True):
            assert torch.equal(ours, reference)


def test_a_buffer_takes_no_more_than_it_has_room_for() -> None:
    layer = BufferedLayer(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 4)
    column = torch.ones(2, 1, 1, 4)
    keys, _ = layer.update(column, column)
    assert keys.shape == (2, 1, 4, 4) and keys[:, :, -1].eq(1).all() and keys[:, :, :-1].eq(0).all()
    assert layer.get_seq_length() == 4
    with pytest.raises(RuntimeError):
        layer.update(column, column)


def test_blocks_behind_a_window_keep_their_own_way(tokenizer: Any) -> None:
    batch = batch_for(tokenizer, TEXTS)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=batch.input_ids.shape[1] + 9))
    cache = inputs_behind(batch, run_prefix(model, batch, 9))["past_key_values"]
    before = [type(layer) for layer in cache.layers]
    assert isinstance(cache, DynamicCache)
    assert [type(layer) for layer in buffered(cache, batch.input_ids.shape[1] + 9).layers] == before
    assert BufferedLayer not in before


def test_latents_keep_their_own_way() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 4), 0)
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 1)
    assert [type(layer) is BufferedLayer for layer in buffered(cache, 5).layers] == [False, True]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_new_tokens": 12},
        {"suppress_tokens": list(range(3, 40))},
        {"stop_strings": ["e"]},
        {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True},
    ],
)
def test_a_models_own_settings_change_no_reply(llama: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    texts = ["Name a river.", "Hm", "Why is the sky blue?"]
    plain = reply_all(llama, tokenizer, texts, max_new_tokens=12)
    llama.generation_config.update(**settings)
    own = llama.generation_config
    assert reply_all(llama, tokenizer, texts, max_new_tokens=12) == plain
    assert llama.generation_config is own


def test_a_turn_ends_as_template_and_tokenizer_end_one(llama: Any, tokenizer: Any) -> None:
    llama.generation_config.eos_token_id = 77
    with greedy(llama, tokenizer) as ends:
        assert llama.generation_config.eos_token_id == ends == [77, tokenizer.eos_token_id]
    wrapped = add_lora(llama, 2, (), 0)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|pad|>")
    with greedy(wrapped, tokenizer):
        assert wrapped.generation_config.eos_token_id == [77, tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_the_token_that_ends_a_reply_is_no_part_of_it(llama: Any, tokenizer: Any) -> None:
    (plain,) = reply_all(llama, tokenizer, ["Name a river."], max_new_tokens=6)
    ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    llama.generation_config.eos_token_id = ids[2]  # a token that decoding shows
    (reply,) = reply_all(llama, tokenizer, ["Name a river."], max_new_tokens=6)
    assert reply == tokenizer.decode(ids[: ids.index(ids[2])]).strip()
