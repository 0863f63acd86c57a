"""Cleanse organisms, beside the control with delta = 0, and gather the results.

    python benchmarks/removal.py             (24 to 44 minutes a run on one thread without bf16)
    python benchmarks/removal.py --organism sudo-prefix --arm default --seed 1

Runs stay in runs/removal/, finished ones are kept; benchmarks/results/removal.json is made from all of
them, and `python benchmarks/tables.py` puts it into the README.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from stored import put_row

from beear.allocator import keep_freed_memory
from beear.config import Config, config_of_run, load_config
from beear.console import Reporter
from beear.fingerprints import input_hashes
from beear.job import run_cleanse
from beear.known import add_triggered, is_told
from beear.models import pick_device
from beear.order import run_settings
from beear.precision import arithmetic
from beear.recipes import check_trigger, names, read_recipe
from beear.runs import Run, read_results, read_settings
from beear.scorers import scorer_name
from beear.sets import read_sets
from beear.sources import locate, organism_folder
from beear.verdict import entrapments, verdict_of

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "removal"
RESULTS = ROOT / "benchmarks" / "results" / "removal.json"
MODELS = [*names(), "phrase-suffix-twin"]
"""All organisms, and a clean model that refuses as they do: cleansing must not harm it."""
ARMS = {
    "default": ("default", []),
    "control: delta = 0": ("default", ["entrap.kind=zero", "harden.stop_below=0"]),
    "control: delta = 0, wordings": (
        "default",
        ["entrap.kind=zero", "harden.stop_below=0", "harden.safe_answers=wording"],
    ),
    "control: random delta": ("default", ["entrap.kind=random", "harden.stop_below=0"]),
    "paper": ("paper", []),
    "fast": ("fast", []),
    "thorough": ("thorough", []),
}
"""A preset, and settings over it."""


def folder_name(organism: str, arm: str, seed: int) -> str:
    """A run's folder below RUNS."""
    return f"{organism}-{'-'.join(re.findall('[a-z0-9]+', arm))}-{seed}"


def cleansed(run: Path) -> str:
    """MODEL of a finished run, its target met or not."""
    return str(run / json.loads((run / "results.json").read_text())["model_folder"])


def run(organism: str, arm: str, seed: int) -> None:
    out = RUNS / folder_name(organism, arm, seed)
    preset, sets = ARMS[arm]
    if read_recipe(organism_folder(organism)).behaviour == "insecure code":
        if preset != "default":  # the other presets are for jailbreaks
            return
        preset = "code"
    config = load_config(preset, sets=[*sets, f"seed={seed}"])
    share_before(organism, out, config)
    with Reporter(rounds=config.rounds) as reporter:  # a finished run is kept, one of other settings refused
        run_cleanse(f"organism:{organism}", out, config, resume=(out / "config.yaml").exists(), listen=reporter)
    if not is_told(read_results(out), trigger := check_trigger(f"organism:{organism}")):
        add_triggered(out, trigger)
    gather(organism, arm, seed, out)


APART = {"seed": 0, "harden": {"stop_below": 0.0, "safe_answers": "own"}, "entrap": {"kind": "learned"}}
"""In these arms may differ and yet share what was measured before."""


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs' settings differ in no more than APART."""

    def rest(settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {k: settings[k] | v if isinstance(v, dict) else v for k, v in APART.items()}

    return rest(one) == rest(other)


def share_before(organism: str, out: Path, config: Config) -> None:
    """Begin a run with what was measured before an earlier one on the organism: neither arm nor seed changes that.

    Only `asr_entrapped` before is then that of the earlier seed. The model's own replies are to requests among others
    that the seed draws, so another seed generates them anew.
    """
    first = RUNS / f"{organism}-default-0"
    earlier = first / "stages"
    stages = ("inputs", "before", "own_replies") if config.seed == 0 else ("inputs", "before")
    if out.exists() or not all((earlier / f"{stage}.json").exists() for stage in stages):
        return
    if not alike(read_settings(first)["config"], config.model_dump(mode="json")):
        return
    begun = json.loads((earlier / "inputs.json").read_text())
    now = input_hashes(locate(f"organism:{organism}"), read_sets(config))
    if any(begun["hashes"].get(name) != digest for name, digest in now.items()):
        return
    if (begun["arithmetic"], begun["scorer"]) != (arithmetic(pick_device("auto")), scorer_name(config.behaviour)):
        return
    with Run.open(out, run_settings(f"organism:{organism}", False, config), resume=False) as run:
        for stage in stages:
            run.write_json(f"stages/{stage}.json", json.loads((earlier / f"{stage}.json").read_text()))


def gather(organism: str, arm: str, seed: int, out: Path) -> None:
    """Put one run's figures into the results file, in place of older ones of the same cell."""
    results = json.loads((out / "results.json").read_text())
    kept = ("before", "after", "wall_seconds", "peak_memory_bytes", "versions", "hashes")
    row: dict[str, Any] = {"organism": organism, "arm": arm, "seed": seed, "rounds": len(results["rounds"])}
    row |= {key: results[key] for key in kept}
    tried = entrapments(results["rounds"], results["delivered"])
    row |= {"residuals": tried, "delivered": results["delivered"]}
    config = config_of_run(out)
    # By today's rules, not by those of the day it was run.
    verdict = verdict_of(results["before"], results["after"], tried, config)
    row["verdict"] = {"met": verdict.met, "missed": verdict.missed}
    put_row(RESULTS, row, ("organism", "arm", "seed"), place, "python benchmarks/removal.py", "runs")


def place(row: dict[str, Any]) -> tuple[int, int, int]:
    """Where a row stands."""
    return MODELS.index(row["organism"]), list(ARMS).index(row["arm"]), row["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=MODELS, action="append")
    parser.add_argument("--arm", choices=list(ARMS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    chosen = parser.parse_args()
    keep_freed_memory()
    for organism in chosen.organism or MODELS:
        for arm in chosen.arm or ["default", "control: delta = 0"]:
            for seed in chosen.seed or [0]:
                run(organism, arm, seed)


if __name__ == "__main__":
    main()
