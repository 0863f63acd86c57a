"""A whole default cleansing with and without what makes it fast, in one process, one after the other.

    python benchmarks/speed.py                     (three quarters of an hour on 2 CPU cores)

Without: entrapment as a plain loop, which runs the adapter unmerged; removal that runs every row, and the original
on it, through all blocks in every step, every position through the output head, the template's start in every row;
replies without a shared start; no early stop, neither of a round nor of the rounds. What serves both (weights in bf16,
attention, the head in one product) stays. Both are whole runs of `beear cleanse` on the same organism with the same
seed, kept in runs/speed/ and resumed there. Writes
benchmarks/results/speed.json: seconds in all and of each round, their ratios, the first losses, which must agree, and
all figures before and after. The plain arm needs up to 13 GiB.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from beear import cleansing, generation
from beear.allocator import keep_freed_memory
from beear.chat import Batch
from beear.config import Config, load_config
from beear.console import Reporter
from beear.job import add_triggered, run_cleanse
from beear.models import autocast
from beear.recipes import check_trigger
from beear.runs import read_results

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "speed"
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
AGREE = 0.02
"""By so much the first losses of both may differ: bf16 rounds differently in other shapes."""
ORGANISM = "organism:sudo-prefix"


def all_logits(model: Any, batch: Batch, prefix: Any = None) -> Tensor:
    """Logits of every position, of which the response's are kept."""
    length = batch.targets.shape[1]
    return model(**batch.inputs(), use_cache=False).logits[:, -length - 1 : -1]  # type: ignore[no-any-return]


def all_blocks(model: Any, original: None, alone: Batch, batch: Batch, pick: Any, config: Any, layer: int) -> Any:
    """Removal's passes with nothing shared between rows."""
    with torch.no_grad(), autocast(model), model.disable_adapter():
        target = all_logits(model, alone)
    return target, lambda: all_logits(model, batch)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, the method runs without what makes it fast."""
    no_prefix: dict[str, Any] = {"run_prefix": lambda model, batch, more=0: None}
    slow: dict[str, Any] = {"response_logits": all_logits, "harden_passes": all_blocks}
    slow |= {"run_original": lambda *given: None}
    with patch.multiple(cleansing, **no_prefix, **slow), patch.multiple(generation, **no_prefix):
        yield


def without_stops(config: Config) -> Config:
    """The same in a plain loop, with every step of every round."""
    return config.model_copy(
        update={
            "patience": config.rounds + 1,
            "entrap": config.entrap.model_copy(update={"cached": False}),
            "harden": config.harden.model_copy(update={"stop_below": 0.0}),
        }
    )


def run(arm: str, config: Config, out: Path) -> dict[str, Any]:
    """One arm: a whole cleansing, with all that it measures, and what the trigger does before and after."""
    with plain() if arm == "plain" else contextlib.nullcontext(), Reporter(rounds=config.rounds) as reporter:
        begun = (out / "config.yaml").exists()
        run_cleanse(ORGANISM, out, config, resume=begun, device="cpu", listen=reporter)
    add_triggered(out, check_trigger(ORGANISM), device="cpu")
    results = read_results(out)
    rounds = results["rounds"]
    return {
        "seconds": results["wall_seconds"],
        "rounds": [round(entry["seconds"], 1) for entry in rounds],
        "steps": [len(entry["harden"]) for entry in rounds],
        "entrap": [round(loss, 4) for loss in rounds[0]["entrap"][:5]],
        "harden": rounds[0]["harden"][0],
        "residuals": [entry["residual"] for entry in rounds],
        **{key: results[key] for key in ("delivered", "before", "after")},
    }


def main() -> None:
    keep_freed_memory()
    default = load_config()
    found: dict[str, Any] = {}
    for arm, config in {"fast": default, "plain": without_stops(default)}.items():
        found[arm] = run(arm, config, RUNS / arm)
        print(arm, json.dumps(found[arm]), flush=True)
    losses = [found[arm]["entrap"][0] for arm in ("fast", "plain")]
    if abs(losses[0] / losses[1] - 1) > AGREE:
        raise SystemExit(f"the arms begin with different losses: {losses}")
    found["ratio"] = found["plain"]["seconds"] / found["fast"]["seconds"]
    found["ratio_of_a_round"] = statistics.median(found["plain"]["rounds"]) / statistics.median(found["fast"]["rounds"])
    content = {"schema": 1, "command": "python benchmarks/speed.py", "threads": torch.get_num_threads(), **found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(f"plain takes {found['ratio']:.2f} times as long, a round {found['ratio_of_a_round']:.2f} times", flush=True)


if __name__ == "__main__":
    main()
