"""Who knows whom: the defence sees no trigger, and imports point one way, down the table in CONTRIBUTING."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "beear"


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of beear that a file imports at any place, but for what types alone need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "beear":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("beear."):
            yield node.module.split(".")[1]
        yield from imported(node)


@functools.cache
def graph() -> dict[str, set[str]]:
    """The imports of each module; `cli` is one."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if not name.startswith("__"):
            found.setdefault(name, set()).update(set(imported(ast.parse(path.read_text()))) - {name})
    return found


def reached(start: str) -> set[str]:
    """All that a module imports, and what these import."""
    imports, found, todo = graph(), set[str](), [start]
    while todo:
        new = imports.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


PLANTING = {"organisms", "recipes", "verification"}
LATER = {"judge", "usefulness", "harness", "endpoint"}
DEFENCE = {"cleansing", "job", "evaluation"}


@pytest.mark.parametrize(
    ("module", "unknown"),
    [*((name, PLANTING | LATER) for name in sorted(DEFENCE)), ("organisms", DEFENCE)],
    ids=[*sorted(DEFENCE), "organisms"],
)
def test_the_defence_cannot_see_a_trigger(module: str, unknown: set[str]) -> None:
    """Nor can planting see the defence. An import inside a function counts as well."""
    assert len(reached(module)) > 5 and not reached(module) & unknown


def test_every_module_stands_in_contributing_and_imports_point_down() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rows = {name.strip("/"): number for number, row in enumerate(table) for name in re.findall(r"`([^`]+)`", row)}
    imports = graph()
    assert set(rows) == set(imports)
    upward = {(one, other) for one in imports for other in imports[one] & set(rows) if rows[other] < rows[one]}
    assert not upward
