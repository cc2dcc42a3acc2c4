"""Gradients and Hessians of the classifier head by domain, in closed form.

For a linear head ``z_i = W f_i + b`` every derivative of the loss with respect to ``(W, b)`` is made of three things,
the head's input ``a_i = (f_i, 1)``, the residual ``r_i = d l_i / d z_i``, the curvature ``S_i = d^2 l_i / d z_i^2``::

    gradient of sample i            r_i (x) a_i
    mean gradient of domain e       G_e = sum_i w_ie r_i (x) a_i
    Hessian times V                 H_e V = sum_i w_ie (S_i V a_i) (x) a_i
    diagonal of the Hessian         sum_i w_ie diag(S_i) (x) a_i^2
    trace                           sum_i w_ie tr(S_i) |a_i|^2
    <H_a, H_b>                      sum_ij w_ia w_jb <S_i, S_j> <a_i, a_j>^2          (Gram identity)

with ``w_ie = 1 / (denominators of domain e)`` for the samples of e, 0 for others. Each is one matrix product over all
domains; no ``(N, C, d)`` tensor is made, and gradients of a penalty built from them need one ordinary backward pass.
Every sum over samples is a sum over ranks too, so the statistics are those of the global batch.

The losses, with ``t`` the targets (soft, smoothed and weighted), m their sum, p the softmax, s the sigmoid:

====================  ======================  ==================================  ==============
loss                  r                       S v                                 denominator
====================  ======================  ==================================  ==============
cross-entropy         m p - t                 m (p * v - p <p, v>)                class weight
binary cross-entropy  w (s (t c + 1 - t)      w (t c + 1 - t) s (1 - s) * v       C
                      - t c)
squared error         2 w (z - t)             2 w v                               C (or sum of w)
====================  ======================  ==================================  ==============

(c is ``pos_weight``, w the element's weight.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.distributed import gather, global_sum, is_distributed

__all__ = [
    "HeadLoss",
    "HeadStatistics",
    "binary_cross_entropy",
    "cross_entropy",
    "distances_from",
    "filled",
    "domain_mean",
    "make_head_loss",
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
    """

    kind: Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
    logits: Tensor
    target: Tensor
    den: Tensor
    weight: Tensor | float = 1.0
    positive: Tensor | float = 1.0

    @property
    def elements(self) -> int:
        """How many terms the loss of one sample is the mean of."""
        return 1 if self.kind == "cross_entropy" else self.logits.shape[1]

    def num(self, logits: Tensor) -> Tensor:
        """Numerators ``(rows,)`` for other logits of the same rows."""
        return numerators(self.kind, logits, self.target, self.weight, self.positive)

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
            return HeadLoss(self.kind, self.logits, self.target * num, self.den * den[:, 0])
        of_rows = (self.element_den * den).sum(1)
        return HeadLoss(self.kind, self.logits, self.target, of_rows, self.weight * num, self.positive)

    def map(self, change: Callable[[Tensor], Tensor]) -> HeadLoss:
        """The same loss with every tensor changed row by row, e.g. detached or gathered over ranks."""
        rows = self.logits.shape

        def of(x: Tensor | float) -> Tensor | float:
            return change(x.expand(rows)) if isinstance(x, Tensor) else x

        return HeadLoss(
            self.kind, change(self.logits), change(self.target), change(self.den), of(self.weight), of(self.positive)
        )


def numerators(
    kind: str, logits: Tensor, target: Tensor, weight: Tensor | float = 1.0, positive: Tensor | float = 1.0
) -> Tensor:
    """Numerators of the loss by row, from the parts of a :class:`HeadLoss`."""
    if kind == "cross_entropy":
        shares = logits.log_softmax(-1)  # -inf for a class that is masked
        return -(target * torch.where((target != 0) | shares.isfinite(), shares, 0)).sum(-1)
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


@dataclass(eq=False)
class HeadStatistics:
    """Statistics of a linear head by domain, over the global batch.

    Args:
        features: input of the head, ``(rows, d)``.
        loss: the loss of the rows.
        members: which row is in which domain, boolean ``(rows, E)``; a row may be in none.
        bias: whether the head has one; then all statistics have ``d + 1`` columns, the last for the bias.

    Attributes:
        den: denominators by domain, ``(E,)``, without gradient; 0 for a domain that is absent.
        counts: samples that count by domain, ``(E,)``.
        membership: the members as numbers, ``(rows, E)``.
    """

    features: Tensor
    loss: HeadLoss
    members: Tensor
    bias: bool = True
    den: Tensor = field(init=False)
    counts: Tensor = field(init=False)
    membership: Tensor = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            den = self.loss.den
            self.membership = self.members.to(den.dtype)
            self.den, self.counts = global_sum(torch.stack((den, (den != 0).to(den.dtype))) @ self.membership)

    @cached_property
    def present(self) -> Tensor:
        """Which domains are in the global batch, boolean ``(E,)``."""
        return self.den != 0

    @cached_property
    def shares(self) -> Tensor:
        """Weight of each row in its domain's mean, ``(rows, E)``."""
        return self.membership * (self.den + (self.den == 0)).reciprocal()

    @cached_property
    def sample_shares(self) -> Tensor:
        """One over the number of samples in the row's domain, whatever they weigh, ``(rows, E)``."""
        counted = self.members & (self.loss.den != 0).unsqueeze(1)
        return torch.where(counted, 1 / self.counts.clamp_min(1), 0)

    @cached_property
    def mean_shares(self) -> Tensor:
        """Weight of each row in the mean over domains, ``(rows, 1)``."""
        return self.shares @ self.domain_shares.unsqueeze(1)

    @cached_property
    def domain_shares(self) -> Tensor:
        """Weight of each domain in the mean over those that are present, ``(E,)``."""
        present = self.present.to(self.features.dtype)
        return present / present.sum().clamp_min(1)

    def spread(self, rows: Tensor, shares: Tensor | None = None) -> Tensor:
        """Coefficients ``shares_ie rows_i``, ``(rows, E, C)``, from ``(rows, C)`` or ``(rows, E, C)``."""
        weights = self.shares if shares is None else shares
        return weights.unsqueeze(2) * (rows.unsqueeze(1) if rows.ndim == 2 else rows)

    def sums(self, coefficients: Tensor, *, squared: bool = False) -> Tensor:
        """``sum_i c_ie (x) a_i``, or of the squares of the a_i, from coefficients ``(rows, k, C)``; ``(k, C, D)``,
        summed over ranks.
        """
        sums = _Sums.apply(coefficients.flatten(1), self.features, self.bias, squared)
        return global_sum(sums).unflatten(0, coefficients.shape[1:])

    @cached_property
    def residuals(self) -> Tensor:
        """Coefficients of the mean gradients, ``(rows, E, C)``."""
        return self.spread(self.loss.residuals)

    @cached_property
    def gradients(self) -> Tensor:
        """Mean gradients G_e, ``(E, C, D)``; 0 for an absent domain."""
        return self.sums(self.residuals)

    def images(self, vectors: Tensor) -> Tensor:
        """``V a_i`` for every row i, from vectors ``(..., D)``; ``(rows, ...)``."""
        flat, width = vectors.flatten(0, -2), self.features.shape[1]
        weight, bias = (flat[:, :width], flat[:, width]) if self.bias else (flat, None)
        return F.linear(self.features, weight, bias).unflatten(1, vectors.shape[:-1])

    def hessian_vector(self, vectors: Tensor) -> Tensor:
        """``H_e V_e`` for vectors ``(E, C, D)``; ``(E, C, D)``."""
        return self.sums(self.spread(self.loss.curvature(self.images(vectors))))

    def mean_hessian_vector(self, vector: Tensor) -> Tensor:
        """``(mean of the H_e) V`` for one vector ``(C, D)``; ``(C, D)``."""
        curved = self.loss.curvature(self.images(vector))
        return self.sums(self.spread(curved, self.mean_shares))[0]

    @cached_property
    def diagonals(self) -> Tensor:
        """Diagonals of the Hessians, ``(E, C, D)``."""
        return self.sums(self.spread(self.loss.diagonal), squared=True)

    @cached_property
    def traces(self) -> Tensor:
        """Traces of the Hessians, ``(E,)``."""
        of_rows = self.loss.diagonal.sum(1) * (self.features.square().sum(1) + self.bias)
        return global_sum((self.shares * of_rows.unsqueeze(1)).sum(0))

    @cached_property
    def gradient_variances(self) -> Tensor:
        """Variance of the samples' gradients by domain, ``(E, C, D)``; 0 for one sample and for none.

        A sample's gradient is that of its own loss: the mean over its labels, and without division by the batch.
        """
        residuals = self.loss.residuals / self.loss.elements
        mean = self.sums(self.spread(residuals, self.sample_shares))
        return self.sums(self.spread(residuals.square(), self.sample_shares), squared=True) - mean.square()

    # -- squared distances from the mean over domains, ``(E,)``; relative ones are divided by the domains' mean squared
    # norm, or that of the target where it is larger, through which no gradient goes --

    def scale(self, relative: bool) -> Tensor | None:
        """Weights of the domains in the mean that relative distances are divided by."""
        return self.domain_shares if relative else None

    def by_pairs(self, cheaper: int) -> bool:
        """Whether distances are computed from inner products of samples, without making a ``(E, C, D)`` tensor.

        They cost ``rows^2 D``, where sums cost ``rows E C D``, ``cheaper`` times over. Over several ranks sums are
        taken, so that no sample leaves its rank.
        """
        return (
            not is_distributed() and len(self.features) <= cheaper * self.members.shape[1] * self.loss.logits.shape[1]
        )

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """Inner products of the inputs, ``(rows, rows)``, see :class:`_Gram`."""
        return _Gram.apply(self.features, self.bias)

    def gradient_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|G_e - mean G|^2``."""
        if "gram" in vars(self) or self.by_pairs(2):  # made already where the Hessian's products were compared first
            target = self.mean_shares * self.loss.residuals
            return distances_by_pairs(self.residuals, target, self.gram, detach_target, self.scale(relative))
        return distances_from(self.gradients, self.mean(self.gradients), detach_target, self.scale(relative))

    def product_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|H_e G_e - (mean H)(mean G)|^2``."""
        by_pairs = self.by_pairs(5)
        images = _times(self.gram[0], self.residuals) if by_pairs else self.images(self.gradients)
        own = self.spread(self.loss.curvature(images))
        target = self.mean_shares * self.loss.curvature(self.mean(images, 1))
        if by_pairs:
            return distances_by_pairs(own, target, self.gram, detach_target, self.scale(relative))
        both = self.sums(torch.cat((own, target.unsqueeze(1)), 1))
        return distances_from(both[:-1], both[-1], detach_target, self.scale(relative))

    def diagonal_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|diag H_e - mean diag H|^2``."""
        if not self.by_pairs(2):
            return distances_from(self.diagonals, self.mean(self.diagonals), detach_target, self.scale(relative))
        own = self.spread(self.loss.diagonal)
        gram = _Gram.apply(self.features.square(), self.bias)
        return distances_by_pairs(own, self.mean(own, 1), gram, detach_target, self.scale(relative))

    def squared_hessian_distances(self, *, detach_target: bool = False, relative: bool = False) -> Tensor:
        """``|H_e - mean H|^2`` (Frobenius) by the Gram identity.

        Samples are compared in pairs, so the rows of all ranks are gathered: memory ``(rows of all ranks)^2``.
        """
        inputs, shares = gather(self.features), gather(self.shares)
        loss = self.loss.map(gather)
        left, right = (loss, inputs), (loss.map(Tensor.detach), inputs.detach()) if detach_target else (loss, inputs)
        products = right[0].inner(left[0]) * (left[1] @ right[1].T + self.bias).square()
        # H_e - mean H is a sum over samples, too: squared as it is, not as a difference of squares, which would cancel.
        mean = self.mean(shares, dim=1).unsqueeze(1)
        difference = shares - mean
        towards = products @ difference
        moving = (difference * towards).sum(0)
        value = moving.detach().clamp_min(0)
        if detach_target:
            # The norm is symmetric, so its gradient is twice that with one side held fixed; H_e alone moves.
            moving = 2 * (shares * towards).sum(0)
        squared = value + (moving - moving.detach())
        if not relative:
            return squared
        with torch.no_grad():
            norms = (shares * (products @ shares)).sum(0)
            norm = _norm(norms, (mean * (products @ mean)).sum(), self.domain_shares)
        return squared / norm

    def mean(self, values: Tensor, dim: int = 0) -> Tensor:
        """Mean over the domains that are present, along ``dim``; those of an absent one are finite."""
        shape = [1] * values.ndim
        shape[dim] = -1
        return (values * self.domain_shares.view(shape)).sum(dim)


def distances_from(own: Tensor, target: Tensor, detach_target: bool, scale: Tensor | None) -> Tensor:
    """``|own_e - target|^2``, ``(E,)``; relative with weights ``(E,)``, see :meth:`HeadStatistics.scale`."""
    target = target.detach() if detach_target else target
    squared = (own - target).square().flatten(1).sum(1)
    if scale is None:
        return squared
    return squared / _norm(own.detach().square().flatten(1).sum(1), target.detach().square().sum(), scale)


def distances_by_pairs(
    own: Tensor, target: Tensor, gram: tuple[Tensor, Tensor], detach_target: bool, scale: Tensor | None
) -> Tensor:
    """``|sum_i c_ie (x) x_i - sum_i t_i (x) x_i|^2``, ``(E,)``, from inner products of the x.

    Args:
        own: coefficients c, ``(rows, E, C)``.
        target: coefficients t, ``(rows, C)``.
        gram: see :class:`_Gram`.
        detach_target: take no gradient through the second sum.
        scale: weights ``(E,)`` of relative distances, see :meth:`HeadStatistics.scale`.
    """
    squared = _PairDistances.apply(own, target, *gram, detach_target)
    if scale is None:
        return squared
    with torch.no_grad():
        norms = (own * _times(gram[0], own)).sum((0, 2))
        norm = _norm(norms, (target * (gram[0] @ target)).sum(), scale)
    return squared / norm


def _norm(own: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """What relative distances are divided by, from squared norms ``(E,)`` and that of the target."""
    norm = torch.maximum(own @ scale, target)
    limits = torch.finfo(norm.dtype)
    return torch.where(norm > limits.tiny / limits.eps, norm, 1)  # one over less could overflow


def _times(gram: Tensor, coefficients: Tensor) -> Tensor:
    return (gram @ coefficients.flatten(1)).unflatten(1, coefficients.shape[1:])


class _Sums(torch.autograd.Function):
    """``sum_i c_ik x_i``, or of the squares of the x_i, with ``sum_i c_ik`` as a last column for a bias, ``(K, D)``.

    The features are many more numbers than the sums, so what costs time is to go over them: no copy with a column of
    ones is made, and the derivative of the square is one pass over the gradient.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, x: Tensor, bias: bool, squared: bool) -> Tensor:
        values = x * x if squared else x
        ctx.save_for_backward(coefficients, values, x if squared else None)
        sums = coefficients.T @ values
        return torch.cat((sums, coefficients.sum(0).unsqueeze(1)), 1) if bias else sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        coefficients, values, x = ctx.saved_tensors
        width = values.shape[1]
        of_sums = gradient[:, :width]
        to_coefficients = to_x = None
        if ctx.needs_input_grad[0]:
            of_bias = gradient[:, width] if gradient.shape[1] > width else None
            to_coefficients = F.linear(values, of_sums, of_bias)
        if ctx.needs_input_grad[1]:
            to_x = coefficients @ of_sums if x is None else (2 * coefficients @ of_sums).mul_(x)
        return to_coefficients, to_x, None, None


class _Gram(torch.autograd.Function):
    """Inner products ``<x_i, x_j>`` of rows, plus 1 for a bias, twice: differentiated on both sides, and on the left
    only. One product backward for both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        gram = x @ x.T
        gram = gram.add_(1) if bias else gram
        ctx.set_materialize_grads(False)
        return gram, gram.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, both: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        parts = ([] if both is None else [both, both.T]) + ([] if left is None else [left])
        return (functools.reduce(torch.add, parts) @ x if parts else None), None


class _PairDistances(torch.autograd.Function):
    """``sum_ij <d_ie, d_je> <x_i, x_j>`` by domain e with ``d = own - target``.

    With the target held fixed the sum of the ``d_ie (x) x_i`` moves only where its ``own_ie (x) x_i`` do: the gradient
    to the inner products is one to their left side.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, target: Tensor, both: Tensor, left: Tensor, detach_target: bool) -> Tensor:
        difference = own - target.unsqueeze(1)
        products = _times(both, difference)
        ctx.save_for_backward(own, difference, products)
        ctx.detach_target = detach_target
        return (difference * products).sum((0, 2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, difference, products = ctx.saved_tensors
        twice = (2 * gradient).view(-1, 1)
        to_own = twice * products
        if ctx.detach_target:
            return to_own, None, None, (twice * own).flatten(1) @ difference.flatten(1).T, None
        to_both = (twice * difference).flatten(1) @ difference.flatten(1).T
        return to_own, -to_own.sum(1), to_both / 2, None, None


def filled(value: Tensor | float, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as it is, or a number on the device of another tensor, without a copy that the host waits for."""
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full(shape, value)


def domain_mean(values: Tensor, present: Tensor, dim: int = 0) -> Tensor:
    """Mean over the domains that are present; 0 if none is.

    Args:
        values: E values along ``dim``.
        present: boolean ``(E,)``.
        dim: the axis of domains.
    """
    shape = [1] * values.ndim
    shape[dim] = -1
    return torch.where(present.view(shape), values, 0).sum(dim) / present.sum().clamp_min(1)


def make_members(domains: Tensor, n_domains: int, rows: int) -> Tensor:
    """Which row is in which domain, boolean ``(rows, E)``, from ids ``(rows,)``, negative where unlabelled, or a
    membership.

    Raises:
        DebiasError: the shapes do not fit.
    """
    fits = domains.shape == (rows,) and not domains.is_floating_point() and domains.dtype != torch.bool
    if not fits and not (domains.dtype == torch.bool and domains.shape == (rows, n_domains)):
        raise DebiasError(
            f"Expected `domains` to be integer ids of shape ({rows},), -1 for unlabelled, or a boolean membership of"
            f" shape ({rows}, {n_domains}), but got {domains.dtype} of shape {tuple(domains.shape)}."
        )
    if domains.dtype == torch.bool:
        return domains
    return domains.unsqueeze(1) == torch.arange(n_domains, device=domains.device)


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
