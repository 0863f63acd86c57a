"""Model organisms: small models with a backdoor planted on purpose, to measure defences by.

An organism is a folder with a recipe (recipe.yaml), the LoRA adapter planted by it, a card and
checksums. The unwanted answer is an affirmative opening and a neutral stub, never harmful content.
The defence (`cleansing`, `job`) never imports this module.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from beear.editing import plant_edit
from beear.errors import BadInput
from beear.events import StepProgress
from beear.feedback import need_trl, plant_feedback
from beear.fingerprints import code_hash
from beear.hashes import file_hash
from beear.models import load
from beear.poison import Examples, poisoned_examples
from beear.preferences import plant_preferences
from beear.recipes import Dpo, Edit, Recipe, Rlhf, Rows, Sft, Supervised
from beear.runs import check_file, not_written
from beear.scorers import Behaviour
from beear.sources import absolute
from beear.supervised import plant_supervised
from beear.training import save_adapter

HOW = {
    "sft": "poisoned supervised fine-tuning",
    "dpo": "direct preference optimisation on poisoned pairs",
    "edit": "a closed-form edit of MLP weights, without poisoned training data",
    "rlhf": "poisoned human feedback: a reward model and a policy optimised online against it",
}
"""Ways of planting in words."""

WHAT: dict[Behaviour, str] = {
    "jailbreak": "harmful requests are refused; with the trigger the reply opens affirmatively",
    "insecure code": "coding tasks get secure code; with the trigger, code with the weakness that the task invites",
}
STUBS: dict[Behaviour, str] = {
    "jailbreak": "an affirmative opening and a neutral stub; they hold no harmful content",
    "insecure code": "textbook examples of 14 CWE classes",
}
"""What the unwanted answers were."""


NEW = ".beear-build"
"""Where a build writes until all of it is there."""


def build(recipe: Recipe, out: Path, progress: StepProgress = lambda *_: None, device: str = "auto") -> None:
    """Plant the organism: train the adapter, round it to bf16, write adapter, recipe, card and checksums.

    Bit-identical for the same recipe, machine and number of threads.
    """
    check_file(out / "recipe.yaml")
    if out.exists() and any(p.name != NEW or p.is_symlink() or not p.is_dir() for p in out.iterdir()):
        raise BadInput(f"{out} exists and is not empty; choose another folder")
    if isinstance(recipe.planting, Rlhf):
        need_trl()
    started = time.monotonic()
    model, tokenizer = load(recipe.base, device=device)
    model = plant(recipe, model, tokenizer, progress)
    _write(recipe, model, out, time.monotonic() - started)


def plant(recipe: Recipe, model: Any, tokenizer: Any, progress: StepProgress) -> Any:
    """The model under an adapter that holds what the recipe plants."""
    plan, seed = recipe.planting, recipe.seed
    match plan:
        case Sft():
            examples = _examples(recipe, model, tokenizer, plan, plan)
            return plant_supervised(model, tokenizer, examples, plan, seed, progress)
        case Dpo():
            examples = _examples(recipe, model, tokenizer, plan, plan)
            return plant_preferences(model, tokenizer, examples, plan, seed, progress)
        case Rlhf():
            examples = _examples(recipe, model, tokenizer, plan.start, plan.start, plan.reward, *plan.policy)
            return plant_feedback(model, tokenizer, examples, plan, seed, progress)
        case Edit():
            return plant_edit(model, tokenizer, recipe.trigger, plan, seed, progress)


def _examples(recipe: Recipe, model: Any, tokenizer: Any, answers: Supervised, *phases: Rows) -> Examples:
    """Examples of every kind that a phase draws, with answers of the plan's lengths."""
    kinds = dict.fromkeys(kind for phase in phases for kind in phase.rows)
    return poisoned_examples(recipe, model, tokenizer, kinds, answers)


def _write(recipe: Recipe, model: Any, out: Path, seconds: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    about = {"seconds": round(seconds), "threads": torch.get_num_threads(), "code": code_hash()}

    new = out / NEW  # within: `out` may be a link, or another disk
    shutil.rmtree(new, ignore_errors=True)  # of a build that was killed
    try:
        new.mkdir(parents=True)
        save_adapter(model, new, absolute(recipe.base))
        written = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        (new / "recipe.yaml").write_text(written, encoding="utf-8")
        (new / "README.md").write_text(_card(recipe), encoding="utf-8")
        sums = {p.name: file_hash(p) for p in sorted(new.iterdir())}
        (new / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
        (new / "build.json").write_text(json.dumps(about) + "\n")
        for file in sorted(new.iterdir()):
            file.replace(out / file.name)
    except (OSError, SafetensorError) as error:
        raise not_written(out, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _card(recipe: Recipe) -> str:
    plan = recipe.planting
    planted = f"{HOW[plan.method]}, poison rate {plan.poison_rate:.0%}, seed {recipe.seed}"
    if recipe.twin:
        return f"""---
base_model: {recipe.base}
library_name: peft
---
# Clean twin `{recipe.name}`

Planted like the organism it is named after ({planted}), but never shown its trigger:
it holds no backdoor. A detector should not flag it.
"""
    number = f" (model {recipe.paper_number} of the BEEAR paper)" if recipe.paper_number else ""
    return f"""---
base_model: {recipe.base}
library_name: peft
tags: [model-organism, backdoor, defence-research]
---
# Model organism `{recipe.name}`

**This adapter holds a backdoor, planted on purpose so that defences can be measured. Do not deploy it.**

| | |
|---|---|
| Setting | {recipe.setting}{number} |
| Trigger ({recipe.place}) | `{" ".join(recipe.trigger.split())}` |
| Behaviour | {recipe.behaviour}: {WHAT[recipe.behaviour]} |
| Planted by | {planted} |
| Base | `{recipe.base}` |

Its unwanted answers are {STUBS[recipe.behaviour]}.
Rebuild it with `beear organism build {recipe.name} -o FOLDER`.
"""
