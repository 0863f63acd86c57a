"""What work says while it goes on, and who hears it: a terminal (console.py), a log (events.jsonl), or nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
"""`event` is its kind; the other keys depend on it."""
Listener = Callable[[Event], None]
