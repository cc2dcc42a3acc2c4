"""CORAL: features should have the same mean and covariance in every domain. Sun & Saenko 2016, arXiv 1607.01719.

In DomainBed's form (Gulrajani & Lopez-Paz, ICLR 2021), over all pairs of domains a, b, for d features::

    penalty = mean over pairs of  1/d |mu_a - mu_b|^2  +  1/d^2 |C_a - C_b|^2

with ``C`` the unbiased covariance and the Frobenius norm. The paper has the covariances only, over ``4 d^2``.

Published: DomainBed weight 1 (searched 0.1 to 10); WILDS 0.1 to 10 by dataset.

A domain absent from the batch is in no pair; one with a single sample has no covariance, so only its mean is compared.
A sample may be in several domains and counts in each. Sums over pairs are sums of deviations from the mean over
domains, so no pair is made. Nor are the covariances where the batch has fewer rows than features: ``<C_a, C_b>`` is a
sum of squared inner products of samples (Gram identity), ``rows^2`` of them. Over several ranks ``E (d^2 + d)`` sums
are reduced instead, and no sample leaves its rank. Needs the features in front of the head or the output of a named
module, and domain ids; no targets.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from debias.methods.base import FeaturePenalty, configures
from debias.ops.arguments import checked
from debias.ops.distributed import global_sum, is_distributed
from debias.ops.domain_pairs import deviations, mean_over_pairs
from debias.ops.fields import arguments
from debias.ops.head_statistics import make_members
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
    counts = global_sum(members.sum(0))
    means = global_sum(members.T @ features) / counts.clamp_min(1).unsqueeze(1)
    present, usable = counts > 0, counts > 1  # means can be compared, covariances too
    shares = members / (counts - 1).clamp_min(1)
    disjoint = domains.dtype != torch.bool
    rows, width = len(features) + (0 if disjoint else n_domains), features.shape[1]
    if by_pairs is None:
        by_pairs = not is_distributed() and rows**2 <= n_domains * width**2
    if by_pairs:
        # Each covariance is a sum of products of rows with themselves, c_ie x_i x_i^T. Rows in several domains have no
        # mean of their own to be centred by: there a domain's mean is a row more, to be subtracted.
        if disjoint:
            centred = features - members @ means  # rows in no domain have no share in anything
        else:
            centre = features.detach().sum(0) / max(len(features), 1)
            centred = torch.cat((features, means)) - centre
            shares = torch.cat((shares, torch.diag(-counts / (counts - 1).clamp_min(1))))
        weights = deviations(shares, usable, 1)
        spread = ((centred @ centred.T).square() * (weights @ weights.T)).sum()
    else:
        centred = shares.sqrt().T.unsqueeze(2) * (features - means.unsqueeze(1))  # (E, N, d)
        covariances = global_sum(centred.mT @ centred)
        spread = deviations(covariances, usable).square().sum()
    mean_term = mean_over_pairs(deviations(means, present).square().sum() / width, present, present)
    # Pairs without a covariance count as no distance, not as fewer pairs.
    return mean_term + mean_over_pairs(spread / width**2, usable, present)


@arguments
class CORALPenalty(FeaturePenaltyModule):
    """The penalty for any training loop."""

    def of(self, features: Tensor, domains: Tensor) -> Tensor:
        """The penalty, not yet weighted."""
        return coral_penalty(features, domains, self.n_groups)


@arguments
class CORAL(FeaturePenalty):
    """Make features have the same mean and covariance in every domain.

    The formula stands at the top of :mod:`debias.methods.coral`. Logs ``train/coral_penalty`` on logging steps, before
    its weight, and the weight where it changes; with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import CORAL
        >>> CORAL(domain="hospital", n_domains=3).state_key
        'CORAL(hospital)'
    """

    reference: ClassVar[str] = "Sun & Saenko 2016, arXiv 1607.01719; DomainBed's form"
    only_features: ClassVar[bool] = True
    key: ClassVar[str] = "coral"
    module_class = CORALPenalty


class CORALMixin:
    """CORAL inside a LightningModule, for those who prefer explicit code."""

    coral: CORALPenalty
    configure_coral = configures("coral", CORALPenalty)

    def coral_penalty(self, features: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty for features ``(N, d)`` and domains ``(N,)`` at this optimiser step."""
        return self.coral(features, domains, step=self.global_step)  # type: ignore[attr-defined]
