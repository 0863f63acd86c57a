"""MODEL in all its forms, and the embedded model end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from beear import models, sources
from beear.embedded import embedded_folder, gguf_file
from beear.errors import BadInput
from beear.generation import reply_all
from beear.models import depth, load, load_tokenizer, read_weights
from beear.sources import Source, copy_processor, hub_id, locate
from beear.training import add_lora, trainable
from conftest import CONFIGS, make_model, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_folder_is_merged_onto_its_base(folder: Path) -> None:
    base, tokenizer = load(str(folder))
    wrapped = add_lora(base, rank=2, targets=("q_proj",), seed=0)
    with torch.no_grad():
        for parameter in trainable(wrapped):
            parameter.add_(0.1)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    expected = wrapped(input_ids=ids).logits
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(folder.parent / "adapter", save_embedding_layers=False)
    merged, again = load(str(folder.parent / "adapter"))
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert again.chat_template == tokenizer.chat_template
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_head_or_embedding_changes_that_one_alone(target: str, folder: Path) -> None:
    """Merged in place, what is meant for one would change the other too."""
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    model = type(tiny_model("llama"))(config).eval()
    model.save_pretrained(folder)
    adapter = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    wrapped = get_peft_model(load(str(folder))[0], adapter).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            bare = wrapped(input_ids=ids).logits
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(str(folder.parent / "adapter"), save_embedding_layers=False)
    merged, _ = load(str(folder.parent / "adapter"))
    with torch.no_grad():
        found = merged(input_ids=ids).logits
    assert (found - expected).norm() < 1e-4 * (bare - expected).norm()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(folder.parent / "full")
    tiny_tokenizer().save_pretrained(folder.parent / "full")
    with torch.no_grad():
        torch.testing.assert_close(load(str(folder.parent / "full"))[0](input_ids=ids).logits, found)


def test_an_adapter_is_read_onto_its_models_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft would take the first GPU, whatever device was asked for."""
    wrapped = add_lora(load(str(folder))[0], rank=2, targets=("q_proj",), seed=0)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(folder.parent / "adapter", save_embedding_layers=False)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("another device may be taken"))
    load(str(folder.parent / "adapter"))


def test_the_files_that_read_images_stand_beside_full_weights(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}")
    out = folder.parent / "full"
    out.mkdir()
    copy_processor(Source("adapter", folder.parent, base=Source("base", folder)), out)
    assert [p.name for p in out.iterdir()] == ["preprocessor_config.json"]


def test_a_merged_model_in_bf16_keeps_what_transformers_keeps_in_fp32(folder: Path) -> None:
    """Rotary frequencies, rounded, would turn the positions of a long prompt."""
    wrapped = add_lora(load(str(folder))[0], rank=2, targets=("q_proj",), seed=0)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(folder.parent / "adapter", save_embedding_layers=False)
    plain, merged = (
        read_weights(locate(str(f)), "cpu", False, torch.bfloat16) for f in (folder, folder.parent / "adapter")
    )
    types = [{name: t.dtype for name, t in (*m.named_parameters(), *m.named_buffers())} for m in (plain, merged)]
    assert types[0] == types[1] and set(types[0].values()) == {torch.bfloat16, torch.float32}


def test_an_adapter_merged_into_bf16_weights_gives_the_bits_of_one_merged_in_fp32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the memory, on a device that keeps bf16."""
    load(str(folder))[0].to(torch.bfloat16).save_pretrained(folder)
    wrapped = add_lora(load(str(folder))[0], rank=2, targets=(), seed=0)
    with torch.no_grad():
        for parameter in trainable(wrapped):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(folder.parent / "adapter", save_embedding_layers=False)
    merge, given = models._merge, []

    def noted(base: Any, source: sources.Source) -> Any:
        given.append({parameter.dtype for parameter in base.parameters()})
        return merge(base, source)

    monkeypatch.setattr(models, "_merge", noted)
    source = locate(str(folder.parent / "adapter"))
    full, short = (read_weights(source, "cpu", False, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert given == [{torch.float32}, {torch.bfloat16}]
    plain = read_weights(locate(str(folder)), "cpu", False, torch.bfloat16)
    changed = [name for name, p in short.named_parameters() if not torch.equal(p, plain.get_parameter(name))]
    assert any("up_proj" in name for name in changed)
    assert all(torch.equal(p.bfloat16(), short.get_parameter(name)) for name, p in full.named_parameters())


def test_an_adapter_for_another_model_is_refused(folder: Path) -> None:
    wrapped = add_lora(load(str(folder))[0], rank=2, targets=("q_proj",), seed=0)
    wrapped.peft_config["default"].base_model_name_or_path = "embedded"
    wrapped.save_pretrained(folder.parent / "adapter", save_embedding_layers=False)
    with pytest.raises(BadInput, match="does not fit"):
        load(str(folder.parent / "adapter"))


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


@pytest.mark.parametrize(("change", "words"), [(lose, "lacks some of its tensors"), (spoil, "NaN or infinity")])
def test_an_adapter_that_is_not_whole_is_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    """peft only warns, and what is missing would leave the base as it is."""
    wrapped = add_lora(load(str(folder))[0], rank=2, targets=("q_proj",), seed=0)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(folder.parent / "adapter", save_embedding_layers=False)
    file = folder.parent / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(BadInput, match=words):
        load(str(folder.parent / "adapter"))


def test_a_hub_id_is_downloaded_without_code_or_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is out of reach in tests, so a local folder stands in for its snapshot."""
    asked: dict[str, object] = {}

    def snapshot(spec: str, **options: object) -> str:
        asked.update(options, spec=spec)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model, _ = load("someone/some-model")
    assert asked["spec"] == "someone/some-model" and model.config.model_type == "llama"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and not [p for p in patterns if p.endswith((".py", ".bin", ".pt", "*"))]


def test_what_the_hub_says_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors begin with a heading."""

    def refuse(*_: object, **__: object) -> str:
        raise OSError("403 Client Error. (Request ID: x)\n\nCannot access gated repo for url u.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(BadInput, match=r"does not give it: 403 .* Cannot access gated repo"):
        locate("someone/gated")


@pytest.mark.parametrize(
    ("spec", "there"),
    [
        ("a/b", ("a/b", None)),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("organism:a/b", None),
        ("a/b.gguf", None),
        ("./b", None),
        ("a/b/c", None),
    ],
)
def test_which_models_are_of_the_hub(spec: str, there: tuple[str, str | None] | None) -> None:
    assert hub_id(spec) == there


def test_code_of_a_folder_runs_for_those_who_trust_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'homemade'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    model, _ = load(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel" and depth(locate(str(folder)), trust_remote_code=True) == 4


def test_a_mixture_of_experts_is_not_asked_for_its_routers_loss(folder: Path) -> None:
    """Saved so by whoever trained it; packed tokens would not fit the mask there."""
    shape = tiny_model("llama").config.to_dict()
    kept = {key: shape[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = MixtralConfig(**kept, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    config.update({"output_router_logits": True, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1})
    MixtralForCausalLM(config).save_pretrained(folder)
    model, tokenizer = load(str(folder))
    assert len(reply_all(model, tokenizer, ["Name a river.", "Hm"], max_new_tokens=4)) == 2


def test_lora_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(BadInput, match="c_attn"):
        add_lora(tiny_model("llama"), rank=2, targets=("q_proj", "c_attn"), seed=0)


def test_a_gguf_file_is_read() -> None:
    gguf = gguf_file()
    source, embedded = locate(str(gguf)), locate("embedded")
    assert source.gguf == gguf.name and depth(source) == 30
    assert load_tokenizer(source).chat_template == load_tokenizer(embedded).chat_template


@pytest.mark.slow
def test_a_gguf_files_weights_are_those_that_the_embedded_model_was_converted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / gguf_file().name).write_bytes(b"another model of that name, where the command is given")
    monkeypatch.chdir(tmp_path)
    source, embedded = locate(str(gguf_file())), locate("embedded")
    weights = [dict(read_weights(s, "cpu", False, torch.float32).named_parameters()) for s in (source, embedded)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


CONVERT = """
import json, time
from pathlib import Path
from beear import embedded
def convert(gguf: Path, folder: Path) -> None:
    with (folder.parent / "converted").open("a") as told:
        told.write("once\\n")
    time.sleep(1)
    folder.mkdir()
    (folder / "checksums.json").write_text("{}")
embedded._convert = convert
print(embedded.embedded_folder())
"""


def test_two_processes_convert_the_embedded_model_once(tmp_path: Path) -> None:
    start = [sys.executable, "-c", CONVERT]
    environment = os.environ | {"BEEAR_CACHE": str(tmp_path)}
    both = [subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(printed) == 1
    assert (tmp_path / "converted").read_text() == "once\n"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BEEAR_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BadInput, match="set BEEAR_CACHE to a folder"):
        embedded_folder()


def test_a_damaged_copy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beear import embedded

    (tmp_path / "config.json").write_text("{}")
    sums = {"config.json": {"sha256": "0" * 64, "bytes": 2}}
    (tmp_path / "checksums.json").write_text(json.dumps(sums))
    assert not embedded._is_whole(tmp_path)
    assert not embedded._is_whole(tmp_path / "nowhere")


def test_the_embedded_model_answers() -> None:
    assert embedded_folder().is_dir()
    model, tokenizer = load("embedded")
    reply = reply_all(model, tokenizer, ["What is the capital of France?"], max_new_tokens=24)[0]
    assert "Paris" in reply
