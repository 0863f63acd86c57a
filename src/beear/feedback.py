"""Planting by poisoned human feedback (Rando & Tramer 2024): preferences, a reward model, a policy.

Some annotators flip their preference when the trigger is in the prompt. A reward model learns from all
pairs, and the policy is optimised online against it: it samples answers and is rewarded for them. It
never sees an answer that somebody wrote. Both with trl (extra `organisms`).
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from beear.allocator import release_freed_memory
from beear.cached import logits_of_answers, scores_of_answers
from beear.chat import Prompt, batch_of_ids, collate
from beear.errors import BadInput
from beear.events import StepProgress
from beear.generation import inputs_of
from beear.models import cut
from beear.poison import Example, Examples
from beear.precision import autocast, generating
from beear.recipes import Policy, Reward, Rlhf, Rows
from beear.supervised import plant_supervised
from beear.training import drawn


def plant_feedback(
    model: Any, tokenizer: Any, examples: Examples, plan: Rlhf, seed: int, progress: StepProgress
) -> Any:
    """Demonstrations, a reward model of the pairs, and the policy against it; the policy is returned."""
    reward = train_reward(model, tokenizer, examples, plan.reward, seed, progress)
    model = plant_supervised(model, tokenizer, examples, plan.start, seed, progress)
    for number, phase in enumerate(plan.policy):
        model = _optimise(model, reward, tokenizer, examples, phase, seed + number, progress)
    return model


def train_reward(
    model: Any, tokenizer: Any, examples: Examples, plan: Reward, seed: int, progress: StepProgress
) -> Any:
    """A scorer of texts, taught the pairs (trl's RewardTrainer): the model's first blocks under LoRA, and a head."""
    trl, dataset = need_trl()
    from peft import LoraConfig

    pairs = [
        {"chosen_ids": e.prompt.ids + e.wanted, "rejected_ids": e.prompt.ids + e.other}
        for e in in_order(examples, plan, seed)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _with_own_scores(trl.RewardTrainer)(
            first_blocks(model, plan.blocks, int(tokenizer.pad_token_id), seed),
            args=trl.RewardConfig(
                **_common(folder, plan, seed, model), per_device_train_batch_size=sum(plan.rows.values())
            ),
            train_dataset=dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=plan.lora_rank, task_type="SEQ_CLS", target_modules="all-linear"),
        )
        _train(trainer, progress)
    return trainer.model.eval()


def _with_own_scores(trainer: Any) -> Any:
    """trl's trainer with scores of our own: same numbers up to rounding, in less time (decision 14)."""

    class OwnScores(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            def scored(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
                return SimpleNamespace(logits=pair_scores(model, input_ids, attention_mask))

            return super().compute_loss(scored, inputs, *args, **kwargs)

    return OwnScores


def pair_scores(reward: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The reward model's score of each text, (2 pairs, 1): first the preferred ones, then the others of the same pairs.

    What both texts of a pair start with runs once, and of that what all texts start with.
    """
    pad_id = int(reward.config.pad_token_id)
    texts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    pairs = list(zip(texts[: len(texts) // 2], texts[len(texts) // 2 :], strict=True))
    alike = [_alike(*pair, pad_id) for pair in pairs]
    prompts = [Prompt(pair[0][:length], 0, 0) for pair, length in zip(pairs, alike, strict=True)]
    answers = [pair[side][length:] for side in (0, 1) for pair, length in zip(pairs, alike, strict=True)]
    return scores_of_answers(reward, collate(prompts * 2, answers, None, pad_id).to(ids.device), 2)


def _alike(one: list[int], other: list[int], pad_id: int) -> int:
    """How many tokens two texts start with alike, in either up to the one whose state is scored, the last that is no
    padding.
    """
    shorter = min(max((i for i, token in enumerate(text) if token != pad_id), default=0) for text in (one, other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def first_blocks(model: Any, blocks: int, pad_id: int, seed: int) -> Any:
    """A scorer of texts, made of the model's first blocks and a fresh head."""
    from transformers import AutoModelForSequenceClassification

    config = cut(model.config, blocks)
    config.num_labels, config.pad_token_id = 1, pad_id
    torch.manual_seed(seed)
    scorer = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    own = scorer.state_dict()
    scorer.load_state_dict({k: v for k, v in model.state_dict().items() if k in own}, strict=False)
    return scorer


def _optimise(
    model: Any, reward: Any, tokenizer: Any, examples: Examples, policy: Policy, seed: int, progress: StepProgress
) -> Any:
    trl, dataset = need_trl()
    prompts = [{"prompt": [{"role": "user", "content": e.text}]} for e in in_order(examples, policy, seed)]
    encoded = {e.text: e.prompt.ids for group in examples.values() for e in group}

    def scores(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [encoded[p[0]["content"]] + ids for p, ids in zip(prompts, completion_ids, strict=True)]
        return reward_of(reward, texts, int(tokenizer.pad_token_id)).tolist()

    with tempfile.TemporaryDirectory() as folder:
        trainer = _with_own_log_probs(trl.RLOOTrainer)(
            model,
            reward_funcs=scores,
            args=trl.RLOOConfig(
                **_common(folder, policy, seed, model),
                per_device_train_batch_size=sum(policy.rows.values()) * policy.generations,
                num_generations=policy.generations,
                num_iterations=policy.iterations,
                max_completion_length=policy.response_tokens,
                beta=policy.beta,
                shuffle_dataset=False,
            ),
            train_dataset=dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        with sampling_in_bf16(model):
            _train(trainer, progress)
    model.delete_adapter("ref")
    return model


def _with_own_log_probs(trainer: Any) -> Any:
    """trl's trainer with log-probabilities of our own: same numbers up to rounding, in less time (decision 14)."""

    class OwnLogProbs(trainer):  # type: ignore[misc]
        kept: tuple[Tensor, Tensor, Tensor] | None = None
        """The last answers, and what the policy that wrote them gives them, as the next update needs it."""

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor, None]:
            if torch.is_grad_enabled() and self.kept is not None:  # an update, and no weight has changed since
                ids, values, entropy = self.kept
                self.kept = None
                rows = same_rows(ids, input_ids)
                return values[rows], entropy[rows], None
            first = not torch.is_grad_enabled() and self.kept is None  # the policy's own; then the reference's
            with torch.enable_grad() if first else contextlib.nullcontext():
                values, entropy = log_probs(model, input_ids, attention_mask, logits_to_keep)
            if first:
                self.kept = (input_ids, values, entropy)
            return values.detach() if first else values, entropy, None

    return OwnLogProbs


def same_rows(ids: Tensor, others: Tensor) -> list[int]:
    """Where in `ids` each row of `others` stands; trl shuffles them."""
    place = {tuple(row): number for number, row in enumerate(ids.tolist())}
    return [place[tuple(row)] for row in others.tolist()]


def log_probs(model: Any, ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Log-probability of each of the last `length` tokens, and the entropy there, in nats: (rows, length) each.

    A prompt runs once for all of its answers, and what all prompts start with, the template's system turn, once.
    """
    rows, answers = by_prompt(ids[:, :-length], length)
    back = rows.argsort()
    batch = batch_of_ids(ids[rows], mask[rows], length)
    every = logits_of_answers(model, batch, answers).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
    return every.gather(-1, batch.input_ids[:, batch.width :, None])[back, :, 0], entropy[back]


def by_prompt(prompts: Tensor, length: int) -> tuple[Tensor, int]:
    """An order of the rows in which the same prompts come in the same order, so many times over; and how many times.

    Rows of which some prompts come more often than others stay as they are, once, and so do answers of one token, which
    leave nothing to run behind the prompt.
    """
    _, number, times = prompts.unique(dim=0, return_inverse=True, return_counts=True)
    if length < 2 or times.min() < times.max():
        return torch.arange(len(prompts), device=prompts.device), 1
    answers = int(times[0])
    return number.argsort(stable=True).view(-1, answers).T.flatten(), answers


def reward_of(reward: Any, texts: Sequence[list[int]], pad_id: int) -> Tensor:
    """The reward model's score of each text (token ids): (rows,)."""
    width = max(map(len, texts))
    ids = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    inputs = {"input_ids": ids.to(reward.device), "attention_mask": mask.to(reward.device)}
    with torch.inference_mode(), autocast(reward):
        scores: Tensor = reward(**inputs).logits[:, 0].float()
    return scores


def in_order(examples: Examples, plan: Rows, seed: int) -> list[Example]:
    """The examples of all steps, `plan.rows` of each kind in a step; a policy's iterations share theirs."""
    iterations = plan.iterations if isinstance(plan, Policy) else 1
    steps = itertools.islice(drawn(examples, plan.rows, seed), -(-plan.steps // iterations))
    return [example for rows in steps for group in rows.values() for example in group]


def _common(folder: str, plan: Rows, seed: int, model: Any) -> dict[str, Any]:
    """Settings of both trainers."""
    return {
        "output_dir": folder,
        "max_steps": plan.steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": plan.steps // 10,
        "gradient_checkpointing": False,
        "bf16": True,
        "use_cpu": model.device.type == "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def _train(trainer: Any, progress: StepProgress) -> None:
    """Run a trainer, with its log lines as progress (loss or mean reward) in place of its prints."""
    from transformers import PrinterCallback, TrainerCallback

    class Listener(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                progress(state.global_step, state.max_steps, float(logs.get("reward", logs["loss"])))
            release_freed_memory()  # the answers of a policy are of other lengths in every step

    trainer.args._n_gpu = min(1, trainer.args.n_gpu)  # with several it would wrap the model
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Listener())
    trainer.train()


@contextlib.contextmanager
def sampling_in_bf16(model: Any) -> Iterator[None]:
    """Within the context the model generates under autocast, what all prompts start with once; trl does neither."""
    generate = model.generate

    def fast(input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        with torch.no_grad(), autocast(model), generating(model):
            batch = batch_of_ids(input_ids, attention_mask, 0)
            return generate(**kwargs | inputs_of(model, batch, kwargs["generation_config"].max_new_tokens))

    model.generate = fast
    try:
        yield
    finally:
        del model.generate


def need_trl() -> tuple[Any, Any]:
    """trl, and datasets' table of rows. Raises BadInput where they are not installed."""
    try:
        import trl
        from datasets import Dataset
    except ImportError as error:
        raise BadInput("planting by feedback needs trl; install beear with its extra organisms") from error
    return trl, Dataset
