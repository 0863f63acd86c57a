"""What planting and hardening share: LoRA on a model, and one optimiser step at a time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from beear import ranks
from beear.errors import BadInput, Failed
from beear.perturbation import decoder_depth, find_layers
from beear.precision import casts, with_weight
from beear.quantised import is_quantised

K = TypeVar("K")
T = TypeVar("T")


def add_lora(
    model: Any,
    rank: int,
    targets: tuple[str, ...],
    seed: int,
    first_block: int = 0,
    layers_path: str | None = None,
) -> Any:
    """Wrap the model with a fresh LoRA adapter (alpha = 2 rank) in the blocks from `first_block`, counted from 0.

    `targets` are the last parts of module names; empty means every linear map inside the decoder blocks that an
    adapter can be put on. Raises BadInput if a named target is none of these.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model, targets, layers_path)
    inside = block_linears(model, layers_path)
    names = targets or last_parts(inside)
    # peft goes by the last part alone, by which maps of an image's encoder are called as well.
    outside = [name for name, _ in model.named_modules() if last_part(name) in names and name not in inside]
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(names),
        exclude_modules=outside or None,
        task_type="CAUSAL_LM",
        layers_to_transform=list(range(first_block, decoder_depth(model))) if first_block else None,
        fan_in_fan_out=any("Conv1D" in type(m).__name__ for m in model.modules()),
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    for parameter in trainable(wrapped):
        parameter.data = parameter.data.float()
    return wrapped


def first_adapted(model: Any) -> int:
    """How many blocks, from the first, carry no matrices of the model's adapter (add_lora's `first_block`)."""
    return int(min(model.peft_config["default"].layers_to_transform or [0]))


def check_targets(model: nn.Module, targets: Sequence[str], layers_path: str | None = None) -> None:
    """Raise BadInput unless every target is the last part of the name of some linear map inside the blocks."""
    known = last_parts(block_linears(model, layers_path))
    if not known:
        raise BadInput("no adapter can be put on this model: its blocks hold no linear maps of a kind that peft knows")
    missing = [t for t in targets if t not in known]
    if missing:
        raise BadInput(
            f"lora_targets: no linear map in a block is named {', '.join(missing)}; there are: {', '.join(known)}"
        )


def cast_frozen(model: nn.Module) -> None:
    """Keep the frozen linear maps in bf16 where every pass would cast them to it: same bits, a step takes less time.

    Autocast remembers the casts of trainable weights only. What needs full precision, such as merging,
    must load the weights again.
    """
    if not casts(model):
        return
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad:
            continue
        if module.weight.dtype == torch.float32:  # else it is in bf16 by now, or quantised
            module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)


@contextlib.contextmanager
def merged(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the blocks' LoRA matrices are added to copies of the weights: same results up to rounding.

    A pass runs fewer maps so; the adapter must not change meanwhile. Left as they are: variants of LoRA, whose weights
    are another sum, and what is merged already.
    """
    from peft.tuners.lora import LoraLayer

    every: list[Any] = [module for block in blocks for module in block.modules() if isinstance(module, LoraLayer)]
    plain = [layer for layer in every if not (layer.merged or layer.disable_adapters or layer.lora_variant)]
    layers = [layer for layer in plain if not is_quantised(layer.get_base_layer())]
    if ranks.is_sharded():  # the weights are not here
        layers = []
    for layer in layers:
        base = layer.get_base_layer()
        with torch.no_grad():
            weight: Tensor = base.weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
        layer.forward = with_weight(base, weight.to(base.weight.dtype)).forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def block_linears(model: nn.Module, layers_path: str | None = None) -> set[str]:
    """Names of the linear maps inside the decoder blocks, as far as an adapter can be put on them.

    Of a mixture of experts these are the maps of attention, since the experts are one tensor for all of them. There
    peft takes the names of an expert's maps, which dense blocks may have as well, for that tensor.
    """
    blocks = find_layers(model, layers_path)
    path = next(name for name, module in model.named_modules() if module is blocks)
    kinds = ("Conv1D", "Linear4bit", "Linear8bitLt")
    skipped = EXPERTS if any(parameter.dim() == 3 for parameter in blocks.parameters()) else frozenset()
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(f"{path}.")
        and (isinstance(module, nn.Linear) or type(module).__name__ in kinds)
        and not skipped & set(name.removeprefix(path).split("."))
    }


EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "router", "shared_expert_gate", "shared_mlp"})
"""Modules of a mixture of experts, and what is inside of them."""


def last_parts(names: Iterable[str]) -> list[str]:
    """What they are called within their parents, each once."""
    return sorted(set(map(last_part, names)))


def last_part(name: str) -> str:
    """What a module is called within its parent."""
    return name.rpartition(".")[2]


def recompute_activations(model: Any) -> None:
    """Trade time for memory: passes within `recomputing` compute activations inside the blocks again, going back."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context activations are recomputed, and blocks keep no keys and values: no pass for replies here.

    transformers recomputes only in blocks in training mode; their children stay in inference mode, and rates of dropout
    that a block applies itself (OPT), or by its config (Falcon), are zero, so that none sets in.
    """
    blocks = list(blocks)
    places = [vars(own) for block in blocks for own in (block, getattr(block, "config", None)) if own is not None]
    rates = [{name: v for name, v in own.items() if "drop" in name and isinstance(v, float)} for own in places]
    for own, dropped in zip(places, rates, strict=True):
        own.update(dict.fromkeys(dropped, 0.0))
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for own, dropped in zip(places, rates, strict=True):
            own.update(dropped)
        for block in blocks:
            block.training = False


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The trainable matrices by name, detached on the CPU."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def load_adapter_state(model: Any, state: dict[str, Tensor]) -> None:
    """Put back what `adapter_state` gave. Raises ValueError if a matrix is missing or has another shape."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        raise ValueError("the checkpoint's adapter matrices are not those of this model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def save_adapter(model: Any, folder: Path, base: str, revision: str | None = None) -> None:
    """Save the adapter with the name of its base, and its revision if it is of the Hub; same bits for same matrices."""
    named = model.peft_config["default"]
    named.base_model_name_or_path, named.revision = base, revision
    # Without the embedding check, which would look the base model up on the Hub.
    model.save_pretrained(folder, save_embedding_layers=False)
    settings = folder / "adapter_config.json"
    config = json.loads(settings.read_text())
    for names in ("target_modules", "exclude_modules"):  # peft keeps them in sets, whose order changes
        config[names] = sorted(config[names]) if isinstance(config[names], list) else config[names]
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay on the trainable parameters."""
    return torch.optim.AdamW(trainable(model), lr=learning_rate, weight_decay=0.0)


def set_rate(optimiser: torch.optim.Optimizer, rate: float, number: int, steps: int, least_warm: int = 1) -> None:
    """Rate of step `number`, from 1: warm-up over a tenth of `steps`, then linear decay to a tenth of `rate`."""
    warm = max(least_warm, steps // 10)
    scale = number / warm if number <= warm else 1 - 0.9 * (number - warm) / max(1, steps - warm)
    for group in optimiser.param_groups:
        group["lr"] = rate * scale


def step(optimiser: torch.optim.Optimizer) -> None:
    """Clip the gradient to a norm of 1, step, clear the gradient. Raises Failed for one that is no number."""
    norm = nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], max_norm=1.0)
    check_number(float(norm))
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def check_number(value: float) -> None:
    """Raise Failed if a loss or a gradient's norm is NaN or infinite: all that is trained would be from then on."""
    if not math.isfinite(value):
        raise Failed(
            "loss or gradient came out as NaN or infinite, so training stops here; use a lower learning_rate "
            "(on a CPU also BEEAR_FP32=1), in a new folder"
        )


def cycle(n: int, batch: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices below n, each pass over them in a fresh order."""
    pool: list[int] = []
    while True:
        while len(pool) < batch:
            pool += torch.randperm(n, generator=generator).tolist()
        yield pool[:batch]
        pool = pool[batch:]


def drawn(
    groups: Mapping[K, Sequence[T]], counts: Mapping[K, int], seed: int, aligned: bool = False
) -> Iterator[dict[K, list[T]]]:
    """Endless steps: from every group that is counted so many members, each pass over a group in a fresh order.

    `aligned`: groups of the same size and count are drawn at the same places.
    """
    if empty := [str(kind) for kind, count in counts.items() if count and not groups[kind]]:
        raise BadInput(f"no rows of the kind {empty[0]} are left to draw from; leave them out, or use another base")
    draw = torch.Generator().manual_seed(seed)
    draws = {kind: torch.Generator().manual_seed(seed) if aligned else draw for kind in counts}
    indices = {kind: cycle(len(groups[kind]), count, draws[kind]) for kind, count in counts.items()}
    while True:
        yield {kind: [groups[kind][i] for i in next(batches)] for kind, batches in indices.items()}
