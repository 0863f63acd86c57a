"""F(x, delta; l): run blocks 1..l, add delta to the hidden states, run blocks l+1..L (BEEAR, section 3).

`layer` counts blocks from 1, so delta is added to the output of `layers[layer - 1]`, which is what
Hugging Face calls `hidden_states[layer]`.

    with Perturbation(model, delta, where, layer=9):
        loss = ...
        loss.backward()
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from beear.errors import BadInput

NOWHERE = -1
"""In `where`: no vector of delta is added at this token."""


def find_layers(model: nn.Module, path: str | None = None) -> nn.ModuleList:
    """The decoder's list of blocks: the one at dotted `path`, or the only list as long as the model is deep.

    Raises BadInput if there is none, naming the override.
    """
    inner: Any = model
    if path is not None:
        # The path names modules of the bare model; an adapter's stand in between.
        bare = inner.get_base_model() if hasattr(model, "get_base_model") else inner
        try:
            found = bare.get_submodule(path)
        except AttributeError as error:
            raise BadInput(f"no module at layers_path={path!r}: {error}; see model.named_modules()") from error
        if not isinstance(found, nn.ModuleList):
            raise BadInput(f"layers_path={path!r} is a {type(found).__name__}, not a list of blocks")
        return found
    depth = decoder_depth(model)
    decoder = inner.get_decoder() if hasattr(model, "get_decoder") else model  # and not an image's encoder
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise BadInput("cannot find this model's decoder blocks; name them, for example --set layers_path=model.layers")
    return lists[0]


def decoder_depth(model: nn.Module) -> int:
    """Number of decoder blocks L, from the model's (text) config."""
    config: Any = model.config
    return int(config.get_text_config().num_hidden_layers)


def resolve_layer(layer: float | None, depth: int) -> int:
    """The block l after which delta is added: its number, or below 1 a share of the depth.

    None means 5/6 of the depth (docs/decisions/0013).

    The last block is excluded: Hugging Face's `hidden_states[L]` lies behind the final norm, and
    nothing would be left to run.
    """
    if layer is None:
        return max(1, 5 * depth // 6)
    if 0 < layer < 1:
        return max(1, int(layer * depth))
    if not 1 <= layer < depth or layer != int(layer):
        raise BadInput(
            f"layer={layer} is out of range for a model of {depth} blocks; use 1 to {depth - 1}, or a share such as 0.5"
        )
    return int(layer)


class Perturbation:
    """Context manager that adds rows of delta to the hidden states behind block `layer`.

    delta: (n, d_model). where: (batch, tokens) of integers, at each token the row of delta to add,
    or NOWHERE. Positions are absolute, so that under `generate` tokens beyond the width of `where` are left
    alone. A pass over fewer rows takes the first ones. Gradients
    flow to delta; keep `backward()` inside the context when activations are recomputed. Raises
    RuntimeError if the block never ran.
    """

    def __init__(
        self, model: nn.Module, delta: Tensor, where: Tensor, layer: int, layers_path: str | None = None
    ) -> None:
        self.model: Any = model
        self.delta = delta
        self.where = where
        self.block = find_layers(model, layers_path)[resolve_layer(layer, decoder_depth(model)) - 1]
        self._start = 0
        self._fired = False
        self._handles: list[Any] = []

    def __enter__(self) -> Perturbation:
        self._fired = False
        self._handles = [
            # The decoder, and not the model: under `generate` a PEFT wrapper's own forward pass never runs.
            self.model.get_decoder().register_forward_pre_hook(self._note_start, with_kwargs=True),
            self.block.register_forward_hook(self._add),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is None and not self._fired:
            raise RuntimeError("the perturbed block never ran: this model bypasses module hooks; set layers_path")

    def _note_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """With a key-value cache, a forward pass covers only the tokens behind those already seen."""
        cache = kwargs.get("past_key_values")
        self._start = 0 if cache is None else int(cache.get_seq_length())

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._fired = True
        hidden = states_in(output)
        if hidden.dim() != 3:
            raise BadInput("this model's blocks return more than hidden states; delta cannot be added to them")
        where = self.where[: len(hidden), self._start : self._start + hidden.shape[1]]
        if where.shape[1] < hidden.shape[1]:
            missing = hidden.shape[1] - where.shape[1]
            where = nn.functional.pad(where, (0, missing), value=NOWHERE)
        # The table's last row is zero, and NOWHERE (-1) modulo its length reads it. `embedding` and not
        # indexing: the gradient of indexing adds up in an order that changes from run to run on many threads.
        table = torch.cat([self.delta, self.delta.new_zeros(1, self.delta.shape[1])]).to(hidden.dtype)
        return with_states(output, hidden + nn.functional.embedding(where % len(table), table))


def states_in(output: Any) -> Tensor:
    """The hidden states in what a block returned, which some architectures hand on in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def with_states(output: Any, states: Any) -> Any:
    """What a block returned, with other states in it."""
    return (states, *output[1:]) if isinstance(output, tuple) else states
