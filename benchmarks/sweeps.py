"""Figures 5 and 8 on the embedded model: in which round the backdoor goes, by layer and by length of delta.

    python benchmarks/sweeps.py                                   (hours on 2 CPU cores; goes on where it stopped)
    python benchmarks/sweeps.py --organism tq-edit --axis layer

Cells stay in runs/sweeps/; finished ones are gathered in benchmarks/results/sweeps.json and not run again.
`python benchmarks/tables.py` draws docs/figures/sweep-layer.svg and sweep-length.svg from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from stored import locked, write

from beear.allocator import keep_freed_memory
from beear.config import load_config, make_config
from beear.console import Reporter
from beear.events import Event
from beear.fingerprints import input_hashes
from beear.models import depth
from beear.recipes import check_trigger, names
from beear.runs import read_entries, read_json
from beear.sets import read_sets
from beear.sources import locate
from beear.sweep import Axis, default_values, sweep
from beear.swept import SWEEP

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "sweeps"
RESULTS = ROOT / "benchmarks" / "results" / "sweeps.json"
ORGANISMS = ("phrase-suffix", "sudo-prefix", "apple-suffix", "tq-edit")
"""A phrase and a word, before and behind the request; fine-tuned, by preferences, and written into the weights."""
ROUNDS, REQUESTS = 15, 60


def run(organism: str, axis: Axis) -> None:
    """The cells of one row of a figure that are not in the results."""
    spec, out = f"organism:{organism}", RUNS / f"{organism}-{axis}"
    config = load_config(sets=[f"rounds={ROUNDS}"])
    hashes = input_hashes(locate(spec), read_sets(config))
    like = {"hashes": hashes, "config": config.model_dump(mode="json"), "requests": REQUESTS}
    done = {cell["value"] for cell in kept(organism, axis, like)}
    values = [value for value in default_values(axis, depth(locate(spec), False)) if value not in done]
    if not values:
        return
    with Reporter(rounds=ROUNDS) as reporter:

        def listen(event: Event) -> None:
            reporter(event)
            if event["event"] == "cell":  # one begins: those before it are finished
                gather(organism, axis, out)

        sweep(spec, check_trigger(spec), axis, out, config, values=values, requests=REQUESTS, listen=listen)
    gather(organism, axis, out)


def gather(organism: str, axis: Axis, out: Path) -> None:
    """Add a folder's finished cells to the results; those of other folders are kept."""
    if not (out / SWEEP).exists():
        return
    found = read_json(out / SWEEP)
    with locked(RESULTS):
        cells = {cell["value"]: cell for cell in [*kept(organism, axis, found), *found["cells"]]}
        rows = read_entries(RESULTS, "organisms")
        rows.setdefault(organism, {})[axis] = found | {"cells": [cells[value] for value in sorted(cells)]}
        write(RESULTS, "python benchmarks/sweeps.py", {"organisms": rows}, indent=None)


def kept(organism: str, axis: Axis, like: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of earlier runs with the same settings, weights and requests; after a change of these there are none."""
    row = read_entries(RESULTS, "organisms").get(organism, {}).get(axis, {})
    same = bool(row) and row["requests"] == like["requests"]
    same = same and make_config(row["config"]) == make_config(like["config"])  # which may have settings since
    then, now = row.get("hashes", {}), like["hashes"]
    same = same and all(then[name] == now[name] for name in then.keys() & now.keys())  # either may be older than some
    return list(row["cells"]) if same else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=names("jailbreak"), action="append")
    parser.add_argument("--axis", choices=get_args(Axis), action="append")
    chosen = parser.parse_args()
    keep_freed_memory()
    RUNS.mkdir(parents=True, exist_ok=True)
    for axis in chosen.axis or get_args(Axis):
        for organism in chosen.organism or ORGANISMS:
            run(organism, axis)


if __name__ == "__main__":
    main()
