"""Pieces of work on a Ray cluster of one or many machines (extra `sweep`), each a task of its own.

The cluster is the one RAY_ADDRESS names, else one that runs on this machine, else one that is started here. A piece
whose worker is lost is done again, elsewhere if need be, so it must go on from what it left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from beear.allocator import keep_freed_memory
from beear.errors import BadInput, Failed
from beear.events import Event, Listener

Piece = Callable[[str, Listener], None]
"""Work that is given a device, and tells a listener what it does."""

RETRIES = 3
"""So many lost workers a piece survives."""
TOLD = ("BEEAR_FP32", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
"""Variables that workers are given; a token is none of them, since Ray keeps what it is given."""
SECONDS_TO_CONNECT = 5
POLL = 1.0
"""Seconds between two looks at what workers say."""


def finished(pieces: Sequence[Piece], device: str, listen: Listener) -> Iterator[int]:
    """Do all pieces, as many at a time as the cluster has room for; yields how many are done.

    A piece takes one GPU if `device` asks for one, or is "auto" and the cluster has any. Else it takes as many
    processors as this process has threads, so that its bits are the same. Raises Failed for pieces whose workers were
    lost too often, once the others are done.
    """
    if not pieces:
        return
    ray, room = connect(device)
    try:
        yield from _finished(ray, pieces, room, listen)
    finally:
        ray.shutdown()


def connect(device: str) -> tuple[Any, dict[str, int]]:
    """Ray, and the room that a piece takes: processors and GPUs. Raises BadInput if no machine has it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        import ray
    except ImportError as error:
        raise BadInput("--executor ray needs Ray; install beear with its extra sweep") from error
    check_address(os.environ.get("RAY_ADDRESS", ""))
    told = {name: os.environ[name] for name in TOLD if name in os.environ}
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": told})
    with contextlib.suppress(ValueError):  # in a thread neither Ray nor we can
        signal.signal(signal.SIGTERM, on_terminate)  # Ray put its own in its place
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu = device.startswith("cuda") or (device == "auto" and any(machine.get("GPU") for machine in machines))
    wanted = {"CPU": 1 if gpu else torch.get_num_threads(), "GPU": int(gpu)}
    if not any(all(machine.get(kind, 0) >= count for kind, count in wanted.items()) for machine in machines):
        ray.shutdown()
        raise BadInput(
            "no machine of the Ray cluster has a GPU for a cell; leave out --device cuda"
            if gpu
            else f"no machine of the Ray cluster has {wanted['CPU']} processors for a cell; set OMP_NUM_THREADS to "
            "what a cell shall take"
        )
    return ray, wanted


def check_address(address: str) -> None:
    """Raise BadInput if nobody listens at HOST:PORT; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:  # none is named, or `auto`, `local`
        return
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        raise BadInput(f"no Ray cluster at RAY_ADDRESS={address} ({error}); is it up?") from error


def _finished(ray: Any, pieces: Sequence[Piece], room: dict[str, int], listen: Listener) -> Iterator[int]:
    from ray.exceptions import RayError, RayTaskError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    device = "cuda" if room["GPU"] else "cpu"  # of a worker's GPUs Ray shows it the one that is its own
    task = ray.remote(num_cpus=room["CPU"], num_gpus=room["GPU"], max_retries=RETRIES)(_do)
    waiting = [task.remote(piece, device, torch.get_num_threads(), events) for piece in pieces]
    done = lost = 0
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=POLL)
        for event in events.get_nowait_batch(events.qsize()):
            listen(event)
        for piece in ready:
            try:
                ray.get(piece)
            except RayTaskError as error:
                if not isinstance(error.cause, RayError):
                    raise error.cause from None
                said = str(error.cause).strip().splitlines()[-1]
                raise Failed(f"a worker could not take a cell; is this beear installed there? ({said})") from None
            except RayError:
                lost += 1
            else:
                done += 1
                yield done
    if lost:
        raise Failed(f"{lost} cells lost their worker {RETRIES + 1} times each; the same command goes on with them")


def _do(piece: Piece, device: str, threads: int, events: Any) -> None:
    """On a worker: do the piece; what it says goes into the queue."""
    keep_freed_memory()
    torch.set_num_threads(threads)

    def tell(event: Event) -> None:
        if event["event"] in ("cell", "round"):
            events.actor.put_nowait.remote(event)  # to wait for it would let Ray start another piece here

    piece(device, tell)
