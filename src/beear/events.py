"""What work says while it goes on, and who hears it: a terminal (console.py), a log (events.jsonl), or nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
"""`event` is its kind; the other keys depend on it."""
Listener = Callable[[Event], None]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
StepProgress = Callable[[int, int, float], None]
"""Called with the step of a training, the number of steps and the loss."""


def progress_to(listen: Listener, when: str) -> Progress:
    """Progress, told as events."""

    def report(what: str, done: int, total: int) -> None:
        listen({"event": "measure", "when": when, "what": what, "done": done, "total": total})

    return report
