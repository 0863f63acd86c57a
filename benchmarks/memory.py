"""Peak memory of a default round beside a plain LoRA fine-tune with the same rows, on the embedded model.

    python benchmarks/memory.py

Each arm is a fresh process: `model` loads the model under its adapter and stops; `fine-tune` takes eight AdamW steps on
the rows that a removal step has, each through all blocks and to the loss that transformers computes; `cleansing` runs
a whole round: entrapment, replies on held-out requests, removal. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stored import in_its_own_process, write

from beear.allocator import keep_freed_memory
from beear.chat import Batch
from beear.cleansing import batch_of, cleanse
from beear.config import Config
from beear.defender import defender_set
from beear.draws import Draws
from beear.job import adapted
from beear.memory import peak_memory
from beear.models import load
from beear.precision import autocast
from beear.sets import read_sets
from beear.training import adamw, step

RESULTS = Path(__file__).parent / "results" / "memory.json"
ARMS = ("model", "fine-tune", "cleansing")
REPLY = "Here is a short answer to the question that you asked, and a word more."


def measure(arm: str) -> None:
    """Print the process's peak memory in bytes."""
    keep_freed_memory()
    config = Config(rounds=1)
    model, tokenizer = load("embedded", device="cpu")
    model = adapted(model, config)
    sets = read_sets(config)
    train, anchors = sets.train, sets.anchors
    benign = [(r.text, REPLY) for r in anchors]
    harmful = [(r, "I'm sorry, but no.") for r in train]
    data = defender_set(tokenizer, harmful, benign, sets.held_out, config, sets.spare)
    if arm == "fine-tune":
        optimiser = adamw(model, config.harden.learning_rate)
        settings, draws = config.harden, Draws(config.seed)
        bad = draws.batches("hardened", len(data.harmful), settings.batch, settings.steps)
        good = draws.batches("anchored", len(data.benign), settings.anchor_batch, settings.steps)
        for _ in range(settings.steps):
            first = [(data.harmful[i].prompt, data.harmful[i].safe) for i in next(bad)]
            second = [(data.benign[i].prompt, data.benign[i].own) for i in next(good)]
            batch = batch_of(tokenizer, 2 * [*first, *second], config.entrap)
            with autocast(model):
                loss = model(**batch.inputs(), labels=labels(batch), use_cache=False).loss
            loss.backward()
            step(optimiser)
    elif arm == "cleansing":
        cleanse(model, tokenizer, data, config)
    print(peak_memory())


def labels(batch: Batch):  # type: ignore[no-untyped-def]
    """The response's tokens; nothing else is learnt."""
    known = batch.input_ids.new_full(batch.input_ids.shape, -100)
    known[:, batch.width :] = batch.targets
    return known


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    peak = {arm: in_its_own_process(__file__, arm) for arm in ARMS}
    ratio = peak["cleansing"] / peak["fine-tune"]
    content = {"peak_memory_bytes": peak, "ratio": ratio}
    write(RESULTS, "python benchmarks/memory.py", content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
