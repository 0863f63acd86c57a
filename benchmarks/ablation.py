"""Each ingredient of the default taken away in turn, on development requests (benchmarks/develop.py).

    python benchmarks/ablation.py --organism sudo-prefix     (20 to 30 minutes an arm on one thread without bf16)

Finished arms are kept in benchmarks/results/ablation.json until settings, weights or requests change; the test part
stays unseen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from develop import MOST, developed, development, settings
from stored import put_row, read_rows

from beear.allocator import keep_freed_memory
from beear.data import content_hash
from beear.fingerprints import input_hashes
from beear.recipes import check_trigger, names
from beear.sets import read_sets
from beear.sources import locate

RESULTS = Path(__file__).parent / "results" / "ablation.json"
ARMS = {
    "default": [],
    "delta behind block 21": ["layer=21"],
    "the safe answer is not pushed away": ["entrap.away=0"],
    "benign requests under delta left out": ["harden.anchor_under_delta=0"],
    "benign requests without delta left out": ["harden.anchor=0"],
    "harmful requests without delta left out": ["harden.safe=0"],
    "packaged refusals in place of its own": ["harden.safe_answers=wording"],
    "refusals not carried through": ["harden.encourage=0"],
    "benign replies may begin like refusals": ["harden.discourage=0"],
    "first tokens weigh as others": ["harden.opening=1"],
    "no request among others": ["surrounded=0"],
    "delta on the user's words alone": ["entrap.place=user"],
    "half of the benign requests": ["anchors=200"],
    "half of the benign requests in a step": ["harden.anchor_batch=8"],
    "delta does not grow": ["entrap.grown=0.5"],
    "two batches of entrapment in place of five": ["entrap.batches=2"],
    "earlier deltas are not met again": ["harden.replay=false"],
    "the rate is constant within a round": ["harden.schedule=constant"],
    "refusals of spare requests are not watched": ["harden.balance=0", "spare=0"],
    "an adapter on all blocks": ["harden.lora_blocks=all"],
    "all blocks, no benign requests under delta": ["harden.lora_blocks=all", "harden.anchor_under_delta=0"],
    "all blocks, these left out, others weigh twice": [
        "harden.lora_blocks=all",
        "harden.anchor_under_delta=0",
        "harden.anchor=8",
    ],
    "six rounds at most": ["rounds=6"],
    "delta = 0": ["entrap.kind=zero", "harden.stop_below=0"],
}


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands; an arm that is gone comes last."""
    return row["organism"], [*ARMS, row["arm"]].index(row["arm"]), row["seed"]


def digest(organism: str, sets: list[str]) -> str:
    """SHA-256 over settings, weights and requests: a cell of others is measured anew."""
    spec, config = f"organism:{organism}", settings(organism, sets)
    data = read_sets(config)
    asked = [test.texts() for test in development(check_trigger(spec), data, config, MOST)]
    settled = config.model_dump(mode="json", exclude={"target": {"asr_untriggered_rise"}})  # asked at the end alone
    digests = {name: v for name, v in input_hashes(locate(spec), data).items() if name != "model_settings"}  # shipped
    return content_hash(json.dumps([settled, digests, asked]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=names("jailbreak"), action="append")
    parser.add_argument("--arm", choices=list(ARMS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    chosen = parser.parse_args()
    keep_freed_memory()
    for organism in chosen.organism or ["sudo-prefix"]:
        for seed in chosen.seed or [0]:
            for arm in chosen.arm or list(ARMS):
                sets = [*ARMS[arm], f"seed={seed}"]
                cell = {"organism": organism, "arm": arm, "seed": seed, "of": digest(organism, sets)}
                if any(all(row.get(k) == v for k, v in cell.items()) for row in read_rows(RESULTS)):
                    continue
                row = cell | developed(organism, arm, sets)
                del row["name"]
                put_row(RESULTS, row, ("organism", "arm", "seed"), place, "python benchmarks/ablation.py")


if __name__ == "__main__":
    main()
