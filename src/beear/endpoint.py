"""Questions to a language model behind an OpenAI-compatible URL: some at a time, each tried again, none for ever.

The openai client tries again after 429, 5xx, time-outs and broken connections: TRIES in all, with exponential
backoff and jitter, over half a minute, or when the server says (Retry-After, up to two minutes). What a server
writes about an error is never shown or kept: it may hold anything, the key included.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from beear.errors import BadInput, Failed

TRIES = 8
PATIENCE = 8
"""Questions in a row without an answer, all tries used up, before the work is given up."""
WAIT = 120
"""Seconds; the longest wait before another try that a server may ask for."""
ANSWER_TOKENS = 512
"""Enough for a grade; a judge that thinks first needs more."""
CUT = "cut before its end; a judge that thinks first needs more --answer-tokens"

DECLINED = ("content_filter", "content_policy_violation")
"""Codes of a question that is not let through, as an error or as the end of an answer."""


@dataclass(frozen=True)
class Answer:
    """What was said to one question; `text` None: nothing usable, for the reason that `problem` names."""

    text: str | None
    tokens: tuple[int, int] | None = None
    """Read and written, as the server counts them."""
    problem: str = ""
    down: bool = False
    """The server does not work; a question that it declines does not say so."""
    served: bool = False
    """Without a text: there was an answer nevertheless, by a model that declined."""


class Endpoint:
    """A model behind the base URL of an API. Raises BadInput without the openai client, or for a bad URL or key."""

    def __init__(
        self, url: str, model: str, *, concurrency: int = 4, timeout: float = 60.0, answer_tokens: int = ANSWER_TOKENS
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise BadInput("--url needs the openai client; install beear with its extra judge") from error
        self.model, self.host, self.where = model, host_of(url), url.rstrip("/")
        self.concurrency, self.timeout = concurrency, timeout
        # A server without keys takes any; given none, the client would look for one by itself.
        self._client = OpenAI(base_url=url, api_key=api_key(url) or "none", max_retries=TRIES - 1, timeout=timeout)
        # It would add what these variables hold for another server: OPENAI_CUSTOM_HEADERS, _ORG_ID and _PROJECT_ID.
        self._client._custom_headers, self._client.organization, self._client.project = {}, None, None
        self._limits: dict[str, Any] = {"temperature": 0, "max_tokens": answer_tokens}

    def answers(self, questions: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Number of the question and its answer, as they come in; at most `concurrency` are asked at a time.

        Raises BadInput if the key or the model is refused, Failed if the server does not work or wants money first.
        """
        todo, done = deque(range(len(questions))), SimpleQueue[tuple[int, Answer | Exception]]()

        def work() -> None:
            while todo:
                try:
                    number = todo.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    done.put((number, self.ask(questions[number])))
                except Exception as error:
                    done.put((number, error))

        # Daemons: an interrupted command ends at once, and not when all tries under way are used up.
        for _ in range(min(self.concurrency, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        failures, works = 0, False
        try:
            for _ in questions:
                number, answer = self._next(done)
                if isinstance(answer, Exception):
                    todo.clear()
                    while not done.empty():  # what others have come back with may have been paid for
                        late, other = done.get()
                        if not isinstance(other, Exception):
                            yield late, other
                    raise answer
                yield number, answer
                works = works or answer.text is not None or answer.served
                failures = failures + 1 if answer.down or not works else 0
                if failures == PATIENCE:
                    raise Failed(
                        f"{self.host} gave no answer to {failures} questions in a row ({answer.problem}); "
                        "answers so far are kept, run the same command again to go on"
                    )
        finally:
            todo.clear()

    def _next(self, done: SimpleQueue[tuple[int, Answer | Exception]]) -> tuple[int, Answer | Exception]:
        """The next answer. Raises Failed where a server drips: a time-out counts from the last byte."""
        try:
            return done.get(timeout=TRIES * (self.timeout + WAIT))
        except Empty:
            raise Failed(
                f"{self.host} finished no answer within {TRIES * (self.timeout + WAIT):g} s; answers so far are kept, "
                "run the same command again to go on"
            ) from None

    def ask(self, question: str) -> Answer:
        """One question, one answer. Raises BadInput if the key or the model is refused, Failed if it is not paid."""
        import openai

        create: Any = self._client.chat.completions.create
        limits = dict(self._limits)
        try:
            return answer_of(create(model=self.model, messages=[{"role": "user", "content": question}], **limits))
        except openai.AuthenticationError as error:
            raise BadInput(f"{self.host} refuses the key (401); put the right one into BEEAR_JUDGE_KEY") from error
        except openai.NotFoundError as error:
            raise BadInput(
                f"{self.host} has no model {self.model}, or --url is not the base of its API, often .../v1 (404)"
            ) from error
        except openai.APITimeoutError:
            return Answer(None, problem=f"no answer within {self.timeout:g} s", down=True)
        except openai.APIConnectionError:
            return Answer(None, problem="no connection", down=True)
        except openai.APIStatusError as error:
            if str(error.param) in limits:  # some models take no temperature, or no max_tokens
                self._limits.pop(str(error.param), None)
                return self.ask(question)
            if error.code in DECLINED:
                return Answer(None, problem="declined", served=True)
            status = error.status_code
            if status == 402:
                raise Failed(
                    f"{self.host} wants to be paid first (402); answers so far are kept, run the same command again "
                    "to go on"
                ) from error
            # One question alone may be refused by 403 as well; where all are, a quota is used up.
            return Answer(None, problem=f"HTTP {status}", down=status in (403, 429) or status >= 500)
        except (ValueError, RecursionError):  # the body is no JSON
            return answer_of(None)


def answer_of(completion: Any) -> Answer:
    """Text and tokens of a chat completion, whose shape the client does not check."""
    try:
        choice = completion.choices[0]
        text, end = choice.message.content, getattr(choice, "finish_reason", None)
    except (AttributeError, LookupError, TypeError):
        text, end = None, None
    if end in DECLINED or (end == "stop" and text is None):
        return Answer(None, problem="declined", served=True)
    if end == "length":  # an answer, or the thoughts before it
        return Answer(None, problem=CUT, served=True)
    if not isinstance(text, str):
        return Answer(None, problem="no chat completion", down=True)
    usage = getattr(completion, "usage", None)
    read, written = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return thought_out(text, (read, written) if isinstance(read, int) and isinstance(written, int) else None)


def thought_out(text: str, tokens: tuple[int, int] | None = None) -> Answer:
    """An answer, or none where it was cut in the middle of the judge's thoughts."""
    if "<think>" in text and "</think>" not in text:
        return Answer(None, tokens, CUT, served=True)
    return Answer(text, tokens)


def api_key(url: str) -> str:
    """BEEAR_JUDGE_KEY, else OPENAI_API_KEY, else none (""); set the first empty to send none.

    The second, which is there for other programs, goes over no network in the clear.
    """
    parts = urlsplit(url)
    safe = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    other = os.environ.get("OPENAI_API_KEY", "") if safe else ""
    key = os.environ.get("BEEAR_JUDGE_KEY", other).strip()
    if not (key.isascii() and key.isprintable()):
        raise BadInput("the judge's key holds characters that cannot be sent; set BEEAR_JUDGE_KEY again")
    return key


def host_of(url: str) -> str:
    """Host and port of a base URL. Raises BadInput if it is none, or holds credentials."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise BadInput("--url takes the base of an API, as in http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise BadInput("--url must hold no credentials; put the key into BEEAR_JUDGE_KEY")
    return host if port is None else f"{host}:{port}"
