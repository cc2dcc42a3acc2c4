"""What augmentation did to the labels, for those who compute the loss: which samples stand for which, and how much.

Augmenters leave hard labels in the batch, so that the user's own metrics keep working. What a mixed sample is worth
is told to the tap instead. Every sample has one or more parts; part k of sample i counts with the label, and in the
groups, of sample ``source_k(i)``::

    num = sum_k sum_i num_share_k(i) loss(logits_i, label of source_k(i))        den likewise with den_share_k
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debias.errors import DebiasError, RowsError
from debias.ops import arguments
from debias.tap.batches import arranged_rows
from debias.tap.calls import LossCall, means
from debias.tap.losses import UNMIXABLE

__all__ = ["Mixture", "Part", "mix_parts", "relabelled", "row_sources", "unmixable"]


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
        for part in self.parts:
            source = partners if part.source is None else part.source[partners]
            kept.append(Part(source, part.num[partners] * rest, part.den[partners] * rest))
        self.parts = kept

    def repeat(self, index: Tensor, weights: Tensor) -> None:
        """Samples ``index`` take the place of the batch; ``weights`` scale their losses, not what these are divided
        by.
        """
        self.n = len(index)
        self.parts = [
            Part(None if part.source is None else part.source[index], part.num[index] * weights, part.den[index])
            for part in self.parts
        ]


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
    rows, order = len(index), index.argsort(stable=True)
    together = arranged_rows("interleaved", n, rows // n, index.device)
    if rows % n or (check and not torch.equal(index[order], together)):
        raise RowsError(
            f"Expected every sample to have as many rows in the loss as the others, so that labels of two samples can"
            f" be mixed, but got {rows} rows for {n} samples. Mask losses instead of leaving rows out."
        )
    numbers = torch.arange(rows // n, device=index.device).repeat(n)
    position = torch.empty_like(order).scatter_(0, order, numbers)
    return order.view(n, -1)[source[index], position]


def mix_parts(
    tap: Any, call: LossCall, compute: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Give a loss the rows of all parts of the mixture; its losses with each label, before their shares.

    There are none where nothing is mixed, or another loss is meant.

    Args:
        tap: of the step.
        call: the loss.
        compute: losses and denominators with the targets that its argument makes of the step's own.
    """
    mixture, record, tracker = tap.mixture, call.record, tap.tracker
    if not tap.training or mixture is None or not means(mixture.loss, call):
        return []
    losses, den = compute(lambda target: target)
    if losses.ndim == 0 or call.name in UNMIXABLE or not isinstance(call.target, Tensor):
        raise unmixable(call.name, "it has no target for each sample")
    record.compute = lambda: (losses, den)
    index = None if record.samples is None else record.samples(losses.shape)
    if index is not None and index.ndim > 1:  # one sample a row, unless the elements are those of the target
        index = index.flatten() if call.target.shape == losses.shape else index.flatten(1)[:, 0]
    check = index is not None and (arguments.on_host(index) or tracker is None or tracker.everything)
    elementwise = index is not None and len(index) != len(losses)
    shape = losses.shape if elementwise else (-1, *[1] * (losses.ndim - 1))

    def of_rows(per_sample: Tensor) -> Tensor:
        return per_sample if index is None else per_sample[index]

    made, options = [], []
    for part in mixture.parts:
        rows = None if part.source is None else row_sources(part.source, index, mixture.n, check=check)
        labels = functools.partial(_labels, rows, elementwise)
        if rows is not None:
            losses, den = compute(labels)
        num_share, den_share = (
            of_rows(x).to(losses.dtype).view(shape).expand(losses.shape) for x in (part.num, part.den)
        )
        source = torch.arange(mixture.n, device=mixture.device) if part.source is None else part.source
        den = den.to(losses.dtype) * den_share
        target, moved = relabelled(call.target, call.arguments, labels)
        made.append((losses, losses * num_share, den, num_share, target, of_rows(source)))
        options.append(moved)
    losses_of, *others = zip(*made, strict=True)
    num, den, record.scale, record.targets, samples = map(torch.cat, others)
    call.arguments |= {name: torch.cat([moved[name] for moved in options]) for name in options[0]}
    call.parts, record.own_rows = len(made), index
    record.compute = lambda: (num, den)
    for cached in ("computed", "elements"):
        vars(record).pop(cached, None)
    record.samples = lambda shape: samples.view(shape) if elementwise else samples
    return list(losses_of)


def relabelled(
    target: Tensor, options: dict[str, Any], moved: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The target with the labels of other samples, and of the options of a loss those that belong to these: weights of
    elements, unlike those of classes.
    """
    of_elements = {
        name: x.expand(target.shape)
        for name, x in options.items()
        if name in ("weight", "pos_weight") and isinstance(x, Tensor) and target.is_floating_point()
        if x.ndim == target.ndim and x.shape[:1] == target.shape[:1]
    }
    return moved(target), {name: moved(x) for name, x in of_elements.items()}


def _labels(rows: Tensor | None, elementwise: bool, target: Tensor) -> Tensor:
    """The labels that the rows of a loss, or its elements, count with."""
    if rows is None:
        return target
    return target.flatten()[rows].view(target.shape) if elementwise else target[rows]


def unmixable(name: str, why: str) -> DebiasError:
    """The error for a loss whose labels cannot be mixed."""
    return DebiasError(
        f"Expected the labels of `{name}` to be mixable, but {why}. Use a loss of logits and targets, such as"
        " cross_entropy, binary_cross_entropy_with_logits or mse_loss, or choose the loss that is mixed: `loss=`."
    )
