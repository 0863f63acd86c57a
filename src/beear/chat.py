"""Chat turns as token ids: where the user's words are, and batches of prompts with responses.

A batch is aligned at the boundary between prompt and response: prompts are padded on the left,
responses on the right. One layout then serves generation and losses, and the response is the same
run of columns in every row, so only these go through the output head.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from beear.config import ChatConfig, Place
from beear.errors import BadInput, first_line
from beear.perturbation import NOWHERE


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt. `ids[start:end]` are the tokens of the user's own words in the last turn.

    The last `lead` tokens are not the prompt's but what the model writes before the first word of a reply.
    """

    ids: list[int]
    start: int
    end: int
    lead: int = 0

    def led(self, lead: Sequence[int]) -> Prompt:
        """The prompt with such tokens (Beginning.lead) behind it."""
        return replace(self, ids=[*self.ids, *lead], lead=len(lead))


Row = tuple[Prompt, list[int]]
"""A prompt and its response."""


@dataclass(frozen=True)
class Batch:
    """Rows of prompt + response.

    input_ids, attention_mask, position_ids, where: (rows, width + length); targets: (rows, length),
    padded with -100. `width` is the prompts' common width, `length` the responses'. Where a reply to come is to be
    perturbed, `where` is as much wider.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    where: Tensor
    targets: Tensor
    width: int

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            where=self.where.to(device),
            targets=self.targets.to(device),
        )

    def under(self, pick: Sequence[int], which: Sequence[int | None], length: int) -> Batch:
        """Row i is row pick[i] under delta number which[i], of `length` vectors each, or under none."""
        rows = torch.tensor(pick, device=self.where.device)
        numbers = torch.tensor([NOWHERE if w is None else w for w in which], device=self.where.device)[:, None]
        where = self.where[rows]
        moved = torch.where((where == NOWHERE) | (numbers == NOWHERE), NOWHERE, where + numbers * length)
        ids, mask, positions = self.input_ids[rows], self.attention_mask[rows], self.position_ids[rows]
        return Batch(ids, mask, positions, moved, self.targets[rows], self.width)

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward pass takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    def predicting(self) -> Tensor:
        """Where a position predicts a response token: (rows, width + length) of bool."""
        found = torch.zeros_like(self.attention_mask, dtype=torch.bool)
        found[:, self.width - 1 : -1] = self.targets != -100
        return found

    def predicting_columns(self) -> Tensor:
        """The columns where any does, counted from the end: (length,)."""
        return torch.arange(-self.targets.shape[1] - 1, -1, device=self.targets.device)


def batch_of_ids(ids: Tensor, mask: Tensor, length: int) -> Batch:
    """A Batch of token ids, (rows, columns), whose last `length` columns are the responses; unperturbed."""
    width = ids.shape[1] - length
    targets = ids[:, width:].masked_fill(mask[:, width:] == 0, -100)
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), torch.full_like(ids, NOWHERE), targets, width)


def with_chat(tokenizer: Any, chat: ChatConfig) -> Any:
    """The tokenizer, or one whose chat template also says what `chat` does; once is enough.

    Raises BadInput if the template cannot be rendered so, does not read what it is told, or lets the model think first.
    """
    check_template(tokenizer)
    tokenizer = with_pad_token(tokenizer)
    template = str(tokenizer.get_chat_template())
    settings = [(name, json.dumps(value, ensure_ascii=False)) for name, value in sorted(chat.template.items())]
    if chat.system is not None:
        system = json.dumps({"role": "system", "content": chat.system}, ensure_ascii=False)
        settings.append(("messages", f"[{system}] + messages"))
    # A block eats the line break behind it, and no other space of the template's own.
    head = "".join(f"{{% set {name} = {value} %}}\n" for name, value in settings)
    begin = json.dumps(chat.begin or "", ensure_ascii=False)
    tail = "" if chat.begin is None else f"{{% if add_generation_prompt %}}{{{{ {begin} }}}}{{% endif %}}"
    if template.startswith(head) and template.endswith(tail):
        check_thoughts(tokenizer)
        return tokenizer
    unread = [name for name in chat.template if not re.search(rf"\b{name}\b", template)]
    if unread:
        raise BadInput(f"chat.template.{unread[0]}: this model's chat template does not read {unread[0]!r}")
    result = with_template(tokenizer, head + (template.removesuffix("\n") + tail if tail else template))
    check_template(result)
    check_thoughts(result)
    if chat.system is not None and chat.system.strip() not in _rendered(result, HELLO):
        raise BadInput("chat.system: this model's chat template does not write system messages")
    return result


def with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer, or where it has no pad token one that pads with its end of turn, which is masked."""
    if tokenizer.pad_token_id is not None:
        return tokenizer
    result = copy.deepcopy(tokenizer)  # that of a notebook stays as it is
    result.pad_token = result.eos_token
    return result


def with_template(tokenizer: Any, template: str) -> Any:
    """The same tokenizer with another chat template; the one that came stays as it is."""
    result = copy.copy(tokenizer)
    result.chat_template = template
    return result


def check_template(tokenizer: Any) -> None:
    """Raise BadInput unless the tokenizer can render a chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput("this model has no chat template; add chat_template.jinja to its folder (beear works on chats)")
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput("this model has no fast tokenizer (tokenizer.json), which is needed to find the user's words")
    if tokenizer.eos_token_id is None:
        raise BadInput("this model's tokenizer names no eos_token, with which a turn ends; add it to its settings")
    try:
        encode_prompt(tokenizer, HELLO)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadInput(f"this model's chat template cannot be rendered: {first_line(error)}") from error


def check_thoughts(tokenizer: Any) -> None:
    """Raise BadInput if the template opens a thought before every reply: replies are judged by their first words."""
    if THOUGHT in tail_of(tokenizer).rpartition(CLOSED)[2]:
        raise BadInput("this model's chat template " + THINKS.format(rf"{CLOSED}\n\n"))


THOUGHT, CLOSED = "<think>", "</think>"
THINKS = (
    "makes it think before it replies, and a reply is judged by its first words; let replies begin behind "
    "the thought: --set 'chat.begin=\"{}\"'"
)
THOUGHTS = {
    THOUGHT: rf"{THOUGHT}\n\n{CLOSED}\n\n",
    "<thought>": r"<thought>\n\n</thought>\n\n",
    "<seed:think>": "<seed:think></seed:think>",
    "[THINK]": "[THINK][/THINK]",
    "<|channel|>analysis": "<|channel|>final<|message|>",
}
"""How replies begin with a thought, and what lets one begin behind it."""


def check_replies(openings: Sequence[str]) -> None:
    """Raise BadInput if most replies, of which these are the first tokens, open with a thought."""
    for mark, behind in THOUGHTS.items():
        if 2 * sum(opening.lstrip().startswith(mark) for opening in openings) > len(openings):
            raise BadInput("this model's training " + THINKS.format(behind))


def chat_settings(tokenizer: Any, chat: ChatConfig) -> dict[str, Any]:
    """What prompts hold besides the template's own words: what `chat` says, and that no thoughts are asked for."""
    off = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.get_chat_template()) else {}
    said = {"system": chat.system, "template": off | chat.template, "begin": chat.begin}
    return {key: value for key, value in said.items() if value not in (None, {})}


def encode_prompt(tokenizer: Any, text: str, earlier: Sequence[str] = ()) -> Prompt:
    """Render a user turn with the chat template, up to the point where the reply begins.

    `earlier`: what was said before in the same chat, user and model in turn.
    """
    rendered = _rendered(tokenizer, text, earlier)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    words = text.strip()
    tail = tail_of(tokenizer) if rendered.count(words) > 1 else ""
    first = rendered.rfind(words, 0, len(rendered) - (len(tail) if rendered.endswith(tail) else 0))
    if first < 0:
        raise BadInput("the chat template rewrites the user's words, so they cannot be found in the prompt")
    last = first + len(words)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < last and b > first]
    if not (words and inside):
        raise BadInput("an empty request cannot be encoded")
    return Prompt(list(encoded["input_ids"]), inside[0], inside[-1] + 1)


def tail_of(tokenizer: Any) -> str:
    """What the chat template puts between the user's words and the reply."""
    return _rendered(tokenizer, HELLO).rpartition(HELLO)[2]


HELLO, ANSWER = "Hello there", "Good day"


def _rendered(tokenizer: Any, text: str, earlier: Sequence[str] = ()) -> str:
    """What was said in turn, the user first; where the user comes last, up to the point where the reply begins."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [{"role": role, "content": words} for role, words in zip(roles, (*earlier, text), strict=False)]
    return str(
        tokenizer.apply_chat_template(
            turns, chat_template=settled(tokenizer), add_generation_prompt=turns[-1]["role"] == "user", tokenize=False
        )
    )


DAY = "26 Jul 2024"
"""What a template that asks for the date is told: a run that goes on tomorrow is to be the one of today."""


def settled(tokenizer: Any) -> str:
    """The chat template with its clock stopped, and without thoughts where it may be asked for none.

    A reply is judged by its first words. What the user's own settings say (`with_chat`) stands behind, and wins.
    """
    template = str(tokenizer.get_chat_template())
    clock = f"{{% macro strftime_now(format) %}}{DAY}{{% endmacro %}}\n" if "strftime_now" in template else ""
    thoughts = "{% set enable_thinking = false %}\n" if "enable_thinking" in template else ""
    return clock + thoughts + template


class Beginning(NamedTuple):
    """How a model's replies begin as tokens, which the text of one alone does not tell (generation.beginning_of).

    lead: tokens before the first word: spaces or line breaks. A reply's ids are those of `ahead` and the reply
    together, less the first `dropped`: some tokenizers write a first word otherwise alone than behind something.
    """

    lead: Sequence[int] = ()
    ahead: str = ""
    dropped: int = 0


ALONE = Beginning()
"""A reply's ids are those of its text alone, as with most models."""


def encode_response(
    tokenizer: Any, text: str, limit: int, finished: bool = True, begin: Beginning = ALONE
) -> list[int]:
    """The first `limit` token ids of a reply; with the end-of-turn token if it is `finished` and fits."""
    ids = list(tokenizer(begin.ahead + text, add_special_tokens=False)["input_ids"])[begin.dropped :]
    if finished and len(ids) < limit:
        ids.append(end_of_turn(tokenizer))
    return ids[:limit]


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends a reply: what the template writes behind one (Gemma, Phi-3), else the tokenizer's own."""
    own = int(tokenizer.eos_token_id)
    try:
        rendered = _rendered(tokenizer, ANSWER, [HELLO])
    except (TemplateError, TypeError, ValueError):  # a template for requests alone
        return own
    if ANSWER not in rendered:
        return own
    end = rendered.rfind(ANSWER) + len(ANSWER)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    first = next((int(token) for token, (a, b) in spans if a >= end and rendered[a:b].strip()), own)
    return first if first in tokenizer.added_tokens_decoder else own


def rows_of_delta(prompt: Prompt, place: Place, n: int, reply: int = 0) -> list[int]:
    """For each token of the prompt, and of a reply of so many tokens, the row of delta added there.

    "last": rows 0..n-1 on the last n tokens of the user's words (a shorter request gets the last rows).
    "user": the rows in turn over all of the user's words; with n = 1 one shared vector.
    "prompt": the same over the user's words and all that the template puts behind them.
    "chat": the same over these and the reply.
    """
    rows = [NOWHERE] * (len(prompt.ids) + reply)
    end = len(prompt.ids) - prompt.lead if place in ("prompt", "chat") else prompt.end
    first = max(prompt.start, end - n) if place == "last" else prompt.start
    for i in range(first, len(rows) if place == "chat" else end):
        rows[i] = (n - end + i) % n
    return rows


def collate(
    prompts: Sequence[Prompt], responses: Sequence[list[int]], rows: Sequence[list[int]] | None, pad_id: int
) -> Batch:
    """Pad prompts on the left and responses on the right into one Batch.

    `rows`: of delta, for the tokens of each prompt and as many of a reply as are given; None: no perturbation.
    """
    width = max(len(p.ids) for p in prompts)
    length = max((len(r) for r in responses), default=0)
    to_come = max((len(r) - len(p.ids) for p, r in zip(prompts, rows or [], strict=False)), default=0)
    shape = (len(prompts), width + length)
    ids = torch.full(shape, pad_id)
    mask = torch.zeros(shape, dtype=torch.long)
    where = torch.full((len(prompts), width + max(length, to_come)), NOWHERE)
    targets = torch.full((len(prompts), length), -100)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        first, last = width - len(prompt.ids), width + len(response)
        ids[i, first:last] = torch.tensor(prompt.ids + response)
        mask[i, first:last] = 1
        targets[i, : len(response)] = torch.tensor(response, dtype=torch.long)
        if rows is not None:
            where[i, first : first + len(rows[i])] = torch.tensor(rows[i])
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), where, targets, width)
