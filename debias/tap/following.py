"""Losses that a step reduces itself: from ``reduction="none"`` to the ``.mean()`` or ``.sum()`` that ends it.

What the step has made of the elements by then is what counts for each of them. What it divides by is the number of
elements for a mean. A sum has to be divided by what it runs over: a number of rows or elements, or the sum of a mask or
of weights with the shape of the losses. Then the loss of a group is what the step would return for that group alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debias.errors import RowsError
from debias.tap.calls import LossCall
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
    values_read,
)
from debias.tap.totals import READING, Total, Totals
from debias.tap.whole_batch import STATISTICS, WholeBatch, tensors_in

if TYPE_CHECKING:
    from debias.tap.tap import LossTap

__all__ = ["FOLLOWED", "Following", "Unreduced"]

_T = torch.Tensor
_ADD = named("add sub subtract add_ sub_ __add__ __radd__ __sub__ __iadd__ __isub__")
_FILL = named("masked_fill masked_fill_")
# Moves that leave elements out, or repeat them.
_SELECTING = named(
    "__getitem__ index_select narrow select masked_select take take_along_dim gather diagonal repeat tile"
    " repeat_interleave chunk split tensor_split unbind"
)
_DOT = named("dot vdot inner matmul __matmul__ __rmatmul__")
_is_dot = among(_DOT)
_REDUCED = MOVES | CASTS | ELEMENTWISE | INPLACE | SUM | MEAN | READING | _DOT
_is_followed = among(_REDUCED)
FOLLOWED = _REDUCED | STATISTICS


@dataclass(eq=False)
class Unreduced:
    """A tensor of losses that nobody has reduced yet.

    Attributes:
        tensor: the losses, or what the step has made of them.
        function: the loss as torch's function computed it.
        parts: where samples were mixed, the losses with each label, of which ``tensor`` is the weighted sum.
        scale: see :class:`debias.tap.calls.LossRecord`.
        reordered: whether rows are not where they were.
        mask: by which elements were selected; None if all are there, False if it is not known.
        of_batch: whether a number of the whole batch is in it.
        divided_by: numbers and totals (:class:`debias.tap.totals.Total`) that the step has divided it by.
    """

    tensor: Tensor
    function: LossCall
    parts: list[Tensor] = field(default_factory=list)
    scale: Any = None
    reordered: bool = False
    mask: Any = None
    of_batch: bool = False
    divided_by: tuple[Any, ...] = ()


class Following:
    """Follows the unreduced losses of one step.

    Args:
        tap: of the step; it records what is found.
    """

    def __init__(self, tap: LossTap) -> None:
        self.tap = tap
        self._unreduced: list[Unreduced] = []
        self._divisible: list[tuple[Tensor, list[LossCall]]] = []  # what is proportional to a loss, so far
        self._ended: list[tuple[LossCall, Unreduced]] = []
        self.batch = WholeBatch(tap.tracker, self, careful=tap.careful)
        self._totals = Totals(self.batch.holds, careful=tap.careful)

    def close(self) -> None:
        """Let go of every tensor."""
        for losses in self._unreduced:
            losses.function.forget()
        self._unreduced, self._divisible, self._ended = [], [], []
        self._totals.close()
        self.batch.close()

    def add(self, losses: Unreduced) -> None:
        """Follow losses from now on."""
        self._unreduced.append(losses)

    def divide_later(self, out: Tensor, call: LossCall) -> None:
        """Look out for what the step divides a loss by that it received as ``out``."""
        self._divisible.append((out, [call]))

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Follow losses through one operation; returns what the step is to receive of it."""
        self.batch.see(func, args, kwargs, out)
        if _is_followed(func) and self._unreduced and args and (found := self._find(func, args)) is not None:
            if (func in SUM or func in MEAN) and (axes := self._over_samples(found, args, kwargs)) is not None:
                return self._reduced(func, found, axes, out)
            if _is_dot(func) and args[0].ndim == args[1].ndim == 1:  # the sum of a product
                product = torch.mul(*args[:2])
                if self.tap.tracker is not None:
                    self.tap.tracker.record(torch.mul, args[:2], {}, product)
                self._followed(torch.mul, args[:2], {}, found, product)
                return self._reduced(torch.sum, self._unreduced[-1], [0], out)
            self._followed(func, args, kwargs, found, out)
        else:
            self._totals.see(func, args, out)
            for x in tensors_in(out) if self._divisible else ():
                self._proportional(func, args, kwargs, x)
        return out

    def is_unreduced(self, x: Tensor) -> bool:
        """Whether it holds losses that nobody has reduced yet."""
        return any(losses.tensor is x for losses in self._unreduced)

    def is_proportional(self, x: Any) -> bool:
        """Whether it is a loss, or what is proportional to some."""
        return any(x is y for y, _ in self._divisible)

    # -- elements ----------------------------------------------------------------------------------

    def _find(self, func: Any, args: tuple[Any, ...]) -> Unreduced | None:
        data = (*args[0], *args[1:3]) if isinstance(args[0], tuple | list) else args[:3]
        for x in values_read(func, data, {}):
            for losses in reversed(self._unreduced):
                if losses.tensor is x:
                    return losses
        return None

    def _followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Unreduced, out: Any) -> None:
        """Follow losses through an operation that does not end them."""
        by = self._totals.divides(func, args, found.tensor)
        divided_by = found.divided_by if by is None else (*found.divided_by, by)
        if func is _T.__setitem__ or out is found.tensor:  # in place
            found.scale = self._scaled(func, args, kwargs, found)
            found.of_batch = found.of_batch or (by is None and self.batch.holds(args, kwargs))
            found.divided_by = divided_by
            for part in found.parts:
                func(*(part if x is found.tensor else x for x in args), **kwargs)
            return
        outs = list(out) if isinstance(out, tuple | list) else [out]
        for i, x in enumerate(outs):
            if not isinstance(x, Tensor):
                continue
            place = None if x is out else i
            if not x.requires_grad and found.tensor.requires_grad and func not in CASTS:
                continue  # a mask, such as that of the largest losses
            made = Unreduced(x, found.function, scale=found.scale, reordered=found.reordered, mask=found.mask)
            made.of_batch = found.of_batch or (by is None and self.batch.changes(func, args, kwargs, x))
            made.divided_by = divided_by
            if func in MOVES:
                made.reordered = found.reordered or not keeps_rows(func, args, x)
                made.scale = self._moved_scale(func, args, kwargs, found, place)
                if func in _SELECTING:
                    made.mask = args[1] if func is _T.__getitem__ and found.mask is None else False
            elif func not in CASTS:
                made.scale = self._scaled(func, args, kwargs, found)
            for part in found.parts:
                made.parts.append(_with(func, args, kwargs, found.tensor, part, place))
            self._unreduced.append(made)

    def _scaled(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Unreduced) -> Any:
        """What elements are multiplied by after an operation; False if it does something else to them."""
        if found.scale is False:
            return False
        scale = 1.0 if found.scale is None else found.scale
        at = next((i for i, x in enumerate(args[:3]) if x is found.tensor), None)
        other = next((x for i, x in enumerate(args[:2]) if i != at), kwargs.get("other"))
        constant = isinstance(other, int | float) or (isinstance(other, Tensor) and not other.requires_grad)
        try:
            if func in PRODUCT and constant:
                return scale * other  # type: ignore[operator]
            if func in DIVISION and at == 0 and constant:
                return scale / other  # type: ignore[operator]
            if func is torch.where and at in (1, 2):
                rest = args[3 - at] if len(args) > 3 - at else kwargs.get("other")
                keep = args[0] if at == 1 else ~args[0]
                return scale * keep if isinstance(rest, int | float) and rest == 0 else False
            if func in _FILL and (args[2] if len(args) > 2 else kwargs.get("value")) == 0:
                return scale * ~(args[1] if len(args) > 1 else kwargs["mask"])
            if func is _T.__setitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
                return scale * ~args[1] if isinstance(args[2], int | float) and args[2] == 0 else False
            if func in SUM and isinstance(scale, float):
                return scale
        except RuntimeError:
            return False
        return False

    def _moved_scale(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Unreduced, part: int | None
    ) -> Any:
        if not isinstance(args[0], Tensor):
            return False
        if not isinstance(found.scale, Tensor):
            return found.scale
        try:
            return apply_move(func, args, kwargs, found.scale.expand(found.tensor.shape), part)
        except RuntimeError:
            return False

    def _over_samples(self, found: Unreduced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
        """The axes of a reduction that runs over samples; None if it runs over the elements of each only."""
        ndim = found.tensor.ndim
        axes = axes_of(args, kwargs, ndim)
        keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if len(axes) == ndim and not keepdim:
            return axes
        index = self._index(found.tensor)
        tracker = self.tap.tracker
        if not isinstance(index, Tensor) or tracker is None:
            return axes if 0 in axes else None
        if tracker.without(index, axes) is not None:
            return None
        # Where numbers may not be read, rows lie along the first axis.
        return axes if tracker.reads(index) or 0 in axes else None

    def _index(self, tensor: Tensor) -> Tensor | RowsError | None:
        if self.tap.tracker is None:
            return None
        try:
            return self.tap.tracker.index(tensor)
        except RowsError as error:  # of a loss that perhaps nobody means
            return error

    # -- what ends them ----------------------------------------------------------------------------

    def _reduced(self, func: Any, found: Unreduced, axes: list[int], out: Tensor) -> Tensor:
        """The loss that a sum or mean over samples ends in."""
        num, first = found.tensor, found.function
        if not num.requires_grad:
            return out
        others = [a for a in range(num.ndim) if a not in axes]
        size = 1
        for axis in others:
            size *= num.shape[axis]
        tap, parts = self.tap, found.parts

        def compute() -> tuple[Tensor, Tensor]:
            if not parts:
                return num, num.new_full((), 1 / size)
            assert tap.mixture is not None
            own, shares = _samples_of(tap, num), tap.mixture.parts
            of_parts = [x * share.num.to(x.dtype)[own] for x, share in zip(parts, shares, strict=True)]
            return torch.cat(of_parts), torch.cat([share.den.to(num.dtype)[own] for share in shares]) / size

        def samples(shape: torch.Size) -> Tensor | None:
            if tap.tracker is None or (num.ndim == 1 and not parts and tap.tracker.keeps_rows(num)):
                return None
            own = _samples_of(tap, num)
            if parts:
                assert tap.mixture is not None
                own = torch.cat([own if part.source is None else part.source[own] for part in tap.mixture.parts])
            return own.reshape(shape)

        call = tap._call(first.name, first.logits, first.target, compute)
        record = call.record
        record.source, record.samples, record.scale, record.reordered = num, samples, found.scale, found.reordered
        call.arguments, record.function, record.linear = first.arguments, first, first.record.linear
        record.is_sum = record.undivided = func in SUM
        record.of_batch = found.of_batch
        if others:
            record.kept = torch.Size(1 if a in axes else s for a, s in enumerate(num.shape))
        if parts:
            call.parts, record.targets, record.shares = first.parts, first.record.targets, first.record.shares
            record.own_rows = first.record.own_rows
        self._ended.append((call, found))
        for by in found.divided_by:
            if not self._divide(call, by) and isinstance(by, Total):
                record.of_batch = True
        return tap.add(call, out)

    def _proportional(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Follow what is proportional to losses, and what losses are divided by."""
        if not (self._divisible and out.requires_grad):
            return
        given = tensors_in((args, kwargs))
        calls = [call for x in given for tensor, of in self._divisible if tensor is x for call in of]
        if not calls:
            return
        by = next(
            (by for x in args[:2] if self.is_proportional(x) and (by := self._totals.divides(func, args, x))), None
        )
        for call in calls:
            if not (by is not None and self._divide(call, by)) and func not in _ADD:
                call.record.of_batch = call.record.of_batch or self.batch.holds(given)
        if not any(out is x for x in given):
            self._divisible.append((out, calls))

    def _divide(self, call: LossCall, by: Any) -> bool:
        """The step divides a loss by a number, or by a sum of weights: whether that is a sum of what it runs over."""
        record = call.record
        if record.divisor is not None or (record.is_sum and not record.undivided):
            return False  # by what it runs over already; this is another factor
        found = next((losses for of, losses in self._ended if of is call), None)
        if isinstance(by, Total):
            if by.is_mean == record.is_sum:
                return False
            if not record.is_sum and record.function is None and record.computed[1].ndim:
                return False  # a mean of its own weights already
            record.divisor, record.undivided = functools.partial(self._weights, call, found, by.source), False
            return True
        if record.is_sum:
            record.undivided = not self._counts(call, found, by)
        return False

    def _counts(self, call: LossCall, found: Unreduced | None, by: Tensor | float) -> bool:
        """Whether a number is that of the samples, rows or elements of a loss.

        Beyond the CPU only the first step of an epoch reads one that is a tensor.
        """
        if isinstance(by, Tensor) and not (by.device.type == "cpu" or self.batch.careful):
            return True
        shape = call.record.computed[0].shape if found is None else found.tensor.shape
        if not shape.numel():  # of nothing, whatever it is divided by
            return True
        first = self._axis_of_samples(call, shape)
        counts = {1} if not shape else {shape[: i + 1].numel() for i in range(first, len(shape))}
        return float(by) in counts or (
            self.tap.tracker is not None and float(by) == self.tap.tracker.n and self._even(call, found)
        )

    def _axis_of_samples(self, call: LossCall, shape: torch.Size) -> int:
        """The first axis of a loss along which samples lie: tokens may come before them."""
        tracker = self.tap.tracker
        try:
            index = None if tracker is None else call.record.samples(shape)
        except RowsError:  # said where a method reads it
            return 0
        if tracker is None or index is None or index.shape != shape:
            return 0
        return next((axis for axis in range(len(shape)) if tracker.without(index, [axis]) is None), 0)

    def _even(self, call: LossCall, found: Unreduced | None) -> bool:
        """Whether each sample has as many rows, so that their number counts the rows."""
        tracker = self.tap.tracker
        assert tracker is not None
        if found is not None and found.mask is not None:
            return False
        try:
            shape = call.record.computed[0].shape if found is None else found.tensor.shape
            index = call.record.samples(shape)
        except RowsError:  # said where a method reads it
            return True
        if index is None:
            return True
        if index.numel() % tracker.n or not tracker.reads(index):
            return not index.numel() % tracker.n
        counts = index.flatten().bincount(minlength=tracker.n)
        return bool((counts == counts[0]).all())

    def _weights(self, call: LossCall, found: Unreduced | None, source: Tensor) -> Tensor | None:
        """Weights in the shape of the elements of a loss, whose sum is that of ``source``; None if they do not fit."""
        shape = call.record.computed[0].shape if found is None else found.tensor.shape
        if found is not None and found.mask is not None:
            same = isinstance(found.mask, Tensor) and self._same_mask(source, found.mask)
            return source.new_ones((), dtype=torch.float32).expand(shape) if same else None
        weights, ndim = source.detach(), len(shape)
        own, theirs = (None, None) if found is None else (self._index(found.tensor), self._index(source))
        if ndim and weights.ndim > ndim and weights.shape[:ndim] == shape:  # a mask of tokens, of losses per sample
            weights = weights.flatten(ndim).sum(ndim)
            theirs = theirs.flatten(ndim).select(ndim, 0) if isinstance(theirs, Tensor) else theirs
        if weights.numel() == shape.numel():
            if isinstance(own, Tensor) and isinstance(theirs, Tensor) and own.numel() == theirs.numel():
                return weights.reshape(shape) if self._equal(own.flatten(), theirs.flatten()) else None
            return weights.reshape(shape)
        known = self.tap.tracker is not None and self.tap.tracker.is_of_batch(source)
        if weights.ndim == 1 and shape.count(shape[0]) > 1 and not known:
            return None  # of the rows, or of the columns
        if weights.ndim and weights.shape == shape[: weights.ndim]:
            weights = weights.view(*weights.shape, *[1] * (len(shape) - weights.ndim))
        if weights.ndim != len(shape) or not shape or weights.shape[0] != shape[0]:
            return None
        try:
            return weights.expand(shape) * (weights.numel() / shape.numel())
        except RuntimeError:
            return None

    def _same_mask(self, weights: Tensor, mask: Tensor) -> bool:
        """Whether weights are the mask that elements were selected by."""
        if weights is mask or weights.shape != mask.shape or mask.dtype != torch.bool:
            return weights is mask
        return self._equal(weights.to(torch.float32), mask.to(torch.float32))

    def _equal(self, a: Tensor, b: Tensor) -> bool:
        """Reading waits for the device, so beyond the CPU only the step that records everything looks."""
        reads = a.device.type == "cpu" or (self.tap.tracker is not None and self.tap.tracker.everything)
        return not reads or torch.equal(a, b)


def _samples_of(tap: LossTap, tensor: Tensor) -> Tensor:
    assert tap.tracker is not None
    index = tap.tracker.index(tensor)
    if index is None:
        raise RowsError(
            "Expected unreduced losses to be masked, weighted, reshaped and reduced only, each with what is of the same"
            f" samples, but got losses of shape {tuple(tensor.shape)} whose rows cannot be followed. Reduce the"
            " elements of a sample first, then all; or return {'loss': loss, 'losses': per_sample}."
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
