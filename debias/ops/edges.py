"""Edges of images, Canny's, many images at a time and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.ops.arguments import checked

__all__ = ["canny_edges", "otsu_threshold"]


@checked("grey: float N H W, sigma: float N, low: float N, high: float N", hysteresis_steps="[0, 10000]")
def canny_edges(
    grey: Tensor, *, sigma: Tensor, threshold: Callable[[Tensor], Tensor], low: Tensor, high: Tensor,
    hysteresis_steps: int = 16,
) -> Tensor:  # fmt: skip
    """Edges of grey images.

    Args:
        grey: images ``(N, H, W)``, floating point.
        sigma: standard deviation of each image's Gaussian in pixels, ``(N,)``; 0 for none.
        threshold: from gradient magnitudes ``(N, H, W)`` to one threshold an image, ``(N,)``.
        low: factor of the threshold for weak edges, ``(N,)``.
        high: factor for strong ones, ``(N,)``.
        hysteresis_steps: how many pixels a weak edge may be away from a strong one, along weak ones.

    Returns:
        Boolean ``(N, H, W)``.
    """
    smooth = _gaussian(grey, sigma)
    slope = torch.arange(-1, 2, dtype=grey.dtype, device=grey.device)
    kernel = (2 - slope.abs()).outer(slope) / 4
    padded = F.pad(smooth.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
    across, down = F.conv2d(padded, torch.stack((kernel, kernel.t())).unsqueeze(1)).unbind(1)
    magnitude = torch.hypot(across, down)
    thinned = torch.where(_is_maximum(magnitude, across, down), magnitude, 0)
    cut = threshold(magnitude)
    # Rounding makes gradients of about 1e-8 in an image of one grey.
    weak = (thinned >= (low * cut).view(-1, 1, 1)) & (thinned > 1e-6)
    edges = weak & (thinned >= (high * cut).view(-1, 1, 1))
    for _ in range(hysteresis_steps):
        edges = F.max_pool2d(edges.to(grey.dtype).unsqueeze(1), 3, 1, 1).squeeze(1).bool() & weak
    return edges


@checked("values: float N D | float N H W", bins="[1, 65536]")
def otsu_threshold(values: Tensor, bins: int = 256) -> Tensor:
    """Otsu's threshold of each image: the cut that leaves the least variance within the two sides.

    Args:
        values: ``(N, ...)``, not negative.
        bins: of the histogram from 0 to the largest value.

    Returns:
        The middle of the last bin below the cut, ``(N,)``.
    """
    flat = values.flatten(1)
    width = flat.amax(1, keepdim=True).clamp_min(1e-12) / bins
    bin_of = (flat / width).long().clamp_max(bins - 1)
    counts = torch.zeros(flat.shape[0], bins, dtype=flat.dtype, device=flat.device)
    counts.scatter_add_(1, bin_of, torch.ones_like(flat))
    centers = torch.arange(bins, dtype=flat.dtype, device=flat.device) + 0.5
    below, sums = counts.cumsum(1), (counts * centers).cumsum(1)
    above, rest = flat.shape[1] - below, sums[:, -1:] - sums
    between = below * above * (sums / below.clamp_min(1) - rest / above.clamp_min(1)) ** 2
    return (centers[between.argmax(1)] * width.squeeze(1)).to(values.dtype)


def _gaussian(grey: Tensor, sigma: Tensor) -> Tensor:
    """Each image smoothed by its own Gaussian, cut at four of the widest standard deviations published."""
    radius = min(8, max(grey.shape[1:]) - 1)
    places = torch.arange(-radius, radius + 1, dtype=grey.dtype, device=grey.device)
    kernel = torch.exp(-0.5 * (places / sigma.to(grey.dtype).clamp_min(1e-3).unsqueeze(1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).unsqueeze(1)  # (N, 1, K): one channel an image
    n = grey.shape[0]
    padded = F.pad(grey.unsqueeze(0), (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel.unsqueeze(2), groups=n)
    return F.conv2d(rows, kernel.unsqueeze(3), groups=n).squeeze(0)


def _is_maximum(magnitude: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Whether a pixel's gradient is at least that of its neighbours across the edge, interpolated between pixels."""
    padded = F.pad(magnitude, (1, 1, 1, 1))
    h, w = magnitude.shape[1:]

    def neighbour(dy: int, dx: int) -> Tensor:
        return padded[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]

    steep = down.abs() > across.abs()
    longer, shorter = torch.maximum(down.abs(), across.abs()), torch.minimum(down.abs(), across.abs())
    share = shorter / longer.clamp_min(1e-12)
    same_sign = (across * down) >= 0
    found = torch.ones_like(steep)
    for side in (1, -1):
        straight = torch.where(steep, neighbour(side, 0), neighbour(0, side))
        falling, rising = neighbour(side, side), torch.where(steep, neighbour(side, -side), neighbour(-side, side))
        diagonal = torch.where(same_sign, falling, rising)
        beyond = share * diagonal + (1 - share) * straight
        # Of a plateau of two equal pixels one is kept.
        found &= magnitude >= beyond if side == 1 else magnitude > beyond
    return found
