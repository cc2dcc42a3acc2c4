"""Arguments that are stated once: the fields of a class are the arguments of its constructor.

A method's module, callback and mixin take the same arguments. They inherit them from one class of fields, with their
types, defaults and docs. :func:`arguments` makes the constructor, much as :func:`dataclasses.dataclass` does, so that
type checkers, editors, ``help``, :func:`inspect.signature` and LightningCLI see every argument.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from inspect import Parameter, Signature, cleandoc
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from debias.errors import DebiasError, UnknownArgumentError
from debias.ops.annotations import LARGEST, is_number
from debias.ops.arguments import check_count, check_number, checked, shown

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform

__all__ = ["arguments", "field_values"]

T = TypeVar("T")

_ARGS = re.compile(r"^Args:\n((?: +.*\n|\n(?= ))*)", re.M)
_ENTRY = re.compile(r"^    (\w+): ?((?:.*\n)(?:     +.*\n)*)", re.M)
_INHERITED = [re.compile(rf"^{name}:\n(?: +.*\n)+", re.M) for name in ("Logs", "Shape", "Raises")]
_SECTION = re.compile(r"^(?:Logs|Shape|Returns|Raises|Example):$", re.M)


@overload
def arguments(cls: type[T], /) -> type[T]: ...


@overload
def arguments(
    *, kw_only: bool = True, of: Callable[..., Any] | None = None, **within: str
) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def arguments(
    cls: type | None = None, /, *, kw_only: bool = True, of: Callable[..., Any] | None = None, **within: str
) -> Any:
    """Make ``__init__`` of a class from its annotations and those of its decorated bases.

    The constructor refuses values that a ``Literal`` does not hold and numbers outside of their intervals, sets every
    field and calls ``__post_init__``, which checks the others and makes the rest. A class with an ``__init__`` of its
    own keeps it. Arguments that the docstring leaves out of its ``Args:`` are described there as in the bases'
    docstrings, whose ``Logs:``, ``Shape:`` and ``Raises:`` stand for those that it lacks; ``<key>`` in them is the
    class's own ``key``.

    Args:
        cls: the class.
        kw_only: whether its own fields are keyword-only; if not, those behind ``_: KW_ONLY`` are.
        of: a :func:`debias.ops.arguments.checked` function that takes some of its own fields, too: their descriptions
            and intervals are those of the function.
        **within: intervals of numbers by name, ``alpha="(0, 1]"``, as :func:`debias.ops.arguments.checked` takes them;
            classes that inherit the field inherit its interval. A None that is allowed is left alone.

    Example:
        >>> @arguments(rate="[0, inf)")
        ... class Options:
        ...     '''Options.
        ...
        ...     Args:
        ...         rate: how fast.
        ...     '''
        ...     rate: float = 0.1
        >>> @arguments
        ... class Runner(Options):
        ...     '''Runs.'''
        >>> Runner(rate=0.5).rate
        0.5
        >>> print(Runner.__doc__)
        Runs.
        <BLANKLINE>
        Args:
            rate: how fast.
    """

    def decorate(cls: type) -> type:
        made: Any = dataclass(init=False, repr=False, eq=False, match_args=False, kw_only=kw_only)(cls)
        own = vars(cls).get("__annotations__", ())
        made._of, made._within = of, {k: v for k, v in getattr(of, "within", {}).items() if k in own} | within
        if "__init__" not in vars(made):
            made.__init__ = _constructor(made)
            made.__doc__ = _documented(made)
        return made

    return decorate if cls is None else decorate(cls)


def field_values(instance: Any, of: type) -> dict[str, Any]:
    """The arguments of an instance that ``of`` takes as well, because both inherit them from the same class."""
    names = {
        field.name
        for base in type(instance).__mro__
        if is_dataclass(base) and issubclass(of, base)
        for field in fields(base)
    }
    return {name: getattr(instance, name) for name in _order(of) if name in names}


def _order(cls: type) -> list[str]:
    """Names of the fields: positional ones as the bases state them, then the keyword-only ones, a class's own first."""
    stated = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    keywords = (name for base in cls.__mro__ for name in vars(base).get("__annotations__", ()))
    positional = [name for name, field in stated.items() if not field.kw_only]
    return list(dict.fromkeys([*positional, *(name for name in keywords if name in stated)]))


def _constructor(cls: type) -> Callable[..., None]:
    types = get_type_hints(cls)  # of each base in its own module, where its names are known
    stated = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
    for name in _order(cls):
        default = Parameter.empty if stated[name].default is MISSING else stated[name].default
        kind = Parameter.KEYWORD_ONLY if stated[name].kw_only else Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(Parameter(name, kind, default=default, annotation=types[name]))
    takes = Signature(parameters, return_annotation=None)
    choices = {name: get_args(types[name]) for name in stated if get_origin(types[name]) is Literal}
    checks = {name: _check_of(name, types[name], interval) for name, interval in _intervals(cls).items()}

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in takes.parameters]:
            near = get_close_matches(unknown[0], list(takes.parameters), 1)
            raise UnknownArgumentError(
                f"Expected arguments of {type(self).__name__} ({', '.join(list(takes.parameters)[1:])}), but got"
                f" `{unknown[0]}`. {f'Did you mean `{near[0]}`?' if near else 'Remove it.'}"
            )
        try:
            bound = takes.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}() {error}") from None
        bound.apply_defaults()
        for name, allowed in choices.items():
            if bound.arguments[name] not in allowed:
                *others, last = map(repr, allowed)
                raise DebiasError(
                    f"Expected `{name}` to be {', '.join(others)} or {last}, but got {bound.arguments[name]!r}."
                )
        for name, check in checks.items():
            bound.arguments[name] = check(bound.arguments[name])
        # Past nn.Module.__setattr__: a network among the arguments is no part of the module, nor is there one yet.
        vars(self).update(list(bound.arguments.items())[1:])
        if finish := getattr(self, "__post_init__", None):
            finish()

    construct.__signature__ = takes  # type: ignore[attr-defined]
    construct.__name__, construct.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
    construct.__module__ = cls.__module__
    construct.__annotations__ = {name: hint for name, hint in types.items() if name in takes.parameters}
    return checked()(construct)


def _intervals(cls: type) -> dict[str, str]:
    """Intervals of the numbers among the arguments, of the bases too."""
    stated = {name: x for base in reversed(cls.__mro__) for name, x in vars(base).get("_within", {}).items()}
    return {name: stated[name] for name in _order(cls) if name in stated}


def _check_of(name: str, hint: Any, interval: str) -> Callable[[Any], Any]:
    """The check of one argument: of a number, an integer, or each number of a sequence."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    sequence = any(get_origin(kind) for kind in kinds)
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def check(value: Any) -> Any:
        if value is None and NoneType in kinds:
            return None
        if sequence and not is_number(value):  # of another kind it is left to the annotation
            if not isinstance(value, Sequence) or isinstance(value, str):
                return value
            if not value:
                raise DebiasError(f"Expected `{name}` to hold at least one number, but got {shown(value)}.")
            return [check_number(name, number, interval) for number in value]
        if int in kinds and float not in kinds:
            return check_count(name, value, int(low), int(min(high, LARGEST)))
        return check_number(name, value, interval)

    return check


def _documented(cls: type) -> str | None:
    """The docstring with all arguments in ``Args:``, each as the nearest class that has it describes it."""
    if not vars(cls).get("__doc__"):  # python -OO
        return None
    text = cleandoc(vars(cls)["__doc__"]) + "\n"
    for section in _INHERITED:
        inherited = (section.search(cleandoc(vars(base).get("__doc__") or "") + "\n") for base in cls.__mro__)
        found = next(filter(None, inherited), None)
        if found and not section.search(text):
            example = text.find("\nExample:\n")
            head, tail = (text, "") if example < 0 else (text[:example], text[example:])
            said = found[0].rstrip().replace("<key>", getattr(cls, "key", "<key>"))
            text = f"{head.rstrip()}\n\n{said}\n{tail}"
    described = _described(cls)
    known = "".join(f"    {name}: {described[name]}" for name in _order(cls) if name in described)
    if not known:
        return text
    made = f"Args:\n{known}"
    if found := _ARGS.search(text):
        return text[: found.start()] + made + text[found.end() :]
    if found := _SECTION.search(text):
        return f"{text[: found.start()]}{made}\n{text[found.start() :]}"
    return f"{text}\n{made}"


def _described(cls: type) -> dict[str, str]:
    """What is said of each argument: by the nearest class that has it, or the function that this one goes by."""
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        of = vars(base).get("_of")
        own = vars(base).get("__annotations__", ())
        described |= {name: said for name, said in _entries(of).items() if name in own} | _entries(base)
    return described


def _entries(documented: Any) -> dict[str, str]:
    """The entries of ``Args:`` in a docstring, by argument."""
    text = cleandoc(documented.__doc__ or "") + "\n"
    return dict(_ENTRY.findall("".join(_ARGS.findall(text))))
