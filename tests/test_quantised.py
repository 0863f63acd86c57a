"""A model's own weights in few bits: what is stored, that a cleansing works on top of it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from beear import job, models, ranks, sources
from beear.before_after import before_and_after
from beear.config import Config, make_config
from beear.errors import BadInput
from beear.job import run_cleanse
from beear.known import add_triggered
from beear.quantised import check_quantised, in_few_bits, is_quantised, quantise
from conftest import make_model, prompt_files, tiny_model

BYTES = {"int8": 1.0, "nf4": 0.5}
"""For each weight."""
ERROR = {"int8": 0.03, "nf4": 0.15}
"""Of a map's output, relative; rounding a normal weight to the nearest of 16 normal quantiles costs a tenth."""


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    short = {"steps": 2, "batch": 3, "response_tokens": 6}
    sizes = {"rounds": 2, "held_out": 4, "anchors": 8, "entrap": short, "harden": short}
    return make_config({**sizes, "weights": "nf4", "data": prompt_files(tmp_path)})


@pytest.fixture()
def folder(tmp_path: Path) -> str:
    make_model(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma"])
def test_maps_are_stored_in_few_bits(architecture: str, weights: Any) -> None:
    model, whole = tiny_model(architecture), tiny_model(architecture)
    quantise(model, weights, "cpu")
    small = [m for m in model.modules() if is_quantised(m)]
    assert len(small) == 7 * 4
    stored = sum(m.weight.numel() * m.weight.element_size() for m in small)
    counted = sum(p.numel() for n, p in whole.named_parameters() if "_proj.weight" in n)
    assert stored == counted * BYTES[weights]
    assert model.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_a_map_gives_nearly_the_same(weights: Any) -> None:
    torch.manual_seed(0)
    linear, given = torch.nn.Linear(128, 96), torch.randn(16, 128)  # of narrower ones bitsandbytes makes more errors
    small = in_few_bits(linear, weights).to("cpu")
    with torch.no_grad():
        wanted, got = linear(given), small(given)
    assert 0 < (got - wanted).norm() / wanted.norm() < ERROR[weights]


def test_conv1d_maps_cannot_be_stored_so() -> None:
    with pytest.raises(BadInput, match="only 0% of GPT2LMHeadModel are linear maps"):
        quantise(tiny_model("gpt2"), "nf4", "cpu")


def test_a_run_on_quantised_weights(
    folder: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured as it was trained, resumes to the same bits, and its adapter fits the full weights as well."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_cleanse(folder, whole, config)

    def stops(self: Any, state: Any) -> None:
        checkpoint(self, state)
        raise KeyboardInterrupt

    checkpoint = job.Job.checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "checkpoint", stops)
        with pytest.raises(KeyboardInterrupt):
            run_cleanse(folder, cut, config)
    run_cleanse(folder, cut, config, resume=True)
    results = [json.loads((out / "results.json").read_text()) for out in (whole, cut)]
    assert results[0]["after"] == results[1]["after"]
    assert results[0]["files"] == results[1]["files"]
    assert results[0]["after"]["kl"]["value"] > 0

    assert "weights in nf4" in (whole / results[0]["model_folder"] / "README.md").read_text()
    quantised = before_and_after(whole, lambda when, model, tokenizer: any(map(is_quantised, model.modules())))
    assert quantised == {"before": True, "after": True}
    add_triggered(whole, "XYZZY {prompt}")
    again = json.loads((whole / "results.json").read_text())
    assert again["before"]["asr_triggered"]["n"] == again["after"]["asr_triggered"]["n"] > 0
    model, _ = models.load(str(whole / again["model_folder"]))
    assert not any(is_quantised(m) for m in model.modules())


def test_less_is_held(folder: str, config: Config) -> None:
    source = sources.locate(folder)
    full, small = (models.load_weights(source, "cpu", False, w) for w in ("full", "nf4"))

    def held(model: Any) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    assert held(small) < 0.5 * held(full)


def test_what_does_not_go_with_it(folder: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--merge needs full weights"):
        run_cleanse(folder, tmp_path / "run", config, merge=True)
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "is_sharded", lambda: True)
        with pytest.raises(BadInput, match="FSDP does not share out"):
            check_quantised(config.weights)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInput, match="extra quant"):
        run_cleanse(folder, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
