"""A run is signed offline; one changed byte, one file too many or another key, and the signature does not hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from beear.errors import BadInput
from beear.signing import PASSWORD, SIGNATURE, check_signature, sign_run
from conftest import call, with_digests
from test_release import RESULTS, WORKING, make_run


def write_keys(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    protect = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protect),
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    (tmp_path / "r").mkdir()
    run = make_run(tmp_path / "r")
    (run / "delta.safetensors").write_bytes(b"delta")
    (run / "report.html").write_text("<p>what people read</p>")
    (run / "results.json").write_text(json.dumps(RESULTS))
    return with_digests(run)


@pytest.fixture()
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "own")


def test_a_run_whose_trigger_still_works_is_not_signed(run: Path, keys: tuple[Path, Path]) -> None:
    results = json.loads((run / "results.json").read_text()) | {key: WORKING[key] for key in ("before", "after")}
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(BadInput, match="the known trigger still works"):
        sign_run(run, keys[0])


def test_signed_and_checked(run: Path, keys: tuple[Path, Path]) -> None:
    assert sign_run(run, keys[0]) == run / SIGNATURE
    check_signature(run, keys[1])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "x").write_text("work in progress")
    (run / "events.jsonl").write_text("{}")
    check_signature(run, keys[1])
    (run.parent / "latest").symlink_to(run)
    check_signature(run.parent / "latest", keys[1])
    assert sign_run(run.parent / "latest", keys[0]) == run / SIGNATURE


def flip(name: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / name).write_bytes(content)

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "a bit of the weights": flip("model/adapter_model.safetensors"),
    "a bit of the results": flip("results.json"),
    "a bit of the settings": flip("config.yaml"),
    "a bit of the card": flip("model/README.md"),
    "a bit of the signature": flip(SIGNATURE),
    "a bit of the report": flip("report.html"),
    "a bit of delta": flip("delta.safetensors"),
    "a file that git passes over": lambda run: (run / "model" / ".gitattributes").write_text("*"),
    "a file too many": lambda run: (run / "model" / "extra.py").write_text("print()"),
    "a file gone": lambda run: (run / "samples.jsonl").unlink(),
    "no signature": lambda run: (run / SIGNATURE).unlink(),
    "an empty signature": lambda run: (run / SIGNATURE).write_text(""),
    "a signature that is a list": lambda run: (run / SIGNATURE).write_text("[]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(name: str, run: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "sign", str(run), "--key", str(keys[0]))[0] == 0
    assert call(capsys, "gate", str(run), "--public-key", str(keys[1]))[0] == 0
    CHANGES[name](run)
    code, err = call(capsys, "gate", str(run), "--public-key", str(keys[1]))
    assert code == 2 and err.count("\n") == 1 and any(w in err for w in ("does not hold", "not signed"))


def test_another_key(run: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign_run(run, keys[0])
    with pytest.raises(BadInput, match="does not hold"):
        check_signature(run, write_keys(tmp_path, "other")[1])


def test_a_key_with_a_password(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_keys(tmp_path, "own", "secret")
    with pytest.raises(BadInput, match="cannot use the key"):
        sign_run(run, private)
    monkeypatch.setenv(PASSWORD, "secret")
    sign_run(run, private)
    check_signature(run, public)


def test_no_key(run: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "rsa.pem").write_bytes(
        rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "text.pem").write_text("no key")
    for name in ("gone.pem", "text.pem", "rsa.pem", None):
        path = tmp_path / name if name else keys[1]
        with pytest.raises(BadInput, match="no key file" if name == "gone.pem" else "cannot use the key .* in PEM"):
            sign_run(run, path)
        assert not (run / SIGNATURE).exists()
    sign_run(run, keys[0])
    with pytest.raises(BadInput, match="cannot use the key"):
        check_signature(run, keys[0])


def test_what_missed_its_target_is_not_signed(run: Path, keys: tuple[Path, Path]) -> None:
    (run / "results.json").write_text(json.dumps(RESULTS | {"verdict": {"met": False, "missed": ["asr 0.9 > 0.5"]}}))
    with pytest.raises(BadInput, match=r"was not signed: Target NOT met, keep the original model: asr 0\.9"):
        sign_run(run, keys[0])


def test_what_was_changed_is_not_signed(run: Path, keys: tuple[Path, Path]) -> None:
    flip("delta.safetensors")(run)
    with pytest.raises(BadInput, match="not as the run left it"):
        sign_run(run, keys[0])


def test_without_the_library(run: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(BadInput, match=r"extra sign"):
        sign_run(run, keys[0])
