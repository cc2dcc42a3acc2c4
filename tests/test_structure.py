"""Arrows run one way: what a room of the package may import, and that nothing below knows Lightning."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "debias"

# Each room and the rooms of debias that it may import. Everybody may raise the package's errors, and name an extra.
MAY_IMPORT = {
    "ops": set(),
    "tap": {"ops"},
    "step": {"tap", "ops"},
    "metrics": {"ops"},
    "models": set(),
    "data": {"step", "ops"},
    "methods": {"data", "step", "tap", "ops"},
    "monitors": {"metrics", "data", "step", "tap", "ops"},
}
# What watches losses, rows and heads, and the maths, know torch only.
WITHOUT_LIGHTNING = {"ops", "tap", "metrics"}


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(room: str) -> list[Path]:
    found = sorted((PACKAGE / room).rglob("*.py"))
    assert found, room
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room):
    for file in files(room):
        rooms = {name.split(".")[1] for name in imported(file) if name.startswith("debias.")}
        assert rooms <= MAY_IMPORT[room] | {room, "errors", "extras"}, file


@pytest.mark.parametrize("room", sorted(WITHOUT_LIGHTNING))
def test_what_knows_torch_only_does_not_know_lightning(room):
    for file in files(room):
        assert not {name for name in imported(file) if name.split(".")[0] in ("lightning", "pytorch_lightning")}, file


def test_the_top_of_the_package_holds_doors_only():
    assert {file.name for file in PACKAGE.glob("*.py")} == {
        "__init__.py", "__main__.py", "errors.py", "extras.py", "functional.py", "mixins.py",
    }  # fmt: skip
