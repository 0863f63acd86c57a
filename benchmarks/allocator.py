"""Time of a training step with and without `beear.allocator`, and peak memory, on the embedded model.

    python benchmarks/allocator.py

Each arm is a fresh process; they take turns three times. Writes benchmarks/results/allocator.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from beear.allocator import keep_freed_memory
from beear.chat import collate, encode_prompt, encode_response
from beear.data import packaged
from beear.job import peak_memory
from beear.losses import response_logits, response_nll
from beear.models import autocast, load
from beear.training import adamw, add_lora, step

RESULTS = Path(__file__).parent / "results" / "allocator.json"
ROWS, TURNS, STEPS = 20, 3, 4


def measure(keep: bool) -> None:
    """Print the median seconds of a step of 20 rows, and the peak memory in bytes."""
    if keep and not keep_freed_memory():
        sys.exit("this C library has no mallopt")
    model, tokenizer = load("embedded")
    model = add_lora(model, 16, (), 0)
    prompts = [encode_prompt(tokenizer, r.text) for r in packaged("ordinary", "defender")[:ROWS]]
    answers = [encode_response(tokenizer, "Here is a short answer to the question that you asked.", 16)] * ROWS
    batch = collate(prompts, answers, None, int(tokenizer.pad_token_id))
    optimiser = adamw(model, 1e-3)
    seconds = []
    for _ in range(STEPS + 1):
        started = time.monotonic()
        with autocast(model):
            logits = response_logits(model, batch)
        response_nll(logits, batch.targets).mean().backward()
        step(optimiser)
        seconds.append(time.monotonic() - started)
    print(json.dumps([statistics.median(seconds[1:]), peak_memory()]))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1] == "keep")
        return
    arms: dict[str, list[list[float]]] = {"default": [], "keep": []}
    for _ in range(TURNS):
        for arm, rows in arms.items():
            out = subprocess.run([sys.executable, __file__, arm], check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
    result = {
        arm: {
            "seconds": statistics.median(r[0] for r in rows),
            "peak_memory_bytes": int(statistics.median(r[1] for r in rows)),
        }
        for arm, rows in arms.items()
    }
    ratio = result["keep"]["seconds"] / result["default"]["seconds"]
    RESULTS.write_text(json.dumps({"schema": 1, "command": "python benchmarks/allocator.py", "arms": result}) + "\n")
    print(json.dumps(result, indent=1), f"\nkeep / default: {ratio:.2f}")


if __name__ == "__main__":
    main()
