"""V-REx: the domains' losses should be equal. Krueger et al., ICML 2021, arXiv 2003.00688, equation 8.

With ``L_e`` the mean loss of domain e in the batch and E domains::

    penalty = 1/E sum_e (L_e - mean L)^2            the population variance

Published: DomainBed weight 10 (searched 0.1 to 1e5) after 500 steps at weight 1, Adam reset at the switch; the Colored
MNIST protocol adds ``(L_1 - L_2)^2``, four times the variance of two, at weight 91257 after 190 steps.

A domain absent from the batch has no part in it, nor in E; with one domain present the penalty is 0. Equal losses have
a zero gradient. Costs one all-reduce of 3 E + 9 doubles, which other penalties on the same domains share, and none in
backward. Needs per-sample losses of any kind, and domain ids; no features, no head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debias.methods.base import DomainPenalty, calls, configures
from debias.ops.arguments import checked
from debias.ops.domains import domain_shares
from debias.ops.fields import arguments
from debias.ops.groups import GroupSums, group_losses
from debias.ops.penalties import DomainPenaltyModule, PenaltyOptions
from debias.ops.precision import in_full_precision

__all__ = ["VREx", "VRExMixin", "VRExPenalty", "vrex_penalty"]


@checked("losses: float N, domains: int N < n_domains | bool N n_domains, den: float N")
@in_full_precision
def vrex_penalty(losses: Tensor, domains: Tensor, n_domains: int, *, den: Tensor | None = None) -> Tensor:
    """Variance of the domains' mean losses; rows whose loss is not finite have no part in it.

    Args:
        losses: numerators by sample, ``(N,)``.
        domains: int64 ``(N,)``, negative where unlabelled, or boolean membership ``(N, E)``.
        n_domains: number of domains E.
        den: denominators by sample, ``(N,)``, for losses with class weights or ignored targets; 1 by default.

    Returns:
        Scalar.

    Example:
        >>> import torch
        >>> from debias.functional import vrex_penalty
        >>> vrex_penalty(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([0, 0, 1]), n_domains=2)
        tensor(1.)
    """
    (sums,), _ = group_losses([(losses, torch.ones_like(losses) if den is None else den, domains)], n_domains)
    return loss_variance(sums)


def loss_variance(sums: GroupSums) -> Tensor:
    """The penalty from the sums of the losses by domain."""
    shares = domain_shares(sums.present, sums.num.dtype)
    means = sums.means
    return (means - means.dot(shares)).square().dot(shares).to(sums.rows.dtype)


@arguments
class VRExOptions(PenaltyOptions):
    """Options of V-REx, at DomainBed's values."""

    penalty_weight: float = 10.0
    weight_before: float = 1.0


@arguments
class VRExPenalty(VRExOptions, DomainPenaltyModule):
    """The penalty for any training loop."""

    def of(self, sums: GroupSums) -> Tensor:  # type: ignore[override]
        """The penalty, not yet weighted, from the sums of the losses by domain."""
        return loss_variance(sums)


@arguments
class VREx(VRExOptions, DomainPenalty):
    """Make the domains' losses equal.

    A shortcut that pays more in one domain than in another makes their losses differ; equal losses are reached by what
    works in all of them.

    Example:
        >>> from debias import VREx
        >>> VREx(domain="hospital", n_domains=3).state_key
        'VREx(hospital)'
    """

    reference = "Krueger et al., ICML 2021, arXiv 2003.00688"
    works = "Domains differ in how much the shortcut pays, so that leaning on it makes their losses differ."
    fails = "The shortcut pays alike in every domain, or domains are hard for reasons of their own, as noise."
    key = "vrex"
    module_class = VRExPenalty


class VRExMixin:
    """V-REx inside a LightningModule, for those who prefer explicit code."""

    vrex: VRExPenalty
    configure_vrex = configures("vrex", VRExPenalty)
    vrex_penalty = calls("vrex", VRExPenalty.forward)
