"""Losses as functions of the logits, taken apart as far as second derivatives of a head need it.

With ``t`` the targets (soft, smoothed and weighted), m their sum, p the softmax, s the sigmoid:

====================  ======================  ==================================  ==============
loss                  r                       S v                                 denominator
====================  ======================  ==================================  ==============
cross-entropy         m p - t                 m (p * v - p <p, v>)                class weight
binary cross-entropy  w (s (t c + 1 - t)      w (t c + 1 - t) s (1 - s) * v       C
                      - t c)
squared error         2 w (z - t)             2 w v                               C (or sum of w)
====================  ======================  ==================================  ==============

(r is the first derivative, S the second; c is ``pos_weight``, w the element's weight.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import DebiasError

__all__ = [
    "HeadLoss",
    "binary_cross_entropy",
    "cross_entropy",
    "filled",
    "make_head_loss",
    "numerators",
    "squared_error",
]


@dataclass(eq=False)
class HeadLoss:
    """A loss as a function of the logits, taken apart as far as second derivatives need it.

    Attributes:
        kind: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        logits: ``(rows, C)``, differentiable.
        target: ``(rows, C)``: mass of each class (cross-entropy, with class weights and smoothing in it), or the
            target of each element.
        weight: what an element's loss is multiplied by, broadcastable to ``(rows, C)``; 1 for cross-entropy.
        positive: ``pos_weight`` of the binary cross-entropy, broadcastable to ``(rows, C)``.
        den: denominators, ``(rows,)``; the mean loss is ``num.sum() / den.sum()``.
        summed: whether the loss of a sample is the sum over its elements, and not their mean.
    """

    kind: Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
    logits: Tensor
    target: Tensor
    den: Tensor
    weight: Tensor | float = 1.0
    positive: Tensor | float = 1.0
    summed: bool = False

    @property
    def elements(self) -> int:
        """How many terms the loss of one sample is the mean of."""
        return 1 if self.kind == "cross_entropy" or self.summed else self.logits.shape[1]

    def num(self, logits: Tensor) -> Tensor:
        """Numerators ``(rows,)`` for other logits of the same rows."""
        return numerators(self.kind, logits, self.target, self.weight, self.positive)

    @property
    def checks(self) -> Tensor:
        """Finite where the loss of a row and its logits are, but for -inf of a class that is masked, ``(rows,)``."""
        if self.kind == "cross_entropy":
            shares = self.logits.log_softmax(-1)  # NaN, all of them, where a logit is NaN or inf
            return torch.where(self.target != 0, shares, 0).sum(-1) + shares.amax(-1)
        return self.num(self.logits) + self.logits.amax(1).clamp_min(0)

    @cached_property
    def mass(self) -> Tensor:
        """Sum of a row's class targets, ``(rows, 1)``; the weight of an element, for the other losses."""
        if self.kind == "cross_entropy":
            return self.target.sum(-1, keepdim=True)
        if self.kind == "squared_error":
            return filled(self.weight, self.logits, ()) * 2
        return self.weight * (self.target * self.positive + 1 - self.target)

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax or sigmoid of the logits, ``(rows, C)``."""
        return self.logits.softmax(-1) if self.kind == "cross_entropy" else self.logits.sigmoid()

    @cached_property
    def residuals(self) -> Tensor:
        """First derivatives of the numerators with respect to the logits, ``(rows, C)``."""
        if self.kind == "squared_error":
            return self.mass * (self.logits - self.target)
        if self.kind == "cross_entropy":
            return self.mass * self.probabilities - self.target
        return self.mass * self.probabilities - self.weight * self.target * self.positive

    @cached_property
    def diagonal(self) -> Tensor:
        """Diagonal of the second derivatives, ``(rows, C)``."""
        if self.kind == "squared_error":
            return self.mass.expand(self.logits.shape)
        return self.mass * self.probabilities * (1 - self.probabilities)

    def curvature(self, vectors: Tensor) -> Tensor:
        """Second derivatives times vectors ``(rows, C)`` or ``(rows, k, C)``."""
        if self.kind != "cross_entropy":
            return (self.diagonal if vectors.ndim == 2 else self.diagonal.unsqueeze(1)) * vectors
        p, mass = self.probabilities, self.mass
        if vectors.ndim == 3:
            p, mass = p.unsqueeze(1), mass.unsqueeze(1)
        weighted = p * vectors
        return mass * (weighted - p * weighted.sum(-1, keepdim=True))

    @property
    def blocks(self) -> int:
        """How many numbers of the second derivatives of a row are not 0 by design: C where no two logits share a loss,
        else C C.
        """
        classes = self.logits.shape[1]
        return classes**2 if self.kind == "cross_entropy" else classes

    @property
    def matrices(self) -> Tensor:
        """The second derivatives themselves, or their diagonal where that is all, ``(rows, blocks)``."""
        if self.kind != "cross_entropy":
            return self.diagonal
        p = self.mass * self.probabilities
        return (torch.diag_embed(p) - p.unsqueeze(2) * self.probabilities.unsqueeze(1)).flatten(1)

    def inner(self, left: HeadLoss) -> Tensor:
        """Frobenius inner products of the second derivatives, ``<S_i of left, S_j of self>``, ``(rows, rows)``."""
        if self.kind != "cross_entropy":
            return left.diagonal @ self.diagonal.T
        p, q = left.probabilities, self.probabilities
        both = p @ q.T
        products = both - p.square() @ q.T - p @ q.square().T + both.square()
        return left.mass * products * self.mass.T

    @property
    def element_den(self) -> Tensor:
        """Denominators of the elements, ``(rows, C)``, of a loss with one term a logit."""
        ones = torch.ones_like(self.target)
        return ones * self.weight if self.kind == "squared_error" else ones

    def weighted(self, factors: Tensor, *, den: Tensor | None = None) -> HeadLoss:
        """The same loss with rows ``(rows,)`` or elements ``(rows, C)`` weighted.

        Args:
            factors: what numerators are multiplied by.
            den: what denominators are multiplied by; the same by default.
        """
        num, den = (x.unsqueeze(1) if x.ndim == 1 else x for x in (factors, factors if den is None else den))
        if self.kind == "cross_entropy":
            return replace(self, target=self.target * num, den=self.den * den[:, 0])
        return replace(self, den=(self.element_den * den).sum(1), weight=self.weight * num)

    def map(self, change: Callable[[Tensor], Tensor]) -> HeadLoss:
        """The same loss with every tensor changed row by row, e.g. detached or gathered over ranks."""
        rows = self.logits.shape

        def of(x: Tensor | float) -> Tensor | float:
            return change(x.expand(rows)) if isinstance(x, Tensor) else x

        logits, target, den = change(self.logits), change(self.target), change(self.den)
        weight, positive = of(self.weight), of(self.positive)
        return replace(self, logits=logits, target=target, den=den, weight=weight, positive=positive)


def numerators(
    kind: str, logits: Tensor, target: Tensor, weight: Tensor | float = 1.0, positive: Tensor | float = 1.0
) -> Tensor:
    """Numerators of the loss by row, from the parts of a :class:`HeadLoss`."""
    if kind == "cross_entropy":
        shares = logits.log_softmax(-1)  # -inf for a class that is masked, which has no share in the loss
        masked = (shares == -torch.inf) & (target == 0)
        return -(target * shares.masked_fill(masked, 0)).sum(-1)
    if kind == "squared_error":
        return (weight * (logits - target) ** 2).sum(-1)
    return (weight * (positive * target * F.softplus(-logits) + (1 - target) * F.softplus(logits))).sum(-1)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> HeadLoss:
    """``torch.nn.functional.cross_entropy``, taken apart.

    Args:
        logits: ``(rows, C)``.
        targets: classes, int64 ``(rows,)``, or probabilities ``(rows, C)``, which need not sum to 1.
        weight: class weights, ``(C,)``.
        label_smoothing: share of the uniform distribution.
        ignore_index: class that does not count.

    Raises:
        DebiasError: the shapes do not fit.
    """
    _check_logits(logits)
    classes = logits.shape[1]
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            raise _wrong_targets("cross-entropy", targets, f"probabilities of shape {tuple(logits.shape)}")
        mass, den = targets.to(logits.dtype), logits.new_ones(logits.shape[0])
        smooth: Tensor | float = label_smoothing / classes
    elif targets.shape == logits.shape[:1] and targets.dtype != torch.bool:
        counts = targets != ignore_index
        mass = (targets.unsqueeze(1) == torch.arange(classes, device=logits.device)).to(logits.dtype)
        if 0 <= ignore_index < classes:  # another one has no column anyway
            mass = mass * counts.unsqueeze(1)
        den = counts.to(logits.dtype)
        smooth = den.unsqueeze(1) * (label_smoothing / classes) if label_smoothing else 0.0
        if weight is not None:
            den = (mass * weight.to(logits.dtype)).sum(1)
    else:
        raise _wrong_targets(
            "cross-entropy", targets,
            f"classes, int64 {tuple(logits.shape[:1])}, or probabilities {tuple(logits.shape)}",
        )  # fmt: skip
    if label_smoothing:
        mass = mass * (1 - label_smoothing) + smooth
    if weight is not None:
        mass = mass * weight.to(logits.dtype)
    return HeadLoss("cross_entropy", logits, mass, den)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> HeadLoss:
    """``torch.nn.functional.binary_cross_entropy_with_logits``, taken apart; one or more labels a sample.

    Args:
        logits: ``(rows, C)`` or ``(rows,)``.
        targets: floating-point, of the same shape.
        weight: weights broadcastable to the logits.
        pos_weight: weights of the positive elements, broadcastable to the logits.

    Raises:
        DebiasError: the shapes do not fit.
    """
    targets = _elementwise("binary cross-entropy", logits, targets)
    shape = logits.shape
    logits, targets = _columns(logits), _columns(targets)
    den = logits.new_full((len(logits),), float(logits.shape[1]))
    return HeadLoss(
        "binary_cross_entropy", logits, targets, den, _weight(weight, logits, shape), _weight(pos_weight, logits, shape)
    )


def squared_error(logits: Tensor, targets: Tensor, *, weight: Tensor | None = None) -> HeadLoss:
    """``torch.nn.functional.mse_loss``, taken apart; with weights the mean is divided by their sum.

    Args:
        logits: predictions ``(rows, C)`` or ``(rows,)``.
        targets: of the same shape.
        weight: weights of the same shape.

    Raises:
        DebiasError: the shapes do not fit.
    """
    targets = _elementwise("squared error", logits, targets)
    shape = logits.shape
    logits, targets = _columns(logits), _columns(targets)
    weights = _weight(weight, logits, shape)
    ones = torch.ones_like(logits, requires_grad=False)
    return HeadLoss("squared_error", logits, targets, (weights * ones).sum(1), weights)


_MAKERS: dict[str, Callable[..., HeadLoss]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy,
    "squared_error": squared_error,
    "mse_loss": squared_error,
}


def make_head_loss(loss: str, logits: Tensor, targets: Tensor, **options: Any) -> HeadLoss:
    """The loss of this name, taken apart.

    Args:
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``; torch's names
            ``"binary_cross_entropy_with_logits"`` and ``"mse_loss"`` mean the same.
        logits: see the function of that name.
        targets: see the function of that name.
        **options: ``weight``, ``label_smoothing``, ``ignore_index``, ``pos_weight``, where the loss has them.

    Raises:
        DebiasError: another loss.
    """
    if loss not in _MAKERS:
        raise DebiasError(
            "Expected the loss to be cross_entropy, binary_cross_entropy_with_logits or mse_loss, whose derivatives"
            f" with respect to the logits are known, but got {loss!r}. Choose one of them, or a penalty that only needs"
            " losses or features (VREx, CORAL, MMD)."
        )
    return _MAKERS[loss](logits, targets, **options)


def filled(value: Tensor | float, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as it is, or a number on the device of another tensor, without a copy that the host waits for."""
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full(shape, value)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2:
        raise DebiasError(
            f"Expected `logits` to have shape (N, C), one row for each sample, but got {tuple(logits.shape)}. Flatten"
            " positions into rows before the loss, or use a penalty that only needs losses (VREx)."
        )


def _columns(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 1 else x


def _elementwise(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    if logits.ndim not in (1, 2):
        _check_logits(logits)
    if targets.shape != logits.shape or not targets.is_floating_point():
        raise _wrong_targets(name, targets, f"floating-point of shape {tuple(logits.shape)}")
    return targets.to(logits.dtype)


def _weight(weight: Tensor | None, logits: Tensor, shape: torch.Size) -> Tensor | float:
    """Weights that broadcast to logits of this original shape, as broadcastable to ``(rows, C)``."""
    if weight is None:
        return 1.0
    weight = weight.detach().to(logits.dtype)
    return weight.expand(shape).reshape(logits.shape)


def _wrong_targets(name: str, targets: Tensor, rule: str) -> DebiasError:
    return DebiasError(
        f"Expected the targets of the {name} to be {rule}, but got {targets.dtype} of shape {tuple(targets.shape)}."
    )
