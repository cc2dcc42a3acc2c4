"""kornia, loaded when a shift first needs it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from debias.errors import DebiasError

__all__ = ["color", "enhance", "filters", "geometry"]


OLDEST = (0, 8, 3)  # before it median filters had no border, and CLAHE and Canny's edges differed or failed


def _load(name: str) -> Any:
    try:
        found = import_module("kornia").__version__
        if tuple(int(x) for x in found.split(".")[:3] if x.isdigit()) < OLDEST:
            raise ImportError(f"it is {found}, and 0.8.3 or newer is needed (Python 3.11 or newer)")
        return import_module(name)
    except ImportError as error:
        raise DebiasError(
            f"Expected the package `kornia` to be installed, but importing it failed: {error}. Run, with Python 3.11 or"
            " newer,"
            " `pip install 'lightning-debias[augment]'`."
        ) from error


def color() -> Any:
    """Colour spaces."""
    return _load("kornia.color")


def enhance() -> Any:
    """JPEG, equalisation."""
    return _load("kornia.enhance")


def filters() -> Any:
    """Blurs with a kernel for each image, Canny."""
    return _load("kornia.filters")


def geometry() -> Any:
    """Perspective transforms."""
    return _load("kornia.geometry.transform")
