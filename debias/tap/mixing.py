"""What augmentation did to the labels, for those who compute the loss: which samples stand for which, and how much.

Augmenters leave hard labels in the batch, so that the user's own metrics keep working. What a mixed sample is worth
is told to the tap instead. Every sample has one or more parts; part k of sample i counts with the label, and in the
groups, of sample ``source_k(i)``::

    num = sum_k sum_i num_share_k(i) loss(logits_i, label of source_k(i))        den likewise with den_share_k
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debias.errors import DebiasError, RowsError

__all__ = ["Mixture", "Part", "row_sources"]


@dataclass(eq=False)
class Part:
    """One label that the samples of a batch count with.

    Attributes:
        source: sample whose label and groups it is, int64 ``(N,)``; None for the sample's own.
        num: share of the loss, ``(N,)``.
        den: share of what losses are divided by, ``(N,)``.
    """

    source: Tensor | None
    num: Tensor
    den: Tensor


@dataclass(eq=False)
class Mixture:
    """What the samples of a batch stand for.

    Attributes:
        n: number of samples.
        device: where the samples are.
        loss: which of the step's losses is meant, as ``loss=`` of the method that mixes.
        owner: name of that method, for messages.
        parts: the parts of the samples; the first holds the samples' own labels.
    """

    n: int
    device: torch.device
    loss: int | str | Callable[[Any], bool] | None = None
    owner: str = ""
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.parts:
            ones = torch.ones(self.n, device=self.device)
            self.parts = [Part(None, ones, ones)]

    @property
    def mixes(self) -> bool:
        """Whether any sample counts with a label other than its own."""
        return len(self.parts) > 1

    def mix(self, partners: Tensor, shares: Tensor) -> None:
        """Every sample becomes ``share`` of itself and ``1 - share`` of its partner."""
        rest = 1 - shares
        kept = [Part(part.source, part.num * shares, part.den * shares) for part in self.parts]
        added = [
            Part(
                partners if part.source is None else part.source[partners],
                part.num[partners] * rest,
                part.den[partners] * rest,
            )
            for part in self.parts
        ]
        self.parts = kept + added

    def repeat(self, index: Tensor, weights: Tensor) -> None:
        """Samples ``index`` take the place of the batch; ``weights`` scale their losses, not what these are divided
        by.
        """
        self.n = len(index)
        self.parts = [
            Part(None if part.source is None else part.source[index], part.num[index] * weights, part.den[index])
            for part in self.parts
        ]

    def meant(self, call: Any) -> bool:
        """Whether a loss is one that the mixture is about."""
        if self.loss is None or self.loss == "sum":
            return True
        return bool(self.loss(call)) if callable(self.loss) else call.position == self.loss


def row_sources(source: Tensor, index: Tensor | None, n: int, *, check: bool) -> Tensor:
    """From the sample that each sample takes its label from, the row that each row takes it from.

    Args:
        source: sample of each sample, int64 ``(n,)``.
        index: sample of each row, int64 ``(rows,)``; None where row i is sample i.
        n: number of samples.
        check: look whether all samples have as many rows, which waits for the device.

    Raises:
        RowsError: they have not.
    """
    if index is None:
        return source
    rows = len(index)
    order = index.argsort(stable=True)
    wrong = rows % n != 0
    if not wrong and check:
        wrong = not torch.equal(
            index[order].view(n, -1), torch.arange(n, device=index.device).view(n, 1).expand(n, rows // n)
        )
    if wrong:
        raise RowsError(
            f"Expected every sample to have as many rows in the loss as the others, so that labels of two samples can"
            f" be mixed, but got {rows} rows for {n} samples. Mask losses instead of leaving rows out."
        )
    table = order.view(n, -1)
    numbers = torch.arange(rows // n, device=index.device).repeat(n)
    position = torch.empty_like(order).scatter_(0, order, numbers)
    return table[source[index], position]


def unmixable(name: str, why: str) -> DebiasError:
    """The error for a loss whose labels cannot be mixed."""
    return DebiasError(
        f"Expected the labels of `{name}` to be mixable, but {why}. Use a loss of logits and targets, such as"
        " cross_entropy, binary_cross_entropy_with_logits or mse_loss, or choose the loss that is mixed: `loss=`."
    )
