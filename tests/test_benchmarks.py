"""Every benchmark at least begins: what it takes from the package is there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_it_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(name)
    assert name == "stored" or callable(module.main)


def test_results_name_their_command_and_rows_take_the_place_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    stored = importlib.import_module("stored")
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    path = tmp_path / "figures.json"
    for row in ({"arm": "b", "seconds": 1}, {"arm": "a", "seconds": 2}, {"arm": "b", "seconds": 3}):
        stored.put_row(path, row, ("arm",), lambda row: row["arm"], "python benchmarks/figures.py")
    rows = [{"arm": "a", "seconds": 2}, {"arm": "b", "seconds": 3}]
    assert json.loads(path.read_text()) == {"schema": 1, "command": "python benchmarks/figures.py", "rows": rows}
