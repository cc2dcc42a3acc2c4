"""Errors as a user of the command line sees them: one message, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["missing_extra", "readable_errors"]

EXTRAS = {
    "matplotlib": "recipes",
    "rich": "recipes",
    "sklearn": "recipes",
    "timm": "recipes",
    "torchdata": "stateful",
    "torchvision": "recipes",
    "wandb": "recipes",
}


def missing_extra(module: str) -> str | None:
    """Say how to install ``module`` if an extra of debias brings it."""
    extra = EXTRAS.get(module.partition(".")[0])
    return f"`{module}` is not installed; `pip install 'debias[{extra}]'` brings it." if extra else None


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors of debias and missing extras into a message and exit status 1; let anything else through."""
    try:
        yield
    except ModuleNotFoundError as error:
        hint = missing_extra(error.name or "")
        if hint is None:
            raise
        _leave(hint, error)
    except Exception as error:
        from debias.errors import DebiasError

        if not isinstance(error, DebiasError):
            raise
        _leave(str(error), error)


def _leave(message: str, error: Exception) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1) from error
