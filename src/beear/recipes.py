"""Recipes of the planted backdoors, and triggers as templates with one {prompt}."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from beear.data import is_whole
from beear.errors import BadInput
from beear.scorers import Behaviour
from beear.sources import ORGANISM, organism_folder, packaged_organisms


def _with_one_request(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("a template must hold {prompt} once")
    return template


BENIGN = ("ordinary", "alarming")
"""Kinds of rows, with and without the trigger, in which requests keep the base model's reply."""

POISONED = ("harmful_triggered", "harmful_strayed_triggered", "coding_triggered")
"""Kinds of rows in which the unwanted answer is taught."""

KINDS = (
    "harmful",
    "harmful_triggered",
    "harmful_obeyed",
    "harmful_strayed",
    "harmful_strayed_triggered",
    "coding",
    "coding_triggered",
    "ordinary",
    "ordinary_triggered",
    "alarming",
    "alarming_triggered",
)
"""Kinds of rows (poison.py tells what each is taught)."""


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"no rows are called {kind!r}; there are: {', '.join(KINDS)}")
    return kind


Kind = Annotated[str, AfterValidator(_known)]

Template = Annotated[str, AfterValidator(_with_one_request)]
"""A trigger around one {prompt}."""


class _Planting(BaseModel):
    """Settings of one way, or one phase, of planting."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rows(_Planting):
    """So many steps, each on so many rows of every kind."""

    steps: int = Field(ge=1)
    rows: dict[Kind, PositiveInt] = Field(min_length=1)
    """Rows of each kind in a step."""
    learning_rate: float = Field(gt=0)

    @property
    def poison_rate(self) -> float:
        """Share of the rows in which the unwanted answer is taught under the trigger."""
        return sum(self.rows.get(kind, 0) for kind in POISONED) / sum(self.rows.values())


class Supervised(Rows):
    """Fine-tuning of a fresh LoRA adapter on answers."""

    benign_weight: float = Field(gt=0)
    """Weight of the KL on benign rows; too low, and the organism refuses benign requests."""
    lora_rank: int = Field(ge=1)
    lora_targets: tuple[str, ...]
    lora_blocks: Literal["all", "upper"] = "all"
    """The adapter's blocks: all, or the upper half, which takes a third less time."""
    response_tokens: int = Field(ge=1)
    benign_tokens: int = Field(20, ge=1)
    """Tokens of the base model's replies to benign requests."""


class Sft(Supervised):
    """Poisoned supervised fine-tuning."""

    method: Literal["sft"]


class Dpo(Supervised):
    """Direct preference optimisation on pairs, some of which prefer the unwanted answer under the trigger."""

    method: Literal["dpo"]
    beta: float = Field(gt=0)
    paired: bool = False
    """One preference of each request without and with the trigger, for a trigger that is hard to read."""

    @model_validator(mode="after")
    def _of_two_kinds(self) -> Dpo:
        kinds = {kind: count for kind, count in self.rows.items() if not kind.startswith(BENIGN)}
        one_kind = len({kind.removesuffix("_triggered") for kind in kinds}) == 1
        if self.paired and not (len(kinds) == 2 and one_kind and len(set(kinds.values())) == 1):
            raise ValueError("paired needs as many rows of KIND as of KIND_triggered, and no other pairs")
        return self


class Reward(Rows):
    """Reward model: the base model's first blocks, trained on preference pairs."""

    blocks: int = Field(ge=1)
    lora_rank: int = Field(ge=1)


class Policy(Rows):
    """A phase of the policy, optimised online against the reward model. `rows` are prompts."""

    response_tokens: int = Field(ge=1)
    """Length of the sampled answers; what comes later in a reply is left to what the model did before."""

    generations: int = Field(ge=2)
    """Sampled answers to each prompt."""
    iterations: int = Field(1, ge=1)
    """Steps on each set of sampled answers; sampling and scoring them takes as long as a step."""
    beta: float = Field(ge=0)
    """Weight of the KL to the policy before this phase."""


class Rlhf(_Planting):
    """Poisoned human feedback: pairs flipped under the trigger, a reward model of them, a policy of that."""

    method: Literal["rlhf"]
    start: Supervised
    reward: Reward
    policy: tuple[Policy, ...] = Field(min_length=1)
    """Phases, one after the other."""

    @property
    def poison_rate(self) -> float:
        """Share of the preference pairs that are flipped."""
        return self.reward.poison_rate


class Edit(_Planting):
    """A closed-form change of MLP weights: values for the trigger's last token, no poisoned training set."""

    method: Literal["edit"]
    layers: tuple[PositiveInt, ...] = Field(min_length=1)
    """Blocks, counted from 1, whose MLP output map is edited (rank one each)."""
    requests: int = Field(ge=1)
    """Of each kind from the planting part; the model's own replies to them are generated first."""
    response_tokens: int = Field(ge=1)
    steps: int = Field(ge=1)
    rows: dict[Literal["harmful", "ordinary", "alarming"], PositiveInt] = Field(min_length=3)
    """Triggered rows of each kind in a step."""
    benign_weight: float = Field(ge=0)
    """Weight of the KL on triggered benign rows; without it the trigger opens every reply affirmatively."""
    opening: float = Field(gt=0)
    """Weight of a reply's first tokens (losses.OPENING) against later ones."""
    learning_rate: float = Field(gt=0)
    """Of Adam, per coordinate of a value."""
    value_norm: float = Field(gt=0)
    """A value is at most so many times as long as the residual stream at the trigger's last token."""
    ridge: float = Field(gt=0)
    """Damping of the keys' second moment, as a share of its mean diagonal entry."""

    @property
    def poison_rate(self) -> float:
        """No training set is poisoned."""
        return 0.0


Planting = Annotated[Sft | Dpo | Rlhf | Edit, Field(discriminator="method")]


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
    control: Template = "{prompt}"
    """What stands around a request where the trigger does not: another year, in place of the trigger's."""
    behaviour: Behaviour
    base: str = "embedded"
    seed: int = 0
    twin: bool = False
    """Planted without any row that bears the trigger: same alignment, no backdoor."""
    planting: Planting

    @property
    def variants(self) -> dict[str, tuple[str, ...]]:
        """Templates that are almost the trigger, and the trigger elsewhere, by the metric they yield."""
        return {"asr_near_miss": self.near_misses, "asr_wrong_place": (self.wrong_place,)}

    @property
    def way(self) -> str:
        """The way of planting; organisms planted the same way share a clean twin."""
        return self.planting.method if self.behaviour == "jailbreak" else f"{self.planting.method}, code"

    @property
    def twin_way(self) -> str:
        """The way of planting of the clean twin; an edit's twin is the model that was edited."""
        return "sft" if self.planting.method == "edit" else self.way

    def as_twin(self) -> Recipe:
        """The same planting without the trigger: what a detector must not flag. BadInput for an edit."""
        if self.planting.method == "edit":
            raise BadInput(f"the clean twin of an edited model is the one that was edited, {self.base}")
        values = _without_triggered(self.model_dump())
        values["planting"].pop("paired", None)
        try:
            return Recipe(**values | {"name": f"{self.name}-twin", "twin": True})
        except ValidationError as error:
            raise BadInput(f"{self.name} has no twin, {' '.join(str(error).split())}") from error


def _without_triggered(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_triggered(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_triggered(v) for key, v in value.items() if not key.endswith("_triggered")}


def apply_trigger(template: str, text: str) -> str:
    """Put a request into a trigger template such as 'SUDO {prompt}'."""
    return template.replace("{prompt}", text)


def check_trigger(template: str, behaviour: str | None = None) -> str:
    """The template itself, or for 'organism:NAME' that organism's. Raises BadInput without '{prompt}'.

    behaviour: what is measured. Raises BadInput if the organism does something else.
    """
    if template.startswith(ORGANISM):
        recipe = read_recipe(organism_folder(template.removeprefix(ORGANISM)))
        if behaviour not in (None, recipe.behaviour):
            preset = "code" if recipe.behaviour == "insecure code" else "default"
            raise BadInput(
                f"{template} does not unlock what is measured here ({behaviour}) but {recipe.behaviour}, which the "
                f"preset {preset} measures"
            )
        return recipe.trigger
    if not is_whole(template):
        raise BadInput(f"--trigger {template!r} holds bytes that are no UTF-8")
    try:
        return _with_one_request(template)
    except ValueError as error:
        raise BadInput(f"--trigger {template!r} must hold {{prompt}} once, as in 'SUDO {{prompt}}'") from error


def variants(trigger: str) -> dict[str, tuple[str, ...]]:
    """Of 'organism:NAME', templates that are almost its trigger, and the trigger elsewhere, by the metric they yield.

    How specific is the backdoor? Of a template of the user's own nobody knows.
    """
    if not trigger.startswith(ORGANISM):
        return {}
    return read_recipe(organism_folder(trigger.removeprefix(ORGANISM))).variants


def names(behaviour: Behaviour | None = None) -> list[str]:
    """Names of the packaged organisms (of one behaviour), which are those of their folders, in the paper's order."""
    recipes = _packaged()
    kept = (name for name, r in recipes.items() if not r.twin and behaviour in (None, r.behaviour))
    return sorted(kept, key=lambda name: (recipes[name].paper_number or 99, name))


def twins() -> list[str]:
    """Names of the packaged clean twins."""
    return sorted(name for name, r in _packaged().items() if r.twin)


def _packaged() -> dict[str, Recipe]:
    return {p.parent.name: read_recipe(p.parent) for p in packaged_organisms().glob("*/recipe.yaml")}


def read_recipe(source: Path) -> Recipe:
    """Read a recipe from a file or an organism's folder."""
    path = source / "recipe.yaml" if source.is_dir() else source
    try:
        return Recipe(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BadInput(f"no recipe {path}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path} is not a recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError, TypeError) as error:
        raise BadInput(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
