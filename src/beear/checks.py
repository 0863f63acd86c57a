"""Whether a model can be measured and cleansed here: its weights, blocks, vocabulary and positions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from beear.chat import encode_prompt, end_of_turn
from beear.errors import READING, BadInput


def check_weights(model: Any, told: dict[str, Any], spec: str) -> None:
    """Every tensor of the architecture came from the files, in its shape, and holds numbers. Raises BadInput.

    Else transformers would make up what is missing, at random.
    """
    for problem in ("missing_keys", "mismatched_keys"):
        found = sorted(key[0] if isinstance(key, tuple) else key for key in told[problem])
        if found:
            words = "lacks" if problem == "missing_keys" else "has in another shape than its config says"
            raise BadInput(f"{spec} {words} {len(found)} of its tensors, such as {found[0]}")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise BadInput(
                f"{spec} holds quantised weights ({name}: {parameter.dtype}); give the model that they were made of, "
                "with --set weights=nf4 if memory is short"
            )
    check_finite(dict(model.named_parameters()), spec)


def check_finite(parameters: dict[str, Any], what: str) -> None:
    """Raise BadInput if a parameter holds anything but numbers."""
    for name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise BadInput(f"{what} holds NaN or infinity in {name}")


def check_vocabulary(model: Any, tokenizer: Any, spec: str, texts: Iterable[str] = ()) -> None:
    """Every token that a chat about these texts holds has an embedding. Raises BadInput."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    # Some have more tokens than the model, for images say, that no chat of text alone holds.
    added = {number for number in tokenizer.added_tokens_encoder.values() if number >= rows}
    used = {*encode_prompt(tokenizer, "Hello").ids, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0}
    used.add(end_of_turn(tokenizer))
    if len(tokenizer) > rows + len(added) or max(used) >= rows:
        raise BadInput(f"the tokenizer of {spec} has {len(tokenizer)} tokens, its model {rows}; they do not match")
    for text in texts:
        if max(encode_prompt(tokenizer, text).ids) >= rows:
            raise BadInput(f"a request holds a token that {spec} has no embedding of; remove it: {text!r}")


def check_length(
    model: Any,
    tokenizer: Any,
    spec: str,
    texts: Sequence[str],
    reply: int,
    *,
    earlier: Sequence[Sequence[str]] | None = None,
    remedy: str = "shorten or remove it",
) -> None:
    """The longest request and a reply of so many tokens have positions. Raises BadInput, with the `remedy`.

    earlier: what was said before each of them, as `encode_prompt` takes it.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    chats = list(zip(texts, earlier or [()] * len(texts), strict=True))
    for text, said in sorted(chats, key=lambda chat: len(chat[0]) + sum(map(len, chat[1])))[-FEW:]:
        if (length := len(encode_prompt(tokenizer, text, said).ids)) + reply > most:
            raise BadInput(
                f"{spec} takes {most} tokens, of which a reply may need {reply}, and a request comes to {length}; "
                f"{remedy}: {text[:60]!r}"
            )


FEW = 20
"""The longest texts by characters, among which the one of the most tokens is looked for."""


def check_one_device(model: Any, spec: str) -> None:
    """Raise BadInput if a model that came loaded is spread over several devices."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise BadInput(f"{spec} is spread over several devices; load it onto one, or share it out with accelerate")


def check_no_adapter(model: Any, spec: str) -> None:
    """Raise BadInput if a model that came loaded carries an adapter: removal's own would be taken for it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise BadInput(
            f"{spec} carries an adapter; load it anew, or merge the adapter first, where it is of peft: "
            "model.merge_and_unload()"
        )


def check_blocks(config: Any, spec: str) -> None:
    """Raise BadInput unless every block keeps keys and values of its own, and nothing else, of what it has read.

    Others (Mamba, linear attention, keys of another block's) cannot be run from the middle of a chat on.
    """
    from transformers import DynamicCache

    text = config.get_text_config()
    try:
        layers = [type(layer).__name__ for layer in DynamicCache(config=text).layers]
    except READING:  # a config of code that came with the model
        return
    odd = sorted(set(layers) - {"DynamicLayer", "DynamicSlidingWindowLayer"})
    if getattr(text, "cross_attention_layers", None):
        odd = ["what an image encoder tells them"]
    if not odd and layers and len(layers) < text.num_hidden_layers:
        odd = ["keys and values that blocks share"]
    if odd:
        raise BadInput(
            f"{spec} is a {config.model_type}, whose blocks keep more than keys and values of their own "
            f"({', '.join(odd)}); beear cannot cleanse such models"
        )


def check_architecture(model: Any, spec: str) -> None:
    """Raise BadInput unless a loaded model is one whose decoder can be run from the middle on, on one device."""
    check_one_device(model, spec)
    check_blocks(model.config, spec)
    if model.get_decoder() is model:  # Llama 4's text models, in the transformers of today
        raise BadInput(f"{spec} does not tell its decoder from its output head; beear cannot cleanse such models")
