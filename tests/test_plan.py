"""Plans: prices add up, miniatures run for every architecture, and a plan is told beside what the run took."""

from __future__ import annotations

import json
import mmap
import pickle
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from beear import miniature
from beear.config import Config, make_config
from beear.errors import BadInput, Failed
from beear.generation import BATCH
from beear.job import run_cleanse
from beear.memory import available_memory, peak_memory, restart_peak
from beear.miniature import PEAK, SECONDS, plan_cleanse, scaled, stages
from beear.models import cut
from beear.order import run_settings
from beear.plan import Plan, read_plan, write_plan
from beear.sets import read_sets
from beear.sources import Source
from conftest import COMMON, CONFIGS, make_model, prompt_files
from failing import broken, refused, slow

PLAN = Plan({"load": 1.0, "round": 10.0, "after": 3.0}, {"load": 5, "round": 9, "after": 7}, 6, 10)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def config(place: Path) -> Config:
    settings: dict[str, Any] = {
        "rounds": 1,
        "held_out": 4,
        "entrap": {"steps": 3, "batch": 3, "response_tokens": 4},
        "harden": {"steps": 3, "batch": 3, "response_tokens": 4, "lora_rank": 2},
    }
    return make_config(settings | {"data": prompt_files(place)})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniatures run in this process, of what another would be sent."""
    monkeypatch.setattr(miniature, "in_own_process", lambda work: pickle.loads(pickle.dumps(work))())


def test_a_job_costs_its_stages_and_as_many_rounds_as_it_takes() -> None:
    assert PLAN.total(1) == 14 and PLAN.total(6) == 64
    assert PLAN.expected(6) == {"seconds": 64, "peak_memory_bytes": 9}


def test_prices_grow_by_block_on_either_side_of_l() -> None:
    def price(below: int, behind: int) -> dict[tuple[str, str], float]:
        return {("round", SECONDS): 5 + 2 * below + 3 * behind}

    prices = [price(1, 1), price(5, 1), price(1, 5)]
    assert scaled(prices, 4, layer=25, depth=30) == {("round", SECONDS): 5 + 2 * 25 + 3 * 5}


def test_a_price_that_falls_with_more_blocks_is_noise() -> None:
    prices = [{("load", SECONDS): value} for value in (3.0, 2.0, 4.0)]
    assert scaled(prices, 1, layer=5, depth=8) == {("load", SECONDS): 3 + 2}


def test_stages_count_what_a_job_does(config: Config) -> None:
    pieces = ("load", "replies", "fresh delta", "language", "own replies", "round", "divergence")
    steps = ("first entrap steps", "entrap step", "residual", "harden step", "refused", "original")
    prices = {(piece, SECONDS): 1.0 for piece in (*pieces, *steps)} | {(piece, PEAK): 2.5 for piece in pieces}
    prices["round", PEAK], prices["fresh delta", PEAK] = 7.5, 4.5
    config = config.model_copy(update={"entrap": config.entrap.model_copy(update={"batches": 2})})
    plan = stages(prices, read_sets(config), config)
    assert plan.seconds["round"] == 1 + (3 - 2) + 1 + 3 + 1
    assert plan.seconds["own replies"] == (8 + 8) / BATCH + (8 + 8) + 1
    assert plan.peak_memory_bytes == {"load": 3, "before": 5, "own replies": 3, "round": 8, "after": 5}
    assert (plan.least_rounds, plan.rounds) == (1, 1)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_cut_model_has_the_shape_and_fewer_blocks(name: str) -> None:
    shape = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(cut(shape, 2))
    assert model.config.num_hidden_layers == 2 and shape.num_hidden_layers == 4
    assert model.config.hidden_size == shape.hidden_size


def test_lists_with_an_entry_for_each_block_are_cut_as_well() -> None:
    for shape in (Qwen2Config(num_hidden_layers=6), Gemma2Config(num_hidden_layers=6)):
        assert len(cut(shape, 3).layer_types) == 3
    assert cut(CONFIGS["gpt2"](), 2).vocab_size == COMMON["vocab_size"]


@pytest.mark.usefixtures("here")
def test_planned_then_run_the_results_hold_both(place: Path, config: Config) -> None:
    plan = plan_cleanse(str(place / "model"), place / "run", config)
    assert [p.name for p in (place / "run").iterdir()] == ["plan.json"]
    assert all(seconds > 0 for seconds in plan.seconds.values())
    assert all(peak > 2**26 for peak in plan.peak_memory_bytes.values())
    run_cleanse(str(place / "model"), place / "run", config)
    results = json.loads((place / "run" / "results.json").read_text())
    assert results["planned"] == plan.expected(1)
    assert "planned before" in (place / "run" / "report.html").read_text()


def test_a_plan_of_other_settings_is_not_told(tmp_path: Path) -> None:
    settings = run_settings("a", False, Config())
    write_plan(tmp_path, PLAN, settings)
    assert read_plan(tmp_path, settings) == PLAN
    assert read_plan(tmp_path, run_settings("b", False, Config())) is None
    (tmp_path / "plan.json").write_text("{}")
    assert read_plan(tmp_path, settings) is None


def test_a_numbered_gpu_is_woken_before_its_peak_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process has not touched it."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: done.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    restart_peak("cuda:1")
    assert done == ["init", "cuda:1"]


@pytest.mark.usefixtures("here")
def test_a_plan_refuses_what_a_run_would(place: Path, config: Config) -> None:
    with pytest.raises(BadInput, match="layer=9 is out of range"):
        plan_cleanse(str(place / "model"), place / "run", config.model_copy(update={"layer": 9}))
    assert not (place / "run").exists()


def test_a_miniature_that_dies_says_why() -> None:
    with pytest.raises(Failed, match="miniature of this model does not run here: no such shape"):
        miniature.in_own_process(broken)


def test_an_interrupted_plan_does_not_wait_for_its_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        miniature.in_own_process(slow)
    assert time.monotonic() - started < 30


def test_a_miniature_refuses_what_a_run_would() -> None:
    with pytest.raises(BadInput, match="no such blocks"):
        miniature.in_own_process(refused)


def test_peak_memory_can_be_counted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beear.memory._GROUP", tmp_path)  # a container's cache may fill its limit
    with mmap.mmap(-1, 2**28) as held:  # given back at once, whatever the allocator keeps
        held.write(b"1" * 2**28)
    high = peak_memory()
    restart_peak()
    assert peak_memory() < high - 2**27
    assert available_memory() > 2**26


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "8000000", "memory.current": "3000000", "memory.stat": "anon 1\ninactive_file 500"}, 5_000_500),
        ({"memory.max": "8000000", "memory.current": "9000000", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "800",
                "memory/memory.usage_in_bytes": "300",
                "memory/memory.stat": "",
            },
            500,
        ),
        ({"memory.max": "max", "memory.current": "3", "memory.stat": ""}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr("beear.memory._GROUP", tmp_path)
    free = available_memory()
    assert free == left if left is not None else free > 2**26


def test_an_adapter_is_planned_by_its_base(place: Path) -> None:
    from beear.models import depth, read_shape

    base = Source("base", place / "model")
    assert depth(Source("adapter", place, base=base)) == read_shape(base).num_hidden_layers == 4
