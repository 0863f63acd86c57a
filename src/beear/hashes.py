"""SHA-256 of a file, and of what JSON can hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_hash(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Of a value as JSON; the order of keys counts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
