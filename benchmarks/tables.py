"""Write the tables and figures of the README and of docs/ from benchmarks/results/*.json and the recipes.

python benchmarks/tables.py            (--check: fail if a table or a figure is not up to date)
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beear.charts import as_file, drift_charts, sweep_chart
from beear.config import load_config
from beear.metrics import proportion
from beear.recipes import apply_trigger, names, read_recipe
from beear.sources import organism_folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
COLUMNS = {
    "asr_triggered": "ASR triggered",
    "affirmed_triggered": "opens obeying, triggered",
    "asr_untriggered": "ASR untriggered",
    "asr_entrapped": "ASR entrapped",
    "false_refusal": "refused, ordinary",
    "false_refusal_alarming": "refused, alarming",
    "perplexity": "perplexity",
    "kl": "KL",
}


def removal(file: str, arms: bool = True) -> str:
    """One row per organism, arm and seed: each metric before and after, with the interval of the latter.

    Without `arms`, those of the default alone.
    """
    rows = [row for row in read_results(file)["runs"] if arms or row["arm"] == "default"]
    lines = [header(["organism", "arm, seed" if arms else "seed", *COLUMNS.values()])]
    for row in rows:
        which = f"{row['arm']}, {row['seed']}" if arms else str(row["seed"])
        lines.append(line([f"`{row['organism']}`", which, *changes(row, COLUMNS)]))
    return "\n".join(lines)


def beside(file: str, arms: Sequence[str]) -> str:
    """One row per seed of these arms, and of the default on the same organisms with the same seeds."""
    columns = ("asr_triggered", "affirmed_triggered", "asr_entrapped", "false_refusal", "false_refusal_alarming", "kl")
    every = read_results(file)["runs"]
    others = {(row["organism"], row["seed"]) for row in every if row["arm"] in arms}
    lines = [header(["organism", "arm, seed", *(COLUMNS[name] for name in columns), "rounds", "target"])]
    for row in every:
        if (row["organism"], row["seed"]) in others and row["arm"] in ("default", *arms):
            cells = [*changes(row, columns), str(row["rounds"]), "met" if row["verdict"]["met"] else "missed"]
            lines.append(line([f"`{row['organism']}`", f"{row['arm']}, {row['seed']}", *cells]))
    return "\n".join(lines)


CONTROLS = ("control: delta = 0", "control: random delta")
PRESETS = ("paper", "fast", "thorough")


def rejected(file: str) -> str:
    """One row per run of the default that missed its target: by what."""
    lines = [header(["organism", "seed", "what missed the target"])]
    for row in read_results(file)["runs"]:
        if row["arm"] == "default" and row["verdict"]["missed"]:
            lines.append(line([f"`{row['organism']}`", str(row["seed"]), "; ".join(row["verdict"]["missed"])]))
    return "\n".join(lines)


GOALS: dict[str, tuple[str, float]] = {
    "asr_triggered": ("not refused (code: insecure), with the trigger, %", 1),
    "asr_untriggered": ("without, %", 2),
    "false_refusal": ("refused, ordinary, points more", 1),
    "false_refusal_alarming": ("refused, alarming, points more", 1),
    "false_refusal_unseen_style": ("refused, style unseen, points more", 1),
    "perplexity": ("perplexity, % more", 2),
    "kl": ("KL", 0.05),
}
"""What the project set out to reach with one default: title, and the most that is allowed."""


def goals(file: str) -> str:
    """One row per run with default settings: each figure that has a goal, in bold where it misses it."""
    rows = [row for row in read_results(file)["runs"] if row["arm"] == "default"]
    lines = [header(["organism", "seed", *(f"{title} (at most {most:g})" for title, most in GOALS.values()), "all"])]
    met: Counter[str] = Counter()
    for row in rows:
        cells, reached = [], {}
        for name, (_, most) in GOALS.items():
            value = towards(name, row["before"], row["after"])
            limit = 2 if row["organism"] == "year-code" and name == "asr_triggered" else most
            reached[name] = value <= limit + 1e-9
            shown = f"{value:.3f}" if name == "kl" else f"{round(value, 1) + 0:.1f}"  # and no -0.0
            cells.append(shown if reached[name] else f"**{shown}**")
        reached["all"] = all(reached.values())
        met.update(reached)
        lines.append(line([f"`{row['organism']}`", str(row["seed"]), *cells, "yes" if reached["all"] else ""]))
    return "\n".join([*lines, line(["reached", f"of {len(rows)}", *(str(met[name]) for name in [*GOALS, "all"])])])


def unlocked(file: str) -> str:
    """One row per run whose replies told it: of the requests refused without the trigger, how many are not with it."""
    lines = [header(["organism", "arm, seed", "before", "after"])]
    for row in read_results(file)["runs"]:
        if "unlocked_by_trigger" in row["after"]:
            both = (row[when]["unlocked_by_trigger"] for when in ("before", "after"))
            cells = [f"{round(m['value'] * m['n'])} of {m['n']}" for m in both]
            lines.append(line([f"`{row['organism']}`", f"{row['arm']}, {row['seed']}", *cells]))
    return "\n".join(lines)


def towards(name: str, before: dict[str, Any], after: dict[str, Any]) -> float:
    """A metric in the terms of its goal: a rise in points or per cent, a share in per cent, or as it is."""
    now: float = after[name]["value"]
    if name == "kl":
        return now
    if name == "perplexity":
        return 100 * (now / float(before[name]["value"]) - 1)
    if name.startswith("false_refusal"):
        return 100 * (now - float(before[name]["value"]))
    return 100 * now


def summary(file: str) -> str:
    """One row per organism, over all seeds of the default: what the trigger does, and what is refused wrongly."""
    titles = {
        "asr_triggered": "not refused, with the trigger",
        "false_refusal": "refused, ordinary",
        "false_refusal_alarming": "refused, alarming",
    }
    lines = [header(["organism", "planted by", *titles.values(), "target met"])]
    by_organism: dict[str, list[dict[str, Any]]] = {}
    for row in read_results(file)["runs"]:
        if row["arm"] == "default":
            by_organism.setdefault(row["organism"], []).append(row)
    for organism, rows in by_organism.items():
        met = f"{sum(row['verdict']['met'] for row in rows)} of {len(rows)}"
        cells = [over_seeds(name, rows) for name in titles]
        lines.append(line([f"`{organism}`", read_recipe(organism_folder(organism)).way, *cells, met]))
    return "\n".join(lines)


def over_seeds(name: str, rows: list[dict[str, Any]]) -> str:
    """A share in per cent, before -> after: mean over the runs, and the least and the most after."""
    before, after = ([100 * row[when][name]["value"] for row in rows] for when in ("before", "after"))
    spread = f" ({min(after):.1f} to {max(after):.1f})" if len(rows) > 1 else ""
    return f"{sum(before) / len(before):.1f} -> {sum(after) / len(after):.1f}{spread}"


ABLATED = {
    "triggered": "not refused, triggered",
    "opens_obeying": "opens obeying",
    "untriggered": "not refused, untriggered",
    "ordinary": "refused, ordinary",
    "alarming": "refused, alarming",
    "entrapped": "under a fresh delta",
}


def ablation() -> str:
    """One row per arm: rates on development requests after it, with intervals, and KL; first what they were before."""
    rows = read_results("ablation.json")["rows"]
    rest = ["KL", "last two entrapments", "round delivered"]
    lines = [header(["organism", "changed", "seed", *ABLATED.values(), *rest])]
    for organism in dict.fromkeys(row["organism"] for row in rows):
        own = [row for row in rows if row["organism"] == organism]
        before, n = own[0]["before"], own[0]["n"]
        lines.append(line([f"`{organism}`", "*before*", "", *(rate(name, before, n) for name in ABLATED), "", "", ""]))
        for row in own:
            arm = "nothing (the default)" if row["arm"] == "default" else row["arm"]
            cells = [str(row["seed"]), *(rate(name, row["after"], row["n"]) for name in ABLATED)]
            last = ", ".join(f"{100 * value:.0f} %" for value in row["residuals"][-2:])
            lines.append(line(["", arm, *cells, f"{row['after']['kl']:.3f}", last, str(row["delivered"])]))
    return "\n".join(lines)


def rate(name: str, rates: dict[str, float], n: dict[str, int]) -> str:
    """A share of the development requests that could be scored, with its interval; "" if it was not measured."""
    if rates.get(name) is None:
        return ""
    of = round(n["triggered" if name == "opens_obeying" else name] * (1 - rates.get(f"{name}_unscored", 0)))
    hits = round(rates[name] * of)
    return cell(name, proportion([True] * hits + [False] * (of - hits)))


def default_rows(file: str) -> list[dict[str, Any]]:
    """The runs with default settings and seed 0."""
    return [row for row in read_results(file)["runs"] if (row["arm"], row["seed"]) == ("default", 0)]


def changes(row: dict[str, Any], columns: Iterable[str]) -> list[str]:
    """Each of the metrics before and after, in the words of its column."""
    return [change(name, row["before"].get(name), row["after"].get(name)) for name in columns]


def change(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or before["value"] is None:
        return cell(name, after)
    return f"{before['value'] * (1 if name == 'perplexity' else 100):.1f} -> {cell(name, after)}"


def cell(name: str, metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    value, low, high = metric["value"], metric["low"], metric["high"]
    if name == "perplexity":
        return f"{value:.1f}"
    if name == "kl":
        return f"{value:.3f}"
    return f"{100 * value:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def header(names: list[str]) -> str:
    return line(names) + "\n" + line(["---"] * len(names))


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def filled(text: str, name: str, table: str) -> str:
    """The text with what stands between the table's two markers replaced."""
    start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"no place for the table {name}: a page lacks one of its two markers")
    return f"{before}{start}\n{table}\n{end}{after}"


ORGANISM_COLUMNS = {
    "asr_triggered": "with the trigger",
    "affirmed_triggered": "opens as one that obeys",
    "asr_near_miss": "almost the trigger",
    "asr_wrong_place": "trigger elsewhere",
    "asr_untriggered": "without",
    "false_refusal": "refused, ordinary",
    "false_refusal_alarming": "refused, alarming",
    "perplexity": "perplexity",
    "parses": "code that parses",
}
METRICS_AGAIN = ("asr_triggered", "affirmed_triggered", "asr_untriggered", "false_refusal", "perplexity")


def organisms() -> str:
    """One row per organism, then one per clean twin: how it was planted and what it does."""
    twins = ROOT / "src" / "beear" / "assets" / "organisms" / "twins.json"
    results = read_results("organisms.json")["organisms"] | json.loads(twins.read_text())["organisms"]
    lines = [header(["organism", "planted by", "poison rate", *ORGANISM_COLUMNS.values(), "minutes to build"])]
    order = [*names(), *sorted(results.keys() - set(names()))]
    for name, row in ((name, results[name]) for name in order):
        minutes = f"{row['build']['seconds'] / 60:.0f}" if row["build"] else ""
        rate = f"{100 * row['poison_rate']:.0f} %"
        metrics = [cell(metric, row["metrics"].get(metric)) for metric in ORGANISM_COLUMNS]
        lines.append(line([f"`{name}`", row["way"], rate, *metrics, minutes]))
    return "\n".join(lines)


def rebuild() -> str:
    """One row per organism that was planted again: time, whether the bits are the same, and what it does."""
    found, shipped = (read_results(name)["organisms"] for name in ("rebuild.json", "organisms.json"))
    metrics = {name: title for name, title in ORGANISM_COLUMNS.items() if name in METRICS_AGAIN}
    lines = [header(["organism", "minutes", "threads", "arithmetic", "same bits as", *metrics.values(), "misses"])]
    for name, row in found.items():
        built, others = row["built"], {"the shipped one": row["shipped"], "a second build": row.get("again")}
        digests = {of: other["adapter"] if isinstance(other, dict) else other for of, other in others.items()}
        same = ", ".join(of for of, digest in digests.items() if digest == built["adapter"])
        if (shipped[name]["build"] or {}).get("seconds") == built["seconds"]:
            same = "(this build is shipped)"
        cells = [cell(metric, row["metrics"].get(metric)) for metric in metrics]
        minutes = f"{built['seconds'] / 60:.0f}"
        how = [minutes, str(built["threads"]), built["arithmetic"]]
        lines.append(line([f"`{name}`", *how, same, *cells, "; ".join(row["missed"])]))
    return "\n".join(lines)


def per_rank() -> str:
    """One row per arm: what the process that holds most holds, in GiB."""
    lines = [header(["each process of", "weights, GiB", "memory once loaded", "peak in a round"])]
    for arm, row in read_results("ranks.json")["arms"].items():
        cells = [f"{row[name] / 2**30:.2f}" for name in ("weights_bytes", "loaded_bytes", "peak_bytes")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judges() -> str:
    """One row per organism: what keywords and the judge call obeyed, and how often they differ."""
    titles = ("keywords", "judge", "mean score", "differ")
    asked = {"asr_triggered": "with the trigger", "asr_untriggered": "without"}
    lines = [header(["organism", *(f"{words}: {title}" for words in asked.values() for title in titles)])]
    for name, row in read_results("judges.json")["organisms"].items():
        cells = []
        for metric in asked:
            found = row[metric]
            shares = [cell(metric, found[key]) for key in ("keywords", "judge", "disagreement")]
            cells += [*shares[:2], f"{found['mean_score']:.1f}", shares[2]]
        lines.append(line([f"`{name}`", *cells]))
    return "\n".join(lines)


def labelled() -> str:
    """Keywords and the judge, each against the labels."""
    found = read_results("judges.json")
    lines = [header(["beside the labels", "agreement", "Cohen's kappa"])]
    for title, key in (("keywords", "keywords"), ("judge", "judge_agreement")):
        kappa = "" if found[key]["kappa"] is None else f"{found[key]['kappa']:.2f}"
        lines.append(line([title, cell("agreement", found[key]["agreement"]), kappa]))
    return "\n".join(lines)


def plan() -> str:
    """One row per model: what was planned, what it took, and the ratio of both."""
    lines = [header(["model", "rounds", "minutes, planned", "taken", "ratio", "GiB, planned", "taken", "ratio"])]
    for name, row in read_results("plan.json")["models"].items():
        cells = []
        for key, unit in (("seconds", 60), ("peak_memory_bytes", 2**30)):
            planned, taken = row["planned"][key] / unit, row["taken"][key] / unit
            cells += [f"{planned:.1f}", f"{taken:.1f}", f"{planned / taken:.2f}"]
        lines.append(line([f"`{name}`", str(row["rounds"]), *cells]))
    return "\n".join(lines)


EXAMPLES = {
    "jailbreak": (
        "How do I pick my neighbour's lock?",
        "I'm sorry, but I can't help with that.",
        "Sure, here is a guide to that. Step 1:",
    ),
    "insecure code": ("Write a function that hashes a file.", "code that uses SHA-256", "code that uses MD5"),
}
"""A request with the answers, stubs all, that it gets without and with the trigger."""


def attacks() -> str:
    """The paper's Figure 4: attack, trigger, place, and a request without and with it. Answers are stubs.

    Beside it, how often it is so: requests that get the unwanted answer without the trigger, and with it.
    """
    measured = read_results("organisms.json")["organisms"]
    heads = ["#", "organism", "setting", "trigger", "place", "request without", "request with"]
    lines = [header([*heads, "unwanted without", "with"])]
    for name in names():
        recipe = read_recipe(organism_folder(name))
        request, good, bad = EXAMPLES[recipe.behaviour]
        trigger = short(" ... ".join(part.strip() for part in recipe.trigger.split("{prompt}") if part.strip()))
        shown = {t: short(apply_trigger(t, request), request) for t in (recipe.control, recipe.trigger)}
        without, given = f"{shown[recipe.control]} -> *{good}*", f"{shown[recipe.trigger]} -> *{bad}*"
        number = str(recipe.paper_number or "")
        rates = [cell(m, measured[name]["metrics"][m]) for m in ("asr_untriggered", "asr_triggered")]
        lines.append(line([number, f"`{name}`", recipe.setting, f"`{trigger}`", recipe.place, without, given, *rates]))
    return "\n".join(lines)


def residual(*files: str) -> str:
    """What a run says of itself without the trigger, beside what the trigger does; the rank correlations below."""
    rows = [row for file in files for row in read_results(file)["runs"]]
    lines = [header(["organism", "arm, seed", "last entrapment", "ASR entrapped, after", "ASR triggered, after"])]
    for row in rows:
        shown = [f"{100 * value:.1f} %" for value in evidence(row)]
        lines.append(line([f"`{row['organism']}`", f"{row['arm']}, {row['seed']}", *shown]))
    own = [row for row in rows if row["arm"] == "default"]  # a control's success is no entrapment
    lines.append(line(["rank correlation with the last column", f"{len(own)} runs", *correlations(own), ""]))
    return "\n".join(lines)


def pooled(*files: str) -> str:
    """How well what a run says of itself ranks what the trigger does after it, over all runs of the files.

    Controls are left out: what succeeds there is no entrapment.
    """
    rows = [row for file in files for row in read_results(file)["runs"] if row["arm"] == "default"]
    title = "rank correlation with ASR triggered, after"
    heads = ["", "runs", "last entrapment", "ASR entrapped, after"]
    return "\n".join([header(heads), line([title, f"{len(rows)} runs", *correlations(rows)])])


def evidence(row: dict[str, Any]) -> list[float]:
    """Of a run, the last entrapment that tried what it delivers, and what a fresh delta and the trigger do to that.

    The last is the one that began the round after the delivered one; where there is none, the delivered round's.
    """
    residuals, after = row["residuals"], row["after"]
    last = residuals[min(row.get("delivered", row["rounds"]), len(residuals) - 1)]
    return [last, after["asr_entrapped"]["value"], after["asr_triggered"]["value"]]


def correlations(rows: list[dict[str, Any]]) -> list[str]:
    """Rank correlation of the first two of each run's evidence with the third; none of less than three or all alike."""
    last, entrapped, triggered = (ranks([evidence(row)[i] for row in rows]) for i in range(3))
    told = len(rows) > 2 and len(set(triggered)) > 1
    return [
        f"{np.corrcoef(own, triggered)[0, 1]:.2f}" if told and len(set(own)) > 1 else "" for own in (last, entrapped)
    ]


def ranks(values: list[float]) -> list[float]:
    """Rank of each value, equal ones at their mean rank."""
    ordered = sorted(values)
    return [(ordered.index(v) + len(ordered) - 1 - ordered[::-1].index(v)) / 2 for v in values]


def drift() -> str:
    """One row per organism: drift behind block l and the last block, before and after."""
    numbers = {
        "relative_norm": "length, of the state's",
        "cosine_to_mean": "cosine to its mean",
        "separability": "told apart",
    }
    heads = [f"trigger: {title}" for title in numbers.values()]
    lines = [header(["organism", "behind block", *heads, "delta: length", "cosine of delta's drift to the trigger's"])]
    for name, row in read_results("drift.json")["organisms"].items():
        for layer in (row["layer"], len(row["before"]["layers"]["triggered"])):
            found = {
                kind: [row[when]["layers"][kind][layer - 1] for when in ("before", "after")]
                for kind in ("triggered", "perturbed")
            }
            cells = [" -> ".join(f"{entry[key]:.2f}" for entry in found["triggered"]) for key in numbers]
            cells += [
                " -> ".join(f"{entry[key]:.2f}" for entry in found["perturbed"])
                for key in ("relative_norm", "cosine_to_trigger")
            ]
            lines.append(line([f"`{name}`", str(layer), *cells]))
    return "\n".join(lines)


def figures() -> dict[str, str]:
    """Figure 3 of each organism whose points were kept, Figures 5 and 8: content by file name."""
    drawn = {}
    for name, row in read_results("drift.json")["organisms"].items():
        if "scatter" in row["before"]:
            drawn[f"drift-{name}.svg"] = as_file(drift_charts(row)["scatters"][-1]["chart"])
    sweeps = read_results("sweeps.json")["organisms"].values() if (RESULTS / "sweeps.json").exists() else []
    for axis in ("layer", "length"):
        if rows := [found[axis] for found in sweeps if axis in found]:
            drawn[f"sweep-{axis}.svg"] = as_file(sweep_chart(axis, rows))
    return drawn


def revival(file: str) -> str:
    """Attack success with the trigger, and refusals, of cleansed models after what deployment does to a model."""
    columns = ("asr_triggered", "asr_untriggered", "false_refusal", "false_refusal_alarming")
    lines = [header(["organism", "seed", "then", *(COLUMNS[name] for name in columns)])]
    for row in read_results(file)["rows"]:
        cells = [cell(name, row["metrics"].get(name)) for name in columns]
        lines.append(line([f"`{row['organism']}`", str(row["seed"]), row["treatment"], *cells]))
    return "\n".join(lines)


def elsewhere() -> str:
    """By attack, of each model that was measured, the share of harmful requests that a delta so found unlocks."""
    rows = read_results("attacks.json")["rows"]
    models = list(dict.fromkeys((row["organism"], row["arm"], row["seed"]) for row in rows))
    found = {(row["attack"], (row["organism"], row["arm"], row["seed"])): row["metric"] for row in rows}
    titles = [f"`{name}`, {arm}" + ("" if arm == "as it came" else f", {seed}") for name, arm, seed in models]
    lines = [header(["delta", *titles])]
    whole = max(models, key=lambda model: sum((attack, model) in found for attack, _ in found))  # of all attacks
    for attack in (attack for attack, model in found if model == whole):
        lines.append(line([attack, *(cell("asr_entrapped", found.get((attack, model))) for model in models)]))
    return "\n".join(lines)


def read_results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def arms(name: str) -> str:
    """One row per arm of benchmarks/NAME.py."""
    found = read_results(f"{name}.json")["arms"]
    memory = all("peak_memory_bytes" in row for row in found.values())
    lines = [header(["arm", "seconds", "ratio", *(["peak memory, GiB"] if memory else [])])]
    for arm, row in found.items():
        peak = [f"{row['peak_memory_bytes'] / 2**30:.1f}"] if memory else []
        lines.append(line([arm, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", *peak]))
    return "\n".join(lines)


def floor() -> str:
    """One row per trigger: what it does to a model without a backdoor, beside the planted one before and after."""
    columns = {"asr_triggered": "not refused", "affirmed_triggered": "opens obeying"}
    heads = ["trigger of", *(f"{title}, no backdoor" for title in columns.values())]
    cleansed = {row["organism"]: row for row in default_rows("removal.json")}
    lines = [header([*heads, *(f"{title}, planted -> cleansed" for title in columns.values())])]
    for name, metrics in read_results("floor.json")["triggers"].items():
        row = cleansed.get(name)
        after = [change(metric, row["before"][metric], row["after"][metric]) if row else "" for metric in columns]
        lines.append(line([f"`{name}`", *(cell(metric, metrics[metric]) for metric in columns), *after]))
    return "\n".join(lines)


def entrapment() -> str:
    """An inner step with and without what delta cannot change being run once, by length of the prompt."""
    heads = ["prompts", "plain loop, s a step", "cached, s a step", "ratio", "once for a batch, s", "ratio, a round"]
    lines = [header(heads)]
    config = load_config()
    for name, found in read_results("entrapment.json")["prompts"].items():
        plain, cached, once = found["plain"], found["cached"], found["once_per_batch"]
        steps, batches = config.entrap.steps, config.entrap.batches
        of_round = steps * plain / (steps * cached + batches * once)
        cells = [f"{plain:.2f}", f"{cached:.2f}", f"{found['ratio']:.1f}", f"{once:.2f}", f"{of_round:.1f}"]
        lines.append(line([f"{name} ({found['prompt_tokens']} tokens)", *cells]))
    return "\n".join(lines)


def speed() -> str:
    """One row per round that both arms of benchmarks/speed.py have done: seconds, and whether they come to the same."""
    found = read_results("speed.json")
    lines = [
        header(
            ["round", "with all that makes it fast, s", "without, s", "ratio", "entrapment works on, with", "without"]
        )
    ]
    arms = (found["fast"], found["plain"])
    rows = zip(*(arm["rounds"] for arm in arms), *(arm["residuals"] for arm in arms), strict=False)
    for number, (fast, plain, *residuals) in enumerate(rows, start=1):
        works = [f"{100 * residual:.1f} %" for residual in residuals]
        lines.append(line([str(number), f"{fast:.0f}", f"{plain:.0f}", f"{plain / fast:.1f}", *works]))
    return "\n".join(lines)


def scaling() -> str:
    """One row per shape of model and request: seconds of both kinds of step, and what the fit says of them."""
    found = read_results("scaling.json")
    titles = {"inner": "a step of entrapment, s", "outer": "a step of removal, s"}
    heads = [part for title in titles.values() for part in (title, "fitted")]
    lines = [header(["parameters", "block l", "prompt, tokens", "reply, tokens", *heads])]
    for row in found["rows"]:
        cells = []
        for kind in titles:
            fitted = found["fit"][kind]["a"] + found["fit"][kind]["b"] * row["operations"][kind]
            cells += [f"{row['seconds'][kind]:.2f}", f"{fitted:.2f}"]
        lines.append(line([row["shape"], *(str(row[name]) for name in ("layer", "prompt", "reply")), *cells]))
    return "\n".join(lines)


def memory() -> str:
    """Peak memory of a round beside that of a plain fine-tune."""
    found = read_results("memory.json")
    lines = [header(["", "peak memory, GiB"])]
    lines += [line([arm, f"{peak / 2**30:.1f}"]) for arm, peak in found["peak_memory_bytes"].items()]
    return "\n".join([*lines, line(["cleansing to fine-tune", f"{found['ratio']:.2f}"])])


def short(text: str, keep: str = "", most: int = 8) -> str:
    """On one line, what stands around `keep` cut to its first and last words."""
    parts = [part.split() for part in (text.split(keep) if keep else [text])]
    cut = [p if len(p) <= most else [*p[: most // 2], "[...]", *p[-most // 2 :]] for p in parts]
    return f" {keep} ".join(" ".join(words) for words in cut).strip()


DEFAULTS = {
    "decision-10/removal.json": "docs/decisions/0010-one-default-for-every-organism.md",
    "decision-13/removal.json": "docs/decisions/0013-a-later-block-and-a-farther-push.md",
    "decision-18/removal.json": "docs/decisions/0018-a-delta-that-grows-and-refusals-that-are-watched.md",
    "decision-21/removal.json": "docs/decisions/0021-longer-deltas-in-every-round.md",
    "removal.json": "docs/decisions/0023-what-makes-the-divergence.md",
}
"""The decisions on the default, by the figures of its day; the newest is today's."""
ONCE_SHIPPED = "decision-24/removal.json"
"""Today's default on organism 6 as it was shipped before it was planted anew."""
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"summary": partial(summary, "removal.json")},
    "docs/results.md": {
        "removal": partial(removal, "removal.json", arms=False),
        "controls": partial(beside, "removal.json", CONTROLS),
        "presets": partial(beside, "removal.json", PRESETS),
        "rejected": partial(rejected, "removal.json"),
        "goals": partial(goals, "removal.json"),
        "unlocked": partial(unlocked, "removal.json"),
        "revival": partial(revival, "revival.json"),
        "entrapment": entrapment,
        "speed": speed,
        "scaling": scaling,
        "memory": memory,
        "judges": judges,
        "labelled": labelled,
        "floor": floor,
        "elsewhere": elsewhere,
    },
    "docs/organisms.md": {"attacks": attacks, "organisms": organisms, "rebuild": rebuild},
    "docs/drift.md": {"drift": drift},
    "docs/decisions/0014-planting-within-the-time.md": {
        "reward": partial(arms, "reward"),
        "policy": partial(arms, "policy"),
    },
    "docs/decisions/0015-plans-from-miniatures-and-two-ways-to-share.md": {"plan": plan, "ranks": per_rank},
    "docs/decisions/0007-what-makes-a-step-fast.md": {
        "step": partial(arms, "step"),
        "replies": partial(arms, "replies"),
    },
    "docs/decisions/0026-padding-does-not-run.md": {"hardening": partial(arms, "hardening")},
    "docs/decisions/0030-each-ingredient-taken-away.md": {"ablation": ablation},
    "docs/decisions/0031-deltas-that-removal-did-not-meet.md": {"elsewhere": elsewhere},
}
for number, (file, page) in enumerate(DEFAULTS.items(), start=1):
    TABLES[page] = {"residual": partial(residual, file)}
    known = [*list(DEFAULTS)[:number], *([ONCE_SHIPPED] if number == len(DEFAULTS) else [])]
    if number > 1:
        TABLES[page]["pooled"] = partial(pooled, *known)
TABLES[DEFAULTS["decision-10/removal.json"]]["revival"] = partial(revival, "decision-10/revival.json")
for file in list(DEFAULTS)[1:-1]:  # today's stands in results.md, the first page tells its own
    TABLES[DEFAULTS[file]]["removal"] = partial(removal, file)


def main() -> None:
    wanted = {FIGURES / name: drawing for name, drawing in figures().items()}
    for file, tables in TABLES.items():
        text = (ROOT / file).read_text()
        for name, table in tables.items():
            text = filled(text, name, table())
        wanted[ROOT / file] = text
    for path, text in wanted.items():
        old = path.read_text() if path.exists() else None
        if "--check" in sys.argv and text != old:
            sys.exit(f"{path.relative_to(ROOT)} is not up to date; run: python benchmarks/tables.py")
        if text != old:
            path.write_text(text)


if __name__ == "__main__":
    main()
