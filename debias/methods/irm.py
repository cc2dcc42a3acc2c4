"""IRM (v1): no domain alone should want to rescale the logits. Arjovsky et al. 2019, arXiv 1907.02893, section 3.

With ``D_e`` the derivative of domain e's mean loss with respect to a scale s on its logits, at s = 1::

    D_e = d/ds L_e(s z) = mean over e of <r_i, z_i>          r_i = d l_i / d z_i, the residual

    penalty = 1/E sum_e  D_e^2                   form="squared"   (the paper's Colored MNIST code)
              1/E sum_e  D_e(even) D_e(odd)      form="unbiased"  (the paper's appendix; DomainBed, WILDS)

so it needs no second differentiation, and any network will do. The product over a domain's samples of even and odd
position estimates the square of the expected derivative without bias; it can be negative.

Published: DomainBed weight 100 (searched 0.1 to 1e5), at weight 1 for the first 500 steps, Adam reset at the switch;
Colored MNIST weight 91257 after 190 steps, with the whole loss divided by it.

A domain absent from the batch has no part in it; nor, in the unbiased form, has one with a single sample, whose odd
half is empty. Positions are counted over the ranks in their order, so the halves are those of one process. Costs one
all-reduce of 2 E floats (4 E, and one of ranks x E). Needs logits and targets of a cross-entropy, binary cross-entropy
or squared error, and domain ids; no features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods._domain_penalty import DomainPenalty, head_loss, rows_of
from debias.ops.distributed import global_rank, global_sum, is_distributed, world_size
from debias.ops.domains import check_domains, domain_shares
from debias.ops.groups import GroupSums, group_losses
from debias.ops.head_losses import HeadLoss, make_head_loss
from debias.ops.penalties import LossPenaltyModule
from debias.ops.precision import in_full_precision
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.tap.tap import LossCall

__all__ = ["IRM", "IRMMixin", "IRMPenalty", "irm_penalty"]

Form = Literal["unbiased", "squared"]


@in_full_precision
def irm_penalty(
    logits: Tensor,
    targets: Tensor,
    domains: Tensor,
    n_domains: int,
    *,
    form: Form = "unbiased",
    loss: str = "cross_entropy",
    **loss_options: Any,
) -> Tensor:
    """The penalty of one batch; rows with a logit or a loss that is not finite have no part in it.

    Args:
        logits: ``(N, C)``, or ``(N,)`` for the binary cross-entropy and the squared error.
        targets: targets of the loss.
        domains: int64 ``(N,)``, negative where unlabelled, or boolean membership ``(N, E)``.
        n_domains: number of domains E.
        form: ``"unbiased"`` or ``"squared"``.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        **loss_options: ``weight``, ``label_smoothing``, ``ignore_index``, ``pos_weight``.

    Returns:
        Scalar.

    Example:
        >>> import torch
        >>> from debias.functional import irm_penalty
        >>> logits = torch.tensor([[0.0], [2.0]])
        >>> irm_penalty(logits, torch.ones(2, 1), torch.tensor([0, 1]), 2, form="squared", loss="binary_cross_entropy")
        tensor(0.0284)
    """
    check_domains(domains, n_domains, len(logits))
    head = make_head_loss(loss, logits, targets, **loss_options)
    return derivative_product(scale_derivatives(head, domains, n_domains, form)[0], form)


def scale_derivatives(
    loss: HeadLoss, domains: Tensor, n_domains: int, form: Form
) -> tuple[GroupSums, Tensor | list[float]]:
    """Sums of the samples' scale derivatives by domain, in the unbiased form by its halves in turn, and the numbers of
    rows by place: see :func:`debias.ops.groups.group_losses`.
    """
    # The logit -inf of a class that is masked has no share in the loss where its residual is 0.
    masked = (loss.logits == -torch.inf) & (loss.residuals == 0)
    rows = (loss.residuals * loss.logits.masked_fill(masked, 0)).sum(1)
    groups, n_groups = domains, n_domains
    if form == "unbiased":
        groups, n_groups = halves(domains, n_domains, loss.den != 0), 2 * n_domains
    (sums,), counts = group_losses([(rows, loss.den, groups)], n_groups)
    return sums, counts


def derivative_product(sums: GroupSums, form: Form) -> Tensor:
    """The penalty from the sums that :func:`scale_derivatives` makes."""
    derivatives, present = sums.means, sums.present
    if form == "squared":
        product = derivatives.square()
    else:  # torch's `prod` would wait for the device in its backward
        even, odd = derivatives.view(-1, 2).unbind(1)
        product, present = even * odd, present.view(-1, 2).all(1)
    return product.dot(domain_shares(present, product.dtype)).to(sums.rows.dtype)


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


class IRMPenalty(LossPenaltyModule):
    """The penalty for any training loop.

    Args:
        n_domains: number of domains E, at least 2.
        penalty_weight: weight in the end; published default 100.
        form: ``"unbiased"`` or ``"squared"``.
        weight_before, start_step, ramp_steps: see :class:`debias.ops.schedule.PenaltySchedule`.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        **loss_options: what the loss is called with: ``weight``, ``label_smoothing``, ``ignore_index``, ``pos_weight``,
            see :class:`debias.ops.penalties.LossPenaltyModule`.

    Shape:
        logits ``(N, C)``; targets of the loss; domains ``(N,)`` int64 or boolean ``(N, E)``; output: scalar.

    Raises:
        DebiasError: an argument is out of range.
        BadRowsError: a domain id is out of range, or a row is not finite.
    """

    def __init__(
        self,
        n_domains: int | Sequence[int],
        *,
        penalty_weight: float = 100.0,
        form: Form = "unbiased",
        weight_before: float = 1.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        loss: str = "cross_entropy",
        **loss_options: Any,
    ) -> None:
        super().__init__(
            n_domains, penalty_weight, loss=loss, loss_options=loss_options, weight_before=weight_before,
            start_step=start_step, ramp_steps=ramp_steps,
        )  # fmt: skip
        if form not in ("unbiased", "squared"):
            raise DebiasError(f"Expected `form` to be 'unbiased' or 'squared', but got {form!r}.")
        self.form = form

    def forward(self, logits: Tensor, targets: Tensor, domains: Tensor, *, step: int | None = None) -> Tensor:
        """The weighted penalty of one batch; ``step`` is the number of optimiser steps taken so far."""
        check_domains(domains, self.n_domains, len(logits))
        derivatives = in_full_precision(
            lambda z: scale_derivatives(self.head_loss(z, targets), domains, self.n_domains, self.form)
        )
        sums, counts = derivatives(logits)  # not finite where a logit or a loss is not
        self.count_bad(counts)
        return self.weighted(step, lambda _: derivative_product(sums, self.form), sums.rows)


class IRM(DomainPenalty):
    """Ask that no domain alone wants to rescale the logits.

    The method and its formula are described at the top of :mod:`debias.methods.irm`.

    Args:
        domain: where the domain ids are; see :class:`debias.HessianAlignment`.
        n_domains: number of domains, one per key; at least 2 in all.
        penalty_weight: weight of the penalty.
        form: ``"unbiased"`` or ``"squared"``.
        weight_before, start_step, ramp_steps: the weight before optimiser step ``start_step``, and the steps within
            which it then grows to ``penalty_weight``.
        divide_loss: while the weight is above 1, divide the whole loss by it, as the Colored MNIST protocol does.
        reset_optimizer: forget the optimiser's running averages at ``start_step``, as DomainBed does.
        loss, rows, name, allow_untested_strategy: see :class:`debias.Debiaser`.

    Logs ``train/irm_penalty``, before its weight, on logging steps, and the weight where it changes;
    with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import IRM
        >>> IRM(domain="hospital", n_domains=3, form="squared").state_key
        'IRM(hospital)'
    """

    reference: ClassVar[str] = "Arjovsky et al. 2019, arXiv 1907.02893"
    key: ClassVar[str] = "irm"
    of_one_domain: ClassVar[str] = ", of which alone the penalty will be"

    def __init__(
        self,
        domain: tuple[BatchKey, ...] | BatchKey,
        n_domains: int | tuple[int, ...],
        *,
        penalty_weight: float = 100.0,
        form: Form = "unbiased",
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
            IRMPenalty(
                n_domains, penalty_weight=penalty_weight, form=form, weight_before=weight_before,
                start_step=start_step, ramp_steps=ramp_steps,
            ),
            divide_loss=divide_loss,
            reset_optimizer=reset_optimizer,
            loss=loss,
            rows=rows,
            name=name,
            allow_untested_strategy=allow_untested_strategy,
        )  # fmt: skip

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for this loss."""
        loss = head_loss(call, check=self._checks(step))
        rows = len(loss.logits)
        sums, _ = scale_derivatives(loss, rows_of(call, domains, rows), self.module.n_domains, self.module.form)
        return derivative_product(sums, self.module.form)


class IRMMixin:
    """IRM inside a LightningModule, for those who prefer explicit code."""

    irm: IRMPenalty

    def configure_irm(self, n_domains: int | Sequence[int], **options: Any) -> None:
        """Make the penalty; takes the arguments of :class:`IRMPenalty`. Call it in ``__init__``."""
        self.irm = IRMPenalty(n_domains, **options)

    def irm_penalty(self, logits: Tensor, targets: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty for logits ``(N, C)``, their targets and domains ``(N,)`` at this optimiser step."""
        return self.irm(logits, targets, domains, step=self.global_step)  # type: ignore[attr-defined]
