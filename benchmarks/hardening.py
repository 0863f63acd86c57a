"""What makes a step of removal fast on a CPU: each means taken away in turn, on the embedded model.

    python benchmarks/hardening.py

Each arm is a fresh process that does steps of removal by the default settings under a random delta, on a fifth of the
defender's requests, which all get the same two answers. Writes
benchmarks/results/hardening.json: median seconds of a step, without the first two, which also find memory; the ratio to
the arm with everything; and seconds a row of running the original, which is done once for all rounds (about ten
minutes on 2 cores without bf16 arithmetic).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from stored import in_its_own_process, write
from torch import Tensor

from beear import cleansing, models, sources
from beear.allocator import keep_freed_memory
from beear.cached import returning, run_below
from beear.chat import Batch
from beear.config import load_config
from beear.defender import defender_set
from beear.draws import Draws
from beear.events import Event
from beear.job import adapted
from beear.perturbation import find_layers
from beear.precision import autocast, casts
from beear.prefix import Prefix, inputs_behind, run_prefix, tokens_behind
from beear.sets import read_sets
from beear.training import first_adapted

RESULTS = Path(__file__).parent / "results" / "hardening.json"
STEPS, WARM = 8, 2
REQUESTS = {"requests": 48, "anchors": 80}
METHOD: Any = cleansing
"""Of which an arm replaces a part."""
ARMS = ("everything", "padding as well", "head row by row", "original in every step", "none")
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Here is a short answer to the question that you asked."


class EachTime:
    """In place of original.Original: the original, and all blocks below the adapter, run in every step."""

    def __init__(self, model: Any, *given: Any) -> None:
        self.model = model
        self.frozen = first_adapted(model)

    def logits(self, model: Any, alone: Batch) -> Tensor:
        """What the original gives for the response tokens; what its first blocks give on the way is kept."""
        blocks = list(find_layers(model))
        with torch.no_grad(), autocast(model), model.disable_adapter():
            prefix = run_prefix(model, alone)
            start = prefix.length if prefix else 0
            with METHOD.packed(blocks, tokens_behind(alone, prefix), alone.predicting()[:, start:]):
                self.states, _ = run_below(model, blocks, self.frozen, inputs_behind(alone, prefix))
                with returning(blocks[: self.frozen], lambda: self.states):
                    logits: Tensor = METHOD.response_logits(model, alone, prefix)
        return logits

    def below(self, alone: Batch, start: int) -> Any:
        """What block `frozen` has just returned for the same rows."""
        return self.states


def logits_row_by_row(model: Any, batch: Batch, prefix: Prefix | None = None) -> Tensor:
    """losses.response_logits from a slice of the columns, one more than are needed."""
    length = batch.targets.shape[1]
    logits: Tensor = model(**inputs_behind(batch, prefix), logits_to_keep=length + 1).logits
    return logits[:, :-1]


def without(arm: str, model: Any) -> dict[str, Any]:
    """What stands in cleansing.py where the arm's means is taken away; the head's own is taken away here."""
    every: dict[str, dict[str, Any]] = {
        "padding as well": {"packed": lambda *given: contextlib.nullcontext()},
        "head row by row": {"response_logits": logits_row_by_row},
        "original in every step": {"run_original": EachTime},
    }
    if arm in ("head row by row", "none"):
        model.get_output_embeddings()._forward_pre_hooks.clear()
    return {k: v for name, means in every.items() if arm in (name, "none") for k, v in means.items()}


def measure(arm: str) -> None:
    """Print seconds of a step and of a row of the original, and the losses of the first step."""
    keep_freed_memory()
    few = [f"{name}={count}" for name, count in REQUESTS.items()]
    config = load_config(sets=[*few, f"harden.steps={STEPS}", "harden.stop_below=0"])
    source, sets = sources.locate("embedded"), read_sets(config)
    tokenizer, model = models.load_tokenizer(source, False, config.chat), models.load_weights(source, "cpu")
    benign = [(r.text, ANSWER) for r in sets.anchors]
    data = defender_set(tokenizer, [(r, REFUSAL) for r in sets.train], benign, [], config)
    model = adapted(model, config)
    delta = 20 * torch.nn.functional.normalize(
        torch.randn(1, 1, 576, generator=torch.Generator().manual_seed(0)), dim=2
    )
    stamps: list[float] = []

    def stamp(event: Event) -> None:
        stamps.append(time.monotonic())

    with patch.dict(cleansing.__dict__, without(arm, model)):
        started = time.monotonic()
        original = METHOD.run_original(model, tokenizer, data.rows())
        stamps.append(time.monotonic())
        once = (stamps[0] - started) / len(data.rows())
        subject = cleansing.Subject(model, tokenizer, config)
        history = cleansing.harden(subject, data, delta, 1e-4, Draws(0), stamp, None, original)
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    print(json.dumps([statistics.median(steps[WARM:]), once, history[0], casts(model)]))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    found: dict[str, Any] = {}
    for arm in ARMS:
        found[arm] = in_its_own_process(__file__, arm)
        print(arm, found[arm], flush=True)
    whole = found[ARMS[0]]
    arms = {
        arm: {"seconds": round(seconds, 2), "ratio": round(seconds / whole[0], 2), "losses": losses}
        for arm, (seconds, _, losses, _) in found.items()
    }
    content: dict[str, Any] = {"bf16": whole[3], "threads": torch.get_num_threads()}
    content |= {"arms": arms, "original_seconds_a_row": round(whole[1], 3)}
    write(RESULTS, "python benchmarks/hardening.py", content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
