"""A located MODEL (sources.py), loaded. Everything that can be checked is checked before weights load."""

from __future__ import annotations

import copy
import gc
import logging
import math
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beear import ranks
from beear.allocator import release_freed_memory
from beear.errors import BadInput, first_line, in_one_line
from beear.runs import read_settings, run_of
from beear.sources import Source, absolute, locate, own_code

if TYPE_CHECKING:
    from beear.config import ChatConfig, Weights

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells of kernels on the Hub
READING = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, struct.error)
"""What libraries raise for files that are not as they should be."""


def load(
    spec: str,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    weights: Weights = "full",
    chat: ChatConfig | None = None,
) -> tuple[Any, Any]:
    """Load MODEL as (model, tokenizer), in fp32 on the CPU and bf16 elsewhere, ready for inference.

    Adapters are merged (read_weights); `weights` other than full are quantised after that. The model knows MODEL by
    name, so that an adapter which is trained on it names it as its base. `chat`: by default that of the run whose
    model this is, if it is one's. Raises BadInput for anything that cannot be loaded safely.
    """
    source = locate(spec)
    tokenizer = load_tokenizer(source, trust_remote_code, chat or chat_of_run(source))
    model = load_weights(source, device, trust_remote_code, weights)
    model.name_or_path = absolute(spec)
    check_vocabulary(model, tokenizer, spec)
    return model, tokenizer


def chat_of_run(source: Source) -> ChatConfig | None:
    """How the run held its chats whose model a folder holds; None if it is no run's."""
    from beear.config import make_config

    run = run_of(source.folder)
    return None if run is None else make_config(read_settings(run)["config"]).chat


def load_tokenizer(source: Source, trust_remote_code: bool = False, chat: ChatConfig | None = None) -> Any:
    """What `read_tokenizer` gives, its chat template with what `chat` says besides.

    Raises BadInput if no chat can be rendered with it, or only one in which the model thinks first.
    """
    from beear.chat import with_chat
    from beear.config import ChatConfig

    return with_chat(read_tokenizer(source, trust_remote_code), chat or ChatConfig())


def read_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a located model, with a pad token; an adapter without one uses its base's."""
    from transformers import AutoTokenizer

    from beear.chat import with_pad_token

    if source.base is not None and not (source.folder / "tokenizer_config.json").is_file():
        return read_tokenizer(source.base, trust_remote_code)
    trusted = own_code(source, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder,
            trust_remote_code=trusted,
            mistral_format=False,  # else mistral-common's, where it is installed, which renders no chat template
            **gguf_argument(source),
        )
    except Exception as error:  # the tokenizers library raises no less for a file of a later version
        raise _unreadable("tokenizer", source, error) from error
    return with_pad_token(tokenizer)


def gguf_argument(source: Source) -> dict[str, str]:
    """How transformers is told a model's GGUF file: by its whole path, else one in this folder takes its place."""
    return {} if source.gguf is None else {"gguf_file": str((source.folder / source.gguf).resolve())}


def load_weights(
    source: Source, device: str = "auto", trust_remote_code: bool = False, weights: Weights = "full"
) -> Any:
    """A located model on its device, fp32 on the CPU and bf16 elsewhere, or quantised; adapters are merged before."""
    where = pick_device(device)
    let_go()
    from beear.precision import kept_dtype  # brings torch

    model = read_weights(source, where, trust_remote_code, kept_dtype(where))
    if weights == "full":
        model = model.to(where)
    else:
        from beear.quantised import quantise

        model = quantise(model, weights, where)
    if not where.startswith("cpu"):
        release_freed_memory()  # what was held here on the way
    return model


def let_go() -> None:
    """Free what nothing holds any more but itself: quantised maps and sharded blocks of the model before this one."""
    gc.collect()


def read_weights(source: Source, device: str, trust_remote_code: bool, dtype: Any) -> Any:
    """The same, still on the CPU and in this type, with the attention that is fastest to train with on the device.

    An adapter is merged in fp32; for a bf16 model into a base as it is stored, which takes half the memory and for a
    base in bf16 gives the same bits: a sum is computed in fp32 and rounded once.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if source.base is not None:
        stored = dtype != torch.float32 and source.base.base is None and source.base.gguf is None
        base = read_weights(source.base, device, trust_remote_code, "auto" if stored else torch.float32)
        from beear.precision import cast

        return cast(_merge(base, source), dtype)
    kind: dict[str, Any] = {"use_safetensors": True} if source.gguf is None else gguf_argument(source)
    trusted = own_code(source, trust_remote_code)
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            source.folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of, and refused below in words
            dtype=dtype,
            attn_implementation="eager" if device.startswith("cpu") else None,  # faster on short rows (decision 7)
            trust_remote_code=trusted,
            **kind,
        )
    except READING as error:
        raise _unreadable("weights", source, error) from error
    check_weights(model, told, source.spec)
    if source.gguf is not None:
        unmark_quantised(model)
    pack_head(model)
    if getattr(text := model.config.get_text_config(), "output_router_logits", False):
        text.output_router_logits = False  # for a loss that is not ours, and that takes the tokens unpacked
    return model.eval()


def pack_head(model: Any) -> None:
    """Let the states that enter the output head lie in one piece, which the last columns of a batch do not.

    Else PyTorch multiplies the few positions of each row on their own with a head that is frozen, which took a fifth
    of a step of removal on two cores (decision 25). Once is enough.
    """
    head = model.get_output_embeddings()
    if head is not None and in_one_piece not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(in_one_piece)


def in_one_piece(module: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same states, contiguous."""
    return (states[0].contiguous(), *states[1:])


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
    from beear.chat import encode_prompt, end_of_turn

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


def cut(shape: Any, blocks: int) -> Any:
    """The same architecture with so many blocks."""
    small = copy.deepcopy(shape)
    text = small.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:  # such as the kind of every block
            setattr(text, name, value[:blocks])
    text.num_hidden_layers = blocks
    return small


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
    from beear.chat import encode_prompt

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


def depth(source: Source, trust_remote_code: bool = False) -> int:
    """Number of decoder blocks of a located model, from its config alone."""
    return int(read_shape(source, trust_remote_code).get_text_config().num_hidden_layers)


def read_shape(source: Source, trust_remote_code: bool = False) -> Any:
    """The config of a located model (of the base, for an adapter), which tells its number of decoder blocks."""
    from transformers import AutoConfig

    if source.base is not None:
        return read_shape(source.base, trust_remote_code)
    trusted = own_code(source, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trusted, **gguf_argument(source))
        int(config.get_text_config().num_hidden_layers)
    except (*READING, AttributeError) as error:
        raise _unreadable("config", source, error) from error
    check_blocks(config, source.spec)
    return config


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


def unmark_quantised(model: Any) -> None:
    """GGUF weights are dequantised on reading, yet transformers marks the model and then refuses to save it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def pick_device(device: str) -> str:
    """`auto` becomes cuda where there is one (this rank's), else cpu; any other name is checked."""
    import torch

    if device == "auto":
        return ranks.device() if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"--device {device}: no CUDA device here; use --device cpu")
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if "Expected one of" in str(error):
            raise BadInput(f"--device {device}: no such kind of device; use auto, cpu, cuda or cuda:N") from error
        raise BadInput(f"--device {device}: {first_line(error)}") from error
    if kind == "meta":
        raise BadInput("--device meta holds no numbers; use cpu or cuda")
    return device


def _merge(base: Any, source: Source) -> Any:
    model = under_adapter(base, source.folder)
    untie(model.get_base_model())
    return model.merge_and_unload().eval()


def untie(model: Any) -> None:
    """Give the output head weights of its own where it shares the embedding's and an adapter changes either.

    Merging adds to weights in place: head and embedding would both be changed by what is meant for one of them.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    changed = isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer)
    if changed and head is not None and head.weight is embedding.weight:
        getattr(head, "base_layer", head).weight = torch.nn.Parameter(head.weight.detach().clone())


def under_adapter(base: Any, folder: Path) -> Any:
    """The model with a PEFT adapter on top of it. Raises BadInput if it does not fit."""
    from peft import PeftModel

    own = set(map(id, base.parameters()))
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(folder.resolve()), torch_device=str(base.device)).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"the adapter {folder} does not fit its base model: {in_one_line(error)}") from error
    if any("missing adapter keys" in str(warning.message) for warning in told):
        raise BadInput(f"the adapter {folder} lacks some of its tensors, or names them for another model")
    check_finite({n: p for n, p in model.named_parameters() if id(p) not in own}, f"the adapter {folder}")
    return model


def _unreadable(what: str, source: Source, error: Exception) -> BadInput:
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return BadInput(
            f"{source.spec} brings code of its own to load; if you trust it, use --trust-remote-code, on a folder that "
            "holds its .py files (none are downloaded)"
        )
    if "Unrecognized configuration class" in str(error):
        return BadInput(f"{source.spec} is no model of text alone that transformers knows; give its text-only twin")
    if "backend tokenizer" in str(error):
        return BadInput(f"{source.spec} has no tokenizer.json; beear needs a fast tokenizer, to find the user's words")
    return BadInput(f"cannot read the {what} of {source.spec}: {first_line(error)}")
