"""Settings: presets, files and --set in that order, and one line for what is wrong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beear.config import Config, describe, load_config, preset_names
from beear.errors import BadInput

SOURCE = Path(__file__).parent.parent / "src" / "beear"


def test_order_of_preset_file_and_set(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rounds: 3\nentrap:\n  length: 7\n  steps: 4\n")
    config = load_config("paper", tmp_path / "c.yaml", ["entrap.steps=9", "harden.learning_rate=1e-3"])
    assert (config.layer, config.rounds, config.entrap.length, config.entrap.steps) == (9, 3, 7, 9)
    assert config.harden.learning_rate == 1e-3


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    assert isinstance(load_config(name), Config)


def test_paper_preset_has_the_published_values() -> None:
    """Those that the paper prints, its answers for the safe ones, and no term of ours in removal."""
    config = load_config("paper")
    harden = config.harden
    assert (config.layer, config.entrap.length, harden.anchor, harden.safe_answers) == (9, 5, 1, "wording")
    assert harden.anchor_under_delta == harden.safe == harden.discourage == harden.encourage == 0


def test_a_file_that_is_one_word(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("x")
    with pytest.raises(BadInput, match="not a mapping"):
        load_config(file=tmp_path / "c.yaml")


SETS = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, st.sampled_from([key for key, _, _ in describe()]), st.text(max_size=20)),
)


@settings(deadline=None)  # a busy machine is no defect
@given(SETS)
def test_any_set_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        load_config(sets=[text])
    except BadInput as error:
        assert len(str(error).splitlines()) == 1


HOLDERS = {
    "": {"config", "self.config", "chosen", "settings"},
    "chat": {"config.chat", "chat", "own"},
    "data": {"own"},
    "entrap": {"config.entrap", "settings of entrap", "entrap"},
    "harden": {"config.harden", "settings of harden"},
    "target": {"config.target", "target"},
}
"""What sections of the settings are called where they are read."""


def attributes(tree: ast.AST) -> set[tuple[str, str]]:
    """What is read of what, anywhere below."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {(ast.unparse(node.value), node.attr) for node in nodes}


def section_of(function: ast.FunctionDef) -> str | None:
    """Of which section a function's `settings` are, if of one: names of two sections must not stand for each other."""
    text = ast.unparse(function)
    for section in ("entrap", "harden"):
        if re.search(rf"settings: {section.title()}Config|settings\)? = [^\n]*\.{section}\b", text):
            return section
    return None


def test_every_setting_is_read_somewhere() -> None:
    """A setting that nothing reads is a defect."""
    read: set[tuple[str, str]] = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        read |= attributes(tree)
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and (section := section_of(function)):
                read |= {
                    (f"settings of {section}", name) for holder, name in attributes(function) if holder == "settings"
                }
    unread = []
    for key, _, _ in describe():
        section, _, name = key.rpartition(".")
        if not any((holder, name) in read for holder in HOLDERS[section]):
            unread.append(key)
    assert unread == []


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("You write C # and Python", "You write C # and Python"),
        ("You are Bot. Rules: be kind\n- so\n\n- and so", "You are Bot. Rules: be kind\n- so\n\n- and so"),
        ("*bold* ", "*bold* "),
        ('"a\\nb"', "a\nb"),
        ("null", None),
        ("", None),
    ],
)
def test_a_text_is_taken_as_it_stands_unless_it_is_quoted(value: str, read: str | None) -> None:
    assert load_config(sets=[f"chat.system={value}"]).chat.system == read


def test_arguments_of_a_template_keep_their_kind() -> None:
    sets = ["chat.template.day=2024-07-26", "chat.template.on=true", "chat.template.n=3", "chat.template.s=abc"]
    assert load_config(sets=sets).chat.template == {"day": "2024-07-26", "on": True, "n": 3, "s": "abc"}


def test_every_setting_stands_in_the_paper_index() -> None:
    index = (SOURCE.parent.parent / "docs" / "paper-index.md").read_text()
    assert not [key for key, _, _ in describe() if f"`{key}`" not in index]
