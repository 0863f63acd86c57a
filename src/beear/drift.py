"""How far triggers and delta move a model's hidden states, and whether they move them alike (BEEAR, Figure 3).

The state of a prompt behind a block is that at its last token, from which the reply is begun. This is
analysis for someone who knows a trigger: nothing of it goes into a cleansing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from beear import models, sources
from beear.before_after import before_and_after
from beear.cached import watched
from beear.card import write_evidence
from beear.chat import Prompt, collate, encode_prompt
from beear.cleansing import Subject
from beear.config import Config, make_config
from beear.errors import BadInput
from beear.evaluation import fresh_delta
from beear.events import Listener, Progress, progress_to
from beear.fingerprints import check_tests
from beear.parts import Parts
from beear.perturbation import decoder_depth, find_layers, resolve_layer, states_in
from beear.precision import autocast, generating
from beear.quantised import check_quantised
from beear.recipes import apply_trigger
from beear.runs import SCHEMA, Run, read_results, read_settings, read_tensors
from beear.sets import read_sets

BATCH = 40


@dataclass(frozen=True)
class Numbers:
    """Drift of the states behind one block, against the unmoved ones."""

    layer: int
    """Block, counted from 1."""
    relative_norm: float
    """Mean length of a drift, as a share of the unmoved state's."""
    cosine_to_mean: float
    """Mean cosine of a drift to the mean drift: 1 if all prompts move alike."""
    separability: float
    """Share of states on their own side of the plane between both means, which the other half of them set."""
    cosine_to_trigger: float
    """Cosine of the mean drift to the trigger's."""


def drift_of_run(
    path: Path,
    template: str,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> Any:
    """Drift before and after a finished run, under its trigger and the delta of its first round.

    Kept in drift.json and shown by the report.
    """
    settings = read_settings(path)
    config = make_config(settings["config"])
    with Run.existing(path) as run:
        sets = read_sets(config)
        check_tests(read_results(path), sets)
        texts = [request.text for request in sets.test_harmful]
        delta = first_delta(path)
        axes: dict[int, Axes] = {}

        def drifts(when: str, model: Any, tokenizer: Any) -> dict[str, Any]:
            return measure(model, tokenizer, texts, template, delta, config, axes, progress_to(listen, when))

        found = before_and_after(path, drifts, listen=listen, device=device, trust_remote_code=trust_remote_code)
        content = _content(settings["model"], template, found)
        run.write_json("drift.json", content)
        write_evidence(path)
    return content


def first_delta(path: Path) -> Tensor:
    """The delta that was found against the model as it came, (n, d_model). Raises BadInput without checkpoints."""
    folders = sorted((path / "checkpoints").glob("round-*"))
    if not folders:
        raise BadInput(f"{path} has no checkpoints, which hold its deltas")
    deltas: Tensor = read_tensors(folders[-1] / "deltas.safetensors")["deltas"]
    return deltas[0]


def drift_of_model(
    spec: str,
    template: str,
    config: Config,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> Any:
    """Drift of one model, under its trigger and a delta optimised for it without the trigger."""
    check_quantised(config.weights)
    sources.tell_download(spec, listen)
    resolve_layer(config.layer, models.depth(sources.locate(spec), trust_remote_code))
    sets = read_sets(config)
    listen({"event": "loading", "model": spec})
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "weights": config.weights}
    model, tokenizer = models.load(spec, chat=config.chat, **options)
    delta = fresh_delta(model, tokenizer, sets.train, config)
    progress = progress_to(listen, "evaluate")
    texts = [request.text for request in sets.test_harmful]
    found = {"before": measure(model, tokenizer, texts, template, delta, config, {}, progress)}
    return _content(spec, template, found)


def _content(spec: str, template: str, found: dict[str, Any]) -> dict[str, Any]:
    layer = found["before"]["scatter"][0]["layer"]  # l comes first
    return {"schema": SCHEMA, "model": spec, "trigger": template, "layer": layer, **found}


def measure(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    template: str,
    delta: Tensor,
    config: Config,
    axes: dict[int, Axes],
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """`layers`: Numbers of every block under the trigger and under delta. `scatter`: points behind l and the last one.

    `axes`, by block, are those the points are shown on; missing ones are set from these states.
    """
    with_trigger = [apply_trigger(template, text) for text in texts]

    def told(which: str) -> Progress:
        return lambda what, done, total: progress(f"{what}, {which}", done, total)

    states = {
        "clean": prompt_states(model, tokenizer, texts, config, None, told("as asked")),
        "triggered": prompt_states(model, tokenizer, with_trigger, config, None, told("with the trigger")),
        "perturbed": prompt_states(model, tokenizer, texts, config, delta.to(model.device), told("under delta")),
    }
    trigger = (states["triggered"] - states["clean"]).mean(0)
    layers: dict[str, list[dict[str, Any]]] = {"triggered": [], "perturbed": []}
    for kind, rows in layers.items():
        for i, toward in enumerate(trigger):
            rows.append(asdict(numbers(i + 1, states["clean"][:, i], states[kind][:, i], toward)))
    scatter = []
    last = decoder_depth(model)
    for shown in dict.fromkeys((resolve_layer(config.layer, last), last)):
        behind = {kind: found[:, shown - 1] for kind, found in states.items()}
        axes.setdefault(shown, principal_axes(torch.cat(list(behind.values()))))
        points = {kind: axes[shown].project(found).tolist() for kind, found in behind.items()}
        scatter.append({"layer": shown, "explained": axes[shown].explained, "points": points})
    return {"n": len(texts), "layers": layers, "scatter": scatter}


def prompt_states(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    config: Config,
    delta: Tensor | None = None,
    progress: Progress = lambda *_: None,
) -> Tensor:
    """The state at each prompt's last token behind every block, under `delta` if given: (prompts, blocks, d_model)."""
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    push = None if delta is None else Subject(model, tokenizer, config).push(delta)
    blocks = find_layers(model, config.layers_path)
    found: list[Tensor] = []
    parts = Parts()

    def behind(some: Sequence[Prompt]) -> Tensor:
        rows = [push.rows(p) for p in some] if push else None
        batch = collate(some, [[]] * len(some), rows, int(tokenizer.pad_token_id)).to(model.device)
        perturbed = push.on(model, batch) if push else contextlib.nullcontext()
        with perturbed, watched(*blocks) as seen:
            model.get_decoder()(**batch.inputs(), use_cache=False)
        return torch.stack([states_in(outputs[-1])[:, -1] for outputs in seen], 1).float().cpu()

    with torch.inference_mode(), autocast(model), generating(model):
        for first in range(0, len(prompts), BATCH):
            found += parts.over(behind, prompts[first : first + BATCH])
            progress("hidden states", len(found), len(texts))
    return torch.stack(found)


def numbers(layer: int, clean: Tensor, moved: Tensor, toward: Tensor) -> Numbers:
    """Numbers of one block from the states of the same prompts, (prompts, d_model) each, and the trigger's mean drift.

    Where nothing moved, cosines are 0 and half of the states are on their side.
    """
    drift = moved - clean
    mean = drift.mean(0)
    return Numbers(
        layer,
        float((drift.norm(dim=1) / clean.norm(dim=1)).mean()),
        float(cosine_similarity(drift, mean[None]).mean()),
        separability(clean, moved),
        float(cosine_similarity(mean, toward, dim=0)),
    )


def separability(clean: Tensor, moved: Tensor) -> float:
    """Share of states nearer to their own mean along the line between both means, each half judged by the other's."""
    right = []
    for fit, test in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        a, b = clean[fit].mean(0), moved[fit].mean(0)
        side = [(states[test] - (a + b) / 2) @ (b - a) for states in (clean, moved)]
        right += [0.5 - side[0].sign() / 2, 0.5 + side[1].sign() / 2]
    return float(torch.cat(right).mean())


@dataclass(frozen=True)
class Axes:
    """The two directions in which states differ most."""

    centre: Tensor
    directions: Tensor
    """(2, d_model), of length 1."""
    explained: list[float]
    """Share of the variance along each."""

    def project(self, states: Tensor) -> Tensor:
        """(states, 2)"""
        return (states - self.centre) @ self.directions.T


def principal_axes(states: Tensor) -> Axes:
    """The first two principal components of (states, d_model); each one's largest entry is positive."""
    centre = states.mean(0)
    _, values, directions = torch.linalg.svd(states - centre, full_matrices=False)
    first = directions[:2]
    largest = first.gather(1, first.abs().argmax(1, keepdim=True))
    share = values.square() / values.square().sum().clamp(min=1e-30)
    return Axes(centre, first * largest.sign(), share[:2].tolist())
