"""CORAL: features should have the same mean and covariance in every domain. Sun & Saenko 2016, arXiv 1607.01719.

In DomainBed's form (Gulrajani & Lopez-Paz, ICLR 2021), over all pairs of domains a, b, for d features::

    penalty = mean over pairs of  1/d |mu_a - mu_b|^2  +  1/d^2 |C_a - C_b|^2

with ``C`` the unbiased covariance and the Frobenius norm. The paper has the covariances only, over ``4 d^2``.

Published: DomainBed weight 1 (searched 0.1 to 10); WILDS 0.1 to 10 by dataset.

A domain absent from the batch is in no pair; one with a single sample has no covariance, so only its mean is compared.
A sample may be in several domains and counts in each. Sums over pairs are sums of deviations from the mean over
domains, so no pair is made. Nor are the covariances where the batch has fewer rows than features: ``<C_a, C_b>`` is a
sum of squared inner products of samples (Gram identity), ``rows^2`` of them. Over several ranks ``E (d^2 + d)`` sums
are reduced instead, in two messages and none in backward, and no sample leaves its rank. Needs the features in front of
the head or the output of a named module, and domain ids; no targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debias.methods.base import FeaturePenalty, calls, configures
from debias.ops.arguments import checked
from debias.ops.distributed import global_sum, global_sums, is_distributed, world_size
from debias.ops.domains import deviations, make_members
from debias.ops.fields import arguments
from debias.ops.known_gradient import known_gradient
from debias.ops.penalties import FeaturePenaltyModule
from debias.ops.precision import in_full_precision

__all__ = ["CORAL", "CORALMixin", "CORALPenalty", "coral_penalty"]


@checked("features: float N D, domains: int N < n_domains | bool N n_domains")
@in_full_precision
def coral_penalty(features: Tensor, domains: Tensor, n_domains: int, *, by_pairs: bool | None = None) -> Tensor:
    """Distance of the domains' means and covariances.

    Args:
        features: ``(N, d)``.
        domains: int64 ``(N,)``, negative where unlabelled, or boolean membership ``(N, E)``.
        n_domains: number of domains E.
        by_pairs: compare samples in pairs (memory ``N^2``, or ``(N + E)^2`` for a membership) instead of making
            covariances (``E d^2``); by default what is smaller, and covariances over several ranks.

    Returns:
        Scalar; 0 with fewer than two domains in the batch.

    Example:
        >>> import torch
        >>> from debias.functional import coral_penalty
        >>> coral_penalty(torch.tensor([[0.0], [2.0], [1.0], [3.0]]), torch.tensor([0, 0, 1, 1]), n_domains=2)
        tensor(1.)
    """
    members = make_members(domains, n_domains, len(features)).to(features.dtype)
    if by_pairs is None:
        disjoint = domains.dtype != torch.bool
        rows, width = len(features) + (0 if disjoint else n_domains), features.shape[1]
        by_pairs = not is_distributed() and rows**2 <= n_domains * width**2
    return known_gradient(features, *_coral(features.detach(), members, domains.dtype != torch.bool, by_pairs))


@torch.no_grad()
def _coral(x: Tensor, members: Tensor, disjoint: bool, by_pairs: bool) -> tuple[Tensor, Tensor]:
    """The penalty, and its gradient with respect to this rank's features ``(N, d)``."""
    counts, means = global_sums([members.sum(0), members.T @ x])
    means = means / counts.clamp_min(1).unsqueeze(1)
    present, usable = (counts > 0).to(x.dtype), (counts > 1).to(x.dtype)  # means can be compared, covariances too
    k, k_usable = present.sum(), usable.sum()
    # sum over pairs = k times the sum of deviations; pairs without a covariance count as no distance, not as fewer.
    of_pairs = 2 / (k * (k - 1)).clamp_min(1)
    of_means, of_spread = of_pairs * k / x.shape[1], of_pairs * k_usable / x.shape[1] ** 2

    present, usable = present.unsqueeze(1), usable / k_usable.clamp_min(1)
    moved = (means - (means * present).sum(0) / k.clamp_min(1)) * present
    to_means = (2 * of_means) * moved
    value = of_means * moved.square().sum()

    # Means enter covariances as what rows are centred by, through which no gradient goes: their deviations sum to 0.
    divisors = (counts - 1).clamp_min(1)
    shares = members / divisors
    if by_pairs:
        # Each covariance is a sum of products of rows with themselves, c_ie x_i x_i^T. Rows in several domains have no
        # mean of their own to be centred by: there a domain's mean is a row more, to be subtracted.
        if disjoint:
            centred = x - members @ means  # rows in no domain have no share in anything
        else:
            centred = torch.cat((x, means)) - x.sum(0) / max(len(x), 1)
            shares = torch.cat((shares, torch.diag(-counts / divisors)))
        weights = (shares - (shares * usable).sum(1, keepdim=True)) * usable.sign()
        inner = centred @ centred.T
        weighted = inner * (weights @ weights.T)
        value = value + of_spread * (weighted * inner).sum()
        gradient = (4 * of_spread) * (weighted @ centred)
        if not disjoint:
            gradient, of_rows = gradient[: len(x)], gradient[len(x) :]
            to_means = to_means + of_rows
    else:
        roots = shares.sqrt().T.unsqueeze(2)
        centred = roots * (x - means.unsqueeze(1))  # (E, N, d)
        covariances = global_sum(centred.mT @ centred)
        spread = deviations(covariances, usable > 0)
        value = value + of_spread * spread.square().sum()
        gradient = (4 * of_spread) * (roots * (centred @ spread)).sum(0)
    gradient = gradient + members @ (to_means / counts.clamp_min(1).unsqueeze(1))
    return value, gradient * world_size()  # by which DDP divides


@arguments
class CORALPenalty(FeaturePenaltyModule):
    """The penalty for any training loop."""

    def of(self, features: Tensor, domains: Tensor) -> Tensor:
        """The penalty, not yet weighted."""
        return coral_penalty(features, domains, self.n_groups)


@arguments
class CORAL(FeaturePenalty):
    """Make features have the same mean and covariance in every domain.

    Features that look different by domain can carry clues that hold in some domains only; features that are distributed
    alike carry less of them.

    Example:
        >>> from debias import CORAL
        >>> CORAL(domain="hospital", n_domains=3).state_key
        'CORAL(hospital)'
    """

    reference = "Sun & Saenko 2016, arXiv 1607.01719; DomainBed's form"
    works = "Domains have the same classes in the same shares, and differ in how inputs look."
    fails = (
        "Classes are spread unevenly over domains: features that tell the class then differ by domain, and are "
        "punished for it."
    )
    only_features = True
    key = "coral"
    module_class = CORALPenalty


class CORALMixin:
    """CORAL inside a LightningModule, for those who prefer explicit code."""

    coral: CORALPenalty
    configure_coral = configures("coral", CORALPenalty)
    coral_penalty = calls("coral", CORALPenalty.forward)
