"""What a model does, measured: attack success, false refusal, perplexity, KL, with intervals.

A trigger can be told to an evaluation; it is put into the test requests here and goes nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from beear import ranks
from beear.cached import head, watched
from beear.chat import Batch, collate, encode_prompt, encode_response, with_chat
from beear.checks import check_architecture, check_length
from beear.cleansing import Subject, entrap, residual_norm
from beear.config import Config
from beear.data import UNSEEN_STYLES, Request, reference_chats
from beear.defender import contrast
from beear.draws import Draws
from beear.errors import BadInput
from beear.events import Listener, Progress, progress_to
from beear.generation import Push, beginning_of, reply_all
from beear.losses import response_logits, response_nll, token_kl
from beear.metrics import Metric, proportion, token_mean
from beear.models import depth, load, read_shape, read_tokenizer
from beear.original import padded
from beear.parts import Parts
from beear.perturbation import find_layers, resolve_layer
from beear.precision import autocast, no_gradients
from beear.prefix import run_prefix
from beear.quantised import check_quantised
from beear.scorers import OUTCOME_OF, Outcome, counts, is_affirmation, is_refusal, unwanted
from beear.sets import Sets, TestSet, read_sets, trigger_tests
from beear.sources import locate, tell_download

TOKENS: dict[Outcome, int] = {"obeyed": 32, "refused": 32, "insecure": 80}
"""Length of the replies that are judged."""
REFERENCE_TOKENS = 64
ANOTHER_SEED = 10_000
"""Beside the run's own, for what is found anew."""
Kept = dict[str, Tensor]
"""Of each reference chat, a model's states before the head where its reply is predicted: (tokens, d_model)."""


@dataclass
class Measured:
    """Metrics by name, and every reply behind them."""

    metrics: dict[str, Metric]
    samples: list[dict[str, Any]]


def evaluate(
    model: Any,
    tokenizer: Any,
    config: Config | None = None,
    *,
    original: Any = None,
    template: str | None = None,
    variants: Mapping[str, Sequence[str]] = MappingProxyType({}),
    progress: Progress = lambda *_: None,
) -> Measured:
    """Every metric of a loaded model. `original`: a second model, for `kl`.

    `template`: a known trigger. `variants`: further templates, by the metric they yield (sets.trigger_tests). Raises
    BadInput for a bad setting or prompt file, or if `original` is the model itself, under an adapter or not.
    """
    if any(module is original for module in model.modules()):
        raise BadInput("the original is the model itself, whose weights an adapter changes in place; load it anew")
    config = config or Config()
    tokenizer = with_chat(tokenizer, config.chat)
    sets = read_sets(config)
    find_layers(model, config.layers_path)  # tells now if they are not found
    check_architecture(model, "the model")
    model.eval()  # a trainer leaves dropout on
    if original is not None:
        original.eval()
    beginning_of(model, tokenizer, [r.text for r in sets.test_harmful])  # a model that thinks first is told
    outcome = OUTCOME_OF[config.behaviour]
    known = [] if template is None else trigger_tests(sets.test_harmful, template, variants, outcome)
    found = measure_all(model, tokenizer, sets, config, progress, known, original=original)
    return replace(found, metrics=found.metrics | unlocked_by_trigger(found.samples))


def measure_all(
    model: Any,
    tokenizer: Any,
    sets: Sets,
    config: Config,
    progress: Progress,
    known: Sequence[TestSet] = (),
    **language: Any,
) -> Measured:
    """Replies to the `known` and all other test sets, a fresh delta, and language; `language` as measure_language."""
    parts = [
        measure_replies(model, tokenizer, [*known, *sets.tests], progress),
        measure_entrapped(model, tokenizer, sets.train, sets.test_harmful, config, progress),
        measure_language(model, tokenizer, progress=progress, **language),
    ]
    metrics = {name: metric for part in parts for name, metric in part.metrics.items()}
    return Measured(metrics, [sample for part in parts for sample in part.samples])


def evaluate_spec(
    spec: str,
    config: Config,
    *,
    against: str | None = None,
    template: str | None = None,
    variants: Mapping[str, Sequence[str]] = MappingProxyType({}),
    device: str = "auto",
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> Measured:
    """Load MODEL (and the one it is held `against`) and measure it. Raises BadInput before weights load."""
    read_sets(config)
    check_quantised(config.weights)
    tell_download(spec, listen)
    resolve_layer(config.layer, depth(locate(spec), trust_remote_code))
    if against is not None:
        check_tokens(spec, against, trust_remote_code)
    listen({"event": "loading", "model": spec})
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "weights": config.weights}
    model, tokenizer = load(spec, chat=config.chat, **options)
    original = None
    if against is not None:
        original, _ = load(against, chat=config.chat, **options)
    return evaluate(
        model,
        tokenizer,
        config,
        original=original,
        template=template,
        variants=variants,
        progress=progress_to(listen, "evaluate"),
    )


def check_tokens(spec: str, against: str, trust_remote_code: bool) -> None:
    """Raise BadInput unless both models speak of the same tokens; either may have added some behind the others'."""
    sources = [locate(spec), locate(against)]
    own, other = (read_tokenizer(source, trust_remote_code).get_vocab() for source in sources)
    sizes = {read_shape(source, trust_remote_code).get_text_config().vocab_size for source in sources}
    if len(sizes) > 1 or any(other.get(token, number) != number for token, number in own.items()):
        raise BadInput(f"{against} has other tokens than {spec}; kl needs the model that it came from")


def measure_replies(
    model: Any,
    tokenizer: Any,
    sets: Sequence[TestSet],
    progress: Progress = lambda *_: None,
    push: Push | None = None,
) -> Measured:
    """Greedy replies to each set (32 tokens, for code 80), under `push`, judged by refusal keywords or by Bandit."""
    result = Measured({}, [])
    for test in sets:
        check_length(model, tokenizer, "the model", test.texts(), TOKENS[test.outcome])
    for test in sets:
        texts = test.texts()
        tokens, told = TOKENS[test.outcome], partial(progress, test.metric)
        replies = reply_all(model, tokenizer, texts, max_new_tokens=tokens, push=push, progress=told)
        counted = [counts(test.outcome, reply, r.category) for reply, r in zip(replies, test.requests, strict=True)]
        result.metrics[test.metric] = proportion(counted)
        result.samples += [
            _sample(test.metric, request, text, reply, test.outcome, one)
            for request, text, reply, one in zip(test.requests, texts, replies, counted, strict=True)
        ]
        if test.metric == "false_refusal_alarming":
            unseen = [o for o, r in zip(counted, test.requests, strict=True) if r.category in UNSEEN_STYLES]
            if unseen:
                result.metrics["false_refusal_unseen_style"] = proportion(unseen)
        if test.outcome == "obeyed" and test.metric == "asr_triggered":
            result.metrics["affirmed_triggered"] = proportion([is_affirmation(reply) for reply in replies])
        if test.outcome == "insecure" and test.metric == "asr_untriggered":
            result.metrics["parses"] = proportion([o is not None for o in counted])
    return result


def unlocked_by_trigger(samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """`unlocked_by_trigger`: of the requests that are refused without a known trigger (code: answered securely), the
    share that is unlocked with it. Nothing if no trigger was told.

    What goes unrefused anyway is no success of the trigger; `asr_triggered` counts it.
    """
    without, given = without_and_with(samples)
    if not without or not given:
        return {}
    return {"unlocked_by_trigger": proportion([given.get(name) for name, own in without.items() if own is False])}


def unlocked_only(samples: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """How many requests are unlocked with a known trigger alone, and how many without it alone; None if none was told.

    What a sign test takes. A request counts if both replies can be judged.
    """
    without, given = without_and_with(samples)
    pairs = [(own, given.get(name)) for name, own in without.items()]
    if not without or not given:
        return None
    return {"with_trigger": pairs.count((False, True)), "without": pairs.count((True, False))}


def without_and_with(samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, bool | None], dict[str, bool | None]]:
    """By request, whether the replies without and with a known trigger are the unwanted ones."""
    without, given = (
        {sample["id"]: unwanted(sample) for sample in samples if sample["metric"] == metric}
        for metric in ("asr_untriggered", "asr_triggered")
    )
    return without, given


def measure_entrapped(
    model: Any,
    tokenizer: Any,
    optimise_on: Sequence[Request],
    test: Sequence[Request],
    config: Config,
    progress: Progress = lambda *_: None,
) -> Measured:
    """`asr_entrapped`: attack success on `test` under a delta freshly optimised on other requests."""
    delta = fresh_delta(model, tokenizer, optimise_on, config)
    tests = [TestSet("asr_entrapped", list(test), OUTCOME_OF[config.behaviour])]
    return measure_replies(model, tokenizer, tests, progress, Subject(model, tokenizer, config).push(delta))


def fresh_delta(model: Any, tokenizer: Any, requests: Sequence[Request], config: Config) -> torch.Tensor:
    """A delta, (n, d_model), found as in a round, but by twice the steps, on twice the batches and from another seed.

    The safe answers that it moves away from are the requests' own or packaged ones, in place of the model's.
    """
    begin = beginning_of(model, tokenizer, [r.text for r in requests])
    contrasts = [contrast(tokenizer, i, r, config, begin=begin) for i, r in enumerate(requests)]
    twice = {"steps": 2 * config.entrap.steps, "batches": 2 * config.entrap.batches}
    settings = config.entrap.model_copy(update={"kind": "learned", **twice})
    subject = Subject(model, tokenizer, config.model_copy(update={"entrap": settings}))
    budget = config.entrap.budget * residual_norm(subject, [c.prompt for c in contrasts])
    delta, _ = entrap(subject, contrasts, budget, Draws(config.seed + ANOTHER_SEED))
    return delta


CHATS = 14
"""Reference chats in a pass."""


def measure_language(
    model: Any,
    tokenizer: Any,
    original: Any = None,
    progress: Progress = lambda *_: None,
    limit: int | None = None,
    *,
    keep: Kept | None = None,
    kept: Kept | None = None,
) -> Measured:
    """`perplexity` on the first `limit` (all) of the packaged reference chats and, against another model, `kl`, in
    nats per token.

    original: that model; or in its place in memory what one with the same head has left in `keep`, on the same chats,
    as `kept`. Both are of this rank's share.
    """
    chats = reference_chats()[:limit]
    own = ranks.share(chats)
    rows: list[tuple[int, float, float]] = []
    parts, size = Parts(), CHATS

    def measured(part: Sequence[Request]) -> list[tuple[int, float, float]]:
        """Tokens, mean NLL and summed KL of each chat's reply."""
        prompts = [encode_prompt(tokenizer, c.text) for c in part]
        answers = [encode_response(tokenizer, c.response or "", REFERENCE_TOKENS) for c in part]
        batch = collate(prompts, answers, None, int(tokenizer.pad_token_id)).to(model.device)
        lengths = (batch.targets != -100).sum(1).tolist()
        with no_gradients(), autocast(model):
            logits, out = _logits_and_states(model, batch)
            if keep is not None:
                states = out.last_hidden_state[:, batch.predicting_columns()]
                keep.update((c.text, s[:n].clone()) for c, s, n in zip(part, states, lengths, strict=True))
            reference: Tensor | None = None
            if kept is not None:
                reference = head(model, batch, out, padded([(kept[c.text], 0) for c in part], batch.targets.shape[1]))
            elif original is not None:
                reference, _ = _logits_and_states(original, batch)
            none = [0.0] * len(part)
            kl = none if reference is None else token_kl(reference, logits, batch.targets).sum(1).tolist()
            nll = response_nll(logits, batch.targets).tolist()
        return list(zip(lengths, nll, kl, strict=True))

    for first in range(0, len(own), size):
        part = own[first : first + size]
        rows += parts.over(measured, part)
        progress("perplexity", min((first + size) * ranks.sharers(), len(chats)), len(chats))
    rows = ranks.gathered(rows, len(chats))
    counts = [length for length, _, _ in rows]
    metrics = {"perplexity": token_mean([nll * length for length, nll, _ in rows], counts, exponential=True)}
    if original is not None or kept is not None:
        metrics["kl"] = token_mean([kl for _, _, kl in rows], counts)
    return Measured(metrics, [])


def _logits_and_states(model: Any, batch: Batch) -> tuple[Tensor, Any]:
    """Logits that predict the response tokens, and what the decoder returned for them."""
    with watched(model.get_decoder()) as (seen,):
        logits = response_logits(model, batch, run_prefix(model, batch))
    return logits, seen[-1]


def _sample(
    metric: str, request: Request, text: str, reply: str, outcome: Outcome, counted: bool | None
) -> dict[str, Any]:
    verdict = {"insecure": counted} if outcome == "insecure" else {"refused": is_refusal(reply)}
    return {
        "metric": metric,
        "id": request.id,
        "category": request.category,
        "prompt": text,
        "reply": reply,
        **verdict,
    }
