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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from debias.errors import BadRowsError, DebiasError
from debias.methods.base import LossOptions, Method, configures
from debias.ops.arguments import check_number, checked
from debias.ops.distributed import gather
from debias.ops.fields import arguments
from debias.ops.groups import GroupState, readable
from debias.ops.precision import autocast_off
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = [
    "CVaRDRO",
    "CVaRDROMixin",
    "CVaRLoss",
    "ChiSquareDRO",
    "ChiSquareDROMixin",
    "ChiSquareLoss",
    "chi_square_weights",
    "cvar_weights",
]


@checked("losses: float m, shares: float m", alpha="(0, 1]", temperature="[0, inf)")
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


@checked("losses: float m, shares: float m", radius="[0, inf)", penalty="(0, inf)")
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
    if radius is None and penalty is None:
        raise DebiasError("Expected `radius` or `penalty` to be a number, but got None for both. Pass one of them.")
    losses, shares = _batch(losses, shares)
    order, v, b = _sorted(losses, shares)
    v = v - v[:1]  # from the largest one on: sums of squares then lose no digits where it matters
    ball, mass = 1 + 2 * (radius or 0), b.cumsum(0)
    first = (b * v).cumsum(0)
    following = torch.cat((v[1:], v.new_full((1,), -torch.inf)))
    if penalty is not None:
        eta = (first - penalty) / mass
        allowed = torch.ones_like(mass, dtype=torch.bool)
    else:
        spread = mass * ball - 1
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
        p = torch.where(top.sum() * ball >= 1, top, p)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


class WorstCaseLoss(GroupState):
    """What both objectives share: the global batch, and rows that are not finite."""

    kind = "sample"

    def __post_init__(self) -> None:
        super().__init__(1)

    def weights(self, losses: Tensor, shares: Tensor) -> Tensor:
        """Weights of the global batch, ``(m,)``."""
        raise NotImplementedError

    def forward(self, losses: Tensor) -> Tensor:
        """The objective for losses ``(N,)``."""
        if losses.ndim != 1:
            raise DebiasError(
                f"Expected `losses` to have shape (N,), one loss per sample, but got {tuple(losses.shape)}. Compute"
                " them with `reduction='none'`."
            )
        return self.reweigh([(losses, torch.ones_like(losses))])[0]

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The objective for losses of the same rows, which get the same weights, those of their sum.

        Args:
            calls: numerators and denominators of each loss, ``(rows,)``; a row with denominator 0 does not count.
        """
        dtype = torch.float32 if calls[0][0].device.type == "mps" else torch.float64
        dens = [den.detach().to(dtype) for _, den in calls]
        values = [num.to(dtype) / torch.where(den == 0, 1, den) for (num, _), den in zip(calls, dens, strict=True)]
        bad = torch.stack([~value.detach().isfinite() for value in values]).any(0)
        counts = (dens[0] != 0) & ~bad
        values = [gather(torch.where(counts, value, 0)) for value in values]
        facts = gather(torch.stack([torch.where(counts, dens[0], 0), bad.to(dtype)], 1))
        self._count(facts[:, 1])
        shares = facts[:, 0] / facts[:, 0].sum().clamp_min(torch.finfo(dtype).tiny)
        weights = self.weights(torch.stack([value.detach() for value in values]).sum(0), shares)
        weights = weights.nan_to_num(0.0)  # of a batch in which nothing counts
        return [(weights * value).sum().to(num.dtype) for value, (num, _) in zip(values, calls, strict=True)]

    def _count(self, bad: Tensor) -> None:
        none, rows = bad.new_zeros(()), bad.sum()
        self.count_bad(readable(torch.stack([none, len(bad) - rows, none, rows]).double()))


@arguments(kw_only=False)
class CVaROptions:
    """Options of the worst fraction.

    Args:
        alpha: the fraction, in (0, 1]; 1 is plain training. ``alpha`` times the global batch must be much larger than
            one.
        temperature: smooths the weights by their relative entropy; 0 for none.
    """

    alpha: float = 0.1
    temperature: float = 0.0


@arguments
class CVaRLoss(CVaROptions, WorstCaseLoss):
    """The mean loss of the worst fraction of a batch, for any training loop.

    Shape:
        losses ``(N,)``, unreduced; output: scalar. In a distributed run that of the global batch.

    Raises:
        BadRowsError: a loss is not finite.

    Example:
        >>> import torch
        >>> from debias import CVaRLoss
        >>> CVaRLoss(alpha=0.3)(torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1]))
        tensor(1.6667)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = check_number("alpha", self.alpha, "(0, 1]")
        self.temperature = check_number("temperature", self.temperature)

    def weights(self, losses: Tensor, shares: Tensor) -> Tensor:
        """See :func:`debias.functional.cvar_weights`."""
        return cvar_weights(losses, alpha=self.alpha, temperature=self.temperature, shares=shares)


@arguments(kw_only=False)
class ChiSquareOptions:
    """Options of the chi-square ball.

    Args:
        radius: of the ball, 1 by default.
        penalty: weight of the divergence instead of a ball; the loss is then ``<p, v>`` without the divergence, which
            is a constant where p is.
    """

    radius: float | None = None
    penalty: float | None = None


@arguments
class ChiSquareLoss(ChiSquareOptions, WorstCaseLoss):
    """The worst-case mean loss in a chi-square ball around a batch, for any training loop.

    Shape:
        losses ``(N,)``, unreduced; output: scalar. In a distributed run that of the global batch.

    Raises:
        BadRowsError: a loss is not finite.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius is not None and self.penalty is not None:
            raise DebiasError(
                f"Expected either `radius` or `penalty`, but got {self.radius!r} and {self.penalty!r}. Leave one of"
                " them out."
            )
        self.penalty = None if self.penalty is None else check_number("penalty", self.penalty, "(0, inf)")
        self.radius = check_number("radius", 1.0 if self.radius is None else self.radius, "(0, inf)")

    def weights(self, losses: Tensor, shares: Tensor) -> Tensor:
        """See :func:`debias.functional.chi_square_weights`."""
        return chi_square_weights(losses, radius=self.radius, penalty=self.penalty, shares=shares)


class WorstCase(LossOptions, Method):
    """The callback of both: reads the losses, calls the module, logs."""

    reference = "Levy et al., NeurIPS 2020, arXiv 2010.05893"
    module: Any

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The worst case over the rows of the global batch."""
        if len({len(call.num) for call in calls}) > 1:
            raise BadRowsError(
                f"Expected losses of the same samples for {self.state_key} with `loss='sum'`, but got"
                f" {[len(call.num) for call in calls]} rows. Choose one of them."
            )
        device = str(calls[0].num.device.type)
        with autocast_off(device):
            losses = self.module.reweigh([(call.num, call.den) for call in calls])
        if step.logging:
            self.module.raise_if_bad()
            # What the step logs itself may be the reweighed loss.
            self.log_value("average_loss", torch.stack([call.mean().detach() for call in calls]).sum(), step)
        return losses

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid."""
        self.module.raise_if_bad()


@arguments
class CVaRDRO(CVaROptions, WorstCase):
    """Train on the worst fraction of each batch; needs no group labels.

    Rows of one sample count one by one. Logs
    ``train/average_loss``, unweighted, on logging steps.
    """

    works = "A fixed share of the samples is hard, and batches are large."
    fails = "Labels are noisy, or batches small: `alpha` times the batch must be much larger than one."
    module_class = CVaRLoss


@arguments
class ChiSquareDRO(ChiSquareOptions, WorstCase):
    """Train on the worst distribution in a chi-square ball around each batch; needs no group labels.

    Rows of one sample count one by one. Logs
    ``train/average_loss``, unweighted, on logging steps.
    """

    works = "Hard samples are to count more without a fixed share of them, and batches are large."
    fails = "Labels are noisy, or batches small: the worst distribution is that of the batch."
    module_class = ChiSquareLoss


class CVaRDROMixin:
    """The worst fraction of each batch inside a LightningModule.

    Example:
        >>> import lightning as L, torch
        >>> from debias import CVaRDROMixin
        >>> class Model(CVaRDROMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 2)
        ...         self.configure_cvar_dro(alpha=0.2)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return self.cvar_dro_loss(torch.nn.functional.cross_entropy(self.net(x), y, reduction="none"))
    """

    cvar_dro: CVaRLoss
    configure_cvar_dro = configures("cvar_dro", CVaRLoss)

    def cvar_dro_loss(self, losses: Tensor) -> Tensor:
        """The objective for losses ``(N,)``."""
        return self.cvar_dro(losses)


class ChiSquareDROMixin:
    """The worst distribution in a chi-square ball around each batch inside a LightningModule."""

    chi_square_dro: ChiSquareLoss
    configure_chi_square_dro = configures("chi_square_dro", ChiSquareLoss)

    def chi_square_dro_loss(self, losses: Tensor) -> Tensor:
        """The objective for losses ``(N,)``."""
        return self.chi_square_dro(losses)


def _batch(losses: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    if not losses.numel():
        raise DebiasError("Expected `losses` of at least one sample, but got none. Leave empty batches out.")
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
