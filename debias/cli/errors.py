"""Errors as a user of the command line sees them: one message, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["missing_extra", "readable_errors"]

EXTRAS = {
    "kornia": "augment",
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
    except Exception as error:
        message = next(filter(None, map(_readable, _causes(error))), None)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from error


def _readable(error: BaseException) -> str | None:
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error.name or "")
    from debias.errors import DebiasError

    return str(error) if isinstance(error, DebiasError) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error to what caused it: jsonargparse wraps what a constructor raises."""
    while error is not None:
        yield error
        error = error.__cause__
