"""Comparing all pairs of domains at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_over_pairs", "squared_differences"]


def squared_differences(inner: Tensor) -> Tensor:
    """``|x_a - x_b|^2`` for all pairs, ``(E, E)``, from their inner products ``<x_a, x_b>``."""
    own = inner.diagonal()
    return own.unsqueeze(0) + own.unsqueeze(1) - 2 * inner


def mean_over_pairs(values: Tensor, present: Tensor) -> Tensor:
    """Mean of symmetric values ``(E, E)`` over pairs of two domains that are present; 0 if there is no such pair.

    Args:
        values: ``(E, E)``.
        present: boolean ``(E,)``.
    """
    pairs = (present.unsqueeze(0) & present.unsqueeze(1)).triu(1)
    return torch.where(pairs, values, 0).sum() / pairs.sum().clamp_min(1)
