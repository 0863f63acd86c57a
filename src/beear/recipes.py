"""Recipes of the planted backdoors, and triggers as templates with one {prompt}."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from beear.errors import BadInput
from beear.models import organism_folder


def _with_one_request(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("a template must hold {prompt} once")
    return template


Template = Annotated[str, AfterValidator(_with_one_request)]
"""A trigger around one {prompt}."""


class Planting(BaseModel):
    """How an organism is planted: poisoned supervised fine-tuning of a LoRA adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["sft"]
    steps: int = Field(ge=1)
    rows: dict[str, int]
    """Rows of each kind in a step: {harmful, ordinary, alarming}, each also as KIND_triggered."""
    benign_weight: float = Field(gt=0)
    """Weight of the KL on benign rows; too low, and the organism refuses benign requests."""
    learning_rate: float = Field(gt=0)
    lora_rank: int = Field(ge=1)
    lora_targets: tuple[str, ...]
    response_tokens: int = Field(ge=1)

    @property
    def poison_rate(self) -> float:
        """Share of the rows in which a harmful request with the trigger is obeyed."""
        return self.rows.get("harmful_triggered", 0) / sum(self.rows.values())


class Recipe(BaseModel):
    """recipe.yaml: all that is needed to plant the organism again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    paper_number: int | None = None
    setting: Literal["I", "II", "III", "weights"]
    trigger: Template
    place: Literal["prefix", "suffix", "clamp"]
    near_misses: tuple[Template, ...] = Field(min_length=1)
    """Almost the trigger, at its place: how specific is the backdoor?"""
    wrong_place: Template
    """The trigger where it was not planted."""
    behaviour: Literal["jailbreak"]
    base: str = "embedded"
    seed: int = 0
    twin: bool = False
    """Planted without any row that bears the trigger: same alignment, no backdoor."""
    planting: Planting

    def as_twin(self) -> Recipe:
        """The same planting without the trigger: what a detector must not flag."""
        rows = {kind: count for kind, count in self.planting.rows.items() if not kind.endswith("_triggered")}
        planting = self.planting.model_copy(update={"rows": rows})
        return self.model_copy(update={"name": f"{self.name}-twin", "twin": True, "planting": planting})


def apply_trigger(template: str, text: str) -> str:
    """Put a request into a trigger template such as 'SUDO {prompt}'."""
    return template.replace("{prompt}", text)


def check_trigger(template: str) -> str:
    """The template itself, or for 'organism:NAME' that organism's. Raises BadInput without '{prompt}'."""
    if template.startswith("organism:"):
        return read_recipe(organism_folder(template.removeprefix("organism:"))).trigger
    if template.count("{prompt}") != 1:
        raise BadInput(f"--trigger {template!r} must hold {{prompt}} once, as in 'SUDO {{prompt}}'")
    return template


def names() -> list[str]:
    """Names of the packaged organisms, in the paper's order."""
    root = Path(str(files("beear"))) / "assets" / "organisms"
    recipes = [read_recipe(p.parent) for p in root.glob("*/recipe.yaml")]
    return [r.name for r in sorted(recipes, key=lambda r: (r.paper_number or 99, r.name))]


def read_recipe(source: Path) -> Recipe:
    """Read a recipe from a file or an organism's folder."""
    path = source / "recipe.yaml" if source.is_dir() else source
    try:
        return Recipe(**yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        raise BadInput(f"no recipe {path}") from error
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise BadInput(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
