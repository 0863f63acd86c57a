"""A plan: what a cleansing will take in time and memory, told before its model loads (made in miniature.py)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beear.runs import PLAN, write_json


@dataclass(frozen=True)
class Plan:
    """Seconds and peak memory in bytes of each stage; the stage `round` comes `least_rounds` to `rounds` times."""

    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    least_rounds: int
    rounds: int

    def total(self, rounds: int) -> float:
        """Seconds of a whole job with so many rounds."""
        return sum(self.seconds.values()) + (rounds - 1) * self.seconds["round"]

    def expected(self, rounds: int) -> dict[str, float]:
        """What was to be expected of a job that took so many rounds."""
        return {"seconds": self.total(rounds), "peak_memory_bytes": max(self.peak_memory_bytes.values())}


def write_plan(run: Path, plan: Plan, settings: dict[str, Any]) -> None:
    """Keep the plan of a job with these settings in its run folder."""
    write_json(run / PLAN, {"settings": settings, "plan": asdict(plan)})


def read_plan(run: Path, settings: dict[str, Any]) -> Plan | None:
    """The plan that was made for a job with these settings, if there is one."""
    file = run / PLAN
    try:
        content = json.loads(file.read_text())
        return Plan(**content["plan"]) if content["settings"] == settings else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
