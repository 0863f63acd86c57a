"""A trigger that someone knows: what it does to a finished run's models, measured and added to the run.

A cleansing is never told one (job.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from beear import ranks
from beear.before_after import kept_before_and_after
from beear.card import write_evidence
from beear.config import config_of_run
from beear.errors import BadInput
from beear.evaluation import (
    measure_replies,
    unlocked_by_trigger,
    unlocked_only,
)
from beear.events import Listener, progress_to
from beear.fingerprints import check_tests
from beear.hashes import json_hash
from beear.runs import WHENS, Run, read_lines, read_results
from beear.scorers import OUTCOME_OF, scorer_name
from beear.sets import WITH_TRIGGER, read_sets, trigger_tests


def is_told(
    results: Mapping[str, Any], template: str, variants: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> bool:
    """Whether a run holds the figures of this very trigger, and of these variants."""
    listed = {metric: list(texts) for metric, texts in variants.items()}
    return bool(results.get("trigger") == template and results.get("variants") == listed)


def add_triggered(
    out: Path,
    template: str,
    *,
    variants: Mapping[str, Sequence[str]] = MappingProxyType({}),
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> None:
    """Measure `asr_triggered` before and after a finished run, for someone who knows a trigger, and add it.

    `variants`: further templates, by the metric they yield (sets.trigger_tests). What was measured of an earlier
    trigger, and what a judge said of its replies, is dropped. What an interruption leaves is gone on with.
    """
    config = config_of_run(out)
    with Run.existing(out) as run:
        results, sets = read_results(out), read_sets(config)
        check_tests(results, sets)
        if results["scorer"] != (now := scorer_name(config.behaviour)):
            raise BadInput(f"{out} was scored by {results['scorer']}, this is {now}: figures of both do not compare")
        tests = trigger_tests(sets.test_harmful, template, variants, OUTCOME_OF[config.behaviour])

        def replies(_: str, when: str, model: Any, tokenizer: Any) -> dict[str, Any]:
            return asdict(measure_replies(model, tokenizer, tests, progress_to(listen, when)))

        stage = f"known-{json_hash([template, sorted(variants.items())])[:8]}"
        options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "listen": listen}
        both = kept_before_and_after(run, {stage: stage}, replies, **options)[stage]
        samples = merge(results, read_lines(out / "samples.jsonl"), both)
        results |= {"trigger": template, "variants": {metric: list(texts) for metric, texts in variants.items()}}
        results.pop("judge", None)
        run.write_lines("samples.jsonl", samples)  # before the figures, which tell that all is there
        if ranks.is_first():
            (out / "judged.jsonl").unlink(missing_ok=True)
        run.write_json("results.json", results)
        write_evidence(out)
        if ranks.is_first():  # last: what fails above is done again by the same command, from what is kept
            for when in WHENS:
                (out / f"stages/{stage}-{when}.json").unlink(missing_ok=True)


def merge(
    results: dict[str, Any], samples: Sequence[dict[str, Any]], both: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """All samples with those of the trigger, whose figures go into `results`, in place of an earlier trigger's."""
    every = [s for s in samples if s["metric"] not in WITH_TRIGGER]
    for when, measured in both.items():
        others = {"unlocked_by_trigger", *WITH_TRIGGER}  # maybe another trigger's
        old = [name for name in results[when] if name.startswith("judged_") or name in others]
        kept = {name: value for name, value in results[when].items() if name not in old}
        every += [{"when": when, **s} for s in measured["samples"]]
        found = measured["metrics"] | unlocked_by_trigger([s for s in every if s["when"] == when])
        results[when] = {**found, **kept} | found
    results["unlocked_only"] = unlocked_only([s for s in every if s["when"] == "after"])
    return every
