"""Packages that are not needed by everybody: which extra brings each, and one sentence where it is missing.

Nothing is imported here, so that the command line can say it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["EXTRAS", "install_command", "install_hint", "needs_extra"]

# The smallest extra that brings a package, by the name that is imported.
EXTRAS = {
    "PIL": "images",
    "filelock": "cli",
    "jinja2": "audit",
    "jsonargparse": "cli",
    "kornia": "augment",
    "matplotlib": "compare",
    "omegaconf": "cli",
    "pandas": "audit",
    "pycocotools": "detection",
    "rich": "compare",
    "scipy": "compare",
    "sklearn": "sklearn",
    "submitit": "cluster",
    "timm": "images",
    "torchdata": "stateful",
    "torchvision": "images",
    "tqdm": "audit",
    "transformers": "loops",
    "wandb": "wandb",
    "yaml": "cli",
}
# What is there wherever debias is: an error in these is no missing extra.
CORE = {"debias", "lightning", "numpy", "torch", "torchmetrics", "typing_extensions"}
# Where the package has another name than what is imported.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def install_command(extra: str) -> str:
    """What to type to get the packages of an extra."""
    return f"pip install 'lightning-debias[{extra}]'"


def install_hint(module: str) -> str | None:
    """Say how to install ``module`` if an extra of debias brings it."""
    name = module.partition(".")[0]
    if name not in EXTRAS:
        return None
    return f"`{PACKAGES.get(name, name)}` is not installed; `{install_command(EXTRAS[name])}` brings it."


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports of packages that ``extra`` brings stand inside this.

    Args:
        extra: of ``pyproject.toml``.

    Raises:
        DebiasError: one of them is not there, or is broken.

    Example:
        >>> from debias.extras import needs_extra
        >>> with needs_extra("sklearn"):
        ...     from sklearn.linear_model import LogisticRegression
    """
    try:
        yield
    except ImportError as error:
        from debias.errors import DebiasError

        name = (error.name or extra).partition(".")[0]
        if name in CORE:
            raise
        if extra == "cli":  # a config names classes of any extra
            extra = EXTRAS.get(name, extra)
        raise DebiasError(
            f"Expected the package `{PACKAGES.get(name, name)}` to be installed, but importing it failed: {error}. Run"
            f" `{install_command(extra)}`."
        ) from error
