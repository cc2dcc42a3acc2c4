"""Whether what a step divides a loss by is what the loss runs over: samples, rows, elements, or their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debias.errors import RowsError
from debias.ops import arguments
from debias.tap.calls import LossRecord
from debias.tap.totals import Total, Totals

if TYPE_CHECKING:
    from debias.tap.rows import RowTracker

__all__ = ["Divided", "index_of"]


def index_of(tracker: RowTracker | None, record: LossRecord) -> Tensor | None:
    """Sample of each element of a loss; None where nobody knows."""
    if tracker is None or record.samples is None:
        return None
    if record.source is not None:
        return tracker.index(record.source)
    num = record.computed[0]
    try:
        return tracker.of_elements(record.samples(num.shape), num.shape, num.device)
    except RowsError:  # said where a method reads it; perhaps nobody means this loss
        return None


class Divided:
    """A loss that a step divides by something.

    Args:
        tracker: of the step; None where nobody reads ids.
        record: of the loss.
        reads_all: values may be read beyond the CPU, too, as in the first step of an epoch.
    """

    def __init__(self, tracker: RowTracker | None, record: LossRecord, *, reads_all: bool) -> None:
        self.tracker, self.record, self.reads_all = tracker, record, reads_all

    def by(self, by: Any, totals: Totals) -> bool:
        """Whether a total, or a number (perhaps in a tensor), is what it runs over; then the loss has its divisor."""
        record = self.record
        if record.divisor is not None:
            return False  # by what it runs over already; this is another factor
        if isinstance(by, Total):
            of_own_weights = not record.is_sum and record.function is None and record.computed[1].ndim > 0
            if by.is_mean != record.is_sum and not of_own_weights:
                record.divisor = self.weights(by.source)
        elif record.is_sum:
            record.divisor = self._read_as(by, totals)
            if self._is_count(by) and (record.divisor is None or not bool((record.divisor == 0).any())):
                record.divisor = self._elements.new_ones(()).expand(self._elements.shape)
        return record.divisor is not None

    def _read_as(self, number: Any, totals: Totals) -> Tensor | None:
        """The weights whose sum a number was read of, some of which may be 0, as the losses there are.

        None where there are several: nothing tells them apart. Values are read as the step has read one, and so waited
        for the device, itself.
        """
        found: list[Tensor] = []
        for total in totals.read_as(number) if isinstance(number, int | float) else ():
            weights = self.weights(total.source)
            if weights is not None and not bool(((self._elements.detach() != 0) & (weights == 0)).any()):
                found.append(weights)
        return found[0] if found and all(torch.equal(weights, found[0]) for weights in found) else None

    @property
    def _elements(self) -> Tensor:
        return self.record.computed[0] if self.record.source is None else self.record.source

    def _is_count(self, by: Tensor | float) -> bool:
        """Whether a number is that of the samples, rows or elements of a loss.

        Beyond the CPU only the first step of an epoch reads one that is a tensor.
        """
        shape = self._elements.shape
        unread = isinstance(by, Tensor) and not (arguments.on_host(by) or self.reads_all)
        if unread or not shape.numel():  # of nothing, whatever it is divided by
            return True
        counts = {1} if not shape else {shape[: i + 1].numel() for i in range(self._axis_of_samples(), len(shape))}
        of_samples = self.tracker is not None and self.record.mask is None and float(by) == self.tracker.n
        return float(by) in counts or (of_samples and self._even())

    def _axis_of_samples(self) -> int:
        """The first axis of a loss along which samples lie: tokens may come before them."""
        shape, index, tracker = self._elements.shape, index_of(self.tracker, self.record), self.tracker
        if tracker is None or index is None or index.shape != shape:
            return 0
        return next(tracker.moving(index), 0)

    def _even(self) -> bool:
        """Whether each sample has as many rows, as far as that is known: then their number counts the rows."""
        index, tracker = index_of(self.tracker, self.record), self.tracker
        if index is None or tracker is None:
            return True
        even = not index.numel() % tracker.n
        if even and tracker.reads(index):
            counts = index.flatten().bincount(minlength=tracker.n)
            even = bool((counts == counts[0]).all())
        return even

    def weights(self, source: Tensor) -> Tensor | None:
        """Weights in the shape of the elements, whose sum is that of ``source``; None if they do not fit."""
        shape, mask = self._elements.shape, self.record.mask
        if mask is not None and source.shape != shape and self._are_same(source, mask):
            return source.new_ones((), dtype=torch.float32).expand(shape)
        weights, ndim, tracker = source.detach(), len(shape), self.tracker
        of_batch = tracker is not None and tracker.is_of_batch(source)
        own, theirs = index_of(tracker, self.record), None if tracker is None else tracker.index(source)
        known = False
        if tracker is not None and own is not None and theirs is not None:
            known = tracker._equal(own.flatten(), theirs.flatten())
            if not known and of_batch:
                return self._by_sample(tracker, weights, own, theirs)
            if not known and own.numel() == theirs.numel():
                return None
        if mask is not None and not known:
            return None
        if 0 < ndim < source.ndim and source.shape[:ndim] == shape:  # a mask of tokens, of losses per sample
            weights = weights.flatten(ndim).sum(ndim)
        if weights.numel() != shape.numel():
            return self._spread(weights, known=of_batch)
        return weights.reshape(shape)

    def _by_sample(self, tracker: RowTracker, weights: Tensor, own: Tensor, theirs: Tensor) -> Tensor | None:
        """Weights of the samples, shared by the elements of each; None where a sample has weights and no element, or
        where a mean is of other numbers of weights.
        """
        weights = weights.to(torch.promote_types(self._elements.dtype, torch.float32))

        def by_sample(values: Tensor, index: Tensor) -> Tensor:
            sums = values.new_zeros(tracker.n)
            return sums.index_add_(0, index.flatten(), values.expand(index.shape).flatten())

        one = weights.new_ones(())
        total, elements = by_sample(weights, theirs), by_sample(one, own)
        alike = (own,) if self.record.is_sum else (own, theirs)
        if any(tracker.in_order(index) is None for index in alike):  # else each sample has as many of them
            of_mean = by_sample(one, theirs) * own.numel() == elements * theirs.numel()
            fits = ((total == 0) | (elements > 0)) if self.record.is_sum else of_mean
            if not (tracker.reads(own) and bool(fits.all())):
                return None
        return (total / elements.clamp(min=1))[own]

    def _spread(self, weights: Tensor, *, known: bool) -> Tensor | None:
        """Weights of samples or rows, spread over their elements; ``known`` if they are of the batch."""
        shape, ndim = self._elements.shape, self._elements.ndim
        if not ndim or not weights.ndim or (weights.ndim == 1 and shape.count(shape[0]) > 1 and not known):
            return None  # of the rows, or of the columns
        if weights.shape == shape[: weights.ndim]:
            weights = weights.view(*weights.shape, *[1] * (ndim - weights.ndim))
        fits = weights.ndim == ndim and all(a in (1, b) for a, b in zip(weights.shape, shape, strict=True))
        # Neither rows nor samples have the same weights for all.
        if not fits or any(weights.shape[axis] != shape[axis] for axis in (0, self._axis_of_samples())):
            return None
        return weights.expand(shape) * (weights.numel() / shape.numel())

    def _are_same(self, source: Tensor, mask: Any) -> bool:
        """Whether weights are the mask that elements were selected by."""
        alike = isinstance(mask, Tensor) and mask.dtype == torch.bool and source.shape == mask.shape
        return source is mask or (alike and self._equal(source.to(torch.float32), mask.to(torch.float32)))

    def _equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether they are the same, as far as values may be read; see :meth:`SampleNumbers.reads`."""
        reads = arguments.on_host(a) if self.tracker is None else self.tracker.reads(a)
        return not reads or torch.equal(a, b)
