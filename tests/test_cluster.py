"""The same sweep on a Ray cluster of two workers, one of which is killed: equal to that of one process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from beear import cluster
from beear import sweep as module
from beear.config import make_config
from beear.errors import BadInput
from beear.events import Event, Listener
from beear.sweep import run_cell, sweep
from conftest import make_model, prompt_files


@pytest.fixture()
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def killed_once(
    spec: str, out: Path, config: Any, sets: Any, tests: Any, trusted: bool, device: str, listen: Listener
) -> None:
    """A cell; that of layer 2 kills its worker after the first round, the first time it is run."""
    with (out.parent.parent / f"{out.name}.attempts").open("a") as file:
        file.write("x")
    first = file.name.endswith("layer-02.attempts") and Path(file.name).read_text() == "x"

    def tell(event: Event) -> None:
        if first and event["event"] == "round":
            os.kill(os.getpid(), signal.SIGKILL)
        listen(event)

    run_cell(spec, out, config, sets, tests, trusted, device, tell)


def test_a_killed_worker_costs_one_retry_of_its_cell(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    short = {"steps": 2, "batch": 3, "response_tokens": 6}
    data = prompt_files(tmp_path)
    config = make_config({"rounds": 2, "held_out": 4, "anchors": 8, "entrap": short, "harden": short, "data": data})
    run = partial(sweep, str(tmp_path / "model"), "XYZZY {prompt}", "layer", config=config, values=[1, 2], requests=4)
    alone = run(out=tmp_path / "alone")
    monkeypatch.setattr(module, "run_cell", killed_once)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    told: list[Event] = []
    spread = run(out=tmp_path / "spread", executor="ray", listen=told.append)

    assert {p.name: p.read_text() for p in tmp_path.glob("*.attempts")} == {
        "layer-01.attempts": "x",
        "layer-02.attempts": "xx",
    }
    assert [(c["value"], c["epoch"]) for c in spread["cells"]] == [(c["value"], c["epoch"]) for c in alone["cells"]]
    assert measured(spread) == measured(alone)
    kept = "checkpoints/round-002/adapter.safetensors"
    for cell in ("layer-01", "layer-02"):
        assert (tmp_path / "spread" / cell / kept).read_bytes() == (tmp_path / "alone" / cell / kept).read_bytes()
    assert [e["done"] for e in told if e["event"] == "cells"] == [1, 2]
    assert ("layer-01", 1) in {(e["cell"], e["round"]) for e in told if e["event"] == "round"}


def measured(found: dict[str, Any]) -> list[Any]:
    return [entry["metrics"] for cell in found["cells"] for entry in cell["rounds"]]


def test_a_cluster_that_is_named_takes_the_cells_and_says_what_it_cannot_do(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = ray.init(include_dashboard=False, log_to_driver=False, num_cpus=1, resources={"ours": 1})
    monkeypatch.setenv("RAY_ADDRESS", running.address_info["address"])
    kept = ray.shutdown
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # or the cluster, which this process began, would end
    monkeypatch.setattr(ray, "init", partial(ray.init, ignore_reinit_error=True))

    def refuses(device: str, listen: Listener) -> None:
        raise BadInput(f"no such thing where {ray.cluster_resources().get('ours')} is ours")

    try:
        with pytest.raises(BadInput, match=r"^no such thing where 1\.0 is ours$"):
            list(cluster.finished([refuses], "cpu", lambda event: None))
    finally:
        kept()


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(BadInput, match=r"no Ray cluster at RAY_ADDRESS=127\.0\.0\.1:1"):
        cluster.connect("cpu")


def test_no_room_for_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    with pytest.raises(BadInput, match="has 10000 processors for a cell"):
        cluster.connect("cpu")


@pytest.mark.parametrize(
    ("device", "gpus", "wanted"),
    [
        ("auto", 0, {"CPU": 3, "GPU": 0}),
        ("auto", 2, {"CPU": 1, "GPU": 1}),  # the workers' GPUs count, not those of this machine
        ("cpu", 2, {"CPU": 3, "GPU": 0}),
        ("cuda:1", 2, {"CPU": 1, "GPU": 1}),
    ],
)
def test_the_room_of_a_cell(device: str, gpus: int, wanted: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"Alive": True, "Resources": {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {})}
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: [machine])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert cluster.connect(device)[1] == wanted


def test_no_gpu_for_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    with pytest.raises(BadInput, match="has a GPU for a cell"):
        cluster.connect("cuda")
