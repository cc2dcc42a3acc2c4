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
from typing import Literal

import torch
from torch import Tensor

from debias.methods.base import FeaturePenalty, calls, configures
from debias.ops.arguments import checked
from debias.ops.distributed import gathers
from debias.ops.domains import make_members
from debias.ops.fields import arguments
from debias.ops.known_gradient import known_gradient
from debias.ops.penalties import FeaturePenaltyModule, PenaltyOptions
from debias.ops.precision import in_full_precision

__all__ = ["MMD", "MMDMixin", "MMDPenalty", "mmd_penalty"]

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
Kernel = Literal["gaussian", "scaled_gaussian"]


@checked("features: float N D, domains: int N < n_domains | bool N n_domains", gammas="[0, inf)")
@in_full_precision
def mmd_penalty(
    features: Tensor, domains: Tensor, n_domains: int, *, kernel: Kernel = "gaussian", gammas: Sequence[float] = GAMMAS
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
    members = make_members(domains, n_domains, len(features)).to(features.dtype)
    members, features = gathers([members, features])
    return known_gradient(features, *_mmd(features.detach(), members.detach(), kernel, tuple(gammas)))


@torch.no_grad()
def _mmd(x: Tensor, members: Tensor, kernel: Kernel, gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The penalty, and its gradient with respect to the features of all ranks ``(N, d)``."""
    counts = members.sum(0)
    present = (counts > 0).to(x.dtype)
    k = present.sum()
    shares = members / counts.clamp_min(1)
    weights = shares - shares.sum(1, keepdim=True) / k.clamp_min(1) * present
    # By inner products of centred features, which rounds least. What is left of the rounding error, times a gamma of
    # 1000, would have a sample differ from itself and from its copies: distances that small are 0.
    x = x - x.mean(0)
    inner = x @ x.T
    squares = inner.diagonal()
    norms = squares.unsqueeze(0) + squares.unsqueeze(1)
    distances = norms - 2 * inner
    rounding = (2 + 2 * x.shape[1] ** 0.5) * torch.finfo(x.dtype).eps
    distances = torch.where(distances > rounding * norms, distances, 0)
    scale: Tensor | float = 1.0
    if kernel == "scaled_gaussian":
        labelled = members.sum(1).clamp_max(1)
        mean = labelled @ distances @ labelled / labelled.sum().square().clamp_min(1)
        scale = torch.where(mean > 0, mean, 1)
    similarities, slopes = _kernels(distances / scale, gammas)
    # Summed over all pairs of rows, where those of deviations from the mean over domains stand for pairs of domains.
    pairs = (weights @ weights.T) * (2 / (k - 1).clamp_min(1))
    to_distances = torch.where(distances > 0, pairs * slopes, 0) / scale
    gradient = 4 * (to_distances.sum(1, keepdim=True) * x - to_distances @ x)
    return (similarities * pairs).sum(), gradient


def _kernels(distances: Tensor, gammas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``sum_gamma exp(-gamma d)`` and its derivative, ``(N, N)``, in blocks of rows that bound the memory."""
    factors = -torch.tensor(gammas, dtype=distances.dtype).to(distances.device, non_blocking=True).view(-1, 1, 1)
    values, slopes = torch.empty_like(distances), torch.empty_like(distances)
    size = max(1, 2**20 // max(distances.shape[1], 1))
    for block, value, slope in zip(*(table.split(size) for table in (distances, values, slopes)), strict=True):
        terms = (factors * block).exp_()
        torch.sum(terms, 0, out=value)
        torch.sum(terms.mul_(factors), 0, out=slope)
    return values, slopes


@arguments(of=mmd_penalty)
class MMDOptions(PenaltyOptions):
    """Options of MMD, at DomainBed's values."""

    kernel: Kernel = "gaussian"
    gammas: Sequence[float] | None = GAMMAS


@arguments
class MMDPenalty(MMDOptions, FeaturePenaltyModule):
    """The penalty for any training loop."""

    def of(self, features: Tensor, domains: Tensor) -> Tensor:
        """The penalty, not yet weighted."""
        return mmd_penalty(features, domains, self.n_groups, kernel=self.kernel, gammas=self.gammas or GAMMAS)


@arguments
class MMD(MMDOptions, FeaturePenalty):
    """Make features have the same distribution in every domain.

    Clues that hold in some domains only make features differ by domain; features that are distributed alike carry less
    of them.

    Example:
        >>> from debias import MMD
        >>> MMD(domain="hospital", n_domains=3, kernel="scaled_gaussian").state_key
        'MMD(hospital)'
    """

    reference = "Gretton et al., JMLR 2012; Li et al., CVPR 2018; DomainBed's form"
    works = "Domains have the same classes in the same shares, and differ in how inputs look."
    fails = (
        "Classes are spread unevenly over domains. Raw features of large norm, on which the fixed kernels are 0: "
        'take `kernel="scaled_gaussian"`.'
    )
    only_features = True
    key = "mmd"
    module_class = MMDPenalty


class MMDMixin:
    """MMD inside a LightningModule, for those who prefer explicit code."""

    mmd: MMDPenalty
    configure_mmd = configures("mmd", MMDPenalty)
    mmd_penalty = calls("mmd", MMDPenalty.forward)
