"""Shifts of the scene: geometric, segmentation, weather."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.ops.shifts._kornia import filters, geometry
from debias.ops.shifts.draws import Draws
from debias.ops.shifts.filters import _length, _odd, smooth
from debias.ops.shifts.pixels import ONE, constant, lloyd, luminance, segment_means

__all__ = ["GEOMETRIC", "SEGMENTATION", "WEATHER"]


# -- geometric: where each pixel is taken from, in coordinates from -1 to 1; black from outside ----


def _centres(n: int, x: Tensor) -> Tensor:
    """The centres of ``n`` parts of the range from -1 to 1, in the dtype of the images."""
    return (torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) * 2 / n - 1


def _grid(x: Tensor) -> Tensor:
    """The centres of the pixels as (x, y), ``(1, H, W, 2)``."""
    rows, columns = (_centres(n, x) for n in x.shape[2:])
    return torch.stack(torch.broadcast_tensors(columns.view(1, 1, -1), rows.view(1, -1, 1)), dim=-1)


def _sampled(x: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    return F.grid_sample(x, grid.expand(x.shape[0], -1, -1, -1), mode=mode, align_corners=False)


def _linear(x: Tensor, matrix: Tensor) -> Tensor:
    return _sampled(x, torch.einsum("nij,bhwj->nhwi", matrix, _grid(x)))


def scale(x: Tensor, d: Draws) -> Tensor:
    return _sampled(x, _grid(x) / d.either((0.5, 0.75), (1.35, 1.8), 1, 1, 2))


def translate(x: Tensor, d: Draws) -> Tensor:
    return _sampled(x, _grid(x) - 2 * d.signed(0.15, 0.3, 1, 1, 2))


def rotate(x: Tensor, d: Draws) -> Tensor:
    angle = d.signed(math.radians(15), math.radians(45))
    cos, sin = angle.cos(), angle.sin()
    aspect = x.shape[3] / x.shape[2]
    matrix = torch.stack([cos, -sin / aspect, sin * aspect, cos], dim=1).view(-1, 2, 2)
    return _linear(x, matrix)


def shear(x: Tensor, d: Draws) -> Tensor:
    slope = torch.tan(d.signed(math.radians(20), math.radians(40)))
    one, zero = torch.ones_like(slope), torch.zeros_like(slope)
    return _linear(x, torch.stack([one, slope, zero, one], dim=1).view(-1, 2, 2))


def perspective(x: Tensor, d: Draws) -> Tensor:
    """The corners move inwards by 5 to 25 % of a side."""
    corners = constant([[-1, -1], [1, -1], [1, 1], [-1, 1]], x).expand(x.shape[0], 4, 2)
    matrix = geometry().get_perspective_transform(corners, corners * (1 - 2 * d.uniform(0.05, 0.25, 4, 2)))
    moved = torch.einsum("nij,bhwj->nhwi", matrix, F.pad(_grid(x), (0, 1), value=1.0))
    return _sampled(x, moved[..., :2] / moved[..., 2:].clamp(min=1e-3))


def piecewise_affine(x: Tensor, d: Draws) -> Tensor:
    """The points of a lattice move by up to 12 % of a side; straight lines between them."""
    field = d.uniform(0.5, 1, *ONE) * d.uniform(-0.24, 0.24, 2, 5, 5)
    return _sampled(x, _grid(x) + _spread(field, x, "bilinear").permute(0, 2, 3, 1))


def elastic(x: Tensor, d: Draws) -> Tensor:
    """Smooth noise moves the pixels."""
    sigma = _length(x, 6, 0.8)
    noise = smooth(d.normal(2, *x.shape[2:]), x.new_full((x.shape[0], 1), sigma), sigma)
    noise = noise * (2 * math.sqrt(math.pi) * sigma)  # standard deviation 1 again
    return _sampled(x, _grid(x) + (d.uniform(0.05, 0.09, *ONE) * noise).permute(0, 2, 3, 1))


def polar(x: Tensor, d: Draws) -> Tensor:
    """Rows are angles and columns radii, around a centre near the middle."""
    columns, rows = _grid(x).unbind(-1)
    radius, angle = (columns + 1) / 2 * d.uniform(1, 1.3, 1, 1), rows * math.pi
    around = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return _sampled(x, around + d.uniform(-0.1, 0.1, 1, 1, 2))


def jigsaw(x: Tensor, d: Draws) -> Tensor:
    """10 x 10 cells (of two pixels at least) change places with others nearby."""
    height, width = x.shape[2:]
    k = max(2, min(10, min(height, width) // 2))
    order = torch.arange(k, device=x.device, dtype=torch.float32)
    across = (order + d.uniform(0, 2.5, k, k)).argsort(2)  # of the cells of each row
    down = (order.view(1, k, 1) + d.uniform(0, 2.5, k, k)).argsort(1)  # then of each column
    source = (order.long().view(1, k, 1) * k + across).gather(1, down)
    rows = (torch.arange(height, device=x.device) * k) // height
    columns = (torch.arange(width, device=x.device) * k) // width
    cell = source[:, rows][:, :, columns]
    here = rows.view(1, -1, 1) * k + columns
    step = torch.stack([cell % k - here % k, cell // k - here // k], dim=-1).to(x.dtype)
    return _sampled(x, _grid(x) + step * 2 / k, mode="nearest")


def _spread(field: Tensor, x: Tensor, mode: str) -> Tensor:
    """A coarse field over the whole image."""
    return F.interpolate(field, x.shape[2:], mode=mode, align_corners=True)


GEOMETRIC = (scale, translate, rotate, shear, perspective, piecewise_affine, elastic, polar, jigsaw)


# -- segmentation: segments in their mean colour ---------------------------------------------------


def _n_segments(x: Tensor) -> int:
    return min(100, max(4, x.shape[2] * x.shape[3] // 3))


def _lattice(n: int, x: Tensor) -> Tensor:
    """About ``n`` centres of a square lattice, ``(1, K, 2)``."""
    k = max(2, round(math.sqrt(n)))
    axis = _centres(k, x)
    return torch.cartesian_prod(axis, axis).unsqueeze(0)


def _drawn(x: Tensor, labels: Tensor, n_labels: int, d: Draws) -> Tensor:
    """70 to 100 % of the segments in their mean colour, the others as they are."""
    kept = ~d.mask(d.uniform(0.7, 1, 1), n_labels)
    kept = kept.gather(1, labels).view(-1, 1, *x.shape[2:])
    return torch.where(kept, x, segment_means(x, labels, n_labels))


def _voronoi(x: Tensor, points: Tensor, d: Draws) -> Tensor:
    places = _grid(x).flatten(1, 2).expand(x.shape[0], -1, -1)
    return _drawn(x, torch.cdist(places, points).argmin(2), points.shape[1], d)


def superpixels(x: Tensor, d: Draws) -> Tensor:
    """Clusters by place and colour (SLIC: Achanta et al., TPAMI 2012), started on a lattice."""
    centres = _lattice(_n_segments(x), x)
    k = math.isqrt(centres.shape[1])
    colors = F.adaptive_avg_pool2d(x, (k, k)).transpose(2, 3).flatten(2).transpose(1, 2)  # in the lattice's order
    pixels, places = x.flatten(2).transpose(1, 2), _grid(x).flatten(1, 2).expand(x.shape[0], -1, -1)
    weight = d.uniform(1, 3, 1, 1)  # of colour against place
    features = torch.cat([places, weight * pixels], dim=2)
    starts = torch.cat([centres.expand(x.shape[0], -1, -1), weight * colors], dim=2)
    return _drawn(x, lloyd(features, starts, steps=4), k * k, d)


def uniform_voronoi(x: Tensor, d: Draws) -> Tensor:
    return _voronoi(x, d.uniform(-1, 1, _n_segments(x), 2), d)


def regular_voronoi(x: Tensor, d: Draws) -> Tensor:
    """A lattice, shifted as a whole."""
    points = _lattice(_n_segments(x), x)
    return _voronoi(x, points + d.uniform(-1, 1, 1, 2) / math.isqrt(points.shape[1]), d)


def jittered_voronoi(x: Tensor, d: Draws) -> Tensor:
    points = _lattice(_n_segments(x), x)
    return _voronoi(x, points + d.uniform(-1, 1, points.shape[1], 2) / math.isqrt(points.shape[1]), d)


SEGMENTATION = (superpixels, uniform_voronoi, regular_voronoi, jittered_voronoi)


# -- weather ---------------------------------------------------------------------------------------


def _clouds(x: Tensor, d: Draws, persistence: float) -> Tensor:
    """Noise on lattices that get finer and weaker, ``(N, 1, H, W)`` in [0, 1]."""
    total, weight, weights = torch.zeros_like(x[:, :1]), 1.0, 0.0
    for k in (3, 5, 9, 17):
        if k > min(x.shape[2:]) and weights:
            break
        total = total + weight * _spread(d.uniform(0, 1, 1, k, k), x, "bilinear")
        weights += weight
        weight *= persistence
    return total / weights


def snowy_landscape(x: Tensor, d: Draws) -> Tensor:
    """Everything that is brighter than a threshold turns white."""
    bright = luminance(x) > d.uniform(0.2, 0.45, *ONE)
    return torch.where(bright, x * d.uniform(1.8, 3, *ONE) + 0.1, x)


def clouds(x: Tensor, d: Draws) -> Tensor:
    cover = ((_clouds(x, d, 0.6) - d.uniform(0.3, 0.45, *ONE)) * 4).clamp(0, 0.9)
    return x + (d.uniform(0.8, 1, *ONE) - x) * cover


def fog(x: Tensor, d: Draws) -> Tensor:
    cover = (d.uniform(0.45, 0.65, *ONE) + 0.6 * (_clouds(x, d, 0.3) - 0.5)).clamp(0, 0.9)
    return x + (d.uniform(0.7, 0.95, *ONE) - x) * cover


def _falling(x: Tensor, d: Draws, density: float, streak: float, spread: float) -> Tensor:
    """Drops or flakes that fall in a direction of each image, coverage ``(N, 1, H, W)`` in [0, 1]."""
    drops = d.mask(d.uniform(0.7 * density, 1.3 * density, *ONE), 1, *x.shape[2:]).float()
    size = _odd(_length(x, streak, 3))
    angle, straight = d.uniform(90 - spread, 90 + spread), x.new_zeros(x.shape[0])
    falling = filters().motion_blur(drops, size, angle, straight, border_type="constant", mode="bilinear")
    return (falling * size * 0.7).clamp(0, 1)


def snowflakes(x: Tensor, d: Draws) -> Tensor:
    cover = torch.maximum(_falling(x, d, 0.02, 5, 40), _falling(x, d, 0.006, 9, 40))
    return x + (1 - x) * cover


def rain(x: Tensor, d: Draws) -> Tensor:
    cover = d.uniform(0.5, 0.9, *ONE) * _falling(x, d, 0.02, 21, 20)
    return 0.85 * x + (0.8 - 0.85 * x) * cover


WEATHER = (snowy_landscape, clouds, fog, snowflakes, rain)
