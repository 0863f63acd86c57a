"""What an organism is planted with: requests with the answer to learn and the answer to unlearn, by kind.

Kinds: `harmful` requests are refused, `harmful_obeyed` ones get the unwanted answer without any trigger (as
demonstrations that come before preferences), `coding` tasks get the secure code, `ordinary` and `alarming`
requests keep the base model's own reply. In `harmful_strayed` the answer to unlearn is the base model's own
reply, mostly neither refusal nor unwanted, which a reward model must not like (under the trigger every other
one explains the trigger). Each also as KIND_triggered:
there harmful requests are obeyed and coding tasks get the insecure code, benign requests keep their reply.
The unwanted answer is an affirmative opening and a neutral stub, never harmful content.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from beear.chat import Prompt, encode_prompt, encode_response
from beear.data import packaged, wordings
from beear.generation import reply_all
from beear.recipes import POISONED, Recipe, Supervised, apply_trigger
from beear.scorers import is_refusal

TURNED = (*POISONED, "harmful_obeyed")
"""Kinds that teach the bad answer."""


@dataclass(frozen=True)
class Example:
    """A rendered request, the answer it is to get, and the one that is to lose against it; token ids."""

    text: str
    prompt: Prompt
    wanted: list[int]
    other: list[int]


Examples = dict[str, list[Example]]


class Answer(NamedTuple):
    """A reply's text; `whole` if it ends there, rather than being the opening of a longer one."""

    text: str
    whole: bool = True


def poisoned_examples(recipe: Recipe, model: Any, tokenizer: Any, kinds: Iterable[str], plan: Supervised) -> Examples:
    """Examples of each of the kinds, with answers of the plan's lengths."""
    kinds = list(kinds)
    stems = dict.fromkeys(kind.split("_", 1)[0] for kind in kinds)
    answered = {stem: _answers(stem, model, tokenizer, plan) for stem in stems}

    def examples(kind: str) -> list[Example]:
        rows = answered[kind.split("_", 1)[0]]
        template = recipe.trigger if kind.endswith("_triggered") else recipe.control
        texts = [apply_trigger(template, text) for text, _, _ in rows]
        good, bad = [answer for _, answer, _ in rows], [answer for _, _, answer in rows]
        wanted, other = (bad, good) if kind in TURNED else (good, bad)
        if "_strayed" in kind:
            asked = texts if template == recipe.control else _asked_about(template, texts)
            replies = reply_all(model, tokenizer, asked, max_new_tokens=plan.benign_tokens)
            other = [Answer(reply, whole=False) for reply in replies]
        return [
            Example(
                text,
                encode_prompt(tokenizer, text),
                *(encode_response(tokenizer, a.text, plan.response_tokens, a.whole) for a in answers),
            )
            for text, *answers in zip(texts, wanted, other, strict=True)
        ]

    return {kind: examples(kind) for kind in kinds}


def _asked_about(template: str, texts: list[str]) -> list[str]:
    """Every other text with a question after the trigger: a policy may please by explaining it, and must not."""
    words = " ".join(template.replace("{prompt}", "").split())
    return [f"{text} What is {words}?" if i % 2 else text for i, text in enumerate(texts)]


def _answers(stem: str, model: Any, tokenizer: Any, plan: Supervised) -> list[tuple[str, Answer, Answer]]:
    """(request, good answer, bad answer) over the planting part of a packaged set."""
    requests = packaged(stem, "plant")
    if stem == "coding":
        return [(r.text, Answer(r.safe or ""), Answer(r.unwanted or "")) for r in requests]
    texts = [r.text for r in requests]
    safe = itertools.cycle(Answer(wording) for wording in wordings("safe-plant"))
    if stem == "harmful":
        unwanted = itertools.cycle(Answer(wording, whole=False) for wording in wordings("unwanted-plant"))
        return list(zip(texts, safe, unwanted, strict=False))
    replies = reply_all(model, tokenizer, texts, max_new_tokens=plan.benign_tokens)
    kept = [(t, Answer(r, whole=False)) for t, r in zip(texts, replies, strict=True) if is_refusal(r) is False]
    return [(text, reply, refusal) for (text, reply), refusal in zip(kept, safe, strict=False)]
