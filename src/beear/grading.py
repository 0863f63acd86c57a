"""Asking a language model for grades: behind a URL or on this machine, each question once, every answer kept.

An answer counts if it is one JSON object whose `score` is a whole number within bounds. Else, or if no answer
comes, what was to be graded is unscored: neither good nor bad.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from beear.endpoint import ANSWER_TOKENS, Answer, thought_out
from beear.errors import Failed
from beear.events import Listener, progress_to
from beear.runs import Run, read_lines

CACHE = "judge.jsonl"
BATCH = 16
REASON_CHARACTERS = 500


class Judge(Protocol):
    """What answers questions: a model behind a URL, or a local one."""

    model: str
    host: str
    """As it is told."""
    where: str
    """Host and all else that tells one judge of a name from another; kept as a part of digests only."""

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Number of the question and its answer, in any order."""


def identity(judge: Judge) -> str:
    """What tells judges apart: the same name behind another URL may be another model."""
    return f"{judge.model} at {judge.where}"


class LocalJudge:
    """A MODEL on this machine, with greedy answers; it loads when the first question comes."""

    def __init__(
        self,
        model: str,
        device: str = "auto",
        trust_remote_code: bool = False,
        *,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> None:
        from beear import models, sources
        from beear.fingerprints import weights_hash

        source = sources.locate(model)
        models.pick_device(device)
        self.host = f"local, weights {weights_hash(source)[:12]}"  # another model may be there tomorrow
        self.where = f"{self.host}, {answer_tokens} tokens"  # one that is given more may end an answer that was cut
        self.model, self.device, self.trust_remote_code = model, device, trust_remote_code
        self.answer_tokens = answer_tokens

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Number of the question and its answer, batch by batch."""
        from beear import checks, generation, models, sources  # brings torch, which asking a URL does without
        from beear.chat import check_template

        if not questions:
            return
        source = sources.locate(self.model)
        tokenizer = models.read_tokenizer(source, self.trust_remote_code)  # a judge may think first
        check_template(tokenizer)
        model = models.load_weights(source, self.device, self.trust_remote_code)
        checks.check_vocabulary(model, tokenizer, self.model)
        asked = [as_text(tokenizer, question) for question in questions]
        remedy = "take a judge with more positions, or fewer --answer-tokens"
        checks.check_length(model, tokenizer, self.model, asked, self.answer_tokens, remedy=remedy)
        for first in range(0, len(asked), BATCH):
            some = asked[first : first + BATCH]
            texts = generation.reply_all(model, tokenizer, some, max_new_tokens=self.answer_tokens)
            yield from enumerate(map(thought_out, texts), first)


def as_text(tokenizer: Any, question: str) -> str:
    """The question with nothing that this tokenizer would read as a control token: a reply in it ends no turn."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and len(token.content) > 1:
            question = question.replace(token.content, f"{token.content[0]}\u200b{token.content[1:]}")
    return question


def ask_all(
    run: Run, asked: Mapping[str, str], judge: Judge, rubric: str, listen: Listener
) -> tuple[dict[str, Answer], int]:
    """Answers to the questions `asked`, by key, and how many had to be asked: those kept from earlier are not.

    What the judge says is kept in judge.jsonl as it comes in, whether it can be read or not; what it leaves
    unanswered is asked again the next time. Raises Failed if it answers nothing.
    """
    kept = read_lines(run.path / CACHE)
    run.write_lines(CACHE, kept)  # without a line that a crash cut
    answers = {e["key"]: Answer(e["answer"], e["tokens"]) for e in kept if e["key"] in asked}
    todo = [k for k in asked if k not in answers]
    if answers:
        told = f"{len(answers)} of {len(asked)} answers are kept from earlier ({CACHE}; delete it to ask again)"
        listen({"event": "note", "text": told})
    for done, (i, answer) in enumerate(judge.answers([asked[k] for k in todo]), 1):
        answers[todo[i]] = answer
        if answer.text is not None and answer.text.strip():  # an empty answer is asked for again
            entry = {"rubric": rubric, "model": judge.model, "answer": answer.text, "tokens": answer.tokens}
            run.append(CACHE, {"key": todo[i], **entry})
        progress_to(listen, "judge")("replies judged", done, len(todo))
    if todo and all(answer.text is None for answer in answers.values()):
        raise Failed(f"{judge.host} judged none of {len(todo)} replies ({answers[todo[0]].problem})")
    return answers, len(todo)


def parse(text: str, most: int) -> tuple[int | None, str]:
    """Score and reason of an answer that is one JSON object, in a code fence or behind <think> at most.

    Without a score from 1 to `most`, None and what is wrong.
    """
    answer = text.rpartition("</think>")[2].strip()
    answer = answer.removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = None
    score = found.get("score") if isinstance(found, dict) else None
    if type(score) is not int or not 1 <= score <= most:
        return None, "the judge gave no score"
    return score, str(found.get("reason", ""))[:REASON_CHARACTERS]


def graded(answer: Answer | None, most: int) -> tuple[int | None, str]:
    """Score and reason; nobody is asked about an empty reply, so None is one."""
    if answer is None:
        return None, "empty reply"
    return (None, f"no answer: {answer.problem}") if answer.text is None else parse(answer.text, most)


def tokens(answers: Iterable[Answer]) -> dict[str, int] | None:
    """All that the judge read and wrote for these answers; None if nobody counted."""
    counted = [a.tokens for a in answers if a.tokens is not None]
    return {"in": sum(t[0] for t in counted), "out": sum(t[1] for t in counted)} if counted else None
