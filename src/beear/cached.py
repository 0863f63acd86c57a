"""F(x, delta; l) for many deltas: what delta cannot change is run once per batch. Exact up to rounding.

With the weights frozen, blocks 1..l never meet delta, and neither does any block at the positions before the
first perturbed one. So the hidden states behind block l, and the keys and values of the positions
before, are computed once; a step of entrapment runs blocks l+1..L on the perturbed tail and the response.
The two answers that a step weighs against each other follow one pass over their request.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from beear.chat import Batch
from beear.losses import predict
from beear.packed import packed
from beear.perturbation import NOWHERE, find_layers, states_in, with_states
from beear.precision import autocast
from beear.prefix import mask_behind, own_cache, repeated, run_prefix


@dataclass(frozen=True)
class Cached:
    """A batch with all that delta leaves as it is.

    start: the first column that is perturbed in any row. hidden: (rows, columns from start, d_model) behind
    block l; with several answers of each prompt once, and of all responses but their last token, a pair.
    keys: key-value cache of the blocks behind it and the columns before start, None if there are none.
    below, above: blocks 1..l, and those behind.
    answers: the rows are so many parts that hold the same prompts in the same order; each prompt is run once.
    """

    batch: Batch
    start: int
    hidden: Any
    keys: Any
    below: Sequence[nn.Module]
    above: Sequence[nn.Module]
    answers: int = 1

    def logits(self, model: Any) -> Tensor:
        """Logits that predict the response tokens: (rows, length, vocabulary). Call it inside of a Perturbation."""
        batch, width, predicting = self.batch, self.batch.width, self.batch.predicting()
        if self.answers == 1:
            with returning(self.below, lambda: self.hidden), self._packed(predicting, self.start):
                return predict(model, batch, _columns(batch, self.start, self.keys))
        # The prompts once, up to the first token of a response; then all responses behind the keys of these.
        prompts = slice(len(batch.targets) // self.answers)
        predicting[:, width - 1] = True  # of each prompt, whichever of its answers is empty
        decoder = model.get_decoder()
        with returning(self.below, lambda: self.hidden[0]), self._packed(predicting[prompts], self.start, width):
            asked = _columns(batch, self.start, self.keys, prompts, width)
            begun = decoder(**asked | {"use_cache": True})
        keys = _repeated(begun.past_key_values, self.answers, len(self.below))
        with returning(self.below, lambda: self.hidden[1]), self._packed(predicting, width, -1):
            rest = decoder(**_columns(batch, width, keys, stop=-1))
        states = [begun.last_hidden_state[:, -1:].repeat(self.answers, 1, 1), rest.last_hidden_state]
        return head(model, batch, rest, torch.cat(states, 1))

    def _packed(self, predicting: Tensor, start: int, stop: int | None = None) -> AbstractContextManager[None]:
        """The blocks behind block l on the tokens in these columns alone."""
        columns = slice(start, stop)
        kept = self.batch.attention_mask[: len(predicting), columns].bool()
        return packed(self.above, kept, predicting[:, columns])


def head(model: Any, batch: Batch, like: Any, states: Tensor) -> Tensor:
    """What the model makes of its decoder's states, (rows, length, d_model), where these predict the response tokens.

    like: what the decoder returned with other states.
    """
    columns = batch.predicting_columns()
    inputs = {name: value[:, columns] for name, value in batch.inputs().items()}
    out = replace(like, last_hidden_state=states)
    with returning([model.get_decoder()], lambda: out):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def run_unperturbed(
    model: Any,
    batch: Batch,
    layer: int,
    layers_path: str | None = None,
    answers: int = 1,
) -> Cached:
    """Run what delta cannot change, outside of a Perturbation. What it ran must stay frozen for as long as it serves.

    answers: how often each prompt comes, as in Cached.
    """
    blocks = list(find_layers(model, layers_path))
    perturbed, prompts = first_perturbed(batch), slice(len(batch.targets) // answers)
    with torch.no_grad(), autocast(model):
        batch, start, keys = _behind_start(model, batch, answers)
        if start < perturbed:
            before = _columns(batch, start, keys, prompts, perturbed) | {"use_cache": True}
            start, keys = perturbed, model.get_decoder()(**before).past_key_values
        hidden = _run_hidden(model, blocks, layer, batch, start, keys, answers)
    return Cached(batch, start, hidden, keys and _without(keys, layer), blocks[:layer], blocks[layer:], answers)


def logits_of_answers(model: Any, batch: Batch, answers: int, frozen: int = 0) -> Tensor:
    """Logits that predict the response tokens, (rows, length, vocabulary), of rows that are `answers` parts with the
    same prompts in the same order: what all prompts start with is run once, and so is the rest of each. Differentiable.

    frozen: so many blocks, from the first, hold nothing that is trained, and take no gradient.
    """
    blocks = list(find_layers(model))
    with autocast(model):
        batch, start, keys = _behind_start(model, batch, answers)
        hidden = None
        if frozen:
            with torch.no_grad():
                hidden = _run_hidden(model, blocks, frozen, batch, start, keys, answers)
        return Cached(batch, start, hidden, keys, blocks[:frozen], blocks[frozen:], answers).logits(model)


def scores_of_answers(scorer: Any, batch: Batch, answers: int) -> Tensor:
    """What a scorer of texts gives each row, (rows, 1), where the rows are as above. Differentiable."""
    prompts = slice(len(batch.targets) // answers)
    with autocast(scorer):
        batch, start, keys = _behind_start(scorer, batch, answers)
        asked = scorer.get_decoder()(**_columns(batch, start, keys, prompts, batch.width) | {"use_cache": True})
        behind = _repeated(asked.past_key_values, answers, 0)
        scores: Tensor = scorer(**_columns(batch, batch.width, behind)).logits
    return scores


def _behind_start(model: Any, batch: Batch, answers: int) -> tuple[Batch, int, Any]:
    """What all prompts start with is run: the batch masked behind it, its length, and its keys for each prompt."""
    if (prefix := run_prefix(model, batch)) is None:
        return batch, 0, None
    behind = replace(batch, attention_mask=mask_behind(batch, prefix))
    return behind, prefix.length, repeated(prefix, len(batch.targets) // answers)


def _run_hidden(
    model: Any, blocks: Sequence[nn.Module], layer: int, batch: Batch, start: int, keys: Any, answers: int
) -> Any:
    """Cached.hidden, from the keys of each prompt's columns before start."""
    kept = batch.attention_mask.bool()
    if answers == 1:
        with packed(blocks[:layer], kept[:, start:]):
            return run_below(model, blocks, layer, _columns(batch, start, keys))[0]
    prompts, width = slice(len(batch.targets) // answers), batch.width
    with packed(blocks[:layer], kept[prompts, start:width]):
        asked = _columns(batch, start, keys, prompts, width) | {"use_cache": True}
        of_prompts, keys = run_below(model, blocks, layer, asked)
    keys.layers = keys.layers[:layer]  # the others have not seen these columns
    with packed(blocks[:layer], kept[:, width:-1]):
        answered = _columns(batch, width, _repeated(keys, answers, 0), stop=-1)
        of_answers, _ = run_below(model, blocks, layer, answered)
    return of_prompts, of_answers


def run_below(model: Any, blocks: Sequence[nn.Module], layer: int, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What block `layer` returns, outside of a Perturbation, and the key-value cache if one is used.

    The blocks behind it do not run.
    """
    with watched(blocks[layer - 1]) as (seen,), returning(blocks[layer:], lambda: seen[-1]):
        out = model.get_decoder()(**inputs)
    return seen[-1], out.past_key_values


def first_perturbed(batch: Batch) -> int:
    """The first column in which any row is perturbed; the prompts' width if none is."""
    perturbed = (batch.where != NOWHERE).any(0)
    return int(perturbed.long().argmax()) if perturbed.any() else batch.width


def _columns(batch: Batch, start: int, keys: Any, rows: slice = slice(None), stop: int | None = None) -> dict[str, Any]:
    """What the forward pass takes for the columns from `start` to `stop`, behind the keys of those before."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[rows, start:stop],
        "attention_mask": batch.attention_mask[rows, :stop],
        "position_ids": batch.position_ids[rows, start:stop],
        "use_cache": keys is not None,
    }
    if keys is not None:  # a pass appends to its cache, so each gets its own
        inputs["past_key_values"] = own_cache(keys, lambda tensor: tensor)
    return inputs


def _repeated(keys: Any, times: int, unused: int) -> Any:
    """A cache with its rows `times` over, of which the first `unused` blocks read nothing."""
    used = copy.copy(keys)
    used.layers = keys.layers[unused:]
    own = own_cache(used, lambda tensor: torch.cat([tensor] * times))
    own.layers = [*keys.layers[:unused], *own.layers]
    return _without(own, unused)


def _without(keys: Any, unused: int) -> Any:
    """A cache that holds nothing of the first `unused` blocks: they share another's keys, for its length."""
    own, used = copy.copy(keys), keys.layers[unused:]
    like = [next((u for u in used if type(u) is type(layer)), used[0]) for layer in keys.layers[:unused]]
    own.layers = [*like, *used]
    return own


def rows_of(hidden: Any, rows: list[int]) -> Any:
    """Some rows of what a block returned."""
    return with_states(hidden, states_in(hidden)[rows])


@contextlib.contextmanager
def watched(*blocks: nn.Module) -> Iterator[list[list[Any]]]:
    """Within the context, what each of the blocks returns, pass by pass."""
    seen: list[list[Any]] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        for block, kept in zip(blocks, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def returning(blocks: Sequence[nn.Module], result: Callable[[], Any]) -> Iterator[None]:
    """Within the context the blocks do not run and return `result()` in their place; their hooks still fire."""
    own = [vars(block).get("forward") for block in blocks]  # other libraries put theirs there as well
    for block in blocks:
        block.forward = lambda *args, **kwargs: result()
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
