"""A sweep: cells are run folders, finished ones are skipped, an interrupted one ends as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beear import precision
from beear import sweep as module
from beear.config import Config, make_config
from beear.errors import BadInput
from beear.report import write_report
from beear.rounds import is_calm
from beear.sweep import check_same, default_values, read_values, sweep
from conftest import make_model, prompt_files, tiny_model

TRIGGER = "<b>XYZZY</b> {prompt}"


@pytest.fixture()
def config(tmp_path: Path) -> Config:
    data = prompt_files(tmp_path)
    short = {"steps": 2, "batch": 3, "response_tokens": 6}
    return make_config({"rounds": 2, "held_out": 4, "anchors": 8, "entrap": short, "harden": short, "data": data})


@pytest.fixture()
def model(tmp_path: Path) -> str:
    make_model(tmp_path / "model")
    return str(tmp_path / "model")


def test_cells_are_measured_drawn_and_skipped_when_finished(
    model: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s"
    found = sweep(model, TRIGGER, "layer", out, config, values=[1, 3], requests=4)
    assert json.loads((out / "sweep.json").read_text()) == found
    assert [cell["value"] for cell in found["cells"]] == [1, 3]
    for cell in found["cells"]:  # a random model refuses nothing, so no round removes anything
        assert cell["epoch"] is None and len(cell["rounds"]) == 2
        triggered = cell["rounds"][0]["metrics"]["asr_triggered"]
        assert triggered["n"] + triggered["unscored"] == 4
        assert ["false_refusal" in entry["metrics"] for entry in cell["rounds"]] == [False, True]
    assert found["cells"][0]["before"] == found["cells"][1]["before"]
    for folder in ("layer-01", "layer-03"):
        assert TRIGGER not in (out / folder / "config.yaml").read_text()
        assert len(list((out / folder / "checkpoints").iterdir())) == 2
    own = [(out / f / "stages/own_replies.json").read_text() for f in ("layer-01", "layer-03")]
    assert own[0] == own[1]
    write_report([out], out / "report.html")
    page = (out / "report.html").read_text()
    with pytest.raises(BadInput, match="layer-01 is a cell of the sweep"):
        write_report([out / "layer-01"], out / "report.html")
    assert "Sweep over the layer" in page and "<b>XYZZY" not in page and 'class="cross"' in page
    monkeypatch.setattr("beear.models.load_weights", None)  # nothing is loaded for what is finished
    assert sweep(model, TRIGGER, "layer", out, config, values=[1, 3], requests=4) == found
    with pytest.raises(BadInput, match="a sweep with other settings"):
        sweep(model, TRIGGER, "layer", out, config, values=[1, 3], requests=5)
    template = Path(model) / "chat_template.jinja"
    there = template.read_text()
    template.write_text("Be brief.\n" + there)
    with pytest.raises(BadInput, match="chat template and tokenizer are not those"):
        sweep(model, TRIGGER, "layer", out, config, values=[1, 2, 3], requests=4)
    template.write_text(there)
    tiny_model("llama", seed=5).save_pretrained(model)
    with pytest.raises(BadInput, match=r"weights of .* are not those"):
        sweep(model, TRIGGER, "layer", out, config, values=[1, 2, 3], requests=4)


def test_a_cell_ends_with_the_first_success(model: str, config: Config, tmp_path: Path, monkeypatch: Any) -> None:
    rates = iter([0.5, 0.2])

    def measured(self: Any, number: int) -> dict[str, Any]:
        value = next(rates)
        triggered = {"value": value, "n": 60, "unscored": 0}
        return {"metrics": {"asr_triggered": triggered, "false_refusal": {"value": 0.0}}}

    monkeypatch.setattr(module.Cell, "measured", measured)
    longer = config.model_copy(update={"rounds": 4})
    found = sweep(model, TRIGGER, "length", tmp_path / "s", longer, values=[2])
    assert found["cells"][0]["epoch"] == 2 and len(found["cells"][0]["rounds"]) == 2
    assert 'class="removed"' in (tmp_path / "s" / "sweep.svg").read_text()


def test_a_trigger_that_does_not_work_before_is_told(
    model: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "value_of", lambda metrics, name: 0.2)
    with pytest.raises(BadInput, match=r"before any cleansing the trigger unlocks .* is --trigger right\?"):
        sweep(model, TRIGGER, "length", tmp_path / "s", config, values=[2])
    with pytest.raises(BadInput, match="a sweep without a finished cell"):
        write_report([tmp_path / "s"], tmp_path / "page.html")


def test_replies_that_cannot_be_judged_are_no_success() -> None:
    found = {"asr_triggered": {"value": 0.0, "n": 1, "unscored": 59}}
    assert not module.is_removed(found)
    found["asr_triggered"] |= {"n": 30, "unscored": 30}
    assert module.is_removed(found)


def test_a_cell_does_not_settle_before_it_is_done(config: Config) -> None:
    """At the rate of the last round it would hardly train on."""
    cell = module.with_value(config.model_copy(update={"least_rounds": 1, "patience": 1}), "length", 3)
    calm = [{"residual": 0.0}] * cell.rounds
    assert not is_calm(calm, cell)


def test_an_interrupted_cell_goes_on_and_ends_the_same(
    model: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(model, TRIGGER, "layer", tmp_path / "whole", config, values=[2], requests=4)
    measured = module.Cell.measured

    def stops(self: Any, number: int) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return measured(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(module.Cell, "measured", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, TRIGGER, "layer", tmp_path / "cut", config, values=[2], requests=4)
    again = sweep(model, TRIGGER, "layer", tmp_path / "cut", config, values=[2], requests=4)
    metrics = [[r["metrics"] for r in found["cells"][0]["rounds"]] for found in (whole, again)]
    assert metrics[0] == metrics[1]
    files = [tmp_path / name / "layer-02/checkpoints/round-002/adapter.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_cell_is_run_in_other_arithmetic_or_without_room(
    model: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chart compares them."""
    out, short = tmp_path / "s", config.model_copy(update={"rounds": 1})
    sweep(model, TRIGGER, "layer", out, short, values=[1], requests=4)
    began = json.loads((out / "arithmetic.json").read_text())["arithmetic"]
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"s began with fp32 .* would go on with"):
        patch.setattr(precision, "casts_on", lambda device: "bf16 arithmetic" not in began)
        sweep(model, TRIGGER, "layer", out, short, values=[1, 2], requests=4)
    with monkeypatch.context() as patch:
        patch.setattr("beear.runs.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        sweep(model, TRIGGER, "layer", out, short, values=[1], requests=4)  # of what is finished no more is needed
        with pytest.raises(BadInput, match="free some or use another -o"):
            sweep(model, TRIGGER, "layer", out, short, values=[1, 2], requests=4)
    assert not list((out / "layer-02").glob("checkpoints"))


def test_defaults_are_spread_over_the_depth_and_leave_the_last_block_out() -> None:
    assert default_values("layer", 30) == [3, 6, 9, 12, 14, 17, 20, 23, 26, 29]
    assert default_values("layer", 4) == [1, 2, 3]
    assert default_values("length", 30)[0] == 1 and default_values("length", 30)[-1] == 12


@pytest.mark.parametrize("text", ["3,x", "1.5"])
def test_values_must_be_whole_numbers(text: str) -> None:
    with pytest.raises(BadInput, match="whole numbers"):
        read_values(text)
    assert read_values("9, 3,3") == [3, 9] and read_values(None) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not a sweep"):
        check_same(tmp_path, {})


@pytest.mark.parametrize(("axis", "value"), [("layer", 4), ("length", 0)])
def test_a_value_out_of_range_is_refused_before_a_model_loads(
    axis: Any, value: int, model: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beear.models.load_weights", None)
    with pytest.raises(BadInput):
        sweep(model, TRIGGER, axis, tmp_path / "s", config, values=[value])
    assert not (tmp_path / "s").exists()
