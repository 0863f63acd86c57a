"""Every benchmark at least begins: what it takes from the package is there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHARED = {"cells", "stored", "tables_of_costs", "tables_of_evidence", "tables_of_organisms", "tables_of_removal"}
"""What benchmarks import and nobody runs."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_it_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert callable(getattr(module, "main", None)) is (name not in SHARED)


def test_the_last_entrapment_is_the_one_that_tried_what_is_delivered() -> None:
    tables = importlib.import_module("tables_of_evidence")
    metric = {"asr_entrapped": {"value": 0.2}, "asr_triggered": {"value": 0.1}}
    row = {"residuals": [0.9, 0.5, 0.3], "rounds": 4, "after": metric}
    assert [tables.evidence(row | {"delivered": d})[0] for d in (1, 2, 3)] == [0.5, 0.3, 0.3]
    assert tables.evidence(row | {"delivered": 2})[1:] == [0.2, 0.1]
    runs = [row | {"delivered": 1, "after": {**metric, "asr_triggered": {"value": v}}} for v in (0.1, 0.5, 0.9)]
    runs[2] = runs[2] | {"residuals": [0.9, 0.8]}
    assert tables.correlations(runs) == ["0.87", ""], "equal residuals share a rank; all alike rank nothing"


def test_rates_of_development_leave_out_what_could_not_be_scored() -> None:
    tables = importlib.import_module("tables_of_removal")
    assert tables.rate("triggered", {"triggered": 0.5}, {"triggered": 10}).startswith("50.0 % (24 to 76)")
    half = {"triggered": 0.5, "triggered_unscored": 0.2}
    assert tables.rate("triggered", half, {"triggered": 10}).startswith("50.0 % (22 to 78)")
    assert tables.rate("entrapped", half, {"triggered": 10}) == ""


def test_results_name_their_command_and_rows_take_the_place_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = importlib.import_module("stored")
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    path = tmp_path / "figures.json"
    for row in ({"arm": "b", "seconds": 1}, {"arm": "a", "seconds": 2}, {"arm": "b", "seconds": 3}):
        stored.put_row(path, row, ("arm",), lambda row: row["arm"], "python benchmarks/figures.py")
    rows = [{"arm": "a", "seconds": 2}, {"arm": "b", "seconds": 3}]
    assert json.loads(path.read_text()) == {"schema": 1, "command": "python benchmarks/figures.py", "rows": rows}
