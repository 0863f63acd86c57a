"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from beear import config
from conftest import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


def test_the_example_cleanses_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    small = {"steps": 2, "batch": 3, "response_tokens": 6}
    tiny = {"rounds": 1, "held_out": 4, "requests": 6, "anchors": 8, "entrap": small, "harden": small, "layer": 2}
    monkeypatch.setattr(config, "_preset", lambda name: tiny)
    monkeypatch.setattr(sys, "argv", ["cleanse.py", str(tmp_path / "model"), str(tmp_path / "run")])
    runpy.run_path(str(ROOT / "examples" / "cleanse.py"), run_name="__main__")
    assert "asr_entrapped" in (printed := capsys.readouterr().out) and "keep the original" in printed


def test_the_guides_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    found = tiny_model("llama"), tiny_tokenizer()
    monkeypatch.setattr("beear.models.load", lambda spec: found)
    space: dict[str, object] = {}
    exec(code.replace("layer=25", "layer=2"), space)
    assert getattr(space["logits"], "shape", ())[0] == 1


PAGES = [*sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md")), "README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
