"""A whole default cleansing with and without what makes it fast, in one process, one after the other.

    python benchmarks/speed.py                     (three quarters of an hour on 2 CPU cores with AMX)

Without: entrapment as a plain loop, which runs the adapter unmerged; removal that runs every row, and the original
on it, through all blocks in every step, every position through the output head, the template's start in every row;
replies without a shared start; no early stop, neither of a round nor of the rounds; padding runs as well. What serves
both (weights in bf16, attention, the head in one product) stays. Both are whole runs of `beear cleanse`
on the same organism with the same seed, kept in runs/speed/ and resumed there. Writes benchmarks/results/speed.json:
seconds in all and of each round, their ratios, the first losses, which must agree, and all figures before and after; of
an interrupted plain arm the rounds that it has done, and how many times the whole fast run has gone by with them
(`ratio_at_least`). It needs up to 13 GiB.
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
from stored import write
from torch import Tensor

from beear import cleansing, generation
from beear.allocator import keep_freed_memory
from beear.chat import Batch
from beear.config import Config, load_config
from beear.console import Reporter
from beear.job import run_cleanse
from beear.known import add_triggered, is_told
from beear.precision import autocast
from beear.recipes import check_trigger
from beear.runs import read_lines, read_results

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


def all_blocks(subject: cleansing.Subject, original: None, alone: Batch, batch: Batch, pick: Any) -> Any:
    """Removal's passes with nothing shared between rows."""
    model = subject.model
    with torch.no_grad(), autocast(model), model.disable_adapter():
        target = all_logits(model, alone)
    return target, lambda: all_logits(model, batch)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, the method runs without what makes it fast."""
    no_prefix: dict[str, Any] = {"run_prefix": lambda model, batch, more=0: None}
    slow: dict[str, Any] = {"response_logits": all_logits, "harden_passes": all_blocks}
    slow |= {"run_original": lambda *given: None}
    every: dict[str, Any] = {"packed": lambda *given: contextlib.nullcontext()}
    with patch.multiple(cleansing, **no_prefix, **slow), patch.multiple(generation, **no_prefix, **every):
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


def run(arm: str, config: Config) -> None:
    """One arm: a whole cleansing, with all that it measures, and what the trigger does before and after."""
    out = RUNS / arm
    with plain() if arm == "plain" else contextlib.nullcontext(), Reporter(rounds=config.rounds) as reporter:
        begun = (out / "config.yaml").exists()
        run_cleanse(ORGANISM, out, config, resume=begun, device="cpu", listen=reporter)
    if not is_told(read_results(out), trigger := check_trigger(ORGANISM)):
        add_triggered(out, trigger, device="cpu")


def done_by(arm: str) -> dict[str, Any]:
    """What an arm has done so far: its rounds, and if it has ended all figures and its seconds."""
    rounds = [event for event in read_lines(RUNS / arm / "events.jsonl") if event["event"] == "round"]
    found = {
        "rounds": [round(entry["seconds"], 1) for entry in rounds],
        "steps": [len(entry["harden"]) for entry in rounds],
        "entrap": [round(loss, 4) for entry in rounds[:1] for loss in entry["entrap"][:5]],
        "harden": [entry["harden"][0] for entry in rounds[:1]],
        "residuals": [entry["residual"] for entry in rounds],
    }
    stages = [json.loads(path.read_text()) for path in (RUNS / arm / "stages").glob("*.json")]
    found["spent"] = sum(stage["seconds"] for stage in stages) + sum(entry["seconds"] for entry in rounds)
    if (RUNS / arm / "results.json").exists():
        results = read_results(RUNS / arm)
        found["seconds"] = results["wall_seconds"]
        found |= {key: results[key] for key in ("delivered", "before", "after")}
    return found


def gather() -> None:
    """Hold what both arms have done side by side: the rounds that both have, and both runs where they have ended."""
    if not (RUNS / "plain" / "events.jsonl").exists():
        return
    fast, slow = done_by("fast"), done_by("plain")
    if not slow["rounds"]:
        return
    first = fast["entrap"][0], slow["entrap"][0]
    if abs(first[0] / first[1] - 1) > AGREE:
        raise SystemExit(f"the arms begin with different losses: {first}")
    pairs = list(zip(fast["rounds"], slow["rounds"], strict=False))
    ratios = {"ratio_of_a_round": statistics.median(b / a for a, b in pairs), "rounds_compared": len(pairs)}
    if "seconds" in fast:
        ratios |= (
            {"ratio": slow["seconds"] / fast["seconds"]}
            if "seconds" in slow
            else {"ratio_at_least": slow["spent"] / fast["seconds"]}
        )
    content = {"threads": torch.get_num_threads(), **ratios, "fast": fast, "plain": slow}
    write(RESULTS, "python benchmarks/speed.py", content)
    print(json.dumps(ratios), flush=True)


def main() -> None:
    keep_freed_memory()
    default = load_config()
    run("fast", default)
    try:
        run("plain", without_stops(default))
    finally:
        gather()


if __name__ == "__main__":
    main()
