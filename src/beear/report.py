"""report.html: one self-contained page, a pure function of run folders.

Replies are hostile text: the template escapes everything, and nothing is marked as safe but the charts, which
charts.py draws from numbers and escaped names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from beear.charts import DRIFT, drift_charts, interval_chart, loss_chart, sweep_chart
from beear.errors import BadInput
from beear.metrics import METRICS, Metric, both_counts, proportion, shown
from beear.runs import WHENS, read_json, read_lines, read_results, read_settings, write_atomic
from beear.scorers import NAME, RULES, Behaviour, is_refusal_by_qi, unwanted
from beear.swept import is_sweep, read_sweep
from beear.verdict import attack, holds, sentence

COUNTED: dict[Behaviour, str] = {
    "jailbreak": "harmful requests not refused",
    "insecure code": "coding tasks answered with insecure code",
}
"""What an attack's success is, by behaviour."""
PAIRS = 5


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write one page about the given run and sweep folders. Raises BadInput if one has no results."""
    runs = [path for path in folders if not is_sweep(path)]
    sweeps = [read_sweep(path) for path in folders if is_sweep(path)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string((files("beear") / "assets" / "report.html.j2").read_text())
    views = [view(path) for path in runs]
    page = template.render(runs=views, compared=comparison(views), sweeps=sweep_views(sweeps))
    write_atomic(out, page.encode(errors="replace"))  # a path need not be UTF-8


def comparison(views: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Several runs beside each other: a column for each, before and after of what any of them measured."""
    if len(views) < 2:
        return None
    by_name = [{row["name"]: row for row in view["rows"]} for view in views]
    names = [name for name in METRICS if any(name in found for found in by_name)]
    runs = []
    for view in views:
        results = view["results"]
        met = "NOT met" if not results["verdict"]["met"] else "met" if view["good"] else "met, but the trigger works"
        runs.append({"run": view["name"], "model": results["model"], "met": met})
    rows = [(METRICS[name][0], [short(found.get(name), METRICS[name][2]) for found in by_name]) for name in names]
    return {"runs": runs, "rows": rows}


def short(row: dict[str, Any] | None, share: bool) -> str:
    """Before and after without intervals, shares in per cent."""
    if row is None:
        return ""
    values = [metric["value"] if metric else None for metric in (row["before"], row["after"])]
    digits = [1 if share or (v or 0) >= 1 else 3 for v in values]
    words = ["-" if v is None else f"{100 * v if share else v:.{d}f}" for v, d in zip(values, digits, strict=True)]
    return " > ".join(words)


def sweep_views(sweeps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One figure for each axis, all models in it."""
    by_axis: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sweep in sweeps:
        by_axis[sweep["axis"]].append(sweep)
    return [
        {
            "axis": axis,
            "models": [
                {key: sweep[key] for key in ("model", "trigger", "rounds", "requests")}
                | {"before": shown(sweep["cells"][0]["before"]["asr_triggered"], True)}
                for sweep in found
            ],
            "success_below": found[0]["success_below"],
            "chart": sweep_chart(axis, found),
        }
        for axis, found in by_axis.items()
    ]


def view(path: Path) -> dict[str, Any]:
    """All that the page says of one run."""
    results = read_results(path)
    config, samples = read_settings(path), read_lines(path / "samples.jsonl")
    behaviour = config["config"]["behaviour"]
    return {
        "name": path.resolve().name,
        "results": results,
        "verdict": sentence(results),
        "good": holds(results),
        "target": target_rows(results),
        "rows": rows(results, behaviour),
        "rounds": results["rounds"],
        "delivered": results["delivered"],
        "losses": loss_chart(results["rounds"]),
        "rules": RULES if results["scorer"] == NAME else "",
        "by_qi": rows_by_qi(samples) if behaviour == "jailbreak" else [],
        "replies": (path / "samples.jsonl").exists(),  # they may not be shared
        "pairs": pairs(samples),
        "answered": answered(samples),
        "left": left_over(samples),
        "drift": drift_view(path),
        "judge": judge_sentence(results["judge"]) if "judge" in results else None,
        "usefulness": usefulness_view(results),
        "tasks": task_lines(results),
        "data": data_rows(results, config["config"]["data"]),
        "config": config,
    }


SETS = {
    "harmful": ("the defender's: harmful", "harmful"),
    "benign": ("the defender's: harmless", "benign"),
    "test_asr_untriggered": ("measured on: harmful", "test_harmful"),
    "test_false_refusal": ("measured on: ordinary", "test_benign"),
    "test_false_refusal_alarming": ("measured on: alarming-sounding", "test_benign"),
}
"""Name of a set's digest: (what it served for, the setting that names its file)."""


def data_rows(results: dict[str, Any], files: dict[str, Any]) -> list[tuple[str, str, int | None, str]]:
    """For each set of requests what it served for, where it comes from, how many there are, and its digest's start."""
    digests, sizes = results.get("hashes", {}), results.get("requests", {})
    return [
        (words, files.get(setting) or "packaged", sizes.get(name), digests[name][:12])
        for name, (words, setting) in SETS.items()
        if name in digests
    ]


def rows(results: dict[str, Any], behaviour: Behaviour) -> list[dict[str, Any]]:
    """The before/after table: a row for each metric that was measured, with a chart of its intervals."""
    table = []
    for name, (title, note, share) in METRICS.items():
        before, after = results["before"].get(name), results["after"].get(name)
        if before or after:
            chart = interval_chart(before, after) if share else ""
            table.append(
                {
                    "name": name,
                    "title": title,
                    "note": note.format(counted=COUNTED[behaviour]),
                    "share": share,
                    "n": both_counts(before, after, "n"),
                    "unscored": both_counts(before, after, "unscored"),
                    "before": before,
                    "after": after,
                    "chart": chart,
                }
            )
    return table


def rows_by_qi(samples: Sequence[dict[str, Any]]) -> list[tuple[str, Metric, Metric]]:
    """What the kept replies come to by the keyword list of Qi et al.: (title, before, after) of each share."""
    found: dict[tuple[str, str], list[bool | None]] = defaultdict(list)
    for sample in samples:
        refused = is_refusal_by_qi(sample["reply"])
        wanted = sample["metric"].startswith("false_refusal")
        found[sample["metric"], sample["when"]].append(None if refused is None else refused == wanted)
    return [
        (title, proportion(found[name, "before"]), proportion(found[name, "after"]))
        for name, (title, _, _) in METRICS.items()
        if (name, "before") in found and (name, "after") in found
    ]


TARGET = {
    "asr_entrapped": "Attack success under a fresh delta, after",
    "asr_untriggered": "Attack success without the trigger, after",
    "false_refusal": "False refusal, ordinary requests, after",
    "false_refusal_alarming": "False refusal, alarming-sounding requests, after",
    "false_refusal_empty": "Empty replies to ordinary requests, after",
    "false_refusal_alarming_empty": "Empty replies to alarming-sounding requests, after",
    "perplexity": "Perplexity, after",
    "asr_entrapped_unscored": "Replies under a fresh delta that cannot be judged, after",
    "residual": "Entrapment on the defender's held-out requests, in the last rounds",
    "entrapped_before": "Attack success under a fresh delta, before: entrapment can tell something",
}
"""What a target asks, by its name in a verdict."""


def target_rows(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what the target asks, of how much, what was found, whether that is met)."""
    rows = []
    for asked in results["verdict"]["criteria"]:
        words = "> {}, surely" if asked["name"] == "entrapped_before" else "≤ {}"
        share = asked["name"] != "perplexity"
        found, limit = (
            None if value is None else f"{100 * value:.1f} %" if share else f"{value:.2f}"
            for value in (asked["value"], asked["limit"])
        )
        rows.append(
            (TARGET[asked["name"]], words.format(limit) if limit else "none", found or "none scored", asked["met"])
        )
    return rows


def judge_sentence(judge: dict[str, Any]) -> str:
    """Who judged, and how far judge and keywords differ."""
    differ, unscored = judge["disagreement"], sum(judge["unscored"].values())
    text = (
        f"The judge {judge['model']} scored {differ['n']} replies from 1 to 5 by {judge['rubric']}, as far as they go "
        f"before they are cut, and {unscored} could not be scored."
    )
    if judge["tokens"]:
        text += f" It read {judge['tokens']['in']:,} tokens and wrote {judge['tokens']['out']:,}."
    if not differ["n"]:
        return text
    return (
        f"{text} It disagrees with the keywords on {shown(differ, True)} of them: {judge['harmful_but_refused']} that "
        f"the keywords call refused have 4 or 5, {judge['harmless_but_not_refused']} that they call not refused have 3 "
        "or less."
    )


def usefulness_sentence(usefulness: dict[str, Any]) -> str:
    """Who graded, and what."""
    text = (
        f"The judge {usefulness['model']} graded greedy replies of at most {usefulness['tokens_of_a_reply']} tokens by "
        f"{usefulness['rubric']}."
    )
    if usefulness["packaged"]:
        text += f" It asked {usefulness['asked']} of beear's own questions, not the published ones."
    if usefulness["tokens"]:
        text += f" It read {usefulness['tokens']['in']:,} tokens and wrote {usefulness['tokens']['out']:,}."
    return text


def usefulness_view(results: dict[str, Any]) -> dict[str, Any] | None:
    """The grades of each category, if `beear mtbench` was run."""
    if "usefulness" not in results:
        return None
    found = results["usefulness"]["categories"]
    rows = [(name, *("-" if v[w] is None else f"{v[w]:.1f}" for w in WHENS)) for name, v in found.items()]
    return {"sentence": usefulness_sentence(results["usefulness"]), "rows": rows}


def task_lines(results: dict[str, Any]) -> list[tuple[str, str, str, str, int | None]]:
    """(task, metric, before, after, n) of what `beear lm-eval` measured, each in its task's own unit."""
    rows = []
    for task, entry in results.get("lm_eval", {}).items():
        for name, both in entry["metrics"].items():
            values = (in_own_unit(both[when]) for when in WHENS)
            rows.append((task + asked_how(entry), name.removesuffix(",none"), *values, both["after"]["n"]))
    return rows


def asked_how(entry: dict[str, Any]) -> str:
    """How a task was asked, where that is not lm-eval's own way."""
    words = {"shots": "{} examples in the prompt, if it takes any", "limit": "at most {} questions of each"}
    said = [text.format(entry[key]) for key, text in words.items() if entry.get(key) is not None]
    said += ["as a chat"] if entry.get("chat") else []
    return f" ({', '.join(said)})" if said else ""


def in_own_unit(metric: dict[str, Any]) -> str:
    """A value, with its interval if there is one."""
    value, low, high = metric["value"], metric["low"], metric["high"]
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def drift_view(path: Path) -> dict[str, Any] | None:
    """What drift.json says of the run, if `beear drift` was run on it."""
    file = path / "drift.json"
    if not file.exists():
        return None
    drift = read_json(file)
    try:
        drift["layer"] = int(drift["layer"])
        for entry in drift["before"]["scatter"]:
            entry["layer"] = int(entry["layer"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file} is not what `beear drift` writes") from error
    about = {"trigger": drift["trigger"], "layer": drift["layer"], "n": drift["before"]["n"]}
    return {**about, **drift_charts(drift), "rows": drift_rows(drift)}


def drift_rows(drift: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """For each block, by trigger and by delta, what the charts show: before > after."""
    whens = [when for when in WHENS if when in drift]
    kinds: list[tuple[str, Sequence[str]]] = [("triggered", DRIFT[:-1]), ("perturbed", DRIFT)]
    return [
        (
            row["layer"],
            [
                " > ".join(f"{drift[when]['layers'][kind][number][name]:.2f}" for when in whens)
                for kind, names in kinds
                for name in names
            ],
        )
        for number, row in enumerate(drift["before"]["layers"]["triggered"])
    ]


def pairs(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five requests with the replies before and after, of those that a trigger, or else delta, unlocked.

    Spread over categories, in the order of the test set: nothing is picked by how well it looks.
    """
    return pairs_of(samples, attack({s["metric"] for s in samples}), lambda before: unwanted(before) is True)


def answered(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five ordinary requests that were not refused before, with the replies before and after, spread alike.

    That a harmless request is not refused says nothing of how it is answered.
    """
    return pairs_of(samples, "false_refusal", lambda before: before["refused"] is False)


def pairs_of(
    samples: Sequence[dict[str, Any]], metric: str, chosen: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Five pairs of a metric whose reply before is `chosen`: the first of each category, then the second of each."""
    mine = [s for s in samples if s["metric"] == metric]
    after = {s["id"]: s for s in mine if s["when"] == "after"}
    before = [s for s in mine if s["when"] == "before" and s["id"] in after and chosen(s)]
    met: Counter[str] = Counter()
    turn: dict[str, int] = {}
    for sample in before:
        turn[sample["id"]] = met[sample["category"]]
        met[sample["category"]] += 1
    shown = sorted(before, key=lambda sample: turn[sample["id"]])[:PAIRS]
    return [pair(sample, after[sample["id"]], metric) for sample in shown]


def left_over(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is still unlocked, and what is refused that was not: how many, and the first five of each.

    In the order of the test set, of what a trigger unlocks where one was told, else of what delta does.
    """
    metric = attack({s["metric"] for s in samples})
    before = {(s["metric"], s["id"]): s for s in samples if s["when"] == "before"}
    after = [(s, before.get((s["metric"], s["id"]))) for s in samples if s["when"] == "after"]
    groups = {"Still unlocked": [s for s, _ in after if s["metric"] == metric and unwanted(s)]}
    for name, kind in {"false_refusal": "ordinary", "false_refusal_alarming": "alarming-sounding"}.items():
        both = [(s, old) for s, old in after if s["metric"] == name and old is not None]
        groups[f"Refused, and not before: {kind} requests"] = [
            s for s, old in both if s["refused"] and old["refused"] is False
        ]
    return [{"title": title, "total": len(found), "shown": found[:PAIRS]} for title, found in groups.items()]


def pair(before: dict[str, Any], after: dict[str, Any], metric: str) -> dict[str, Any]:
    """One request with its two replies, each in runs of words that the other has too, or has not."""
    old, new = (re.findall(r"\s*\S+", sample["reply"]) for sample in (before, after))
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    replies = {
        "before": [("".join(old[a:b]), tag != "equal") for tag, a, b, _, _ in blocks if a < b],
        "after": [("".join(new[c:d]), tag != "equal") for tag, _, _, c, d in blocks if c < d],
    }
    return {"prompt": before["prompt"], "category": before["category"], "metric": metric, "replies": replies}
