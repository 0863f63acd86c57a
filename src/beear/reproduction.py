"""Is a run's result what its settings give? Run it again and compare: inputs first, then bits, then figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beear.config import make_config
from beear.errors import BadInput
from beear.events import Listener
from beear.job import run_cleanse
from beear.known import add_triggered, is_told
from beear.metrics import at_most, value_of
from beear.order import check_finished
from beear.outputs import check_output_files
from beear.runs import read_results, read_settings
from beear.sources import model_of

ABOUT = ("versions", "machine")
"""What may differ between two runs of the same settings, and then explains other bits."""


def reproduce(
    run: Path,
    out: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Run a finished run's settings again in `out`, or go on there, and compare the two (`compare`).

    Raises BadInput, before anything runs, if the run's output was changed or its model or requests are not those
    of then.
    """
    if out.resolve() == run.resolve():
        raise BadInput(f"{out} is the run itself; choose another folder for the second one")
    settings, results = read_settings(run), read_results(run)
    config = make_config(settings["config"])
    check_output_files(run, results)
    check_finished(run, settings, config, trust_remote_code)
    run_cleanse(
        model_of(settings, run),
        out,
        config,
        merge=settings["merge"],
        resume=(out / "config.yaml").exists(),
        device=device,
        trust_remote_code=trust_remote_code,
        listen=listen,
    )
    if "trigger" in results and not is_told(read_results(out), results["trigger"], results["variants"]):
        add_triggered(
            out,
            results["trigger"],
            variants=results["variants"],
            device=device,
            trust_remote_code=trust_remote_code,
            listen=listen,
        )
    return compare(results, read_results(out))


def compare(first: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """`same_bits` of all output files, `agrees`, what differs around them, and each figure of both runs.

    A run agrees if its verdict is the same and every figure after lies within the other's interval.
    """
    figures = {
        name: {"first": value_of(first["after"], name), "again": value_of(again["after"], name)}
        for name in first["after"].keys() & again["after"].keys()
        if first["after"][name]["value"] is not None and again["after"][name]["value"] is not None
    }
    lost = [n for n in first["after"].keys() & again["after"].keys() - figures.keys() if first["after"][n]["n"]]
    beyond = [
        name
        for name, pair in figures.items()
        if not (
            at_most(first["after"][name]["low"], pair["again"]) and at_most(pair["again"], first["after"][name]["high"])
        )
    ]
    outside = sorted(lost + beyond)
    differs = [
        f"{about}.{key}: {first[about].get(key)} then, {again[about].get(key)} now"
        for about in ABOUT
        for key in sorted(first[about].keys() | again[about].keys())
        if first[about].get(key) != again[about].get(key)
    ]
    if first["hashes"]["code"] != again["hashes"]["code"]:
        differs.append("beear's code")
    if first["scorer"] != again["scorer"]:
        differs.append(f"the scorer: {first['scorer']} then, {again['scorer']} now")
    same_verdict = first["verdict"]["met"] == again["verdict"]["met"]
    return {
        "same_bits": sorted(first["files"].values()) == sorted(again["files"].values()),
        "agrees": same_verdict and not outside,
        "same_verdict": same_verdict,
        "outside": outside,
        "differs": differs,
        "figures": dict(sorted(figures.items())),
    }
