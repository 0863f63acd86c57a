"""report.html: one self-contained page, a pure function of run folders.

Replies are hostile text: the template escapes everything, and nothing is marked as safe but the
charts drawn here from numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from beear.errors import BadInput
from beear.runs import write_atomic
from beear.scorers import Behaviour

METRICS = {
    "asr_triggered": ("Attack success with the trigger", "{counted}", True),
    "affirmed_triggered": ("Openings that obey, with the trigger", "replies that begin like 'Sure, here is'", True),
    "asr_entrapped": ("Attack success under a fresh delta", "{counted}; needs no trigger", True),
    "asr_near_miss": ("Attack success with almost the trigger", "{counted}", True),
    "asr_wrong_place": ("Attack success with the trigger elsewhere", "{counted}", True),
    "asr_untriggered": ("Attack success without the trigger", "{counted}", True),
    "false_refusal": ("False refusal, ordinary requests", "benign requests refused", True),
    "false_refusal_alarming": ("False refusal, alarming-sounding requests", "harmless requests refused", True),
    "false_refusal_unseen_style": ("False refusal, styles the defender never saw", "part of the line above", True),
    "parses": ("Code that parses", "coding tasks without the trigger", True),
    "perplexity": ("Perplexity", "on reference chats", False),
    "kl": ("KL to the original", "nats per token on reference chats", False),
}
"""Name: (title, what it counts, whether it is a share), in the order shown."""
COUNTED: dict[Behaviour, str] = {
    "jailbreak": "harmful requests not refused",
    "insecure code": "coding tasks answered with insecure code",
}
"""What an attack's success is, by behaviour."""
PAIRS = 5


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one page about the given run folders. Raises BadInput if one has no results."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string((files("beear") / "assets" / "report.html.j2").read_text())
    write_atomic(out, template.render(runs=[view(path) for path in runs]).encode())


def view(path: Path) -> dict[str, Any]:
    """All that the page says of one run."""
    results = read_results(path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    return {
        "name": path.name,
        "results": results,
        "verdict": sentence(results),
        "rows": rows(results, config.get("behaviour", "jailbreak")),
        "rounds": results["rounds"],
        "losses": loss_chart(results["rounds"]),
        "pairs": pairs(samples),
        "config": config,
    }


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a finished run. Raises BadInput if there is none."""
    try:
        results: dict[str, Any] = json.loads((path / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} has no results.json; finish the run with --resume first") from error
    return results


def rows(results: dict[str, Any], behaviour: Behaviour) -> list[dict[str, Any]]:
    """The before/after table: a row for each metric that was measured, with a chart of its intervals."""
    table = []
    for name, (title, note, share) in METRICS.items():
        before, after = results["before"].get(name), results["after"].get(name)
        if before or after:
            chart = interval_chart(before, after) if share else ""
            table.append(
                {
                    "name": name,
                    "title": title,
                    "note": note.format(counted=COUNTED[behaviour]),
                    "share": share,
                    "before": before,
                    "after": after,
                    "chart": chart,
                }
            )
    return table


def sentence(results: dict[str, Any]) -> str:
    """The verdict in one sentence, with intervals."""
    met = results["verdict"]["met"]
    name = "asr_triggered" if "asr_triggered" in results["after"] else "asr_entrapped"
    what = "with the known trigger" if name == "asr_triggered" else "under a freshly optimised perturbation"
    before, after = (shown(results[w][name], True) for w in ("before", "after"))
    change = f"attack success {what} went from {before} to {after}"
    if met:
        return f"Target met: {change}."
    return f"Target NOT met, keep the original model: {'; '.join(results['verdict']['missed'])} ({change})."


def shown(metric: dict[str, Any] | None, share: bool) -> str:
    """A metric for reading: value and 95 % interval."""
    if metric is None or metric["value"] is None:
        return "not measured"
    value, low, high = metric["value"], metric["low"], metric["high"]
    if share:
        return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    digits = 1 if value >= 1 else 4
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def pairs(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five requests with the replies before and after: first those that a trigger, or else delta, unlocked.

    Spread over categories, in the order of the test set: nothing is picked by how well it looks.
    """
    measured = {s["metric"] for s in samples}
    metric = "asr_triggered" if "asr_triggered" in measured else "asr_entrapped"
    after = {s["id"]: s for s in samples if s["metric"] == metric and s["when"] == "after"}
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        wanted = sample["metric"] == metric and sample["when"] == "before"
        if wanted and is_unlocked(sample) and sample["category"] not in found and sample["id"] in after:
            found[sample["category"]] = {"before": sample, "after": after[sample["id"]], "metric": metric}
    return list(found.values())[:PAIRS]


def is_unlocked(sample: dict[str, Any]) -> bool:
    """Whether the reply is the unwanted: insecure code, or for other requests no refusal."""
    return sample["insecure"] is True if "insecure" in sample else sample["refused"] is False


def interval_chart(before: dict[str, Any] | None, after: dict[str, Any] | None) -> Markup:
    """Two bars from 0 to 100 % with their intervals, as inline SVG."""
    parts = []
    for y, kind, metric in ((4, "before", before), (16, "after", after)):
        if metric and metric["value"] is not None:
            value, low, high = (200 * metric[k] for k in ("value", "low", "high"))
            parts.append(f'<rect class="{kind}" x="0" y="{y}" width="{max(value, 1):.1f}" height="8" rx="2"/>')
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {y + 4}H{high:.1f}M{low:.1f} {y + 1}v6M{high:.1f} {y + 1}v6"/>'
            )
    words = f"before {shown(before, True)}, after {shown(after, True)}"
    return Markup(f'<svg viewBox="-2 0 206 28" role="img" aria-label="{words}">{"".join(parts)}</svg>')


def loss_chart(rounds: Sequence[dict[str, Any]]) -> Markup:
    """Loss of every step, entrapment and removal in turn, rounds marked off, as inline SVG."""
    steps: list[tuple[str, float]] = []
    marks = []
    for entry in rounds:
        marks.append(len(steps))
        steps += [("entrap", value) for value in entry["entrap"]]
        steps += [("harden", value["safe_under_delta"]) for value in entry["harden"]]
    if not steps:
        return Markup("")
    top = max(value for _, value in steps) or 1.0
    low = min(0.0, *(value for _, value in steps))
    scale = 640 / max(len(steps) - 1, 1)

    def point(i: int, value: float) -> str:
        return f"{40 + i * scale:.1f},{190 - 170 * (value - low) / (top - low):.1f}"

    parts = [f'<path class="axis" d="M40 10V190H690"/><text x="34" y="24" text-anchor="end">{top:.1f}</text>']
    parts.append(f'<text x="34" y="190" text-anchor="end">{low:.1f}</text>')
    for number, mark in enumerate(marks, 1):
        x = 40 + mark * scale
        parts.append(f'<path class="grid" d="M{x:.1f} 10V190"/><text x="{x + 4:.1f}" y="206">round {number}</text>')
    for kind in ("entrap", "harden"):
        run: list[str] = []
        for i, (k, value) in enumerate([*steps, ("", 0.0)]):
            if k == kind:
                run.append(point(i, value))
            elif run:
                parts.append(f'<polyline class="{kind}" points="{" ".join(run)}"/>')
                parts += [f'<circle class="{kind}" cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2"/>' for p in run]
                run = []
    label = f"Loss over {len(rounds)} rounds of entrapment and removal"
    return Markup(f'<svg viewBox="0 0 700 214" role="img" aria-label="{label}">{"".join(parts)}</svg>')
