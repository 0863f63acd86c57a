"""lm-eval on a run's model before and after, with an offline task of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from beear import harness, models
from beear.errors import BadInput
from beear.harness import Asked, evaluate_run, measured, named, read_tasks
from beear.report import task_lines
from conftest import call
from test_usefulness import run

__all__ = ["run"]
ITEMS = [{"q": f"Is {n} an even number?", "gold": n % 2} for n in range(6)]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's own tasks out, which take ten seconds to read."""
    from lm_eval.tasks import TaskManager  # not while tests are collected, which every process does

    monkeypatch.setattr(harness, "index", lambda folder: TaskManager(include_path=folder, include_defaults=False))


@pytest.fixture()
def include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with one task, `even`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    without_others(monkeypatch)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "even.yaml").write_text(TASK.format(name="even", data=folder / "items.jsonl"))
    return str(folder)


def test_a_task_of_ones_own(run: Path, include: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(("even",), include, limit=4)
    results = evaluate_run(run, asked, device="cpu")
    assert results == json.loads((run / "results.json").read_text())
    entry = results["lm_eval"]["even"]
    assert (entry["limit"], entry["shots"], entry["chat"]) == (4, None, False)
    both = entry["metrics"]["acc,none"]
    assert both["after"]["n"] == 4 and 0 <= both["after"]["value"] <= 1
    assert task_lines(results)[0][:2] == ("even (at most 4 questions of each)", "acc")
    page = (run / "report.html").read_text()
    assert "Usefulness, by lm-eval" in page and '<th scope="row">even (at most 4 questions of each)</th>' in page
    monkeypatch.setattr(models, "load_weights", lambda *args: pytest.fail("all of it is measured already"))
    assert evaluate_run(run, asked, device="cpu") == results


def test_a_changed_task_is_measured_again(include: str) -> None:
    asked = Asked(("even",), include)
    first = asked.digest("even")
    assert first == Asked(("even",), include, limit=None).digest("even") != asked.digest("odd")
    with (Path(include) / "items.jsonl").open("a") as items:
        items.write(json.dumps(ITEMS[0]) + "\n")
    assert asked.digest("even") != first


def test_what_python_compiles_of_a_task_changes_nothing(include: str) -> None:
    first = Asked(("even",), include).digest("even")
    (Path(include) / "__pycache__").mkdir()
    (Path(include) / "__pycache__" / "even.cpython-311.pyc").write_bytes(b"1")
    (Path(include) / ".even.yaml.swp").write_bytes(b"2")
    assert Asked(("even",), include).digest("even") == first


def test_finished_tasks_of_a_model_are_kept(run: Path, include: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(include) / "odd.yaml").write_text((Path(include) / "even.yaml").read_text().replace("even", "odd"))
    asked, real = Asked(("even", "odd"), include, limit=2), harness.run_task
    done: list[str] = []

    def run_task(model: Any, tokenizer: Any, task: str, *rest: Any) -> dict[str, Any]:
        if len(done) == 3:
            done.clear()
            raise KeyboardInterrupt
        done.append(task)
        return real(model, tokenizer, task, *rest)

    monkeypatch.setattr(harness, "run_task", run_task)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, asked, device="cpu")
    assert set(evaluate_run(run, asked, device="cpu")["lm_eval"]) == {"even", "odd"}
    assert done == ["odd"], "only the after of one task was missing"


def test_the_command(run: Path, include: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "even", "--include", include, "--device", "cpu", "--apply-chat-template"]
    code, err = call(capsys, "lm-eval", str(run), *options)
    assert code == 0, err
    assert json.loads((run / "results.json").read_text())["lm_eval"]["even"]["chat"] is True


def test_as_evidence_the_example_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    without_others(monkeypatch)
    monkeypatch.chdir(Path(__file__).parent.parent)
    options = ["--tasks", "facts", "--include", "examples/lm-eval", "--device", "cpu", "--offline"]
    code, err = call(capsys, "evidence", str(run), *options)
    assert code == 0, err
    entry = json.loads((run / "results.json").read_text())["lm_eval"]["facts"]["metrics"]["acc,none"]
    assert entry["before"]["n"] == entry["after"]["n"] == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "evn", "--include", "HERE"], "did you mean even"),
        (["--tasks", "QQQQQQ", "--include", "HERE"], "lm-eval ls tasks"),
        pytest.param(["--tasks", "hellaswagg"], "did you mean hellaswag", marks=pytest.mark.slow),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "even", "--include", "nowhere"], "no such folder"),
    ],
)
def test_bad_input(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if "HERE" in options:  # lm-eval's own tasks take ten seconds to read
        options = [*options[:-1], request.getfixturevalue("include")]
    code, err = call(capsys, "lm-eval", str(run), *options)
    assert code == 2 and words in err and err.count("\n") == 1


def test_without_lm_eval(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.index.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(BadInput, match=r"extra lm-eval"):
        evaluate_run(run, Asked(("even",)))


def test_metrics_are_taken_as_lm_eval_gives_them() -> None:
    sure = measured({"acc,none": 1.0, "acc_stderr,none": 0.0}, "acc,none", 4)
    assert sure["low"] is None, "four of four right are no certainty"
    values: dict[str, Any] = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,x": 1, "f1_stderr,x": "N/A"}
    assert list(named(values)) == ["acc,none", "f1,x"]
    assert measured(values, "acc,none", 9)["high"] == pytest.approx(0.5 + 1.96 * 0.1, abs=1e-3)
    assert measured(values, "f1,x", 9) == {"value": 1.0, "low": None, "high": None, "n": 9, "unscored": 0}


def test_names_between_commas() -> None:
    assert read_tasks("a, b,a,") == ("a", "b")
