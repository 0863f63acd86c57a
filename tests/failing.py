"""What a process of its own fails at; it is imported there, so it imports little."""

from __future__ import annotations

from typing import NoReturn

from beear.errors import BadInput


def broken() -> NoReturn:
    raise ValueError("no such shape")


def refused() -> NoReturn:
    raise BadInput("no such blocks")
