"""Kinds of model beyond those of the contract tests: what is told of them, or mended for them, before a run begins."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from beear.chat import collate, encode_prompt
from beear.checks import check_blocks, check_vocabulary, check_weights
from beear.config import Config
from beear.errors import BadInput
from beear.evaluation import evaluate
from beear.generation import reply_all
from beear.job import check_model
from beear.perturbation import Perturbation, find_layers
from beear.prefix import run_prefix
from beear.sets import read_sets
from beear.training import add_lora, block_linears, last_parts, trainable
from conftest import COMMON, DECODER, tiny_tokenizer

TEXTS = ["Tell me a story about a fox.", "Why?", "How do rivers find the sea?"]
MIXED = ["linear_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def shape(kind: str, **given: Any) -> Any:
    return AutoConfig.for_model(kind, **{**DECODER, **given})


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def of_images_and_text() -> Any:
    """As deep in its encoder of images as in its decoder."""
    text = {**DECODER, "head_dim": 8, "model_type": "gemma3_text", "sliding_window": 512}
    images = SIGLIP | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=images, mm_tokens_per_image=4)


DENSE_FIRST: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4} | LATENT,
    "qwen3_moe": {"head_dim": 8, "mlp_only_layers": [0]},
}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("qwen3_5_text", {"head_dim": 8, "layer_types": MIXED}),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
        ("mamba", {}),
        ("mllama_text_model", {"cross_attention_layers": [1]}),
        ("gemma4_text", {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
def test_blocks_that_keep_more_than_keys_and_values_are_refused(kind: str, given: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"is a {kind}, whose blocks keep more"):
        check_blocks(shape(kind, **given), "it")


def test_measuring_refuses_what_cleansing_refuses() -> None:
    """Before an hour of replies."""
    model = built(shape("llama"))
    model.get_decoder = lambda: model
    with pytest.raises(BadInput, match="does not tell its decoder"):
        evaluate(model, tiny_tokenizer(), config=Config())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "gpt_oss", "mixtral", "olmo3", "qwen3_moe", "phi3"])
def test_blocks_that_keep_keys_and_values_are_taken(kind: str) -> None:
    check_blocks(shape(kind), "it")


@pytest.mark.parametrize("kind", DENSE_FIRST)
def test_no_adapter_lands_on_experts_where_dense_blocks_name_their_maps_alike(kind: str) -> None:
    model = built(shape(kind, **EXPERTS, **DENSE_FIRST[kind]))
    wrapped = add_lora(model, 2, (), 0, first_block=2)
    assert not wrapped.peft_config["default"].target_parameters
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert names and all(".layers.2." in name or ".layers.3." in name for name in names)
    with pytest.raises(BadInput, match="lora_targets: no linear map in a block is named down_proj"):
        add_lora(built(shape(kind, **EXPERTS, **DENSE_FIRST[kind])), 2, ("o_proj", "down_proj"), 0)


@pytest.mark.parametrize("kind", ["phimoe", "qwen2_moe", "granitemoeshared", "llama4_text"])
def test_no_adapter_lands_on_routers_and_shared_experts(kind: str) -> None:
    model = built(shape(kind, **EXPERTS))
    assert last_parts(block_linears(model)) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_a_model_that_is_its_own_decoder_is_refused() -> None:
    with pytest.raises(BadInput, match="it does not tell its decoder from its output head"):
        check_model(built(shape("llama4_text", **EXPERTS)), tiny_tokenizer(), Config(), "it", read_sets(Config()))
    check_model(built(shape("phimoe", **EXPERTS)), tiny_tokenizer(), Config(layer=2), "it", read_sets(Config()))


@pytest.mark.parametrize(
    ("unused", "used", "fits"),
    [(3, "", True), (0, "", True), (3, "tokenizer", False), (3, "template", False)],
    ids=["unused", "none", "end of a reply", "end of a reply by the template"],
)
def test_tokens_beyond_the_embedding_may_be_there_if_no_chat_holds_them(unused: int, used: str, fits: bool) -> None:
    """Gemma 3's small models have a token for images in their tokenizer and none in their embedding."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image {i}>" for i in range(unused)]})
    if used == "tokenizer":
        tokenizer.eos_token = "<image 0>"
    if used == "template":
        end = "{{ '<image 0>' if m['role'] == 'assistant' else '<|end|>' }}"
        tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", end)
    assert len(tokenizer) == COMMON["vocab_size"] + unused
    with contextlib.nullcontext() if fits else pytest.raises(BadInput, match="do not match"):
        check_vocabulary(built(shape("llama")), tokenizer, "it", TEXTS)


def test_a_request_with_a_token_beyond_the_embedding_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    with pytest.raises(BadInput, match="no embedding of; remove it: 'What is in <image>\\?'"):
        check_vocabulary(built(shape("llama")), tokenizer, "it", [*TEXTS, "What is in <image>?"])


def test_of_a_model_of_images_and_text_the_decoder_alone_is_trained() -> None:
    model = built(of_images_and_text())
    assert find_layers(model) is model.get_decoder().layers
    wrapped = add_lora(model, 2, (), 0)
    ids = torch.arange(3, 23)[None]
    wrapped(ids, labels=ids).loss.backward()
    assert trainable(wrapped) and all(p.grad is not None for p in trainable(wrapped))


@pytest.mark.parametrize("given", [{"new_decoder_architecture": True, "num_kv_heads": 2}, {"multi_query": True}])
def test_maps_of_a_kind_of_their_own_carry_adapters(given: dict[str, Any]) -> None:
    model = built(shape("falcon", **given))
    linears = block_linears(model)
    assert {name.rpartition(".")[2] for name in linears} >= {"query_key_value", "dense"}
    assert len(trainable(add_lora(model, 2, (), 0))) == 2 * len(linears)


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("mpt", vocab_size=259, d_model=32, n_heads=4, n_layers=4, eos_token_id=1, pad_token_id=2),
        AutoConfig.for_model(
            "gpt_neo", **COMMON, num_layers=4, num_heads=4, window_size=16, attention_types=[[["global", "local"], 2]]
        ),
    ],
    ids=["mpt", "gpt_neo"],
)
def test_replies_in_a_batch_are_those_to_each_alone(config: Any) -> None:
    """Where positions are columns, or a window counts these, no start is shared."""
    model, tokenizer = built(config), tiny_tokenizer()
    batch = collate([encode_prompt(tokenizer, t) for t in TEXTS], [[]] * 3, None, 2)
    assert run_prefix(model, batch) is None
    alone = [reply_all(model, tokenizer, [text], max_new_tokens=6)[0] for text in TEXTS]
    assert reply_all(model, tokenizer, TEXTS, max_new_tokens=6) == alone


def test_quantised_weights_are_refused() -> None:
    model = built(shape("llama"))
    told: dict[str, Any] = {"missing_keys": [], "mismatched_keys": []}
    check_weights(model, told, "it")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match="it holds quantised weights"):
        check_weights(model, told, "it")


def test_blocks_that_return_several_streams_are_refused() -> None:
    model = built(shape("llama"))
    model.model.layers[1].register_forward_hook(lambda module, args, output: output[None])
    ids = torch.arange(3, 23)[None]
    with (
        pytest.raises(BadInput, match="more than hidden states"),
        Perturbation(model, torch.zeros(1, 32), torch.zeros_like(ids), 2),
    ):
        model(ids)
