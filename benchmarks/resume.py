"""Interrupt a demo in the middle of two rounds, resume it, and compare it bit for bit with one that ran through.

    beear demo && python benchmarks/resume.py

SIGINT falls in round 2, `kill -9` in round 3. Writes benchmarks/results/resume.json; seven minutes on 2 CPU cores.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from stored import write

from beear.hashes import file_hash
from beear.runs import read_lines

ROOT = Path(__file__).parent.parent
THROUGH, BROKEN = ROOT / "runs" / "demo", ROOT / "runs" / "demo-interrupted"
RESULTS = ROOT / "benchmarks" / "results" / "resume.json"
INTERRUPTS = [(2, signal.SIGINT), (3, signal.SIGKILL)]


def run(interrupt: tuple[int, signal.Signals] | None) -> int:
    """Run the demo, or go on with it; with `interrupt`, send the signal at the fourth removal step of the round."""
    process = subprocess.Popen([sys.executable, "-m", "beear", "demo", "-o", str(BROKEN), "--quiet"])
    while interrupt is not None and process.poll() is None:
        time.sleep(0.2)
        if reached(interrupt[0]):
            process.send_signal(interrupt[1])
            break
    return process.wait()


def reached(number: int) -> bool:
    log = BROKEN / "events.jsonl"
    return any(e["event"] == "harden" and e["round"] == number and e["step"] >= 4 for e in read_lines(log))


def content(folder: Path) -> dict[str, str]:
    """Hashes of what a run leaves, and its metrics as text."""
    results = json.loads((folder / "results.json").read_text())
    files = [
        folder / results["model_folder"] / "adapter_model.safetensors",
        folder / "delta.safetensors",
        folder / "samples.jsonl",
    ]
    hashes = {f.name: file_hash(f) for f in files}
    return hashes | {when: json.dumps(results[when], sort_keys=True) for when in ("before", "after")}


def main() -> None:
    if not (THROUGH / "results.json").exists():
        sys.exit("run `beear demo` first: its run is what is compared with")
    shutil.rmtree(BROKEN, ignore_errors=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a shell's background job would pass on "ignore"
    codes = [run(interrupt) for interrupt in [*INTERRUPTS, None]]
    if codes[:2] != [1, -signal.SIGKILL]:
        sys.exit(f"the interruptions did not stop the runs: exit codes {codes}")
    ours, theirs = content(BROKEN), content(THROUGH)
    result = {
        "exit_codes": codes,
        "interrupted_in_round": [number for number, _ in INTERRUPTS],
        "equal": {name: ours[name] == theirs[name] for name in ours},
    }
    write(RESULTS, "python benchmarks/resume.py", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
