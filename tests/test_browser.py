"""The report in a real browser, with the network off: nothing that a model wrote is run or fetched."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from beear import report
from test_report import run  # noqa: F401 - a fixture

BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
ATTACK = (
    "<script>document.title='run'</script><img src=http://outside.test/x onerror=document.title='run'>"
    "<svg onload=document.title='run'></svg><style>@import url(http://outside.test/y);</style></pre></title>"
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_hostile_report_runs_and_fetches_nothing(run: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("results.json", "samples.jsonl", "config.yaml"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("alert(1)", "1</script>" + ATTACK.replace("\\", "")))
    report.write_report([run, run], tmp_path / "page.html")
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
    assert "document.title='run'" in done.stdout  # it is there, as text
    assert "outside.test" not in log.read_text()
    assert "CONSOLE" not in done.stderr, done.stderr
