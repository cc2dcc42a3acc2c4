"""Checks of arguments that are numbers. They return Python's own, which YAML, logs and checkpoints can hold."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from debias.errors import DebiasError

__all__ = ["check_count", "check_number"]


def check_number(name: str, value: Any, within: str = "[0, inf)") -> float:
    """The value of an argument that is a finite number in an interval; NumPy's numbers count, truth values do not.

    Args:
        name: of the argument.
        value: what was given.
        within: the interval, such as ``"(0, 1]"``; a round bracket leaves the bound out.

    Raises:
        DebiasError: it is no number, or outside.
    """
    low, high = (float(bound) for bound in within[1:-1].split(","))
    if isinstance(value, Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
        above = number >= low if within[0] == "[" else number > low
        below = number <= high if within[-1] == "]" else number < high
        if above and below and abs(number) < math.inf:
            return number
    rule = f"a number {'>=' if within[0] == '[' else '>'} {low:g}" if high == math.inf else f"a number in {within}"
    raise DebiasError(f"Expected `{name}` to be {rule}, but got {value!r}.")


def check_count(name: str, value: Any, lowest: int = 1, *, what: str = "an integer") -> int:
    """The value of an argument that is an integer of at least ``lowest``; NumPy's count, truth values do not.

    Args:
        name: of the argument.
        value: what was given.
        lowest: the smallest that is allowed.
        what: what it counts, for the message.

    Raises:
        DebiasError: it is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < lowest:
        raise DebiasError(f"Expected `{name}` to be {what} >= {lowest}, but got {value!r}.")
    return int(value)
