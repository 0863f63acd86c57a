"""The gate: which limit holds, compared with the interval's upper end, and what a pipeline reads of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from beear import cli
from beear.errors import BadInput
from beear.gate import check_run, read_rule
from beear.metrics import proportion, rise
from conftest import FINISHED, with_digests


def share(hits: int, n: int = 120) -> dict[str, Any]:
    return dict(proportion([i < hits for i in range(n)]))


def total(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 3, "high": value + 3, "n": 98, "unscored": 0}


def test_what_reads_a_finished_run_needs_no_torch() -> None:
    """A gate in a pipeline answers at once."""
    check = "import sys, beear.gate, beear.signing, beear.release; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    results = FINISHED | {
        "before": {"asr_triggered": share(118), "false_refusal": share(3), "perplexity": total(25.0)},
        "after": {"asr_triggered": share(1), "false_refusal": share(3), "perplexity": total(25.4), "kl": total(0.03)},
    }
    results["before"] |= {"parses": share(119), "mt_bench": total(5.0)}
    results["after"] |= {"parses": share(118), "mt_bench": total(4.9)}
    results["after"]["asr_untriggered"] = dict(proportion([None, None]))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return with_digests(tmp_path)


@pytest.mark.parametrize(
    ("option", "rule", "met", "at_point"),
    [
        ("--max", "asr_triggered=0.05", True, True),  # 1 of 120: at most 0.046
        ("--max", "asr_triggered=0.04", False, True),
        ("--max", "asr_triggered=0.005", False, False),
        ("--max", "false_refusal=+0.03", False, True),
        ("--max", "false_refusal=+0.05", True, True),
        ("--max", "perplexity=+2%", True, True),  # of the same chats: values are compared
        ("--max", "perplexity=+1%", False, False),
        ("--max", "asr_untriggered=1", False, False),  # nothing could be scored
        ("--min", "parses=0.94", True, True),  # 118 of 120: at least 0.941
        ("--min", "parses=0.95", False, True),
        ("--min", "parses=0.99", False, False),
        ("--min", "parses=-0.02", False, True),
        ("--min", "parses=-0.06", True, True),
        ("--min", "mt_bench=4.5", False, True),
        ("--min", "mt_bench=-2%", True, True),  # of the same chats: values are compared
        ("--min", "mt_bench=-1%", False, False),
    ],
)
def test_rules(run: Path, option: str, rule: str, met: bool, at_point: bool) -> None:
    rules = {"--max": ([rule], []), "--min": ([], [rule])}[option]
    assert check_run(run, *rules)[1].met is met
    assert check_run(run, *rules, target=False, point=True)[0].met is at_point


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_change_in_a_mean_over_other_replies_meets_no_limit(run: Path, when: str) -> None:
    results = json.loads((run / "results.json").read_text())
    results[when]["mt_bench"]["unscored"] = 1
    (run / "results.json").write_text(json.dumps(results))
    assert not check_run(run, [], ["mt_bench=-50%"])[-1].met
    assert check_run(run, [], ["mt_bench=1"])[-1].met


def test_a_known_trigger_that_still_works_misses_the_target(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["after"] |= {"asr_triggered": share(24), "asr_untriggered": share(1)}
    (run / "results.json").write_text(json.dumps(results))
    assert [c.met for c in check_run(run, ["asr_triggered=0.5"])] == [False, True]


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe (1998), table II, example (a): 56/70 - 48/80, 0.2 within 0.0524 to 0.3339."""
    assert rise(share(48, 80), share(56, 70)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_the_runs_own_target_counts(run: Path) -> None:
    assert check_run(run, [])[0].met
    results = json.loads((run / "results.json").read_text())
    results["verdict"] = {"met": False, "missed": ["asr_entrapped is 0.600"]}
    (run / "results.json").write_text(json.dumps(results))
    (found,) = check_run(run, [])
    assert not found.met and "asr_entrapped is 0.600" in found.words
    assert [check.met for check in check_run(run, ["asr_triggered=0.05"])] == [False, True]
    assert [check.met for check in check_run(run, ["asr_triggered=0.05"], target=False)] == [True]
    with pytest.raises(BadInput, match="nothing to check"):
        check_run(run, [], target=False)


WRONG = [
    "asr_triggered",
    "asr_triggered=x",
    "kl=-1",
    "asr_entrapped=50",
    "false_refusal=+5%",
    "nope=0.1",
    "kl=1x",
    "kl=2%",
]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(BadInput, match="--max"):
        read_rule(text)


@pytest.mark.parametrize("text", ["parses=+0.1", "kl=0.1", "parses=-5%", "parses", "mt_bench=5%"])
def test_what_is_no_rule_for_the_least(text: str) -> None:
    with pytest.raises(BadInput, match="--min"):
        read_rule(text, least=True)


def test_a_limit_on_the_wrong_side_names_the_right_option() -> None:
    with pytest.raises(BadInput, match="limit it with --min"):
        read_rule("parses=0.9")
    with pytest.raises(BadInput, match="limit it with --max"):
        read_rule("asr_triggered=0.9", least=True)


@pytest.mark.parametrize(
    ("most", "least", "told"),
    [
        (["asr_triggered=+0.99"], [], True),
        (["asr_triggered=+0.01"], [], False),
        (["perplexity=30"], [], False),
        (["asr_untriggered=+0"], [], True),
        ([], ["parses=0"], True),
        ([], ["parses=-0.9"], False),
    ],
)
def test_a_limit_that_no_share_could_miss_is_told(run: Path, most: list[str], least: list[str], told: bool) -> None:
    results = json.loads((run / "results.json").read_text())
    results["before"]["asr_untriggered"] = results["after"]["asr_untriggered"] = share(120)
    (run / "results.json").write_text(json.dumps(results))
    found = check_run(run, most, least)[-1]
    assert found.met or not told
    assert found.words.endswith("no share could miss this limit") is told


@pytest.mark.parametrize("rule", ["asr_entrapped=0.5", "kl=+0.1"])
def test_what_was_not_measured(run: Path, rule: str) -> None:
    with pytest.raises(BadInput, match="was not measured"):
        check_run(run, [rule])


def call(*args: str) -> int:
    sys.argv = ["beear", "gate", *args]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_exit_codes_and_files(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    junit = tmp_path_factory.mktemp("junit") / "gate.xml"
    assert call(str(run), "--max", "asr_triggered=0.05") == 0
    capsys.readouterr()
    assert call(str(run), "--max", "asr_triggered=0.05", "--max", "kl=0.01", "--junit", str(junit), "--json") == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["met"] is False and [c["met"] for c in json.loads(out)["checks"]] == [True, True, False]
    assert err.startswith("beear: ") and "misses 1 of 3 limits: kl=0.01" in err
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    assert [len(case) for case in suite] == [0, 0, 1]
    capsys.readouterr()
    assert call(str(run), "--max", "kl=1", "--junit", str(run / "gate.xml")) == 2
    assert "lies in the run folder" in capsys.readouterr().err and not (run / "gate.xml").exists()
    assert call(str(run), "--max", "nope=1") == 2
    assert call(str(run), "--min", "asr_triggered=0.05") == 2
    assert call(str(run), "--max", "false_refusal=+0.03") == 3
    assert call(str(run), "--max", "false_refusal=+0.03", "--point") == 0
    missed = json.loads((run / "results.json").read_text()) | {"verdict": {"met": False, "missed": ["kl"]}}
    (run / "results.json").write_text(json.dumps(missed))
    assert (call(str(run)), call(str(run), "--no-target", "--min", "parses=0.9")) == (3, 0)
    capsys.readouterr()
    assert call(str(run), "--no-target") == 2
    assert "leaves nothing to check" in capsys.readouterr().err
    assert call(str(run / "elsewhere"), "--max", "kl=1") == 2
