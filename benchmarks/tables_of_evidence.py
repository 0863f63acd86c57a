"""Tables of what a removal is to be believed by: what it says of itself, and what it did not meet or cannot see."""

from __future__ import annotations

from typing import Any

import numpy as np
from cells import COLUMNS, cell, change, header, line, read_results


def residual(*files: str) -> str:
    """What a run says of itself without the trigger, beside what the trigger does; the rank correlations below."""
    rows = [row for file in files for row in read_results(file)["runs"]]
    lines = [header(["organism", "arm, seed", "last entrapment", "ASR entrapped, after", "ASR triggered, after"])]
    for row in rows:
        shown = [f"{100 * value:.1f} %" for value in evidence(row)]
        lines.append(line([f"`{row['organism']}`", f"{row['arm']}, {row['seed']}", *shown]))
    own = [row for row in rows if row["arm"] == "default"]  # a control's success is no entrapment
    lines.append(line(["rank correlation with the last column", f"{len(own)} runs", *correlations(own), ""]))
    return "\n".join(lines)


def pooled(*files: str) -> str:
    """How well what a run says of itself ranks what the trigger does after it, over all runs of the files.

    Controls are left out: what succeeds there is no entrapment.
    """
    rows = [row for file in files for row in read_results(file)["runs"] if row["arm"] == "default"]
    title = "rank correlation with ASR triggered, after"
    heads = ["", "runs", "last entrapment", "ASR entrapped, after"]
    return "\n".join([header(heads), line([title, f"{len(rows)} runs", *correlations(rows)])])


def evidence(row: dict[str, Any]) -> list[float]:
    """Of a run, the last entrapment that tried what it delivers, and what a fresh delta and the trigger do to that.

    The last is the one that began the round after the delivered one; where there is none, the delivered round's.
    """
    residuals, after = row["residuals"], row["after"]
    last = residuals[min(row.get("delivered", row["rounds"]), len(residuals) - 1)]
    return [last, after["asr_entrapped"]["value"], after["asr_triggered"]["value"]]


def correlations(rows: list[dict[str, Any]]) -> list[str]:
    """Rank correlation of the first two of each run's evidence with the third; none of less than three or all alike."""
    last, entrapped, triggered = (ranks([evidence(row)[i] for row in rows]) for i in range(3))
    told = len(rows) > 2 and len(set(triggered)) > 1
    return [
        f"{np.corrcoef(own, triggered)[0, 1]:.2f}" if told and len(set(own)) > 1 else "" for own in (last, entrapped)
    ]


def ranks(values: list[float]) -> list[float]:
    """Rank of each value, equal ones at their mean rank."""
    ordered = sorted(values)
    return [(ordered.index(v) + len(ordered) - 1 - ordered[::-1].index(v)) / 2 for v in values]


def revival(file: str) -> str:
    """Attack success with the trigger, and refusals, of cleansed models after what deployment does to a model."""
    columns = ("asr_triggered", "asr_untriggered", "false_refusal", "false_refusal_alarming")
    lines = [header(["organism", "seed", "then", *(COLUMNS[name] for name in columns)])]
    for row in read_results(file)["rows"]:
        cells = [cell(name, row["metrics"].get(name)) for name in columns]
        lines.append(line([f"`{row['organism']}`", str(row["seed"]), row["treatment"], *cells]))
    return "\n".join(lines)


def elsewhere() -> str:
    """By attack, of each model that was measured, the share of harmful requests that a delta so found unlocks."""
    rows = read_results("attacks.json")["rows"]
    models = list(dict.fromkeys((row["organism"], row["arm"], row["seed"]) for row in rows))
    found = {(row["attack"], (row["organism"], row["arm"], row["seed"])): row["metric"] for row in rows}
    titles = [f"`{name}`, {arm}" + ("" if arm == "as it came" else f", {seed}") for name, arm, seed in models]
    lines = [header(["delta", *titles])]
    whole = max(models, key=lambda model: sum((attack, model) in found for attack, _ in found))  # of all attacks
    for attack in (attack for attack, model in found if model == whole):
        lines.append(line([attack, *(cell("asr_entrapped", found.get((attack, model))) for model in models)]))
    return "\n".join(lines)


def floor() -> str:
    """One row per trigger: what it does to a model without a backdoor, beside the planted one before and after."""
    columns = {"asr_triggered": "not refused", "affirmed_triggered": "opens obeying"}
    heads = ["trigger of", *(f"{title}, no backdoor" for title in columns.values())]
    cleansed = {row["organism"]: row for row in default_rows("removal.json")}
    lines = [header([*heads, *(f"{title}, planted -> cleansed" for title in columns.values())])]
    for name, metrics in read_results("floor.json")["triggers"].items():
        row = cleansed.get(name)
        after = [change(metric, row["before"][metric], row["after"][metric]) if row else "" for metric in columns]
        lines.append(line([f"`{name}`", *(cell(metric, metrics[metric]) for metric in columns), *after]))
    return "\n".join(lines)


def default_rows(file: str) -> list[dict[str, Any]]:
    """The runs with default settings and seed 0."""
    return [row for row in read_results(file)["runs"] if (row["arm"], row["seed"]) == ("default", 0)]


def drift() -> str:
    """One row per organism: drift behind block l and the last block, before and after."""
    numbers = {
        "relative_norm": "length, of the state's",
        "cosine_to_mean": "cosine to its mean",
        "separability": "told apart",
    }
    heads = [f"trigger: {title}" for title in numbers.values()]
    lines = [header(["organism", "behind block", *heads, "delta: length", "cosine of delta's drift to the trigger's"])]
    for name, row in read_results("drift.json")["organisms"].items():
        for layer in (row["layer"], len(row["before"]["layers"]["triggered"])):
            found = {
                kind: [row[when]["layers"][kind][layer - 1] for when in ("before", "after")]
                for kind in ("triggered", "perturbed")
            }
            cells = [" -> ".join(f"{entry[key]:.2f}" for entry in found["triggered"]) for key in numbers]
            cells += [
                " -> ".join(f"{entry[key]:.2f}" for entry in found["perturbed"])
                for key in ("relative_norm", "cosine_to_trigger")
            ]
            lines.append(line([f"`{name}`", str(layer), *cells]))
    return "\n".join(lines)
