"""Sums over samples that a head's statistics are made of, and squared distances between them.

The features are many more numbers than the sums, so what costs time is to go over them: derivatives are written out
where autograd's own would go over them more often.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from debias.ops.head_losses import HeadLoss

__all__ = [
    "distances_by_pairs",
    "distances_from",
    "gram_of",
    "hessian_distances_by_pairs",
    "in_blocks",
    "sums_over_rows",
    "times",
]

# Numbers that a table of rows by something may hold at once; larger ones are made in blocks of rows, backward anew.
_AT_ONCE = 2**22


def distances_from(own: Tensor, target: Tensor, detach_target: bool, scale: Tensor | None) -> Tensor:
    """``|own_e - target|^2``, ``(E,)``; relative with weights ``(E,)``, see :meth:`HeadStatistics.scale`."""
    target = target.detach() if detach_target else target
    squared = (own - target).square().flatten(1).sum(1)
    if scale is None:
        return squared
    return squared / _norm(own.detach().square().flatten(1).sum(1), target.detach().square().sum(), scale)


def distances_by_pairs(
    coefficients: Tensor, gram: tuple[Tensor, Tensor], detach_target: bool, scale: Tensor | None
) -> Tensor:
    """``|sum_i c_ie (x) x_i - sum_i t_i (x) x_i|^2``, ``(E,)``, from inner products of the x.

    Args:
        coefficients: c and, last, t; ``(rows, E + 1, C)``.
        gram: see :func:`gram_of`.
        detach_target: take no gradient through the second sum.
        scale: weights ``(E,)`` of relative distances, see :meth:`HeadStatistics.scale`.
    """
    squared: Tensor = _PairDistances.apply(coefficients, *gram, detach_target)
    if scale is None:
        return squared
    with torch.no_grad():
        norms = (coefficients * times(gram[0], coefficients)).sum((0, 2))
        norm = _norm(norms[:-1], norms[-1], scale)
    return squared / norm


def hessian_distances_by_pairs(
    features: Tensor, bias: bool, loss: HeadLoss, shares: Tensor, domains: Tensor, detach_target: bool, relative: bool
) -> Tensor:
    """``|H_e - mean H|^2`` (Frobenius) by the Gram identity, ``(E,)``; memory of a block of rows by all of them.

    Args:
        features: ``(rows, d)``.
        bias: whether the head has one.
        loss: of these rows.
        shares: weight of each row in its domain's mean, ``(rows, E)``.
        domains: weight of each domain in the mean over them, ``(E,)``.
        detach_target: take no gradient through ``mean H``.
        relative: divide by the mean squared norm.
    """
    mean = (shares * domains).sum(1, keepdim=True)
    difference = shares - mean  # H_e - mean H is a sum over samples, too: squared as it is, not as a difference
    fixed = Tensor.detach if detach_target else lambda x: x

    def of_rows(rows: slice) -> Tensor:
        inner = loss.map(fixed).inner(loss.map(lambda x: x[rows]))
        products = inner * (features[rows] @ fixed(features).T + bias).square()
        towards = products @ difference
        value = (difference[rows] * towards).sum(0)
        # The norm is symmetric, so its gradient is twice that with one side held fixed; H_e alone moves.
        moving = 2 * (shares[rows] * towards).sum(0) if detach_target else value
        if not relative:
            return torch.stack((value, moving))
        with torch.no_grad():
            own = (shares[rows] * (products @ shares)).sum(0)
            target = (mean[rows] * (products @ mean)).sum().expand(own.shape)
        return torch.stack((value, moving, own, target))

    value, moving, *norms = in_blocks(of_rows, len(features), len(features))
    squared = value.detach().clamp_min(0) + (moving - moving.detach())
    return squared / _norm(norms[0].detach(), norms[1][0].detach(), domains) if relative else squared


def in_blocks(of_rows: Callable[[slice], Tensor], rows: int, width: int) -> Tensor:
    """A sum over rows that makes ``width`` numbers of each, in blocks that bound the memory of forward and backward."""
    if rows * width <= _AT_ONCE:
        return of_rows(slice(None))
    size = max(1, _AT_ONCE // width)
    blocks = [slice(start, start + size) for start in range(0, rows, size)]
    parts = [checkpoint(of_rows, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return functools.reduce(torch.add, parts)


def _norm(own: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """What relative distances are divided by, from squared norms ``(E,)`` and that of the target."""
    norm = torch.maximum(own @ scale, target)
    limits = torch.finfo(norm.dtype)
    return torch.where(norm > limits.tiny / limits.eps, norm, 1)  # one over less could overflow


def times(gram: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_j <x_i, x_j> c_j``, ``(rows, ...)``."""
    return (gram @ coefficients.flatten(1)).view(coefficients.shape)


def sums_over_rows(coefficients: Tensor, x: Tensor, *, bias: bool, squared: bool = False) -> Tensor:
    """``sum_i c_i (x) x_i``, or of the squares of the x_i, with ``sum_i c_i`` as a last column for a bias.

    Args:
        coefficients: ``(rows, ..., C)``.
        x: ``(rows, d)``.
        bias: whether there is the last column.
        squared: of the squares.

    Returns:
        ``(..., C, D)``, differentiable once.
    """
    sums: Tensor = _Sums.apply(coefficients.flatten(1), x, bias, squared)
    return sums.view(*coefficients.shape[1:], -1)


class _Sums(torch.autograd.Function):
    """No copy with a column of ones is made, and the derivative of the square is one pass over the gradient."""

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


def gram_of(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Inner products ``<x_i, x_j>`` of rows, plus 1 for a bias, twice: differentiated on both sides, and on the left
    only. One product backward for both.
    """
    both, left = _Gram.apply(x, bias)
    return both, left


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        gram = x @ x.T
        gram = gram.add_(1) if bias else gram
        ctx.set_materialize_grads(False)
        return gram, gram.view_as(gram)

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
    def forward(ctx: Any, coefficients: Tensor, both: Tensor, left: Tensor, detach_target: bool) -> Tensor:
        own, target = coefficients.tensor_split([coefficients.shape[1] - 1], 1)
        difference = own - target
        products = times(both, difference)
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
            to_gram = (twice * own).flatten(1) @ difference.flatten(1).T
            return F.pad(to_own, (0, 0, 0, 1)), None, to_gram, None
        to_gram = (twice * difference).flatten(1) @ difference.flatten(1).T
        return torch.cat((to_own, -to_own.sum(1, keepdim=True)), 1), to_gram / 2, None, None
