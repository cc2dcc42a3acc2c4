"""Which row is in which domain, and means over domains; no table of pairs of domains is made.

A mean over pairs is one of deviations: for k domains ``sum over a < b of |x_a - x_b|^2 = k sum_a |x_a - mean x|^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.distributed import global_rank, global_sum, is_distributed, world_size

__all__ = ["check_domains", "deviations", "domain_mean", "domain_shares", "halves", "make_members"]


def check_domains(domains: Tensor, n_domains: int, rows: int) -> None:
    """Refuse what is neither ids ``(rows,)``, negative where unlabelled, nor a boolean membership ``(rows, E)``.

    Raises:
        DebiasError: the shapes do not fit.
    """
    fits = domains.shape == (rows,) and not domains.is_floating_point() and domains.dtype != torch.bool
    if not fits and not (domains.dtype == torch.bool and domains.shape == (rows, n_domains)):
        raise DebiasError(
            f"Expected `domains` to be integer ids of shape ({rows},), -1 for unlabelled, or a boolean membership of"
            f" shape ({rows}, {n_domains}), but got {domains.dtype} of shape {tuple(domains.shape)}."
        )


def make_members(domains: Tensor, n_domains: int, rows: int) -> Tensor:
    """Which row is in which domain, boolean ``(rows, E)``, from ids or a membership, see :func:`check_domains`."""
    check_domains(domains, n_domains, rows)
    if domains.dtype == torch.bool:
        return domains
    return domains.unsqueeze(1) == torch.arange(n_domains, device=domains.device)


def domain_shares(present: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each domain in the mean over those that are present, ``(E,)``; all 0 if none is.

    Args:
        present: boolean ``(E,)``.
        dtype: of the weights.
    """
    ones = present.to(dtype)
    return ones / ones.sum().clamp_min(1)


def domain_mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the domains that are present, ``(...)``, of values ``(E, ...)``; 0 if none is.

    Args:
        values: those of absent domains are finite.
        present: boolean ``(E,)``.
    """
    return (values * _along(domain_shares(present, values.dtype), values)).sum(0)


def deviations(values: Tensor, present: Tensor) -> Tensor:
    """Differences from the mean over the domains that are present; 0 for the others.

    Args:
        values: ``(E, ...)``; those of absent domains are finite.
        present: boolean ``(E,)``.
    """
    return (values - domain_mean(values, present)).masked_fill(_along(~present, values), 0)


@torch.no_grad()
def halves(domains: Tensor, n_domains: int, counts: Tensor) -> Tensor:
    """Samples of even and of odd position in their domain, over all ranks in their order, as groups 2 e and 2 e + 1.

    Args:
        domains: ids ``(N,)`` or a membership ``(N, E)``.
        n_domains: number of domains E.
        counts: which samples have a position, ``(N,)``.
    """
    if domains.dtype == torch.bool:
        counted = domains & counts.unsqueeze(1)
        odd = (counted.cumsum(0) - 1 + _before(counted.sum(0))) % 2 == 1
        return torch.stack((domains & ~odd, domains & odd), 2).flatten(1)
    # A position is the place in the order by domain less that of the domain's first sample.
    domains = domains.long()
    counted = torch.where(counts, domains, -1)
    ordered, order = counted.sort(stable=True)
    position = order.argsort() - torch.searchsorted(ordered, counted)
    if is_distributed():
        ends = torch.searchsorted(ordered, torch.arange(n_domains + 1, device=domains.device))
        position = position + _before(ends.diff())[counted.clamp(0, n_domains - 1)]
    return torch.add(position % 2, domains, alpha=2)


def _before(counts: Tensor) -> Tensor:
    """How many samples of each domain are on the ranks before this one, from this rank's numbers ``(E,)``."""
    of_ranks = counts.new_zeros(world_size(), len(counts))
    of_ranks[global_rank()] = counts
    return global_sum(of_ranks)[: global_rank()].sum(0)


def _along(of_domains: Tensor, values: Tensor) -> Tensor:
    """Numbers ``(E,)`` in the shape that multiplies values ``(E, ...)``."""
    return of_domains.view(-1, *[1] * (values.ndim - 1))
