"""What a finished run hands on, and whether it is as the run left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beear.errors import BadInput
from beear.hashes import file_hash
from beear.runs import CARD


def output_hashes(run: Path, model_folder: str) -> dict[str, str]:
    """SHA-256 of what a run hands on, the model's card left out, by path in the run folder."""
    folder = run / model_folder
    found = [p for p in handed_on(folder) if p != folder / CARD]
    return {str(p.relative_to(run)): file_hash(p) for p in sorted([*found, run / "delta.safetensors"])}


def handed_on(folder: Path) -> list[Path]:
    """The files of a model's folder but hidden ones, which a system or a crash leaves and nothing reads."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def check_output_files(run: Path, results: dict[str, Any]) -> None:
    """Raise BadInput if a file that a finished run hands on was changed since, is gone, or has come.

    Results that keep no digests are refused as well: whoever changes a file may have taken them out.
    """
    then = results.get("files")
    if not isinstance(then, dict) or not then:
        raise BadInput(f"{run}/results.json holds no digests of the run's files; run the cleansing again")
    now = output_hashes(run, results["model_folder"]) if (run / "delta.safetensors").exists() else {}
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if changed:
        raise BadInput(f"{run / changed[0]} is not as the run left it; do not trust it, run the cleansing again")
