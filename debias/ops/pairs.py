"""Who is mixed with whom, how much, and the mixtures: Mixup and CutMix, without a loop over samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from debias.ops.arguments import checked

__all__ = [
    "beta_shares",
    "cutmix",
    "cutmix_box",
    "mixup",
    "other_domains",
    "random_partners",
    "selective_pairs",
]


def other_domains(domains: Tensor) -> Tensor:
    """Who may be the partner of whom: those of another known domain, boolean ``(N, N)``."""
    known = domains >= 0
    return (domains.unsqueeze(1) != domains) & known & known.unsqueeze(1)


def random_partners(allowed: Tensor, scores: Tensor) -> Tensor:
    """A random partner for each sample among those it may be paired with; itself where there is none.

    Args:
        allowed: boolean ``(N, N)``: whether column j may be the partner of row i.
        scores: independent uniform numbers in [0, 1), ``(N, N)``.

    Returns:
        int64 ``(N,)``.
    """
    own = torch.arange(allowed.shape[0], device=allowed.device)
    if not len(own):
        return own
    best = torch.where(allowed, scores, -1).argmax(1)
    return torch.where(allowed.any(1), best, own)


def beta_shares(generator: torch.Generator, alpha: float, size: int, device: torch.device) -> Tensor:
    """Numbers of the symmetric Beta distribution with parameter ``alpha``, ``(size,)``, on ``device``.

    From NumPy: torch's Beta takes no generator.
    """
    numbers = np.random.default_rng(generator.initial_seed()).beta(alpha, alpha, size)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.from_numpy(numbers).to(device, dtype, non_blocking=True)


@checked("labels: int N, domains: int N")
def selective_pairs(labels: Tensor, domains: Tensor, *, same_label: bool) -> Tensor:
    """Who may be mixed with whom under LISA's two rules.

    Args:
        labels: int64 ``(N,)``, negative = unknown.
        domains: int64 ``(N,)``, negative = unknown.
        same_label: pairs of one label from two domains; otherwise of one domain with two labels.

    Returns:
        Boolean ``(N, N)``; nowhere for samples whose label or domain is unknown.

    Example:
        >>> import torch
        >>> from debias.functional import selective_pairs
        >>> selective_pairs(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), same_label=True).nonzero().tolist()
        [[0, 1], [1, 0]]
    """
    known = (labels >= 0) & (domains >= 0)
    one_label = labels.unsqueeze(1) == labels
    one_domain = domains.unsqueeze(1) == domains
    pairs = one_label & ~one_domain if same_label else one_domain & ~one_label
    return pairs & known & known.unsqueeze(1)


@checked("x: float N ..., partners: int N < N, shares: float N")
def mixup(x: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """``share x_i + (1 - share) x_partner``.

    Args:
        x: inputs ``(N, ...)``, floating point.
        partners: int64 ``(N,)``.
        shares: ``(N,)`` in [0, 1].

    Returns:
        The same shape and dtype.
    """
    kept = shares.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.lerp(x[partners], x, kept)


@checked("x: float N C H W, partners: int N < N")
def cutmix(x: Tensor, partners: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """Images with a box of their partners pasted.

    Args:
        x: images ``(N, C, H, W)``.
        partners: int64 ``(N,)``.
        box: top, bottom, left and right of the box, in pixels; bottom and right are outside.

    Returns:
        New images, and the share of an image's area that is left of it.
    """
    top, bottom, left, right = box
    out = x.clone()
    out[:, :, top:bottom, left:right] = x[partners, :, top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])


def cutmix_box(share: float, center: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of CutMix (its algorithm 1): an area of ``1 - share`` around a centre in [0, 1)^2, cut at the border."""
    ends: list[int] = []
    for where, length in zip(center, size, strict=True):
        middle, half = int(where * length), int(length * math.sqrt(1 - share)) // 2
        ends += [max(middle - half, 0), min(middle + half, length)]
    return ends[0], ends[1], ends[2], ends[3]
