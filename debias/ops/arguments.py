"""Checks of arguments, one for each kind, for functions, modules and callbacks alike.

Checks of numbers return Python's own, which YAML, logs and checkpoints can hold. :func:`checked` reads the annotations
of a whole call, so that no argument of a wrong kind is taken for another one.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from debias.errors import BadRowsError, DebiasError
from debias.ops.annotations import (
    LARGEST,
    hints_of,
    in_words,
    is_class_of,
    is_finite,
    is_integer,
    is_kind,
    is_number,
)

__all__ = [
    "MOST",
    "check_choice",
    "check_count",
    "check_ids",
    "check_instance",
    "check_number",
    "check_options",
    "checked",
    "on_host",
    "shown",
]

F = TypeVar("F", bound=Callable[..., Any])
MOST = 1_000_000  # groups, classes, labels, thresholds: what has a number each, and a name


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
    if is_number(value):
        number = int(value) if isinstance(value, Integral) else float(value)
        above = number >= low if within[0] == "[" else number > low
        below = number <= high if within[-1] == "]" else number < high
        if above and below and is_finite(number):
            return number
    rule = f"a number {'>=' if within[0] == '[' else '>'} {low:g}" if high == math.inf else f"a number in {within}"
    raise DebiasError(f"Expected `{name}` to be {rule}, but got {shown(value)}.")


def check_count(name: str, value: Any, lowest: int = 1, highest: int = LARGEST, *, what: str = "an integer") -> int:
    """The value of an argument that is an integer of at least ``lowest``; NumPy's count, truth values do not.

    Args:
        name: of the argument.
        value: what was given.
        lowest: the smallest that is allowed.
        highest: the largest; :data:`MOST` for what memory is taken for.
        what: what it counts, for the message.

    Raises:
        DebiasError: it is not.
    """
    if is_integer(value) and lowest <= value <= highest:
        return int(value)
    upper = "" if highest == LARGEST else f" and <= {highest}"
    raise DebiasError(f"Expected `{name}` to be {what} >= {lowest}{upper}, but got {shown(value)}.")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """The value of an argument that is one of a few words.

    Raises:
        DebiasError: it is none of them; the message lists them.
    """
    choices = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise DebiasError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, but got {shown(value)}.")
    return value


def check_ids(name: str, ids: Tensor) -> int:
    """The number of ids, one more than the largest; waits for the device.

    Raises:
        BadRowsError: there is none, or one is negative or larger than :data:`MOST`.
    """
    low, high = (int(end) for end in ids.aminmax()) if ids.numel() else (-1, -1)
    if low < 0 or high >= MOST:
        got = f"ids from {low} to {high}" if ids.numel() else "none"
        raise BadRowsError(
            f"Expected `{name}` to hold ids from 0 to {MOST - 1}, but got {got}. Leave unlabelled samples out, and"
            " number the others from 0."
        )
    return high + 1


def check_instance(name: str, value: Any, kind: type) -> Any:
    """The value of an argument that is an object of a class.

    Raises:
        DebiasError: it is another one, or the class itself.
    """
    if not isinstance(value, kind):
        remedy = f" Pass an instance, `{value.__name__}(...)`." if isinstance(value, type) else ""
        raise DebiasError(f"Expected `{name}` to be a {kind.__name__}, but got {shown(value)}.{remedy}")
    return value


def check_options(name: str, options: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Options that a :func:`checked` function is to get later, looked at now.

    Args:
        name: of the argument that holds them.
        options: by name.
        function: takes them as keywords.

    Raises:
        DebiasError: the function has no such option, or refuses its value.
    """
    known = [key for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := [key for key in options if key not in known]:
        raise DebiasError(
            f"Expected `{name}` to hold options of `{function.__name__}`, {', '.join(map(repr, known))}, but got"
            f" {shown(unknown[0])}. Correct its name, or remove it."
        )
    function.check(options)  # type: ignore[attr-defined]
    return dict(options)


def shown(value: Any) -> str:
    """A value in a message: whole if it is short; of a tensor its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {str(value.dtype).removeprefix('torch.')}"
    try:
        text = repr(value)
    except Exception:  # of any kind; of a foreign object, and an integer may have too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def on_host(x: Any) -> bool:
    """Whether looking at the values of a tensor, or of what a module holds, waits for nothing."""
    return bool(x.device.type == "cpu")


def checked(shapes: str = "", *, first: bool = False, **within: str) -> Callable[[F], F]:
    """Refuse calls whose arguments are not of the annotated kind, or whose tensors do not fit together.

    An argument that is annotated as a number has to be finite, as an integer within 64 bits, as a ``Literal`` one of
    the choices; truth values are no numbers. Numbers ``n_...`` are counts from 1 to :data:`MOST`. What the function
    itself refuses it refuses first, as it says it better. Values of tensors are looked at on CPUs alone, as it would
    stop another device.

    Args:
        shapes: of tensor arguments: ``"losses: float N, domains: int N | bool N n_domains, x: float N C ..."``. Letters
            that come twice are the same number; names of integer arguments, and numbers, are what they say. Ids are
            below a number with ``"domains: int N < n_domains"``; negative ones are unlabelled.
        first: look at kinds and intervals before the call: of a function that takes long, or changes something.
        **within: intervals of numbers by name, ``alpha="(0, 1]"``, or of each number of a sequence; None, and what is
            no number, is left to the annotation.

    Example:
        >>> import torch
        >>> from debias.ops.arguments import checked
        >>> @checked("x: float N, y: int N")
        ... def double(x: torch.Tensor, y: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        ...     return factor * x
        >>> double(torch.ones(2), torch.ones(3))
        Traceback (most recent call last):
        debias.errors.DebiasError: Expected `y` to be int of shape (N,), but got a tensor of shape (3,) and float32, ...
    """

    def decorate(function: F) -> F:
        names, wanted = list(inspect.signature(function).parameters), _parse(shapes)
        within.update({name: f"[1, {MOST}]" for name in names if name.startswith("n_") and name not in within})
        ends = {name: float(interval[1:-1].split(",")[1]) for name, interval in within.items()}
        passed: set[Any] = set()
        limits = {name: int(end) for name, end in ends.items() if end < math.inf}

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **options)
            given = dict(zip(names, args, strict=False)) | options
            alike = _alike(given)
            known = alike in passed  # steps call with the same shapes again and again
            if known:
                _check_ids(wanted, given)
            else:
                for name, highest in limits.items():
                    if is_integer(given.get(name)) and given[name] > highest:  # before memory or time is taken for it
                        check_count(name, given[name], 0, highest)
                if first:
                    _check(function, {}, within, given)
                for name in wanted:
                    if not isinstance(given.get(name), Tensor | None):
                        _check(function, {}, {}, {name: given[name]})
            try:
                result = function(*args, **options)
            except DebiasError:
                raise
            except Exception as error:
                _check(function, wanted, within, given)
                # Whether a function has a use for negative ids is its own matter; here it had none.
                _check_ids(wanted, given, negative=not isinstance(error, IndexError))
                raise
            if not known:
                _check(function, wanted, within, given)
                _check_ids(wanted, given)
                if alike is not None and len(passed) < 100:
                    passed.add(alike)
            return result

        call.check = functools.partial(_check, function, {}, within)  # type: ignore[attr-defined]
        call.within = within  # type: ignore[attr-defined]
        return typing.cast(F, call)

    return decorate


def _alike(given: Mapping[str, Any]) -> Any:
    """What the checks look at, or None where that is more than plain values and tensors."""
    parts: list[Any] = []
    for name, value in given.items():
        if isinstance(value, Tensor):
            parts.append((name, value.shape, value.dtype))
        elif type(value) in (int, float, bool, str, type(None)):
            parts.append((name, type(value), value))
        else:
            return None
    return tuple(parts)


def _check(function: Any, wanted: Mapping[str, Any], within: Mapping[str, str], given: Mapping[str, Any]) -> None:
    hints = hints_of(function)
    for name, value in given.items():
        if name in hints and not is_kind(value, hints[name]):
            remedy = f" Pass an instance, `{value.__name__}(...)`." if is_class_of(value, hints[name]) else ""
            raise DebiasError(f"Expected `{name}` to be {in_words(hints[name])}, but got {shown(value)}.{remedy}")
    for name, interval in within.items():
        value = given.get(name)
        if isinstance(value, Sequence) and not value:
            raise DebiasError(f"Expected `{name}` to hold at least one number, but got {shown(value)}.")
        for number in value if isinstance(value, Sequence) else [value]:
            if is_number(number):
                check_number(name, number, interval)
    known: dict[str, tuple[int, str]] = {
        name: (int(value), f"`{name}`") for name, value in given.items() if is_integer(value)
    }
    for name, alternatives in wanted.items():
        if isinstance(value := given.get(name), Tensor):
            _check_shape(name, value, alternatives, known)


# Shapes and ids


def _check_ids(wanted: Mapping[str, Any], given: Mapping[str, Any], *, negative: bool = True) -> None:
    for name, alternatives in wanted.items():
        for kind, dims, limit in alternatives:
            ids = given.get(name)
            if not limit or not isinstance(ids, Tensor) or not on_host(ids) or not _has_kind(ids, kind):
                continue
            size = _size(limit, wanted, given)
            if size is None or ids.ndim != len(dims) or not ids.numel():
                continue
            try:
                largest = int(ids.max())
            except RuntimeError:  # a stand-in without values, of vmap or a tracer
                continue
            if largest >= size:
                raise BadRowsError(
                    f"Expected `{name}` to hold ids below {limit} = {size}, but got {largest} at position"
                    f" {int(ids.argmax())}. Number them from 0; negative ones are unlabelled."
                )
            if not negative and (smallest := int(ids.min())) < 0:
                raise BadRowsError(
                    f"Expected `{name}` to hold ids from 0 to {size - 1}, but got {smallest} at position"
                    f" {int(ids.argmin())}. Leave unlabelled samples out."
                )


def _size(limit: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """What a letter stands for, or an argument."""
    if is_integer(given.get(limit)):
        return int(given[limit])
    for name, alternatives in wanted.items():
        for kind, dims, _ in alternatives:
            value = given.get(name)
            if limit in dims and isinstance(value, Tensor) and _has_kind(value, kind) and value.ndim == len(dims):
                return int(value.shape[dims.index(limit)])
    return None


@functools.cache
def _parse(shapes: str) -> dict[str, list[tuple[str, list[str], str]]]:
    """By argument the alternatives: kind, dimensions, and what ids are below, or nothing."""
    found = {}
    for entry in filter(None, map(str.strip, shapes.split(","))):
        name, _, alternatives = entry.partition(":")
        parts = [alternative.partition("<") for alternative in alternatives.split("|")]
        kinds = [(shape.split(), limit.strip()) for shape, _, limit in parts]
        found[name] = [(kind, dims, limit) for (kind, *dims), limit in kinds]
    return found


def _check_shape(
    name: str, tensor: Tensor, alternatives: list[tuple[str, list[str], str]], known: dict[str, tuple[int, str]]
) -> None:
    for kind, dims, _ in alternatives:
        sizes = _fit(tensor, dims, known) if _has_kind(tensor, kind) else None
        if sizes is not None:
            known |= {dim: (size, f"`{name}`") for dim, size in sizes.items() if dim not in known}
            return
    rule = " or ".join(f"{kind} of shape ({', '.join(dims)}{',' * (len(dims) == 1)})" for kind, dims, _ in alternatives)
    used = dict.fromkeys(dim for _, dims, _ in alternatives for dim in dims if dim in known)
    where = "".join(f", with {dim} = {known[dim][0]} from {known[dim][1]}" for dim in used)
    raise DebiasError(f"Expected `{name}` to be {rule}, but got {shown(tensor)}{where}.")


def _has_kind(tensor: Tensor, kind: str) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return {"float": tensor.is_floating_point(), "int": whole, "bool": tensor.dtype == torch.bool, "any": True}[kind]


def _fit(tensor: Tensor, dims: list[str], known: Mapping[str, tuple[int, str]]) -> dict[str, int] | None:
    """The size of each letter, or None where the shape is another one."""
    shape = list(tensor.shape)
    if dims[-1:] == ["..."]:
        dims, shape = dims[:-1], shape[: len(dims) - 1]
    if len(shape) != len(dims):
        return None
    sizes: dict[str, int] = {}
    for dim, size in zip(dims, shape, strict=True):
        expected = int(dim) if dim.isdigit() else sizes.get(dim, known[dim][0] if dim in known else size)
        if size != expected:
            return None
        sizes[dim] = size
    return sizes
