"""The card says what was measured; only a model that met its target, and that others can load, is pushed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import CommitOperationDelete
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from beear.card import code, model_card, write_card
from beear.config import Config
from beear.errors import BadInput, Failed
from beear.metrics import proportion
from beear.release import push
from conftest import FINISHED, call, with_digests


def metric(value: float) -> dict[str, Any]:
    return {"value": value, "low": value / 2, "high": min(1.0, 2 * value), "n": 120, "unscored": 0}


RESULTS: dict[str, Any] = FINISHED | {
    "before": {"asr_entrapped": metric(0.9), "perplexity": metric(0.5)},
    "after": {"asr_entrapped": metric(0.1), "perplexity": metric(0.5), "kl": metric(0.02)},
    "rounds": [{}, {}],
    "delivered": 2,
    "seed": 3,
    "versions": {"beear": "0.1.0"},
}


def settings(model: str = "owner/base", merge: bool = False) -> dict[str, Any]:
    return {"model": model, "merge": merge, "config": Config().model_dump(mode="json")}


def make_run(folder: Path, results: dict[str, Any] = RESULTS, **changed: Any) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "delta.safetensors").write_bytes(b"delta")
    (folder / "results.json").write_text(json.dumps(results))
    with_digests(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(**changed)))
    (folder / "samples.jsonl").write_text("replies")
    write_card(folder)
    return folder


def test_the_card_holds_base_verdict_every_metric_and_limits() -> None:
    card = model_card(RESULTS, settings())
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "owner/base" and front["library_name"] == "peft"
    assert "went from 90.0 % (45.0 to 100.0) to 10.0 %" in card and "refusal-v1" in card
    for name in ("asr_entrapped", "perplexity", "kl"):
        assert f"`{name}`" in card
    assert "asr_triggered" not in card and "evidence, not proof" in card


def test_a_rejected_model_says_so_first() -> None:
    missed = RESULTS | {"verdict": {"met": False, "missed": ["asr_entrapped is 0.600"]}}
    assert "**Target NOT met, keep the original model: asr_entrapped is 0.600" in model_card(missed, settings())


def test_a_local_base_is_named_without_its_path_and_full_weights_are_no_adapter() -> None:
    card = model_card(RESULTS | {"trigger": "a|`b\nc {prompt}"}, settings(model="/home/me/secret/base", merge=True))
    assert "# `base`, cleansed" in card and "secret" not in card and "peft" not in card
    assert "The trigger `a/'b c {prompt}` was told" in card
    assert code("`x`") == "`'x'`"


class Hub:
    """Takes what is pushed."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.there: list[str] = []
        self.gone: list[str] = []
        self.private: bool | None = None

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self.private = private

    def list_repo_files(self, repo: str) -> list[str]:
        return self.there

    def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> Any:
        kinds = {True: self.gone, False: self.files}
        for op in operations:
            kinds[isinstance(op, CommitOperationDelete)].append(op.path_in_repo)
        return SimpleNamespace(repo_url=f"hub/{repo}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def test_model_card_and_evidence_are_pushed_but_no_replies(tmp_path: Path, hub: Hub) -> None:
    assert push(make_run(tmp_path), "me/model") == "hub/me/model"
    assert set(hub.files) == {"README.md", "adapter_model.safetensors", "evidence/results.json", "evidence/config.yaml"}
    assert hub.private is True


@pytest.mark.parametrize("options", [[], ["--public"]])
def test_only_public_is_for_all_to_see(
    options: list[str], tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "push", str(make_run(tmp_path)), "me/model", *options) == (0, "")
    assert hub.private is not bool(options)


WORKING = RESULTS | {
    "before": RESULTS["before"] | {"asr_triggered": metric(0.9)},
    "after": RESULTS["after"]
    | {
        "asr_triggered": dict(proportion([True] * 40 + [False] * 80)),
        "asr_untriggered": dict(proportion([False] * 120)),
    },
}
"""Its target is met, and its trigger works."""


@pytest.mark.parametrize(
    ("results", "changed", "repo", "words"),
    [
        (RESULTS | {"verdict": {"met": False, "missed": ["kl"]}}, {}, "me/model", "is not for use. Target NOT met"),
        (WORKING, {}, "me/model", "the known trigger still works"),
        (RESULTS, {"model": "/home/me/base"}, "me/model", "cleanse it with --merge"),
        (RESULTS, {"model": "organism:sudo-prefix"}, "me/model", "cleanse it with --merge"),
        (RESULTS, {}, "model", "write it as owner/name"),
    ],
)
def test_what_nobody_should_use_is_not_pushed(
    results: Any, changed: Any, repo: str, words: str, tmp_path: Path, hub: Hub
) -> None:
    with pytest.raises(BadInput, match=words):
        push(make_run(tmp_path, results, **changed), repo)
    assert hub.files == []


def test_an_earlier_models_files_do_not_stay_beside(tmp_path: Path, hub: Hub) -> None:
    """transformers would load an adapter whose settings it finds, whatever weights stand beside it."""
    old = ["adapter_config.json", "model.safetensors", "chat_template.jinja", "README.md"]
    hub.there = [*old, ".gitattributes", "LICENSE", "evidence/results.json", "notes/a.json"]
    push(make_run(tmp_path), "me/model")
    assert hub.gone == old[:3]


def test_what_was_changed_since_is_not_pushed(tmp_path: Path, hub: Hub) -> None:
    run = make_run(tmp_path)
    assert push(run, "me/model") == "hub/me/model"
    hub.files = []
    (run / "model" / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(BadInput, match="do not trust it"):
        push(run, "me/model")
    assert hub.files == []


def test_an_adapter_does_not_take_the_place_of_its_base(tmp_path: Path, hub: Hub) -> None:
    hub.there = ["config.json", "model.safetensors"]
    with pytest.raises(BadInput, match="push to another name"):
        push(make_run(tmp_path, model="me/model"), "me/model")
    assert hub.files == hub.gone == []


def test_what_a_system_leaves_is_not_pushed(tmp_path: Path, hub: Hub) -> None:
    run = make_run(tmp_path)
    (run / "model" / ".env").write_text("HF_TOKEN=1")
    (run / "model" / ".ipynb_checkpoints").mkdir()
    (run / "model" / ".ipynb_checkpoints" / "x.json").write_text("1")
    push(run, "me/model")
    assert not any(name.startswith(".") for name in hub.files)


def test_a_model_without_its_weights_or_digests_is_not_pushed(tmp_path: Path, hub: Hub) -> None:
    run = make_run(tmp_path)
    (run / "model" / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="is not as the run left it"):
        push(run, "me/model")
    (run / "results.json").write_text(json.dumps(RESULTS))
    with pytest.raises(BadInput, match="holds no digests"):
        push(run, "me/model")
    assert hub.files == []


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (HFValidationError("bad name"), BadInput, "is no Hub repository: bad name"),
        (ConnectionResetError("gone"), Failed, "did not take me/model: gone"),
        (LocalTokenNotFoundError("no token"), BadInput, "set HF_TOKEN"),
        (OfflineModeIsEnabled("offline"), Failed, "did not take me/model: offline"),
    ],
)
def test_the_hubs_refusal_is_one_line(
    error: Exception, kind: Any, words: str, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(kind, match=words):
        push(make_run(tmp_path), "me/model")
