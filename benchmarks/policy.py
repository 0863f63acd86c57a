"""What a step of organism 6's reward model and of its policy takes: trl as it is, and with prompts run once.

    python benchmarks/policy.py

Steps of the shipped recipe on 40 requests of each kind, the policy's first phase against a reward model that has learnt
nothing; the arms take turns. Writes benchmarks/results/reward.json and policy.json: median seconds of a step, the
policy's with its sampling and scoring.
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
from stored import write

from beear import feedback, poison
from beear.allocator import keep_freed_memory
from beear.data import packaged
from beear.events import StepProgress
from beear.models import load
from beear.precision import autocast, generating
from beear.recipes import Rlhf, read_recipe
from beear.sources import organism_folder
from beear.supervised import adapted

RESULTS = Path(__file__).parent / "results"
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
    "shared prompts": {},
    "shared start": {
        "_alike": lambda *_: 24,  # the template's system turn
        "by_prompt": lambda prompts, length: (torch.arange(len(prompts)), 1),
    },
    "trl as it is": {
        "_with_own_scores": lambda trainer: trainer,
        "_with_own_log_probs": lambda trainer: trainer,
        "sampling_in_bf16": plain_sampling,
    },
}


def measure(arm: str) -> dict[str, list[float]]:
    """Seconds of each step but the first, of the reward model and of the policy."""
    recipe = read_recipe(organism_folder("calathea-suffix"))
    plan = recipe.planting
    assert isinstance(plan, Rlhf)
    few = {"steps": STEPS + 1}
    scorer, policy = plan.reward.model_copy(update=few), plan.policy[0].model_copy(update=few)
    model, tokenizer = load(recipe.base, device="cpu")
    with mock.patch.object(poison, "packaged", lambda name, part: packaged(name, part)[:40]):
        examples = poison.poisoned_examples(recipe, model, tokenizer, {**scorer.rows, **policy.rows}, plan.start)
    reward = feedback.first_blocks(model, scorer.blocks, int(tokenizer.pad_token_id), 0).eval()
    ends: dict[str, list[float]] = {"reward": [], "policy": []}

    def ending(part: str) -> StepProgress:
        return lambda *_: ends[part].append(time.monotonic())

    with mock.patch.multiple(feedback, **ARMS[arm]) if ARMS[arm] else contextlib.nullcontext():
        feedback.train_reward(model, tokenizer, examples, scorer, 0, ending("reward"))
        feedback._optimise(adapted(model, plan.start, 0), reward, tokenizer, examples, policy, 0, ending("policy"))
    return {part: [after - before for before, after in itertools.pairwise(times)] for part, times in ends.items()}


def main() -> None:
    keep_freed_memory()
    found: dict[str, dict[str, list[float]]] = {part: {arm: [] for arm in ARMS} for part in ("reward", "policy")}
    for _ in range(TURNS):
        for arm in ARMS:
            for part, seconds in measure(arm).items():
                found[part][arm] += seconds
    for part, arms in found.items():
        medians = {arm: statistics.median(seconds) for arm, seconds in arms.items()}
        rows = {
            arm: {"seconds": round(s, 2), "ratio": round(s / medians["shared prompts"], 2)}
            for arm, s in medians.items()
        }
        content = {"threads": torch.get_num_threads(), "arms": rows}
        write(RESULTS / f"{part}.json", "python benchmarks/policy.py", content)
        print(part, json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
