"""Fifty `kill -9` over whole small runs: each is gone on with, and every run ends with the bits of an undisturbed one.

Slow: `make test-slow`. Half of the kills fall at a random moment, half between two steps of writing a file.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beear.config import Config
from test_job import command, config, outcome, place, whole  # noqa: F401 - the last three are fixtures

KILLS = 50
DIE_WRITING = """
import os, signal, sys
import beear.runs as runs
left, real = int(sys.argv.pop(1)), runs._sync
def sync(path):
    global left
    left -= 1
    if left == 0:
        if path.is_file():  # half written
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
runs._sync = sync
sys.argv[0] = "beear"
from beear.cli import main
main()
"""


@pytest.mark.slow
def test_no_kill_is_seen_in_the_result(place: Path, config: Config, whole: Path) -> None:  # noqa: F811
    draw, kills, runs = random.Random(0), 0, 0
    started = time.monotonic()
    subprocess.run(command(place, config, place / "timed"), capture_output=True, check=False)
    seconds = time.monotonic() - started
    while kills < KILLS:
        out = place / f"crashed-{runs}"
        runs += 1
        run = command(place, config, out)
        while not finished(out):
            again = ["--resume"] if (out / "config.yaml").exists() else []
            if kills >= KILLS:
                done = subprocess.run([*run, *again], capture_output=True, text=True, check=False)
                assert done.returncode == 3, done.stderr
            elif draw.random() < 0.5:
                kills += killed_at_a_moment([*run, *again], draw.uniform(0.3, 1.0) * seconds)
            else:
                kills += killed_while_writing([*run, *again], draw.randint(1, 8))
        assert outcome(out) == outcome(whole)
        assert sorted(names(out)) == sorted(names(whole)), "a crash has left something behind"
    print(f"{kills} kills over {runs} runs in {time.monotonic() - started:.0f} s")


def finished(out: Path) -> bool:
    return (out / "report.html").exists() and (out / "results.json").exists()


def killed_at_a_moment(run: list[str], seconds: float) -> bool:
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 3, err
    return False


def killed_while_writing(run: list[str], writes: int) -> bool:
    """Cut the file of the n-th write in half and die; where it was already whole and in its place, only die."""
    code = [sys.executable, "-c", DIE_WRITING, str(writes), *run[3:]]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode in (-signal.SIGKILL, 3), done.stderr
    return done.returncode == -signal.SIGKILL


def names(out: Path) -> list[str]:
    return [str(p.relative_to(out)) for p in out.rglob("*")]
