"""Hessian alignment: make the classifier head's gradients and Hessians alike across domains.

Hemati et al., "Understanding Hessian alignment for domain generalization", ICCV 2023, arXiv 2308.11778. With ``g_e``
and ``H_e`` the gradient and the Hessian of domain e's mean loss with respect to the head's parameters, E domains, and
bars for means over them::

    penalty = 1/E sum_e  alpha |Q_e - Q|^2  +  beta |g_e - g|^2

    statistic       Q_e                                      Q
    "hgp"           H_e g_e                                  H g          (not the mean of the Q_e)
    "diagonal"      diag H_e                                 diag H
    "hutchinson"    1/m sum_k z_k * (H_e z_k)                the same of H; z_k Rademacher, fresh for each domain
    "frobenius"     H_e, all of it, in the Frobenius norm    H

For a linear head all of these are closed forms of the features, residuals and curvatures
(:mod:`debias.ops.head_statistics`): a few matrix products and one backward pass, where the authors' code
differentiates two and three times (HGP) or 300 (E + 1) times a step (Hutchinson). ``"diagonal"`` is the limit of
``"hutchinson"`` for many samples. What the estimator adds to the penalty in expectation is ``1/m`` of the off-diagonal
mass of ``H_e`` and ``H``; the first part has a gradient.
Closed-form alignment of head gradients and Hessians is also the subject of Chen et al., UAI 2025, arXiv 2506.07378.

Published: HGP ``alpha=1e-4`` (searched 1e-5 to 1e-3), ``beta=5e-3`` (1e-3 to 1e-1); Hutchinson ``alpha=1e-3``
(searched 10 to 1e4), ``beta=5e-3`` (1e2 to 1e6): its defaults lie outside its own search range and are close to plain
training. The authors' DomainBed code takes no gradient through Q and g (``detach_target=True``), their Colored MNIST
code does, and sums over the two domains there (``reduction="sum"``).

At fixed predictions, features s times as large make ``|g_e - g|^2`` s^2, ``|diag H_e - diag H|^2`` and
``|H_e - H|^2`` s^4, and ``|H_e g_e - H g|^2`` s^6 times as large, so weights tuned on one backbone mean something else
on another. ``scale_free=True`` divides each distance by ``max(1/E sum_e |Q_e|^2, |Q|^2)``, without gradient through it,
and that of the gradients likewise, which is then at most 1 in the mean over domains, and no mean above 4. The first is
the larger wherever Q is the mean of the Q_e; not so ``|Q|^2`` alone, which may be 0 where no ``|Q_e|^2`` is: a mean of
gradients vanishes in training long before those of the domains do.

A domain absent from the batch has no part in it, nor in E. One sample in a domain is a mean like another. Zero
gradients are no special case: no root is taken. Costs one all-reduce of ``2 E C (d + 1)`` floats for ``"diagonal"``, of
gradients and Hessians for ``"frobenius"``, or, where these are more than four million numbers, a gather of the rows of
all ranks; ``"hgp"`` and ``"hutchinson"`` take one for the gradients and one of ``(E + 1) C (d + 1)`` floats, and
``"hgp"`` one more in backward. Needs features, a linear head (or ``derivatives="autograd"`` for any), domain ids.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import HeadPenalty, calls, configures
from debias.ops.arguments import checked
from debias.ops.domains import make_members
from debias.ops.fields import arguments
from debias.ops.head_losses import make_head_loss
from debias.ops.head_statistics import HeadStatistics
from debias.ops.penalties import HeadPenaltyModule, PenaltyOptions
from debias.ops.precision import in_full_precision
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["HessianAlignment", "HessianAlignmentMixin", "HessianAlignmentPenalty", "hessian_alignment_penalty"]

Statistic = Literal["hgp", "diagonal", "hutchinson", "frobenius"]
# The function of :class:`debias.ops.head_statistics.HeadStatistics` that gives the distances of each statistic.
_DISTANCES: dict[str, str] = {
    "hgp": "product_distances",
    "diagonal": "diagonal_distances",
    "hutchinson": "estimated_diagonal_distances",
    "frobenius": "hessian_distances",
}
PUBLISHED_ALPHA: dict[str, float] = {"hgp": 1e-4, "diagonal": 1e-3, "hutchinson": 1e-3, "frobenius": 1e-3}


@checked(
    "features: float N D, logits: float N C | float N, targets: int N < C | any ...,"
    "domains: int N < n_domains | bool N n_domains",
    alpha="[0, inf)",
    beta="[0, inf)",
)
@in_full_precision
def hessian_alignment_penalty(
    features: Tensor,
    logits: Tensor,
    targets: Tensor,
    domains: Tensor,
    n_domains: int,
    *,
    loss: str = "cross_entropy",
    head_bias: bool = True,
    statistic: Statistic = "hgp",
    alpha: float | None = None,
    beta: float = 5e-3,
    detach_target: bool = True,
    scale_free: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    n_samples: int = 300,
    generator: torch.Generator | None = None,
    **loss_options: Any,
) -> Tensor:
    """The penalty of one batch for a linear head.

    Args:
        features: input of the head, ``(N, d)``.
        logits: its output, ``(N, C)``, as a function of the features.
        targets: targets of the loss.
        domains: int64 ``(N,)``, negative where unlabelled, or boolean membership ``(N, E)``.
        n_domains: number of domains E.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        head_bias: whether the head adds a bias.
        statistic: what of the Hessians is compared: ``"hgp"``, ``"diagonal"``, ``"hutchinson"`` or ``"frobenius"``.
        alpha: weight of the Hessians' distance, >= 0; by default the published value of the statistic.
        beta: weight of the gradients' distance, >= 0.
        detach_target: take no gradient through the means over domains.
        scale_free: divide each distance by the mean squared norm of what is compared.
        reduction: mean or sum over domains.
        n_samples: Rademacher vectors of ``"hutchinson"``.
        generator: where they are drawn from.
        **loss_options: ``weight``, ``label_smoothing``, ``ignore_index``, ``pos_weight``.

    Returns:
        Scalar.

    Example:
        >>> import torch
        >>> from debias.functional import hessian_alignment_penalty
        >>> head = torch.nn.Linear(3, 2)
        >>> features, targets, domains = torch.randn(8, 3), torch.arange(8) % 2, torch.arange(8) // 4
        >>> hessian_alignment_penalty(features, head(features), targets, domains, 2).shape
        torch.Size([])
    """
    members = make_members(domains, n_domains, len(logits))
    statistics = HeadStatistics(features, make_head_loss(loss, logits, targets, **loss_options), members, head_bias)
    alpha = PUBLISHED_ALPHA[statistic] if alpha is None else alpha
    return alignment(
        statistics, statistic=statistic, alpha=alpha, beta=beta, detach_target=detach_target, scale_free=scale_free,
        reduction=reduction, n_samples=n_samples, generator=generator,
    )  # fmt: skip


def alignment(
    statistics: HeadStatistics,
    *,
    statistic: str,
    alpha: float,
    beta: float,
    detach_target: bool,
    scale_free: bool,
    reduction: str,
    n_samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The penalty from statistics of any head."""
    distances: Any = 0
    options: dict[str, Any] = {"detach_target": detach_target, "relative": scale_free}
    if alpha:
        drawn = {"n_samples": n_samples, "generator": generator} if statistic == "hutchinson" else {}
        distances = alpha * getattr(statistics, _DISTANCES[statistic])(**options, **drawn)
    if beta:  # after the products, whose inner products of samples it takes up
        distances = distances + beta * statistics.gradient_distances(**options)
    if not isinstance(distances, Tensor):
        return statistics.features.new_zeros(())
    return distances @ (statistics.present.to(distances.dtype) if reduction == "sum" else statistics.domain_shares)


@arguments(of=hessian_alignment_penalty)
class HessianAlignmentOptions(PenaltyOptions):
    """Options of Hessian alignment."""

    statistic: Statistic = "hgp"
    alpha: float | None = None
    beta: float = 5e-3
    detach_target: bool = True
    scale_free: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    n_samples: int = 300


@arguments
class HessianAlignmentPenalty(HessianAlignmentOptions, HeadPenaltyModule):
    """The penalty for any training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = PUBLISHED_ALPHA[self.statistic] if self.alpha is None else self.alpha

    def weight_in_words(self) -> str:
        """The weights under which losses may have diverged, for messages."""
        return f"{super().weight_in_words()} with `alpha={self.alpha:g}`, `beta={self.beta:g}`"

    def of(self, statistics: HeadStatistics, generator: torch.Generator | None = None) -> Tensor:
        """The penalty, not yet weighted, from statistics of any head."""
        return alignment(
            statistics, statistic=self.statistic, alpha=float(self.alpha or 0), beta=self.beta,
            detach_target=self.detach_target, scale_free=self.scale_free, reduction=self.reduction,
            n_samples=self.n_samples, generator=generator,
        )  # fmt: skip


@arguments
class HessianAlignment(HessianAlignmentOptions, HeadPenalty):
    """Align the classifier head's gradients and Hessians across domains.

    A shortcut that pays differently in each domain makes each of them pull the head another way; a head that all agree
    on has to use something else.

    ``derivatives="autograd"`` goes with ``"hgp"`` and ``"hutchinson"``.

    Args:
        seed: seed of the Rademacher vectors.

    Example:
        >>> from debias import HessianAlignment
        >>> HessianAlignment(domain="hospital", n_domains=3, statistic="diagonal").state_key
        'HessianAlignment(hospital)'
    """

    reference = "Hemati et al., ICCV 2023, arXiv 2308.11778"
    works = "Each domain has all classes, and several domains are in a batch."
    fails = (
        "The shortcut pays in every domain. A published weight means something else on other features; "
        "`scale_free=True` makes it relative."
    )
    key = "hessian_alignment"
    module_class = HessianAlignmentPenalty

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.derivatives == "autograd" and self.statistic not in ("hgp", "hutchinson"):
            raise DebiasError(
                f"Expected `statistic` to be 'hgp' or 'hutchinson' with `derivatives='autograd'`, but got"
                f" {self.statistic!r}, which has a closed form for a linear head only."
            )

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for this loss."""
        statistics = self.head_statistics(call, domains, step)
        generator = None
        if self.module.statistic == "hutchinson":
            generator = self.random.generator(statistics.features.device, "probes", shared=True)
        return self.module.of(statistics, generator)


class HessianAlignmentMixin:
    """Hessian alignment inside a LightningModule, for those who prefer explicit code.

    Example:
        >>> import lightning as L, torch
        >>> from debias import HessianAlignmentMixin
        >>> class Model(HessianAlignmentMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        ...         self.configure_hessian_alignment(n_domains=2)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, domain = batch
        ...         features = self.backbone(x)
        ...         logits = self.head(features)
        ...         loss = torch.nn.functional.cross_entropy(logits, y)
        ...         return loss + self.hessian_alignment_penalty(features, logits, y, domain)
    """

    hessian_alignment: HessianAlignmentPenalty
    configure_hessian_alignment = configures("hessian_alignment", HessianAlignmentPenalty)
    hessian_alignment_penalty = calls("hessian_alignment", HessianAlignmentPenalty.forward)
