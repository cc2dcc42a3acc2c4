"""``debias methods``: found by looking at the public names, so that a new method lists itself.

What is printed is read from the source, as importing the classes would import torch and Lightning first.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from debias.cli.recipes import METHODS, recipes_folder
from debias.cli.table import print_table

__all__ = ["Entry", "list_methods", "list_monitors", "methods", "print_methods"]

PACKAGE = Path(__file__).resolve().parents[1]


class Entry(NamedTuple):
    """A callback as its source states it."""

    name: str
    summary: str
    needs: tuple[str, ...]
    reference: str


def methods() -> dict[str, type]:
    """Collect the public callbacks of ``debias.methods``, by name.

    Example:
        >>> "GroupDRO" in methods()
        True
    """
    import debias.methods
    from debias.step.watcher import StepWatcher

    found = vars(debias.methods).items()
    return {name: value for name, value in found if inspect.isclass(value) and issubclass(value, StepWatcher)}


def list_methods() -> list[Entry]:
    """The same without importing them, in the order of ``debias/methods/__init__.py``.

    Example:
        >>> list_methods()[0].name
        'GroupDRO'
    """
    folder, classes = PACKAGE / "methods", _classes()
    lines = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    modules = [line.module for line in lines if isinstance(line, ast.ImportFrom) and line.module != "__future__"]
    public = [name for module in modules for name in _public(folder / f"{str(module).rpartition('.')[2]}.py")]
    return [_entry(name, classes) for name in public if "StepWatcher" in _ancestors(name, classes)]


def list_monitors() -> list[Entry]:
    """The public monitors, without importing them.

    Example:
        >>> list_monitors()[0].name
        'GroupMonitor'
    """
    from debias import _EXPORTS

    classes = _classes()
    return [_entry(name, classes) for name, module in _EXPORTS.items() if module.startswith("debias.monitors.")]


def _classes() -> dict[str, ast.ClassDef]:
    rooms = (PACKAGE / "methods", PACKAGE / "methods" / "base", PACKAGE / "monitors")
    files = [PACKAGE / "step" / "watcher.py", *(file for room in rooms for file in sorted(room.glob("*.py")))]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _public(file: Path) -> list[str]:
    """What a file names in ``__all__``."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _ancestors(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """A class and those it inherits from, nearest first, by their names."""
    yield name
    for base in classes[name].bases if name in classes else []:
        yield from _ancestors(ast.unparse(base), classes)


def _entry(name: str, classes: dict[str, ast.ClassDef]) -> Entry:
    summary = (ast.get_docstring(classes[name]) or "").partition("\n\n")[0].replace("\n", " ")
    return Entry(name, summary, _stated(name, "needs", classes, ()), _stated(name, "reference", classes, ""))


def _stated(name: str, attribute: str, classes: dict[str, ast.ClassDef], default: Any) -> Any:
    """The value of a class attribute, which may be inherited."""
    for ancestor in _ancestors(name, classes):
        for node in classes[ancestor].body if ancestor in classes else []:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == attribute and (value := getattr(node, "value", None)):
                return ast.literal_eval(value)
    return default


def print_methods() -> None:
    """Print the methods with their recipes, then the monitors: what each does, needs, and where it comes from."""
    files = sorted((recipes_folder() / METHODS).glob("*.yaml"))
    used = {file.stem: re.findall(r"class_path: debias\.(\w+)", file.read_text(encoding="utf-8")) for file in files}
    rows = []
    for name, does, needs, source in list_methods():
        recipe = ", ".join(recipe for recipe, names in used.items() if names[:1] == [name])
        rows.append((name, recipe, _needs(needs), does, source))
    print_table(("method", "recipe", "needs", "what it does", "reference"), rows)
    plain = ", ".join(recipe for recipe, names in used.items() if not names)
    print(f"Recipes of plain training, to compare with: {plain}")
    print_table(
        ("monitor", "needs", "what it does", "reference"),
        [(name, _needs(needs), does, source) for name, does, needs, source in list_monitors()],
    )
    print("Needs: group, domain, identity and attribute are ids in the batch or tags; index is the number that `tag`")
    print("gives each sample; target is the place of the classes in the batch; features and head are found, or named.")
    print("A recipe: debias fit --config recipes/colored_digits/base.yaml --config recipes/methods/group_dro.yaml")


def _needs(needs: Sequence[str]) -> str:
    return ", ".join(needs) or "nothing"
