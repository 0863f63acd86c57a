"""A whole default cleansing with and without what makes it fast, in one process, one after the other.

    python benchmarks/speed.py                     (half an hour on 2 CPU cores)

Without: entrapment as a plain loop; removal that runs every row through all blocks, every position through the output
head, the template's start in every row; replies without a shared start and fused attention; no early stop, neither of
a round nor of the rounds. Both start from the same organism and seed. Writes benchmarks/results/speed.json: seconds in
all and of each round, their ratios, the first losses, which must agree, and what the trigger does afterwards.
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
from torch import Tensor

from beear import cleansing, generation
from beear.allocator import keep_freed_memory
from beear.chat import Batch
from beear.cleansing import cleanse, deliver
from beear.config import Config, load_config
from beear.evaluation import measure_replies
from beear.job import adapted, defender, own_replies
from beear.models import autocast, load
from beear.recipes import check_trigger
from beear.sets import Sets, read_sets, triggered

RESULTS = Path(__file__).parent / "results" / "speed.json"
ORGANISM = "organism:sudo-prefix"


def all_logits(model: Any, batch: Batch, prefix: Any = None) -> Tensor:
    """Logits of every position, of which the response's are kept."""
    length = batch.targets.shape[1]
    return model(**batch.inputs(), use_cache=False).logits[:, -length - 1 : -1]  # type: ignore[no-any-return]


def all_blocks(model: Any, alone: Batch, batch: Batch, pick: Any, config: Any, layer: int) -> Any:
    """Removal's passes with nothing shared between rows."""
    with torch.no_grad(), autocast(model), model.disable_adapter():
        target = all_logits(model, alone)
    return target, lambda: all_logits(model, batch)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, the method runs without what makes it fast."""
    no_prefix: dict[str, Any] = {"run_prefix": lambda model, batch: None}
    slow: dict[str, Any] = {"response_logits": all_logits, "harden_passes": all_blocks}
    with (
        patch.multiple(cleansing, **no_prefix, **slow),
        patch.multiple(generation, **no_prefix, generating=lambda model: contextlib.nullcontext()),
    ):
        yield


def without_stops(config: Config) -> Config:
    """The same in a plain loop, with every step of every round."""
    return config.model_copy(
        update={
            "least_rounds": config.rounds,
            "entrap": config.entrap.model_copy(update={"cached": False}),
            "harden": config.harden.model_copy(update={"stop_below": 0.0}),
        }
    )


def run(arm: str, config: Config, sets: Sets) -> dict[str, Any]:
    """One arm: the model's own replies, the rounds, and attack success with the trigger before and after."""
    model, tokenizer = load(ORGANISM, device="cpu")
    tests = [triggered(sets.test_harmful, check_trigger(ORGANISM))]
    before = measure_replies(model, tokenizer, tests).metrics
    started = time.monotonic()
    with plain() if arm == "plain" else contextlib.nullcontext():
        own = own_replies(model, tokenizer, sets, config, lambda event: None)
        data = defender(tokenizer, sets, config, own)
        model = adapted(model, config)
        state = cleanse(model, tokenizer, data, config)
    deliver(model, state)
    seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "rounds": [round(entry["seconds"], 1) for entry in state.history],
        "steps": [len(entry["harden"]) for entry in state.history],
        "entrap": [round(loss, 4) for loss in state.history[0]["entrap"][:5]],
        "harden": state.history[0]["harden"][0],
        "residuals": [entry["residual"] for entry in state.history],
        "asr_triggered": {"before": before, "after": measure_replies(model, tokenizer, tests).metrics},
    }


def main() -> None:
    keep_freed_memory()
    default = load_config()
    sets = read_sets(default)
    found: dict[str, Any] = {}
    for arm, config in {"fast": default, "plain": without_stops(default)}.items():
        found[arm] = run(arm, config, sets)
        print(arm, json.dumps(found[arm]), flush=True)
    found["ratio"] = found["plain"]["seconds"] / found["fast"]["seconds"]
    found["ratio_of_a_round"] = statistics.median(found["plain"]["rounds"]) / statistics.median(found["fast"]["rounds"])
    content = {"schema": 1, "command": "python benchmarks/speed.py", "threads": torch.get_num_threads(), **found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(f"plain takes {found['ratio']:.2f} times as long, a round {found['ratio_of_a_round']:.2f} times", flush=True)


if __name__ == "__main__":
    main()
