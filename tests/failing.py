"""What a process of its own fails at; it is imported there, so it imports little."""

from __future__ import annotations

import time
from typing import NoReturn

from beear.errors import BadInput


def broken() -> NoReturn:
    raise ValueError("no such shape")


def slow() -> NoReturn:
    time.sleep(60)
    raise AssertionError


def refused() -> NoReturn:
    raise BadInput("no such blocks")
