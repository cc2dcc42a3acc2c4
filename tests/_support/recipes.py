"""A recipe of a second or so, for tests that need real runs."""

from __future__ import annotations

from pathlib import Path

from debias.cli.recipes import recipes_folder
from debias.compare.grid import Recipe, RunSpec, prepare

EPOCHS = 2


def digits(epochs: int = EPOCHS, **fixed: object) -> Recipe:
    """Coloured digits, a few epochs of it."""
    folder = recipes_folder()
    return Recipe(
        "colored_digits", folder / "colored_digits", folder / "methods", (), {"trainer.max_epochs": epochs, **fixed}
    )


def one(out: Path, method: str, seed: int = 0, epochs: int = EPOCHS, held_out: int | None = None) -> Path:
    """The folder of one run that is to be made."""
    name = f"{method}-seed{seed}" if held_out is None else f"{method}-without{held_out}-seed{seed}"
    (folder,) = prepare(digits(epochs), [RunSpec(name, method, seed, {}, held_out)], out)
    return folder
