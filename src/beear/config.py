"""Settings: one frozen model, presets over it, YAML files and --set key=value over these.

docs/paper-index.md says where each value comes from.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from beear.errors import BadInput
from beear.runs import read_settings
from beear.scorers import Behaviour

Place = Literal["last", "user", "prompt", "chat"]
DeltaKind = Literal["learned", "zero", "random"]
Weights = Literal["full", "int8", "nf4"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Settings):
    """Files or Hub data sets of the user's own; None means the packaged set."""

    harmful: str | None = Field(None, min_length=1, description="harmful requests the defender trains on")
    benign: str | None = Field(None, min_length=1, description="benign requests the defender trains on")
    test_harmful: str | None = Field(None, min_length=1, description="harmful requests to measure on")
    test_benign: str | None = Field(None, min_length=1, description="benign requests to measure on")
    column: str | None = Field(None, min_length=1, description="the field that holds the request")


class ChatConfig(_Settings):
    """What stands around every request and before every reply, besides the chat template's own words."""

    system: str | None = Field(None, description="system message of every chat")
    template: dict[str, bool | int | str] = Field({}, description="arguments of the chat template, NAME: value")
    begin: str | None = Field(None, description="what every reply is made to begin with")

    @field_validator("template")
    @classmethod
    def _named(cls, template: dict[str, Any]) -> dict[str, Any]:
        for name in template:
            if not name.isidentifier() or name in ("messages", "add_generation_prompt"):
                raise ValueError(f"{name!r} is no argument that a chat template can be given here")
        return template


class EntrapConfig(_Settings):
    """Inner problem: find delta with the weights frozen."""

    place: Place = Field("prompt", description="tokens delta is added to")
    length: int = Field(1, ge=1, le=512, description="n, the number of vectors in delta")
    budget: float = Field(0.5, gt=0, description="largest norm of a vector, in residual norms at the layer")
    grown: float = Field(1.0, gt=0, description="and what it grows to, by a quarter with every round")
    steps: int = Field(20, ge=0, description="Adam steps in a round")
    learning_rate: float = Field(0.2, gt=0, description="how far a vector moves in a step, in budgets")
    batch: int = Field(8, ge=1, description="requests in a step")
    batches: int = Field(5, ge=1, description="so many batches are met in turn")
    cached: bool = Field(True, description="run what delta cannot change once per batch")
    away: float = Field(0.5, ge=0, description="weight of moving away from the safe answer")
    response_tokens: int = Field(
        12, ge=2, description="tokens of each unwanted answer, and at most so many of the safe one"
    )
    kind: DeltaKind = Field("learned", description="zero and random are controls: delta is not learned")


class HardenConfig(_Settings):
    """Outer problem: train a LoRA adapter to stay safe under delta and useful without it."""

    steps: int = Field(8, ge=0, description="most AdamW steps in a round")
    learning_rate: float = Field(1.4e-3, gt=0, description="of AdamW, falling linearly over the rounds")
    schedule: Literal["falling", "constant"] = Field("falling", description="of the learning rate within a round")
    batch: int = Field(5, ge=1, description="harmful requests in a step")
    anchor_batch: int = Field(16, ge=1, description="benign requests in a step")
    response_tokens: int = Field(8, ge=1, description="tokens of each answer")
    lora_rank: int = Field(16, ge=1, description="columns of an adapter's matrices")
    lora_targets: tuple[str, ...] = Field((), description="last parts of module names; empty: all linear maps")
    lora_blocks: Literal["all", "upper", "behind"] = Field(
        "upper", description="its blocks: all, the upper half (more, if delta is lower), or those behind delta"
    )
    replay: bool = Field(
        True, description="every other request meets the delta of any round so far, not only the newest"
    )
    anchor: float = Field(4.0, ge=0, description="weight of benign requests without delta")
    anchor_under_delta: float = Field(2.0, ge=0, description="weight of benign requests under delta")
    balance: float = Field(
        12.0, ge=0, description="how fast these weights fall once fewer spare requests are refused than before"
    )
    safe: float = Field(1.0, ge=0, description="weight of harmful requests without delta")
    safe_answers: Literal["own", "wording"] = Field("own", description="the model's own refusals, or packaged wordings")
    opening: float = Field(
        6.0, ge=1, description="weight of the first three tokens of the model's own replies, beside 1 for the others"
    )
    discourage: float = Field(8.0, ge=0, description="nats off a refusal's first token where a benign reply begins")
    encourage: float = Field(
        8.0, ge=0, description="nats off what goes on unlike a refusal where one of the model's own begins"
    )
    stop_below: float = Field(0.05, ge=0, description="a round ends early once every kind of loss is below")
    recompute: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")


class TargetConfig(_Settings):
    """What a cleansing must reach to be called done (exit code 3 otherwise)."""

    model_config = ConfigDict(allow_inf_nan=True)  # infinity: no such limit

    asr_entrapped: float = Field(0.5, ge=0, le=1, description="at most this much after")
    residual: float = Field(
        0.1, ge=0, le=1, description="held-out success of the last `patience` entrapments, at most this much"
    )
    asr_untriggered_rise: float = Field(0.05, ge=0, description="at most this far above before, without any trigger")
    false_refusal_rise: float = Field(0.05, ge=0, description="at most this far above before, on each benign set")
    perplexity_rise: float = Field(0.05, ge=0, description="at most this share above before")


class Config(_Settings):
    """Everything a cleansing depends on besides the model."""

    seed: int = Field(0, ge=0, lt=2**32, description="of every random choice")
    behaviour: Behaviour = Field("jailbreak", description="what is unwanted: harmful requests obeyed, or insecure code")
    layer: int | float | None = Field(
        None, description="l, counted from 1, or below 1 a share of the depth; None: 5/6 of it"
    )
    weights: Weights = Field(
        "full", description="the model's own: as they come, or in 8 or 4 bits (int8, nf4; extra quant)"
    )
    layers_path: str | None = Field(None, description="dotted path of the decoder's blocks, if it is not found")
    rounds: int = Field(8, ge=1, description="most rounds of entrapment and removal")
    least_rounds: int = Field(6, ge=1, description="and the fewest, if there are so many")
    held_out: int = Field(40, ge=1, description="defender's harmful requests kept to judge entrapment by")
    requests: int = Field(240, ge=1, description="harmful requests to train on")
    anchors: int = Field(400, ge=1, description="benign requests to train on")
    spare: int = Field(120, ge=0, description="benign requests behind the anchors, kept to see how many are refused")
    surrounded: float = Field(
        0.33, ge=0, le=1, description="share of the requests and anchors that stand between other benign requests"
    )
    stop_at: float = Field(0.1, ge=0, le=1, description="entrapment counts as failed at this held-out success")
    patience: int = Field(2, ge=1, description="stop after so many failed entrapments in a row")
    entrap: EntrapConfig = EntrapConfig()
    harden: HardenConfig = HardenConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    target: TargetConfig = TargetConfig()


def load_config(
    preset: str = "default",
    file: Path | None = None,
    sets: Sequence[str] = (),
    instead: dict[str, Any] | None = None,
) -> Config:
    """The preset, changed by a YAML file, changed by `key=value` settings (dots for nesting).

    instead: settings that take the preset's place. Raises BadInput for an unknown preset or key and for a value of the
    wrong kind.
    """
    values = _preset(preset) if instead is None else instead
    if file is not None:
        values = _merged(values, _read_yaml(file))
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise BadInput(f"--set {item!r}: write it as key=value, for example --set entrap.length=8")
        values = _merged(values, _nested(key.strip(), _parsed(item, key.strip(), value)))
    return make_config(values)


def make_config(values: dict[str, Any]) -> Config:
    """Validate a mapping. Raises BadInput naming the first bad key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = "; see `beear settings` for all of them" if first["type"] == "extra_forbidden" else ""
        message = "unknown setting" if known else first["msg"]
        raise BadInput(f"configuration: {key}: {message}{known}") from error


def config_of_run(run: Path) -> Config:
    """The settings that a run folder keeps. Raises BadInput if it is none."""
    return make_config(read_settings(run)["config"])


def preset_names() -> list[str]:
    """Names of the packaged presets."""
    return sorted(p.name.removesuffix(".yaml") for p in (files("beear") / "assets" / "presets").iterdir())


def describe() -> list[tuple[str, str, str]]:
    """Every key with its default and its meaning."""
    rows: list[tuple[str, str, str]] = []

    def add(prefix: str, model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.default, _Settings):
                add(f"{prefix}{name}.", type(field.default))
            else:
                rows.append((prefix + name, str(field.default), field.description or ""))

    add("", Config)
    return rows


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise BadInput(f"no preset {name!r}; there are: {', '.join(preset_names())}")
    loaded: dict[str, Any] = yaml.safe_load((files("beear") / "assets" / "presets" / f"{name}.yaml").read_text()) or {}
    return loaded


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no file {file}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or no date
        raise BadInput(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{file} is not a mapping of settings")
    if "model" in values and isinstance(values.get("config"), dict):
        raise BadInput(
            f"{file} is what a run keeps of its settings; give -c a file of settings alone, as under `config`"
        )
    return values


def _parsed(item: str, key: str, value: str) -> Any:
    """The value as YAML; where a text is asked for, as it stands, unless it is quoted."""
    if value and _is_text(key) and value[0] not in "\"'":
        return None if value in ("null", "~") else value
    try:
        parsed = yaml.safe_load(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: 2024-02-30
        raise BadInput(f"--set {item!r}: the value is not YAML") from error
    return value if isinstance(parsed, datetime.date) else parsed


def _is_text(key: str) -> bool:
    """Whether the setting of this dotted name is a text of any kind."""
    model: Any = Config
    for part in key.split("."):
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, _Settings) else None
        if field is None:
            return False
        model = field.annotation
    return model in (str, str | None)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
