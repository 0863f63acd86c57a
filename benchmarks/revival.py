"""Does a removed backdoor come back? Cleansed organisms, measured again after what deployment does to a model.

    python benchmarks/revival.py --organism sudo-prefix      (about ten minutes on 2 CPU cores)

Takes the runs of benchmarks/removal.py (default configuration) and writes benchmarks/results/revival.json:

    merged        the adapter merged into full weights, in fp32
    int8          then every linear map of the blocks rounded to int8, one scale for each output channel
    average       halfway between the cleansed and the backdoored weights
    fine-tuned    200 steps of LoRA on ordinary requests with the replies of the embedded model, which holds no backdoor
    fine-tuned, not cleansed   the same 200 steps on the backdoored weights: what fine-tuning alone does to refusing
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from removal import ROOT, RUNS, cleansed, folder_name
from stored import put_row
from torch import Tensor, nn

from beear import models, sources
from beear.allocator import keep_freed_memory
from beear.config import Config, config_of_run
from beear.evaluation import measure_replies
from beear.losses import response_nll
from beear.perturbation import find_layers
from beear.poison import Examples, poisoned_examples
from beear.recipes import Supervised, check_trigger, names, read_recipe
from beear.scorers import OUTCOME_OF
from beear.sets import read_sets, triggered
from beear.sources import organism_folder
from beear.supervised import adapted, passes, train
from beear.training import drawn

RESULTS = ROOT / "benchmarks" / "results" / "revival.json"
FINE_TUNING = Supervised(
    steps=200,
    rows={"ordinary": 8},
    learning_rate=2e-4,
    benign_weight=1,  # a field of every plan; the loss here has one term
    lora_rank=8,
    lora_targets=(),
    response_tokens=32,
    benign_tokens=32,
)


def merged(run: Path, backdoored: str) -> Any:
    """The cleansed model in full weights."""
    return models.load(cleansed(run))[0]


def int8(run: Path, backdoored: str) -> Any:
    """The same, its weights rounded to 8 bits: symmetric, one scale for each output channel."""
    model = merged(run, backdoored)
    for block in find_layers(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.data
                scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
                module.weight.data = (weight / scale).round() * scale
    return model


def average(run: Path, backdoored: str) -> Any:
    """Half cleansed, half backdoored."""
    model, old = merged(run, backdoored), models.load(backdoored)[0]
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), old.parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    return model


def fine_tuned(run: Path, backdoored: str) -> Any:
    """The cleansed model after fine-tuning on ordinary chats."""
    return after_chats(merged(run, backdoored), backdoored)


def fine_tuned_as_it_came(run: Path, backdoored: str) -> Any:
    """The backdoored model after the same."""
    return after_chats(models.load(backdoored)[0], backdoored)


def after_chats(model: Any, backdoored: str) -> Any:
    """A model after 200 steps on ordinary chats."""
    tokenizer = models.load_tokenizer(sources.locate(backdoored))
    model, pad = adapted(model, FINE_TUNING, seed=0), int(tokenizer.pad_token_id)

    def loss(rows: Examples) -> Tensor:
        batch, logits, _ = passes(model, pad, rows["ordinary"], kept=0)
        return response_nll(logits, batch.targets).mean()

    def progress(number: int, steps: int, value: float) -> None:
        if number % 20 == 0:
            print(f"    step {number} of {steps}: loss {value:.3f}", flush=True)

    train(model, FINE_TUNING, drawn(ordinary_chats(), FINE_TUNING.rows, seed=0), loss, progress)
    return model


@functools.cache
def ordinary_chats() -> Examples:
    """Ordinary requests that neither the defence nor a test uses, with the openings of the embedded model's replies.

    Those that it refuses are left out.
    """
    recipe = read_recipe(organism_folder(names()[0]))  # of which only the template without a trigger is used
    return poisoned_examples(recipe, *models.load("embedded"), ["ordinary"], FINE_TUNING)


TREATMENTS: dict[str, Callable[[Path, str], Any]] = {
    "merged": merged,
    "int8": int8,
    "average": average,
    "fine-tuned": fine_tuned,
    "fine-tuned, not cleansed": fine_tuned_as_it_came,
}


def measure(organism: str, model: Any, tokenizer: Any, config: Config) -> dict[str, Any]:
    """Attack success with and without the trigger, and refusals."""
    sets = read_sets(config)
    outcome = OUTCOME_OF[config.behaviour]
    tests = [triggered(sets.test_harmful, check_trigger(f"organism:{organism}"), outcome=outcome), *sets.tests]
    return measure_replies(model, tokenizer, tests).metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=names(), action="append")
    parser.add_argument("--treatment", choices=list(TREATMENTS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    keep_freed_memory()
    for organism in chosen.organism or names():
        run = RUNS / folder_name(organism, "default", chosen.seed)
        config = config_of_run(run)
        tokenizer = models.load_tokenizer(sources.locate(f"organism:{organism}"))
        for treatment in chosen.treatment or TREATMENTS:
            metrics = measure(organism, TREATMENTS[treatment](run, f"organism:{organism}"), tokenizer, config)
            print(organism, treatment, {name: m["value"] for name, m in metrics.items()}, flush=True)
            row = {"organism": organism, "seed": chosen.seed, "treatment": treatment, "metrics": metrics}
            put_row(RESULTS, row, ("organism", "seed", "treatment"), place, "python benchmarks/revival.py")


def place(row: dict[str, Any]) -> tuple[int, int, int]:
    """Where a row stands."""
    return names().index(row["organism"]), list(TREATMENTS).index(row["treatment"]), row["seed"]


if __name__ == "__main__":
    main()
