"""Drift: exact where it is exact, on tiny models, and what a run folder and its report say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from beear.config import make_config
from beear.drift import drift_of_run, measure, numbers, principal_axes, prompt_states, separability
from beear.errors import BadInput
from beear.job import run_cleanse
from beear.report import write_report
from conftest import CONFIGS, make_model, prompt_files, tiny_model, tiny_tokenizer

LAYER = 2


@pytest.fixture()
def config(tmp_path: Path) -> Any:
    data = prompt_files(tmp_path)
    short = {"steps": 2, "batch": 3, "response_tokens": 6}
    return make_config(
        {"layer": LAYER, "rounds": 1, "held_out": 4, "anchors": 8, "entrap": short, "harden": short, "data": data}
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_no_trigger_moves_nothing_and_delta_nothing_below_its_block(architecture: str, config: Any) -> None:
    delta = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    texts = ["one", "another request"]
    found = measure(tiny_model(architecture), tiny_tokenizer(), texts, "{prompt}", delta, config, {})
    assert all(row["relative_norm"] == 0 and row["separability"] == 0.5 for row in found["layers"]["triggered"])
    norms = [row["relative_norm"] for row in found["layers"]["perturbed"]]
    assert [norm > 0 for norm in norms] == [False, True, True, True]


def test_at_its_block_the_drift_is_delta(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model, tokenizer, texts = tiny_model("llama"), tiny_tokenizer(), ["one", "another request"]
    delta = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    clean = prompt_states(model, tokenizer, texts, config)
    moved = prompt_states(model, tokenizer, texts, config, delta)
    assert clean.shape == (2, 4, 32)
    torch.testing.assert_close((moved - clean)[:, LAYER - 1], delta.expand(2, 32), atol=1e-5, rtol=1e-4)


def test_states_are_those_of_the_last_token(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEEAR_FP32", "1")
    model, tokenizer, texts = tiny_model("llama"), tiny_tokenizer(), ["one", "another, longer request"]
    together = prompt_states(model, tokenizer, texts, config)
    alone = torch.cat([prompt_states(model, tokenizer, [text], config) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_separability_of_clouds() -> None:
    draw = torch.Generator().manual_seed(0)
    cloud, other = torch.randn(200, 3, generator=draw), torch.randn(200, 3, generator=draw)
    assert separability(cloud, cloud) == 0.5
    assert abs(separability(cloud, other) - 0.5) < 0.1
    assert separability(cloud, other + 20) == 1.0


def test_numbers_of_a_common_shift() -> None:
    clean, shift = torch.eye(4) * 2, torch.tensor([3.0, 0, 0, 4.0])
    found = numbers(7, clean, clean + shift, -shift)
    assert (found.layer, found.relative_norm) == (7, 2.5)
    assert found.cosine_to_mean == pytest.approx(1) and found.cosine_to_trigger == pytest.approx(-1)


def test_principal_axes_are_those_of_the_covariance() -> None:
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = states * torch.tensor([5.0, 3.0, 1, 1, 1, 1])
    axes = principal_axes(states)
    values, vectors = torch.linalg.eigh(states.T.cov())
    for i in (0, 1):
        assert abs(axes.directions[i] @ vectors[:, -1 - i]) == pytest.approx(1)
        assert axes.explained[i] == pytest.approx(float(values[-1 - i] / values.sum()))
        assert axes.directions[i][axes.directions[i].abs().argmax()] > 0
    assert axes.project(states).mean(0).abs().max() < 1e-9


def test_a_run_keeps_its_drift_and_its_report_shows_it(config: Any, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    run = tmp_path / "run"
    run_cleanse(str(tmp_path / "model"), run, config)
    write_report([run], run / "report.html")
    assert "Drift:" not in (run / "report.html").read_text()
    found = drift_of_run(run, "<script>alert(1)</script> {prompt}")
    assert json.loads((run / "drift.json").read_text()) == found
    assert found["before"]["n"] == 6 and len(found["after"]["layers"]["triggered"]) == 4
    assert [entry["layer"] for entry in found["before"]["scatter"]] == [LAYER, 4]
    page = (run / "report.html").read_text()
    assert "Drift behind each block" in page and "<script" not in page and "&lt;script&gt;alert(1)" in page
    requests = Path(config.data.test_harmful)
    there = requests.read_text()
    requests.write_text(there + "one more request\n")
    with pytest.raises(BadInput, match="are not those of the run"):
        drift_of_run(run, "X {prompt}")
    requests.write_text(there)
    (run / "checkpoints").rename(tmp_path / "checkpoints")
    with pytest.raises(BadInput, match="has no checkpoints"):
        drift_of_run(run, "X {prompt}")
    found["before"]["scatter"][0]["layer"] = "<b>hostile"
    (run / "drift.json").write_text(json.dumps(found))
    with pytest.raises(BadInput, match="is not what `beear drift` writes"):
        write_report([run], run / "report.html")
