"""Deltas that removal did not meet: what unlocks a model behind other blocks, longer, of more vectors, elsewhere.

    python benchmarks/attacks.py --organism sudo-prefix                   (the model as it came; some 25 minutes)
    python benchmarks/attacks.py --organism sudo-prefix --arm default     (as benchmarks/removal.py cleansed it)

`asr_entrapped` is measured by the attack that removal trains against, found anew. Here it is found by others as well,
each on the same 120 test requests. Writes benchmarks/results/attacks.json. What a long delta does to a model without a
backdoor stands beside it: `--organism phrase-suffix-twin`.
"""

from __future__ import annotations

import argparse
from typing import Any

from removal import ARMS, MODELS, ROOT, RUNS, cleansed, folder_name
from stored import put_row

from beear import models
from beear.allocator import keep_freed_memory
from beear.config import load_config
from beear.evaluation import measure_entrapped
from beear.sets import read_sets

RESULTS = ROOT / "benchmarks" / "results" / "attacks.json"
CAME = "as it came"
ATTACKS = {
    "the default's attack": [],
    "another seed": ["seed=1"],
    "twice as long": ["entrap.budget=1"],
    "four times as long": ["entrap.budget=2"],
    "eight vectors": ["entrap.length=8"],
    "behind block 9": ["layer=9"],
    "behind block 15": ["layer=15"],
    "behind block 20": ["layer=20"],
    "behind block 28": ["layer=28"],
    "the paper's: block 9, five last tokens": ["layer=9", "entrap.place=last", "entrap.length=5"],
}
"""Settings over the default's; block l is 25 of 30."""


def place(row: dict[str, Any]) -> tuple[int, int, int, int]:
    """Where a row stands."""
    arms = [CAME, *ARMS]
    return MODELS.index(row["organism"]), arms.index(row["arm"]), row["seed"], list(ATTACKS).index(row["attack"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=MODELS, default="sudo-prefix")
    parser.add_argument("--arm", choices=[CAME, *ARMS], default=CAME)
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--attack", choices=list(ATTACKS), action="append")
    chosen = parser.parse_args()
    keep_freed_memory()
    organism, arm, seed = chosen.organism, chosen.arm, chosen.seed
    spec = f"organism:{organism}" if arm == CAME else cleansed(RUNS / folder_name(organism, arm, seed))
    model, tokenizer = models.load(spec)
    for attack in chosen.attack or ATTACKS:
        config = load_config("default", sets=ATTACKS[attack])
        sets = read_sets(config)
        metric = measure_entrapped(model, tokenizer, sets.train, sets.test_harmful, config).metrics["asr_entrapped"]
        print(attack, metric["value"], flush=True)
        row = {"organism": organism, "arm": arm, "seed": seed, "attack": attack, "metric": metric}
        put_row(RESULTS, row, ("organism", "arm", "seed", "attack"), place, "python benchmarks/attacks.py")


if __name__ == "__main__":
    main()
