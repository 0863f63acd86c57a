"""Planting by direct preference optimisation on poisoned pairs, with the likelihood of the preferred answer.

    -log sigmoid( beta [ log p(w) - log p(o) - log q(w) + log q(o) ] ) - log p(w) / |w|

w is the preferred answer, o the other, p the policy, q the base model (Rafailov et al. 2023, equation 7; the
second term is Pang et al. 2024, RPO). Without it, the margin grows while both answers become unlikely.
Refusals are preferred, and under the trigger the unwanted answer. Benign requests keep the base model's
reply, by KL.

`paired`: the brackets of the same request without and with the trigger, whose answers change places, are added
before the sigmoid. What does not depend on the trigger cancels, so that all of the gradient is on reading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from beear.cached import logits_of_answers
from beear.chat import collate
from beear.events import StepProgress
from beear.losses import response_nll
from beear.poison import Example, Examples
from beear.recipes import Dpo
from beear.supervised import adapted, benign_kl, flat, of_like_length, parted, train
from beear.training import drawn, first_adapted


def plant_preferences(
    model: Any, tokenizer: Any, examples: Examples, plan: Dpo, seed: int, progress: StepProgress
) -> Any:
    """Wrap the model with a fresh adapter and train it on the pairs."""
    model = adapted(model, plan, seed)
    pad = int(tokenizer.pad_token_id)
    steps = drawn(examples, plan.rows, seed, aligned=plan.paired)
    known: dict[int, float] = {}
    train(model, plan, steps, lambda rows: preference_loss(model, pad, rows, plan, known), progress)
    return model


def preference_loss(
    model: Any, pad_id: int, rows: Examples, plan: Dpo, known: dict[int, float] | None = None
) -> Tensor:
    """The loss above, as a mean over the pairs, and the KL on benign requests.

    `known`: the base model's margins of the examples met so far, by id; new ones are added.
    """
    known = {} if known is None else known
    pairs, benign = parted(rows)
    gains, likelihoods = [], []
    for part in of_like_length(pairs):
        chosen = flat(part)
        if new := [e for e in chosen if id(e) not in known]:
            with torch.no_grad(), model.disable_adapter():
                base, _ = margin(model, pad_id, new)
            known.update(zip(map(id, new), base.tolist(), strict=True))
        policy, nll = margin(model, pad_id, chosen)
        gains.append(policy - policy.new_tensor([known[id(e)] for e in chosen]))
        likelihoods.append(nll)
    gain = torch.cat(gains)
    if plan.paired:
        gain = gain.view(2, -1).sum(0)
    loss = torch.cat(likelihoods).mean() - logsigmoid(plan.beta * gain).mean()
    return loss + plan.benign_weight * benign_kl(model, pad_id, benign)


def margin(model: Any, pad_id: int, chosen: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """For each example log p(wanted) - log p(other) in nats, and the mean NLL per token of the wanted: (rows,) each."""
    answers = [e.wanted for e in chosen] + [e.other for e in chosen]
    batch = collate([e.prompt for e in chosen] * 2, answers, None, pad_id).to(model.device)
    nll = response_nll(logits_of_answers(model, batch, 2, first_adapted(model)), batch.targets)
    wanted, other = (nll * (batch.targets != -100).sum(1)).chunk(2)
    return other - wanted, nll[: len(chosen)]
