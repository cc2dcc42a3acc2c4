"""Errors as a user of the command line sees them: one message, no traceback."""

from __future__ import annotations

import errno
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from debias.compare.escape import plain
from debias.extras import install_hint

__all__ = ["check_writable", "readable_errors"]

# What the system says of a place that cannot be written.
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENOTDIR}


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before hours of work for it; one that is not there is not left behind.

    Raises:
        DebiasError: it cannot be written.
    """
    from debias.errors import unwritable

    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors of debias and missing extras into a message and exit status 1; let anything else through."""
    try:
        yield
    except Exception as error:
        message = next(filter(None, map(_readable, _causes(error))), None)
        if message is None:
            raise
        print(f"error: {plain(message, lines=True)}", file=sys.stderr)
        raise SystemExit(1) from error


def _readable(error: BaseException) -> str | None:
    missing = re.findall(r"Requirement '([\w-]+)[^']*' not met", str(error))  # Lightning's, of a logger's package
    if missing and isinstance(error, ModuleNotFoundError | ValueError):
        return f"`{missing[-1]}` is not installed; `pip install {missing[-1]}` brings it."
    if isinstance(error, ModuleNotFoundError):
        return install_hint(error.name or "")
    if any(base.__name__ == "InterpolationResolutionError" for base in type(error).__mro__):  # omegaconf's
        return _unresolved(str(error))
    from debias.errors import DebiasError, unwritable

    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        error = unwritable(error.filename or "a file", error)
    return str(error) if isinstance(error, DebiasError) else None


def _unresolved(message: str) -> str | None:
    """Say which value refers to one that no file sets; the usual reason is a method file without its base."""
    name = re.search(r"(?:Interpolation key '|Error trying to access )(?P<name>[\w.\[\]]+)", message)
    place = re.search(r"full_key: (?P<place>\S+)", message)
    if name is None:
        return None
    where = f"`{place['place']}`" if place else "another value"
    return (
        f"Expected the config to set `{name['name']}`, which {where} refers to, but no file does. A method file goes on"
        " top of a base file, which names the data: `--config recipes/<name>/base.yaml --config <method>.yaml`."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error to what caused it: jsonargparse wraps what a constructor raises."""
    while error is not None:
        yield error
        error = error.__cause__
