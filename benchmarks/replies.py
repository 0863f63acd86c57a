"""What makes greedy replies fast on a CPU: seconds for the same replies with each means taken away, in one process.

    python benchmarks/replies.py

80 replies of 32 tokens by an organism, half of them to requests of removal, of which a third stand between others.
Writes benchmarks/results/replies.json: medians, and ratios to having all of them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from stored import write

from beear import buffered, generation, precision
from beear.allocator import keep_freed_memory
from beear.config import Config
from beear.data import packaged
from beear.generation import reply_all
from beear.models import load
from beear.sets import read_sets

RESULTS = Path(__file__).parent / "results" / "replies.json"
TURNS = 3


@contextlib.contextmanager
def eager(model: Any) -> Iterator[None]:
    """As precision.generating, with attention left as it is."""
    with patch.object(type(model), "_supports_sdpa", False), precision.generating(model):
        yield


ALONE = {generation: {"run_prefix": lambda model, batch, more=0: None}}
CAST = {generation: {"generating": lambda model: contextlib.nullcontext()}}
COPIED = {buffered: {"buffered": lambda cache, columns: cache}}
ARMS: dict[str, dict[Any, dict[str, Any]]] = {
    "everything": {},
    "40 at a time": {generation: {"BATCH": 40}},
    "keys and values copied for each token": COPIED,
    "prefix run in every row, keys and values copied": ALONE,
    "eager attention": {generation: {"generating": eager}},
    "weights cast in every pass, eager attention": CAST,
    "none of them": {generation: {"BATCH": 40, **ALONE[generation], **CAST[generation]}},
}
"""What takes the place of what, by module. Only behind a prefix are there buffers."""


def main() -> None:
    keep_freed_memory()
    model, tokenizer = load("organism:sudo-prefix", device="cpu")
    requests = packaged("ordinary", "defender")[:40] + read_sets(Config()).train[:40]
    texts = [r.text for r in requests]
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(TURNS):
        for arm, replaced in ARMS.items():
            with contextlib.ExitStack() as stack:
                for module, names in replaced.items():
                    stack.enter_context(patch.multiple(module, **names))
                started = time.monotonic()
                reply_all(model, tokenizer, texts, max_new_tokens=32)
                seconds[arm].append(time.monotonic() - started)
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    arms = {arm: {"seconds": m, "ratio": m / medians["everything"]} for arm, m in medians.items()}
    write(RESULTS, "python benchmarks/replies.py", {"threads": torch.get_num_threads(), "arms": arms})
    print(json.dumps(arms, indent=1))


if __name__ == "__main__":
    main()
