"""kornia, loaded when a shift first needs it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from debias.errors import DebiasError

__all__ = ["color", "enhance", "filters", "geometry"]


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DebiasError(
            f"Expected the package `kornia` to be installed, but importing it failed: {error}. Run"
            " `pip install 'debias[augment]'`."
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
