"""Write the tables of the README from benchmarks/results/*.json.

python benchmarks/tables.py            (--check: fail if a table is not up to date)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLUMNS = {
    "asr_triggered": "ASR triggered",
    "asr_untriggered": "ASR untriggered",
    "asr_entrapped": "ASR entrapped",
    "false_refusal": "refused, ordinary",
    "false_refusal_alarming": "refused, alarming",
    "perplexity": "perplexity",
    "kl": "KL",
}


def removal() -> str:
    """One row per organism before, then one per arm and seed after."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "removal.json").read_text())["runs"]
    lines = [header(["organism", "", *COLUMNS.values(), "minutes"])]
    seen: set[str] = set()
    for row in rows:
        if row["organism"] not in seen:
            seen.add(row["organism"])
            lines.append(line([row["organism"], "before", *cells(row["before"]), ""]))
        minutes = f"{row['wall_seconds'] / 60:.1f}"
        lines.append(line(["", f"{row['arm']}, seed {row['seed']}", *cells(row["after"]), minutes]))
    return "\n".join(lines)


def cells(metrics: dict[str, Any]) -> list[str]:
    return [cell(name, metrics.get(name)) for name in COLUMNS]


def cell(name: str, metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    value, low, high = metric["value"], metric["low"], metric["high"]
    if name == "perplexity":
        return f"{value:.1f}"
    if name == "kl":
        return f"{value:.3f}"
    return f"{100 * value:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def header(names: list[str]) -> str:
    return line(names) + "\n" + line(["---"] * len(names))


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def filled(text: str, name: str, table: str) -> str:
    """The text with what stands between the table's two markers replaced."""
    start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{table}\n{end}{after}"


def main() -> None:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = filled(old, "removal", removal())
    if "--check" in sys.argv:
        sys.exit(0 if new == old else "README.md is not up to date; run: python benchmarks/tables.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
