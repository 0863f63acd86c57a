"""The report is a pure function of the run folder, asks nothing of the network, and runs nothing a model wrote."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from beear.config import make_config
from beear.console import metric_table
from beear.metrics import METRICS, proportion, shown
from beear.report import (
    answered,
    data_rows,
    left_over,
    pair,
    pairs,
    rows,
    rows_by_qi,
    write_report,
)
from beear.scorers import unwanted
from beear.verdict import sentence, still_works
from conftest import FINISHED

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\"'><a href=javascript:alert(3)>"

ROUND = {"budget": 0.5, "harden": [], "residual": 0.0, "refused": [], "seconds": 1.0}


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "low": value * 0.8, "high": min(1.0, value * 1.2), "n": 120, "unscored": 0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    results = FINISHED | {
        "model": HOSTILE,
        "before": {name: metric(0.9) for name in METRICS if name != "kl"},
        "after": {name: metric(0.1) for name in METRICS},
        "rounds": [
            dict(ROUND, round=1, entrap=[3.0, 1.0], harden=[{"safe_under_delta": 2.0}], residual=0.5),
            dict(ROUND, round=2, entrap=[2.0]),
        ],
        "delivered": 2,
        "trigger": HOSTILE,
        "judge": {
            "model": HOSTILE,
            "rubric": "r",
            "disagreement": metric(0.1),
            "unscored": {HOSTILE: 2},
            "tokens": None,
        }
        | {"harmful_but_refused": 3, "harmless_but_not_refused": 9},
        "wall_seconds": 60.0,
        "peak_memory_bytes": 2**30,
        "versions": {"beear": "0"},
        "hashes": {"model": "0" * 64, "harmful": "1" * 64, "test_asr_untriggered": "2" * 64},
        "requests": {"harmful": 280, "test_asr_untriggered": 120},
    }
    samples = [
        {
            "metric": "asr_triggered",
            "when": when,
            "id": str(i),
            "category": f"c{i}",
            "prompt": HOSTILE,
            "reply": HOSTILE,
        }
        | {"refused": when == "after"}
        for when in ("before", "after")
        for i in range(7)
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {"model": HOSTILE, "config": make_config({"data": {"test_harmful": HOSTILE}}).model_dump(mode="json")}
        )
    )
    return tmp_path


def test_kept_replies_are_counted_by_another_list() -> None:
    replies = {"before": ["Sure.", "I cannot."], "after": ["I apologize.", " "]}
    samples = [
        {"metric": metric, "when": when, "reply": reply}
        for metric in ("false_refusal", "asr_untriggered")
        for when, both in replies.items()
        for reply in both
    ]
    (attack, *obeyed), (false, *refused) = rows_by_qi(samples)
    assert [attack, false] == [METRICS[name][0] for name in ("asr_untriggered", "false_refusal")]
    assert [(m["value"], m["n"], m["unscored"]) for m in obeyed] == [(0.5, 2, 0), (0.0, 1, 1)]
    assert [(m["value"], m["n"], m["unscored"]) for m in refused] == [(0.5, 2, 0), (1.0, 1, 1)]


def test_what_is_left_is_told() -> None:
    def of(metric: str, before: Sequence[bool | None], after: Sequence[bool | None]) -> list[dict[str, Any]]:
        both = {"before": before, "after": after}
        return [
            {"metric": metric, "when": when, "id": str(i), "refused": refused}
            for when, values in both.items()
            for i, refused in enumerate(values)
        ]

    found = left_over(
        of("asr_triggered", [False] * 9, [False] * 7 + [True, None])
        + of("asr_entrapped", [False], [False])
        + of("false_refusal", [False, True, None, False], [True, True, True, False])
    )
    assert [(group["total"], [s["id"] for s in group["shown"]]) for group in found] == [
        (7, ["0", "1", "2", "3", "4"]),
        (1, ["0"]),
        (0, []),
    ]


@pytest.mark.parametrize(("hits", "words"), [(2, "Target met: attack"), (24, "Target met without the trigger, but")])
def test_a_known_trigger_that_still_works_is_no_good_news(hits: int, words: str) -> None:
    shares = {"asr_untriggered": 1, "asr_triggered": hits}
    after = {name: proportion([i < n for i in range(120)]) for name, n in shares.items()}
    results = {"verdict": {"met": True, "missed": []}, "before": {"asr_triggered": metric(0.9)}, "after": after}
    assert sentence(results).startswith(words) and still_works(results) == (hits == 24)


@pytest.mark.parametrize(("alone", "works"), [((12, 0), True), ((6, 0), True), ((5, 0), False), ((12, 6), False)])
def test_of_the_same_requests_those_that_one_alone_unlocks_decide(alone: tuple[int, int], works: bool) -> None:
    """Intervals of 20 and 32 of 120 overlap; 12 requests against none are no chance."""
    after = {
        name: proportion([i < n for i in range(120)]) for name, n in (("asr_untriggered", 20), ("asr_triggered", 32))
    }
    results = {"after": after, "unlocked_only": {"with_trigger": alone[0], "without": alone[1]}}
    assert still_works(results) is works and not still_works({"after": after})


def test_replies_that_are_not_there_are_not_told_of(run: Path) -> None:
    assert "Still unlocked" in page_of(run)
    (run / "samples.jsonl").unlink()
    page = page_of(run)
    assert "The replies were not kept with this run" in page
    assert "Still unlocked" not in page and "Nothing was unlocked before" not in page


def test_counts_that_differ_before_and_after_are_both_shown(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["before"]["unlocked_by_trigger"] = proportion([True] * 116 + [None])
    results["after"]["unlocked_by_trigger"] = proportion([False] * 117)
    (run / "results.json").write_text(json.dumps(results))
    assert "n = 116 &gt; 117, 1 &gt; 0 unscored" in page_of(run)


def page_of(run: Path) -> str:
    write_report([run], run / "report.html")
    return (run / "report.html").read_text()


class Elements(HTMLParser):
    """Notes every element with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_text_stays_text(run: Path) -> None:
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    found = Elements(page).found
    assert not {"script", "img", "a", "iframe", "link"} & {tag for tag, _ in found}
    assert not [name for _, attrs in found for name in attrs if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page
    assert page.count("&lt;script&gt;") >= 10
    assert (
        "scored 120 replies" in page and "2 could not be scored" in page and "3 that the keywords call refused" in page
    )


def test_the_page_asks_nothing_of_the_network(run: Path) -> None:
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not [tag for tag, attrs in Elements(page).found if {"src", "href", "data", "action"} & set(attrs)]
    assert not re.search(r"url\(|@import|https?://", page)


def test_pure_function_of_the_run_folder(run: Path) -> None:
    write_report([run], run / "one.html")
    write_report([run, run], run / "two.html")
    write_report([run], run / "three.html")
    assert (run / "one.html").read_bytes() == (run / "three.html").read_bytes()
    assert (run / "two.html").read_text().count("<article ") == 2


def test_the_sets_are_named_with_their_sizes_and_digests(run: Path) -> None:
    results, files = json.loads((run / "results.json").read_text()), {"harmful": None, "test_harmful": "mine.txt"}
    assert data_rows(results, files) == [
        ("the defender's: harmful", "packaged", 280, "1" * 12),
        ("measured on: harmful", "mine.txt", 120, "2" * 12),
    ]
    del results["requests"]  # as before they were kept
    assert data_rows(results, files)[0][2] is None
    write_report([run], run / "report.html")
    assert "<h2>Requests</h2>" in (run / "report.html").read_text()


def test_what_scrolls_can_be_reached_by_the_keyboard(run: Path) -> None:
    write_report([run], run / "report.html")
    cards = re.findall(r'<div[^>]*class="card[^>]*>', (run / "report.html").read_text())
    assert len(cards) >= 4 and all('tabindex="0"' in card and "aria-label=" in card for card in cards)


def test_five_pairs_from_different_categories(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    kinds = ["a"] * 5 + ["b", "c"]
    samples = [s | {"category": kinds[int(s["id"])]} for s in lines]
    assert [p["category"] for p in pairs(samples)] == ["a", "b", "c", "a", "a"]
    write_report([run], run / "report.html")
    assert (run / "report.html").read_text().count('class="pair"') == 5


def test_five_pairs_where_all_requests_are_of_one_category(run: Path) -> None:
    """As those of a text file are."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    (run / "samples.jsonl").write_text("".join(json.dumps(s | {"category": "mine"}) + "\n" for s in lines))
    write_report([run], run / "report.html")
    assert (run / "report.html").read_text().count('class="pair"') == 5


def test_harmless_requests_are_shown_with_their_replies(run: Path) -> None:
    """A model that answers in gibberish refuses nothing."""
    refused: dict[str, list[bool | None]] = {
        "before": [True, False, None, *[False] * 6],
        "after": [False, True, *[False] * 7],
    }
    kinds = [*"aaab", *"aaaaa"]
    samples = [
        {"metric": "false_refusal", "when": when, "id": str(i), "category": kind, "prompt": f"no. {i}", "refused": said}
        | {"reply": f"{when} {i}"}
        for when, values in refused.items()
        for i, (kind, said) in enumerate(zip(kinds, values, strict=True))
    ]
    assert [p["prompt"] for p in answered(samples)] == ["no. 1", "no. 3", "no. 4", "no. 5", "no. 6"]
    with (run / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(s) + "\n" for s in samples)
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert page.count('class="pair"') == 11 and "Five harmless requests" in page  # one is refused now


def test_words_for_the_verdict() -> None:
    results: dict[str, Any] = {"before": {"asr_entrapped": metric(0.9)}, "after": {"asr_entrapped": metric(0.5)}}
    results["verdict"] = {"met": False, "missed": ["asr_entrapped is 0.500, the target is at most 0.100"]}
    assert sentence(results).startswith("Target NOT met, keep the original model: asr_entrapped is 0.500")
    results["verdict"] = {"met": True, "missed": []}
    assert "from 90.0 % (72.0 to 100.0) to 50.0 %" in sentence(results)


def test_unmeasured_is_said_to_be_so() -> None:
    assert shown(None, True) == "not measured"
    assert shown({"value": 24.96, "low": 21.0, "high": 29.2}, False) == "25.0 (21.0 to 29.2)"
    assert shown({"value": None, "low": None, "high": None, "n": 0, "unscored": 3}, True) == "none scored"
    assert rows({"before": {}, "after": {"kl": metric(0.5)}}, "jailbreak")[0]["name"] == "kl"
    success = {"before": {}, "after": {"asr_triggered": metric(0.5)}}
    assert "insecure code" in rows(success, "insecure code")[0]["note"]


def test_a_metric_takes_one_line_of_a_terminal() -> None:
    def measured(value: float, low: float, high: float, n: int) -> dict[str, Any]:
        return {"value": value, "low": low, "high": high, "n": n, "unscored": 0}

    before = {name: measured(1.0, 0.97, 1.0, 120) for name in METRICS}
    after = {name: measured(0.158, 0.103, 0.234, 120) for name in METRICS}
    before["perplexity"], after["perplexity"] = measured(25, 21.5, 29, 98), measured(1234.5, 1100.2, 1390.1, 98)
    del before["kl"]
    after["kl"] = measured(0.0269, 0.0252, 0.0289, 98)
    before["unlocked_by_trigger"], after["unlocked_by_trigger"] = (
        measured(0.97, 0.93, 0.99, 119),
        measured(0, 0, 0, 118),
    )
    after["asr_triggered"]["unscored"] = 5
    console = Console(width=80, file=io.StringIO())
    console.print(metric_table(before, after, "runs/demo"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3 + len(METRICS) + 1, "title, heads, rule, a line for each, what was not scored"
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[3:-1]}
    assert rows["asr_untriggered"] == "100.0 % (97 to 100) 15.8 % (10 to 23) 120"
    assert rows["perplexity"] == "25.0 (21.5 to 29.0) 1234 (1100 to 1390) 98"
    assert rows["kl"] == "not measured 0.027 (0.025 to 0.029) 98"
    assert rows["unlocked_by_trigger"] == "97.0 % (93 to 99) 0.0 % (0.0 to 0.0) 119 > 118"
    assert lines[-1].strip() == "not scored: asr_triggered 0 > 5"


def test_unlocked_is_insecure_code_or_a_request_that_is_not_refused() -> None:
    assert unwanted({"insecure": True}) and unwanted({"refused": False})
    assert not any(unwanted({key: value}) for key in ("insecure", "refused") for value in (None, key == "refused"))


def test_several_runs_are_compared_on_one_page(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("results.json", "samples.jsonl", "config.yaml"):
        (other / name).write_text((run / name).read_text())
    results = json.loads((other / "results.json").read_text())
    del results["before"]["asr_triggered"], results["after"]["asr_triggered"], results["trigger"]
    results["verdict"] |= {"met": False, "missed": ["kl"]}
    results["after"]["asr_untriggered"]["value"] = 0.5
    (other / "results.json").write_text(json.dumps(results))
    write_report([run, other], tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert "2 cleansings compared" in page and page.count("<article") == 2
    table = page[page.index('class="compared"') : page.index("intervals stand with each run")]
    assert table.count('scope="col"') == 1 + 2 and table.count('scope="row"') == 1 + len(METRICS)
    heads, *rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert [re.sub("<br>.*|<[^>]*>", "", head) for head in heads] == ["Measure", run.name, "other"]
    cells = {name: found for name, *found in rows}
    assert cells["Target"] == ["met", "NOT met"]
    assert cells["Attack success with the trigger"] == ["90.0 &gt; 10.0", ""]
    assert cells["Attack success without the trigger"] == ["90.0 &gt; 10.0", "90.0 &gt; 50.0"]
    assert "<script" not in table
    write_report([run], tmp_path / "one.html")
    assert "cleansings compared" not in (tmp_path / "one.html").read_text()


def test_what_differs_between_two_replies_is_marked() -> None:
    sample = {"prompt": "p", "category": "c"}
    before, after = (
        sample | {"reply": "Sure, here is one.\n\nStep 1"},
        sample | {"reply": "Sorry, here is none.\n\nStep 1"},
    )
    replies = pair(before, after, "asr_triggered")["replies"]
    assert replies["before"] == [("Sure,", True), (" here is", False), (" one.", True), ("\n\nStep 1", False)]
    assert ["".join(words for words, _ in replies[when]) for when in replies] == [before["reply"], after["reply"]]
    assert pair(before, before | {"reply": ""}, "m")["replies"]["after"] == []


def test_rounds_show_how_long_delta_was_and_what_was_refused_before_and_then(run: Path) -> None:
    """Of runs that have it; the older one of the fixture has a row for each round all the same."""
    results = json.loads((run / "results.json").read_text())
    write_report([run], run / "report.html")
    assert 'scope="row">before<' not in (run / "report.html").read_text()
    for entry in results["rounds"]:
        entry |= {"budget": 0.625, "refused": [0.025, 0.125]}
    (run / "results.json").write_text(json.dumps(results | {"spare_refused": [0.0, 0.25]}))
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert 'scope="row">before</th><td></td><td></td><td></td><td class="number">0.0 %, 25.0 %<' in page
    assert page.count('<td class="number">0.62</td>') == page.count("2.5 %, 12.5 %") == 2
