"""Shifts by filters: artistic, blur, convolutional, edges.

Lengths were published in pixels of photographs of about 224 px. Here they are shares of the shorter side, with a least
length in pixels, so that a small image changes, too, and does not vanish.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.ops.shifts._kornia import filters
from debias.ops.shifts.draws import Draws
from debias.ops.shifts.pixels import ONE, as_rgb, constant, luminance

__all__ = ["ARTISTIC", "BLUR", "CONVOLUTIONAL", "EDGES", "smooth"]

_ELEMENTS = 2**26  # of the largest intermediate tensor, where a filter lays out the window of every pixel


def _length(x: Tensor, at_224: float, least: float) -> float:
    return max(at_224 * min(x.shape[2:]) / 224, least)


def _odd(length: float) -> int:
    return 2 * round((length - 1) / 2) + 1


def _in_parts(x: Tensor, window: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` on as many images at once as fit into memory."""
    size = max(1, _ELEMENTS // (x[0].numel() * window))
    return torch.cat([run(part) for part in x.split(size)])


# -- blur ------------------------------------------------------------------------------------------


def smooth(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur with a sigma for each image, ``(N, 1)`` in pixels and ``largest`` at most."""
    size = 2 * max(1, math.ceil(2.5 * largest)) + 1
    if x.device.type != "cpu":  # where looking at the sigmas, as the function below does, would wait for the device
        kernel = filters().get_gaussian_kernel1d(size, sigma)
        return filters().filter2d_separable(x, kernel, kernel, border_type="replicate")
    return filters().gaussian_blur2d(x, size, sigma.expand(-1, 2), border_type="replicate")


def gaussian_blur(x: Tensor, d: Draws) -> Tensor:
    low, high = _length(x, 5, 0.8), _length(x, 7, 1.2)
    return smooth(x, d.uniform(low, high, 1), high)


def average_blur(x: Tensor, d: Draws) -> Tensor:
    """A box of 9 to 15 px."""
    low, high = _length(x, 9, 2), _length(x, 15, 3)
    reach = math.ceil((high - 1) / 2)
    offsets = torch.arange(-reach, reach + 1, device=x.device).abs()
    weights = (d.uniform(low, high, 1) / 2 - offsets + 0.5).clamp(0, 1)  # of a box between two odd sizes
    kernel = weights / weights.sum(1, keepdim=True)
    return filters().filter2d_separable(x, kernel, kernel, border_type="replicate")


def median_blur(x: Tensor, d: Draws, *, at_224: float) -> Tensor:
    size = _odd(_length(x, at_224, 3))
    return _in_parts(x, size**2, lambda part: filters().median_blur(part, size, border_type="replicate"))


def bilateral_blur(x: Tensor, d: Draws) -> Tensor:
    size = _odd(_length(x, 11, 3))
    colors, lengths = d.uniform(0.3, 0.8, 1), d.uniform(0.5, 1, 1).expand(-1, 2) * size
    step = max(1, _ELEMENTS // (x[0].numel() * size**2))
    parts = [slice(i, i + step) for i in range(0, len(x), step)]
    blur = filters().bilateral_blur
    return torch.cat([blur(x[p], size, colors[p].squeeze(1), lengths[p], "replicate") for p in parts])


def motion_blur(x: Tensor, d: Draws) -> Tensor:
    size = _odd(_length(x, 15, 5))
    return filters().motion_blur(
        x, size, d.uniform(0, 360), d.uniform(-1, 1), border_type="replicate", mode="bilinear"
    )  # fmt: skip


def mean_shift(x: Tensor, d: Draws) -> Tensor:
    """Every pixel moves to the mean of the similar pixels around it, three times."""
    reach, stride = 2, max(1, round(_length(x, 4, 1)))
    similar = d.uniform(0.15, 0.4, *ONE)
    place = x
    pad = reach * stride
    neighbours = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    height, width = x.shape[2:]
    for _ in range(3):
        total, count = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for i in range(0, 2 * pad + 1, stride):
            for j in range(0, 2 * pad + 1, stride):
                there = neighbours[:, :, i : i + height, j : j + width]
                near = ((there - place).square().mean(1, keepdim=True) < similar.square()).to(x.dtype)
                total, count = total + near * there, count + near
        place = total / count.clamp(min=1)
    return place


BLUR = (
    gaussian_blur,
    average_blur,
    functools.partial(median_blur, at_224=9),
    functools.partial(median_blur, at_224=15),
    bilateral_blur,
    motion_blur,
    mean_shift,
)


# -- artistic --------------------------------------------------------------------------------------


def cartoon(x: Tensor, d: Draws) -> Tensor:
    """Flat areas in few strong colours, with dark outlines."""
    flat = bilateral_blur(x, d)
    levels = d.uniform(3, 6, *ONE).floor()
    flat = torch.round(flat * levels) / levels
    outlines = _gradient(smooth(luminance(x), d.uniform(0.5, 0.7, 1), 0.7))
    flat = flat * (1 - d.uniform(1, 2.5, *ONE) * outlines).clamp(0, 1)
    return flat if x.shape[1] == 1 else saturation_boost(flat, d)


def saturation_boost(x: Tensor, d: Draws) -> Tensor:
    grey = luminance(x)
    return (grey + d.uniform(1.5, 2.5, *ONE) * (x - grey)).clamp(0, 1)


def _gradient(x: Tensor) -> Tensor:
    """Length of the gradient, from differences of neighbours."""
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx, dy = (p[:, :, 1:-1, 2:] - p[:, :, 1:-1, :-2]) / 2, (p[:, :, 2:, 1:-1] - p[:, :, :-2, 1:-1]) / 2
    return (dx.square() + dy.square()).sqrt()


ARTISTIC = (cartoon,)


# -- convolutional ---------------------------------------------------------------------------------


def _filtered(x: Tensor, kernel: Tensor, d: Draws) -> Tensor:
    """A 3 x 3 kernel, blended with the image itself: 60 to 100 % of it."""
    identity = constant([[0, 0, 0], [0, 1, 0], [0, 0, 0]], x)
    share = d.uniform(0.6, 1, 1, 1)
    return filters().filter2d(x, (1 - share) * identity + share * kernel, border_type="replicate")


def laplacian(x: Tensor, d: Draws) -> Tensor:
    return _filtered(x, constant([[0, -1, 0], [-1, 4, -1], [0, -1, 0]], x).expand(x.shape[0], 3, 3), d)


def sharpen(x: Tensor, d: Draws) -> Tensor:
    lightness = d.uniform(8.2, 10, 1, 1)
    kernel = -x.new_ones(x.shape[0], 3, 3)
    kernel[:, 1, 1] = lightness.view(-1)
    return _filtered(x, kernel, d)


def emboss(x: Tensor, d: Draws) -> Tensor:
    strength = d.uniform(0.6, 2, 1, 1)
    slope = constant([[-1, -1, 0], [-1, 0, 1], [0, 1, 1]], x)
    base = constant([[0, 0, 0], [0, 1, 0], [0, 0, 0]], x)
    return _filtered(x, base + strength * slope, d)


def edge_detect(x: Tensor, d: Draws) -> Tensor:
    return _filtered(x, constant([[0, 1, 0], [1, -4, 1], [0, 1, 0]], x).expand(x.shape[0], 3, 3), d)


def directed_edge_detect(x: Tensor, d: Draws) -> Tensor:
    """Differences along a direction of each image."""
    angle = d.uniform(0, 2 * math.pi, 1, 1)
    axis = torch.arange(-1, 2, device=x.device)
    towards = torch.atan2(axis.view(3, 1).float(), axis.view(1, 3).float())
    weights = torch.cos(towards - angle).clamp(min=0) ** 4 * (axis.view(3, 1) != 0).logical_or(axis != 0)
    kernel = weights / weights.sum((1, 2), keepdim=True)
    kernel[:, 1, 1] = -1
    return _filtered(x, kernel, d)


CONVOLUTIONAL = (laplacian, sharpen, emboss, edge_detect, directed_edge_detect)


# -- edges -----------------------------------------------------------------------------------------


def canny_edges(x: Tensor, d: Draws) -> Tensor:
    """Canny's edges of the blurred image, white on black or black on white."""
    low, high = _length(x, 1.6, 0.4), _length(x, 2.4, 0.7)
    blurred = smooth(luminance(x), d.uniform(low, high, 1), high)
    # kornia has one pair of thresholds for all images. A factor for each image makes the upper one 20 to 50 % of the
    # image's own strongest gradient, of which kornia's measure is eight times ours.
    strongest = 8 * _gradient(blurred).amax((1, 2, 3), keepdim=True).clamp(min=0.01)
    edges = filters().canny(blurred * d.uniform(1, 2.5, *ONE) / strongest, 0.25, 0.5, kernel_size=1)[1]
    edges = torch.where(d.mask(0.5, *ONE), 1 - edges, edges)
    return edges if x.shape[1] == 1 else as_rgb(edges)


EDGES = (canny_edges,)
