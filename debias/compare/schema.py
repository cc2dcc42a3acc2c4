"""What the files of a run may hold. They may come from another machine or person, so they are checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from debias.errors import DebiasError

__all__ = ["check_record", "check_spec", "digest", "refuse_links"]

LARGEST = 2**63 - 1
CHECKPOINT = re.compile(r"checkpoints/[a-z_]+(-step\d{1,19})?\.ckpt")  # what runs write; nothing outside the folder
# Metrics of these very names are shares.
SHARES = ("accuracy", "auc", "auroc", "dice", "f1", "iou", "map", "precision", "recall", "specificity")
_SHARE = re.compile(rf"\w+/(?:[^/]+/)?(?:worst_(?:group|domain)_)?(?:{'|'.join(SHARES)})(?:_by_(?:group|domain)/.+)?")

Check = tuple[str, Callable[[Any], bool]]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _amount(value: Any) -> bool:
    return _number(value) and (0 <= value < math.inf or math.isnan(value))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _time(value: Any) -> bool:
    try:
        return value == "" or bool(datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def _metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _number(v) and (0 <= v <= 1 or math.isnan(v) or not _SHARE.fullmatch(key)) for key, v in value.items()
    )


def _git(value: Any) -> bool:
    kinds = {"revision": str, "changed": bool}
    return isinstance(value, dict) and all(isinstance(v, kinds.get(key, object)) for key, v in value.items())


WHAT: dict[str, Check] = {
    "id": ("a name of a folder", _name),
    "recipe": ("text", _text),
    "recipe_hash": ("text", _text),
    "method": ("a name", _name),
    "seed": ("an integer >= 0", _count),
    "params": ("a mapping", _mapping),
    "held_out": ("an integer >= 0, or null", lambda v: v is None or _count(v)),
}
SPEC: dict[str, Check] = WHAT | {
    "configs": ("a list of configs", lambda v: isinstance(v, list) and all(map(_mapping, v)))
}
RECORD: dict[str, Check] = WHAT | {
    "status": ("`finished` or `failed`", lambda v: v in ("finished", "failed")),
    "config_hash": ("text", _text),
    "direction": ("`max` or `min`", lambda v: v in ("max", "min")),
    "candidates": ("a mapping", _mapping),
    "error": ("text", _text),
    "warnings": ("a list of texts", lambda v: isinstance(v, list) and all(map(_text, v))),
    "steps": ("an integer >= 0", _count),
    "seconds_per_step": ("a number >= 0, or NaN", _amount),
    "seconds": ("a number >= 0, or NaN", _amount),
    "peak_memory": ("an integer >= 0", _count),
    "device": ("text", _text),
    "versions": ("texts by name", _texts),
    "git": ("a revision, and whether it was changed", _git),
    "started": ("a time as ISO 8601, or empty", _time),
}
METRICS = "numbers by name, shares from 0 to 1"
CANDIDATE: dict[str, Check] = {
    "epoch": ("an integer >= 0", _count),
    "step": ("an integer >= 0", _count),
    "val": (METRICS, _metrics),
    "test": (METRICS, _metrics),
    "checkpoint": ("a file in `checkpoints/`, or empty", lambda v: v == "" or (_text(v) and is_checkpoint(v))),
}


def is_checkpoint(name: str) -> bool:
    """Whether it is the name of a checkpoint as runs write them, relative to the run's folder."""
    return CHECKPOINT.fullmatch(name) is not None


def check_record(content: Any) -> None:
    """Check the fields of a ``result.json``.

    Raises:
        ValueError: names the first that is missing, too many, or of another kind.
    """
    _check(content, RECORD, "", needed=("id", "recipe", "recipe_hash", "method", "seed", "status", "candidates"))
    for name, candidate in content["candidates"].items():
        _check(candidate, CANDIDATE, f"candidates.{name}.", needed=("epoch", "step", "val", "test"))
    if content["status"] == "finished" and "last" not in content["candidates"]:
        raise ValueError("`candidates.last` is missing")


def check_spec(content: Any) -> None:
    """Check the fields of a ``spec.json``.

    Raises:
        ValueError: names the first that is missing, too many, or of another kind.
    """
    _check(content, SPEC, "", needed=SPEC)


def digest(content: Any) -> str:
    """A checksum of what JSON can hold, the same for any order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def refuse_links(out: Path) -> None:
    """Refuse a folder that leads out of itself: what is written to it would end somewhere else.

    W&B's folders, which hold links of its own, are not looked into.

    Raises:
        DebiasError: a link below ``out`` leads out of it.
    """
    root = os.path.realpath(out)
    for place, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
                raise DebiasError(
                    f"Expected everything in {out} to lie there, but {path} leads to {os.path.realpath(path)}. Nothing"
                    " was changed. Put what it leads to in its place, or name another folder with `--out`."
                )
        folders[:] = [name for name in folders if name != "wandb"]


def _check(content: Any, checks: Mapping[str, Check], place: str, needed: Iterable[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"`{place.rstrip('.') or 'the whole'}` is not a mapping")
    _first(f"`{place}{key}` is missing" for key in needed if key not in content)
    _first(f"`{place}{key}` is not known" for key in content if key not in checks)
    for key, value in content.items():
        rule, holds = checks[key]
        if not holds(value):
            given = repr(value)
            given = given if len(given) <= 100 else f"{given[:100]} ..."
            raise ValueError(f"`{place}{key}` is to be {rule}, but is {given}")


def _first(problems: Iterable[str]) -> None:
    for problem in problems:
        raise ValueError(problem)
