"""A batch in as few parts as memory holds: twice as many after each out-of-memory error, and from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from beear import ranks
from beear.allocator import release_freed_memory
from beear.errors import Failed
from beear.events import Listener

T = TypeVar("T")
Item = TypeVar("Item")


class Parts:
    """Into how many parts batches are split at present: `count`."""

    def __init__(self, listen: Listener = lambda event: None, count: int = 1) -> None:
        self.count = count
        self.listen = listen

    def run(self, work: Callable[[int], T], most: int) -> T:
        """`work(parts)`, and while memory runs out the same with twice as many parts, at most `most` of them.

        `work` must begin anew each time it is called. Raises Failed where even single rows do not fit, and where
        weights are shared out: the other ranks would wait for this one, in the middle of a pass.
        """
        while True:
            parts = min(self.count, most)
            try:
                return work(parts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            finally:
                if ranks.is_sharded():  # borrowed weights come and go, and leave gaps as large as all of them
                    release_freed_memory()
            # Only behind the except block: the error holds on to the frames that hold the memory.
            if ranks.is_sharded():
                raise Failed(
                    f"out of memory on process {ranks.rank()}; use more processes, or in a new folder "
                    "harden.recompute=true, or a smaller entrap.batch, harden.batch and harden.anchor_batch"
                )
            if parts == most:
                raise Failed("out of memory with one request at a time; use a larger device, or a smaller model")
            self.count = 2 * parts
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.listen({"event": "memory", "parts": self.count})

    def over(self, work: Callable[[Sequence[Item]], Iterable[T]], items: Sequence[Item]) -> list[T]:
        """What `work` gives for all the items, in their order, run in `run`'s parts of about the same size."""
        size = len(items)

        def split(n: int) -> list[T]:
            return [found for k in range(n) for found in work(items[k * size // n : (k + 1) * size // n])]

        return self.run(split, size)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    words = (
        "can't allocate memory",
        "CUDA error: out of memory",  # outside of PyTorch's own allocator
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(some in str(error) for some in words)
