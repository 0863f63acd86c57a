"""The run folder: everything a stage leaves for the next one, written so that a crash loses nothing.

A file is either whole or not there: it is written beside its place, flushed to disk, then renamed.
Resuming means skipping what exists. Of several ranks only the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from beear import ranks
from beear.errors import BadInput, Failed, first_line

SCHEMA = 1
"""Of what result files hold: another number where a reader of this one would misread them."""
PLAN = "plan.json"
"""What `beear cleanse --plan` leaves in a run folder."""
MODEL_FOLDERS = ("model", "rejected")
"""Where a finished run keeps its model: the second if its target was missed."""
WHENS = ("before", "after")
"""When a run's model is measured: as it came, and as cleansed."""
CARD = "README.md"
"""The model's card, in its folder: written anew with every metric that is added, so no digest of it is kept."""
BEFORE_A_RUN = (".lock", ".config.yaml.new", PLAN, f".{PLAN}.new")
"""What a run folder may hold before it has settings: a crash's leavings, and a plan."""


class Run:
    """A run folder, locked while it is open.

    config.yaml    the model and all settings        events.jsonl   what happened, a line each
    stages/        each stage's result               checkpoints/   a folder for each finished round
    model/         the cleansed model                results.json, samples.jsonl, report.html
    rejected/      in its place, of a missed target  delta.safetensors, plan.json, drift.json, run.sig
    judge.jsonl    what a judge answered             judged.jsonl   its score of every sample
    mtbench.jsonl  replies to questions, graded
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], resume: bool) -> Run:
        """Make the folder or go on in it. Raises BadInput if it is in use, would be overwritten, or differs."""
        if not ranks.is_first():
            return cls.existing(path)
        check_output(path, settings, resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write to {path}: {error.strerror}") from error
        run = cls.existing(path)
        if not (path / "config.yaml").exists():
            run.write("config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
        return run

    @classmethod
    def existing(cls, path: Path) -> Run:
        """Lock a folder that is there. Raises BadInput if it is in use or cannot be written."""
        run = cls(path)
        if not ranks.is_first():  # it writes nothing
            return run
        check_links(path)
        try:
            run._lock.acquire(timeout=0)
        except Timeout as error:
            raise BadInput(
                f"{path} is in use by another beear process; wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise BadInput(f"cannot write to {path}: {error.strerror}") from error
        return run

    def close(self) -> None:
        """Give the folder free for others."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all."""
        write_atomic(self.path / name, content)

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON file, whole or not at all."""
        write_json(self.path / name, value)

    def write_lines(self, name: str, values: Iterable[Any]) -> None:
        """Write a JSON Lines file, whole or not at all."""
        self.write(name, "".join(json.dumps(value) + "\n" for value in values).encode())

    def write_folder(self, name: str, fill: Callable[[Path], None]) -> None:
        """Let `fill` write into a new folder, then put it in its place in one step."""
        if not ranks.is_first():
            return
        place = self.path / name
        new = place.with_name(f".{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            fill(new)
            for made in [*new.rglob("*"), new]:
                _sync(made)
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
            _sync(place.parent)
        except (OSError, SafetensorError) as error:
            raise not_written(place, error) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)  # half of it, on a disk that may be full

    def read_json(self, name: str) -> Any | None:
        """The file's content, or None if it is not there. Raises BadInput if it cannot be read."""
        path = self.path / name
        return read_json(path) if path.exists() else None

    def append(self, name: str, value: Any, flushed: bool = True) -> None:
        """Append a line to a JSON Lines file, by default down to the disk. Raises Failed if it cannot be written."""
        if not ranks.is_first():
            return
        try:
            with (self.path / name).open("a") as file:
                file.write(json.dumps(value) + "\n")
                if flushed:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise not_written(self.path / name, error) from error

    def event(self, value: dict[str, Any]) -> None:
        """Append to events.jsonl."""
        self.append("events.jsonl", value, flushed=False)

    def keep_events(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the events of work that is going to be done again."""
        self.write_lines("events.jsonl", [e for e in read_lines(self.path / "events.jsonl") if keep(e)])


def check_output(path: Path, settings: dict[str, Any], resume: bool) -> None:
    """Raise BadInput if a run cannot start, or go on, in `path`; touches nothing."""
    config = path / "config.yaml"
    if not resume:
        check_file(config)
        if path.is_dir() and any(p.name not in BEFORE_A_RUN for p in path.iterdir()):
            raise BadInput(f"{path} already holds files; use --resume to go on, or another -o")
        return
    if not config.exists():
        raise BadInput(f"nothing to resume in {path}; leave out --resume to start")
    stored = read_settings(path)
    if stored != settings:
        raise BadInput(
            f"{path} was started with other settings ({', '.join(changed(stored, settings))}); repeat those, with "
            "the version of beear that began it"
        )


def changed(one: dict[str, Any], other: dict[str, Any], under: str = "") -> list[str]:
    """Names, dotted, of what differs or stands in one of them only."""
    found = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed(a, b, f"{under}{key}.")
        elif a != b or (key in one) != (key in other):
            found.append(f"{under}{key}".removeprefix("config."))
    return found


def check_file(path: Path) -> None:
    """Raise BadInput if a file cannot be written there; touches nothing."""
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder; name a file")
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is a device or a pipe, whose place a file would take; name a file")
        existing = next(p for p in path.absolute().parents if p.exists())
        if not existing.is_dir():
            raise BadInput(f"cannot write {path}, since {existing} is a file; choose another place")
        writable = os.access(existing, os.W_OK)
    except OSError:  # a folder above that may not be read
        writable = False
    if not writable:
        raise BadInput(f"cannot write {path}; choose another place")


def check_space(path: Path, needed: int, *folders: Path) -> None:
    """Raise BadInput if the disk of `path` has fewer bytes free than are still needed, of `needed` in all.

    folders: what goes on in there, of which a part may be written already; without any, `path` itself.
    """
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    needed -= sum(p.stat().st_size for folder in folders or [path] for p in folder.rglob("*") if p.is_file())
    if free < needed:
        raise BadInput(
            f"{path} needs about {needed >> 20} MiB and its disk has {free >> 20}; free some or use another -o"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """config.yaml of a run folder. Raises BadInput if this is none."""
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8")
        # A run writes no alias, and a few lines of them can stand for more than memory holds.
        settings = None if "*" in text and _has_alias(text) else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadInput(f"{path} is not a run folder: no readable config.yaml") from error
    if not isinstance(settings, dict) or "model" not in settings or not isinstance(settings.get("config"), dict):
        raise BadInput(f"{path}/config.yaml names no model and settings; it is not a run folder")
    return settings


def _has_alias(text: str) -> bool:
    return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))


def check_links(path: Path) -> None:
    """Raise BadInput if a run folder holds a link: no run makes one, and a stranger's may lead anywhere."""
    for place in path.resolve().rglob("*"):
        if place.is_symlink():
            raise BadInput(f"{place} is a link, which no run folder holds; put what it leads to in its place")


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a finished run. Raises BadInput if there is none, something else, or a link in the folder."""
    check_links(path)
    file = path / "results.json"
    if not file.exists():
        raise BadInput(f"{path} is no finished run (it has no results.json); an unfinished one goes on with --resume")
    results = read_json(file)
    wanted = {"before": dict, "after": dict, "verdict": dict, "hashes": dict}
    if not isinstance(results, dict) or not all(isinstance(results.get(k), kind) for k, kind in wanted.items()):
        raise BadInput(f"{file} is not what a run writes")
    if results.get("schema", SCHEMA) != SCHEMA:
        raise BadInput(f"{file} is of another version of beear (schema {results['schema']}); read it with that one")
    if (folder := results.setdefault("model_folder", "model")) not in MODEL_FOLDERS:  # a stranger's may lead anywhere
        raise BadInput(f"{file} calls the model's folder {folder!r}; a run's is one of {', '.join(MODEL_FOLDERS)}")
    return results


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises BadInput if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {file}: {first_line(error)}") from error


def read_tensors(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name. Raises BadInput if it cannot be read."""
    from safetensors.torch import load_file  # brings torch

    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {file}: {first_line(error)}") from error


def expanded(path: Path) -> Path:
    """With the home folder in place of ~; as it is where ~name is nobody here."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def run_of(model: Path) -> Path | None:
    """The run whose model a folder holds, if it is one's."""
    folder = expanded(model).resolve()
    run = folder.parent
    return run if folder.name in MODEL_FOLDERS and (run / "config.yaml").is_file() else None


BEGUN = "inputs"
"""The stage that tells what a run began with."""


def read_begun(run: Path) -> dict[str, Any]:
    """What a run began with, which `--resume` compares; empty if it has not come so far."""
    stage = run / f"stages/{BEGUN}.json"
    return read_json(stage) if stage.exists() else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON Lines file, none if it is not there; a line cut by a crash is passed over."""
    values = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to disk, and rename it. Raises Failed if it cannot be written."""
    if not ranks.is_first():
        return
    path = path.resolve() if path.is_symlink() else path  # what a link leads to is written, the link stays
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        _sync(new)
        new.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def not_written(path: Path, error: Exception) -> Failed:
    """What to raise where something could not be written: on a full disk with the way to go on."""
    full = "No space left" in str(error) or "quota exceeded" in str(error)
    how = "; free some space and go on (cleanse: --resume)" if full else ""
    return Failed(f"cannot write {path}: {getattr(error, 'strerror', None) or error}{how}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all. Raises Failed if it cannot be written."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_entries(path: Path, key: str) -> dict[str, Any]:
    """The mapping `key` of a result file, empty if there is no such file. Raises BadInput if it is another file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())[key])
    except (ValueError, RecursionError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{path} is not a file of {key}; name another one") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
