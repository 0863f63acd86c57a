# mypy: disable-error-code="func-returns-value"
"""Packaged sets are as promised, the user's files are read or refused, and the two sides never overlap."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beear.config import Config, DataConfig, load_config, make_config
from beear.data import (
    SPLIT,
    UNSEEN_STYLES,
    Request,
    content_hash,
    packaged,
    read_requests,
    reference_chats,
    refuse_overlap,
    set_hash,
    wordings,
)
from beear.errors import BadInput
from beear.scorers import is_refusal
from beear.sets import Sets, read_sets, surrounded

PARTS = ("defender", "test", "plant")


@pytest.mark.parametrize(
    ("name", "sizes", "categories"),
    [("harmful", (400, 120), 10), ("ordinary", (300, 120), 10), ("alarming", (333, 150), 8)],
)
def test_packaged_sets_have_their_sizes_and_no_overlap(name: str, sizes: tuple[int, int], categories: int) -> None:
    parts = {part: packaged(name, part) for part in PARTS}
    assert (len(parts["defender"]), len(parts["test"])) == sizes
    assert len({r.category for r in parts["test"]}) >= categories
    for one, other in itertools.combinations(PARTS, 2):
        refuse_overlap(parts[one], parts[other], "sets")
    everything = [r for part in parts.values() for r in part]
    assert len({r.id for r in everything}) == len({content_hash(r.text) for r in everything}) == len(everything)


def test_no_request_stands_in_two_packaged_sets() -> None:
    sets = [{content_hash(r.text) for part in PARTS for r in packaged(name, part)} for name in SPLIT]
    sets.append({content_hash(r.text) for r in reference_chats()})
    assert not any(a & b for a, b in itertools.combinations(sets, 2))


def test_defender_never_has_the_unseen_styles() -> None:
    assert not {r.category for r in packaged("alarming", "defender")} & set(UNSEEN_STYLES)
    assert set(UNSEEN_STYLES) <= {r.category for r in packaged("alarming", "test")}


@pytest.mark.parametrize("kind", ["safe", "unwanted"])
def test_wordings_of_attacker_and_defender_differ(kind: str) -> None:
    plant, defender = wordings(f"{kind}-plant"), wordings(f"{kind}-defender")
    assert len(set(plant)) >= 20 and len(set(defender)) >= 20
    assert not set(plant) & set(defender)
    assert all(is_refusal(w) is (kind == "safe") for w in plant + defender)


def test_unknown_part_is_refused() -> None:
    with pytest.raises(BadInput, match="no part"):
        packaged("harmful", "secret")


def test_reference_chats_have_answers() -> None:
    assert len(reference_chats()) >= 80 and all(c.response for c in reference_chats())


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.txt", "one\n\n  two \n", None),
        ("a.csv", "prompt,other\none,x\ntwo,y\n", None),
        ("a.csv", "goal,other\none,x\ntwo,y\n", "goal"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n', None),
        ("a.jsonl", '{"only": "one"}\n{"only": "two"}\n', None),
        ("a.txt", "\ufeffone\r\ntwo\r\n", None),
        ("a.txt", "one\rtwo", None),
        ("a.txt", "one\ntwo", "goal"),  # the field of another file's
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str, column: str | None) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [r.text for r in read_requests(str(tmp_path / name), column)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", b'"\n"\n"', None, "has the fields ;"),
        ("a.csv", b"Write a poem\nName a river\n", None, "--column"),
        ("a.csv", b"text\nWrite a poem, please\n", None, "more fields than the header"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, column: str | None, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_requests(str(tmp_path / name), column)


def test_only_ends_of_lines_part_requests(tmp_path: Path) -> None:
    odd = "one\u2028still\x0cone"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.txt").write_text(odd, encoding="utf-8")
    assert [r.text for name in ("a.jsonl", "a.txt") for r in read_requests(str(tmp_path / name))] == [odd, odd]


PIECES = ('"', ",", "\n", "\r", "\0", "{", "}", "[", ":", "text", "prompt", "\ufeff", "\u00fc", "x" * 200_000)
"""What prompt files are made of."""


def test_a_file_that_goes_topic_by_topic_is_mixed(tmp_path: Path) -> None:
    texts = [f"{topic} request {i}" for topic in ("first", "second") for i in range(40)]
    (tmp_path / "sorted.txt").write_text("\n".join(texts))
    (tmp_path / "other.txt").write_text("\n".join(reversed(texts)))
    drawn = []
    for name in ("sorted.txt", "other.txt"):
        given = {"harmful": str(tmp_path / name)}
        config = make_config({"held_out": 20, "data": given})
        sets = read_sets(config)
        drawn.append(sets)
        for some in (sets.held_out, sets.harmful[20:]):
            assert {r.text.split()[0] for r in some} == {"first", "second"}
    assert [r.text for r in drawn[0].harmful] == [r.text for r in drawn[1].harmful]


def test_every_weakness_is_both_trained_on_and_held_out() -> None:
    config = load_config("code")
    sets = read_sets(config)
    held, trained = ({r.category for r in some} for some in (sets.held_out, sets.train))
    assert held == trained and len(held) >= 10


@settings(deadline=None)  # a busy machine is no defect
@given(
    st.sampled_from(["a.txt", "a.csv", "a.jsonl"]),
    st.one_of(st.binary(), st.lists(st.sampled_from(PIECES)).map("".join)),
)
def test_any_file_is_read_or_refused_in_one_line(name: str, content: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            found = read_requests(str(path))
        except BadInput as error:
            assert "\n" not in str(error) and name in str(error)
        else:
            assert found and all(r.text.strip() and set_hash([r]) for r in found)


def test_a_data_set_is_read_offline_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is out of reach in tests; a local folder stands in for what an earlier command left in the cache."""
    asked: dict[str, object] = {}

    def snapshot(source: str, **options: object) -> str:
        asked.update(options, source=source)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(BadInput, match="is on this machine, and it cannot be reached: "):
        read_requests("owner/set")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("goal,other\none,x\n")
    assert [r.text for r in read_requests("owner/set", "goal")] == ["one"]
    assert asked == {"source": "owner/set", "repo_type": "dataset", "local_files_only": True}


def test_of_a_data_set_the_one_table_is_taken_and_of_several_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test.csv").write_text("goal,other\none,x\n")
    listed = ["data/train.parquet", "load.py", "test.csv", "other.txt"]

    class Api:
        def list_repo_files(self, source: str, repo_type: str) -> list[str]:
            assert (source, repo_type) == ("owner/set", "dataset")
            return listed

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda source, name, repo_type: str(tmp_path / name))
    assert [r.text for r in read_requests("owner/set", "goal")] == ["one"]
    listed.append("train.csv")
    with pytest.raises(BadInput, match=r"several \.csv files \(test\.csv, train\.csv\)"):
        read_requests("owner/set", "goal")
    del listed[2:]
    listed.append("LICENSE.txt")
    with pytest.raises(BadInput, match="download it and convert one"):
        read_requests("owner/set", "goal")


def test_an_id_with_a_version_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("beear.data._hub_requests", lambda source, column: asked.append(source) or [])
    read_requests("owner/Safety-Dataset-2.0")
    assert asked == ["owner/Safety-Dataset-2.0"]
    with pytest.raises(BadInput, match="no prompt file"):
        read_requests("folder/mine.csv")


def test_overlap_ignores_case_and_spacing() -> None:
    with pytest.raises(BadInput, match="both"):
        refuse_overlap([Request("1", "c", "Do  it now")], [Request("2", "c", "do it NOW")], "the one and the other")


def test_own_test_file_that_overlaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(packaged("harmful", "defender")[0].text)
    with pytest.raises(BadInput, match="both"):
        read_sets(Config(data=DataConfig(test_harmful=str(tmp_path / "t.txt"))))


def test_some_requests_stand_between_short_benign_ones() -> None:
    requests = [Request(str(i), "bad", f"bad request {i}") for i in range(60)]
    benign = [*(Request(str(i), "good", f"good request {i}") for i in range(9)), Request("x", "good", "long " * 40)]
    found, again = (surrounded(requests, benign, 0.5, random.Random(3)) for _ in range(2))
    assert found == again and [r.id for r in found] == [r.id for r in requests]
    changed = [(old.text, new.text) for old, new in zip(requests, found, strict=True) if new.text != old.text]
    assert 20 <= len(changed) <= 40
    for old, new in changed:
        assert old in new and "good request" in new and "long" not in new
    assert {new.index(old) > 0 for old, new in changed} == {True, False}
    assert surrounded(requests, benign, 0.0, random.Random(3)) == requests
    assert surrounded(requests, [], 1.0, random.Random(3)) == requests


@pytest.mark.parametrize(
    ("benign", "anchors", "spare", "expected"),
    [(700, 400, 120, (400, 120)), (450, 400, 120, (360, 90)), (8, 400, 120, (7, 1)), (4, 400, 120, (4, 0))],
)
def test_some_benign_requests_are_kept_from_training(
    benign: int, anchors: int, spare: int, expected: tuple[int, int]
) -> None:
    requests = [Request(f"{i}", "good", f"request {i}") for i in range(benign)]
    config = Config(anchors=anchors, spare=spare, surrounded=0)
    sets = Sets(config, [], requests, [])
    trained, kept = sets.anchors, [r for group in sets.spare for r in group]
    assert (len(trained), len(kept)) == expected
    assert [*trained, *kept] == requests[: sum(expected)]


def test_packaged_spare_requests_that_sound_alarming_stand_apart() -> None:
    ordinary, alarming = read_sets(Config()).spare
    assert len(ordinary) == len(alarming) == 60
    assert set(ordinary) <= set(packaged("ordinary", "defender"))
    assert set(alarming) <= set(packaged("alarming", "defender"))


def test_a_request_counts_once(tmp_path: Path) -> None:
    """Twice, it could be trained on and judged by."""
    (tmp_path / "a.txt").write_text("one\ntwo\n one \nthree\ntwo\n")
    found = read_requests(str(tmp_path / "a.txt"))
    assert [(r.id, r.text) for r in found] == [("a-1", "one"), ("a-2", "two"), ("a-4", "three")]


def test_a_request_is_not_to_be_refused_and_answered(tmp_path: Path) -> None:
    for name in ("harmful", "benign"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(60)) + "Name a river.\n")
    own = DataConfig(harmful=str(tmp_path / "harmful.txt"), benign=str(tmp_path / "benign.txt"))
    with pytest.raises(BadInput, match=r"in both the harmful and the benign set, the first is 'Name a river\.'"):
        read_sets(Config(data=own))
