"""Gradient reversal: identity forward, gradient times ``-strength`` backward. Ganin et al., JMLR 2016, section 4.2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from debias.ops.arguments import checked

__all__ = ["GradientReversal", "dann_ramp", "gradient_reversal"]


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None


@checked("x: float ...")
def gradient_reversal(x: Tensor, strength: float = 1.0) -> Tensor:
    """``x`` itself; in backward its gradient is multiplied by ``-strength``.

    Args:
        x: floating point, any shape.
        strength: lambda. At 0 the result is detached, so that not even a NaN gets through.

    Returns:
        Tensor of the same shape and values.

    Example:
        >>> import torch
        >>> from debias.functional import gradient_reversal
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient_reversal(x, strength=0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    return x.detach() if strength == 0 else _Reversal.apply(x, strength)


class GradientReversal(nn.Module):
    """:func:`gradient_reversal` as a layer.

    Args:
        strength: lambda; may be set anew at any time.

    Example:
        >>> import torch
        >>> from debias import GradientReversal
        >>> adversary = torch.nn.Sequential(GradientReversal(2.0), torch.nn.Linear(3, 4))
    """

    @checked()
    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        """``x``, with its gradient reversed."""
        return gradient_reversal(x, self.strength)

    def extra_repr(self) -> str:
        """The strength, for ``print``."""
        return f"strength={self.strength}"


@checked(progress="[0, inf)", gamma="[0, inf)")
def dann_ramp(progress: float, *, gamma: float = 10.0) -> float:
    """DANN's schedule of the strength, from 0 to 1: ``2 / (1 + exp(-gamma p)) - 1`` (Ganin et al., section 5.2.2).

    Args:
        progress: share p of training that is over; beyond 1 it counts as 1.
        gamma: steepness; published: 10.

    Returns:
        The factor of the strength.

    Example:
        >>> from debias.functional import dann_ramp
        >>> [round(dann_ramp(p), 3) for p in (0, 0.1, 0.5, 1)]
        [0.0, 0.462, 0.987, 1.0]
    """
    return 2 / (1 + math.exp(-gamma * min(progress, 1.0))) - 1
