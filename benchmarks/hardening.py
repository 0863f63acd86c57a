"""What makes a step of removal fast on a CPU: each means taken away in turn, on the embedded model.

    python benchmarks/hardening.py

Each arm is a fresh process that does steps of removal by the default settings under a random delta, on the defender's
requests, which all get the same two answers; they take turns twice. Writes benchmarks/results/hardening.json: median
seconds of a step, without the first two, which also find memory; the ratio to the arm with everything; and seconds of
running all rows through the original, which is done once for all rounds (about twelve minutes on 2 cores without bf16
arithmetic).
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beear import cleansing, models
from beear.allocator import keep_freed_memory
from beear.cached import returning, rows_of, run_below
from beear.chat import Batch
from beear.config import Config, load_config
from beear.defender import defender_set
from beear.draws import Draws
from beear.job import adapted
from beear.losses import response_logits
from beear.models import autocast, casts
from beear.original import run_original
from beear.perturbation import decoder_depth, find_layers, resolve_layer
from beear.prefix import inputs_behind, run_prefix
from beear.sets import read_sets
from beear.training import first_adapted

RESULTS = Path(__file__).parent / "results" / "hardening.json"
TURNS, STEPS, WARM = 2, 6, 2
ARMS = ("everything", "head row by row", "original in every step", "neither")
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Here is a short answer to the question that you asked."


def run_each_time(
    model: Any, original: None, alone: Batch, batch: Batch, pick: Sequence[int], config: Config, layer: int
) -> tuple[Tensor, Callable[[], Tensor]]:
    """cleansing.harden_passes with the original, and all blocks below the adapter, run in every step."""
    blocks, first = list(find_layers(model)), first_adapted(model)
    with torch.no_grad(), autocast(model), model.disable_adapter():
        prefix = run_prefix(model, alone)
        shared, _ = run_below(model, blocks, first, inputs_behind(alone, prefix))
        with returning(blocks[:first], lambda: shared):
            target = response_logits(model, alone, prefix)
    with autocast(model):
        prefix = run_prefix(model, alone)
        with returning(blocks[:first], lambda: shared):
            hidden, _ = run_below(model, blocks, layer, inputs_behind(alone, prefix))

    def run() -> Tensor:
        with returning(blocks[:layer], lambda: rows_of(hidden, list(pick))):
            return response_logits(model, batch, prefix)

    return target, run


def measure(arm: str) -> None:
    """Print seconds of a step and of the original, and the losses of the first step."""
    keep_freed_memory()
    config = load_config(sets=[f"harden.steps={STEPS}", "harden.stop_below=0"])
    source, sets = models.locate("embedded"), read_sets(config)
    tokenizer, model = models.load_tokenizer(source, False, config.chat), models.load_weights(source, "cpu")
    benign = [(r.text, ANSWER) for r in sets.anchors(config)]
    data = defender_set(tokenizer, [(r, REFUSAL) for r in sets.train(config)], benign, [], config)
    model = adapted(model, config)
    if arm in ("head row by row", "neither"):
        model.get_output_embeddings()._forward_pre_hooks.clear()
    original, started = None, time.monotonic()
    if arm in ("original in every step", "neither"):
        cleansing.harden_passes, cleansing.run_original = run_each_time, lambda *given: None  # type: ignore[assignment]
    else:
        original = run_original(model, tokenizer, data.rows())
    stamps = [time.monotonic()]
    delta = 20 * torch.nn.functional.normalize(
        torch.randn(1, 1, 576, generator=torch.Generator().manual_seed(0)), dim=2
    )
    layer = resolve_layer(config.layer, decoder_depth(model))
    history = cleansing.harden(
        model,
        tokenizer,
        data,
        delta,
        config,
        layer,
        1e-4,
        Draws(0),
        lambda e: stamps.append(time.monotonic()),
        None,
        original,
    )
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    print(json.dumps([statistics.median(steps[WARM:]), stamps[0] - started, history[0], casts(model)]))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    found: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for _ in range(TURNS):
        for arm, rows in found.items():
            out = subprocess.run([sys.executable, __file__, arm], check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            print(arm, rows[-1], flush=True)
    seconds = {arm: statistics.mean(r[0] for r in rows) for arm, rows in found.items()}
    arms = {
        arm: {
            "seconds": round(seconds[arm], 2),
            "ratio": round(seconds[arm] / seconds[ARMS[0]], 2),
            "losses": rows[0][2],
        }
        for arm, rows in found.items()
    }
    content: dict[str, Any] = {"schema": 1, "command": "python benchmarks/hardening.py", "bf16": found[ARMS[0]][0][3]}
    content |= {"threads": torch.get_num_threads(), "arms": arms}
    content["original_seconds"] = round(statistics.mean(r[1] for r in found[ARMS[0]]), 1)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
