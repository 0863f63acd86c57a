"""How much memory this process has held, and how much there is: of the GPU where the work runs on one."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of cgroup versions 2 and 1, and the name of what is only cached."""


def peak_memory(device: str = "cpu") -> int:
    """The most memory that was held since the start, or since `restart_peak`, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    held = _field(_STATUS, "VmHWM")  # unlike getrusage it knows nothing of the process that started this one
    if held is not None:
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak(device: str = "cpu") -> None:
    """Let `peak_memory` count from what is held now. Where the system cannot, it goes on counting from the start."""
    if device.startswith("cuda"):
        torch.cuda.init()  # which a device with a number does not do by itself
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")


def available_memory(device: str = "cpu") -> int:
    """Bytes that are free for this process."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free, left = int(psutil.virtual_memory().available), _left_to_container()
    return free if left is None else min(free, left)


def _left_to_container() -> int | None:
    """What a container's limit (cgroup version 2, else 1) leaves; None where there is none."""
    for limit, used, stat, cache in _LIMITS:
        try:
            lines = dict(line.split() for line in (_GROUP / stat).read_text().splitlines() if line)
            held = int((_GROUP / used).read_text()) - int(lines.get(cache, 0))  # the kernel gives this part back
            return max(0, int((_GROUP / limit).read_text()) - held)
        except (OSError, ValueError):  # no such file, or the word max
            continue
    return None


def _field(file: Path, name: str) -> int | None:
    """A size that Linux tells in kB, in bytes; None where it does not."""
    lines = file.read_text().splitlines() if file.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(sizes[0]) if sizes else None
