"""What makes a training step fast on a CPU: each means taken away in turn, on the embedded model.

    python benchmarks/step.py

Each arm is a fresh process that runs steps of 20 rows (LoRA on all linear maps); they take turns three times.
Writes benchmarks/results/step.json: median seconds, the ratio to the arm with everything, and peak memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from stored import in_its_own_process, write

from beear.allocator import keep_freed_memory
from beear.chat import collate, encode_prompt, encode_response
from beear.data import packaged
from beear.losses import response_logits, response_nll
from beear.memory import peak_memory
from beear.models import load
from beear.precision import autocast
from beear.prefix import run_prefix
from beear.training import adamw, add_lora, cast_frozen, step

RESULTS = Path(__file__).parent / "results" / "step.json"
ROWS, TURNS, STEPS = 20, 3, 4
ARMS = ("everything", "freed memory given back", "sdpa attention", "prefix run in every row")


def measure(arm: str) -> None:
    """Print the median seconds of a step, and the peak memory in bytes."""
    if arm != "freed memory given back" and not keep_freed_memory():
        sys.exit("this C library has no mallopt")
    model, tokenizer = load("embedded", device="cpu")
    if arm == "sdpa attention":
        model.set_attn_implementation("sdpa")
    model = add_lora(model, 16, (), 0)
    cast_frozen(model)
    prompts = [encode_prompt(tokenizer, r.text) for r in packaged("ordinary", "defender")[:ROWS]]
    answers = [encode_response(tokenizer, "Here is a short answer to the question that you asked.", 16)] * ROWS
    batch = collate(prompts, answers, None, int(tokenizer.pad_token_id))
    optimiser = adamw(model, 1e-3)
    seconds = []
    for _ in range(STEPS + 1):
        started = time.monotonic()
        with autocast(model):
            prefix = None if arm == "prefix run in every row" else run_prefix(model, batch)
            logits = response_logits(model, batch, prefix)
        response_nll(logits, batch.targets).mean().backward()
        step(optimiser)
        seconds.append(time.monotonic() - started)
    print(json.dumps([statistics.median(seconds[1:]), peak_memory()]))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    found: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for _ in range(TURNS):
        for arm, rows in found.items():
            rows.append(in_its_own_process(__file__, arm))
    seconds = {arm: statistics.median(r[0] for r in rows) for arm, rows in found.items()}
    arms = {
        arm: {
            "seconds": round(seconds[arm], 3),
            "ratio": round(seconds[arm] / seconds[ARMS[0]], 2),
            "peak_memory_bytes": int(statistics.median(r[1] for r in rows)),
        }
        for arm, rows in found.items()
    }
    write(RESULTS, "python benchmarks/step.py", {"arms": arms})
    print(json.dumps(arms, indent=1))


if __name__ == "__main__":
    main()
