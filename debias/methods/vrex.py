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

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.methods._domain_penalty import DomainPenalty
from debias.ops.domains import domain_shares
from debias.ops.groups import GroupSums, group_losses
from debias.ops.penalties import DomainPenaltyModule
from debias.ops.precision import in_full_precision
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.tap.tap import LossCall

__all__ = ["VREx", "VRExMixin", "VRExPenalty", "vrex_penalty"]


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


class VRExPenalty(DomainPenaltyModule):
    """The penalty for any training loop.

    Args:
        n_domains: number of domains E, at least 2.
        penalty_weight: weight in the end; published default 10.
        weight_before, start_step, ramp_steps: see :class:`debias.ops.schedule.PenaltySchedule`.

    Shape:
        losses ``(N,)``; domains ``(N,)`` int64 or boolean ``(N, E)``; output: scalar.

    Raises:
        DebiasError: an argument is out of range.
        BadRowsError: a domain id is out of range, or a loss is not finite.
    """

    def __init__(
        self,
        n_domains: int | Sequence[int],
        *,
        penalty_weight: float = 10.0,
        weight_before: float = 1.0,
        start_step: int = 0,
        ramp_steps: int = 0,
    ) -> None:
        super().__init__(
            n_domains, penalty_weight, weight_before=weight_before, start_step=start_step, ramp_steps=ramp_steps
        )

    def forward(self, losses: Tensor, domains: Tensor, *, step: int | None = None) -> Tensor:
        """The weighted penalty of one batch; ``step`` is the number of optimiser steps taken so far."""
        self.check_shapes(losses, domains)
        sums = self.sums_of(losses, torch.ones_like(losses), domains)
        return self.weighted(step, lambda _: loss_variance(sums), sums.rows)


class VREx(DomainPenalty):
    """Make the domains' losses equal.

    The method and its formula are described at the top of :mod:`debias.methods.vrex`.

    Args:
        domain: where the domain ids are; see :class:`debias.HessianAlignment`.
        n_domains: number of domains, one per key; at least 2 in all.
        penalty_weight: weight of the variance.
        weight_before, start_step, ramp_steps: the weight before optimiser step ``start_step``, and the steps within
            which it then grows to ``penalty_weight``.
        divide_loss: while the weight is above 1, divide the whole loss by it, as the IRM protocol does.
        reset_optimizer: forget the optimiser's running averages at ``start_step``, as DomainBed does.
        loss, rows, name, allow_untested_strategy: see :class:`debias.Debiaser`.

    Logs ``train/vrex_penalty``, before its weight, on logging steps, and the weight where it changes;
    with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import VREx
        >>> VREx(domain="hospital", n_domains=3).state_key
        'VREx(hospital)'
    """

    reference: ClassVar[str] = "Krueger et al., ICML 2021, arXiv 2003.00688"
    key: ClassVar[str] = "vrex"

    def __init__(
        self,
        domain: tuple[BatchKey, ...] | BatchKey,
        n_domains: int | tuple[int, ...],
        *,
        penalty_weight: float = 10.0,
        weight_before: float = 1.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        divide_loss: bool = False,
        reset_optimizer: bool = False,
        loss: int | str | Callable[[LossCall], bool] | None = None,
        rows: str | Callable[[LossCall, int], Tensor] | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(
            domain,
            n_domains,
            VRExPenalty(
                n_domains,
                penalty_weight=penalty_weight,
                weight_before=weight_before,
                start_step=start_step,
                ramp_steps=ramp_steps,
            ),
            divide_loss=divide_loss,
            reset_optimizer=reset_optimizer,
            loss=loss,
            rows=rows,
            name=name,
            allow_untested_strategy=allow_untested_strategy,
        )

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The variance for this loss."""
        return loss_variance(self.loss_sums(call, domains, step))


class VRExMixin:
    """V-REx inside a LightningModule, for those who prefer explicit code."""

    vrex: VRExPenalty

    def configure_vrex(self, n_domains: int | Sequence[int], **options: Any) -> None:
        """Make the penalty; takes the arguments of :class:`VRExPenalty`. Call it in ``__init__``."""
        self.vrex = VRExPenalty(n_domains, **options)

    def vrex_penalty(self, losses: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty for losses ``(N,)`` and domains ``(N,)`` at this optimiser step."""
        return self.vrex(losses, domains, step=self.global_step)  # type: ignore[attr-defined]
