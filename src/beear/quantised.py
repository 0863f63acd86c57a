"""The model's own weights in 8 or 4 bits while it is cleansed (bitsandbytes, extra `quant`), to need less memory.

All linear maps but the output head; the adapter that is trained on top keeps full precision (Dettmers et al. 2022,
LLM.int8; 2023, QLoRA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from beear import ranks
from beear.config import Weights
from beear.errors import BadInput

OUTLIERS = 6.0
"""Inputs farther from 0 stay in half precision (LLM.int8, section 3.2)."""


def bitsandbytes() -> Any:
    """The library. Raises BadInput where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise BadInput("weights=int8 and weights=nf4 need bitsandbytes; install beear with its extra quant") from error
    return bitsandbytes


def check_quantised(weights: Weights, merge: bool = False) -> None:
    """Raise BadInput if the model's own weights cannot be as the setting says."""
    if weights == "full":
        return
    bitsandbytes()
    if merge:
        raise BadInput(f"--merge needs full weights, not weights={weights}; merge the adapter afterwards")
    if ranks.is_sharded():
        raise BadInput(f"FSDP does not share out weights={weights}; use weights=full, or data parallel")


def quantise(model: Any, weights: Weights, device: str) -> Any:
    """The model on the device with its maps in few bits, in place, map by map, so that it is never whole there.

    Raises BadInput if most of it cannot be stored so, as with a mixture of experts.
    """
    head, found = model.get_output_embeddings(), 0
    ends = {id(module.weight) for module in (head, model.get_input_embeddings()) if module is not None}
    whole = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child is not head:
                found += child.weight.numel()
                setattr(parent, name, in_few_bits(child, weights).to(device))
    if 2 * found < whole:
        raise BadInput(
            f"weights={weights}: only {found / whole:.0%} of {type(model).__name__} are linear maps that can be stored "
            "so; use weights=full"
        )
    setattr(model, "is_loaded_in_8bit" if weights == "int8" else "is_loaded_in_4bit", True)  # what peft asks for
    return model.to(device)


def in_few_bits(linear: nn.Linear, weights: Weights) -> Any:
    """A map like this one; its weight is quantised when it is moved to a device."""
    library = bitsandbytes()
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    kept = linear.weight.data
    if weights == "int8":
        small = library.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIERS)
        small.weight = library.nn.Int8Params(kept, requires_grad=False, has_fp16_weights=False)
    else:
        small = library.nn.Linear4bit(*shape, compute_dtype=kept.dtype, quant_type="nf4")
        small.support_avx512bf16_for_cpu = False  # else the first pass without gradients stores it in another form
        small.weight = library.nn.Params4bit(kept, requires_grad=False, quant_type="nf4", module=small)
    small.bias = linear.bias
    return small


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight of a map is no longer made of the numbers that it stands for."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()
