"""Annotations of arguments: whether a value is of the annotated kind, and that kind in words."""

from __future__ import annotations

import functools
import math
import sys
import types
import typing
from collections import abc
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = ["LARGEST", "hints_of", "in_words", "is_class_of", "is_finite", "is_integer", "is_kind", "is_number"]

LARGEST = 2**63 - 1  # of an integer


@functools.cache
def hints_of(function: Any) -> dict[str, Any]:
    """The annotations of a function's arguments, by name."""
    hints = typing.get_type_hints(function, vars(sys.modules[function.__module__]))
    return {name: hint for name, hint in hints.items() if name != "return"}


def is_number(value: Any) -> bool:
    """Whether it is a number, NumPy's too; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a float can hold it."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_integer(value: Any) -> bool:
    """Whether it is an integer, NumPy's too; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _parts(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for option in typing.get_args(hint) for part in _parts(option)]
    return [hint]


def is_kind(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated kind; of sequences the parts count, too."""
    return any(_is_one(value, part) for part in _parts(hint))


def _is_one(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Any:  # a class, from Python 3.11 on
        return True
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is float:
        return is_number(value) and is_finite(value)
    if origin is int:
        return is_integer(value) and abs(value) <= LARGEST
    if origin is bool:
        return type(value).__name__ in ("bool", "bool_")  # Python's and NumPy's
    if origin is abc.Callable:
        return callable(value)
    if not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return origin is not None or value is None  # Any, type variables
    if origin is abc.Iterable and typing.Any in inner:
        return isinstance(value, Iterable)
    if origin in (list, tuple, abc.Sequence, abc.Iterable):
        if not isinstance(value, Sequence):  # arrays and tensors are sequences of numbers, too
            numbers = {float, int} & {part for of in inner for part in _parts(of)}
            return bool(numbers or not inner) and len(getattr(value, "shape", ())) == 1
        if isinstance(value, str):
            return False
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(is_kind, value, inner))
        return not inner or len(value) > 1000 or all(is_kind(part, inner[0]) for part in value)
    return isinstance(value, origin)


def is_class_of(value: Any, hint: Any) -> bool:
    """Whether it is a class where an instance of it is asked for."""
    kinds = [part for part in _parts(hint) if isinstance(part, type)]
    return isinstance(value, type) and any(issubclass(value, kind) for kind in kinds)


def in_words(hint: Any) -> str:
    """An annotated kind, for a message."""
    known = {
        float: "a finite number",
        int: "an integer of 64 bits",
        bool: "True or False",
        str: "text",
        Tensor: "a tensor",
    }
    found = []
    for part in _parts(hint):
        origin, inner = typing.get_origin(part) or part, typing.get_args(part)
        if origin is typing.Literal:
            found += [repr(choice) for choice in inner]
        elif origin in (None, types.NoneType):
            found.append("None")
        elif origin is abc.Callable:
            found.append("a callable")
        elif origin is abc.Iterable and typing.Any in inner:
            found.append("an iterable")
        elif origin in (list, tuple, abc.Sequence, abc.Iterable):
            of = [in_words(part) for part in inner if part is not Ellipsis]
            found.append(f"a sequence of {' and '.join(dict.fromkeys(of))}" if of else "a sequence")
        else:
            found.append(known.get(origin) or f"a {getattr(origin, '__name__', str(origin))}")
    *others, last = dict.fromkeys(found)
    return f"{', '.join(others)} or {last}" if others else last
