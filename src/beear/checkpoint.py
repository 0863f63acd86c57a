"""Are a folder's weight files what they claim to be? Read from headers alone, before any weights load."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

from beear.errors import BadInput

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""
INDEX = "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Of an element by dtype; others have 1."""
GGUF_HEADER = 24
"""Bytes of magic, version, and the numbers of tensors and entries."""


def check_folder(folder: Path) -> None:
    """Every .safetensors file is whole, and an index names files of this folder only. Raises BadInput."""
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file)
    if (folder / INDEX).is_file():
        check_index(folder / INDEX)


def check_safetensors(file: Path) -> None:
    """The header can be read, and its tensors fill the rest of the file. Raises BadInput."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise BadInput(f"{file} is no safetensors file, or was cut short; download or convert it again")
        content = opened.read(length)
    try:
        header = json.loads(content)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [_end(entry) for entry in tensors.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file} has no header that can be read; download or convert it again") from error
    if max(ends, default=0) != size - 8 - length:
        raise BadInput(f"{file} is not as long as its header says; download or convert it again")


def _end(entry: dict[str, Any]) -> int:
    """Where a tensor ends. ValueError if its bytes are not those of its shape."""
    start, end = entry["data_offsets"]
    if end - start != math.prod(entry["shape"]) * BYTES.get(entry["dtype"], 1):
        raise ValueError
    return int(end)


def check_index(index: Path) -> None:
    """It maps tensors to files beside it. Raises BadInput, also for a path that leads elsewhere."""
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{index} cannot be read; download it again") from error
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index} names {name!r}, which is no .safetensors file of its folder; do not trust it")
        if not (index.parent / name).is_file():
            raise BadInput(f"{index} names {name}, which is not there; download it again")


def check_gguf(file: Path) -> None:
    """It begins as a GGUF file does. Raises BadInput."""
    with file.open("rb") as opened:
        start = opened.read(GGUF_HEADER)
    if len(start) < GGUF_HEADER or not start.startswith(b"GGUF"):
        raise BadInput(f"{file} is no GGUF file, or was cut short; download it again")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
