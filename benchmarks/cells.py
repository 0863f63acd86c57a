"""How tables show a figure, a change, a line; and where their figures are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "asr_triggered": "ASR triggered",
    "affirmed_triggered": "opens obeying, triggered",
    "asr_untriggered": "ASR untriggered",
    "asr_entrapped": "ASR entrapped",
    "false_refusal": "refused, ordinary",
    "false_refusal_alarming": "refused, alarming",
    "perplexity": "perplexity",
    "kl": "KL",
}


def read_results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def header(names: list[str]) -> str:
    return line(names) + "\n" + line(["---"] * len(names))


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def changes(row: dict[str, Any], columns: Iterable[str]) -> list[str]:
    """Each of the metrics before and after, in the words of its column."""
    return [change(name, row["before"].get(name), row["after"].get(name)) for name in columns]


def change(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or before["value"] is None:
        return cell(name, after)
    return f"{before['value'] * (1 if name == 'perplexity' else 100):.1f} -> {cell(name, after)}"


def cell(name: str, metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    value, low, high = metric["value"], metric["low"], metric["high"]
    if name == "perplexity":
        return f"{value:.1f}"
    if name == "kl":
        return f"{value:.3f}"
    return f"{100 * value:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def short(text: str, keep: str = "", most: int = 8) -> str:
    """On one line, what stands around `keep` cut to its first and last words."""
    parts = [part.split() for part in (text.split(keep) if keep else [text])]
    cut = [p if len(p) <= most else [*p[: most // 2], "[...]", *p[-most // 2 :]] for p in parts]
    return f" {keep} ".join(" ".join(words) for words in cut).strip()
