"""What a method is told of each sample, as its runs were configured: groups, domains, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from debias.compare.records import read_spec
from debias.compare.table import Row
from debias.errors import DebiasError

__all__ = ["TOLD", "told"]

TOLD = ("groups", "domains", "nothing")
_KEYS = {"group", "domain", "identity", "attribute", "balance"}  # arguments that name ids
_INFERRED = "inferred"  # ids that the run makes itself


def told(row: Row) -> str | None:
    """What the method of a row is told, from ``spec.json`` of its first run that has one.

    Returns:
        One of :data:`TOLD`; identities count as groups. None where no run says how it was configured.
    """
    for run in row.runs:
        try:
            configs = read_spec(run.record.folder)["configs"] if run.record.folder else None
            kinds = set(_kinds(configs[-1])) if configs else None  # those before it hold the monitors
        except (DebiasError, RecursionError):
            continue
        if kinds is not None:
            return next(kind for kind in TOLD if kind in kinds or kind == "nothing")
    return None


def _kinds(content: Any) -> Iterator[str]:
    """What the ids are that a configuration names, anywhere in it; a domain may be a group by its name."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in _KEYS and isinstance(value, str):
                if value != _INFERRED:
                    yield "domains" if key == "domain" and value != "group" else "groups"
            else:
                yield from _kinds(value)
    elif isinstance(content, list):
        for value in content:
            yield from _kinds(value)
