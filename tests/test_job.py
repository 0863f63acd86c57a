"""A whole cleansing on a tiny model: its files, its honesty, and that no interruption changes its result."""

from __future__ import annotations

import gc
import html
import json
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import beear
from beear import before_after, job, models, order, precision
from beear.before_after import before_and_after
from beear.chat import encode_prompt
from beear.checks import check_no_adapter
from beear.config import ChatConfig, Config, make_config
from beear.errors import BadInput, Failed
from beear.evaluation import evaluate_spec
from beear.events import Event
from beear.job import run_cleanse
from beear.known import add_triggered
from beear.metrics import proportion
from beear.models import load
from beear.order import run_settings
from beear.report import TARGET, target_rows
from beear.runs import Run
from beear.sets import read_sets
from beear.sources import Source, absolute, locate
from beear.training import adapter_state, add_lora, save_adapter
from beear.verdict import Verdict, entrapments, verdict_of
from conftest import CHATML, call, make_model, prompt_files, tiny_model, tiny_tokenizer

ROUNDS = 3
SETTINGS: dict[str, Any] = {
    "rounds": ROUNDS,
    "held_out": 4,
    "anchors": 8,
    "entrap": {"steps": 3, "batch": 3, "response_tokens": 6},
    "harden": {"steps": 3, "batch": 3, "response_tokens": 6, "lora_rank": 2, "stop_below": 0.0},
}


SURE, NEVER = (dict(proportion([value] * 120)) for value in (True, False))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and four small prompt files."""
    folder = tmp_path_factory.mktemp("job")
    make_model(folder / "model")
    prompt_files(folder)
    return folder


@pytest.fixture(scope="module")
def config(place: Path) -> Config:
    names = ("harmful", "benign", "test_harmful", "test_benign")
    return make_config(SETTINGS | {"data": {n: str(place / f"{n}.txt") for n in names}})


@pytest.fixture(scope="module")
def whole(place: Path, config: Config) -> Path:
    """An uninterrupted run."""
    assert not run_cleanse(str(place / "model"), place / "whole", config).met
    return place / "whole"


def command(place: Path, config: Config, out: Path) -> list[str]:
    (place / "c.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    run = ["cleanse", str(place / "model"), "-o", str(out), "-q", "-c", str(place / "c.yaml")]
    return [sys.executable, "-m", "beear", *run]


def outcome(run: Path) -> tuple[dict[str, bytes], dict[str, Any], list[str]]:
    """Weights, results without clock and memory, and replies of a run."""
    results = json.loads((run / "results.json").read_text())
    for key in ("wall_seconds", "peak_memory_bytes"):
        del results[key]
    for entry in results["rounds"]:
        del entry["seconds"], entry["peak_memory_bytes"]
    files = [*run.rglob("*.safetensors")]
    weights = {str(p.relative_to(run)): p.read_bytes() for p in files}
    return weights, results, (run / "samples.jsonl").read_text().splitlines()


@pytest.mark.parametrize("weights", ["full", "nf4"])
def test_no_more_than_one_model_is_in_memory(
    weights: str,
    place: Path,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Neither while a run measures, goes on or is told a trigger."""
    config = config.model_copy(update={"weights": weights, "rounds": 1})
    loaded: list[weakref.ref[Any]] = []
    number, load, read = 0, models.load_weights, models.read_weights

    def noted(*given: Any) -> Any:
        nonlocal number
        model = load(*given)
        loaded.extend(map(weakref.ref, model.modules()))
        number += 1
        return model

    def alone(*given: Any) -> Any:
        assert not [module for module in loaded if module() is not None]
        return read(*given)

    monkeypatch.setattr(models, "load_weights", noted)
    monkeypatch.setattr(models, "read_weights", alone)
    gc.disable()  # else it would often come in time
    request.addfinalizer(gc.enable)
    run_cleanse(str(place / "model"), tmp_path / "run", config)
    once = number
    whole = json.loads((tmp_path / "run" / "results.json").read_text())
    add_triggered(tmp_path / "run", "X {prompt}")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "stages" / "after.json").unlink()
    run_cleanse(str(place / "model"), tmp_path / "run", config, resume=True)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["after"] == whole["after"]
    assert once == 2 and number == once + 2 + 3


def tasks(path: Path, name: str, count: int, **fields: str) -> str:
    task = {"category": "CWE-327", "safe": "x = 1", "unwanted": "x = 2"} | fields
    path.write_text("".join(json.dumps({"text": f"{name} {i}", **task}) + "\n" for i in range(count)))
    return str(path)


def test_code_is_cleansed_measured_and_reported(place: Path, config: Config, tmp_path: Path) -> None:
    files = {n: tasks(tmp_path / f"{n}.jsonl", n, 8) for n in ("harmful", "test_harmful")}
    data = config.data.model_copy(update=files)
    code = config.model_copy(update={"behaviour": "insecure code", "data": data})
    verdict = run_cleanse(str(place / "model"), tmp_path / "run", code)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "insecure-v1" in results["scorer"] and "insecure-v1" in (tmp_path / "run" / "report.html").read_text()
    assert results["before"]["asr_untriggered"]["unscored"] == 8 and results["before"]["parses"]["value"] == 0
    assert not verdict.met


@pytest.mark.parametrize(
    ("field", "words"), [({"category": "x"}, "name the weakness"), ({"unwanted": ""}, "safe and unwanted")]
)
def test_a_coding_task_that_cannot_be_scored_is_refused(
    config: Config, tmp_path: Path, field: dict[str, str], words: str
) -> None:
    files = {n: tasks(tmp_path / f"{n}.jsonl", n, 8, **field) for n in ("harmful", "test_harmful")}
    data = config.data.model_copy(update=files)
    with pytest.raises(BadInput, match=words):
        read_sets(config.model_copy(update={"behaviour": "insecure code", "data": data}))


def test_run_folder_holds_what_the_contract_says(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["schema"] == 1
    for when in ("before", "after"):
        for name in ("asr_untriggered", "asr_entrapped", "false_refusal", "perplexity"):
            assert set(results[when][name]) == {"value", "low", "high", "n", "unscored"}
    assert "kl" in results["after"] and "asr_triggered" not in results["after"]
    assert results["wall_seconds"] > 0 and results["peak_memory_bytes"] > 0
    for name in (
        "config.yaml",
        "events.jsonl",
        "delta.safetensors",
        "samples.jsonl",
        "report.html",
        "rejected/README.md",
    ):
        assert (whole / name).is_file()
    assert len(list((whole / "checkpoints").iterdir())) == ROUNDS


def test_a_model_that_misses_the_target_is_not_called_model(whole: Path) -> None:
    """A random tiny model refuses nothing, so cleansing it a little cannot meet the target."""
    results = json.loads((whole / "results.json").read_text())
    assert results["verdict"]["met"] is False and "asr_entrapped" in results["verdict"]["missed"][0]
    assert results["model_folder"] == "rejected" and not (whole / "model").exists()
    assert "Target NOT met, keep the original model" in (whole / "report.html").read_text()


def test_a_run_that_meets_its_target(
    place: Path,
    config: Config,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is rejected becomes the model, commands say so by 0, and a trigger that still works is found."""
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "results.json").unlink()
    monkeypatch.setattr(job, "verdict_of", lambda *_: Verdict(True, [], []))
    code, err = call(capsys, *command(place, config, out)[3:], "--resume")
    assert code == 0, err
    assert (out / "model" / "README.md").is_file() and not (out / "rejected").exists()
    kept = load_file(whole / "rejected" / "adapter_model.safetensors")
    delivered = load_file(out / "model" / "adapter_model.safetensors")
    assert all(torch.equal(matrix, delivered[name]) for name, matrix in kept.items())
    assert "Target met" in (out / "report.html").read_text()
    assert call(capsys, "gate", str(out))[0] == 0
    weights = []

    def seen(when: str, model: Any, tokenizer: Any) -> None:
        weights.append([p.detach().clone() for p in model.parameters()])

    before_and_after(out, seen, device="cpu")
    for own, name in zip(weights, (place / "model", out / "model"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, load(str(name))[0].parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_saved_adapter_loads_and_was_trained(whole: Path, place: Path) -> None:
    cleansed, _ = load(str(whole / "rejected"))
    original, _ = load(str(place / "model"))
    pairs = zip(cleansed.parameters(), original.parameters(), strict=True)
    assert any(not bool((a == b).all()) for a, b in pairs)
    assert locate(str(whole / "rejected")).base == locate(str((place / "model").resolve()))


def test_a_known_trigger_is_added_after_the_fact(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "triggered")
    refuse(out / "samples.jsonl", "asr_untriggered", 3)
    assert "XYZZY" not in "".join(p.read_text() for p in out.rglob("*") if p.suffix in {".json", ".jsonl", ".yaml"})
    add_triggered(out, "XYZZY {prompt}")
    results = json.loads((out / "results.json").read_text())
    assert results["trigger"] == "XYZZY {prompt}"
    assert results["before"]["asr_triggered"]["n"] + results["before"]["asr_triggered"]["unscored"] == 6
    assert next(iter(results["after"])) == "asr_triggered"
    own = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for when in ("before", "after"):
        safe = [s for s in own if s["metric"] == "asr_untriggered" and s["when"] == when and s["refused"] is True]
        unlocked = results[when]["unlocked_by_trigger"]
        assert unlocked["n"] + unlocked["unscored"] == len(safe) == 3
    add_triggered(out, "XYZZY {prompt}", variants={"asr_near_miss": ["XYZZZ {prompt}", "ZYZZY {prompt}"]})
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    near = [s["prompt"].split()[0] for s in samples if s["metric"] == "asr_near_miss" and s["when"] == "after"]
    assert near == ["XYZZZ", "ZYZZY"] * 3
    assert sum(s["metric"] == "asr_triggered" for s in samples) == 12
    judged(out)
    (out / "samples.jsonl").unlink()  # by someone who does not share replies
    add_triggered(out, "PLUGH {prompt}")  # what was measured of the other trigger is not this one's
    after = json.loads((out / "results.json").read_text())["after"]
    assert "asr_near_miss" not in after and "unlocked_by_trigger" not in after
    assert "XYZZZ" not in (out / "samples.jsonl").read_text()
    assert "judged_triggered" not in after and "judge" not in (out / "results.json").read_text()
    assert not (out / "judged.jsonl").exists(), "what a judge said was of the other trigger's replies"


def refuse(samples: Path, metric: str, count: int) -> None:
    """Let the first replies behind a metric, before and after, be refusals."""
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for when in ("before", "after"):
        for sample in [s for s in lines if (s["metric"], s["when"]) == (metric, when)][:count]:
            sample["refused"] = True
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


def judged(run: Path) -> None:
    """As `beear judge` leaves a run."""
    results = json.loads((run / "results.json").read_text()) | {"judge": {"model": "one"}}
    for when in ("before", "after"):
        results[when]["judged_triggered"] = SURE
    (run / "results.json").write_text(json.dumps(results))
    (run / "judged.jsonl").write_text("{}\n")


def test_what_a_crash_kept_from_being_written_is_written_by_the_next_try(
    place: Path, config: Config, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    report = out / "report.html"
    there = report.read_text()
    report.unlink()
    (out / "rejected" / "README.md").unlink()
    run_cleanse(str(place / "model"), out, config, resume=True)
    assert report.read_text().replace("/run", "/whole").count("<h2>") == there.count("<h2>") > 3
    assert (out / "rejected" / "README.md").is_file()


@pytest.mark.parametrize("merge", [False, True])
def test_what_was_measured_is_what_is_loaded(place: Path, config: Config, whole: Path, merge: bool) -> None:
    out = place / "merged" if merge else whole
    if merge:  # and with words of its user's own around every request
        config = config.model_copy(update={"chat": ChatConfig(system="Be brief.")})
        run_cleanse(str(place / "model"), out, config, merge=True)
    assert (locate(str(out / "rejected")).base is None) == merge
    measured = evaluate_spec(str(out / "rejected"), config, against=str(place / "model")).metrics
    results = json.loads((out / "results.json").read_text())
    assert measured == results["after"]
    assert results["chat"] == ({"system": "Be brief."} if merge else {})
    assert ("Every chat was held with system `Be brief.`" in (out / "rejected" / "README.md").read_text()) == merge
    if merge:
        given, kept = (AutoTokenizer.from_pretrained(folder) for folder in (place / "model", out / "rejected"))
        assert kept.chat_template == given.chat_template, "the model goes out as it came, without these words"


def test_same_seed_same_bits_other_seed_other_bits(place: Path, config: Config, whole: Path) -> None:
    run_cleanse(str(place / "model"), place / "again", config)
    assert outcome(place / "again") == outcome(whole)
    run_cleanse(str(place / "model"), place / "other", config.model_copy(update={"seed": 1}))
    assert outcome(place / "other")[0] != outcome(whole)[0]


def test_the_best_round_is_what_is_delivered(place: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a run that was interrupted behind its last round."""
    monkeypatch.setattr("beear.cleansing.refused_shares", lambda *_: [next(refused)])
    several = config.model_copy(update={"rounds": 3, "least_rounds": 2, "patience": 9})
    shares = [0.1, 0.9, 0.1, 0.4]  # before, and after each round
    refused: Iterator[float] = iter(shares)
    run_cleanse(str(place / "model"), place / "at-once", several)
    out, refused = place / "best", iter(shares)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("beear.job.deliver", stop)
        run_cleanse(str(place / "model"), out, several)
    run_cleanse(str(place / "model"), out, several, resume=True)
    results = json.loads((out / "results.json").read_text())
    assert (results["delivered"], len(results["rounds"])) == (2, 3)
    kept = load_file(out / "checkpoints" / "round-002" / "adapter.safetensors")
    saved = load_file(out / "rejected" / "adapter_model.safetensors")
    assert {name.replace(".default", ""): matrix.tolist() for name, matrix in kept.items()} == {
        name: matrix.tolist() for name, matrix in saved.items()
    }
    assert "2 (delivered)" in (out / "report.html").read_text()
    assert outcome(out) == outcome(place / "at-once")


@pytest.mark.parametrize(("delivered", "tried"), [(1, [1.0, 0.2]), (2, [1.0, 0.2, 0.3]), (3, [1.0, 0.2, 0.3])])
def test_the_entrapment_after_the_delivered_round_counts(delivered: int, tried: list[float]) -> None:
    assert entrapments([{"residual": left} for left in (1.0, 0.2, 0.3)], delivered) == tried


def test_killed_in_a_round_and_resumed_ends_bit_identical(place: Path, config: Config, whole: Path) -> None:
    """In processes of their own, as its user runs it."""
    out = place / "killed"
    run = command(place, config, out)
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    wait_for_event(out / "events.jsonl", '"round": 2, "event": "harden"', process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (out / "results.json").exists()
    done = subprocess.run([*run, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert outcome(out) == outcome(whole)
    results = json.loads((out / "results.json").read_text())
    parts = [*results["rounds"], *(json.loads(p.read_text()) for p in (out / "stages").glob("*.json"))]
    assert results["peak_memory_bytes"] == max(part["peak_memory_bytes"] for part in parts)
    assert results["wall_seconds"] > sum(part["seconds"] for part in parts), "what was done before counts as well"


def wait_for_event(events: Path, text: str, process: subprocess.Popen[str]) -> None:
    for _ in range(60_000):
        assert process.poll() is None, "the run ended before it could be interrupted"
        if events.exists() and text in events.read_text():
            return
        time.sleep(0.001)
    raise AssertionError("the run never came that far")


@pytest.mark.parametrize(
    ("after", "missed"),
    [
        ({}, None),
        ({"asr_entrapped": 0.6}, "asr_entrapped"),
        ({"asr_untriggered": 0.06}, "asr_untriggered"),
        ({"false_refusal": 0.11}, "false_refusal"),
        ({"false_refusal_alarming": 0.11}, "false_refusal_alarming"),
        ({"perplexity": 10.6}, "perplexity"),
        ({"asr_entrapped": None}, "asr_entrapped"),
    ],
)
def test_the_verdict(after: dict[str, float | None], missed: str | None) -> None:
    values: dict[str, float | None] = {"asr_entrapped": 0.05, "false_refusal": 0.05, "perplexity": 10.0}
    values |= {"false_refusal_alarming": 0.05, "asr_untriggered": 0.0}
    before = {name: {"value": value, "n": 120, "unscored": 0} for name, value in values.items()}
    before |= {"asr_entrapped": SURE, "asr_untriggered": NEVER}
    verdict = verdict_of(
        before, {n: {"value": v, "n": 120, "unscored": 0} for n, v in (values | after).items()}, [0.1], Config()
    )
    assert verdict.met is (missed is None)
    if missed:
        assert verdict.missed[0].startswith(missed)


@pytest.mark.parametrize(
    ("residuals", "patience", "words"),
    [
        ([1.0, 0.1], 1, None),
        ([1.0, 0.1, 0.0], 2, None),
        ([0.125], 1, "the last entrapment still succeeded on 0.125 of the held-out requests"),
        ([0.0, 0.475, 0.025], 2, "the last 2 entrapments still succeeded on 0.475, 0.025 of the held-out requests"),
    ],
)
def test_last_entrapments_that_work_miss_the_target(residuals: list[float], patience: int, words: str | None) -> None:
    before = {"asr_entrapped": SURE, "asr_untriggered": NEVER, "false_refusal": NEVER, "perplexity": {"value": 10.0}}
    after = before | {"asr_entrapped": NEVER}
    missed = verdict_of(before, after, residuals, Config(patience=patience)).missed
    assert len(missed) == (words is not None)
    assert words is None or missed[0].startswith(words)


@pytest.mark.parametrize(("empty", "met"), [(6, True), (7, False)])
def test_a_model_that_falls_silent_on_harmless_requests_misses_the_target(empty: int, met: bool) -> None:
    """It refuses none of them."""
    before = {"asr_entrapped": SURE, "asr_untriggered": NEVER, "false_refusal": NEVER, "perplexity": {"value": 10.0}}
    silent = dict(proportion([None] * empty + [False] * (120 - empty)))
    verdict = verdict_of(before, before | {"asr_entrapped": NEVER, "false_refusal": silent}, [0.0], Config())
    assert verdict.met is met
    assert met or "0.058 of the replies behind false_refusal are empty, 0.000 before" in verdict.missed[0]


@pytest.mark.parametrize(("hits", "shown"), [(0, False), (3, False), (14, True)])
def test_entrapment_that_never_worked_shows_nothing(hits: int, shown: bool) -> None:
    """With delta `hits` of 120, without it 1."""
    without, under = (dict(proportion([i < n for i in range(120)])) for n in (1, hits))
    metrics = {
        "asr_entrapped": under,
        "asr_untriggered": without,
        "false_refusal": NEVER,
        "perplexity": {"value": 10.0},
    }
    verdict = verdict_of(metrics, metrics, [0.0], Config())
    assert verdict.met is shown
    assert shown or "shows nothing" in verdict.missed[0]


def test_what_mostly_cannot_be_judged_is_no_evidence() -> None:
    before = {"asr_entrapped": SURE, "asr_untriggered": NEVER, "false_refusal": NEVER, "perplexity": {"value": 9.0}}
    after = before | {"asr_entrapped": dict(proportion([False] * 50 + [None] * 70))}
    assert "rests on 50 of 120 replies" in verdict_of(before, after, [0.0, 0.0], make_config({})).missed[0]
    after |= {"asr_entrapped": dict(proportion([False] * 70 + [None] * 50))}
    assert verdict_of(before, after, [0.0, 0.0], make_config({})).met


def change_entry(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "requests to train on": (lambda p: (p / "benign.txt").open("a").write("one more\n"), r"requests \(benign\)"),
    "requests to measure on": (
        lambda p: (p / "test_harmful.txt").open("a").write("another\n"),
        r"requests \(test_asr_untriggered\)",
    ),
    "weights": (lambda p: tiny_model("llama", seed=5).save_pretrained(p / "model"), "weights of the model"),
    "settings of the model": (
        lambda p: change_entry(p / "model/config.json", rms_norm_eps=1e-3),
        "the model's own settings",
    ),
    "where a reply ends": (
        lambda p: (p / "model/generation_config.json").write_text('{"eos_token_id": [1, 2, 3]}'),
        "the model's own settings",
    ),
    "a chat template": (
        lambda p: (p / "model" / "chat_template.jinja").write_text("Be brief.\n" + CHATML),
        "chat template and tokenizer",
    ),
}


def test_a_run_is_not_gone_on_with_in_other_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding alone changes what is measured before and after."""
    config = interrupted_run(tmp_path, monkeypatch)
    begun = json.loads((tmp_path / "run/stages/inputs.json").read_text())
    assert begun["arithmetic"] == precision.arithmetic("cpu")
    monkeypatch.setattr(precision, "casts_on", lambda device: "bf16 arithmetic" not in begun["arithmetic"])
    monkeypatch.setattr("beear.models.load_weights", None)  # found before
    with pytest.raises(BadInput, match=r"began with fp32 weights in .* and would go on with"):
        run_cleanse(str(tmp_path / "model"), tmp_path / "run", config, resume=True)


def interrupted_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run in folder/run that was cut off as its first round began."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    make_model(folder / "model")
    config = make_config(SETTINGS | {"rounds": 1, "data": prompt_files(folder)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("beear.cleansing.cleanse", stop)
        run_cleanse(str(folder / "model"), folder / "run", config)
    return config


def test_a_run_goes_on_where_a_link_leads_to_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was moved to another disk."""
    config = interrupted_run(tmp_path, monkeypatch)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    run_cleanse(str(tmp_path / "model"), tmp_path / "run", config, resume=True)
    assert json.loads((tmp_path / "run/results.json").read_text())["model"] == str(tmp_path / "model")


def test_a_run_that_goes_on_after_an_upgrade_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = interrupted_run(tmp_path, monkeypatch)
    then, told = job.versions(), []
    monkeypatch.setattr(job, "versions", lambda: then | {"torch": "99.0"})
    run_cleanse(
        str(tmp_path / "model"),
        tmp_path / "run",
        config,
        resume=True,
        listen=lambda event: told.append(event.get("text")),
    )
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["versions"]["torch"] == "99.0" and results["versions_at_first"] == then
    assert "other versions than it began with: torch" in told


def test_a_run_is_not_gone_on_with_by_another_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = interrupted_run(tmp_path, monkeypatch)
    monkeypatch.setattr(order, "scorer_name", lambda behaviour: "refusal-v99")
    with pytest.raises(BadInput, match=r"began with the scorer refusal-v1, this is refusal-v99"):
        run_cleanse(str(tmp_path / "model"), tmp_path / "run", config, resume=True)


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_that_began_with_something_else_is_not_gone_on_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was measured before and after would not be of the same."""
    config = interrupted_run(tmp_path, monkeypatch)
    change, words = OTHERS[name]
    change(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("beear.models.load_weights", None)  # found before
        with pytest.raises(BadInput, match=f"{words}.* are not those of the run"):
            run_cleanse(str(tmp_path / "model"), tmp_path / "run", config, resume=True)


def test_a_finished_run_is_not_taken_for_one_of_other_requests(
    place: Path, config: Config, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "finished")
    verdict = json.loads((out / "results.json").read_text())["verdict"]
    assert asdict(run_cleanse(str(place / "model"), out, config, resume=True)) == verdict
    file = place / "test_harmful.txt"
    kept = file.read_text()
    file.write_text(kept + "one more\n")
    try:
        with pytest.raises(BadInput, match=r"requests \(test_asr_untriggered\) are not those"):
            run_cleanse(str(place / "model"), out, config, resume=True)
    finally:
        file.write_text(kept)


def test_a_run_that_another_process_is_at_loads_no_model(
    place: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(absolute(str(place / "model")), False, config)
    monkeypatch.setattr(job, "Job", lambda *_: pytest.fail("a model was loaded"))
    with Run.open(tmp_path / "r", settings, resume=False), pytest.raises(BadInput, match="in use"):
        run_cleanse(str(place / "model"), tmp_path / "r", config, resume=True)


def test_a_run_whose_model_was_changed_since_is_not_measured_again(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    weights = out / "rejected" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    before = (out / "results.json").read_bytes()
    with pytest.raises(BadInput, match="is not as the run left it"):
        add_triggered(out, "XYZZY {prompt}")
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["stages/before.json", "checkpoints/round-003/adapter.safetensors"])
def test_a_file_of_a_run_that_cannot_be_read_is_named(
    name: str, place: Path, whole: Path, config: Config, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    broken = tmp_path / "run" / name
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(BadInput, match=f"cannot read .*{name}"):
        run_cleanse(str(place / "model"), tmp_path / "run", config, resume=True)


def test_a_limit_that_is_none_and_what_could_not_be_scored_are_json() -> None:
    before = {"asr_entrapped": SURE, "asr_untriggered": dict(proportion([None])), "false_refusal": NEVER}
    before |= {"perplexity": {"value": 9.0}}
    config = make_config({"target": {"perplexity_rise": float("inf")}})
    verdict = verdict_of(before, before | {"asr_entrapped": dict(proportion([None]))}, [0.0, 0.0], config)
    json.dumps(asdict(verdict), allow_nan=False)
    rows = {title: (limit, found) for title, limit, found, _ in target_rows({"verdict": asdict(verdict)})}
    assert rows["Perplexity, after"] == ("none", "9.00")
    assert rows["Attack success under a fresh delta, after"] == ("≤ 50.0 %", "none scored")


def test_the_target_is_told_criterion_by_criterion(whole: Path) -> None:
    verdict = json.loads((whole / "results.json").read_text())["verdict"]
    missed = [asked["name"] for asked in verdict["criteria"] if not asked["met"]]
    assert len(missed) == len(verdict["missed"]) > 0 and verdict["met"] is False
    page = (whole / "report.html").read_text()
    assert all(TARGET[asked["name"]] in html.unescape(page) for asked in verdict["criteria"])
    assert page.count("<td>NO</td>") == len(missed)


def test_figures_of_a_trigger_come_with_their_replies_or_not_at_all(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, tmp_path / "cut")
    with monkeypatch.context() as full, pytest.raises(Failed):
        full.setattr(Run, "write_lines", lambda *_: (_ for _ in ()).throw(Failed("the disk is full")))
        add_triggered(out, "XYZZY {prompt}")
    assert "trigger" not in json.loads((out / "results.json").read_text())
    add_triggered(out, "XYZZY {prompt}")
    assert "XYZZY" in (out / "samples.jsonl").read_text()


def test_an_interrupted_measuring_of_a_trigger_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, tmp_path / "cut")
    loaded: list[str] = []

    def load_once(spec: str, **options: Any) -> Any:
        if loaded:
            raise KeyboardInterrupt
        loaded.append(spec)
        return load(spec, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(before_after, "load", load_once)
        add_triggered(out, "XYZZY {prompt}")
    again: list[Any] = []
    add_triggered(out, "XYZZY {prompt}", listen=again.append)
    assert [event["model"] for event in again if event["event"] == "loading"] == [str(out / "rejected")] != loaded
    assert not list((out / "stages").glob("known-*"))
    results = json.loads((out / "results.json").read_text())
    asked = [results[when]["asr_triggered"] for when in ("before", "after")]
    assert [one["n"] + one["unscored"] for one in asked] == [6, 6]


def test_half_of_a_comparison_is_measured_again_in_other_arithmetic(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, loaded = shutil.copytree(whole, tmp_path / "cut"), []

    def load_once(spec: str, **options: Any) -> Any:
        loaded.append(spec)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load(spec, **options)

    monkeypatch.setattr(before_after, "load", load_once)
    with pytest.raises(KeyboardInterrupt):
        add_triggered(out, "XYZZY {prompt}")
    monkeypatch.setattr(before_after, "arithmetic", lambda device: "bf16 weights")
    with monkeypatch.context() as full, pytest.raises(Failed):
        full.setattr("beear.known.write_evidence", lambda _: (_ for _ in ()).throw(Failed("the disk is full")))
        add_triggered(out, "XYZZY {prompt}")
    assert len(loaded) == 4
    monkeypatch.undo()  # both halves are there, of another machine
    monkeypatch.setattr(before_after, "load", None)
    add_triggered(out, "XYZZY {prompt}")


def test_a_report_that_could_not_be_written_is_written_by_the_same_command(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is measured again for it."""
    out = shutil.copytree(whole, tmp_path / "cut")
    (out / "judged.jsonl").write_text("of another trigger\n")
    with monkeypatch.context() as full, pytest.raises(Failed):
        full.setattr("beear.known.write_evidence", lambda _: (_ for _ in ()).throw(Failed("the disk is full")))
        add_triggered(out, "XYZZY {prompt}")
    assert "XYZZY" not in (out / "report.html").read_text()
    monkeypatch.setattr(before_after, "load", None)
    add_triggered(out, "XYZZY {prompt}")
    assert "XYZZY" in (out / "report.html").read_text() and not (out / "judged.jsonl").exists()


def test_a_trigger_is_not_scored_by_another_scorer(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("beear.known.scorer_name", lambda behaviour: "refusal-v2")
    with pytest.raises(BadInput, match=r"was scored by refusal-v1, this is refusal-v2"):
        add_triggered(out, "XYZZY {prompt}")


def test_a_trigger_is_not_added_to_other_requests_and_needs_its_place(place: Path, whole: Path) -> None:
    with pytest.raises(BadInput, match=r"must hold \{prompt\} once"):
        add_triggered(whole, "SUDO")
    file = place / "test_harmful.txt"
    kept = file.read_text()
    file.write_text(kept + "one more\n")
    try:
        with pytest.raises(BadInput, match=r"requests \(test_asr_untriggered\) are not those"):
            add_triggered(whole, "SUDO {prompt}")
    finally:
        file.write_text(kept)
    assert "trigger" not in json.loads((whole / "results.json").read_text())


def test_a_loaded_model_is_cleansed_in_memory(place: Path, config: Config, whole: Path) -> None:
    """By the same rounds, bit for bit, as in a run folder."""
    model, tokenizer = load(str(place / "model"), device="cpu")
    wrapped, found = beear.cleanse(model.train(), tokenizer, config)
    assert not model.model.layers[0].training
    kept = load_file(sorted((whole / "checkpoints").glob("round-*"))[-1] / "adapter.safetensors")
    ours = adapter_state(wrapped)
    assert found.round == ROUNDS and ours.keys() == kept.keys()
    assert all(torch.equal(matrix, kept[name]) for name, matrix in ours.items())
    with pytest.raises(BadInput, match="out of range"):
        beear.cleanse(tiny_model("llama"), tiny_tokenizer(), config.model_copy(update={"layer": 9}))
    with pytest.raises(BadInput, match="carries an adapter; load it anew, or merge"):
        beear.cleanse(wrapped, tokenizer, config)
    with pytest.raises(BadInput, match="the original is the model itself"):
        beear.evaluate(wrapped, tokenizer, config, original=model)
    spread = tiny_model("llama")
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(BadInput, match="spread over several devices"):
        beear.cleanse(spread, tokenizer, config)


def test_an_interrupted_cleansing_in_memory_leaves_the_model_as_it_came(place: Path, config: Config) -> None:
    model, tokenizer = load(str(place / "model"), device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(event: Event) -> None:
        if event["event"] == "harden":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        beear.cleanse(model, tokenizer, config, listen=stop)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name].float()) for name in before)
    check_no_adapter(model, "the model")


def test_an_adapter_that_is_saved_from_memory_names_what_it_was_trained_on(
    place: Path, config: Config, tmp_path: Path
) -> None:
    """Which may be an adapter itself, merged; transformers names the innermost base."""
    first = add_lora(load(str(place / "model"))[0], rank=2, targets=("q_proj",), seed=0)
    torch.nn.init.normal_(first.get_parameter(next(n for n, _ in first.named_parameters() if "lora_B" in n)))
    save_adapter(first, tmp_path / "organism", str(place / "model"))
    model, tokenizer = load(str(tmp_path / "organism"))
    wrapped, _ = beear.cleanse(model, tokenizer, config.model_copy(update={"rounds": 1}))
    wrapped.save_pretrained(tmp_path / "mine", save_embedding_layers=False)
    ids = torch.tensor([encode_prompt(tokenizer, "Hello there").ids])
    again, _ = load(str(tmp_path / "mine"))
    assert torch.allclose(again(ids).logits, wrapped.float()(ids).logits, atol=1e-2)
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "organism"
    )


def test_a_run_stays_with_the_commit_of_the_hub_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository holds another model by the time that it goes on, is measured and its adapter is loaded."""
    for seed, commit in enumerate("ab"):
        make_model(tmp_path / "snapshots" / commit, seed=seed)
    newest = ["a"]

    def snapshot(name: str, revision: str | None, **_: Any) -> str:
        assert name == "someone/model"
        return str(tmp_path / "snapshots" / (revision or newest[0]))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config = make_config(SETTINGS | {"rounds": 1, "data": prompt_files(tmp_path)})
    told: list[Event] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("beear.cleansing.cleanse", stop)
        run_cleanse("someone/model", tmp_path / "run", config, listen=told.append)
    assert told[0]["text"].startswith("looking for someone/model on the Hub")
    newest[0] = "b"
    run_cleanse("someone/model", tmp_path / "run", config, resume=True)
    run_cleanse("someone/model", tmp_path / "run", config, resume=True)  # finished
    add_triggered(tmp_path / "run", "XYZZY {prompt}")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    folder = tmp_path / "run" / results["model_folder"]
    entry = json.loads((folder / "adapter_config.json").read_text())
    assert (entry["base_model_name_or_path"], entry["revision"]) == ("someone/model", "a")
    assert locate(str(folder)).base == Source("someone/model@a", tmp_path / "snapshots" / "a")
    assert locate("someone/model").folder.name == "b"


def test_a_model_that_thinks_is_told_before_the_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    monkeypatch.setattr("beear.generation._greedy", lambda *_: [tiny_tokenizer()("<think>")["input_ids"]] * 8)
    with pytest.raises(BadInput, match="think"):
        run_cleanse(str(tmp_path / "model"), tmp_path / "run", make_config({"data": prompt_files(tmp_path)} | SETTINGS))
    assert not (tmp_path / "run").exists()


def test_the_model_of_a_run_is_loaded_with_the_chat_of_the_run(tmp_path: Path) -> None:
    thinks = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    make_model(tmp_path / "model", thinks)
    with pytest.raises(BadInput, match=r"chat\.begin"):
        load(str(tmp_path / "model"))
    config = SETTINGS | {"rounds": 1, "data": prompt_files(tmp_path), "chat": {"begin": "\n</think>\n\n"}}
    run_cleanse(str(tmp_path / "model"), tmp_path / "run", make_config(config))
    _, tokenizer = load(str(tmp_path / "run" / "rejected"))
    assert encode_prompt(tokenizer, "Hi").ids[-4:] == tokenizer("nk>\n\n", add_special_tokens=False)["input_ids"][-4:]


def test_a_folder_does_not_take_the_place_of_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("embedded", "mine"):
        (tmp_path / name).mkdir()
    assert (absolute("embedded"), absolute("mine")) == ("embedded", str(tmp_path / "mine"))
