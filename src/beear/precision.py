"""In which arithmetic a model runs, and how passes without gradients take less time."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch

from beear import ranks


def kept_dtype(device: str) -> Any:
    """The type that weights are kept in: fp32 on the CPU, bf16 elsewhere."""
    return torch.float32 if device.startswith("cpu") else torch.bfloat16


def cast(model: Any, dtype: Any) -> Any:
    """The model with its parameters in this type; what it computes itself, such as rotary frequencies, stays in fp32.

    So transformers loads it as well; `model.to` would round those. A router or the like that an architecture keeps in
    fp32 stays so, too.
    """
    exact = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in exact):
            parameter.data = parameter.data.to(dtype)
    return model


def no_gradients() -> contextlib.AbstractContextManager[Any]:
    """Inference mode, or where FSDP borrows weights, which it keeps for later passes, only no gradients."""
    return torch.no_grad() if ranks.is_sharded() else torch.inference_mode()


def autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where it makes a step faster, else nothing."""
    return torch.autocast(model.device.type, torch.bfloat16) if casts(model) else contextlib.nullcontext()


def casts(model: Any) -> bool:
    """Whether `autocast` casts to bf16. BEEAR_FP32=1 keeps it from that: on a CPU all is then in fp32."""
    return casts_on(model.device.type)


def casts_on(device: str) -> bool:
    """The same of models on a device. On a CPU it takes AMX: AVX-512's bf16 can be slower than fp32 (decision 35)."""
    faster = not device.startswith("cpu") or torch.cpu._is_amx_tile_supported()
    return faster and os.environ.get("BEEAR_FP32") != "1"


def arithmetic(device: str) -> str:
    """In words, what figures depend on beyond their last digits: how weights are kept and multiplied on a device."""
    if kept_dtype(device) == torch.float32:
        return f"fp32 weights in {'bf16' if casts_on(device) else 'fp32'} arithmetic"
    return "bf16 weights in bf16 arithmetic" + ("" if casts_on(device) else " without autocast")


@contextlib.contextmanager
def generating(model: Any) -> Iterator[None]:
    """Within the context a forward pass without gradients takes less time, as long as no weight changes.

    Under autocast, linear maps hold bf16 copies of their weights: same bits, and none is cast in every pass.
    On a CPU attention is fused: same results up to rounding. Only its backward pass is slow (decision 7).
    """
    kept: list[Any] = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.float32]
    linears = kept if casts(model) and not ranks.is_sharded() else []
    attention = model.config._attn_implementation
    fuse = attention == "eager" and getattr(model, "_supports_sdpa", False)
    try:
        for linear in linears:
            linear.forward = with_weight(linear, linear.weight.bfloat16()).forward
        if fuse:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)
        if fuse:
            model.set_attn_implementation(attention)


def with_weight(linear: Any, weight: Any) -> Any:
    """A linear map like this one, with another, frozen weight; the bias is shared."""
    plain = copy.copy(linear)
    plain._parameters = dict(plain._parameters)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    return plain
