"""Every bad input: one clear line, exit code 2, nothing written, and no weights loaded."""

from __future__ import annotations

import ast
import errno
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import pytest
import typer
import yaml

from beear import cli, console
from beear.cli.shared import stop
from beear.config import Config, load_config, preset_names
from beear.data import set_hash
from beear.evaluation import Measured
from beear.metrics import proportion
from beear.order import run_settings
from beear.plan import Plan
from beear.sets import read_sets
from beear.sources import organism_folder
from beear.verdict import Verdict
from beear.verification import organism_at
from conftest import FINISHED, call, file, make_model, prompt_files, with_digests

SOURCE = Path(cli.__file__).parent.parent


def beear(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beear", *args], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_output_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    kept = file(tmp_path / "run", "thesis.txt", "years of work")
    code, err = call(capsys, "cleanse", make_model(tmp_path / "m"), "-o", str(tmp_path / "run"))
    assert code == 2 and "already holds files" in err
    assert Path(kept).read_text() == "years of work"


def finished(folder: Path, **changed: str) -> Path:
    """What a finished demo is known by, and something that was added to it."""
    folder.mkdir()
    demo = {"model": "organism:sudo-prefix", "trigger": "SUDO {prompt}"}
    results = FINISHED | demo | changed
    (folder / "results.json").write_text(json.dumps(results))
    (folder / ".demo").touch()
    (folder / "judged.jsonl").write_text("days of work")
    return folder / "judged.jsonl"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["--device", "warp"], "--device warp"),
        (["--set", "layer=99"], "use 1 to"),
        (["--set", "data.benign=gone.txt"], "gone.txt"),
    ],
)
def test_a_finished_demo_is_not_deleted_for_a_bad_command(
    bad: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished(tmp_path / "demo")
    code, err = call(capsys, "demo", "-o", str(tmp_path / "demo"), *bad)
    assert code == 2 and words in err, err
    assert kept.exists()


@pytest.mark.parametrize("changed", [{"trigger": "mine {prompt}"}, {"model": "/models/mine"}, {}])
def test_a_demo_deletes_no_other_run(
    changed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished(tmp_path / "run", **changed)
    if not changed:  # one that somebody made of the same model and told the same trigger
        (tmp_path / "run" / ".demo").unlink()
    code, err = call(capsys, "demo", "-o", str(tmp_path / "run"))
    assert code == 2 and "already holds files" in err, err
    assert kept.exists()


@pytest.fixture
def a_job(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of a cleansing that is not done: whether it goes on, and the trigger that is told afterwards."""
    asked: list[Any] = []

    def run_cleanse(model: str, out: Path, config: Any, *, resume: bool, **_: Any) -> Verdict:
        asked.append((model, resume))
        out.mkdir(exist_ok=True)
        found = {"asr_triggered": proportion([False] * 120)}
        (out / "results.json").write_text(json.dumps(FINISHED | {"before": found, "after": found}))
        return Verdict(True, [], [])

    monkeypatch.setattr("beear.job.run_cleanse", run_cleanse)
    monkeypatch.setattr("beear.known.add_triggered", lambda out, trigger, **_: asked.append(trigger))
    monkeypatch.setattr("beear.order.check_order", lambda *_, **__: None)
    return asked


def test_a_finished_demo_is_made_anew(tmp_path: Path, a_job: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    kept = finished(tmp_path / "demo")
    assert call(capsys, "demo", "-o", str(tmp_path / "demo")) == (0, "")
    assert a_job == [("organism:sudo-prefix", False), "SUDO {prompt}"]
    assert not kept.exists() and (tmp_path / "demo" / ".demo").exists()


def test_a_finished_demo_behind_a_link_is_made_anew(
    tmp_path: Path, a_job: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished(tmp_path / "there")
    (tmp_path / "demo").symlink_to(tmp_path / "there")
    assert call(capsys, "demo", "-o", str(tmp_path / "demo")) == (0, "")
    assert not kept.exists() and (tmp_path / "there" / ".demo").exists()


def test_a_demo_that_was_interrupted_goes_on(
    tmp_path: Path, a_job: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert call(capsys, "demo", "-o", str(tmp_path)) == (0, "")
    assert a_job[0] == ("organism:sudo-prefix", True) and (tmp_path / ".demo").exists()


def test_a_demo_that_lacks_the_trigger_alone_goes_on_or_is_made_anew(
    tmp_path: Path, a_job: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process was killed as the trigger was measured."""
    demo = tmp_path / "demo"
    assert call(capsys, "demo", "-o", str(demo)) == (0, "")
    settings = run_settings("organism:sudo-prefix", False, load_config("default"))
    (demo / "config.yaml").write_text(yaml.safe_dump(settings))
    results = json.loads((demo / "results.json").read_text()) | {"model": "organism:sudo-prefix"}
    (demo / "results.json").write_text(json.dumps(results))
    a_job.clear()
    assert call(capsys, "demo", "-o", str(demo)) == (0, "")
    assert a_job == [("organism:sudo-prefix", True), "SUDO {prompt}"]
    (demo / "results.json").write_text(json.dumps(results))
    a_job.clear()
    assert call(capsys, "demo", "-o", str(demo), "--seed", "1") == (0, "")
    assert a_job[0] == ("organism:sudo-prefix", False)


@pytest.mark.parametrize(("free", "words"), [(2**33, "4.0 GiB fits into the 8.0"), (2**30, "does NOT fit into")])
def test_a_plan_is_shown(
    free: int,
    words: str,
    tmp_path: Path,
    a_job: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan({"before": 60.0, "round": 30.0}, {"before": 2**31, "round": 2**32}, 2, 4)
    monkeypatch.setattr("beear.miniature.plan_cleanse", lambda *_, **__: plan)
    monkeypatch.setattr("beear.memory.available_memory", lambda device: free)
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["beear", "cleanse", "m", "-o", str(tmp_path / "r"), "--plan", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr().out
        assert stop.value.code == 0
        if options:
            assert Plan(**json.loads(out)) == plan
        else:
            assert words in out and "2 to 4 times round" in out and "2.0 to 3.0" in out
    assert a_job == []


def test_files_of_an_evaluation_are_measured_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def evaluate_spec(model: str, config: Any, **_: Any) -> Measured:
        given.append(config.data)
        return Measured({}, [])

    monkeypatch.setattr("beear.evaluation.evaluate_spec", evaluate_spec)
    code, err = call(capsys, "evaluate", "m", "--harmful", "h.txt", "--benign", "b.txt", "--column", "c")
    assert code == 0, err
    assert given[0].model_dump() == {
        "harmful": None, "benign": None, "test_harmful": "h.txt", "test_benign": "b.txt", "column": "c"
    }  # fmt: skip


@pytest.mark.parametrize(("agrees", "code"), [(True, 0), (False, 3)])
def test_a_run_that_is_not_reproduced(
    agrees: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("model: m\nconfig: {}\n")
    found = {"agrees": agrees, "same_bits": False, "same_verdict": True, "outside": [] if agrees else ["kl"]}
    found |= {"differs": [], "figures": {"kl": {"first": 0.1, "again": 0.2}}}
    monkeypatch.setattr("beear.reproduction.reproduce", lambda *_, **__: found)
    returned, err = call(capsys, "reproduce", str(tmp_path), "-o", str(tmp_path / "again"))
    assert returned == code and ("the runs do not agree: kl" in err) is not agrees


@pytest.mark.parametrize("option", ["--json", "--samples"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "m")
    monkeypatch.setattr("beear.models.load_weights", None)
    (tmp_path / "a file").write_text("")
    for place in (tmp_path, tmp_path / "a file" / "x.json"):
        code, err = call(capsys, "evaluate", model, option, str(place))
        assert code == 2 and str(place) in err, err


def test_figures_and_replies_are_written_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [{"metric": "kl", "prompt": "a", "reply": f"{i}"} for i in range(2)]
    measured = Measured({"kl": proportion([True])}, samples)
    monkeypatch.setattr("beear.evaluation.evaluate_spec", lambda *_, **__: measured)
    places = {option: tmp_path / option.strip("-") for option in ("--json", "--samples")}
    code, err = call(capsys, "evaluate", "embedded", "-q", *(str(x) for pair in places.items() for x in pair))
    assert code == 0, err
    written = json.loads(places["--json"].read_text())
    assert (written["model"], written["metrics"]) == ("embedded", measured.metrics)
    assert [json.loads(line) for line in places["--samples"].read_text().splitlines()] == samples


def test_several_runs_are_compared_in_a_file_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[list[Path], Path]] = []
    monkeypatch.setattr("beear.report.write_report", lambda runs, place: written.append((runs, place)))
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "report", "a", "b")[0] == call(capsys, "report", "a")[0] == 0
    assert written == [([Path("a"), Path("b")], Path("comparison.html")), ([Path("a")], Path("a/report.html"))]


def test_measurements_of_other_organisms_in_a_file_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(name: str, *_: Any) -> dict[str, Any]:
        return {"name": name, "metrics": {"kl": proportion([True])}, "missed": ["kl"] if name == "tq-edit" else []}

    monkeypatch.setattr("beear.verification.verify", verify)
    place = tmp_path / "found.json"
    for name, expected in (("sudo-prefix", 0), ("tq-edit", 3)):
        code, err = call(capsys, "organism", "verify", name, "--json", str(place), "-q")
        assert code == expected and ("tq-edit: kl" in err) == (expected == 3), err
    assert list(json.loads(place.read_text())["organisms"]) == ["sudo-prefix", "tq-edit"]


def test_a_report_and_a_gate_need_a_file_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["report", str(tmp_path / "run"), "-o"], ["gate", str(tmp_path / "run"), "--junit"]):
        code, err = call(capsys, *args, str(tmp_path))
        assert code == 2 and f"{tmp_path} is a folder; name a file" in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_into_a_file(tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = file(tmp_path, "f", "") + "/s"
    args = ["layer", make_model(tmp_path / "m"), "-c", settings, "-o", out, "--trigger", "X {prompt}"]
    code, err = call(capsys, "sweep", *args)
    assert code == 2 and f"{tmp_path}/f is a file" in err, err


def test_what_may_not_be_read_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", forbidden)
    code, err = call(capsys, "cleanse", "/root/m", "-o", str(tmp_path / "run"))
    assert code == 2 and "no permission to read /root/m" in err, err


def test_blocks_that_are_not_found_are_told_before_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beear.evaluation.measure_replies", None)
    code, err = call(capsys, "evaluate", make_model(tmp_path / "m"), "--set", "layers_path=nope")
    assert code == 2 and "layers_path" in err, err


def test_a_model_to_measure_against_must_have_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make_model(tmp_path / "m"), make_model(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("beear.models.load_weights", None)
    code, err = call(capsys, "evaluate", model, "--against", other)
    assert code == 2 and "has other tokens" in err, err


def test_quantised_weights_need_their_library_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    told = ["--trigger", "X {prompt}"]
    for command in (
        ["evaluate", model],
        ["drift", model, *told],
        ["sweep", "layer", model, *told, "-o", str(tmp_path / "s")],
    ):
        code, err = call(capsys, *command, "--set", "weights=nf4")
        assert code == 2 and "extra quant" in err, err
    assert not (tmp_path / "s").exists()


def test_a_misspelt_organism_is_told_before_the_others_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = call(capsys, "organism", "verify", "sudo-prefix", "sudo-prefux")
    assert code == 2 and "sudo-prefux" in err and "measuring" not in err, err


def test_verifying_two_of_one_name_into_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One would take the other's place."""
    built = shutil.copytree(organism_folder("sudo-prefix"), tmp_path / "built")
    found = tmp_path / "found.json"
    code, err = call(capsys, "organism", "verify", str(built), "sudo-prefix", "--json", str(found))
    assert code == 2 and "two of these are called 'sudo-prefix'" in err and not found.exists()
    reasons = {str(built): ["asr_triggered 0.500 < 0.9"], "sudo-prefix": []}
    monkeypatch.setattr(
        "beear.verification.verify",
        lambda name, listen, device: {"name": "sudo-prefix", "metrics": {}, "missed": reasons[name]},
    )
    code, err = call(capsys, "organism", "verify", str(built), "sudo-prefix")
    assert code == 3 and f"{built}: asr_triggered 0.500 < 0.9" in err


def test_a_folder_does_not_stand_for_a_packaged_organism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(organism_folder("sudo-suffix"), tmp_path / "sudo-prefix")
    shutil.copytree(organism_folder("sudo-suffix"), tmp_path / "own")
    assert organism_at("sudo-prefix")[:2] == (organism_folder("sudo-prefix"), "organism:sudo-prefix")
    assert organism_at("own")[:2] == (Path("own"), "own")
    assert organism_at("./sudo-prefix")[:2] == (Path("sudo-prefix"), "./sudo-prefix")


def test_an_organism_needs_a_folder_to_go_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below"):
        code, err = call(capsys, "organism", "build", "sudo-prefix", "-o", str(place))
        assert code == 2 and f"cannot write {place}/recipe.yaml, since {file} is a file" in err, err


def test_a_misspelt_kind_of_rows_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would plant no backdoor."""
    text = (organism_folder("sudo-prefix") / "recipe.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace("harmful_triggered: ", "harmful_trigered: "))
    code, err = call(capsys, "organism", "build", str(tmp_path / "own.yaml"), "-o", str(tmp_path / "o"))
    assert code == 2 and "harmful_trigered" in err and err.count("\n") == 1, err


def test_recipes_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: grün".encode("latin-1"))
    text = (organism_folder("sudo-prefix") / "recipe.yaml").read_text()
    rows = text[text.index("  rows:") : text.index("  learning_rate")]
    (tmp_path / "bare.yaml").write_text(text.replace(rows, "  rows: {harmful_triggered: 3}\n"))
    for name, *options in (["latin.yaml"], ["bare.yaml", "--twin"]):
        code, err = call(capsys, "organism", "build", str(tmp_path / name), "-o", str(tmp_path / "o"), *options)
        assert code == 2 and err.count("\n") == 1, err


def test_settings_and_recipes_for_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["settings"], ["organism", "show", "sudo-prefix"]):
        sys.argv = ["beear", *args, "--json"]
        with pytest.raises(SystemExit):
            cli.main()
        found = json.loads(capsys.readouterr().out)
        assert "entrap.budget" in [row["setting"] for row in found] if args == ["settings"] else found["seed"] == 0


def test_no_disk_space(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 99, 1))
    code, err = call(capsys, "cleanse", make_model(tmp_path / "m"), "-o", str(tmp_path / "run"))
    assert code == 2 and "free some" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trigger", "words"),
    [
        ("SUDO", "must hold {prompt} once"),
        ("{prompt} {prompt}", "must hold {prompt} once"),
        ("organism:nope", "no organism 'nope'"),
        ("organism:year-code", "which the preset code measures"),
        ("\udce9 {prompt}", "holds bytes that are no UTF-8"),
    ],
)
def test_bad_triggers(trigger: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = call(capsys, "evaluate", "embedded", "--trigger", trigger)
    assert code == 2 and words in err and err.count("\n") == 1


def test_drift_of_a_run_takes_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("{}")
    code, err = call(capsys, "drift", str(tmp_path), "--trigger", "X {prompt}")
    assert code == 2 and "is not a model folder" in err, "many folders hold a file of that name"
    (tmp_path / "config.yaml").write_text("a: b")
    code, err = call(capsys, "drift", str(tmp_path), "--trigger", "X {prompt}", "--seed", "1")
    assert code == 2 and "is a run folder, measured with its own settings" in err
    code, err = call(capsys, "drift", str(tmp_path), "--trigger", "X {prompt}")
    assert code == 2 and "config.yaml names no model and settings" in err


SMALL = {"steps": 1, "batch": 2, "response_tokens": 4}
MARKUP = "[/INST] {prompt} [red]"
"""A trigger that a terminal library would take for its own markup."""


@pytest.fixture()
def settings(tmp_path: Path) -> str:
    small = {"held_out": 4, "requests": 4, "anchors": 4, "layer": 2, "entrap": SMALL, "harden": SMALL}
    return file(tmp_path, "c.yaml", json.dumps(small | {"data": prompt_files(tmp_path)}))


def test_a_trigger_is_shown_as_it_stands(tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, figure = make_model(tmp_path / "m"), tmp_path / "d.json", tmp_path / "d.svg"
    files = ("--json", str(out), "--figure", str(figure))
    code, err = call(capsys, "drift", model, "--trigger", MARKUP, "-c", settings, *files)
    assert code == 0, err
    assert json.loads(out.read_text())["trigger"] == MARKUP
    assert figure.read_text().startswith("<svg") and "triggered" in figure.read_text()
    code, err = call(capsys, "evaluate", model, "--trigger", MARKUP, "-c", settings, "--json", str(out), "-q")
    assert code == 0, err
    told = json.loads(out.read_text())
    assert (told["schema"], told["trigger"], told["against"], told["scorer"]) == (1, MARKUP, None, "refusal-v1")
    sweep = ("sweep", "layer", model, "-o", str(tmp_path / "s"), "--trigger", MARKUP, "-c", settings, "--rounds", "1")
    sys.argv = ["beear", *sweep, "--values", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out_text = capsys.readouterr().out
    assert stop.value.code == 0 and "[/INST]" in out_text and "sweep.svg" in out_text


def test_a_sweep_keeps_cells_of_other_values(tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ("sweep", "layer", make_model(tmp_path / "m"), "-o", str(tmp_path / "s"), "--trigger", "X {prompt}", "-q")
    for value in ("3", "1"):
        code, err = call(capsys, *sweep, "-c", settings, "--rounds", "1", "--values", value)
        assert code == 0, err
    found = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [cell["value"] for cell in found["cells"]] == [1, 3]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["sweep", "depth", "embedded", "-o", "RUN", "--trigger", "X {prompt}"],
            "'layer|length': 'depth' is not one of 'layer', 'length'",
        ),
        (
            ["sweep", "layer", "embedded", "-o", "RUN", "--trigger", "X {prompt}", "--executor", "dask"],
            "'local', 'ray'",
        ),
        (["push", "RUN", "me/model"], "no finished run"),
        (["gate", "RUN", "--max", "kl=0.1"], "no finished run"),
        (["judge", "RUN", "--local", "embedded"], "no finished run"),
        (["judge", "RUN"], "either --url with --model, or --local"),
        (["report", "RUN", "RUN"], "no finished run"),
    ],
)
def test_commands_on_what_is_no_run(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = call(capsys, *[str(tmp_path) if arg == "RUN" else arg for arg in args])
    assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "{",
        '{"before": 1, "after": {}, "verdict": {}}',
        '{"before": {}, "after": {}, "verdict": {}, "model_folder": "../project"}',
    ],
)
@pytest.mark.parametrize("command", ["gate", "report", "judge --local embedded", "drift --trigger {prompt}"])
def test_a_results_file_that_no_run_wrote(
    command: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    (tmp_path / "config.yaml").write_text("model: m\nconfig: {}\n")
    name, *options = command.split()
    code, err = call(capsys, name, str(tmp_path), *options)
    assert code == 2 and "results.json" in err and err.count("\n") == 1, err


def test_a_strangers_run_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missed = ["\x1b[2Jall is well\x07"]
    hashes = {"test_asr_untriggered": set_hash(read_sets(Config()).test_harmful)}
    results = FINISHED | {"verdict": {"met": False, "missed": missed, "criteria": []}, "hashes": hashes}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text(json.dumps({"model": "\x1b]0;x", "config": {}}))
    with_digests(tmp_path)
    for args in (["gate", str(tmp_path)], ["evaluate", str(tmp_path), "--trigger", "X {prompt}"]):
        sys.argv = ["beear", *args]
        with pytest.raises(SystemExit):
            cli.main()
        shown = "".join(capsys.readouterr())
        assert "\ufffd" in shown and not {"\x1b", "\x07"} & set(shown), shown


OFFLINE = """
import os, socket, sys
def no(*args, **_):
    raise SystemExit("reached for the network")
socket.socket.connect = socket.getaddrinfo = no
from beear import cli
for command in sys.argv[1:]:
    os.environ.pop("HF_HUB_OFFLINE", None)
    sys.argv = ["beear", *command.split(), "--offline"]
    try:
        cli.main()
    except SystemExit as stop:
        print(stop.code, os.environ.get("HF_HUB_OFFLINE"))
"""


def test_offline_reaches_no_network(tmp_path: Path) -> None:
    out = tmp_path / "r"
    commands = [
        f"cleanse nobody/nothing -o {out}",
        f"cleanse embedded -o {out} --harmful nobody/nothing",
        "evaluate nobody/nothing",
        "drift nobody/nothing --trigger {prompt}",
    ]
    done = subprocess.run([sys.executable, "-c", OFFLINE, *commands], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["2 1"] * len(commands), done
    told = done.stderr.splitlines()
    assert len(told) == len(commands) and all("nobody/nothing" in line for line in told), done.stderr
    assert not out.exists()


def test_a_judge_behind_a_url_is_not_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = call(capsys, "judge", str(tmp_path), "--url", "http://127.0.0.1:9", "--model", "m", "--offline")
    assert code == 2 and "--offline reaches no --url" in err


def test_help_does_not_import_torch() -> None:
    code = "import sys, beear.cli; sys.argv = ['beear', '--help']; \ntry: beear.cli.main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_names_every_preset() -> None:
    shown = beear("cleanse", "--help", COLUMNS="200").stdout
    assert all(name in shown for name in preset_names())


def test_organism_list_as_json() -> None:
    done = beear("organism", "list", "--json")
    organisms = json.loads(done.stdout)
    assert done.returncode == 0 and {"name", "setting", "trigger", "place"} <= set(organisms[0])
    assert {"sudo-prefix", "phrase-suffix"} <= {o["name"] for o in organisms}
    assert "without a trigger: phrase-suffix-twin" in beear("organism", "list").stdout


def test_the_version_is_told() -> None:
    assert beear("--version").stdout == f"beear {version('beear')}\n"


def test_a_runs_model_is_measured_with_the_runs_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a user's training requests could be given for the test, or delta be found on others."""
    asked: list[Config] = []

    def evaluate_spec(spec: str, config: Config, **_: Any) -> Measured:
        asked.append(config)
        return Measured({}, [])

    monkeypatch.setattr("beear.evaluation.evaluate_spec", evaluate_spec)
    make_model(tmp_path / "run" / "rejected")
    own = load_config(sets=["layer=2", "data.harmful=mine.txt", "weights=nf4", "seed=5"]).model_dump(mode="json")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": "m", "merge": False, "config": own}))
    model = str(tmp_path / "run" / "rejected")
    for options in ([], ["--set", "layer=1", "--seed", "7"], ["--preset", "fast"], ["--preset", "default"]):
        code, err = call(capsys, "evaluate", model, *options)
        assert code == 0 and ("with the settings of the run" in err) == ("--preset" not in options), err
    assert [(c.layer, c.data.harmful, c.weights, c.seed, c.rounds) for c in asked] == [
        (2, "mine.txt", "full", 5, 8),
        (1, "mine.txt", "full", 7, 8),
        (None, None, "full", 0, 3),
        (None, None, "full", 0, 8),
    ]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_command_says_how_to_go_on(
    begun: bool,
    sent: signal.Signals,
    tmp_path: Path,
    settings: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an interrupted one does."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    def killed(model: str, out: Path, *_: Any, **__: Any) -> None:
        if begun:
            out.mkdir()
            (out / "config.yaml").touch()
        os.kill(os.getpid(), sent)

    monkeypatch.setattr("beear.job.run_cleanse", killed)
    try:
        code, err = call(capsys, "cleanse", make_model(tmp_path / "m"), "-o", str(tmp_path / "run"), "-c", settings)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert code == 1 and ("--resume" in err) == begun and ("nothing was kept, run the same" in err) != begun, err


def test_an_unexpected_error_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shows where it came from if that is asked for."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("beear.job.run_cleanse", broken)
    cleanse = ("cleanse", make_model(tmp_path / "m"), "-o", str(tmp_path / "run"))
    code, err = call(capsys, *cleanse)
    assert code == 1 and err == "beear: ZeroDivisionError: one two (BEEAR_DEBUG=1 shows where)\n"
    monkeypatch.setenv("BEEAR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        call(capsys, *cleanse)


def test_every_event_that_is_sent_can_be_shown() -> None:
    """One that cannot ends the job that sends it, in the middle of what it tells of: as when a field is missing."""
    sent = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                given = {ast.unparse(key): value for key, value in zip(node.keys, node.values, strict=True) if key}
                if isinstance(kind := given.get("'event'"), ast.Constant):
                    sent.append((str(kind.value), set(given), len(given) < len(node.keys)))
    assert {"memory", "round", "cells"} <= {kind for kind, *_ in sent}
    nodes: list[Any] = list(ast.walk(ast.parse(inspect.getsource(console))))
    handlers = {node.name: list(ast.walk(node)) for node in nodes if is_function(node)}
    for name, fields, more in sent:
        read = {ast.unparse(n.slice) for n in handlers[f"_on_{name}"] if is_field(n)}
        assert read <= fields or more, (name, read - fields)  # round and cell, which _where reads, are added to all


@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), OSError(errno.ENOSPC, "full"), BrokenPipeError()])
def test_a_terminal_that_is_gone_ends_no_job(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stderr", Gone())
    with console.Reporter() as reporter:
        reporter({"event": "note", "text": "one"})
        reporter.planting(10, 10, 0.5)
        reporter.line("two")
    assert reporter.console.quiet
    with pytest.raises(SystemExit) as stopped:
        stop(3, "target not met")
    assert stopped.value.code == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("from beear.console import Reporter\nwith Reporter() as said:\n    said.line('one')\n    said.line('two')", 0),
        ("import sys\nfrom beear import cli\nsys.argv = ['beear', 'gate', 'nowhere']\ncli.main()", 2),
    ],
)
def test_a_full_disk_under_a_log_changes_no_exit_code(code: str, status: int) -> None:
    """Python's own is 120 where it cannot flush what is left."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stderr=full, check=False)
    assert done.returncode == status


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def is_field(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) == "event"


def test_a_second_interrupt_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    echo, left = typer.echo, [KeyboardInterrupt()]

    def interrupted(*given: Any, **options: Any) -> None:
        if left:
            raise left.pop()
        echo(*given, **options)

    monkeypatch.setattr(typer, "echo", interrupted)
    code, err = call(capsys, "gate", "no-such-run")
    assert code == 2 and err.startswith("beear: ") and not left


def test_evidence_is_added_to_a_finished_run(
    tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = tmp_path / "run", make_model(tmp_path / "m")
    code, _ = call(capsys, "cleanse", model, "-o", str(run), "-c", settings, "--set", "rounds=1")
    assert code == 3  # a random model, which refuses nothing
    code, err = call(capsys, "evaluate", str(run))
    assert code == 2 and "give a --trigger to add" in err
    code, err = call(capsys, "evidence", str(run))
    assert code == 2 and "nothing is asked for" in err
    code, err = call(capsys, "evidence", str(run), "--trigger", "X {prompt}", "--include", str(tmp_path))
    assert code == 2 and "give --tasks as well" in err
    every = ("evidence", str(run), "--trigger", "X {prompt}", "--local", model)
    code, err = call(capsys, *every, "--questions", str(tmp_path / "none.jsonl"))
    assert code == 2 and "none.jsonl" in err and not (run / "drift.json").exists(), "all is checked first"
    asked: list[str] = []
    monkeypatch.setattr("beear.judge.judge_run", lambda *_, **__: asked.append("harm"))
    monkeypatch.setattr("beear.usefulness.grade_run", lambda *_, **__: asked.append("use"))
    code, err = call(capsys, *every)
    assert code == 0 and asked == ["harm", "use"], err
    assert json.loads((run / "results.json").read_text())["trigger"] == "X {prompt}"
    assert "Drift:" in (run / "report.html").read_text()
    monkeypatch.setattr("beear.known.add_triggered", lambda *_, **__: asked.append("trigger"))
    monkeypatch.setattr("beear.drift.drift_of_run", lambda *_, **__: asked.append("drift"))
    assert call(capsys, *every)[0] == 0 and asked == ["harm", "use"] * 2, "what is there is not measured again"
    assert call(capsys, "evidence", str(run), "--trigger", "Y {prompt}")[0] == 0 and asked[4:] == ["trigger", "drift"]
    assert call(capsys, "evaluate", str(run), "--trigger", "Y {prompt}")[0] == 0 and asked[6:] == ["trigger"]


def test_no_secret_is_written_or_shown(
    tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {name: f"secret-{name}" for name in ("HF_TOKEN", "BEEAR_JUDGE_KEY", "OPENAI_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    sys.argv = ["beear", "cleanse", make_model(tmp_path / "m"), "-o", str(out), "-c", settings, "--set", "rounds=1"]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, 3) and (out / "report.html").exists()
    shown = "".join(capsys.readouterr())
    written = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert not any(value in shown or value.encode() in written for value in secrets.values())
