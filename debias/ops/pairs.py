"""Who is mixed with whom, and how much: random partners and shares, without a loop over samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["beta_shares", "random_partners"]


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
