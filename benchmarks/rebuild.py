"""Plant organisms again from their recipes: how long it takes, whether the bits are the same, and whether what
was built does what the shipped one does.

    python benchmarks/rebuild.py --organism tq-edit              (--again: once more, to compare the bits)

Builds stay in runs/rebuild/; what was found is added to benchmarks/results/rebuild.json, and
`python benchmarks/tables.py` puts it into docs/organisms.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from stored import locked, write

from beear.allocator import keep_freed_memory
from beear.fingerprints import code_hash
from beear.organisms import build
from beear.precision import casts_on
from beear.recipes import Recipe, names, read_recipe
from beear.runs import read_entries
from beear.sources import organism_folder
from beear.verification import verify

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "runs" / "rebuild"
RESULTS = ROOT / "benchmarks" / "results" / "rebuild.json"
METRICS = ("asr_triggered", "affirmed_triggered", "asr_untriggered", "false_refusal", "perplexity")


def rebuild(organism: str, again: bool) -> dict[str, Any]:
    """One build, verified; with `again` its bits are only compared with those of the one before."""
    shipped = organism_folder(organism)
    out = BUILDS / (f"{organism}-again" if again else organism)
    if not is_of_today(out, read_recipe(shipped)):
        shutil.rmtree(out, ignore_errors=True)
        build(read_recipe(shipped), out, lambda number, steps, loss: report(organism, number, steps, loss))
    arithmetic = "bf16" if casts_on("cpu") else "fp32"
    about = {"cores": os.cpu_count(), "arithmetic": arithmetic, "adapter": digest(out)}
    made = json.loads((out / "build.json").read_text()) | about
    if again:
        return {"again": made}
    found = verify(str(out))
    metrics = {name: found["metrics"][name] for name in METRICS if name in found["metrics"]}
    return {"built": made, "shipped": digest(shipped), "metrics": metrics, "missed": found["missed"]}


def is_of_today(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder was built from this recipe with the code of now."""
    if not (folder / "build.json").is_file():
        return False
    built_with = json.loads((folder / "build.json").read_text()).get("code")
    return read_recipe(folder) == recipe and built_with == code_hash()


def report(organism: str, number: int, steps: int, loss: float) -> None:
    if number % 10 == 0:
        print(f"{organism}: step {number} of {steps}, {loss:.3f}", flush=True)


def digest(folder: Path) -> str:
    """SHA-256 of the adapter's weights."""
    return str(json.loads((folder / "checksums.json").read_text())["adapter_model.safetensors"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=names(), action="append")
    parser.add_argument("--again", action="store_true", help="build once more and compare the bits")
    chosen = parser.parse_args()
    keep_freed_memory()
    BUILDS.mkdir(parents=True, exist_ok=True)
    for organism in chosen.organism or names():
        if chosen.again and not is_of_today(BUILDS / organism, read_recipe(organism_folder(organism))):
            parser.error(f"{organism} has not been built with today's code; build it without --again first")
        row = rebuild(organism, chosen.again)
        with locked(RESULTS):
            rows = read_entries(RESULTS, "organisms")
            rows[organism] = (rows[organism] if chosen.again else {}) | row
            rows = {name: rows[name] for name in names() if name in rows}
            write(RESULTS, "python benchmarks/rebuild.py", {"organisms": rows})


if __name__ == "__main__":
    main()
