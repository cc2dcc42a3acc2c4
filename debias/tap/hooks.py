"""Hooks on modules whose copies and pickles do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Hook"]


class Hook:
    """A module hook whose copies and pickles do nothing, so that a copied module is free of us."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hook."""
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _get_inert, ()


def _inert(*args: Any, **kwargs: Any) -> None:
    return None


def _get_inert() -> Callable[..., None]:
    return _inert
