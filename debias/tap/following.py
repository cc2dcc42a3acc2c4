"""Losses that a step reduces itself: from ``reduction="none"`` to the ``.mean()`` or ``.sum()`` that ends it.

What the step has made of the elements by then is what counts for each of them. What it divides by is the number of
elements for a mean. A sum has to be divided by what it runs over: a number of rows or elements, or the sum of a mask or
of weights with the shape of the losses. Then the loss of a group is what the step would return for that group alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debias.errors import SPLIT, RowsError
from debias.tap.calls import LossCall, LossRecord, shares_memory
from debias.tap.counted import replaces
from debias.tap.divisors import Divided, index_of
from debias.tap.mixing import Mixture
from debias.tap.moves import (
    CASTS,
    DIVISION,
    ELEMENTWISE,
    INPLACE,
    MEAN,
    MOVES,
    PRODUCT,
    SUM,
    among,
    apply_move,
    axes_of,
    keeps_rows,
    named,
    tensors_in,
    values_read,
)
from debias.tap.rows import RowTracker
from debias.tap.totals import READING, Total, Totals
from debias.tap.whole_batch import STATISTICS, WholeBatch, is_statistic

__all__ = ["FOLLOWED", "Following"]

_T = torch.Tensor
_ADD = named("add sub subtract add_ sub_ __add__ __radd__ __sub__ __iadd__ __isub__")
# Moves that leave elements out, or repeat them.
_SELECTING = named(
    "__getitem__ index_select narrow select masked_select take take_along_dim gather diagonal repeat tile"
    " repeat_interleave chunk split tensor_split unbind"
)
_DOT = named("dot vdot inner matmul __matmul__ __rmatmul__")
_is_dot = among(_DOT)
_FILLING = frozenset({_T.__setitem__, _T.copy_})
# The last four choose, along axes of the elements of a sample, or between two losses.
_REDUCING = SUM | MEAN | named("max min amax amin")
_KNOWN = MOVES | CASTS | ELEMENTWISE | INPLACE | _FILLING | READING | _DOT | _REDUCING
_is_known, _is_in_place = among(_KNOWN), among(INPLACE)
FOLLOWED = _KNOWN | STATISTICS


class Following:
    """Follows the unreduced losses of one step.

    Args:
        tracker: of the step; None where nobody reads ids.
        mixture: which labels the samples count with; None where augmentation has mixed none.
        record: records a loss that was reduced, and returns what the step is to receive.
        constants: buffers of the network.
        careful: look at every operation, as in the first step of an epoch.
    """

    def __init__(
        self,
        tracker: RowTracker | None,
        mixture: Mixture | None,
        record: Callable[[LossCall, Tensor], Tensor],
        constants: Iterable[Tensor],
        *,
        careful: bool,
    ) -> None:
        self._tracker, self._mixture, self._record = tracker, mixture, record
        self._unreduced: list[LossRecord] = []
        self._divisible: list[tuple[Tensor, list[LossCall]]] = []  # what is proportional to a loss, so far
        self.batch = WholeBatch(tracker, self.is_unreduced, self.is_proportional, constants, careful=careful)
        self._totals = Totals(self.batch.holds, careful=careful)

    def close(self) -> None:
        """Let go of every tensor."""
        for losses in self._unreduced:
            losses.function.forget()
        vars(self).clear()  # its parts refer to each other through it alone

    def add(self, losses: LossRecord) -> None:
        """Follow losses from now on."""
        self._unreduced.append(losses)

    def divide_later(self, out: Tensor, call: LossCall) -> None:
        """Look out for what the step divides a loss by that it received as ``out``."""
        self._divisible.append((out, [call]))

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Follow losses through one operation; returns what the step is to receive of it."""
        if not (self._unreduced or self._divisible or self._totals.known or self.batch.known or is_statistic(func)):
            return out  # as most operations of a network, before there is a loss
        if "other" in kwargs:
            args, kwargs = (*args, kwargs["other"]), {key: x for key, x in kwargs.items() if key != "other"}
        in_place = _is_in_place(func)
        if in_place:
            self._totals.changed(func, args)
        self.batch.see(func, args, kwargs, out)
        found = self._find(func, args) if self._unreduced and args else None
        if found is None:
            if not in_place:
                self._totals.see(func, args, out)
            for x in tensors_in(out) if self._divisible else ():
                self._proportional(func, args, kwargs, x)
        elif _is_dot(func):  # the sum of a product
            product = torch.mul(*args[:2])
            if self._tracker is not None:
                self._tracker.record(torch.mul, args[:2], {}, product)
            self.see(torch.mul, args[:2], {}, product)
            return self.see(torch.sum, (product,), {}, out)
        elif (axes := self._reduces(func, found, args, kwargs)) is None:
            self._followed(func, args, kwargs, found, out)
        elif func in SUM or func in MEAN:
            return self._reduced(func, found, axes, out)
        return out

    def is_unreduced(self, x: Tensor) -> bool:
        """Whether it holds losses that nobody has reduced yet."""
        return self._of(x) is not None

    def is_proportional(self, x: Any) -> bool:
        """Whether it is a loss, or what is proportional to some."""
        return any(x is y for y, _ in self._divisible)

    # -- elements ----------------------------------------------------------------------------------

    def _find(self, func: Any, args: tuple[Any, ...]) -> LossRecord | None:
        """The losses that an operation is done to, if it is one that is known."""
        if not _is_known(func) or (_is_dot(func) and not (len(args) > 1 and args[0].ndim == args[1].ndim == 1)):
            return None
        data = (*args[0], *args[1:3]) if isinstance(args[0], tuple | list) else args[:3]
        if func in _FILLING:  # what is assigned is of other places than those that it is assigned to
            data = args[:1]
        return next((losses for x in values_read(func, data, {}) if (losses := self._of(x)) is not None), None)

    def _of(self, x: Tensor) -> LossRecord | None:
        return next((losses for losses in reversed(self._unreduced) if losses.source is x), None)

    def _followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: LossRecord, out: Any) -> None:
        """Follow losses through an operation that does not end them."""
        by = self._totals.divides(func, args, found.source)
        factor = self._factor(func, args, kwargs, found)
        met = [losses for x in tensors_in(args) if (losses := self._of(x)) is not None]
        of_batch = any(losses.of_batch for losses in met)
        divided_by = self._divisors(func, args, found, met, by, linear=factor is not None)
        if divided_by is None:  # what they were divided by is a factor now
            divided_by = ()
            of_batch = of_batch or any(isinstance(x, Total) and x.of_batch for losses in met for x in losses.divided_by)
        if func is _T.__setitem__ or out is found.source:  # in place
            found.of_batch = of_batch or (by is None and self._is_scaled(args, kwargs, found))
            found.scale, found.divided_by = _times(found.scale, factor), divided_by
            for other in self._unreduced:
                if other is not found and shares_memory(other.source, found.source):  # other views of the elements
                    divided = isinstance(by, Total) and by.of_batch
                    other.of_batch, other.scale = other.of_batch or found.of_batch or divided, False
            for part in found.parts:
                func(*(part if x is found.source else x for x in args), **kwargs)
            return
        for place, x in enumerate(out) if isinstance(out, tuple | list) else [(None, out)]:
            if not isinstance(x, Tensor):
                continue
            if not x.requires_grad and found.source.requires_grad and func not in CASTS:
                if of_batch:  # that of a threshold for losses which were divided by a number of the whole batch
                    self.batch.add(x)
                continue  # a mask, such as that of the largest losses
            if func in MOVES and not x.ndim and found.source.numel() > 1:
                continue  # one of several, which Python may choose by their values
            enters = by is None and (self.batch.enters(func, args, kwargs, x) or self._is_scaled(args, kwargs, found))
            parts = [_with(func, args, kwargs, found.source, part, place) for part in found.parts]
            made = replace(found, source=x, parts=parts, of_batch=of_batch or enters, divided_by=divided_by)
            if func in MOVES:
                if not keeps_rows(func, args, x):  # joined with others, or in another order
                    made.scale = False
                elif isinstance(found.scale, Tensor):
                    made.scale = apply_move(func, args, kwargs, found.scale.expand(found.source.shape), place)
                if func in _SELECTING:
                    made.mask = args[1] if func is _T.__getitem__ and found.mask is None else False
            elif func not in CASTS:
                made.scale = _times(found.scale, factor)
            self._unreduced.append(made)

    def _is_scaled(self, args: tuple[Any, ...], kwargs: dict[str, Any], found: LossRecord) -> bool:
        """Whether a number of the whole batch, trained or not, meets the elements in an operation."""
        return self.batch.scales([x for x in tensors_in((args, kwargs)) if x is not found.source])

    def _factor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: LossRecord) -> Any:
        """What an operation multiplies elements by; None if it does something else to them."""
        first = args[0] is found.source
        if func in PRODUCT and _is_constant(other := args[1] if first else args[0]):
            return other
        if func in DIVISION and first and _is_constant(args[1]) and not _is_zero(args[1]):
            return 1 / args[1]
        if (replaced := replaces(func, args, kwargs, found.source)) is not None:
            return replaced[0] if _is_zero(replaced[1]) else None
        return 1.0 if func in SUM and not isinstance(found.scale, Tensor) else None

    def _divisors(
        self, func: Any, args: tuple[Any, ...], found: LossRecord, met: list[LossRecord], by: Any, *, linear: bool
    ) -> tuple[Any, ...] | None:
        """What elements are divided by after an operation; None where nobody knows any more."""
        before, new = [losses.divided_by for losses in met], () if by is None else (by,)
        if not (new or any(before)):
            return ()
        if func in PRODUCT:  # less what is multiplied back, as in `losses / n * n`
            return tuple(x for x in sum([*before, new], ()) if not any(_equal(x, y) for y in args[:2]))
        if func in DIVISION and args[0] is found.source and not any(before[1:]):
            return found.divided_by + new
        alike = all(len(each) == len(before[0]) and all(map(_equal, each, before[0])) for each in before)
        keeps = linear or func in MOVES or func in CASTS or func in SUM or func in MEAN
        return found.divided_by if alike and (keeps or (func in _ADD and len(met) == 2)) else None

    def _reduces(self, func: Any, found: LossRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """The axes of a reduction over samples; None of another operation, as one over the elements of each sample."""
        if func not in _REDUCING or (len(args) > 1 and isinstance(args[1], Tensor)):  # or a choice of two
            return None
        ndim = found.source.ndim
        axes = axes_of(args, kwargs, ndim)
        keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if len(axes) == ndim and not keepdim:
            return axes
        tracker, index = self._tracker, index_of(self._tracker, found)
        if tracker is not None and index is not None:
            if tracker.without(index, axes) is not None:
                return None
            if tracker.reads(index):
                return axes
        return axes if 0 in axes else None  # where numbers are not known, or not read, rows lie along the first axis

    # -- what ends them ----------------------------------------------------------------------------

    def _reduced(self, func: Any, found: LossRecord, axes: list[int], out: Tensor) -> Tensor:
        """The loss that a sum or mean over samples ends in."""
        num, tracker = found.source, self._tracker
        if not num.requires_grad:
            self._totals.see(func, (num,), out)
            return out
        kept = torch.Size(1 if a in axes else size for a, size in enumerate(num.shape))
        shares = self._mixture.parts if found.parts and self._mixture is not None else []

        def compute() -> tuple[Tensor, Tensor]:
            if not shares:
                return num, num.new_full((), 1 / kept.numel())
            own = _samples_of(tracker, num)
            nums = [x * share.num.to(x.dtype)[own] for x, share in zip(found.parts, shares, strict=True)]
            dens = [share.den.to(num.dtype)[own] for share in shares]
            return torch.cat(nums), torch.cat(dens) / kept.numel()

        def samples(shape: torch.Size) -> Tensor | None:
            if not shares and tracker is not None and tracker.keeps_rows(num):
                return None
            own = _samples_of(tracker, num)
            if shares:
                own = torch.cat([own if share.source is None else share.source[own] for share in shares])
            return own.reshape(shape)

        record = replace(found, compute=compute, is_sum=func in SUM, kept=kept if len(axes) < num.ndim else None)
        if record.samples is not None:
            record.samples = samples
        if record.is_sum and record.of_batch:  # which is said, whatever divides it
            record.divisor = num.new_ones(()).expand(num.shape)
        call = replace(found.function, record=record)
        for by in found.divided_by:
            changed = isinstance(by, Total) and not by.current  # since they were divided by it
            if (changed or not self._divide(call, by)) and isinstance(by, Total) and by.of_batch:
                record.of_batch = True
        return self._record(call, out)

    def _proportional(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Follow what is proportional to losses, and what losses are divided by."""
        given = tensors_in((args, kwargs))
        calls = [call for x in given for tensor, of in self._divisible if tensor is x for call in of]
        if not (calls and out.requires_grad):
            return
        divided_by = [self._totals.divides(func, args, x) for x in args[:2] if self.is_proportional(x)]
        by = next((x for x in divided_by if x is not None), None)
        for call in calls:
            if (by is None or not self._divide(call, by)) and func not in _ADD:
                own = [tensor for tensor, of in self._divisible if call in of]
                others = [x for x in given if not any(x is y for y in own)]
                scaled = self.batch.scales(others) if func in PRODUCT or func in DIVISION else self.batch.holds(given)
                call.record.of_batch = call.record.of_batch or scaled
        known = [call for tensor, of in self._divisible if tensor is out for call in of]
        if new := [call for call in dict.fromkeys(calls) if call not in known]:
            self._divisible.append((out, new))

    def _divide(self, call: LossCall, by: Any) -> bool:
        """The step divides a loss by a number, or by a sum of weights: whether that is what the loss runs over."""
        return Divided(self._tracker, call.record, reads_all=self.batch.careful).by(by, self._totals)


def _is_constant(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and not x.requires_grad)


def _is_zero(x: Any) -> bool:
    return isinstance(x, int | float) and x == 0


def _equal(x: Any, y: Any) -> bool:
    """Whether it is the same object or number; no value of a tensor is read."""
    return x is y or (isinstance(x, int | float) and isinstance(y, int | float) and x == y)


def _times(scale: Any, factor: Any) -> Any:
    """Another scale of unreduced losses, see :class:`debias.tap.calls.LossRecord`."""
    if scale is False or factor is None:
        return False
    return factor if scale is None else scale * factor


def _samples_of(tracker: RowTracker | None, tensor: Tensor) -> Tensor:
    index = None if tracker is None else tracker.index(tensor)
    if index is None:
        raise RowsError(
            "Expected unreduced losses to be masked, weighted, reshaped and reduced only, each with what is of the same"
            f" samples, but got losses of shape {tuple(tensor.shape)} whose rows cannot be followed. Reduce the"
            f" elements of a sample first, then all; or return {{'loss': loss, 'losses': per_sample}}. {SPLIT}"
        )
    return index


def _with(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor, part: int | None) -> Any:
    """An operation done to other losses."""
    swapped = [
        type(x)(new if y is old else y for y in x) if isinstance(x, tuple | list) else new if x is old else x
        for x in args
    ]
    out = func(*swapped, **kwargs)
    return out if part is None else out[part]
