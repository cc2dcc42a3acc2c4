"""What a step may divide its losses by: sums and means of constant weights, or of a mask, however it does that.

``losses.sum() / mask.sum()``, ``losses.sum() / mask.sum().item()``, ``losses * (1 / w.sum())`` and ``w = w / w.sum();
losses * w`` divide by the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debias.tap.calls import shares_memory
from debias.tap.moves import CASTS, CHANGING, DIVISION, ELEMENTWISE, INPLACE, MEAN, MOVES, PRODUCT, SUM, among, named

__all__ = ["READING", "Total", "Totals"]

_T = torch.Tensor
READING = frozenset({_T.item, _T.__float__, _T.__int__})
_reads = among(READING)
_counts = among(SUM | MEAN | named("count_nonzero"))
_keeps = among(CASTS | ELEMENTWISE | INPLACE)
_is_inverse = among(named("reciprocal reciprocal_ __rdiv__ __rtruediv__"))
_is_power = among(named("pow __pow__"))
_changes, _divides, _multiplies, _moves = map(among, (CHANGING, DIVISION, PRODUCT, MOVES | CASTS))


@dataclass(eq=False)
class Total:
    """A sum or mean of constant weights.

    Attributes:
        value: the number, as a tensor or Python's own; or what something was divided by it to make.
        source: the weights.
        is_mean: whether it is their mean.
        divided: whether ``value`` is something that was divided by it.
    """

    value: Any
    source: Tensor
    is_mean: bool
    divided: bool = False

    def is_value(self, x: Any) -> bool:
        """Whether it is this tensor, or a number that was read of it; a guard may have been added to that."""
        if isinstance(x, Tensor) or isinstance(self.value, Tensor):
            return x is self.value
        return isinstance(x, int | float) and abs(x - self.value) <= 1e-4 * abs(self.value)


class Totals:
    """The totals of one step.

    Args:
        holds: tells whether one of some values is a number of the whole batch.
        careful: values may be read beyond the CPU, too, as in the first step of an epoch.
    """

    def __init__(self, holds: Callable[..., bool], *, careful: bool) -> None:
        self._holds, self._careful = holds, careful
        self._found: list[Total] = []

    def close(self) -> None:
        """Let go of every tensor."""
        self._found = []

    def of(self, x: Any, *, divided: bool = False) -> Total | None:
        """The total that a tensor or number is, or that it was divided by."""
        return next((t for t in reversed(self._found) if t.divided == divided and t.is_value(x)), None)

    def divides(self, func: Any, args: tuple[Any, ...], what: Any) -> Any:
        """What an operation divides one of its arguments by: a total, a number, or None for nothing of that kind."""
        if len(args) < 2:
            return None
        if _divides(func) and args[0] is what:
            by = args[1]
            is_number = isinstance(by, int | float) or (isinstance(by, Tensor) and not (by.ndim or by.requires_grad))
            return self.of(by) or (by if is_number and not self._holds(by) else None)
        if _multiplies(func):
            return self.of(args[1] if args[0] is what else args[0], divided=True)
        return None

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Note what an operation has made of constants."""
        if _changes(func) and self._found:
            self._changed(func, args)
        if isinstance(out, Tensor) and not out.requires_grad and _counts(func) and not out.ndim:
            source = args[0] != 0 if func.__name__ == "count_nonzero" else args[0]
            self._found.append(Total(out, source, func in MEAN))
        elif self._found and args and out is not args[0] and (made := self._made(func, args, out)) is not None:
            self._found.append(made)

    def _made(self, func: Any, args: tuple[Any, ...], out: Any) -> Total | None:
        first, *others = args
        total = self.of(first) if isinstance(first, Tensor) else None
        if total is not None and _reads(func):
            return replace(total, value=out)
        if not isinstance(out, Tensor) or out.requires_grad:
            return None
        if total is not None and not any(isinstance(x, Tensor) for x in others):
            if _is_inverse(func) or (_is_power(func) and others == [-1]):
                return replace(total, value=out, divided=True)
            return replace(total, value=out) if _keeps(func) and self._is_same(func, first, out) else None
        for what in args[:2]:
            by = self.divides(func, args, what)
            if isinstance(by, Total) and not self._holds(what):
                return replace(by, value=out, divided=True)
        divided = self.of(first, divided=True) if _moves(func) or _divides(func) or _multiplies(func) else None
        return None if divided is None or self._holds(others) else replace(divided, value=out)

    def _changed(self, func: Any, args: tuple[Any, ...]) -> None:
        """Forget what is changed in place, unless it becomes a multiple of itself, or a guard leaves it as it is."""
        changed, *others = args
        by = self.divides(func, args, changed)
        is_product = _divides(func) or _multiplies(func)
        scales = is_product and not (isinstance(others[0], Tensor) and others[0].ndim)
        scales = scales and (changed.ndim > 0 if isinstance(by, Total) else not self._holds(others))
        kept = []
        for total in self._found:
            if scales or not (shares_memory(total.source, changed) or shares_memory(total.value, changed)):
                kept.append(total)
            elif changed is total.value and not total.divided and _keeps(func) and not is_product:
                before = total.source.float().mean() if total.is_mean else total.source.sum()
                kept += [total] if self._is_same(func, before, changed) else []
        self._found = kept
        if scales and isinstance(by, Total):  # `w /= w.sum()`
            self._found.append(replace(by, value=changed, divided=True))

    def _is_same(self, func: Any, before: Tensor, after: Tensor) -> bool:
        """Whether a total is still proportional to what it was: a guard against 0 has changed nothing."""
        if func in CASTS or _multiplies(func) or _divides(func) or not (before.device.type == "cpu" or self._careful):
            return True
        if after.dtype == torch.bool:
            return False
        return bool((before == 0) | ((after - before).abs() <= 1e-4 * before.abs()))
