"""Charts of the report as inline SVG, drawn from numbers alone; colours are the page's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from beear.metrics import shown
from beear.runs import WHENS

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5b646e}.frame{fill:#fff;stroke:#dcdfe3}.clean{fill:none;stroke:#5b646e}"
    ".triggered{fill:#8a2be2;fill-opacity:.75}.perturbed{fill:#1763b8;fill-opacity:.75}"
    ".removed{fill:#7cc4b6}.cross{stroke:#a3301f;stroke-width:2.5;fill:none}.epoch{fill:#1c2024;font-weight:600}"
)


def as_file(chart: Markup) -> str:
    """A chart as an SVG file of its own, for the documentation."""
    opening, rest = str(chart).split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'


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
    low = min(0.0, *(value for _, value in steps))
    top = max(value for _, value in steps)
    top = top if top > low else low + 1.0
    scale = 640 / max(len(steps) - 1, 1)

    def point(i: int, value: float) -> str:
        return f"{40 + i * scale:.1f},{190 - 170 * (value - low) / (top - low):.1f}"

    parts = [f'<path class="axis" d="M40 10V190H690"/><text x="34" y="24" text-anchor="end">{top:.1f}</text>']
    parts.append(f'<text x="34" y="190" text-anchor="end">{low:.1f}</text>')
    word = "round " if len(rounds) <= 10 else ""  # side by side they would overlap
    for number, mark in enumerate(marks, 1):
        x = 40 + mark * scale
        parts.append(f'<path class="grid" d="M{x:.1f} 10V190"/><text x="{x + 4:.1f}" y="206">{word}{number}</text>')
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


KINDS = ("clean", "triggered", "perturbed")
WIDTH, HEIGHT = 330, 250
"""Of one panel of a scatter."""


DRIFT = ("relative_norm", "cosine_to_mean", "separability", "cosine_to_trigger")
"""What is told of the drift behind a block; the last is of delta only."""


def drift_charts(drift: dict[str, Any]) -> dict[str, Any]:
    """Figure 3 of the paper, a scatter for each block shown, and drift by block, from drift.json."""
    measured: dict[str, Any] = {when: drift[when] for when in WHENS if when in drift}
    scatters = []
    for number, entry in enumerate(drift["before"]["scatter"]):
        panels = {when: found["scatter"][number]["points"] for when, found in measured.items()}
        scatters.append({**entry, "chart": scatter_chart(entry["layer"], panels)})
    series = {
        name: [
            (when, kind, [row[name] for row in found["layers"][kind]])
            for when, found in measured.items()
            for kind in ("triggered", "perturbed")
        ]
        for name in DRIFT
    }
    series["cosine_to_trigger"] = [s for s in series["cosine_to_trigger"] if s[1] == "perturbed"]
    return {"scatters": scatters, "lines": {name: layers_chart(name, lines) for name, lines in series.items()}}


def scatter_chart(layer: int, panels: dict[str, Any]) -> Markup:
    """Panels side by side on the same axes: rings clean, triangles with the trigger, squares with delta."""
    points = [xy for kinds in panels.values() for group in kinds.values() for xy in group]
    low = [min(p[i] for p in points) for i in (0, 1)]
    span = [max(p[i] for p in points) - low[i] or 1.0 for i in (0, 1)]
    parts = []
    for number, (when, kinds) in enumerate(panels.items()):
        left = number * (WIDTH + 20) + 1
        parts.append(f'<rect class="frame" x="{left}" y="20" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
        parts.append(f'<text x="{left}" y="13">{when if len(panels) > 1 else ""}</text>')
        for kind in KINDS:
            for a, b in kinds[kind]:
                x = left + 10 + (WIDTH - 20) * (a - low[0]) / span[0]
                y = HEIGHT + 10 - (HEIGHT - 20) * (b - low[1]) / span[1]
                parts.append(_mark(kind, x, y))
    words = f"First two principal components of the states behind block {layer}, {' and '.join(panels)}"
    width = len(panels) * (WIDTH + 20) - 18
    return Markup(
        f'<svg viewBox="0 0 {width} {HEIGHT + 22}" style="max-width:{width}px" role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg>"
    )


def _mark(kind: str, x: float, y: float) -> str:
    if kind == "clean":
        return f'<circle class="clean" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
    if kind == "triggered":
        return f'<path class="triggered" d="M{x:.1f} {y - 3.4:.1f}l3.2 5.6h-6.4z"/>'
    return f'<rect class="perturbed" x="{x - 2.3:.1f}" y="{y - 2.3:.1f}" width="4.6" height="4.6"/>'


def layers_chart(name: str, series: Sequence[tuple[str, str, list[float]]]) -> Markup:
    """A value by block: colour tells before from after, a dotted line delta from the trigger."""
    values = [v for _, _, line in series for v in line]
    low, top = min([0.0, *(v for v in values if v <= -0.05)]), max(1.0, *values)
    blocks = len(series[0][2])
    scale = 270 / max(blocks - 1, 1)

    def point(i: int, value: float) -> str:
        return f"{36 + i * scale:.1f},{140 - 125 * (value - low) / (top - low):.1f}"

    parts = ['<path class="axis" d="M36 12V140H310"/>']
    parts += [f'<text x="32" y="{y}" text-anchor="end">{v:.1f}</text>' for y, v in ((20, top), (143, low))]
    parts.append(f'<text x="36" y="158">block 1</text><text x="310" y="158" text-anchor="end">{blocks}</text>')
    for when, kind, line in series:
        dotted = "" if kind == "triggered" else ' stroke-dasharray="3 3"'
        shape = " ".join(point(i, value) for i, value in enumerate(line))
        parts.append(f'<polyline class="{"entrap" if when == "before" else "harden"}"{dotted} points="{shape}"/>')
    label = f"{name.replace('_', ' ')} by block"
    return Markup(f'<svg viewBox="0 0 320 164" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def sweep_chart(axis: str, sweeps: Sequence[dict[str, Any]]) -> Markup:
    """Figures 5 and 8 of the paper: a row for each model, a column for each value.

    The number of the first round after which the trigger works no more, or a cross; below it, refusals of ordinary
    requests after that round, in per cent.
    """
    values = sorted({cell["value"] for sweep in sweeps for cell in sweep["cells"]})
    left, step, row = 170, 52, 56
    width, height = left + step * len(values), 34 + row * len(sweeps)
    parts = [f'<text x="{left - 12}" y="18" text-anchor="end">{axis}</text>']
    for i, value in enumerate(values):
        parts.append(f'<text x="{left + i * step + 20}" y="18" text-anchor="middle">{value}</text>')
    for number, sweep in enumerate(sweeps):
        y = 34 + number * row
        name = escape(str(sweep["model"]).removeprefix("organism:")[-24:])
        parts.append(f'<text x="{left - 12}" y="{y + 22}" text-anchor="end">{name}</text>')
        for cell in sweep["cells"]:
            parts.append(_sweep_cell(left + values.index(cell["value"]) * step, y, cell, sweep["rounds"]))
    words = f"Earliest round in which the backdoor is removed, by {axis}"
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg>"
    )


def _sweep_cell(x: int, y: int, cell: dict[str, Any], rounds: int) -> str:
    refused = cell["rounds"][-1]["metrics"]["false_refusal"]["value"] if cell["rounds"] else None
    below = (
        "" if refused is None else f'<text x="{x + 20}" y="{y + 48}" text-anchor="middle">{100 * refused:.0f} %</text>'
    )
    if cell["epoch"] is None:
        return f'<path class="cross" d="M{x + 12} {y + 9}l16 16m0 -16l-16 16"/>{below}'
    strength = 1 - 0.8 * (cell["epoch"] - 1) / max(rounds - 1, 1)
    return (
        f'<rect class="removed" x="{x}" y="{y}" width="40" height="34" rx="5" fill-opacity="{strength:.2f}"/>'
        f'<text class="epoch" x="{x + 20}" y="{y + 22}" text-anchor="middle">{cell["epoch"]}</text>{below}'
    )
