"""Sample numbers: int64 tensors that say of each element which sample it is of, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from debias.ops import arguments
from debias.tap.moves import thinned

__all__ = ["SampleNumbers"]


class SampleNumbers:
    """The numbers of the samples of one step, spread over tensors without being copied.

    Args:
        n: number of samples.
        several: whether they are of several loaders.
        everything: whether numbers may be read beyond the CPU, too.

    Attributes:
        on_host: whether numbers are made on the CPU, whatever device the tensors are on.
    """

    def __init__(self, n: int, several: bool, everything: bool) -> None:
        self.n = n
        self.several = several
        self.everything = everything
        self.on_host = False
        self._orders: dict[torch.device, Tensor] = {}

    def start(self, shape: torch.Size, device: torch.device, sample: int | None = None, first: int = 0) -> Tensor:
        """Sample numbers of a tensor with one row per sample from ``first`` on, or of one of a single sample."""
        device = torch.device("cpu") if self.on_host else device
        if sample is not None:
            return torch.full((), sample, device=device).expand(shape)
        order = self._order(device)
        if self.several:
            order = order[first : first + shape[0]]
        return order.view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def of_elements(self, index: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
        """Sample numbers in the shape of losses, from those of their rows; None where row i is sample i."""
        if index is None:
            return self.start(shape, device, sample=None if shape else 0)
        return index if index.shape == shape else index.view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def by_row(self, index: Tensor) -> Tensor | None:
        """Sample of each row of sample numbers ``(rows, ...)``; None where a row is of several samples."""
        if index.ndim < 2:
            return index if index.ndim else index.reshape(1)
        if not index.numel():
            return None
        rows = self.without(index, list(range(1, index.ndim)))
        # Beyond the CPU the step that recorded everything has looked.
        return index.flatten(1)[:, 0] if rows is None and not self.reads(index) else rows

    def without(self, index: Tensor, axes: list[int]) -> Tensor | None:
        """Sample numbers when these axes are gone; None if samples change along them."""
        for axis in reversed(axes):
            if not index.shape[axis]:
                return None
            first = index.select(axis, 0)
            still = index.shape[axis] == 1 or index.stride(axis) == 0
            if not still and not (self.reads(index) and torch.equal(index, first.unsqueeze(axis).expand_as(index))):
                return None
            index = first
        return index

    def of_others(self, index: Tensor, mask: Tensor | None) -> bool:
        """Whether what a mask chooses is of other samples than the mask, both by their numbers."""
        if mask is None or not 0 < mask.ndim <= index.ndim:
            return False
        own = self.without(index, list(range(mask.ndim, index.ndim)))
        return own is not None and own.shape == mask.shape and not self._equal(own, mask)

    def only(self, found: list[Tensor | None]) -> Tensor | None:
        """The number of the one sample that all of these numbers say, ``()``; None if they say several, or nothing."""
        one = [small.view(()) for x in found if x is not None and (small := thinned([x])[0]).numel() == 1]
        return one[0] if one and len(one) == len(found) and all(self._equal(x, one[0]) for x in one) else None

    def pools_in_order(self, places: Tensor | None, samples: Tensor | None) -> bool:
        """Whether rows are added up at the places of their samples. Where nobody knows these, places that rise say that
        they lie in the order of the batch, as the nodes of joined graphs do.
        """
        if places is None:
            return False
        if samples is not None:
            return self._equal(places.long(), samples)
        return not self.reads(places) or bool((places.diff() >= 0).all())

    def moving(self, index: Tensor) -> Iterator[int]:
        """The axes along which samples change; each is looked at when it is asked for."""
        return (axis for axis in range(index.ndim) if self.without(index, [axis]) is None)

    def in_order(self, index: Tensor) -> int | None:
        """The axis along which the samples lie in the order of the batch, each the same along all other axes."""
        if self.n == 1:
            return index.shape.index(1) if 1 in index.shape else None
        order = self._order(index.device)
        for axis, size in enumerate(index.shape):
            lines = order.view(-1, *[1] * (index.ndim - axis - 1))
            if size == self.n and self._equal(index, lines.expand(index.shape), unread=False):
                return axis
        return None

    def _equal(self, a: Tensor, b: Tensor, *, unread: bool = True) -> bool:
        """Whether numbers are the same; ``unread`` where that takes reading them, and they may not be read."""
        if a is b or a.shape != b.shape:
            return a is b
        first, second = thinned([a, b])
        if first._base is second._base is not None and _layout(first) == _layout(second):
            return True  # views of the same numbers
        return torch.equal(first, second) if self.reads(a) else unread

    def reads(self, x: Tensor) -> bool:
        """Whether numbers may be read: that waits for the device, so beyond the CPU only in the first step."""
        return self.on_host or arguments.on_host(x) or self.everything

    def _order(self, device: torch.device) -> Tensor:
        if device not in self._orders:
            self._orders[device] = torch.arange(self.n, device=device)
        return self._orders[device]


def _layout(x: Tensor) -> tuple[object, list[int]]:
    return x.storage_offset(), [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
