"""How much memory each of several processes holds while it cleanses: a model of 300M parameters with random weights.

    python benchmarks/ranks.py

Arms: one process; two that share out the requests (data parallel); two that share out the blocks' weights (FSDP2).
Each process loads the model as a job does, then runs a round of two steps of entrapment and two of removal on three
requests. It notes the bytes of the model's weights that it holds, its memory once it has loaded, and its peak in the
round. Writes benchmarks/results/ranks.json; the peak of processes on one machine is the largest of theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from stored import write
from transformers import LlamaConfig, LlamaForCausalLM

from beear import ranks
from beear.allocator import keep_freed_memory, release_freed_memory
from beear.cleansing import cleanse
from beear.config import make_config
from beear.defender import defender_set
from beear.embedded import embedded_folder
from beear.job import adapted, load_sharded
from beear.memory import peak_memory, restart_peak
from beear.models import load_tokenizer, load_weights
from beear.sets import read_sets
from beear.sources import Source

RESULTS = Path(__file__).parent / "results" / "ranks.json"
ARMS = {"one process": (1, "false"), "two, data parallel": (2, "false"), "two, sharded": (2, "true")}
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
STEPS = {"steps": 2, "batch": 3, "response_tokens": 8}
SETTINGS: dict[str, Any] = {
    "rounds": 1,
    "held_out": 4,
    "requests": 12,
    "anchors": 12,
    "entrap": STEPS,
    "harden": STEPS | {"anchor_batch": 3, "lora_rank": 4, "safe_answers": "wording", "stop_below": 0.0},
}


def measure(model_folder: Path, found: Path) -> None:
    """What one process does; leaves its numbers in found/RANK.json."""
    keep_freed_memory()
    ranks.join()
    source, config = Source("random", model_folder), make_config(SETTINGS)
    tokenizer = load_tokenizer(Source("embedded", embedded_folder()))
    model = load_sharded(source, "cpu", False, None) if ranks.is_sharded() else load_weights(source, "cpu")
    release_freed_memory()
    restart_peak()
    loaded = peak_memory()
    weights = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())
    sets = read_sets(config)
    harmful = [(request, "") for request in sets.train]
    benign = [(request.text, "Here is a short answer.") for request in sets.anchors]
    data = defender_set(tokenizer, harmful, benign, sets.held_out, config)
    cleanse(adapted(model, config), tokenizer, data, config)
    numbers = {"weights_bytes": weights, "loaded_bytes": loaded, "peak_bytes": peak_memory()}
    (found / f"{ranks.rank()}.json").write_text(json.dumps(numbers))
    ranks.leave()


def run(arm: str, model_folder: Path) -> dict[str, int]:
    """The largest number of any process of the arm."""
    count, sharded = ARMS[arm]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    with tempfile.TemporaryDirectory() as found:
        command = [sys.executable, *launcher, __file__, str(model_folder), found]
        environment = os.environ | {"ACCELERATE_USE_FSDP": sharded, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)
        rows = [json.loads(path.read_text()) for path in sorted(Path(found).iterdir())]
    assert len(rows) == count
    return {name: max(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    embedded_folder()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        parameters = model.num_parameters()
        model.save_pretrained(folder)
        del model
        arms = {arm: run(arm, Path(folder)) for arm in ARMS}
    content = {"parameters": parameters, "arms": arms}
    write(RESULTS, "python benchmarks/ranks.py", content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
