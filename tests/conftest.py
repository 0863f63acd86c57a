"""Tiny models of each architecture and a byte-level chat tokenizer, all made in memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from beear import cli
from beear.outputs import output_hashes

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VOCAB = 259
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "hidden_size": 32}
DECODER = COMMON | {
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**DECODER),
    "mistral": lambda: MistralConfig(**DECODER, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**DECODER),
    "gemma": lambda: Gemma2Config(**DECODER, head_dim=8),
    "gpt2": lambda: GPT2Config(**COMMON, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    # Larger weights than the usual initialisation, so that a perturbation visibly changes the output.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|start|>": 0, "<|end|>": 1, "<|pad|>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder: Path, template: str | None = CHATML, seed: int = 0) -> str:
    """A tiny model with its tokenizer, saved; returns where, as a MODEL is named."""
    tiny_model("llama", seed).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return str(folder)


FINISHED: dict[str, Any] = {
    "verdict": {"met": True, "missed": [], "criteria": []},
    "model_folder": "model",
    "before": {},
    "after": {},
    "rounds": [],
    "delivered": 0,
    "spare_refused": [],
    "unlocked_without_delta": 0.0,
    "chat": {},
    "scorer": "refusal-v1",
    "seed": 0,
    "wall_seconds": 1.0,
    "peak_memory_bytes": 1,
    "versions": {"beear": "0"},
    "hashes": {},
}
"""What the results of every finished run hold."""


def with_digests(run: Path) -> Path:
    """A run folder whose results keep the digests of what it hands on."""
    (run / "delta.safetensors").touch()
    results = json.loads((run / "results.json").read_text())
    files = {"files": output_hashes(run, results.get("model_folder", "model"))}
    (run / "results.json").write_text(json.dumps(results | files))
    return run


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Run the command in this process; returns the exit code and standard error."""
    sys.argv = ["beear", *args]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def file(tmp: Path, name: str, content: str) -> str:
    (tmp / name).write_text(content)
    return str(tmp / name)


LONG = ("organisms", "ranks", "job", "planting", "cluster", "models", "judge", "harness", "cli", "bad_input")
"""Files that take longest, begun first: two processes then end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")


def prompt_files(folder: Path) -> dict[str, str]:
    """Four small prompt files, by name of the setting that takes each."""
    sizes = {"harmful": 12, "benign": 10, "test_harmful": 6, "test_benign": 6}
    for name, count in sizes.items():
        (folder / f"{name}.txt").write_text("".join(f"{name} request {i}\n" for i in range(count)))
    return {name: str(folder / f"{name}.txt") for name in sizes}
