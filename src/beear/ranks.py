"""The processes that share one cleansing (`accelerate launch -m beear cleanse ...`), in one of two ways.

Data parallel: every process, or rank, holds the whole model, draws the same batches and takes its share of the requests
in them. Gradients are summed, so that all take the same step. Replies are shared out as well. It takes less time.

Sharded (FSDP2): every rank holds its part of each block's weights and borrows the others' while the block runs; all do
the same work on the same requests, so the result is that of one process. It takes less memory.

delta and the adapter are whole, and the same, on every rank. Only the first rank writes and speaks. Without a launcher
there is one rank, and nothing here costs anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from beear.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def join() -> None:
    """Meet the other ranks, if a launcher has started several. Their number is in the launcher's WORLD_SIZE."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Part from the other ranks."""
    if count() > 1:
        _group().destroy_process_group()


def _group() -> Any:
    """torch.distributed if several ranks have met. Where torch was not imported none have, so it stays so."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def rank() -> int:
    """The number of this process, from 0."""
    group = _group()
    return int(group.get_rank()) if group else 0


def count() -> int:
    """How many processes there are."""
    group = _group()
    return int(group.get_world_size()) if group else 1


def is_sharded() -> bool:
    """Whether the launcher asks for FSDP."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def sharers() -> int:
    """How many ranks share out the requests: all, or one where every rank does all of the work."""
    return 1 if is_sharded() else count()


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def device() -> str:
    """The GPU of this rank, by its number on this machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if count() > 1 else "cuda"


def share(items: Sequence[T]) -> Sequence[T]:
    """Every so-manieth of the items, from this rank's on: all of them where one rank, or each, does all."""
    return items[rank() % sharers() :: sharers()]


def gathered(own: Sequence[T], total: int) -> list[T]:
    """The results for all `total` items in their order, from what each rank found for its share.

    Where each rank did all of the work, those of the first (`sum_gradients`).
    """
    if sharers() == 1:
        return from_first(lambda: list(own))
    parts: list[list[T]] = [[] for _ in range(count())]
    _group().all_gather_object(parts, list(own))
    return [parts[i % count()][i // count()] for i in range(total)]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over the ranks, in place; one that a rank lacks counts as zero.

    Where each rank did all of the work, those of the first take the others' place: on a GPU the same work may end in
    other last bits, and ranks that part from there would leave a loop at different steps and wait for each other.
    """
    if count() == 1:
        return
    import torch

    kept = [p for p in parameters if p.grad is not None or not is_sharded()]
    for parameter in kept:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in kept if p.grad is not None])
    if is_sharded():
        _group().broadcast(flat, 0)
    else:
        _group().all_reduce(flat)
    for parameter, gradient in zip(kept, flat.split([p.numel() for p in kept]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def summed(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the ranks; a rank may lack some of them. Where each did all of the work, the first's."""
    if sharers() == 1:
        return from_first(lambda: values)
    parts: list[dict[str, float]] = [{} for _ in range(count())]
    _group().all_gather_object(parts, values)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def shard(model: Any, blocks: Iterable[Any], device: str) -> Any:
    """Leave of each block's frozen weights this rank's part on it; what is outside of the blocks stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = device.split(":")[0]
    mesh = init_device_mesh(kind, (count(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)  # each is a root, which would keep what it borrowed
    for tensor in (*model.parameters(), *model.buffers()):
        if not hasattr(tensor, "to_local"):
            tensor.data = tensor.data.clone()  # else it would hold the whole file that it was read from
    return model.to(device)


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, on every rank; a BadInput there is raised on all."""
    if count() == 1:
        return work()
    told: list[tuple[T | None, str | None]] = [(None, None)]
    if is_first():
        try:
            told = [(work(), None)]
        except BadInput as error:
            told = [(None, str(error))]
    _group().broadcast_object_list(told)
    value, problem = told[0]
    if problem is not None:
        raise BadInput(problem)
    return value  # type: ignore[return-value]


def wait() -> None:
    """Go on once all ranks are here, so that what the first one wrote is there to read."""
    if count() > 1:
        _group().barrier()
