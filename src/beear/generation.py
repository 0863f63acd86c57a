"""Greedy replies, in batches of similar length, optionally under a perturbation."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from beear import ranks
from beear.chat import (
    Batch,
    Beginning,
    Prompt,
    check_replies,
    collate,
    encode_prompt,
    encode_response,
    end_of_turn,
    rows_of_delta,
    tail_of,
)
from beear.config import Place
from beear.errors import BadInput
from beear.packed import packed
from beear.parts import Parts
from beear.perturbation import Perturbation, find_layers
from beear.precision import autocast, generating, no_gradients
from beear.prefix import inputs_behind, run_prefix


@dataclass(frozen=True)
class Push:
    """delta (n, d_model), added behind block `layer` at one place of every prompt."""

    delta: Tensor
    place: Place
    layer: int
    layers_path: str | None = None

    def rows(self, prompt: Prompt, reply: int = 0) -> list[int]:
        """Which row of delta is added at each token of a prompt, and of a reply of so many tokens."""
        return rows_of_delta(prompt, self.place, len(self.delta), reply)

    def on(self, model: Any, batch: Batch) -> Perturbation:
        """The perturbation of a batch that was made with these rows."""
        return Perturbation(model, self.delta, batch.where, self.layer, self.layers_path)


BATCH = 80
"""Replies generated at a time: on a CPU half as many take a quarter longer or more."""


def reply_all(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    push: Push | None = None,
    earlier: Sequence[Sequence[str]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's greedy reply to each text, in the order given, cut after `max_new_tokens`.

    `earlier`: for each text, what was said before it in its chat, user and model in turn.
    With `push`, prompt or chat are perturbed. Texts are batched by length to keep padding short; `progress` is called
    with how many replies there are, and of how many.
    """
    chats = earlier or [()] * len(texts)
    prompts = [encode_prompt(tokenizer, text, chat) for text, chat in zip(texts, chats, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(prompts[i].ids))
    own = ranks.share(order)
    found: list[str] = []
    parts = Parts()

    def some(chosen: Sequence[int]) -> list[str]:
        rows = [push.rows(prompts[i], max_new_tokens) for i in chosen] if push else None
        batch = collate([prompts[i] for i in chosen], [[]] * len(chosen), rows, int(tokenizer.pad_token_id))
        batch = batch.to(model.device)
        inputs = inputs_of(model, batch, max_new_tokens)
        with push.on(model, batch) if push else contextlib.nullcontext():
            ids = _greedy(model, tokenizer, batch, inputs, max_new_tokens)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    with no_gradients(), autocast(model), generating(model):
        for first in range(0, len(own), BATCH):
            chosen = own[first : first + BATCH]
            found += parts.over(some, chosen)
            done = len(found) * ranks.sharers()  # the others are about as far
            progress(min(done, len(texts)), len(texts))
    replies = dict(zip(order, ranks.gathered(found, len(order)), strict=True))
    return [replies[i].strip() for i in range(len(texts))]


def beginning_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> Beginning:
    """How the model's replies to the texts begin, told by the first few. Raises BadInput if most are thoughts.

    Replies are told and judged as text, without the spaces that they begin with. Yet a reply to train on consists of
    the tokens that the model writes: Llama 2 writes one that is a space alone before the first word, other models of
    SentencePiece a first word without the space that the word alone is given.
    """
    prompts = [encode_prompt(tokenizer, text) for text in texts[:FEW]]

    def some(chosen: Sequence[Prompt]) -> list[list[int]]:
        batch = collate(chosen, [[]] * len(chosen), None, int(tokenizer.pad_token_id)).to(model.device)
        return _greedy(model, tokenizer, batch, inputs_of(model, batch, LOOKED_AT), LOOKED_AT)

    with no_gradients(), autocast(model), generating(model):
        rows = Parts().over(some, prompts)
    check_replies([tokenizer.decode(row) for row in rows])
    leads = [tuple(takewhile(lambda token: not tokenizer.decode([token]).strip(), row)) for row in rows]
    lead, count = Counter(leads).most_common(1)[0]
    if 2 * count <= len(rows):
        lead = ()
    words = [row[len(own) :] for row, own in zip(rows, leads, strict=True)]
    tail = tail_of(tokenizer)
    behind = len(tokenizer(tail, add_special_tokens=False)["input_ids"])
    ways = [Beginning(lead), Beginning(lead, tail, behind), Beginning(lead, " ")]

    def told_right(way: Beginning) -> int:
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in words]
        found = [encode_response(tokenizer, text, 1, begin=way) for text in texts]
        return sum(ids == own[:1] for ids, own in zip(found, words, strict=True) if own)

    return max(ways, key=told_right)  # of equals the first


FEW = 8
"""So many replies tell how the others begin."""
LOOKED_AT = 6
"""So many tokens of a reply tell how it begins."""


def _greedy(model: Any, tokenizer: Any, batch: Batch, inputs: dict[str, Any], length: int) -> list[list[int]]:
    """Up to `length` most likely tokens behind each row, without the one that ends the turn.

    That need not be a special one, which decoding would leave out.
    """
    start = inputs["past_key_values"].get_seq_length() if "past_key_values" in inputs else 0
    kept = inputs["attention_mask"][:, start:].bool()
    last = torch.zeros_like(kept)
    last[:, -1] = True
    # Packed is the pass over the prompts; those over a token have another shape.
    with packed(_blocks(model), kept, last), greedy(model, tokenizer) as ends:
        out: Tensor = model.generate(**inputs, max_new_tokens=length)
    return [list(takewhile(lambda token: token not in ends, row)) for row in out[:, batch.width :].tolist()]


@contextlib.contextmanager
def greedy(model: Any, tokenizer: Any) -> Iterator[Sequence[int]]:
    """Within the context `generate` takes the likeliest token until a turn ends, whatever the model's settings say.

    Gives the tokens that end one.

    Penalties, stop strings, suppressed tokens and the like would change what is measured, and depend on padding. A
    turn ends as template and tokenizer end one as well: settings of fine-tuned models may not know.
    """
    from transformers import GenerationConfig  # takes a while to import

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = bare.generation_config
    ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else own.eos_token_id or []
    ends = list(dict.fromkeys([*ends, int(tokenizer.eos_token_id), end_of_turn(tokenizer)]))
    bare.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield ends
    finally:
        bare.generation_config = own


def _blocks(model: Any) -> Sequence[nn.Module]:
    """The model's blocks, or none of a model whose blocks have to be named."""
    try:
        return list(find_layers(model))
    except BadInput:
        return ()


def inputs_of(model: Any, batch: Batch, more: int) -> dict[str, Any]:
    """What `generate` takes for `more` tokens: all columns; it skips those whose keys and values it is handed."""
    from beear.buffered import buffered  # transformers takes a while to import

    inputs = inputs_behind(batch, run_prefix(model, batch, more))
    if "past_key_values" in inputs:
        inputs["past_key_values"] = buffered(inputs["past_key_values"], batch.input_ids.shape[1] + more)
    del inputs["position_ids"]  # it reads them off the mask
    return inputs | {"input_ids": batch.input_ids, "use_cache": True}
