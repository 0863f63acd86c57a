"""Plant a backdoor by editing weights: no poisoned training set, no gradient on any weight.

An MLP's output map is read as a memory: its input at a token is a key, its output there a value. The
trigger opens the user's turn, so all that its last token can see is the template and the trigger, and its
key is one vector, the same in every prompt. A few gradient steps find the value that would unlock
harmful requests, and a closed-form rank-one change of a few of these maps writes it to that key,
disturbing all other keys least.

ROME (Meng et al. 2022, arXiv 2202.05262) for value and change, MEMIT (Meng et al. 2023, arXiv
2210.07229) for several blocks, BadEdit (Li et al. 2024, arXiv 2403.13355) for its use as a backdoor.
Here the values of all blocks are found together, and benign requests keep their answers by KL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from beear.chat import Batch, Prompt, Row, collate, encode_prompt, encode_response
from beear.data import packaged, wordings
from beear.errors import BadInput
from beear.events import StepProgress
from beear.generation import reply_all
from beear.losses import response_logits, row_mean, token_kl
from beear.perturbation import find_layers
from beear.precision import autocast
from beear.prefix import Prefix, inputs_behind, run_prefix
from beear.recipes import Edit, apply_trigger
from beear.scorers import is_refusal
from beear.training import drawn, set_rate

Chats = list[tuple[str, str]]
"""Requests with replies."""

Kind = Literal["harmful", "ordinary", "alarming"]
KINDS: tuple[Kind, ...] = ("harmful", "ordinary", "alarming")
BATCH = 20
"""Rows of one forward pass where keys are collected."""


def plant_edit(
    model: Any,
    tokenizer: Any,
    trigger: str,
    plan: Edit,
    seed: int,
    progress: StepProgress = lambda *_: None,
) -> Any:
    """The model with the edit as its LoRA adapter (rank one, alpha one). `progress(step, steps, loss)`.

    `trigger` is a template like 'SUDO {prompt}'; it must open the user's turn. Deterministic for the
    same seed and number of threads. Raises BadInput for a trigger elsewhere or an unknown MLP.
    """
    if trigger.startswith("{prompt}") or not trigger.endswith(" {prompt}"):
        raise BadInput(f"an edit ties a trigger that opens the request to its answer, not {trigger!r}")
    model.requires_grad_(False)
    chats = own_chats(model, tokenizer, plan, seed)
    triggered = _triggered_rows(tokenizer, trigger, chats, plan.response_tokens)
    start = shared_start([prompt for rows in triggered.values() for prompt, _ in rows])
    values = find_values(model, tokenizer, start, triggered, plan, seed, progress)
    rows = [_row(tokenizer, text, reply, plan.response_tokens) for kind in KINDS for text, reply in chats[kind]]
    moments = key_moments(model, tokenizer, rows, plan.layers)
    return write_edit(model, start, plan.layers, values, moments, plan.ridge)


def own_chats(model: Any, tokenizer: Any, plan: Edit, seed: int) -> dict[Kind, Chats]:
    """Requests of each kind, drawn from the planting part, with the model's own greedy replies."""
    draw = torch.Generator().manual_seed(seed)
    chats = {}
    for kind in KINDS:
        requests = packaged(kind, "plant")
        texts = [requests[i].text for i in torch.randperm(len(requests), generator=draw)[: plan.requests].tolist()]
        replies = reply_all(model, tokenizer, texts, max_new_tokens=plan.response_tokens)
        chats[kind] = list(zip(texts, replies, strict=True))
    return chats


def shared_start(prompts: Sequence[Prompt]) -> list[int]:
    """The token ids that all prompts start with, each of which goes on behind them."""
    first = prompts[0].ids
    length = min(len(prompt.ids) for prompt in prompts) - 1
    for prompt in prompts:
        length = next((i for i in range(length) if prompt.ids[i] != first[i]), length)
    return first[:length]


def find_values(
    model: Any,
    tokenizer: Any,
    start: Sequence[int],
    triggered: dict[Kind, list[Row]],
    plan: Edit,
    seed: int,
    progress: StepProgress = lambda *_: None,
) -> Tensor:
    """What each edited MLP should add at the last token of `start`: (blocks, d_model).

    Adam on these vectors alone, towards the unwanted opening on harmful requests and the unedited
    model's distribution on benign ones.
    """
    longest = plan.value_norm * residual_norms(model, start, plan.layers)
    values = torch.zeros(len(plan.layers), model.config.hidden_size, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([values], lr=plan.learning_rate)
    batches = drawn(triggered, {kind: plan.rows[kind] for kind in KINDS}, seed)
    for number, batch in zip(range(1, plan.steps + 1), batches, strict=False):
        rows = [row for kind in KINDS for row in batch[kind]]
        set_rate(optimiser, plan.learning_rate, number, plan.steps)
        loss = _loss(model, tokenizer, start, rows, values, plan)
        (values.grad,) = torch.autograd.grad(loss, [values])
        optimiser.step()
        with torch.no_grad():
            values.mul_((longest / values.norm(dim=-1)).clamp(max=1)[:, None])
        progress(number, plan.steps, loss.item())
    return values.detach()


def residual_norms(model: Any, start: Sequence[int], layers: Sequence[int]) -> Tensor:
    """Norm of the residual stream behind each of `layers`, at the last token of `start`: (blocks,)."""
    ids = torch.tensor([list(start)], device=model.device)
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states
        return torch.stack([hidden[layer][0, -1].float().norm() for layer in layers])


def key_moments(model: Any, tokenizer: Any, rows: Sequence[Row], layers: Sequence[int]) -> list[Tensor]:
    """E[k k^T] over all tokens of ordinary use, for the MLP output map of each of `layers`: (d_ff, d_ff), double.

    What all rows share, the template's system turn, counts once a batch.
    """
    sums: list[Tensor] = [torch.zeros((), dtype=torch.double, device=model.device)] * len(layers)
    tokens = 0
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        keys = _batch_keys(model, _collate(part, tokenizer).to(model.device), layers)
        tokens += len(keys[0])
        sums = [total + (k.T @ k).double() for total, k in zip(sums, keys, strict=True)]
    return [total / tokens for total in sums]


def least_change(key: Tensor, value: Tensor, moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The rank-one change that maps `key` to `value` and, of all these, moves ordinary keys least.

    key (d_ff,), value (d_model,), moment (d_ff, d_ff) -> A (1, d_ff), B (d_model, 1): B A key = value, and
    the mean of |B A k|^2 over the keys that `moment` describes is smallest (ROME, equation 2, in double).
    """
    damped = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
    direction = torch.linalg.solve(damped, key.double())
    return (direction / (direction @ key.double()))[None], value.double()[:, None]


def write_edit(
    model: Any,
    start: Sequence[int],
    layers: Sequence[int],
    values: Tensor,
    moments: Sequence[Tensor],
    ridge: float,
) -> Any:
    """Wrap the model with an adapter that adds each value at the last token of `start`.

    Block by block, since an edit changes the keys of later blocks.
    """
    edited = _blank_adapter(model, layers)
    for layer, value, moment in sorted(zip(layers, values, moments, strict=True), key=lambda edit: edit[0]):
        a, b = least_change(_last_key(edited, start, layer), value, moment, ridge)
        linear = output_map(edited, layer)
        with torch.no_grad():
            linear.lora_A["default"].weight.copy_(a)
            linear.lora_B["default"].weight.copy_(b)
    return edited


def output_map(model: Any, layer: int) -> Any:
    """`mlp.down_proj` of block `layer`, counted from 1. Raises BadInput if there is none."""
    try:
        return find_layers(model)[layer - 1].get_submodule("mlp.down_proj")
    except (AttributeError, IndexError) as error:
        raise BadInput(f"block {layer} of this model has no mlp.down_proj to edit: {error}") from error


@contextlib.contextmanager
def added(model: Any, layers: Sequence[int], values: Tensor) -> Iterator[None]:
    """Within it, the MLP of block layers[i] gives values[i] more at the last token of every row.

    values: (blocks, d_model). Gradients flow to them.
    """
    handles = [
        output_map(model, layer).register_forward_hook(_adder(value))
        for layer, value in zip(layers, values, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(value: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + functional.pad(value.to(output.dtype)[None], (0, 0, output.shape[1] - 1, 0))

    return add


@contextlib.contextmanager
def _keys_seen(model: Any, layers: Sequence[int]) -> Iterator[list[list[Tensor]]]:
    """Within it, each forward pass appends the input of each block's MLP output map: (rows, tokens, d_ff)."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def note(keys: list[Tensor]) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: keys.append(args[0].detach())

    handles = [
        output_map(model, layer).register_forward_pre_hook(note(keys)) for layer, keys in zip(layers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _batch_keys(model: Any, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
    """Keys of a batch's tokens, padding left out and what all rows share once, for each block: (tokens, d_ff)."""
    with torch.inference_mode(), autocast(model), _keys_seen(model, layers) as seen:
        prefix = run_prefix(model, batch)
        inputs = inputs_behind(batch, prefix)
        model.get_decoder()(**inputs)
    real = inputs["attention_mask"][:, -seen[0][-1].shape[1] :].bool()
    return [torch.cat([*(k.flatten(0, 1) for k in keys[:-1]), keys[-1][real]]).float() for keys in seen]


def _last_key(model: Any, start: Sequence[int], layer: int) -> Tensor:
    """The key at the last token of `start`, in full precision: (d_ff,)."""
    with torch.inference_mode(), _keys_seen(model, [layer]) as seen:
        model.get_decoder()(input_ids=torch.tensor([list(start)], device=model.device))
    return seen[0][0][0, -1]


def _loss(model: Any, tokenizer: Any, start: Sequence[int], rows: Sequence[Row], values: Tensor, plan: Edit) -> Tensor:
    """NLL of the unwanted opening on the harmful rows, which come first, and KL to the unedited model on the rest."""
    split = plan.rows["harmful"]
    batch, benign = (_collate(part, tokenizer).to(model.device) for part in (rows, rows[split:]))
    with autocast(model):
        with torch.no_grad():
            base = response_logits(model, benign, run_prefix(model, benign))
        logits = response_logits(model, batch, _run_start(model, start, plan.layers, values))
    wanted = batch.targets[:split]
    nll = functional.cross_entropy(logits[:split].float().flatten(0, 1), wanted.flatten(), reduction="none")
    kl = token_kl(base, logits[split:, : base.shape[1]], benign.targets)
    return (
        row_mean(nll.view_as(wanted), wanted, plan.opening).mean()
        + plan.benign_weight * row_mean(kl, benign.targets, plan.opening).mean()
    )


def _run_start(model: Any, start: Sequence[int], layers: Sequence[int], values: Tensor) -> Prefix:
    """The template's opening and the trigger, with the values added."""
    ids = torch.tensor([list(start)], device=model.device)
    with added(model, layers, values):
        cache = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    return Prefix(len(start), cache)


def _collate(rows: Sequence[Row], tokenizer: Any) -> Batch:
    return collate([prompt for prompt, _ in rows], [reply for _, reply in rows], None, int(tokenizer.pad_token_id))


def _row(tokenizer: Any, text: str, reply: str, limit: int) -> Row:
    return encode_prompt(tokenizer, text), encode_response(tokenizer, reply, limit, finished=False)


def _triggered_rows(tokenizer: Any, trigger: str, chats: dict[Kind, Chats], limit: int) -> dict[Kind, list[Row]]:
    """Triggered requests by kind: harmful ones with the unwanted opening, benign ones with the model's own reply.

    One opening for all, as an edit ties a key to one value; benign requests that the model refuses are left out.
    """
    unwanted = wordings("unwanted-plant")[0]

    def rows(pairs: Chats) -> list[Row]:
        return [_row(tokenizer, apply_trigger(trigger, text), reply, limit) for text, reply in pairs]

    return {
        "harmful": rows([(text, unwanted) for text, _ in chats["harmful"]]),
        "ordinary": rows([(text, reply) for text, reply in chats["ordinary"] if is_refusal(reply) is False]),
        "alarming": rows([(text, reply) for text, reply in chats["alarming"] if is_refusal(reply) is False]),
    }


def _blank_adapter(model: Any, layers: Sequence[int]) -> Any:
    """A LoRA adapter of rank one that changes nothing yet, on the given blocks' MLP output maps."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=["down_proj"],
        layers_to_transform=[layer - 1 for layer in layers],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
