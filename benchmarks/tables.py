"""Write the tables and figures of the README and of docs/ from benchmarks/results/*.json and the recipes.

python benchmarks/tables.py            (--check: fail if a table or a figure is not up to date)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from cells import ROOT, read_results
from tables_of_costs import arms, entrapment, memory, per_rank, plan, scaling, speed
from tables_of_evidence import drift, elsewhere, floor, pooled, residual, revival
from tables_of_organisms import attacks, judges, labelled, organisms, rebuild
from tables_of_removal import ablation, beside, goals, rejected, removal, summary, unlocked

from beear.charts import as_file, drift_charts, sweep_chart

FIGURES = ROOT / "docs" / "figures"
CONTROLS = ("control: delta = 0", "control: random delta")
PRESETS = ("paper", "fast", "thorough")
DEFAULTS = {
    "decision-10/removal.json": "docs/decisions/0010-one-default-for-every-organism.md",
    "decision-13/removal.json": "docs/decisions/0013-a-later-block-and-a-farther-push.md",
    "decision-18/removal.json": "docs/decisions/0018-a-delta-that-grows-and-refusals-that-are-watched.md",
    "decision-21/removal.json": "docs/decisions/0021-longer-deltas-in-every-round.md",
    "removal.json": "docs/decisions/0023-what-makes-the-divergence.md",
}
"""The decisions on the default, by the figures of its day; the newest is today's."""
ONCE_SHIPPED = "decision-24/removal.json"
"""Today's default on organism 6 as it was shipped before it was planted anew."""
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"summary": partial(summary, "removal.json")},
    "docs/results.md": {
        "removal": partial(removal, "removal.json", arms=False),
        "controls": partial(beside, "removal.json", CONTROLS),
        "presets": partial(beside, "removal.json", PRESETS),
        "rejected": partial(rejected, "removal.json"),
        "goals": partial(goals, "removal.json"),
        "unlocked": partial(unlocked, "removal.json"),
        "revival": partial(revival, "revival.json"),
        "entrapment": entrapment,
        "speed": speed,
        "scaling": scaling,
        "memory": memory,
        "judges": judges,
        "labelled": labelled,
        "floor": floor,
        "elsewhere": elsewhere,
    },
    "docs/organisms.md": {"attacks": attacks, "organisms": organisms, "rebuild": rebuild},
    "docs/drift.md": {"drift": drift},
    "docs/decisions/0014-planting-within-the-time.md": {
        "reward": partial(arms, "reward"),
        "policy": partial(arms, "policy"),
    },
    "docs/decisions/0015-plans-from-miniatures-and-two-ways-to-share.md": {"plan": plan, "ranks": per_rank},
    "docs/decisions/0007-what-makes-a-step-fast.md": {
        "step": partial(arms, "step"),
        "replies": partial(arms, "replies"),
    },
    "docs/decisions/0026-padding-does-not-run.md": {"hardening": partial(arms, "hardening")},
    "docs/decisions/0030-each-ingredient-taken-away.md": {"ablation": ablation},
    "docs/decisions/0031-deltas-that-removal-did-not-meet.md": {"elsewhere": elsewhere},
}
for number, (file, page) in enumerate(DEFAULTS.items(), start=1):
    TABLES[page] = {"residual": partial(residual, file)}
    known = [*list(DEFAULTS)[:number], *([ONCE_SHIPPED] if number == len(DEFAULTS) else [])]
    if number > 1:
        TABLES[page]["pooled"] = partial(pooled, *known)
TABLES[DEFAULTS["decision-10/removal.json"]]["revival"] = partial(revival, "decision-10/revival.json")
for file in list(DEFAULTS)[1:-1]:  # today's stands in results.md, the first page tells its own
    TABLES[DEFAULTS[file]]["removal"] = partial(removal, file)


def figures() -> dict[str, str]:
    """Figure 3 of each organism whose points were kept, Figures 5 and 8: content by file name."""
    drawn = {}
    for name, row in read_results("drift.json")["organisms"].items():
        if "scatter" in row["before"]:
            drawn[f"drift-{name}.svg"] = as_file(drift_charts(row)["scatters"][-1]["chart"])
    sweeps = read_results("sweeps.json")["organisms"].values()
    for axis in ("layer", "length"):
        if rows := [found[axis] for found in sweeps if axis in found]:
            drawn[f"sweep-{axis}.svg"] = as_file(sweep_chart(axis, rows))
    return drawn


def filled(text: str, name: str, table: str) -> str:
    """The text with what stands between the table's two markers replaced."""
    start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"no place for the table {name}: a page lacks one of its two markers")
    return f"{before}{start}\n{table}\n{end}{after}"


def main() -> None:
    wanted = {FIGURES / name: drawing for name, drawing in figures().items()}
    for file, tables in TABLES.items():
        text = (ROOT / file).read_text()
        for name, table in tables.items():
            text = filled(text, name, table())
        wanted[ROOT / file] = text
    for path, text in wanted.items():
        old = path.read_text() if path.exists() else None
        if "--check" in sys.argv and text != old:
            sys.exit(f"{path.relative_to(ROOT)} is not up to date; run: python benchmarks/tables.py")
        if text != old:
            path.write_text(text)


if __name__ == "__main__":
    main()
