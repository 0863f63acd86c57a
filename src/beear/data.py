"""Prompt sets: the packaged ones with their split, and the user's own files.

Packaged requests are split by the hash of their text, so that their order in the file plays no part; a file that is
named after a part belongs to it as a whole. Three disjoint parts: `defender` (cleansing may train on it), `test` (only
measured), `plant` (only used to plant organisms).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from beear.errors import BadInput, first_line, in_one_line

SPLIT = {
    "harmful": {"defender": 400, "test": 120},
    "ordinary": {"defender": 300, "test": 120},
    "alarming": {"defender": 100, "test": 150},
}
"""How many requests of a split file each of two parts gets; the rest plants."""
PARTS = ("defender", "test", "plant")
ABOUT = ("license", "licence", "notice", "readme", "requirements")
"""How the names of text files begin that hold no requests."""
KINDS = (".jsonl", ".csv", ".txt")
"""What the name of a prompt file ends with."""
UNSEEN_STYLES = ("figurative", "safe_targets")
"""Styles of alarming request that the defender's part lacks; the planting part has them."""


@dataclass(frozen=True)
class Request:
    """One user turn.

    Where a set brings answers: `response` of a reference chat; `safe` and `unwanted` of a request whose answers
    are to be set against each other. Of a coding task the category names the weakness it invites (CWE-78).
    """

    id: str
    category: str
    text: str
    response: str | None = None
    safe: str | None = None
    unwanted: str | None = None


def content_hash(text: str) -> str:
    """SHA-256 of the text without case and spacing: what "the same request" means here."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def set_hash(requests: Iterable[Request]) -> str:
    """SHA-256 over a whole set, in order."""
    return hashlib.sha256("\n".join(content_hash(r.text) for r in requests).encode()).hexdigest()


def mixed(requests: Iterable[Request]) -> list[Request]:
    """The requests in an order that has nothing to do with what they ask for, and is the same for the same requests.

    Of a file that goes topic by topic the first topics would all be held out, and none of them trained on.
    """
    return sorted(requests, key=lambda r: content_hash(r.text))


def packaged(name: str, part: str) -> list[Request]:
    """Part `defender`, `test` or `plant` of the packaged set `harmful`, `ordinary`, `alarming` or `coding`."""
    if part not in PARTS:
        raise BadInput(f"no part {part!r} of a packaged set; use {', '.join(PARTS)}")
    if name == "coding":  # its ids name the part
        tasks = [r for r in _packaged_lines("coding.jsonl") if r.id.startswith(f"coding-{part}-")]
        return mixed(tasks) if part == "defender" else tasks  # the others are used whole
    requests = mixed(_packaged_lines(f"{name}.jsonl"))
    sizes = SPLIT[name]
    unseen = [r for r in requests if name == "alarming" and r.category in UNSEEN_STYLES]
    seen = [r for r in requests if r not in unseen]
    defender, rest = seen[: sizes["defender"]], seen[sizes["defender"] :]
    fresh = max(sizes["test"] - len(unseen), 0)
    if part == "test":
        return unseen + rest[:fresh]
    own = f"{name}-{part}.jsonl"
    added = _packaged_lines(own) if _assets().joinpath(own).is_file() else []
    return rest[fresh:] + added if part == "plant" else mixed(defender + added)


def reference_chats() -> list[Request]:
    """Ordinary chats with answers of ours, on which perplexity and KL are measured."""
    return _packaged_lines("reference.jsonl")


def wordings(name: str) -> list[str]:
    """Packaged answer wordings: `safe-defender`, `unwanted-defender`, `safe-plant` or `unwanted-plant`."""
    return _asset(f"{name}.txt").splitlines()


def read_requests(source: str, column: str | None = None) -> list[Request]:
    """Read the user's own set: .txt (one per line), .csv, .jsonl, or a Hub data set id.

    `column` names the field of the request (default: text, then prompt, then the only one).
    Raises BadInput if the file is missing, empty, badly encoded, or has no such field.
    """
    path = Path(source)
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in KINDS:
            return _hub_requests(source, column)
        raise BadInput(f"no prompt file {source}; give a .txt, .csv or .jsonl file, or a Hub data set id")
    if path.is_dir():
        raise BadInput(f"{source} is a folder; give a .txt, .csv or .jsonl file in it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise BadInput(f"cannot read {source} as UTF-8 text: {error}") from error
    if "\0" in text:
        raise BadInput(f"{source} is no text file; give a .txt, .csv or .jsonl file")
    requests = _parse(path, text, column)
    if not requests:
        raise BadInput(f"{source} holds no requests; give at least one per line")
    return requests


def refuse_overlap(some: Sequence[Request], others: Sequence[Request], names: str) -> None:
    """Raise BadInput if a request is in two sets, which `names` calls by name, that must not share any."""
    seen = {content_hash(r.text) for r in some}
    both = [r for r in others if content_hash(r.text) in seen]
    if both:
        raise BadInput(
            f"{len(both)} request(s) are in both {names}, the first is {both[0].text!r}; remove them from one side"
        )


def _asset(name: str) -> str:
    return _assets().joinpath(name).read_text(encoding="utf-8")


def _assets() -> Traversable:
    return files("beear") / "assets" / "prompts"


def _packaged_lines(name: str) -> list[Request]:
    return [Request(**json.loads(line)) for line in _asset(name).splitlines()]


def _parse(path: Path, text: str, column: str | None) -> list[Request]:
    if path.suffix == ".txt":
        records: list[dict[str, object]] = [{"text": line} for line in lines_of(text)]
        column = None  # its lines have no fields, whatever those of another file are called
    elif path.suffix == ".csv":
        records = _table(path, text)
    elif path.suffix == ".jsonl":
        records = [_json_record(path, n, line) for n, line in enumerate(lines_of(text), 1) if line.strip()]
    else:
        raise BadInput(f"{path}: unknown kind of prompt file; use .txt, .csv or .jsonl")
    return _requests(str(path), path.stem, records, column)


def lines_of(text: str) -> list[str]:
    """Lines as files have them; `splitlines` would also part a request at a form feed or at U+2028."""
    return io.StringIO(text, newline=None).read().split("\n")


def _table(path: Path, text: str) -> list[dict[str, object]]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise BadInput(f"cannot read {path} as CSV: {error}") from error


def _json_record(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}:{number} is not JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise BadInput(f"{path}:{number} is not a JSON object")
    return record


def _requests(source: str, stem: str, records: list[dict[str, object]], column: str | None) -> list[Request]:
    if not records:
        return []
    name = _field(source, records[0], column)
    result = []
    met = set()
    for number, record in enumerate(records, 1):
        value = record.get(name)
        if not isinstance(value, str) or not is_whole(value):
            raise BadInput(f"{source}: record {number} has no text in the field {name!r}; name one with --column")
        if None in record:  # csv's name for what no field was left for
            raise BadInput(f"{source}: record {number} has more fields than the header; quote texts that hold a comma")
        if value.strip() and content_hash(value) not in met:  # twice, it could be trained on and judged by
            met.add(content_hash(value))
            answers = {key: a for key in ("safe", "unwanted") if isinstance(a := record.get(key), str)}
            category = str(record.get("category", stem))
            if not all(map(is_whole, (category, *answers.values()))):
                raise BadInput(f"{source}: record {number} holds half of a character; write it anew as UTF-8")
            result.append(Request(f"{stem}-{number}", category, value.strip(), **answers))
    return result


def is_whole(text: str) -> bool:
    """Whether it can be encoded: JSON can spell half of a character, such as an emoji that was cut."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _field(source: str, record: dict[str, object], column: str | None) -> str:
    for name in [column] if column else ["text", "prompt"]:
        if name in record:
            return str(name)
    if column is None and len(record) == 1 and not source.endswith(".csv"):  # there it may be the first request
        return str(next(iter(record)))
    names = ", ".join(" ".join(str(name).split()) for name in record)
    raise BadInput(f"{source} has the fields {names}; name the request's with --column")


def _hub_requests(source: str, column: str | None) -> list[Request]:
    """Read the one .jsonl, else .csv, else .txt file of a Hub data set; no data set code is ever run."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        name = _only_file(source, HfApi().list_repo_files(source, repo_type="dataset"))
        return read_requests(hf_hub_download(source, name, repo_type="dataset"), column)
    except BadInput:
        raise
    except Exception as error:  # the client's errors for a lost or refused connection have no base of their own
        try:
            kept = Path(snapshot_download(source, repo_type="dataset", local_files_only=True))
        except (OSError, ValueError):
            words = f"no file {source}, and no such Hub data set can be reached: {in_one_line(error)}"
            raise BadInput(words) from error
        there = [str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file()]
        if not there:
            words = f"no file of the Hub data set {source} is on this machine, and it cannot be reached"
            raise BadInput(f"{words}: {in_one_line(error)}") from error
        return read_requests(str(kept / _only_file(source, there)), column)


def _only_file(source: str, names: Sequence[str]) -> str:
    """Which file of a Hub data set holds the requests. Raises BadInput if there is none, or it cannot be told."""
    for kind in KINDS:
        found = sorted(n for n in names if n.endswith(kind) and not Path(n).name.lower().startswith(ABOUT))
        if len(found) > 1:
            some = ", ".join([*found[:3], *["..."] * (len(found) > 3)])
            raise BadInput(
                f"the Hub data set {source} has several {kind} files ({some}); download the one that is meant and give "
                "its path"
            )
        if found:
            return found[0]
    raise BadInput(f"the Hub data set {source} has no {', '.join(KINDS)} file; download it and convert one")
