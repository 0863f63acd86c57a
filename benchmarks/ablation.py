"""Each ingredient of the default taken away in turn, on development requests (benchmarks/develop.py).

    python benchmarks/ablation.py --organism sudo-prefix     (about ten minutes an arm on 2 CPU cores)

Finished arms are kept in benchmarks/results/ablation.json; the test part stays unseen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from develop import developed

from beear.allocator import keep_freed_memory
from beear.recipes import names

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
    "six rounds at most": ["rounds=6"],
    "delta = 0": ["entrap.kind=zero", "harden.stop_below=0"],
}


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
                rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
                cell = {"organism": organism, "arm": arm, "seed": seed}
                if any(all(row[k] == v for k, v in cell.items()) for row in rows):
                    continue
                row = cell | developed(organism, arm, [*ARMS[arm], f"seed={seed}"])
                del row["name"]
                content = {"schema": 1, "command": "python benchmarks/ablation.py", "rows": [*rows, row]}
                RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
