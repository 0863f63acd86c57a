"""Where a MODEL's files are: `embedded`, `organism:NAME`, a folder, a PEFT adapter folder, a .gguf file or a Hub id.

Safetensors and GGUF only. A checkpoint in pickle form is refused, since unpickling runs its code, and code that a model
brings runs only if it is asked for and lies in its own folder.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from beear.errors import BadInput, first_line, in_one_line
from beear.events import Listener
from beear.runs import MODEL_FOLDERS, expanded, read_begun
from beear.weight_files import ADAPTER, INDEX, WEIGHTS, check_gguf, check_safetensors, files_of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
EMBEDDED, ORGANISM = "embedded", "organism:"
RUN_SETTINGS = "config.yaml"
"""By which a run folder is known."""


@dataclass(frozen=True)
class Source:
    """Where a MODEL's files are. `base` is set for an adapter, which is merged onto it."""

    spec: str
    folder: Path
    gguf: str | None = None
    base: Source | None = None

    @property
    def commit(self) -> str | None:
        """Of a model of the Hub, the commit that its files are of."""
        return self.folder.name if self.folder.parent.name == "snapshots" and hub_id(self.spec) else None


def locate(spec: str, within: tuple[str, ...] = ()) -> Source:
    """Find MODEL's files and refuse unsafe or incomplete ones; loads no weights. `within`: adapters on top of it."""
    if not spec:
        raise BadInput("MODEL is empty; give a folder, a .gguf file, a Hub id, 'embedded' or 'organism:NAME'")
    if spec in within:
        raise BadInput(f"the adapters {', '.join(within)} are each other's base; none of them names a model")
    if spec == EMBEDDED:
        from beear.embedded import embedded_folder

        return Source(spec, embedded_folder())
    if spec.startswith(ORGANISM):
        return _locate_folder(spec, organism_folder(spec.removeprefix(ORGANISM)), within)
    path = expanded(Path(spec))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"no GGUF file {spec}")
        check_gguf(path)
        if (path.parent / "adapter_config.json").is_file():  # transformers would put it on top
            raise BadInput(f"{spec} lies beside an adapter_config.json; put it into a folder of its own")
        return Source(spec, path.parent, gguf=path.name)
    if path.is_dir():
        return _locate_folder(spec, path, within)
    if (there := hub_id(spec)) is not None:
        if (path.parent / RUN_SETTINGS).is_file():  # nobody else's repository takes its place
            raise BadInput(f"no folder {spec}; {path.parent} is a run folder{whose_model(path.parent)}")
        return _locate_folder(spec, _download(*there), within)
    raise BadInput(f"no model {spec}; give a folder, a .gguf file, a Hub id, 'embedded' or 'organism:NAME'")


def absolute(spec: str) -> str:
    """A local path as an absolute one, so that it is found from anywhere; elsewhere it might be taken for a Hub id."""
    path = expanded(Path(spec))
    return str(path.resolve()) if spec and path.exists() and not is_named(spec) else spec


def is_named(spec: str) -> bool:
    """Whether MODEL is one that beear brings, whatever folders there are."""
    return spec == EMBEDDED or spec.startswith(ORGANISM)


def hub_id(spec: str) -> tuple[str, str | None] | None:
    """Repository and revision of MODEL, `owner/name` or `owner/name@revision`; None if it is none of the Hub."""
    name, _, revision = spec.partition("@")
    elsewhere = is_named(spec) or spec.endswith(".gguf") or expanded(Path(spec)).exists()
    if elsewhere or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    return name, revision or None


def pinned(spec: str, commit: str | None) -> str:
    """MODEL at this commit, if it is of the Hub and one is known: what a repository holds today may be another."""
    there = hub_id(spec)
    return spec if there is None or commit is None else f"{there[0]}@{commit}"


def model_of(settings: dict[str, Any], run: Path) -> str:
    """MODEL of a run with these settings, at the commit of the Hub that it began with."""
    return pinned(settings["model"], read_begun(run).get("commit"))


def packaged_organisms() -> Path:
    """The folder of the packaged organisms' folders."""
    return Path(str(files("beear"))) / "assets" / "organisms"


def is_packaged(name: str) -> bool:
    """Whether an organism of this name is packaged."""
    return Path(name).name == name and (packaged_organisms() / name / "adapter_config.json").is_file()


def organism_folder(name: str) -> Path:
    """The packaged (or, as a path, built) adapter folder of an organism."""
    packaged = packaged_organisms()
    folder = packaged / name
    if not (folder / "adapter_config.json").is_file():
        known = ", ".join(sorted(p.parent.name for p in packaged.glob("*/adapter_config.json")))
        raise BadInput(f"no organism {name!r}; the packaged ones are: {known}")
    return folder


def _locate_folder(spec: str, folder: Path, within: tuple[str, ...]) -> Source:
    if (folder / "adapter_config.json").is_file():
        base = _adapter_base(folder)
        _require_safetensors(spec, folder)
        try:
            return Source(spec, folder, base=locate(base, (*within, spec)))
        except BadInput as error:
            raise BadInput(f"{spec} is an adapter, and adapter_config.json names its base: {error}") from error
    if not (folder / "config.json").is_file():
        if (folder / RUN_SETTINGS).is_file():
            raise BadInput(f"{spec} is a run folder{whose_model(folder)}")
        raise BadInput(f"{spec} has neither config.json nor adapter_config.json: it is not a model folder")
    if "transformers_weights" in _settings(folder / "config.json"):
        raise BadInput(f"{spec}/config.json names other files of weights (transformers_weights); take that line out")
    _require_safetensors(spec, folder)
    return Source(spec, folder)


def _settings(file: Path) -> dict[str, Any]:
    """What a model's JSON file says. Raises BadInput if that is no mapping."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {file}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise BadInput(f"cannot read {file}: it is no mapping of settings")
    return found


def whose_model(run: Path) -> str:
    """Where the model of a run folder is, to go behind its name in a sentence."""
    found = [run / name for name in MODEL_FOLDERS if (run / name).is_dir()]
    return f", whose model is {found[0]}" if found else " without a model yet; go on with its run by --resume"


def _require_safetensors(spec: str, folder: Path) -> None:
    if found := files_of(folder):
        for file in found:
            check_safetensors(file)
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise BadInput(
            f"{spec} holds only pickle weights ({pickles[0]}), which run code when loaded; convert them to safetensors"
        )
    names = f"{WEIGHTS}, parts with their {INDEX}, or of an adapter {ADAPTER}"
    raise BadInput(f"{spec} holds no .safetensors weights under a name that is read ({names})")


PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""PEFT's kinds of adapter that change no weights."""
OF_ADAPTERS = ("XLORA",)
"""Those that load others, from wherever these are."""


def _adapter_base(folder: Path) -> str:
    settings = _settings(folder / "adapter_config.json")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if (kind := settings.get("peft_type")) in PROMPTS:
        raise BadInput(f"{folder} is an adapter of learnt prompts ({kind}), which cannot be merged into weights")
    if kind in OF_ADAPTERS:
        raise BadInput(f"{folder} is an adapter made of others ({kind}), which are never loaded; merge it first")
    if not isinstance(base, str) or not base or Path(base) == folder:
        raise BadInput(f"{folder}/adapter_config.json does not name its base model")
    return pinned(base, revision if isinstance(revision, str) and revision else None)


def own_code(source: Source, trusted: bool) -> bool:
    """Whether the code in a model's folder may run. Raises BadInput if that of another repository is asked for.

    transformers would download it, whatever version it has by then.
    """
    for name in ("config.json", "tokenizer_config.json") if trusted else ():
        file = source.folder / name
        named = json.dumps(_settings(file).get("auto_map")) if file.is_file() else ""  # where transformers looks
        if elsewhere := re.search(r'"([^"]+)--[^"]*"', named):
            raise BadInput(
                f"{source.spec} ({name}) asks for code of another repository, {elsewhere[1]}, which is never "
                "downloaded; put its .py files into the model's folder and name them in auto_map without the repository"
            )
    return trusted


def weight_bytes(source: Source) -> int:
    """Size of the model's weight files (of the base's, for an adapter); of a GGUF, with 2 bytes for each weight."""
    if source.base is not None:
        return weight_bytes(source.base)
    if source.gguf is not None:
        from gguf import GGUFReader

        return sum(2 * int(tensor.n_elements) for tensor in GGUFReader(source.folder / source.gguf).tensors)
    return sum(p.stat().st_size for p in weight_files(source))


def weight_files(source: Source) -> list[Path]:
    """A model's own files of weights, in the order of their names."""
    return [source.folder / source.gguf] if source.gguf else files_of(source.folder)


PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""How a model of images and text is handed its images."""


def copy_processor(source: Source, folder: Path) -> None:
    """Put the files beside full weights without which a model of images and text could read no image any more."""
    original = source
    while original.base is not None:
        original = original.base
    for name in PROCESSOR:
        if (original.folder / name).is_file():
            shutil.copyfile(original.folder / name, folder / name)


def tell_download(spec: str, listen: Listener) -> None:
    """Say that a MODEL of the Hub is looked for there, which may take long, and shows nothing."""
    if hub_id(spec) is None:
        return
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        listen({"event": "note", "text": f"looking for {spec} on the Hub; what is not on this machine is downloaded"})


def _download(spec: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(
            snapshot_download(
                spec,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
                ignore_patterns=["*/*", "consolidated*"],  # some bring the same weights once more
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            words = (
                "is not among the Hub's models on this machine; leave out --offline (or HF_HUB_OFFLINE) to look there"
            )
            raise BadInput(f"no folder {spec}, and it {words}") from error
        raise BadInput(f"no folder {spec}, and the Hub does not give it: {in_one_line(error)}") from error
