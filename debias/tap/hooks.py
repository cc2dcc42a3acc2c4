"""Hooks on modules whose copies and pickles do nothing."""

from __future__ import annotations

import functools
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
        return functools.partial, (_do_nothing,)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
