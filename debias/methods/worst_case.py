"""DRO without groups: weigh the samples of a batch by the worst case. Levy et al., NeurIPS 2020, arXiv 2010.05893.

With losses ``v_i`` of the global batch and shares ``b_i`` (``1 / m``; of a weighted loss each sample's part of the
denominator), the loss is ``max_p <p, v>`` over an uncertainty set, and p is treated as a constant::

    CVaR             p_i <= b_i / alpha                                      the worst fraction alpha
    CVaR, KL         CVaR - temperature * KL(p | b)                          smoothed
    chi-square ball  sum_i b_i (p_i / b_i - 1)^2 / 2 <= radius
    chi-square, pen. <p, v> - penalty * sum_i b_i (p_i / b_i - 1)^2 / 2

All four have closed forms on the sorted losses, where the authors' code bisects three of them to a tolerance of 1e-4.
The solution is that of the batch, and biased by its size: ``alpha * m`` must be much larger than one. With several
ranks p is that of the global batch; solving on each rank alone is a weaker set.

Published: digits alpha 0.02, radius 1, penalty 0.05; ImageNet alpha 0.1, radius 1, penalty 0.4; SubpopBench alpha 0.1,
searched over 10^U(-2, 0). Costs: one sort of the batch's losses, over ranks a gather of two doubles a row. Needs
per-sample losses only; keeps no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chi_square_weights", "cvar_weights"]


def cvar_weights(losses: Tensor, *, alpha: float, temperature: float = 0.0, shares: Tensor | None = None) -> Tensor:
    """Weights of the worst fraction of a batch: its conditional value at risk.

    Args:
        losses: ``(m,)``, finite.
        alpha: fraction, in (0, 1].
        temperature: weight of the relative entropy that smooths the weights; 0 for none.
        shares: of the batch that each loss stands for, ``(m,)``, sum 1; ``1 / m`` by default.

    Returns:
        Weights ``(m,)``, sum 1, without gradient.

    Example:
        >>> import torch
        >>> from debias.functional import cvar_weights
        >>> cvar_weights(torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1]), alpha=0.3)
        tensor([0.0000, 0.3333, 0.0000, 0.6667, 0.0000])
    """
    losses, shares = _batch(losses, shares)
    order, v, b = _sorted(losses, shares)
    if not temperature:
        # Equal losses share what is left for them, so that the order of samples, and of ranks, decides nothing.
        mass = torch.cat((b.new_zeros(1), b.cumsum(0)))
        above = mass[torch.searchsorted(-v, -v)]
        equal = mass[torch.searchsorted(-v, -v, right=True)] - above
        p = torch.minimum((alpha - above).clamp_min(0), equal) * torch.where(b > 0, b / equal, 0)
        return torch.zeros_like(p).scatter(0, order, p / p.sum())
    # With the j largest at the cap b / alpha, the others are b exp((v - eta) / temperature).
    capped = (b.cumsum(0) - b) / alpha
    tails = _log_tail_sums(b.log() + v / temperature)
    eta = temperature * (tails - (1 - capped).clamp_min(0).log())
    log_cap = -torch.tensor(alpha, dtype=v.dtype).log()
    fits = (v <= eta + temperature * log_cap) & (capped < 1)
    # The fewest that fit; where rounding lets none fit, all but the last sample that may be free are at the cap.
    last = (capped < 1).sum() - 1
    places = torch.arange(len(v), device=v.device)
    j = torch.where(fits, places, last).amin()
    free = b * torch.exp(((v - eta.gather(0, j.unsqueeze(0))) / temperature).clamp_max(log_cap))
    p = torch.where(places < j, b / alpha, free)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def chi_square_weights(
    losses: Tensor, *, radius: float | None = 1.0, penalty: float | None = None, shares: Tensor | None = None
) -> Tensor:
    """Weights of the worst distribution in a chi-square ball around a batch, or under a chi-square penalty.

    Args:
        losses: ``(m,)``, finite.
        radius: of the ball; left out where a penalty is given.
        penalty: weight of the divergence, > 0, instead of a ball.
        shares: of the batch that each loss stands for, ``(m,)``, sum 1; ``1 / m`` by default.

    Returns:
        Weights ``(m,)``, sum 1, without gradient: uniform over the largest losses where these alone lie in the ball.

    Example:
        >>> import torch
        >>> from debias.functional import chi_square_weights
        >>> chi_square_weights(torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1]), radius=1.0)
        tensor([0.0000, 0.2537, 0.0146, 0.7317, 0.0000])
    """
    losses, shares = _batch(losses, shares)
    order, v, b = _sorted(losses, shares)
    v = v - v[:1]  # from the largest one on: sums of squares then lose no digits where it matters
    mass = b.cumsum(0)
    first = (b * v).cumsum(0)
    following = torch.cat((v[1:], v.new_full((1,), -torch.inf)))
    if penalty is not None:
        eta = (first - penalty) / mass
        allowed = torch.ones_like(mass, dtype=torch.bool)
    else:
        spread = mass * (1 + 2 * float(radius or 0)) - 1
        mean = first / mass
        variance = ((b * v * v).cumsum(0) / mass - mean * mean).clamp_min(0)
        eta = mean - (variance / spread.clamp_min(torch.finfo(v.dtype).tiny)).sqrt()
        allowed = spread > 0
    # The fewest of the largest losses for which the others lie below eta; all of them where rounding decides nothing.
    fits = allowed & (eta >= following)
    places = torch.arange(len(v), device=v.device)
    k = torch.where(fits, places, len(v) - 1).amin()
    p = b * (v - eta.gather(0, k.unsqueeze(0))).clamp_min(0)
    if penalty is None:
        top = b * (v == 0)
        p = torch.where(top.sum() * (1 + 2 * float(radius or 0)) >= 1, top, p)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def _batch(losses: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    losses = losses.detach()
    return losses, torch.full_like(losses, 1 / max(len(losses), 1)) if shares is None else shares.detach()


def _sorted(losses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of descending losses, and losses and shares in it; what has no share comes last."""
    order = torch.where(shares > 0, losses, -torch.inf).argsort(descending=True, stable=True)
    b = shares[order]
    v = losses[order]
    lowest = torch.where(b > 0, v, torch.inf).amin()
    return order, torch.where(b > 0, v, lowest), b


def _log_tail_sums(x: Tensor) -> Tensor:
    """``log sum_{j >= i} exp(x_j)``."""
    return x.flip(0).logcumsumexp(0).flip(0)
