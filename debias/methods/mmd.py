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

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods._domain_penalty import DomainPenalty
from debias.ops.arguments import check_number
from debias.ops.distributed import gathers
from debias.ops.domains import make_members
from debias.ops.known_gradient import known_gradient
from debias.ops.penalties import DomainPenaltyModule
from debias.ops.precision import in_full_precision
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.tap.tap import LossCall

__all__ = ["MMD", "MMDMixin", "MMDPenalty", "mmd_penalty"]

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
Kernel = Literal["gaussian", "scaled_gaussian"]


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


class MMDPenalty(DomainPenaltyModule):
    """The penalty for any training loop.

    Args:
        n_domains: number of domains E, at least 2.
        penalty_weight: weight in the end; published default 1.
        kernel: ``"gaussian"``, or ``"scaled_gaussian"`` on distances divided by their mean.
        gammas: inverse widths of the kernels, which are added; positive.
        weight_before, start_step, ramp_steps: see :class:`debias.ops.schedule.PenaltySchedule`.

    Shape:
        features ``(N, d)``; domains ``(N,)`` int64 or boolean ``(N, E)``; output: scalar.

    Raises:
        DebiasError: an argument is out of range.
        BadRowsError: a domain id is out of range, or a row is not finite.
    """

    def __init__(
        self,
        n_domains: int | Sequence[int],
        *,
        penalty_weight: float = 1.0,
        kernel: Kernel = "gaussian",
        gammas: Sequence[float] = GAMMAS,
        weight_before: float = 0.0,
        start_step: int = 0,
        ramp_steps: int = 0,
    ) -> None:
        super().__init__(
            n_domains, penalty_weight, weight_before=weight_before, start_step=start_step, ramp_steps=ramp_steps
        )
        if kernel not in ("gaussian", "scaled_gaussian"):
            raise DebiasError(f"Expected `kernel` to be 'gaussian' or 'scaled_gaussian', but got {kernel!r}.")
        if not gammas:
            raise DebiasError("Expected `gammas` to hold one inverse width or more, but got none.")
        self.kernel: Kernel = kernel
        self.gammas = [check_number("gammas", gamma) for gamma in gammas]

    def forward(self, features: Tensor, domains: Tensor, *, step: int | None = None) -> Tensor:
        """The weighted penalty of one batch; ``step`` is the number of optimiser steps taken so far."""
        make_members(domains, self.n_domains, len(features))
        self.count_rows(domains, features)
        return self.weighted(step, lambda f: self.of(f, domains), features)

    def of(self, features: Tensor, domains: Tensor) -> Tensor:
        """The penalty, not yet weighted."""
        return mmd_penalty(features, domains, self.n_domains, kernel=self.kernel, gammas=self.gammas)


class MMD(DomainPenalty):
    """Make features have the same distribution in every domain.

    The method and its formula are described at the top of :mod:`debias.methods.mmd`.

    Args:
        domain: where the domain ids are; see :class:`debias.HessianAlignment`.
        n_domains: number of domains, one per key; at least 2 in all.
        penalty_weight: weight of the penalty.
        kernel: ``"gaussian"``, or ``"scaled_gaussian"`` on distances divided by their mean.
        gammas: inverse widths of the kernels; by default DomainBed's seven.
        weight_before, start_step, ramp_steps: the weight before optimiser step ``start_step``, and the steps within
            which it then grows to ``penalty_weight``.
        features: dotted path of the module whose output ``(N, d)`` is meant; by default the input of the classifier
            head, which is found.
        head: dotted path of the layer whose input the features are, where it is not found.
        loss, rows, name, allow_untested_strategy: see :class:`debias.Debiaser`.

    Logs ``train/mmd_penalty``, before its weight, on logging steps, and the weight where it changes;
    with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import MMD
        >>> MMD(domain="hospital", n_domains=3, kernel="scaled_gaussian").state_key
        'MMD(hospital)'
    """

    reference: ClassVar[str] = "Gretton et al., JMLR 2012; Li et al., CVPR 2018; DomainBed's form"
    needs: ClassVar[tuple[str, ...]] = ("domain", "features")
    needs_features: ClassVar[bool] = True
    key: ClassVar[str] = "mmd"

    def __init__(
        self,
        domain: tuple[BatchKey, ...] | BatchKey,
        n_domains: int | tuple[int, ...],
        *,
        penalty_weight: float = 1.0,
        kernel: Kernel = "gaussian",
        gammas: list[float] | None = None,
        weight_before: float = 0.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        features: str | None = None,
        head: str | None = None,
        loss: int | str | Callable[[LossCall], bool] | None = None,
        rows: str | Callable[[LossCall, int], Tensor] | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(
            domain,
            n_domains,
            MMDPenalty(
                n_domains, penalty_weight=penalty_weight, kernel=kernel, gammas=GAMMAS if gammas is None else gammas,
                weight_before=weight_before, start_step=start_step, ramp_steps=ramp_steps,
            ),
            features=features,
            head=head,
            loss=loss,
            rows=rows,
            name=name,
            allow_untested_strategy=allow_untested_strategy,
        )  # fmt: skip

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The penalty for the features this loss is computed from, or those that are named."""
        return self.module.of(*self.feature_rows(call, domains))


class MMDMixin:
    """MMD inside a LightningModule, for those who prefer explicit code."""

    mmd: MMDPenalty

    def configure_mmd(self, n_domains: int | Sequence[int], **options: Any) -> None:
        """Make the penalty; takes the arguments of :class:`MMDPenalty`. Call it in ``__init__``."""
        self.mmd = MMDPenalty(n_domains, **options)

    def mmd_penalty(self, features: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty for features ``(N, d)`` and domains ``(N,)`` at this optimiser step."""
        return self.mmd(features, domains, step=self.global_step)  # type: ignore[attr-defined]
