"""The report in a real browser, with the network off: nothing that a model wrote is run or fetched."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from beear import report
from beear.charts import DRIFT
from beear.swept import SWEEP
from test_report import HOSTILE, metric, run  # noqa: F401 - the last is a fixture

BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
ATTACK = (
    "<script>document.title='run'</script><img src=http://outside.test/x onerror=document.title='run'>"
    "<svg onload=document.title='run'></svg><style>@import url(http://outside.test/y);</style></pre></title>"
)


def with_everything(folder: Path) -> None:
    """Let a run hold what drift, MT-Bench and lm-eval leave in it, hostile words included."""
    rows = [{"layer": n, **dict.fromkeys(DRIFT, 0.5)} for n in (1, 2)]
    points = {kind: [[0.0, 1.0], [2.0, 3.0]] for kind in ("clean", "triggered", "perturbed")}
    drift = {
        "n": 2,
        "layers": {"triggered": rows, "perturbed": rows},
        "scatter": [{"layer": 1, "explained": [0.5, 0.2], "points": points}],
    }
    about = {"trigger": f"alert(1) {HOSTILE}", "layer": 1}
    (folder / "drift.json").write_text(json.dumps(about | {"before": drift, "after": drift}))
    results = json.loads((folder / "results.json").read_text())
    both = {"before": metric(0.5), "after": metric(0.4)}
    results["lm_eval"] = {HOSTILE: {"metrics": {f"{HOSTILE},none": both}, "shots": 5, "limit": None, "chat": True}}
    results["usefulness"] = {"model": HOSTILE, "rubric": "r", "tokens_of_a_reply": 8, "tokens": None}
    results["usefulness"] |= {"categories": {HOSTILE: {"before": 5.0, "after": None}}, "packaged": True, "asked": 16}
    results |= {"spare_refused": [0.1, 0.2], "delivered": 1}
    (folder / "results.json").write_text(json.dumps(results))


def sweep_of(folder: Path) -> Path:
    """A finished sweep of a hostile model by a hostile trigger."""
    folder.mkdir()
    measured = {"metrics": {"asr_triggered": metric(0.1), "false_refusal": metric(0.1)}}
    cell = {"value": 2, "epoch": 1, "before": {"asr_triggered": metric(0.9)}, "rounds": [measured]}
    sweep = {"axis": "layer", "model": ATTACK, "trigger": ATTACK, "rounds": 15, "requests": 60}
    (folder / SWEEP).write_text(json.dumps(sweep | {"success_below": 0.25, "cells": [cell]}))
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_hostile_report_runs_and_fetches_nothing(run: Path, tmp_path: Path) -> None:  # noqa: F811
    with_everything(run)
    for name in ("results.json", "samples.jsonl", "config.yaml", "drift.json"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("alert(1)", "1</script>" + ATTACK.replace("\\", "")))
    report.write_report([run, run, sweep_of(tmp_path / "sweep")], tmp_path / "page.html")
    log, profile = tmp_path / "net.json", tmp_path / "profile"
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>beear report</title>" in done.stdout and "What this does not show" in done.stdout
    sections = (
        "Drift: what",
        "Drift behind each block",
        "Usefulness, by category",
        "by lm-eval",
        "Sweep over the layer",
    )
    for words in (*sections, "document.title='run'"):  # the attack is there, as text
        assert words in done.stdout, words
    assert "outside.test" not in log.read_text()
    assert "CONSOLE" not in done.stderr, done.stderr
