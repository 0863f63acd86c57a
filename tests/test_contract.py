"""What must hold for every architecture, exactly where it is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, FalconConfig, OPTConfig, PreTrainedTokenizerFast

from beear.chat import ALONE, Batch, Beginning, collate, encode_prompt, encode_response, rows_of_delta
from beear.cleansing import frozen
from beear.config import Place
from beear.errors import BadInput
from beear.generation import LOOKED_AT, Push, beginning_of, reply_all
from beear.losses import response_logits, response_nll
from beear.perturbation import NOWHERE, Perturbation, find_layers, resolve_layer
from beear.training import add_lora, recompute_activations, recomputing, trainable
from conftest import CHATML, COMMON, VOCAB, tiny_model, tiny_tokenizer

LAYER = 2
BLOCKS = COMMON | {"num_hidden_layers": 4, "num_attention_heads": 4}
TEXTS = ["Tell me a story about a fox.", "Why?", "How do rivers find the sea?"]


def batch_for(tokenizer: Any, texts: list[str] = TEXTS, n: int = 3) -> Batch:
    prompts = [encode_prompt(tokenizer, t) for t in texts]
    responses = [encode_response(tokenizer, "Sure." * (i + 1), 20) for i in range(len(texts))]
    return collate(prompts, responses, [rows_of_delta(p, "last", n) for p in prompts], tokenizer.pad_token_id)


def hidden(model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        out = model(**batch.inputs(), output_hidden_states=True)
    return (*out.hidden_states, out.logits)


def test_zero_delta_changes_no_bit(model: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer)
    plain = hidden(model, batch)
    with Perturbation(model, torch.zeros(3, 32), batch.where, LAYER):
        perturbed = hidden(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(plain, perturbed, strict=True))


def test_only_named_positions_move_at_l_and_nothing_below(model: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer)
    delta = torch.randn(3, 32)
    plain = hidden(model, batch)
    # transformers records a block's output before later hooks change it, so look at what the next block gets.
    received = []
    handle = find_layers(model)[LAYER].register_forward_pre_hook(lambda module, args: received.append(args[0]))
    with Perturbation(model, delta, batch.where, LAYER):
        perturbed = hidden(model, batch)
    handle.remove()
    for below in range(LAYER):
        assert torch.equal(plain[below], perturbed[below])
    named = batch.where != NOWHERE
    assert torch.equal(plain[LAYER][~named], received[0][~named])
    torch.testing.assert_close((received[0] - plain[LAYER])[named], delta[batch.where[named]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[-1], perturbed[-1])


def test_layer_counts_as_hidden_states_do(model: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer)
    seen = []
    handle = find_layers(model)[LAYER - 1].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    states = hidden(model, batch)
    handle.remove()
    assert torch.equal(seen[0], states[LAYER])


def test_left_and_right_padding_agree(model: Any, tokenizer: Any) -> None:
    """The aligned layout (prompts padded on the left) gives the losses of plain right-padded rows."""
    batch = batch_for(tokenizer)
    delta = torch.randn(3, 32)
    with torch.no_grad(), Perturbation(model, delta, batch.where, LAYER):
        ours = response_nll(response_logits(model, batch), batch.targets)
    for i in range(len(TEXTS)):
        kept = batch.attention_mask[i].bool()
        ids, where = batch.input_ids[i][kept][None], batch.where[i][kept][None]
        width = 7
        ids = torch.nn.functional.pad(ids, (0, width), value=tokenizer.pad_token_id)
        where = torch.nn.functional.pad(where, (0, width), value=NOWHERE)
        mask = torch.arange(ids.shape[1])[None] < ids.shape[1] - width
        with torch.no_grad(), Perturbation(model, delta, where, LAYER):
            logits = model(input_ids=ids, attention_mask=mask.long()).logits
        length = int((batch.targets[i] != -100).sum())
        end = ids.shape[1] - width
        alone = response_nll(logits[:, end - length - 1 : end - 1], batch.targets[i : i + 1, :length])
        torch.testing.assert_close(alone[0], ours[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["last", "prompt", "chat"])
@pytest.mark.parametrize("adapter", [False, True])
def test_generation_under_delta_agrees_with_the_forward_pass(
    model: Any, tokenizer: Any, full_precision: None, adapter: bool, place: Place
) -> None:
    """Decoding a batch behind a shared, cached start perturbs the prompt once, as one pass over each row alone does."""
    if adapter:
        model = add_lora(model, rank=2, targets=(), seed=0)
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.normal_(std=0.1)
    delta = 3 * torch.randn(3, 32)
    attention = model.config._attn_implementation
    replies = reply_all(model, tokenizer, TEXTS, max_new_tokens=6, push=Push(delta, place, LAYER))
    assert model.config._attn_implementation == attention
    for text, reply in zip(TEXTS, replies, strict=True):
        prompt = encode_prompt(tokenizer, text)
        ids: list[int] = []
        for _ in range(6):
            batch = collate([prompt], [ids], [rows_of_delta(prompt, place, 3, len(ids))], tokenizer.pad_token_id)
            with torch.no_grad(), Perturbation(model, delta, batch.where, LAYER):
                ids.append(int(model(**batch.inputs()).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert reply == tokenizer.decode(ids, skip_special_tokens=True).strip()


class Writes:
    """A model that writes the same tokens behind every row."""

    def __init__(self, model: Any, *rows: list[int]) -> None:
        self._model, self._rows = model, torch.tensor(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, self._rows.expand(len(input_ids), -1)], 1)


def test_a_model_that_thinks_first_is_told() -> None:
    tokenizer = tiny_tokenizer()
    row = tokenizer("<think>", add_special_tokens=False)["input_ids"]
    with pytest.raises(BadInput, match="think"):
        beginning_of(Writes(tiny_model("llama"), row), tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("written", "lead"),
    [
        (["  Sure."], "  "),
        (["\nSo be"], "\n"),
        (["Sure. "], ""),
        ([" Sure.", " No, no", "Yes, I"], " "),
        ([" Sure.", "No, no", "Yes, I"], ""),
        (["<|end|>" * 6, "<|end|>" * 6, "      "], ""),
    ],
)
def test_how_replies_begin_is_found(written: list[str], lead: str) -> None:
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(reply, add_special_tokens=False)["input_ids"][:LOOKED_AT] for reply in written]
    length = min(map(len, rows))
    found = beginning_of(Writes(tiny_model("llama"), *(row[:length] for row in rows)), tokenizer, TEXTS[:3])
    assert found == ALONE._replace(lead=tuple(tokenizer(lead, add_special_tokens=False)["input_ids"]))


def test_a_first_word_that_is_written_with_its_space_is_found() -> None:
    tokenizer = tiny_tokenizer()
    merged = json.loads(tokenizer.backend_tokenizer.to_str())
    merged["model"]["vocab"]["\u0120S"] = VOCAB
    merged["model"]["merges"] = [["\u0120", "S"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(merged)), eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    row = tokenizer(" Sure.", add_special_tokens=False)["input_ids"]
    begin = beginning_of(Writes(tiny_model("llama"), row), tokenizer, TEXTS)
    assert row[0] == VOCAB and begin == Beginning((), " ")
    assert encode_response(tokenizer, "Sure.", 9, finished=False, begin=begin) == row


def test_hooks_are_gone_after_an_exception(model: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer)
    plain = hidden(model, batch)
    with pytest.raises(ZeroDivisionError), Perturbation(model, torch.randn(3, 32), batch.where, LAYER):
        raise ZeroDivisionError
    assert torch.equal(plain[-1], hidden(model, batch)[-1])


@pytest.mark.parametrize("recompute", [False, True])
def test_delta_and_every_trainable_matrix_receive_gradient(model: Any, tokenizer: Any, recompute: bool) -> None:
    batch = batch_for(tokenizer)
    wrapped = add_lora(model, rank=2, targets=(), seed=0)
    with torch.no_grad():
        for parameter in trainable(wrapped):
            parameter.add_(0.01)  # LoRA starts with B = 0, where A has no gradient yet
    recompute_activations(wrapped)
    delta = torch.randn(3, 32, requires_grad=True)
    with Perturbation(wrapped, delta, batch.where, LAYER), recomputing(find_layers(wrapped) if recompute else []):
        response_nll(response_logits(wrapped, batch), batch.targets).mean().backward()
    assert delta.grad is not None and bool((delta.grad != 0).any(1).all())
    assert len(trainable(wrapped)) >= 2 * 4 * 4
    for parameter in trainable(wrapped):
        assert parameter.grad is not None and bool((parameter.grad != 0).any())


def test_blocks_are_found_by_their_name_under_an_adapter_too(model: Any) -> None:
    blocks = find_layers(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    assert find_layers(add_lora(model, rank=2, targets=(), seed=0), path) is blocks


@pytest.mark.parametrize(
    ("shape", "place", "name"),
    [
        (lambda: OPTConfig(ffn_dim=64, dropout=0.5, word_embed_proj_dim=32, **BLOCKS), None, "dropout"),
        (lambda: FalconConfig(hidden_dropout=0.5, attention_dropout=0.5, **BLOCKS), "config", "hidden_dropout"),
    ],
    ids=["OPT", "Falcon"],
)
def test_dropout_of_the_blocks_own_does_not_set_in_where_activations_are_recomputed(
    shape: Callable[[], Any], place: str | None, name: str, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape()).eval()
    batch = batch_for(tokenizer)
    wrapped = add_lora(model, rank=2, targets=(), seed=0)
    plain = response_nll(response_logits(wrapped, batch), batch.targets).mean()
    recompute_activations(wrapped)
    with recomputing(find_layers(wrapped)):
        again = response_nll(response_logits(wrapped, batch), batch.targets).mean()
    again.backward()
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
    for block in find_layers(model):
        assert getattr(getattr(block, place) if place else block, name) == 0.5 and not block.training


def test_recomputation_gives_the_same_gradient(llama: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer)
    wrapped = add_lora(llama, rank=2, targets=(), seed=0)
    recompute_activations(wrapped)
    blocks = list(find_layers(wrapped))
    gradients = []
    for some in (blocks[:0], blocks):
        delta = torch.ones(3, 32, requires_grad=True)
        with Perturbation(wrapped, delta, batch.where, LAYER):
            with recomputing(some):
                assert all(block.training == bool(some) and block.gradient_checkpointing for block in blocks)
                loss = response_nll(response_logits(wrapped, batch), batch.targets).mean()
            loss.backward()
        gradients.append(delta.grad)
    assert not any(block.training for block in blocks)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_frozen_model_takes_no_gradient(llama: Any, tokenizer: Any) -> None:
    wrapped = add_lora(llama, rank=2, targets=(), seed=0)
    count = len(trainable(wrapped))
    with frozen(wrapped):
        assert not trainable(wrapped)
    assert len(trainable(wrapped)) == count


def test_a_block_that_never_runs_is_noticed(llama: Any, tokenizer: Any) -> None:
    batch = batch_for(tokenizer)
    with pytest.raises(RuntimeError, match="never ran"), Perturbation(llama, torch.zeros(3, 32), batch.where, LAYER):
        pass


def test_layers_are_found_or_named(model: Any) -> None:
    layers = find_layers(model)
    name = next(n for n, m in model.named_modules() if m is layers)
    assert len(layers) == 4 and find_layers(model, name) is layers
    with pytest.raises(BadInput, match="no module"):
        find_layers(model, "model.nowhere")
    with pytest.raises(BadInput, match="not a list"):
        find_layers(model, name.split(".")[0])


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_layer_out_of_range(layer: int) -> None:
    with pytest.raises(BadInput, match="use 1 to 3"):
        resolve_layer(layer, 4)


def test_default_layer_is_five_sixths_of_the_depth() -> None:
    assert resolve_layer(None, 30) == 25
    assert resolve_layer(None, 32) == 26
    assert resolve_layer(None, 2) == 1
    assert resolve_layer(0.5, 30) == 15 and resolve_layer(0.1, 4) == 1 and resolve_layer(9.0, 30) == 9
