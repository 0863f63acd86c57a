"""What tells two runs apart: SHA-256 of weights, settings, requests and code; the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from beear.chat import encode_prompt, settled
from beear.data import content_hash, set_hash
from beear.errors import BadInput
from beear.hashes import file_hash, json_hash
from beear.sets import Sets
from beear.sources import EMBEDDED, Source, weight_files


def weights_hash(source: Source) -> str:
    """SHA-256 over a located model's weight files in order of their names, its base's first."""
    base = [] if source.base is None else [weights_hash(source.base)]
    return _over([*base, *map(file_hash, weight_files(source))])


SETTINGS = ("adapter_config.json", "config.json", "generation_config.json")
"""By which a model computes and ends its replies, besides its weights."""


def settings_hash(source: Source) -> str:
    """SHA-256 over a located model's own settings, its base's first, by whatever version they were written.

    A GGUF file holds its settings, also that of the embedded model, which is converted anew on every machine.
    """
    base = [] if source.base is None else [settings_hash(source.base)]
    own = () if source.gguf is not None or source.spec == EMBEDDED else SETTINGS
    found = [source.folder / name for name in own if (source.folder / name).is_file()]
    return _over([*base, *(f"{path.name} {_said(path)}" for path in found)])


def _said(file: Path) -> str:
    """What a JSON file says, but for which version of transformers wrote it."""
    try:
        return json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "transformers_version"})
    except (ValueError, AttributeError):
        return file_hash(file)


def input_hashes(source: Source, sets: Sets) -> dict[str, str]:
    """SHA-256 of a located model, of every set of requests, and of the answers that come with the harmful ones."""
    answers = json.dumps([[r.category, r.safe, r.unwanted] for r in sets.harmful])
    digests = {name: set_hash(requests) for name, requests in sets.named().items()}
    digests |= {"answers": content_hash(answers)}
    if any(r.safe or r.unwanted for r in sets.harmful):
        digests["answers_exact"] = _over([answers])  # case and spacing mean something in code
    return {**_of_model(source), **digests}


def _of_model(source: Source) -> dict[str, str]:
    """The digests of a located model that need no tokenizer."""
    return {"model": weights_hash(source), "model_settings": settings_hash(source)}


PROBE = "Wie backe ich 2 Brote? \u2014 How do I bake 2 loaves?"


def prompt_hashes(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of how a tokenizer renders and encodes a chat: its template, what becomes of a request, all its words."""
    prompts = _over([settled(tokenizer), json.dumps(encode_prompt(tokenizer, PROBE).ids)])
    return {"prompts": prompts, "vocabulary": json_hash(sorted(tokenizer.get_vocab().items()))}


def run_hashes(source: Source, sets: Sets, tokenizer: Any) -> dict[str, str]:
    """SHA-256 of all that a run begins with besides its settings: `input_hashes`, and how chats are rendered."""
    return input_hashes(source, sets) | prompt_hashes(tokenizer)


def check_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise BadInput if model, chats or requests are not those that a run began with."""
    changed = [name for name in now if then.get(name) != now[name]]
    if "model" in changed:
        raise BadInput("the weights of the model are not those of the run; give back the model of then")
    if "model_settings" in changed:
        raise BadInput(
            f"the model's own settings ({', '.join(SETTINGS)}) are not those of the run; give back the files of then "
            "(a Hub model may have been updated)"
        )
    if {"prompts", "vocabulary"} & set(changed):
        raise BadInput(
            "the model's chat template and tokenizer are not those of the run; give back the files of then (a Hub "
            "model may have been updated)"
        )
    if changed:
        raise BadInput(
            f"the requests ({', '.join(changed)}) are not those of the run; give back the files of then, or "
            "the version of beear that began it"
        )


def check_tests(results: Mapping[str, Any], sets: Sets) -> None:
    """Raise BadInput if the harmful test requests are not those that a finished run was measured on."""
    check_inputs(results["hashes"], {"test_asr_untriggered": set_hash(sets.test_harmful)})


def check_same_model(then: Mapping[str, str], source: Source, tokenizer: Any) -> None:
    """Raise BadInput if a run's model, its tokenizer or its chat template are not those of then."""
    check_inputs(then, _of_model(source) | prompt_hashes(tokenizer))


def code_hash() -> str:
    """SHA-256 over this package's Python files."""
    folder = Path(__file__).parent
    return _over(f"{path.relative_to(folder)} {file_hash(path)}" for path in sorted(folder.rglob("*.py")))


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory, threads and device: beside versions and seed, what a result's last bits depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _over(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
