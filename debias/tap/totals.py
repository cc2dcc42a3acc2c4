"""What a step may divide its losses by: sums and means of weights, or of a mask, however it does that.

A step divides by the same thing in ``losses.sum() / mask.sum()``, in ``losses.sum() / mask.sum().item()``, in
``losses.sum() * (1 / mask.sum())`` and in ``(losses * (mask / mask.sum())).sum()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debias.ops import arguments
from debias.tap.moves import CASTS, DIVISION, MEAN, MOVES, PRODUCT, SUM, among, named
from debias.tap.notes import first_version, version

__all__ = ["READING", "Total", "Totals"]

_T = torch.Tensor
READING = frozenset({_T.item, _T.__float__, _T.__int__})
# Leave a sum as it is where they guard against 0.
_GUARDS = named(
    "add add_ __add__ __radd__ __iadd__ clamp clamp_ clamp_min clamp_min_ clip maximum max where nan_to_num nan_to_num_"
)
_reads, _guards, _casts, _moves = map(among, (READING, _GUARDS, CASTS, MOVES))
_divides, _multiplies = map(among, (DIVISION, PRODUCT))
_adds = among(named("add __add__ __radd__"))
_counts = among(SUM | MEAN | named("count_nonzero"))
_is_inverse, _is_power = among(named("reciprocal __rdiv__")), among(named("pow __pow__"))


@dataclass(eq=False)
class Total:
    """A sum or mean of weights.

    Attributes:
        source: the weights.
        version: of them.
        is_mean: whether it is their mean.
        of_batch: whether it is known to be a number of the whole batch, and no constant.
    """

    source: Tensor
    version: int
    is_mean: bool
    of_batch: bool

    @property
    def current(self) -> bool:
        """Whether the weights are still those that were summed up."""
        return torch.compiler.is_compiling() or self.version == version(self.source)

    def is_guarded(self, before: Any, after: Any) -> bool:
        """Whether a guard against 0 has left the total, or a multiple of it, as it was; from 0 it may make anything.

        It may add a ten-thousandth of one weight, since a group may have no more than one.
        """
        if before is after or bool((before == 0) | (before == after)):
            return True
        if isinstance(before, int | float) and abs(after - before) > 1e-4 * abs(before):  # no value of a tensor is read
            return False
        weights = 1 if self.is_mean else self.source.count_nonzero()
        return bool(abs(after - before) * weights <= 1.01e-4 * abs(before))


@dataclass(eq=False)
class _Made:
    """A tensor that is proportional to a total, or to the inverse of one, and its version then."""

    tensor: Tensor
    version: int
    total: Total
    inverse: bool

    @property
    def current(self) -> bool:
        """Whether it still is."""
        return self.total.current and (torch.compiler.is_compiling() or self.version == version(self.tensor))


class Totals:
    """The totals of one step.

    Args:
        holds: tells whether one of some values is a number of the whole batch.
        careful: values may be read beyond the CPU, too, as in the first step of an epoch.
    """

    def __init__(self, holds: Callable[..., bool], *, careful: bool) -> None:
        self._holds, self._careful = holds, careful
        self._made: list[_Made] = []
        self._read: list[tuple[float, Total]] = []

    @property
    def known(self) -> bool:
        """Whether there is one."""
        return bool(self._made)

    def divides(self, func: Any, args: tuple[Any, ...], what: Any) -> Any:
        """What an operation divides one of its arguments by: a total, or a number (perhaps in a tensor), or None."""
        if len(args) < 2:
            return None
        if _multiplies(func):
            return self._total_in(args[1] if args[0] is what else args[0], inverse=True)
        if not _divides(func) or args[0] is not what:
            return None
        by = args[1]
        if isinstance(by, int | float):
            return by
        if not isinstance(by, Tensor) or by.requires_grad or by.numel() != 1:
            return None
        return self._total_in(by) or (None if self._holds(by) else by)

    def read_as(self, number: float) -> list[Total]:
        """The sums from which a step has read this number, to guard it against 0 perhaps."""
        read = dict.fromkeys(total for x, total in self._read if total.current and total.is_guarded(x, number))
        return [total for total in read if not total.is_mean]

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Note what an operation has made of constants; of one in place, see :meth:`changed`."""
        if not args or not isinstance(args[0], Tensor):
            return
        if (func in SUM or func in MEAN) and (again := self._total_in(args[0])) is not None:  # `w.sum().sum()`
            self._note(out, again)
        elif _counts(func) and isinstance(out, Tensor) and out.numel() == 1 and not out.requires_grad:
            source = args[0] != 0 if func.__name__ == "count_nonzero" else args[0]
            if not self._holds(source):
                self._note(out, Total(source, first_version(source), func in MEAN, self._holds(out)))
        elif not self._made:
            return
        elif _reads(func):
            total = self._total_in(args[0])
            if total is not None and (func is not _T.__int__ or _whole(args[0])):
                self._read.append((out, total))
        elif isinstance(out, Tensor) and not out.requires_grad:
            self._derive(func, args, out)

    def changed(self, func: Any, args: tuple[Any, ...]) -> None:
        """Note that an operation has changed a constant in place: it is no total any more, unless it was multiplied, or
        a guard left it as it was. Comes before the operation may make a number of the whole batch of it.
        """
        changed, *others = args
        is_product = _multiplies(func) or _divides(func)
        if not self._made or not isinstance(changed, Tensor) or torch.compiler.is_compiling():
            return
        if is_product and any(isinstance(x, Tensor) and x.ndim for x in others):
            return
        made, before = list(self._made), version(changed) - 1
        if is_product:
            for total in {note.total for note in made}:
                if total.source is changed and total.version == before:
                    total.version += 1
        by = self.divides(func, args, changed)
        if isinstance(by, Total) and changed.ndim and not self._holds(changed):  # `w /= w.sum()`
            self._note(changed, by, inverse=True)
        elif is_product and self._holds(others):
            return
        for x in others if arguments.on_host(changed) else ():  # elsewhere it is not read whether that began at 0
            if (added := self._total_in(x)) is not None and self._leaves(func, x, changed, added):  # `n += w.sum()`
                self._note(changed, added)
        for note in made:
            if note.tensor is changed and note.version == before and (is_product or self._leaves_in_place(func, note)):
                note.version += 1

    def _derive(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        """Note what was made of a total, or of its inverse."""
        for what in args[:2]:
            by = self.divides(func, args, what)
            if isinstance(by, Total) and not self._holds(what):
                is_length = isinstance(what, int) and what == by.source.numel()  # `len(w) / w.sum()`
                self._note(out, replace(by, is_mean=True) if is_length else by, inverse=True)
                return
        first = args[0] if _divides(func) or _is_power(func) else next(filter(self._total_in, args[:3]), args[0])
        others = [x for x in args if x is not first]
        scales = (_multiplies(func) or _divides(func)) and not self._holds(others)
        if _adds(func) and not arguments.on_host(out) and any(isinstance(x, Tensor) for x in others):
            return  # to a state perhaps, of which nothing is read there
        if (total := self._total_in(first)) is not None:
            if _is_inverse(func) or (_is_power(func) and [x for x in others if not isinstance(x, Tensor)] == [-1]):
                self._note(out, total, inverse=True)
            elif out.numel() == 1 and (scales or self._leaves(func, first, out, total)):
                self._note(out, total)
        elif (total := self._total_in(first, inverse=True)) is not None and (scales or _moves(func) or _casts(func)):
            self._note(out, total, inverse=True)

    def _note(self, made: Tensor, total: Total, *, inverse: bool = False) -> None:
        self._made.append(_Made(made, first_version(made), total, inverse))

    def _total_in(self, x: Any, *, inverse: bool = False) -> Total | None:
        """The total that a tensor is proportional to, or to the inverse of."""
        note = next((note for note in reversed(self._made) if note.tensor is x and note.inverse is inverse), None)
        return note.total if note is not None and note.current else None

    def _leaves_in_place(self, func: Any, note: _Made) -> bool:
        weights = note.total.source.to(note.tensor.dtype)
        before = weights.mean() if note.total.is_mean else weights.sum()
        return self._leaves(func, before, note.tensor, note.total)

    def _leaves(self, func: Any, before: Tensor, after: Tensor, total: Total) -> bool:
        """Whether a cast, or a guard against 0, has left a total as it is."""
        reads = arguments.on_host(before) or self._careful
        if after.dtype == torch.bool or after.numel() != 1:
            return False
        if _casts(func):  # but to a whole number that it is not
            return not reads or bool((before == 0) | ((after - before).abs() <= 1e-4 * before.abs()))
        return _guards(func) and (not reads or total.is_guarded(before, after))


def _whole(x: Tensor) -> bool:
    """Whether it is a whole number, which reading it as one does not change."""
    return not x.is_floating_point() or bool(x == x.round())
