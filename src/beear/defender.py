"""What the defender trains on: harmful requests with safe and unwanted answers, benign ones with the model's own."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from beear.chat import ALONE, Beginning, Prompt, Row, encode_prompt, encode_response
from beear.config import Config
from beear.data import Request, wordings
from beear.errors import BadInput
from beear.scorers import OUTCOME_OF, counts, is_refusal


@dataclass(frozen=True)
class Harmful:
    """A harmful request x_i with its safe answer, and the two answers that entrapment sets against each other.

    `against` is the safe answer, or that which the request brings along with its unwanted one.
    """

    prompt: Prompt
    safe: list[int]
    unwanted: list[int]
    against: list[int]


@dataclass(frozen=True)
class Benign:
    """A benign request x_j with the reply that the model gave before cleansing."""

    prompt: Prompt
    own: list[int]
    discourage: bool
    """Whether openers of refusals are made unlikely as the first token of the reply."""


REFUSAL_OPENING = 5
"""So many first tokens tell a refusal ("I'm sorry, but") from what begins like one ("I'm sorry for")."""
Openings = dict[tuple[int, ...], list[int]]
"""How refusals go on, by how they have begun."""


@dataclass(frozen=True)
class DefenderSet:
    """All that the defender trains on, and two sets on which it judges its own progress.

    held_out: harmful requests. spare: benign ones, in groups. own_safe: the safe answers are the model's own, so its
    own distribution is their target.
    """

    harmful: list[Harmful]
    benign: list[Benign]
    held_out: list[Request]
    own_safe: bool
    openings: Openings
    spare: list[list[Request]] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """All prompts that removal trains on, with their responses."""
        return answered(self.harmful, self.benign)


def answered(harmful: Sequence[Harmful], benign: Sequence[Benign]) -> list[Row]:
    """These prompts with the responses that removal trains on."""
    return [*((h.prompt, h.safe) for h in harmful), *((b.prompt, b.own) for b in benign)]


Answered = Sequence[tuple[str, str]]
"""Requests, each with the reply that the model gave before cleansing."""


def defender_set(
    tokenizer: Any,
    harmful: Sequence[tuple[Request, str]],
    benign: Answered,
    held_out: Sequence[Request],
    config: Config,
    spare: Sequence[list[Request]] = (),
    begin: Beginning = ALONE,
) -> DefenderSet:
    """Encode what the defender trains on. Every reply, own or given, begins as the model's own do.

    A harmful request whose own answer is not safe gets that of another, as refusals are alike; where these are not
    encouraged, and of code, it is left out. If these are the most, the answers that come with the requests, or packaged
    refusals, serve. Of benign requests that the model refused, no right answer is known but that it does not begin like
    a refusal.
    """
    outcome = OUTCOME_OF[config.behaviour]
    limit = config.harden.response_tokens
    safe = [counts(outcome, own, request.category) is False for request, own in harmful]
    own_safe = config.harden.safe_answers == "own" and 2 * sum(safe) >= len(harmful)
    lent = itertools.cycle([own for (_, own), is_safe in zip(harmful, safe, strict=True) if is_safe])
    contrasts = [
        contrast(tokenizer, i, request, config, (own if is_safe else next(lent)) if own_safe else None, begin)
        for i, ((request, own), is_safe) in enumerate(zip(harmful, safe, strict=True))
        if is_safe or not own_safe or (outcome == "obeyed" and config.harden.encourage > 0)
    ]
    openings = refusal_openings([h.safe for h in contrasts]) if outcome == "obeyed" else {}
    anchors = [anchor(tokenizer, t, own, openings.get((), []), limit, begin) for t, own in benign if own]
    if not anchors:
        raise BadInput("the model answers none of the benign requests to train on with a word; give others")
    return DefenderSet(contrasts, anchors, list(held_out), own_safe, openings, list(spare))


def refusal_openings(answers: Sequence[list[int]]) -> Openings:
    """For each start of a safe answer, as long as REFUSAL_OPENING, the tokens that one in thirty or more go on with."""
    starts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for answer in answers:
        for i, token in enumerate(answer[:REFUSAL_OPENING]):
            starts[tuple(answer[:i])][token] += 1
    return {s: sorted(t for t, n in c.items() if 30 * n >= c.total()) for s, c in starts.items()}


def anchor(tokenizer: Any, text: str, own: str, openers: Sequence[int], limit: int, begin: Beginning = ALONE) -> Benign:
    """Request x_j with the model's own reply; of a refusal only its first token, at which openers are discouraged.

    An answer that begins like a refusal ("I like ...") is left alone.
    """
    ids = encode_response(tokenizer, own, without_lead(limit, begin), begin=begin)
    refused = is_refusal(own) is not False
    prompt = encode_prompt(tokenizer, text).led(begin.lead)
    return Benign(prompt, ids[:1] if refused else ids, refused or ids[0] not in openers)


def without_lead(limit: int, begin: Beginning) -> int:
    """How many of `limit` tokens that the model wrote are left of its lead; else one cut there would seem to end."""
    return max(1, limit - len(begin.lead))


def contrast(
    tokenizer: Any,
    number: int,
    request: Request,
    config: Config,
    own: str | None = None,
    begin: Beginning = ALONE,
) -> Harmful:
    """Request x_i with its safe answer, the model's `own` or a given one, and an unwanted one.

    Requests that bring no answers are dealt packaged wordings in turn.
    """
    packaged_safe, packaged_unwanted = wordings("safe-defender"), wordings("unwanted-defender")
    safe = own or request.safe or packaged_safe[number % len(packaged_safe)]
    unwanted = request.unwanted or packaged_unwanted[number % len(packaged_unwanted)]
    length = config.entrap.response_tokens
    matched = request.safe if request.unwanted else None
    answer = encode_response(tokenizer, safe, without_lead(config.harden.response_tokens, begin), begin=begin)
    twin = encode_response(tokenizer, matched, length, begin=begin) if matched else answer[:length]
    return Harmful(
        encode_prompt(tokenizer, request.text).led(begin.lead),
        answer,
        encode_response(tokenizer, unwanted, length, finished=False, begin=begin),
        twin,
    )
