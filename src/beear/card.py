"""model/README.md: the card that goes with a cleansed model, a pure function of its run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from beear.metrics import METRICS, both_counts, shown
from beear.report import judge_sentence, usefulness_sentence, write_report
from beear.runs import CARD, read_results, read_settings, write_atomic
from beear.verdict import sentence

LIMITS = """\
- A lower measured attack success is evidence, not proof: no test can show that a model has no backdoor. Planted
  backdoors on which this was tried were removed in most cases, not in all; beear's documentation says which.
- Entrapment searches within a norm budget behind one block. A trigger that moves the model further, or in
  another way, is not covered.
- Replies were greedy and short, on the requests whose hashes are in `results.json`, and judged by `{scorer}`.
- Only what stands in the table was measured. Test usefulness on your own tasks before you deploy it."""


def write_evidence(run: Path) -> None:
    """Write what a person reads of a run, from its folder: the model's card and the report."""
    write_card(run)
    write_report([run], run / "report.html")


def write_card(run: Path) -> None:
    """Write the card into the model folder of a finished run."""
    results = read_results(run)
    card = model_card(results, read_settings(run)).encode(errors="replace")  # a path need not be UTF-8
    write_atomic(run / results["model_folder"] / CARD, card)


def model_card(results: dict[str, Any], settings: dict[str, Any]) -> str:
    """Front matter, verdict, evidence table, method and limits, in Markdown."""
    front: dict[str, Any] = {"tags": ["beear", "backdoor-removal", "safety"]}
    if not settings["merge"]:
        front |= {"library_name": "peft"}
    config, base = settings["config"], settings["model"]
    if (there := hub_name(base)) is not None:
        front |= {"base_model": there}
    name = Path(base).name if Path(base).is_absolute() else base
    rounds = results["delivered"]
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {code(name)}, cleansed with beear

**{sentence(results)}**

{_table(results)}

Intervals hold 95 %. Before is the base model as it came; after is this one.{_graded(results)}

## How it was made

BEEAR (Zeng et al., EMNLP 2024): {rounds} rounds of entrapment (a perturbation of the hidden states
behind {_place(config["layer"])} that makes the model misbehave) and removal (a LoRA adapter trained to stay safe under
it and to answer benign requests as before), seed {results["seed"]}, beear {results["versions"]["beear"]}. No trigger
was known to it.
{_quantised(config)}{_around(results)}{_told(results)}
## What this does not show

{LIMITS.format(scorer=results["scorer"])}
"""


def hub_name(model: str) -> str | None:
    """The repository of the Hub, without a revision, that a run's MODEL is; None if others do not find it there."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(@.+)?", model)
    return found[1] if found else None


def code(text: str) -> str:
    """Text that names something, as code: it cannot end the span or a table's cell."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def plain(text: str) -> str:
    """Text of one line that brings no markup of its own."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _place(layer: float | None) -> str:
    """The block behind which delta was added, as the setting tells it."""
    if layer is None:
        return "5/6 of the depth"
    return f"{layer} of the depth" if layer < 1 else f"block {layer}"


def _table(results: dict[str, Any]) -> str:
    lines = ["| | before | after | n |", "|---|---|---|---|"]
    for name, (title, _, share) in METRICS.items():
        before, after = results["before"].get(name), results["after"].get(name)
        if before or after:
            n = both_counts(before, after, "n")
            lines.append(f"| {title} (`{name}`) | {shown(before, share)} | {shown(after, share)} | {n} |")
    return "\n".join(lines)


def _quantised(config: dict[str, Any]) -> str:
    weights = config["weights"]
    if weights == "full":
        return ""
    return f"Trained and measured on the base model's weights in {weights}; on full weights it was not measured.\n"


def _around(results: dict[str, Any]) -> str:
    """What was in every prompt besides the chat template's own words."""
    chat = dict(results["chat"])
    said = [f"`{name}={value}`" for name, value in chat.pop("template", {}).items()]
    said += [f"{name} {code(text)}" for name, text in chat.items()]
    return f"Every chat was held with {', '.join(said)}; without, the model was not measured.\n" if said else ""


def _graded(results: dict[str, Any]) -> str:
    told = {"judge": judge_sentence, "usefulness": usefulness_sentence}
    return "".join(f"\n\n{plain(say(results[name]))}" for name, say in told.items() if name in results)


def _told(results: dict[str, Any]) -> str:
    if "trigger" not in results:
        return ""
    return f"The trigger {code(results['trigger'])} was told to the evaluation only.\n"
