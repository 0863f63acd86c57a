"""How near a plan comes: each model is planned (`beear cleanse --plan`), then cleansed, and both are compared.

    python benchmarks/plan.py

The embedded model's organism with default settings, and Llama-shaped models of three sizes with random weights, the
embedded tokenizer, two rounds and forty requests to measure on. Run folders stay in runs/plan/; what was found goes
to benchmarks/results/plan.json. Nothing else may run beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from stored import write
from transformers import LlamaConfig, LlamaForCausalLM

from beear.data import packaged
from beear.models import load_tokenizer
from beear.precision import casts_on
from beear.sources import locate

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "plan"
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
SHAPES = {"8M": (128, 352, 8), "23M": (256, 704, 12), "77M": (512, 1408, 16)}
"""Hidden size, size of the MLP, blocks."""
VOCABULARY = 49152


def random_model(name: str) -> Path:
    """A folder with a model of this size and the embedded model's tokenizer."""
    folder = RUNS / f"model-{name}"
    if not (folder / "config.json").exists():
        width, inner, blocks = SHAPES[name]
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": VOCABULARY}
        shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True))
        load_tokenizer(locate("embedded")).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def few_requests() -> list[str]:
    """Options for a short job: forty requests of each kind to measure on, two rounds."""
    options = ["--set", "rounds=2"]
    for option, name in (("--test-harmful", "harmful"), ("--test-benign", "ordinary")):
        file = RUNS / f"{name}.txt"
        file.write_text("".join(f"{r.text}\n" for r in packaged(name, "test")[:40]))
        options += [option, str(file)]
    return options


def planned_and_run(name: str, command: list[str]) -> dict[str, Any]:
    """Plan and run, each in a process of its own; both are skipped where they are done."""
    out = RUNS / name
    beear = [sys.executable, "-m", "beear", "cleanse", *command, "-o", str(out), "--offline"]
    if not (out / "plan.json").exists():
        subprocess.run([*beear, "--plan"], check=True)
    if not (out / "results.json").exists():
        begun = ["--resume"] if (out / "config.yaml").exists() else []
        subprocess.run([*beear, *begun], check=False)  # 3: random weights are not cleansed
    results = json.loads((out / "results.json").read_text())
    taken = {"seconds": results["wall_seconds"], "peak_memory_bytes": results["peak_memory_bytes"]}
    return {"planned": results["planned"], "taken": taken, "rounds": len(results["rounds"])}


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    short = few_requests()
    commands = {name: [str(random_model(name)), *short] for name in SHAPES} | {
        "sudo-prefix": ["organism:sudo-prefix"],
    }
    rows = {}
    for name, command in commands.items():
        rows[name] = planned_and_run(name, command)
        content = {"cores": os.cpu_count(), "bf16": casts_on("cpu"), "models": rows}
        write(RESULTS, "python benchmarks/plan.py", content)


if __name__ == "__main__":
    main()
