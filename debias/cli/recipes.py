"""``debias recipes``: list the recipes that come with the package, and copy one to edit it."""

from __future__ import annotations

import shutil
from pathlib import Path

from debias.cli.suggest import nearest
from debias.cli.table import print_table

__all__ = ["copy_recipe", "print_recipes", "recipes", "recipes_folder"]

METHODS = "methods"


def recipes_folder() -> Path:
    """Locate the recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, Path]:
    """Collect the recipes, by name: the folders that hold a ``base.yaml``.

    Example:
        >>> "colored_digits" in recipes()
        True
    """
    return {base.parent.name: base.parent for base in sorted(recipes_folder().glob("*/base.yaml"))}


def print_recipes() -> None:
    """Print one row a recipe, then how to run and how to copy one."""
    rows = []
    for name, folder in recipes().items():
        own = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "base")
        rows.append((name, _description(folder / "base.yaml"), ", ".join(own)))
    print_table(("recipe", "what it is", "tuned for it"), rows)
    shared = ", ".join(sorted(file.stem for file in (recipes_folder() / METHODS).glob("*.yaml")))
    print(f"Methods for any data that has what they need (see `debias methods`): {shared}")
    print("Copy one:  debias recipes copy colored_digits .")
    print("Run it:    debias fit --config recipes/colored_digits/base.yaml --config recipes/methods/group_dro.yaml")


def copy_recipe(name: str, folder: Path) -> None:
    """Copy a recipe to ``folder/recipes/<name>`` and the method files to ``folder/recipes/methods``.

    Nothing is overwritten. Method files that are there already, from another recipe, stay as they are.

    Args:
        name: a recipe.
        folder: the user's folder; made if it does not exist.

    Raises:
        DebiasError: there is no such recipe, a file of that recipe exists, or the folder cannot be written.
    """
    from debias.cli.errors import check_writable
    from debias.errors import DebiasError

    known = recipes()
    if name not in known:
        raise DebiasError(f"Expected `recipe` to be one of {', '.join(known)}, but got `{name}`{nearest(name, known)}")
    source, target = recipes_folder(), folder / "recipes"
    own = [file.relative_to(source) for file in sorted(known[name].rglob("*")) if file.is_file()]
    shared = [file.relative_to(source) for file in sorted((source / METHODS).glob("*.yaml"))]
    existing = [str(target / file) for file in own if (target / file).exists()]
    if existing:
        raise DebiasError(
            f"Expected none of the files of `{name}` to exist, but found {', '.join(existing)}. Nothing was copied. "
            "Move them away or name another folder."
        )
    check_writable(target)
    for file in [*own, *shared]:
        if (target / file).exists():
            print(f"kept    {target / file}")
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)
        print(f"copied  {target / file}")


def _description(base: Path) -> str:
    """Read the first comment of a YAML file."""
    comments = (line for line in base.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next(comments, "").lstrip("# ").strip()
