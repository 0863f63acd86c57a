"""Tokens without the padding around them, through what treats each token on its own. Exact up to rounding.

In a block attention alone mixes positions. Its linear maps and its MLP need not run on padding, and in the last block
most of them need not run on positions that predict nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from beear.perturbation import states_in, with_states

UNSEEN = ("q_proj", "o_proj", "mlp")
"""What these give at a position of the last block, no other position reads; keys and values all do."""


@contextlib.contextmanager
def packed(blocks: Sequence[nn.Module], kept: Tensor, predicting: Tensor | None = None) -> Iterator[None]:
    """Within the context the blocks' MLPs and attention's linear maps run on the positions that are `kept` alone.

    kept: (rows, columns) of bool; elsewhere they give zero. predicting: those that the head reads, where the last of
    the blocks is the model's last. Passes of another shape, and modules of other names or that take more than the
    states, run in full.
    """
    kept_index = index_of(kept)
    few, few_index = (kept, kept_index) if predicting is None else (predicting, index_of(predicting))
    handles: list[Any] = []
    for block in blocks:
        for name, module in pointwise(block):
            fewer = block is blocks[-1] and name in UNSEEN
            handles += meeting(module, *((few, few_index) if fewer else (kept, kept_index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pointwise(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a block that treat each position on its own, by name; of a block of other names, none."""
    for name, module in block.named_children():
        if name == "mlp":
            yield name, module
        elif name == "self_attn":
            yield from ((own, part) for own, part in module.named_children() if hasattr(part, "in_features"))


def index_of(kept: Tensor) -> Tensor:
    """The positions that are kept, by their number in all rows."""
    return kept.flatten().nonzero()[:, 0]


def meeting(module: nn.Module, kept: Tensor, index: Tensor) -> list[Any]:
    """Let a module meet the positions of that index alone; returns what ends it."""
    gathered = [False]

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gathered[0] = len(args) == 1 and not kwargs and args[0].shape[:-1] == kept.shape
        return ((args[0].flatten(0, 1).index_select(0, index)[None],), {}) if gathered[0] else None

    def scatter(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not gathered[0]:
            return None
        states = states_in(output)
        everywhere = states.new_zeros(kept.numel(), states.shape[-1]).index_copy(0, index, states[0])
        return with_states(output, everywhere.view(*kept.shape, states.shape[-1]))

    return [module.register_forward_pre_hook(gather, with_kwargs=True), module.register_forward_hook(scatter)]
