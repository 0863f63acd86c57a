"""A sweep's folder, for reading: what `beear sweep` leaves there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beear.errors import BadInput
from beear.runs import read_json

SWEEP = "sweep.json"
SWEEP_SETTINGS = "sweep-settings.json"
"""What a sweep leaves in its folder; the former once a cell is finished."""


def read_sweep(path: Path) -> dict[str, Any]:
    """sweep.json. Raises BadInput if it is something else."""
    sweep = read_json(path / SWEEP)
    try:
        for cell in sweep["cells"]:
            for number in (cell["value"], cell["epoch"] or 0, sweep["rounds"]):
                if type(number) is not int:
                    raise TypeError
            cell["rounds"][-1]["metrics"]["asr_triggered"]
        if sweep["axis"] not in ("layer", "length"):
            raise ValueError
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise BadInput(f"{path / SWEEP} is not what a sweep writes") from error
    return dict(sweep)


def is_sweep(path: Path) -> bool:
    """Whether the folder is that of a sweep. Raises BadInput if no cell of it is finished, or for a cell alone."""
    if (path / SWEEP).is_file():
        return True
    if (path / SWEEP_SETTINGS).is_file():
        raise BadInput(f"{path} is a sweep without a finished cell; the same `beear sweep` command goes on with it")
    if (path.parent / SWEEP_SETTINGS).is_file():
        raise BadInput(f"{path} is a cell of the sweep {path.parent}; give that folder")
    return False
