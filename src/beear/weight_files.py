"""Which files hold a folder's weights, and are they what they claim to be? Read from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from beear.errors import BadInput

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
GGUF_HEADER = 24
"""Bytes of magic, version, and the numbers of tensors and entries."""


def files_of(folder: Path) -> list[Path]:
    """The files of weights that are read from a model's or an adapter's folder, and no others; none if it has none.

    Some repositories bring the same weights once more under other names. Raises BadInput for an index that cannot be
    followed.
    """
    if (folder / "adapter_config.json").is_file():
        return [file for file in [folder / ADAPTER] if file.is_file()]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return _indexed(folder / INDEX) if (folder / INDEX).is_file() else []


def check_safetensors(file: Path) -> None:
    """The header can be read, and its tensors fill the rest of the file. Raises BadInput."""
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is no whole safetensors file; download or convert it again") from error


def _indexed(index: Path) -> list[Path]:
    """The files that an index maps tensors to, in order. Raises BadInput unless they lie beside it."""
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index} cannot be read; download it again") from error
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index} names {name!r}, which is no .safetensors file of its folder; do not trust it")
        if not (index.parent / name).is_file():
            raise BadInput(f"{index} names {name}, which is not there; download it again")
    return [index.parent / name for name in sorted(names)]


def check_gguf(file: Path) -> None:
    """It begins as a GGUF file does. Raises BadInput."""
    with file.open("rb") as opened:
        start = opened.read(GGUF_HEADER)
    if len(start) < GGUF_HEADER or not start.startswith(b"GGUF"):
        raise BadInput(f"{file} is no GGUF file, or was cut short; download it again")
