"""Results as JSON files, each of which names the command that made it; and arms in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from beear.runs import SCHEMA, write_atomic

ROOT = Path(__file__).parent.parent


def write(path: Path, command: str, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write a results file; no reader ever sees half of one."""
    whole = {"schema": SCHEMA, "command": command} | content
    write_atomic(path, (json.dumps(whole, indent=indent) + "\n").encode())


def read_rows(path: Path, key: str = "rows") -> list[dict[str, Any]]:
    """All rows so far."""
    return list(json.loads(path.read_text())[key]) if path.exists() else []


def put_row(
    path: Path,
    row: dict[str, Any],
    same: Sequence[str],
    order: Callable[[dict[str, Any]], Any],
    command: str,
    key: str = "rows",
) -> None:
    """Put a row into the file, in place of an older one that is the `same` in these fields, and in `order`."""
    with locked(path):
        others = [other for other in read_rows(path, key) if any(other[name] != row[name] for name in same)]
        write(path, command, {key: sorted([*others, row], key=order)})


def locked(path: Path) -> FileLock:
    """Held while a results file is read, changed and written: two benchmarks may run beside each other."""
    (ROOT / "runs").mkdir(exist_ok=True)
    return FileLock(ROOT / "runs" / f".{path.name}.lock")


def in_its_own_process(file: str, arm: str) -> Any:
    """What `python FILE ARM` prints in its last line, as JSON; peak memory and caches are then the arm's alone."""
    out = subprocess.run([sys.executable, file, arm], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])
