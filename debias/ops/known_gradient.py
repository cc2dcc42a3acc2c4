"""A value whose gradient is computed with it, in closed form: backward is one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debias.errors import DebiasError

__all__ = ["known_gradient"]


def known_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` forward; backward gives ``gradient`` to ``x``. A second derivative is refused.

    Args:
        x: what the value is a function of.
        value: scalar, computed without autograd.
        gradient: of the value, shaped like ``x``.
    """
    known: Tensor = _KnownGradient.apply(x, value, gradient)
    return known


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradient = _Refused.apply(x, gradient)
        return grad * gradient, None, None


class _Refused(torch.autograd.Function):
    """The gradient as a function of ``x`` that cannot be differentiated, also by ``torch.autograd.grad(..., x)``, which
    passes by torch's own mark.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise DebiasError(
            "Expected this penalty to be differentiated once, but got a second derivative. Its gradient is a closed"
            " form; write the penalty with torch's own operations to differentiate it again."
        )
