"""Styles of feature maps: mean and standard deviation of each channel of each sample, and how to replace them.

Feature maps are ``(N, C, H, W)``; tokens of a vision transformer are ``(N, T, D)``, where the tokens take the place of
the pixels and the width ``D`` that of the channels.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from debias.ops.arguments import checked
from debias.ops.distributed import global_sum

__all__ = ["batch_std", "restyle", "style", "style_shape", "uncertain_style"]


def style(x: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of each sample.

    Args:
        x: feature maps ``(N, C, H, W)`` or tokens ``(N, T, D)``.
        eps: added to the variance, which is unbiased; of a single pixel it is 0.

    Returns:
        Means and ``sqrt(variance + eps)``, at least float32, ``(N, C, 1, 1)`` or ``(N, 1, D)``.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean, std = _Style.apply(x, eps)
    return mean, std


class _Style(torch.autograd.Function):
    """Mean and standard deviation, whose gradient is one pass over ``x`` where autograd's own takes five."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dims, pixels = _pixels(x)
        if x.device.type == "cpu":  # there torch's `var_mean` takes ten times as long as these passes
            mean = x.mean(dims, keepdim=True)
            variance = (x - mean).square().sum(dims, keepdim=True) / max(pixels - 1, 1)
        else:
            variance, mean = torch.var_mean(x, dims, correction=int(pixels > 1), keepdim=True)
        return mean, (variance + eps).sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # d mean / d x = 1 / pixels, d std / d x = (x - mean) / std / (pixels - 1).
        for_mean, for_std = gradients
        x, mean, std = ctx.saved_tensors
        _, pixels = _pixels(x)
        slope = for_std / (std * max(pixels - 1, 1))
        return torch.addcmul(for_mean / pixels - mean * slope, x, slope), None


def _pixels(x: Tensor) -> tuple[tuple[int, ...], int]:
    """The dimensions of pixels or tokens, and how many of them a channel has."""
    dims = (2, 3) if x.ndim == 4 else (1,)
    return dims, prod(x.shape[d] for d in dims)


def restyle(x: Tensor, mean: Tensor, std: Tensor, new_mean: Tensor, new_std: Tensor) -> Tensor:
    """``(x - mean) / std * new_std + new_mean`` in one pass over ``x``, in its dtype."""
    scale = new_std / std
    shift = new_mean - mean * scale
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.addcmul(shift, x.float(), scale).to(x.dtype)
    return torch.addcmul(shift, x, scale)


def batch_std(values: Tensor, *, eps: float = 1e-6, sync: bool = False) -> Tensor:
    """How much a statistic varies from sample to sample: ``sqrt(variance over the batch + eps)``, unbiased.

    Args:
        values: one statistic, ``(N, ...)``, differentiable.
        eps: added to the variance, which is 0 for a single sample and for none.
        sync: over the batches of all ranks. Then every rank has to call this, with the same trailing shape.

    Returns:
        Standard deviations ``(1, ...)``.
    """
    n = values.shape[0]
    if not sync and not n:
        return values.new_full((1, *values.shape[1:]), eps**0.5)
    if not sync:
        return (values.var(0, correction=int(n > 1), keepdim=True) + eps).sqrt()
    # Two reductions, for the mean first: a difference of squares would cancel.
    total = global_sum(torch.cat([values.sum(0).flatten(), values.new_full((1,), float(n))]))
    count = total[-1].detach()
    mean = (total[:-1] / count.clamp_min(1)).view(values.shape[1:])
    squares = global_sum(((values - mean) ** 2).sum(0, keepdim=True))
    return (squares / (count - 1).clamp_min(1) + eps).sqrt()


def style_shape(x: Tensor) -> tuple[int, int]:
    """Samples and channels of feature maps ``(N, C, H, W)`` or tokens ``(N, T, D)``."""
    return x.shape[0], x.shape[1] if x.ndim == 4 else x.shape[2]


@checked("x: float N C H W | float N T C, noise: float 2 N C", factor="[0, inf)", eps="[0, inf)")
def uncertain_style(
    x: Tensor, noise: Tensor, *, factor: float = 1.0, eps: float = 1e-6, sync_stats: bool = False
) -> Tensor:
    """Feature maps whose styles are drawn anew.

    Args:
        x: feature maps ``(N, C, H, W)`` or tokens ``(N, T, D)``.
        noise: standard normal numbers for means and standard deviations, ``(2, N, C)`` or ``(2, N, D)``.
        factor: scales the noise.
        eps: added to variances.
        sync_stats: take the spread over the batches of all ranks; then all ranks have to call this.

    Returns:
        The same shape and dtype; differentiable, also through the statistics.
    """
    mean, std = style(x, eps=eps)
    spread = batch_std(torch.stack((mean, std), dim=1), eps=eps, sync=sync_stats).unbind(1)
    for_mean, for_std = (factor * noise.to(mean.dtype)).view(2, *mean.shape)
    return restyle(x, mean, std, mean + for_mean * spread[0], std + for_std * spread[1])
