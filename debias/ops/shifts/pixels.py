"""Shifts of single pixels: arithmetic, colour, contrast.

Every function takes images ``(N, C, H, W)`` in [0, 1] and the draws of each; what leaves [0, 1] is clipped by the
caller.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.ops.shifts._kornia import color, enhance
from debias.ops.shifts.draws import Draws

__all__ = ["ARITHMETIC", "COLOUR", "CONTRAST", "GREY_COLOUR", "as_rgb", "like", "lloyd", "luminance"]

ONE = (1, 1, 1)  # one number for each image


def constant(values: Any, like: Tensor) -> Tensor:
    """Numbers on the device of a tensor, by a copy that the host does not wait for."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def as_rgb(x: Tensor) -> Tensor:
    """Three channels, whether there were three or one."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def luminance(x: Tensor) -> Tensor:
    """Brightness as the eye sees it (ITU-R BT.601), ``(N, 1, H, W)``."""
    return x if x.shape[1] == 1 else (x * constant([0.299, 0.587, 0.114], x).view(1, 3, 1, 1)).sum(1, keepdim=True)


def like(x: Tensor, images: Tensor) -> Tensor:
    """With as many channels as ``images``."""
    return luminance(x) if images.shape[1] == 1 else as_rgb(x)


# -- arithmetic ------------------------------------------------------------------------------------


def add(x: Tensor, d: Draws) -> Tensor:
    return x + d.signed(50 / 255, 200 / 255, *ONE)


def add_elementwise(x: Tensor, d: Draws) -> Tensor:
    return x + d.uniform(50 / 255, 200 / 255, *ONE) * d.uniform(-1, 1, *x.shape[1:])


def gaussian_noise(x: Tensor, d: Draws) -> Tensor:
    return x + d.uniform(0.15, 0.4, *ONE) * d.normal(*x.shape[1:])


def laplace_noise(x: Tensor, d: Draws) -> Tensor:
    u = d.uniform(-1, 1, *x.shape[1:])
    return x - d.uniform(0.1, 0.3, *ONE) * u.sign() * torch.log1p(-u.abs().clamp(max=1 - 1e-6))


def poisson_noise(x: Tensor, d: Draws) -> Tensor:
    """Shot noise of 3 to 12 photons at full brightness, above a dark current; its normal approximation."""
    return x + ((x + 0.2) / d.uniform(3, 12, *ONE)).sqrt() * d.normal(*x.shape[1:])


def multiply(x: Tensor, d: Draws) -> Tensor:
    return x * d.uniform(2, 4, *ONE)


def multiply_elementwise(x: Tensor, d: Draws) -> Tensor:
    return x * d.uniform(0, 2, *x.shape[1:])


def cutout(x: Tensor, d: Draws) -> Tensor:
    """A grey rectangle over 30 to 50 % of each side."""
    size, place, grey = d.uniform(0.3, 0.5, 2), d.uniform(0, 1, 2), d.uniform(0, 1, *ONE)
    start = place * (1 - size)
    inside = []
    for axis, length in enumerate(x.shape[2:]):
        centres = (torch.arange(length, device=x.device, dtype=x.dtype) + 0.5) / length
        inside.append((centres >= start[:, axis, None]) & (centres < (start + size)[:, axis, None]))
    return torch.where((inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1), grey, x)


def _coarse(mask: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(mask.float(), x.shape[2:], mode="nearest") > 0.5


def _cells(x: Tensor) -> tuple[int, int, int]:
    """Cells of about a twelfth of the shorter side, two pixels at least."""
    side = max(2, round(min(x.shape[2:]) / 12))
    return 1, max(2, x.shape[2] // side), max(2, x.shape[3] // side)


def dropout(x: Tensor, d: Draws) -> Tensor:
    return x * ~d.mask(d.uniform(0.2, 0.5, *ONE), 1, *x.shape[2:])


def coarse_dropout(x: Tensor, d: Draws) -> Tensor:
    return x * ~_coarse(d.mask(d.uniform(0.15, 0.4, *ONE), *_cells(x)), x)


def impulse_noise(x: Tensor, d: Draws) -> Tensor:
    return torch.where(d.mask(d.uniform(0.15, 0.4, *ONE), *x.shape[1:]), d.uniform(0, 1, *x.shape[1:]), x)


def _replaced(x: Tensor, d: Draws, low: int, high: int, coarse: bool) -> Tensor:
    """A share of the pixels, or of the cells, replaced by black (0), white (1) or either."""
    shape = _cells(x) if coarse else (1, *x.shape[2:])
    mask, value = d.mask(d.uniform(0.1, 0.3, *ONE), *shape), low + (high - low) * d.mask(0.5, *shape)
    if coarse:
        mask, value = _coarse(mask, x), F.interpolate(value.float(), x.shape[2:], mode="nearest")
    return torch.where(mask, value.to(x.dtype), x)


def salt_and_pepper(x: Tensor, d: Draws) -> Tensor:
    return _replaced(x, d, 0, 1, coarse=False)


def salt(x: Tensor, d: Draws) -> Tensor:
    return _replaced(x, d, 1, 1, coarse=False)


def pepper(x: Tensor, d: Draws) -> Tensor:
    return _replaced(x, d, 0, 0, coarse=False)


def coarse_salt_and_pepper(x: Tensor, d: Draws) -> Tensor:
    return _replaced(x, d, 0, 1, coarse=True)


def coarse_salt(x: Tensor, d: Draws) -> Tensor:
    return _replaced(x, d, 1, 1, coarse=True)


def coarse_pepper(x: Tensor, d: Draws) -> Tensor:
    return _replaced(x, d, 0, 0, coarse=True)


def invert(x: Tensor, d: Draws) -> Tensor:
    return 1 - x


def solarize(x: Tensor, d: Draws) -> Tensor:
    """Inverted from 20 to 60 % of the brightest pixel on."""
    return torch.where(x >= d.uniform(0.2, 0.6, *ONE) * x.amax((1, 2, 3), keepdim=True), 1 - x, x)


def jpeg(x: Tensor, d: Draws) -> Tensor:
    """JPEG of quality 1 to 10; the codec works in blocks of 16 pixels."""
    height, width = x.shape[2:]
    padded = F.pad(as_rgb(x), (0, -width % 16, 0, -height % 16), mode="replicate")
    coded = enhance().jpeg_codec_differentiable(padded.contiguous(), d.uniform(1, 10))
    return like(coded[:, :, :height, :width], x)


ARITHMETIC = (
    add, add_elementwise, gaussian_noise, laplace_noise, poisson_noise, multiply, multiply_elementwise, cutout, dropout,
    coarse_dropout, impulse_noise, salt_and_pepper, salt, pepper, coarse_salt_and_pepper, coarse_salt, coarse_pepper,
    invert, solarize, jpeg,
)  # fmt: skip


# -- colour ----------------------------------------------------------------------------------------


def _shifted_hsv(x: Tensor, hue: Tensor | float, scale: Tensor | float, shift: Tensor | float) -> Tensor:
    """Hue turned by a share of the circle, saturation scaled and shifted."""
    h, s, v = color().rgb_to_hsv(x).unbind(1)
    turned = torch.remainder(h + 2 * torch.pi * hue, 2 * torch.pi)
    return color().hsv_to_rgb(torch.stack([turned, (s * scale + shift).clamp(0, 1), v], dim=1))


def hue(x: Tensor, d: Draws) -> Tensor:
    return _shifted_hsv(x, d.uniform(0.15, 0.85, 1, 1), 1.0, 0.0)


def saturation(x: Tensor, d: Draws) -> Tensor:
    return _shifted_hsv(x, 0.0, d.either((0, 0.4), (2, 4), 1, 1), 0.0)


def saturation_shift(x: Tensor, d: Draws) -> Tensor:
    return _shifted_hsv(x, 0.0, 1.0, d.signed(0.3, 0.6, 1, 1))


def hue_and_saturation(x: Tensor, d: Draws) -> Tensor:
    return _shifted_hsv(x, d.uniform(0.15, 0.85, 1, 1), d.either((0.2, 0.5), (1.5, 3), 1, 1), 0.0)


def grayscale(x: Tensor, d: Draws) -> Tensor:
    return as_rgb(luminance(x))


def temperature(x: Tensor, d: Draws) -> Tensor:
    """Warmer or colder light: red and blue are scaled in opposite directions."""
    gain = torch.exp(d.signed(0.35, 0.8, 1, 1))
    return x * torch.stack([gain, torch.ones_like(gain), 1 / gain], dim=1)


def color_balance(x: Tensor, d: Draws) -> Tensor:
    return x * d.either((0.3, 0.7), (1.4, 2), 3, 1, 1)


def brightness(x: Tensor, d: Draws) -> Tensor:
    return x * d.either((0.25, 0.55), (1.6, 2.5), *ONE)


def brightness_shift(x: Tensor, d: Draws) -> Tensor:
    return x + d.signed(0.2, 0.5, *ONE)


def quantize(x: Tensor, d: Draws) -> Tensor:
    """Two to five levels a channel."""
    steps = d.uniform(1, 5, *ONE).floor()
    return torch.round(x * steps) / steps


def lloyd(features: Tensor, centres: Tensor, *, steps: int) -> Tensor:
    """Assign every point to the nearest of the centres, which move to the mean of their points after each step.

    Args:
        features: ``(N, P, D)``.
        centres: ``(N, K, D)``, where they start.
        steps: number of assignments.

    Returns:
        The centre of each point, int64 ``(N, P)``.
    """
    nearest = torch.cdist(features, centres).argmin(2)
    for _ in range(steps - 1):
        centres = _means(features, nearest, centres)
        nearest = torch.cdist(features, centres).argmin(2)
    return nearest


def _means(features: Tensor, labels: Tensor, fallback: Tensor) -> Tensor:
    """Mean of the points of each label, ``(N, K, D)``; ``fallback`` where a label has none."""
    index = labels.unsqueeze(2).expand_as(features)
    sums = torch.zeros_like(fallback).scatter_add_(1, index, features)
    counts = torch.zeros_like(fallback[..., 0]).scatter_add_(1, labels, torch.ones_like(features[..., 0]))
    return torch.where((counts > 0).unsqueeze(2), sums / counts.clamp(min=1).unsqueeze(2), fallback)


def segment_means(x: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """Every pixel replaced by the mean colour of its segment; ``labels`` int64 ``(N, H * W)``."""
    pixels = x.flatten(2).transpose(1, 2)
    means = _means(pixels, labels, pixels.new_zeros(x.shape[0], n_labels, x.shape[1]))
    return means.gather(1, labels.unsqueeze(2).expand_as(pixels)).transpose(1, 2).reshape(x.shape)


def kmeans_quantize(x: Tensor, d: Draws) -> Tensor:
    """Two to six colours, the means of clusters that start at pixels of the image."""
    pixels = x.flatten(2).transpose(1, 2)
    starts = (d.uniform(0, 1, 6) * pixels.shape[1]).long()
    centres = pixels.gather(1, starts.unsqueeze(2).expand(-1, -1, x.shape[1]))
    unused = torch.arange(6, device=x.device) >= d.uniform(2, 7, 1).floor()
    centres = torch.where(unused.unsqueeze(2), 1e3, centres)  # so far away that no pixel is nearest to it
    return segment_means(x, lloyd(pixels, centres, steps=4), 6)


GREY_COLOUR = (brightness, brightness_shift, quantize, kmeans_quantize)  # what changes images of one channel, too
COLOUR = (
    hue, saturation, saturation_shift, hue_and_saturation, grayscale, temperature, color_balance, *GREY_COLOUR,
)  # fmt: skip


# -- contrast --------------------------------------------------------------------------------------


def gamma(x: Tensor, d: Draws) -> Tensor:
    return x.clamp(0, 1) ** d.either((0.25, 0.55), (1.8, 3.5), *ONE)


def sigmoid_contrast(x: Tensor, d: Draws) -> Tensor:
    return torch.sigmoid(d.uniform(8, 16, *ONE) * (x - d.uniform(0.25, 0.75, *ONE)))


def log_contrast(x: Tensor, d: Draws) -> Tensor:
    return d.either((0.3, 0.6), (1.3, 1.8), *ONE) * torch.log2(1 + x)


def linear_contrast(x: Tensor, d: Draws) -> Tensor:
    return 0.5 + d.either((0.2, 0.5), (2, 3.5), *ONE) * (x - 0.5)


def _equalized(x: Tensor) -> Tensor:
    """Contrast-limited adaptive histogram equalisation, in as many tiles as fit, 8 x 8 at most."""
    height, width = x.shape[2:]
    tiles = (min(8, max(1, height // 8)), min(8, max(1, width // 8)))
    # The tiles must be even; padding here keeps kornia from padding by more than the image has.
    padded = F.pad(x, (0, -width % (2 * tiles[1]), 0, -height % (2 * tiles[0])), mode="replicate")
    return enhance().equalize_clahe(padded.clamp(0, 1), 8.0, tiles)[:, :, :height, :width]


def clahe(x: Tensor, d: Draws) -> Tensor:
    """On the brightness; colours keep their ratios."""
    before = luminance(x)
    return x * (_equalized(before) / before.clamp(min=1e-3)) if x.shape[1] == 3 else _equalized(x)


def channelwise_clahe(x: Tensor, d: Draws) -> Tensor:
    return _equalized(x)


CONTRAST = (gamma, sigmoid_contrast, log_contrast, linear_contrast, clahe, channelwise_clahe)
