"""What a step of organism 6's policy takes: trl as it is, and with what all prompts start with run once.

    python benchmarks/policy.py

Steps of the shipped recipe's first phase on 40 requests of each kind, against a reward model that has learnt nothing;
the arms take turns. Writes benchmarks/results/policy.json: median seconds of a step, with its sampling and scoring.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from beear import feedback, poison
from beear.allocator import keep_freed_memory
from beear.data import packaged
from beear.models import autocast, generating, load, organism_folder
from beear.recipes import Rlhf, read_recipe
from beear.supervised import adapted

RESULTS = Path(__file__).parent / "results" / "policy.json"
STEPS, TURNS = 3, 2


@contextlib.contextmanager
def plain_sampling(model: Any) -> Iterator[None]:
    """As `sampling_in_bf16`, with the whole of every prompt run in every row."""
    generate = model.generate

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), autocast(model), generating(model):
            return generate(*args, **kwargs)

    model.generate = run
    try:
        yield
    finally:
        del model.generate


ARMS: dict[str, dict[str, Any]] = {
    "shared start": {},
    "trl as it is": {"_with_shared_start": lambda trainer: trainer, "sampling_in_bf16": plain_sampling},
}


def measure(arm: str) -> list[float]:
    """Seconds of each step but the first."""
    recipe = read_recipe(organism_folder("calathea-suffix"))
    plan = recipe.planting
    assert isinstance(plan, Rlhf)
    policy = plan.policy[0].model_copy(update={"steps": STEPS + 1})
    model, tokenizer = load(recipe.base, device="cpu")
    with mock.patch.object(poison, "packaged", lambda name, part: packaged(name, part)[:40]):
        examples = poison.poisoned_examples(recipe, model, tokenizer, policy.rows, plan.start)
    reward = feedback.first_blocks(model, plan.reward.blocks, int(tokenizer.pad_token_id), 0).eval()
    model = adapted(model, plan.start, 0)
    ends: list[float] = []
    with mock.patch.multiple(feedback, **ARMS[arm]) if ARMS[arm] else contextlib.nullcontext():
        feedback._optimise(
            model, reward, tokenizer, examples, policy, 0, lambda number, *_: ends.append(time.monotonic())
        )
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    keep_freed_memory()
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(TURNS):
        for arm, seconds in found.items():
            seconds += measure(arm)
    medians = {arm: statistics.median(seconds) for arm, seconds in found.items()}
    first = medians["shared start"]
    arms = {arm: {"seconds": round(s, 2), "ratio": round(s / first, 2)} for arm, s in medians.items()}
    content = {"schema": 1, "command": "python benchmarks/policy.py", "threads": torch.get_num_threads(), "arms": arms}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
