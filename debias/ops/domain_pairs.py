"""Comparing all pairs of domains at once, without a table of pairs.

A mean over pairs is one of deviations: for k domains ``sum over a < b of |x_a - x_b|^2 = k sum_a |x_a - mean x|^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deviations", "mean_over_pairs"]


def deviations(values: Tensor, present: Tensor, dim: int = 0) -> Tensor:
    """Differences from the mean over the domains that are present; 0 for the others.

    Args:
        values: E entries along ``dim``; those of absent domains are finite.
        present: boolean ``(E,)``.
        dim: the axis of domains.
    """
    shape = [1] * values.ndim
    shape[dim] = -1
    present = present.view(shape)
    mean = torch.where(present, values, 0).sum(dim, keepdim=True) / present.sum().clamp_min(1)
    return torch.where(present, values - mean, 0)


def mean_over_pairs(squared: Tensor, among: Tensor, present: Tensor) -> Tensor:
    """Mean of ``|x_a - x_b|^2`` over pairs of two domains that are present; 0 if there is no such pair.

    Args:
        squared: squared norms of the deviations, summed over domains; scalar.
        among: which domains the deviations are of, boolean ``(E,)``; a pair with another one counts as no distance.
        present: boolean ``(E,)``.
    """
    k = present.sum()
    return squared * (2 * among.sum()) / (k * (k - 1)).clamp_min(1)
