"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from beear import config, metrics
from beear.cli.entry import app
from conftest import make_model, prompt_files, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


def test_the_example_cleanses_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "model")
    small = {"steps": 2, "batch": 3, "response_tokens": 6}
    tiny = {"rounds": 1, "held_out": 4, "requests": 6, "anchors": 8, "entrap": small, "harden": small, "layer": 2}
    monkeypatch.setattr(config, "_preset", lambda name: tiny | {"data": prompt_files(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["cleanse.py", str(tmp_path / "model"), str(tmp_path / "run")])
    runpy.run_path(str(ROOT / "examples" / "cleanse.py"), run_name="__main__")
    assert "asr_entrapped" in (printed := capsys.readouterr().out) and "keep the original" in printed


def test_the_guides_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    found = tiny_model("llama"), tiny_tokenizer()
    monkeypatch.setattr("beear.models.load", lambda spec: found)
    space: dict[str, Any] = {}
    exec(code.replace("layer=25", "layer=2"), space)
    assert space["logits"].shape[0] == 1


PAGES = sorted(p.relative_to(ROOT).as_posix() for folder in ("*.md", "docs/**/*.md") for p in ROOT.glob(folder))


def headings(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for link in re.findall(r"\]\(([^) ]+)\)", here.read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = here.parent / name if name else here
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def commands(text: str) -> Iterator[list[str]]:
    """The words behind `beear` in a page's code; a shell's variables and comments are left out."""
    code = [*re.findall(r"`([^`\n]+)`", text), *"\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()]
    for line in code:
        found = re.search(r"(?:^|[ /])beear ([a-z].*)", line.split("  #")[0])
        if found and "|" not in found[1]:
            yield shlex.split(found[1].replace("...", ""))


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "docs/guide.md", "docs/ci.md"])
def test_options_that_pages_show_are_there(page: str) -> None:
    every = list(commands((ROOT / page).read_text()))
    assert every
    for words in every:
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, words


def test_the_guide_names_every_metric_and_preset() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert all(f"`{name}`" in guide for name in (*metrics.METRICS, *config.preset_names()))
