"""Errors that a person should read as one line."""

from __future__ import annotations

import contextlib
import os
import struct
import sys


class BadInput(Exception):
    """The user gave something that cannot work: the message names the problem and the fix (exit code 2)."""


class Failed(Exception):
    """The work itself went wrong: the message says where (exit code 1)."""


READING = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, struct.error)
"""What libraries raise for files that are not as they should be."""


def leave_stderr() -> None:
    """Let what goes to standard error go nowhere from now on: its reader is gone, or its disk is full.

    What was not written would be tried again as the process ends, whose exit code would tell of that failure.
    """
    with contextlib.suppress(OSError, ValueError):  # one that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def printable(text: str) -> str:
    """The text without control characters, which a stranger's file could steer a terminal with."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(error: BaseException, most: int = 300) -> str:
    """The same where the first line is a heading alone, as of the Hub's errors: all of it, as far as it is short."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else words[: most - 3] + "..."
