"""Several processes on one cleansing: the result of one, whatever their number, and nothing lost when one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from beear import ranks
from beear.config import load_config
from beear.errors import BadInput
from beear.job import run_cleanse
from beear.perturbation import find_layers
from conftest import make_model, prompt_files, tiny_model

SETTINGS: dict[str, Any] = {
    "rounds": 2,
    "least_rounds": 2,
    "held_out": 4,
    "anchors": 8,
    "entrap": {"steps": 4, "batch": 2, "response_tokens": 6},
    "harden": {"steps": 3, "batch": 2, "anchor_batch": 2, "response_tokens": 6, "lora_rank": 2, "stop_below": 0.0},
}
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
"""Sums over ranks add up in another order. Adam makes of such differences what it makes of any small gradient."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "model")
    settings = SETTINGS | {"data": prompt_files(folder)}
    (folder / "c.yaml").write_text(json.dumps(settings))
    return folder


EXAMPLES = Path(__file__).parent.parent / "examples" / "accelerate"


def command(place: Path, name: str, processes: int, *more: str, shipped: str | None = None) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if shipped:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / shipped)]
        launcher += ["--num_processes", str(processes)]
    job = ["-m", "beear", "cleanse", str(place / "model"), "-o", str(place / name), "-c", str(place / "c.yaml"), "-q"]
    return [sys.executable, *launcher, *job, *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "BEEAR_FP32": "1"}
"""bf16 products of fewer rows round otherwise, by more than the tolerance."""


SHARDED = {"ACCELERATE_USE_FSDP": "true"}


def finish(place: Path, name: str, processes: int, *more: str, shipped: str | None = None) -> Path:
    started = command(place, name, processes, *more, shipped=shipped)
    done = subprocess.run(started, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (place / name / "results.json").exists(), done.stderr
    assert done.stderr.count("beear: target not met") == 1, done.stderr
    return place / name


def finish_here(place: Path, name: str, resume: bool = False) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEEAR_FP32", "1")
        config = load_config(file=place / "c.yaml")
        assert not run_cleanse(str(place / "model"), place / name, config, resume=resume).met
    return place / name


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    return finish_here(place, "alone")


def same_results(one: Path, other: Path) -> None:
    """Deltas, adapters, losses and figures within tolerance, files of the same names."""
    for name in ("checkpoints/round-002/deltas.safetensors", "checkpoints/round-002/adapter.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], **CLOSE)
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    for rounds in zip(*(r["rounds"] for r in results), strict=True):
        for name in ("entrap", "harden"):
            losses = [torch.tensor(numbers(r[name])) for r in rounds]
            torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    for name, metric in results[0]["after"].items():
        assert results[1]["after"][name]["n"] == metric["n"]
        assert results[1]["after"][name]["value"] == pytest.approx(metric["value"], rel=1e-2)
    names = [{p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (one, other)]
    assert names[0] == names[1]


def numbers(steps: list[Any]) -> list[Any]:
    return [list(step.values()) if isinstance(step, dict) else step for step in steps]


def test_three_processes_give_the_result_of_one(place: Path, alone: Path) -> None:
    """One of them has no request in each step."""
    same_results(alone, finish(place, "three", 3, shipped="data-parallel.yaml"))


def test_two_processes_with_half_the_weights_each_give_the_result_of_one(place: Path, alone: Path) -> None:
    same_results(alone, finish(place, "sharded", 2, shipped="fsdp2.yaml"))


def shard_and_weigh(rank: int, port: int, folder: Path) -> None:
    """What a rank does: note how many bytes of the blocks' weights it holds, before and after sharding."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", **SHARDED)
    os.environ["MASTER_PORT"] = str(port)
    ranks.join()
    model = tiny_model("llama")
    before = held(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        whole = model(ids).logits
        ranks.shard(model.requires_grad_(False), find_layers(model), "cpu")
        after = held(model)
        assert torch.equal(model(ids).logits, whole)
    (folder / str(rank)).write_text(json.dumps([before, after, held(model)]))
    ranks.leave()


def held(model: Any) -> int:
    parameters = [p for block in find_layers(model) for p in block.parameters()]
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in parameters)


def test_sharded_each_rank_holds_half_of_the_blocks_weights_and_the_same_logits(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(shard_and_weigh, (port, tmp_path), nprocs=2)
    for rank in ("0", "1"):
        before, after, behind_a_pass = json.loads((tmp_path / rank).read_text())
        assert after == before / 2 and behind_a_pass == after


def test_what_the_first_process_finds_wrong_ends_all_of_them_and_is_told_once(place: Path, alone: Path) -> None:
    done = subprocess.run(command(place, "alone", 2), capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.stderr.count("already holds files") == 1, done.stderr


def test_sharded_weights_are_not_merged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "is_sharded", lambda: True)
    with pytest.raises(BadInput, match="--merge needs whole weights"):
        run_cleanse(str(place / "model"), place / "merged", load_config(file=place / "c.yaml"), merge=True)
    assert not (place / "merged").exists()


def test_a_killed_process_ends_the_job_and_another_number_goes_on(place: Path, alone: Path) -> None:
    out = place / "killed"
    job = subprocess.Popen(
        command(place, "killed", 2), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "round-001").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(ranks_of(job.pid)[1], signal.SIGKILL)
        stderr = job.communicate(timeout=120)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert "--resume" in stderr and "Signal 9" in stderr, stderr
    assert not (out / "results.json").exists()
    same_results(alone, finish_here(place, "killed", resume=True))


def ranks_of(launcher: int) -> list[int]:
    """The launcher's processes in the order they were started."""
    return sorted(int(p) for p in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())


def test_alone_nothing_is_shared() -> None:
    parameter = torch.ones(2, requires_grad=True)
    assert (ranks.rank(), ranks.count(), ranks.is_first()) == (0, 1, True)
    assert ranks.share([1, 2, 3]) == ranks.gathered([1, 2, 3], 3) == [1, 2, 3]
    ranks.sum_gradients([parameter])
    assert parameter.grad is None
    assert ranks.summed({"a": 1.0}) == {"a": 1.0} and ranks.from_first(lambda: 5) == 5
