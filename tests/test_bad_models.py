"""Model folders that are broken, cut short or hostile: one clear line each, and nothing of them runs."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from beear.errors import BadInput
from beear.models import load, locate
from conftest import tiny_model, tiny_tokenizer

Change = Callable[[Path], object]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


class Payload:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran",)


def weights(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def written(name: str, content: bytes | str | Any) -> Change:
    def apply(folder: Path) -> None:
        raw = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
        (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def configured(**changed: Any) -> Change:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))

    return apply


def indexed(target: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder.parent / "outside.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def remote_code(folder: Path) -> None:
    configured(model_type="evil", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"})(folder)
    (folder / "evil.py").write_text("print('remote code ran')")


def adapter(base: str, **changed: Any) -> Change:
    def apply(folder: Path) -> None:
        named = base.replace("HERE", str(folder)).replace("OTHER", str(folder.parent / "other"))
        config = {"base_model_name_or_path": named, "peft_type": "LORA", "r": 2, **changed}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")

    return apply


def in_a_ring(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    adapter("OTHER")(folder)
    back = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (folder.parent / "other" / "adapter_config.json").write_text(json.dumps(back))
    save_file({"a": torch.zeros(1)}, folder.parent / "other" / "adapter_model.safetensors")


def nan(tensors: dict[str, Any]) -> None:
    tensors[WEIGHT][0, 0] = float("nan")


BAD: dict[str, tuple[Change, str]] = {
    "pickle under another name": (written("model.safetensors", pickle.dumps(Payload())), "no safetensors file"),
    "empty weights": (written("model.safetensors", b""), "no safetensors file"),
    "weights cut short": (cut, "not as long as its header says"),
    "header of 2^60 bytes": (written("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "no safetensors file"),
    "header that is no JSON": (written("model.safetensors", struct.pack("<Q", 4) + b"abcd"), "no header"),
    "header that is a list": (written("model.safetensors", struct.pack("<Q", 2) + b"[]"), "no header"),
    "tensor of 2^60 bytes": (
        written(
            "model.safetensors",
            struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%d]}}   ' % 2**60,
        ),
        "no header",
    ),
    "a tensor is missing": (weights(lambda w: w.pop(WEIGHT)), f"lacks 1 of its tensors, such as {WEIGHT}"),
    "a tensor of another shape": (weights(lambda w: w.update({WEIGHT: torch.zeros(3, 3)})), "in another shape"),
    "NaN": (weights(nan), f"holds NaN or infinity in {WEIGHT}"),
    "index out of the folder": (indexed("../outside.safetensors"), "do not trust it"),
    "index to an absolute path": (indexed("/etc/passwd"), "do not trust it"),
    "index to a file that is not there": (indexed("gone.safetensors"), "is not there"),
    "index that is a list": (written("model.safetensors.index.json", []), "cannot be read"),
    "config.json is a list": (written("config.json", []), "cannot read the"),
    "config.json is cut": (written("config.json", '{"model_type": '), "cannot read the"),
    "architecture unknown": (configured(model_type="nonsense"), "cannot read the"),
    "code of its own": (remote_code, "use --trust-remote-code"),
    "tokenizer of another model": (lambda folder: shrink(folder), "they do not match"),
    "template reaches into Python": (
        written("chat_template.jinja", "{{ ''.__class__.__mro__ }}{{ messages[0]['content'] }}"),
        "cannot be rendered",
    ),
    "template is broken": (written("chat_template.jinja", "{% for m in messages %"), "cannot be rendered"),
    "template refuses": (written("chat_template.jinja", "{{ raise_exception('no') }}"), "cannot be rendered: no"),
    "template drops the user's words": (written("chat_template.jinja", "nothing"), "rewrites the user's words"),
    "adapter of itself": (adapter("HERE"), "does not name its base"),
    "adapters in a ring": (in_a_ring, "each other's base"),
    "adapter without a base": (written("adapter_config.json", {}), "does not name its base"),
}


def shrink(folder: Path) -> None:
    """A model with fewer embeddings than the tokenizer has tokens."""
    model = tiny_model("llama")
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = BAD[name]
    change(folder)
    with pytest.raises(BadInput) as told:
        load(str(folder), device="cpu")
    assert words in str(told.value) and "\n" not in str(told.value)
    assert " ran" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUFxxxxxxxx", b"PK" + bytes(60)])
def test_a_gguf_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(BadInput, match="no GGUF file"):
        locate(str(tmp_path / "m.gguf"))


def test_a_gguf_file_that_only_begins_as_one(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    with pytest.raises(BadInput, match="cannot read"):
        load(str(tmp_path / "m.gguf"), device="cpu")


def test_a_whole_model_loads(folder: Path) -> None:
    load(str(folder), device="cpu")
