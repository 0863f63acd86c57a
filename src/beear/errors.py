"""Errors that a person should read as one line."""

from __future__ import annotations


class BadInput(Exception):
    """The user gave something that cannot work: the message names the problem and the fix (exit code 2)."""


class Failed(Exception):
    """The work itself went wrong: the message says where (exit code 1)."""
