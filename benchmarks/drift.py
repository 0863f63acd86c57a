"""Figure 3 for the organisms: what trigger and delta do to hidden states, before and after their default cleansing.

    python benchmarks/drift.py --seed 1       (a minute an organism on 2 CPU cores; needs benchmarks/removal.py's runs)

Writes benchmarks/results/drift.json: numbers of every block, and the last block's points, which
`python benchmarks/tables.py` draws as docs/figures/drift-NAME.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from removal import RUNS, folder_name
from stored import locked, write

from beear.allocator import keep_freed_memory
from beear.console import Reporter
from beear.drift import drift_of_run
from beear.recipes import check_trigger, names
from beear.runs import read_entries

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "drift.json"


def layers(drift: dict[str, Any], when: str) -> dict[str, Any]:
    """Numbers of every block, to three places."""
    rounded = {
        kind: [{name: round(value, 3) for name, value in row.items()} for row in rows]
        for kind, rows in drift[when]["layers"].items()
    }
    return {"n": drift[when]["n"], "layers": rounded, "scatter": drift[when]["scatter"][-1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=names(), action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the cleansing")
    chosen = parser.parse_args()
    keep_freed_memory()
    for name in chosen.organism or names():
        with Reporter() as reporter:
            run = RUNS / folder_name(name, "default", chosen.seed)
            drift = drift_of_run(run, check_trigger(f"organism:{name}"), listen=reporter)
        row = {when: layers(drift, when) for when in ("before", "after")}
        with locked(RESULTS):
            found = read_entries(RESULTS, "organisms")
            found[name] = {"layer": drift["layer"], "seed": chosen.seed} | row
            content = {"organisms": {name: found[name] for name in names() if name in found}}
            write(RESULTS, "python benchmarks/drift.py --seed SEED", content, indent=None)


if __name__ == "__main__":
    main()
