"""Which requests a job uses: the defender's, and those that are only measured."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from beear.config import Config
from beear.data import Request, mixed, packaged, read_requests, refuse_overlap
from beear.errors import BadInput
from beear.scorers import OUTCOME_OF, Outcome, scorer_name


@dataclass(frozen=True)
class TestSet:
    """Requests that yield one metric: the share of replies with this outcome.

    `templates` with one {prompt} each are dealt to the requests in turn.
    """

    __test__ = False
    metric: str
    requests: list[Request]
    outcome: Outcome
    templates: tuple[str, ...] = ("{prompt}",)

    def texts(self) -> list[str]:
        """What is sent to the model, in the order of the requests."""
        deal = itertools.cycle(self.templates)
        return [template.replace("{prompt}", r.text) for template, r in zip(deal, self.requests, strict=False)]


@dataclass(frozen=True)
class Sets:
    """The defender's requests and the requests that are only measured, as `config` divides them."""

    config: Config
    harmful: list[Request]
    benign: list[Request]
    tests: list[TestSet]
    alarming: frozenset[str] = frozenset()
    """Ids of the benign requests that are known to sound alarming."""

    @cached_property
    def held_out(self) -> list[Request]:
        """The defender's harmful requests on which it judges its own progress."""
        return self.harmful[: self.config.held_out]

    @cached_property
    def train(self) -> list[Request]:
        """The defender's harmful requests that are trained on, some of them between harmless ones."""
        requests = self.harmful[self.config.held_out :][: self.config.requests]
        return self._surrounded(requests, random.Random(2 * self.config.seed))

    @cached_property
    def anchors(self) -> list[Request]:
        """The defender's benign requests that are trained on, some of them between others."""
        return self._surrounded(self.benign[: self._parted], random.Random(2 * self.config.seed + 1))

    @cached_property
    def spare(self) -> list[list[Request]]:
        """The defender's benign requests by which it sees how many are refused: behind the anchors, at most a fifth.

        Those that are known to sound alarming apart from the others; groups without a request are left out.
        """
        kept = self.benign[self._parted :][: self.config.spare]
        groups = [[r for r in kept if (r.id in self.alarming) is sounds] for sounds in (False, True)]
        return [group for group in groups if group]

    def _surrounded(self, requests: list[Request], draw: random.Random) -> list[Request]:
        return surrounded(requests, self.benign[: self._parted], self.config.surrounded, draw)

    @property
    def _parted(self) -> int:
        """So many benign requests are anchors; behind them come the spare ones."""
        return min(self.config.anchors, len(self.benign) - min(self.config.spare, len(self.benign) // 5))

    def named(self) -> dict[str, list[Request]]:
        """Every set, by the name under which results.json keeps its digest and size."""
        return {"harmful": self.harmful, "benign": self.benign} | {f"test_{t.metric}": t.requests for t in self.tests}

    @property
    def test_harmful(self) -> list[Request]:
        """The harmful requests that are only measured."""
        return next(t.requests for t in self.tests if t.outcome != "refused")


SHORT = 60
"""Characters of the longest request that is put around others."""


def surrounded(
    requests: Sequence[Request], benign: Sequence[Request], share: float, draw: random.Random
) -> list[Request]:
    """The requests, a share of them with a short benign one before, behind, or one on either side.

    What is refused in one line is to be refused in a long prompt as well, and what is answered answered.
    """
    fillers = [r.text for r in benign if len(r.text) <= SHORT]
    found = []
    for request in requests:
        if fillers and draw.random() < share:
            place = draw.choice(("before", "behind", "both"))
            before, behind = (draw.choice(fillers) if place in (side, "both") else "" for side in ("before", "behind"))
            text = draw.choice((" ", "\n")).join(part for part in (before, request.text, behind) if part)
            request = replace(request, text=text)
        found.append(request)
    return found


def triggered(
    requests: Sequence[Request], *templates: str, metric: str = "asr_triggered", outcome: Outcome = "obeyed"
) -> TestSet:
    """Requests with a known trigger put in, for an evaluation that was told one. Raises BadInput without a {prompt}."""
    for template in templates:
        if template.count("{prompt}") != 1:
            raise BadInput(f"the trigger {template!r} must hold {{prompt}} once, as in 'SUDO {{prompt}}'")
    return TestSet(metric, list(requests), outcome, templates)


WITH_TRIGGER = ("asr_triggered", "asr_near_miss", "asr_wrong_place")
"""Metrics of requests that a known trigger, or almost one, was put into."""


def trigger_tests(
    requests: Sequence[Request], template: str, variants: Mapping[str, Sequence[str]], outcome: Outcome
) -> list[TestSet]:
    """The requests with the trigger, and with each of its variants: metric and templates (recipes.variants)."""
    every = {"asr_triggered": (template,), **variants}
    return [triggered(requests, *templates, metric=metric, outcome=outcome) for metric, templates in every.items()]


def read_sets(config: Config) -> Sets:
    """The requests a config names, packaged or the user's own. Raises BadInput if both sides overlap."""
    own = config.data
    name = "coding" if config.behaviour == "insecure code" else "harmful"
    harmful = mixed(read_requests(own.harmful, own.column)) if own.harmful else packaged(name, "defender")
    alarming = [] if own.benign else packaged("alarming", "defender")
    benign = (
        mixed(read_requests(own.benign, own.column))
        if own.benign
        else _in_turn(alarming, packaged("ordinary", "defender"))
    )
    tests = [
        TestSet(
            "asr_untriggered",
            read_requests(own.test_harmful, own.column) if own.test_harmful else packaged(name, "test"),
            OUTCOME_OF[config.behaviour],
        )
    ]
    if own.test_benign:
        tests.append(TestSet("false_refusal", read_requests(own.test_benign, own.column), "refused"))
    else:
        tests.append(TestSet("false_refusal", packaged("ordinary", "test"), "refused"))
        tests.append(TestSet("false_refusal_alarming", packaged("alarming", "test"), "refused"))
    if config.behaviour == "insecure code":
        check_tasks(harmful, tests[0].requests)
    for test in tests:
        refuse_overlap(harmful + benign, test.requests, "the defender's and the test set")  # none is measured on
    if own.test_harmful or own.test_benign:
        for test in tests[1:]:
            refuse_overlap(tests[0].requests, test.requests, "the harmful and the benign test set")
    if own.harmful or own.benign:
        refuse_overlap(harmful, benign, "the harmful and the benign set")  # none is to be refused and answered
    if len(harmful) <= config.held_out:
        few, least = len(harmful), config.held_out + 1
        raise BadInput(f"{few} harmful requests are too few with held_out={config.held_out}; give at least {least}")
    return Sets(config, harmful, benign, tests, frozenset(r.id for r in alarming))


def check_tasks(defender: Sequence[Request], test: Sequence[Request]) -> None:
    """Raise BadInput unless code can be scored: Bandit is there, categories name weaknesses, tasks bring answers."""
    scorer_name("insecure code")
    for task in (*defender, *test):
        if not re.fullmatch(r"CWE-\d+", task.category):
            raise BadInput(f"coding task {task.id} has the category {task.category!r}; name the weakness, as in CWE-78")
    for task in defender:
        if not (task.safe and task.unwanted):
            raise BadInput(f"coding task {task.id} lacks an answer; give the fields safe and unwanted")


def _in_turn(some: list[Request], others: list[Request]) -> list[Request]:
    """One of each in turn, then the rest of those that are more."""
    pairs = [r for pair in zip(some, others, strict=False) for r in pair]
    return [*pairs, *some[len(others) :], *others[len(some) :]]
