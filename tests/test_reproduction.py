"""A run can be done again and compared, and what was changed since is found."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beear import fingerprints
from beear.config import make_config
from beear.data import Request
from beear.errors import BadInput
from beear.fingerprints import code_hash, weights_hash
from beear.gate import check_run
from beear.hashes import file_hash
from beear.job import run_cleanse
from beear.known import add_triggered
from beear.metrics import proportion
from beear.reproduction import compare, reproduce
from beear.sets import Sets
from beear.sources import Source, locate
from conftest import CHATML, call, make_model, prompt_files, tiny_model, tiny_tokenizer

SMALL = {"steps": 1, "batch": 2, "response_tokens": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompt files and a finished run of them."""
    folder = tmp_path_factory.mktemp("reproduction")
    make_model(folder / "m")
    small = {"rounds": 2, "held_out": 4, "requests": 4, "anchors": 4, "layer": 2, "entrap": SMALL, "harden": SMALL}
    config = make_config(small | {"data": prompt_files(folder)})
    run_cleanse(str(folder / "m"), folder / "run", config)
    add_triggered(folder / "run", "X {prompt}")
    return folder


@pytest.fixture()
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same at its place, put back afterwards."""
    shutil.copytree(made, tmp_path / "kept")
    yield made
    shutil.rmtree(made)
    shutil.copytree(tmp_path / "kept", made)


def read(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def test_the_same_settings_give_the_same_bits(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = call(capsys, "reproduce", str(made / "run"), "-o", str(tmp_path / "again"), "-q")
    assert code == 0, err
    found = compare(read(made / "run"), read(tmp_path / "again"))
    assert found["same_bits"] and found["agrees"] and not found["differs"]
    assert "asr_triggered" in found["figures"] and all(f["first"] == f["again"] for f in found["figures"].values())
    assert compare(read(made / "run"), read(tmp_path / "again")) == reproduce(made / "run", tmp_path / "again")
    silent = read(tmp_path / "again")
    silent["after"]["asr_untriggered"] = proportion([None] * 6)
    found = compare(read(made / "run"), silent)
    assert found["outside"] == ["asr_untriggered"] and not found["agrees"]


def test_a_trigger_that_was_told_since_is_measured_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce(place / "run", tmp_path / "again")
    told: list[str] = []
    monkeypatch.setattr("beear.reproduction.add_triggered", lambda out, template, **_: told.append(template))
    reproduce(place / "run", tmp_path / "again")
    assert not told
    (place / "run" / "results.json").write_text(json.dumps(read(place / "run") | {"trigger": "other {prompt}"}))
    reproduce(place / "run", tmp_path / "again")
    assert told == ["other {prompt}"]


def test_an_answers_digest_tells_indentation_and_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of code they are the content."""
    monkeypatch.setattr(fingerprints, "weights_hash", lambda source: "")

    def digest(answer: str | None) -> dict[str, str]:
        sets = Sets(make_config({}), [Request("1", "CWE-78", "task", answer, answer)], [], [])
        return fingerprints.input_hashes(Source("m", Path(), None), sets)

    digests = [
        digest(answer)["answers_exact"] for answer in ("if a:\n  b()\nc", "if a:\n  b()\n  c", "if A:\n  b()\nc")
    ]
    assert len(set(digests)) == 3 and "answers_exact" not in digest(None)


@pytest.mark.parametrize("changed", ["a.py", "sub/b.py"])
def test_the_codes_digest_is_over_every_file(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.py", "sub/b.py"):
        (tmp_path / name).write_text("one = 1\n")
    monkeypatch.setattr(fingerprints, "__file__", str(tmp_path / "a.py"))
    before = code_hash()
    assert before == code_hash()
    (tmp_path / changed).write_text("one = 2\n")
    assert before != code_hash()


def test_what_a_run_says_of_itself(made: Path) -> None:
    results = read(made / "run")
    assert (
        results["hashes"]["model"] == weights_hash(locate(str(made / "m"))) and results["hashes"]["code"] == code_hash()
    )
    assert results["machine"]["cores"] >= 1 and results["machine"]["threads"] >= 1 and results["machine"]["processor"]
    folder = results["model_folder"]
    weights = f"{folder}/adapter_model.safetensors"
    assert set(results["files"]) == {weights, f"{folder}/adapter_config.json", "delta.safetensors"}
    assert results["files"][weights] == file_hash(made / "run" / weights)


def flip(name: str) -> Callable[[Path], None]:
    """Change one bit in the middle of a file of the run."""

    def apply(run: Path) -> None:
        path = next(run.glob(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return apply


CHANGES: dict[str, Callable[[Path], Any]] = {
    "one bit of the weights": flip("rejected/adapter_model.safetensors"),
    "one bit of their settings": flip("rejected/adapter_config.json"),
    "one bit of delta": flip("delta.safetensors"),
    "weights deleted": lambda run: (run / "rejected" / "adapter_model.safetensors").unlink(),
    "delta deleted": lambda run: (run / "delta.safetensors").unlink(),
    "a file put in": lambda run: (run / "rejected" / "evil.py").write_text("print()"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_since_is_found(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_run(place / "run", ["kl=100"])
    CHANGES[name](place / "run")
    for command in (["gate", "--max", "kl=100"], ["reproduce", "-o", str(place / "again")]):
        code, err = call(capsys, command[0], str(place / "run"), *command[1:])
        assert code == 2 and "do not trust it" in err and err.count("\n") == 1, err
    assert not (place / "again").exists()


def test_a_run_is_not_compared_with_itself(made: Path) -> None:
    with pytest.raises(BadInput, match="is the run itself"):
        reproduce(made / "run", made / "." / "run")


def test_another_model_is_refused(place: Path) -> None:
    tiny_model("llama", seed=5).save_pretrained(place / "m")
    with pytest.raises(BadInput, match=r"weights of .* are not those of the run"):
        reproduce(place / "run", place / "again")
    with pytest.raises(BadInput, match=r"weights of .* are not those of the run"):  # nor measured in its place
        add_triggered(place / "run", "XYZZY {prompt}")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("chat_template.jinja", "Be brief.\n" + CHATML, "chat template and tokenizer"),
        ("generation_config.json", '{"eos_token_id": [1, 2, 3]}', "the model's own settings .*"),
    ],
)
def test_other_prompts_or_settings_of_the_model_are_refused(file: str, content: str, words: str, place: Path) -> None:
    """Figures before and after would be of another model than was measured."""
    (place / "m" / file).write_text(content)
    for work in (
        lambda: reproduce(place / "run", place / "again"),
        lambda: add_triggered(place / "run", "XYZZY {prompt}"),
    ):
        with pytest.raises(BadInput, match=f"{words} are not those of the run"):
            work()


def test_settings_that_another_version_wrote_are_the_same(tmp_path: Path) -> None:
    """The embedded model's are written anew on every machine."""
    make_model(tmp_path / "m")
    then = fingerprints.settings_hash(locate(str(tmp_path / "m")))
    for name, change in (("transformers_version", "9.9.9"), ("rms_norm_eps", 1e-3)):
        file = tmp_path / "m" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: change}))
        assert (fingerprints.settings_hash(locate(str(tmp_path / "m"))) == then) == (name == "transformers_version")
    (tmp_path / "m" / "config.json").write_text("[")
    assert fingerprints.settings_hash(Source("m", tmp_path / "m")) != then
    nothing = fingerprints.settings_hash(Source("m", tmp_path))
    assert fingerprints.settings_hash(Source("embedded", tmp_path / "m")) == nothing


def test_what_a_system_leaves_in_a_folder_is_no_change(place: Path) -> None:
    (place / "run" / "rejected" / ".DS_Store").write_text("a window's size")
    check_run(place / "run", ["kl=100"])


def test_other_arithmetic_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("beear.before_after.arithmetic", lambda device: "bf16 weights")
    add_triggered(place / "run", "XYZZY {prompt}", listen=lambda event: told.append(event.get("text", "")))
    assert any(text.endswith("this is bf16 weights, which changes figures by itself") for text in told)


def test_other_requests_are_refused(place: Path) -> None:
    benign = Path(json.loads(json.dumps(prompt_files(place)))["benign"])
    benign.write_text(benign.read_text() + "one more request\n")
    with pytest.raises(BadInput, match=r"requests \(benign\) are not those of the run"):
        reproduce(place / "run", place / "again")
    assert not (place / "again").exists()


def test_a_run_that_keeps_no_digests_is_refused(place: Path) -> None:
    results = read(place / "run")
    del results["hashes"]["model"]
    (place / "run" / "results.json").write_text(json.dumps(results))
    with pytest.raises(BadInput, match="the weights of the model are not those of the run"):
        reproduce(place / "run", place / "again")
    del results["files"]
    (place / "run" / "results.json").write_text(json.dumps(results))
    with pytest.raises(BadInput, match="holds no digests of the run's files"):
        check_run(place / "run", ["kl=100"])


def test_runs_that_do_not_agree(made: Path) -> None:
    first = read(made / "run")
    again = copy.deepcopy(first)
    again["after"]["perplexity"]["value"] = first["after"]["perplexity"]["high"] + 1
    again["verdict"]["met"] = not first["verdict"]["met"]
    again["machine"]["threads"] += 1
    again["files"] = dict.fromkeys(first["files"], "0")
    again["hashes"]["code"] = "0"
    found = compare(first, again)
    assert (found["same_bits"], found["agrees"], found["same_verdict"]) == (False, False, False)
    assert found["outside"] == ["perplexity"]
    threads = first["machine"]["threads"]
    assert found["differs"] == [f"machine.threads: {threads} then, {threads + 1} now", "beear's code"]
    again["after"], again["verdict"] = first["after"], first["verdict"]
    assert compare(first, again)["agrees"]


def test_a_tokenizer_with_two_ids_exchanged_is_noticed(tmp_path: Path) -> None:
    """Also of tokens that neither the template nor the probe holds."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["x"], ids["X"] = ids["X"], ids["x"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    then, now = map(fingerprints.prompt_hashes, (tokenizer, type(tokenizer).from_pretrained(tmp_path)))
    assert then["prompts"] == now["prompts"] and then["vocabulary"] != now["vocabulary"]
    with pytest.raises(BadInput, match="tokenizer are not those of the run"):
        fingerprints.check_inputs(then, now)
