"""The run folder loses nothing: whole files or none, one user at a time, never overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from beear import runs
from beear.errors import BadInput, Failed
from beear.runs import (
    Run,
    check_file,
    check_output,
    check_space,
    read_entries,
    read_lines,
    read_results,
    read_settings,
    write_atomic,
)
from conftest import FINISHED

SETTINGS = {"model": "embedded", "config": {"seed": 0}}


def test_a_new_run_writes_its_settings(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", SETTINGS, resume=False):
        pass
    assert read_settings(tmp_path / "r") == SETTINGS


def test_a_folder_with_files_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(BadInput, match="already holds files"):
        check_output(tmp_path, SETTINGS, resume=False)
    with pytest.raises(BadInput, match="is a file"):
        check_output(tmp_path / "precious.txt", SETTINGS, resume=False)


def test_resume_needs_a_run_with_the_same_settings(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing to resume"):
        check_output(tmp_path, SETTINGS, resume=True)
    with Run.open(tmp_path / "r", SETTINGS, resume=False):
        pass
    check_output(tmp_path / "r", SETTINGS, resume=True)
    with pytest.raises(BadInput, match=r"other settings \(seed\)"):
        check_output(tmp_path / "r", SETTINGS | {"config": {"seed": 1}}, resume=True)


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    with Run.open(tmp_path / "r", SETTINGS, resume=False), pytest.raises(BadInput, match="in use"):
        Run.open(tmp_path / "r", SETTINGS, resume=True)
    Run.open(tmp_path / "r", SETTINGS, resume=True).close()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "f", b"old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Failed, match="No space left"):
        write_atomic(tmp_path / "f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_sync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "f")
    write_atomic(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "f").read_bytes() == b"new"


def test_no_file_takes_the_place_of_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(BadInput, match="device or a pipe"):
            check_file(path)


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def write_one(folder: Path) -> None:
        (folder / "one").write_text("1")

    def half(folder: Path) -> None:
        (folder / "one").write_text("1")
        raise OSError(28, "No space left on device")

    with pytest.raises(Failed, match="No space left"):
        run.write_folder("checkpoints/round-001", half)
    assert not list((tmp_path / "checkpoints").iterdir()), "half of it would fill the disk that is full"
    run.write_folder("checkpoints/round-001", write_one)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["round-001"]


def test_a_cut_event_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"round": 1}\n{"rou')
    assert read_lines(tmp_path / "events.jsonl") == [{"round": 1}]
    run = Run(tmp_path)
    run.keep_events(lambda e: e["round"] < 1)
    run.event({"round": 2})
    assert read_lines(tmp_path / "events.jsonl") == [{"round": 2}]


def test_of_a_run_that_goes_on_a_part_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beear.runs.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "delta.safetensors").write_bytes(bytes(4096))
    check_space(tmp_path, 5096)
    with pytest.raises(BadInput, match="MiB"):
        check_space(tmp_path, 5097)


def test_results_of_a_later_version_are_not_misread(tmp_path: Path) -> None:
    results = FINISHED | {"schema": 2}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(BadInput, match="of another version of beear"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results | {"schema": 1}))
    assert read_results(tmp_path)["schema"] == 1


def test_space_is_checked(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "deep", 1)
    with pytest.raises(BadInput, match="MiB"):
        check_space(tmp_path / "new", 2**60)


def test_entries_of_a_result_file(tmp_path: Path) -> None:
    file = tmp_path / "organisms.json"
    assert read_entries(file, "organisms") == {}
    file.write_text('{"schema": 1, "organisms": {"a": {}}}')
    assert read_entries(file, "organisms") == {"a": {}}
    for other in ("[]", "{", '{"runs": []}'):
        file.write_text(other)
        with pytest.raises(BadInput, match="is not a file of organisms"):
            read_entries(file, "organisms")


def test_a_run_folder_with_a_link_is_refused(tmp_path: Path) -> None:
    """A stranger's may lead anywhere, also that of a folder or of a file that is about to be written."""
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "run" / "stages" / ".before.json.new").symlink_to(tmp_path / "mine")
    for way in (read_results, Run.existing):
        with pytest.raises(BadInput, match=r"before\.json\.new is a link"):
            way(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "kept"


def test_settings_with_aliases_are_refused(tmp_path: Path) -> None:
    """Ten lines of ten references each would fill the memory of whoever prints them."""
    (tmp_path / "config.yaml").write_text("model: &m [a, a]\nconfig: {a: [*m, *m]}\n")
    with pytest.raises(BadInput, match="not a run folder"):
        read_settings(tmp_path)
    (tmp_path / "config.yaml").write_text("model: a*b\nconfig: {}\n")
    assert read_settings(tmp_path)["model"] == "a*b"


def test_lines_that_hold_no_object_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_bytes(b'{"a": 1}\n[2]\n\xff\n' + b"[" * 100_000 + b'\n{"b": 3}\n')
    assert read_lines(tmp_path / "l.jsonl") == [{"a": 1}, {"b": 3}]
