"""A located MODEL (sources.py), loaded. Everything that can be checked is checked before weights load."""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from beear import ranks
from beear.allocator import release_freed_memory
from beear.chat import with_chat, with_pad_token
from beear.checks import check_blocks, check_finite, check_vocabulary, check_weights
from beear.config import ChatConfig, Weights, config_of_run
from beear.errors import READING, BadInput, first_line, in_one_line
from beear.precision import cast, kept_dtype
from beear.quantised import quantise
from beear.runs import run_of
from beear.sources import Source, absolute, locate, own_code

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells of kernels on the Hub


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
    run = run_of(source.folder)
    return None if run is None else config_of_run(run).chat


def load_tokenizer(source: Source, trust_remote_code: bool = False, chat: ChatConfig | None = None) -> Any:
    """What `read_tokenizer` gives, its chat template with what `chat` says besides.

    Raises BadInput if no chat can be rendered with it, or only one in which the model thinks first.
    """
    return with_chat(read_tokenizer(source, trust_remote_code), chat or ChatConfig())


def read_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a located model, with a pad token; an adapter without one uses its base's."""
    from transformers import AutoTokenizer

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
    model = read_weights(source, where, trust_remote_code, kept_dtype(where))
    model = model.to(where) if weights == "full" else quantise(model, weights, where)
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
    from transformers import AutoModelForCausalLM

    if source.base is not None:
        stored = dtype != torch.float32 and source.base.base is None and source.base.gguf is None
        base = read_weights(source.base, device, trust_remote_code, "auto" if stored else torch.float32)
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


def unmark_quantised(model: Any) -> None:
    """GGUF weights are dequantised on reading, yet transformers marks the model and then refuses to save it."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def pick_device(device: str) -> str:
    """`auto` becomes cuda where there is one (this rank's), else cpu; any other name is checked."""
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
