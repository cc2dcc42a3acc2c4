"""MMD: features should have the same distribution in every domain. Gretton et al., JMLR 2012; Li et al., CVPR 2018.

In DomainBed's form (Gulrajani & Lopez-Paz, ICLR 2021), over all pairs of domains a, b::

    penalty = mean over pairs of  K_aa + K_bb - 2 K_ab
    K_ab    = mean over x in a, y in b of  sum_gamma exp(-gamma |x - y|^2)        gamma = 1e-3, 1e-2, ..., 1e3

(the biased estimate: a sample is also compared with itself). In DomainBed rounding makes a sample differ from itself
under the larger gammas; here squared distances within the rounding error, ``2 (1 + sqrt d) eps (|x|^2 + |y|^2)`` for d
features around their mean, are 0, those of a sample to itself and to its copies among them. Features whose squared
distances are in the hundreds, such as raw pooled ones, make all terms but the first 0 and that one small:
``kernel="scaled_gaussian"`` divides the squared distances by their mean over the batch (without gradient through it).

Published: weight 1 (searched 0.1 to 10).

A domain absent from the batch is in no pair. One sample in a domain is a distribution like another. Memory ``rows^2``,
whatever the number of domains; kernels are no function of sums, so the features of all ranks are gathered. Needs the
features in front of the head or the output of a named module, and domain ids; no targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import FeaturePenalty, configures
from debias.ops.arguments import check_number, checked
from debias.ops.distributed import gather
from debias.ops.domain_pairs import deviations, mean_over_pairs
from debias.ops.fields import arguments
from debias.ops.head_statistics import make_members
from debias.ops.penalties import FeaturePenaltyModule, PenaltyOptions
from debias.ops.precision import in_full_precision

__all__ = ["MMD", "MMDMixin", "MMDPenalty", "mmd_penalty"]

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
Kernel = Literal["gaussian", "scaled_gaussian"]


@checked("features: float N D, domains: int N < n_domains | bool N n_domains", gammas="[0, inf)")
@in_full_precision
def mmd_penalty(
    features: Tensor,
    domains: Tensor,
    n_domains: int,
    *,
    kernel: Kernel = "gaussian",
    gammas: Sequence[float] = GAMMAS,
) -> Tensor:
    """Squared maximum mean discrepancy between domains, averaged over pairs.

    Args:
        features: ``(N, d)``.
        domains: int64 ``(N,)``, negative where unlabelled, or boolean membership ``(N, E)``.
        n_domains: number of domains E.
        kernel: ``"gaussian"``, or ``"scaled_gaussian"`` on distances divided by their mean.
        gammas: inverse widths of the kernels, which are added.

    Returns:
        Scalar; 0 with fewer than two domains in the batch.

    Example:
        >>> import torch
        >>> from debias.functional import mmd_penalty
        >>> mmd_penalty(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), n_domains=2, gammas=[1.0])
        tensor(1.2642)
    """
    members = gather(make_members(domains, n_domains, len(features)).to(features.dtype))
    features = gather(features)
    counts = members.sum(0)
    weights = deviations(members / counts.clamp_min(1), counts > 0, 1)
    # By inner products of centred features, which rounds least. What is left of the rounding error, times a gamma of
    # 1000, would have a sample differ from itself and from its copies: distances that small are 0.
    features = features - features.detach().mean(0)
    inner = features @ features.T
    norms = inner.diagonal().unsqueeze(0) + inner.diagonal().unsqueeze(1)
    distances = norms - 2 * inner
    rounding = (2 + 2 * features.shape[1] ** 0.5) * torch.finfo(features.dtype).eps
    distances = torch.where(distances > rounding * norms, distances, 0)
    if kernel == "scaled_gaussian":
        labelled = members.sum(1).clamp_max(1)
        mean = labelled @ distances.detach() @ labelled / labelled.sum().square().clamp_min(1)
        distances = distances / torch.where(mean > 0, mean, 1)
    similarities = sum(((-gamma * distances).exp() for gamma in gammas), start=torch.zeros_like(distances))
    return mean_over_pairs((similarities * (weights @ weights.T)).sum(), counts > 0, counts > 0)


@arguments
class MMDOptions(PenaltyOptions):
    """Options of MMD.

    Args:
        kernel: ``"gaussian"``, or ``"scaled_gaussian"`` on distances divided by their mean.
        gammas: inverse widths of the kernels, which are added; positive, by default DomainBed's seven.
    """

    kernel: Kernel = "gaussian"
    gammas: Sequence[float] | None = None


@arguments
class MMDPenalty(MMDOptions, FeaturePenaltyModule):
    """The penalty for any training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        gammas = GAMMAS if self.gammas is None else self.gammas
        if not gammas:
            raise DebiasError("Expected `gammas` to hold one inverse width or more, but got none.")
        self.gammas = [check_number("gammas", gamma) for gamma in gammas]

    def of(self, features: Tensor, domains: Tensor) -> Tensor:
        """The penalty, not yet weighted."""
        return mmd_penalty(features, domains, self.n_groups, kernel=self.kernel, gammas=self.gammas or GAMMAS)


@arguments
class MMD(MMDOptions, FeaturePenalty):
    """Make features have the same distribution in every domain.

    The formula stands at the top of :mod:`debias.methods.mmd`. Logs ``train/mmd_penalty`` on logging steps, before its
    weight, and the weight where it changes; with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import MMD
        >>> MMD(domain="hospital", n_domains=3, kernel="scaled_gaussian").state_key
        'MMD(hospital)'
    """

    reference: ClassVar[str] = "Gretton et al., JMLR 2012; Li et al., CVPR 2018; DomainBed's form"
    only_features: ClassVar[bool] = True
    key: ClassVar[str] = "mmd"
    module_class = MMDPenalty


class MMDMixin:
    """MMD inside a LightningModule, for those who prefer explicit code."""

    mmd: MMDPenalty
    configure_mmd = configures("mmd", MMDPenalty)

    def mmd_penalty(self, features: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty for features ``(N, d)`` and domains ``(N,)`` at this optimiser step."""
        return self.mmd(features, domains, step=self.global_step)  # type: ignore[attr-defined]
