"""Fishr: the samples' gradients should vary alike in every domain. Rame et al., ICML 2022, arXiv 2109.02934, section 4.

With ``G_i`` the gradient of sample i's loss with respect to the head's P parameters, ``v_e`` its variance over the
samples of domain e (elementwise, P numbers), and a running average over steps ``a_e``::

    v_e     = mean of G_i^2 - (mean of G_i)^2
    a_e     = ema a_e + (1 - ema) v_e                     from 0
    vhat_e  = a_e / (1 - ema^t)                           ema_bias="corrected": t updates, an average from the start
              a_e / (1 - ema)                             ema_bias="reference"
    penalty = 1/E sum_e mean_P (vhat_e - mean vhat)^2     gradient through v_e of this batch only

The authors' code divides by ``1 - ema``: the average starts at ``v_e`` and grows to ``v_e / (1 - ema)``, 20 times at
0.95, the penalty 400 times, so its weight means something else at another ``ema`` and at another step. Published
weights are of this form, which is the default; under ``"corrected"`` the same takes ``1 / (1 - ema)^2`` times the
weight. The authors' code does not save the average. Their Colored MNIST code keeps none (``ema=0``) and sums over
parameters and domains (``reduction="sum"``).

For a linear head the variances are a closed form of features and residuals (:mod:`debias.ops.head_statistics`), equal
to BackPACK's per-sample gradients, without an ``(N, P)`` tensor.

Published: DomainBed weight 1000 (searched 10 to 1e4), ``ema=0.95`` (0.9 to 0.99), at weight 0 for the first 1500 steps
(searched 0 to 5000), Adam reset at the switch; Colored MNIST weight 91257 after 190 steps.

A domain absent from the batch keeps its average and has no part in the penalty of this batch. One sample in a domain
has variance 0. Costs one all-reduce of ``2 E (P + 1)`` floats and none in backward. Needs features, a linear head (or
``derivatives="autograd"`` for any), domain ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods._domain_penalty import DomainPenalty
from debias.ops.arguments import check_number
from debias.ops.domains import domain_mean, make_members
from debias.ops.head_statistics import HeadStatistics
from debias.ops.penalties import LossPenaltyModule
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.tap.tap import LossCall

__all__ = ["Fishr", "FishrMixin", "FishrPenalty", "fishr_penalty"]


def fishr_penalty(variances: Tensor, present: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Distance of the domains' gradient variances from their mean.

    Args:
        variances: ``(E, ...)``.
        present: boolean ``(E,)``; the others have no part in it.
        reduction: mean or sum, over domains and parameters.

    Returns:
        Scalar.

    Example:
        >>> import torch
        >>> from debias.functional import fishr_penalty
        >>> fishr_penalty(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([True, True]))
        tensor(0.5000)
    """
    flat = variances.flatten(1)
    squared = (flat - domain_mean(flat, present)).square().sum(1)
    if reduction == "sum":
        return torch.where(present, squared, 0).sum()
    return domain_mean(squared, present) / flat.shape[1]


class FishrPenalty(LossPenaltyModule):
    """The penalty for any training loop, with its running averages.

    Args:
        n_domains: number of domains E, at least 2.
        penalty_weight: weight in the end; published default 1000.
        ema: share of the past in the running average, in [0, 1).
        ema_bias: ``"reference"`` or ``"corrected"``, what the average is divided by, see :mod:`debias.methods.fishr`.
        reduction: mean or sum, over domains and parameters.
        weight_before, start_step, ramp_steps: see :class:`debias.ops.schedule.PenaltySchedule`; the averages are kept
            from the first step on.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        head_bias: whether the head adds a bias.
        **loss_options: what the loss is called with: ``weight``, ``label_smoothing``, ``ignore_index``, ``pos_weight``,
            see :class:`debias.ops.penalties.LossPenaltyModule`.

    Shape:
        features ``(N, d)``; logits ``(N, C)``; targets of the loss; domains ``(N,)`` int64 or boolean ``(N, E)``;
        output: scalar.

    Raises:
        DebiasError: an argument is out of range.
        BadRowsError: a domain id is out of range, or a row is not finite.
    """

    averages: Tensor
    updates: Tensor
    always = True

    def __init__(
        self,
        n_domains: int | Sequence[int],
        *,
        penalty_weight: float = 1000.0,
        ema: float = 0.95,
        ema_bias: Literal["corrected", "reference"] = "reference",
        reduction: Literal["mean", "sum"] = "mean",
        weight_before: float = 0.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        loss: str = "cross_entropy",
        head_bias: bool = True,
        **loss_options: Any,
    ) -> None:
        super().__init__(
            n_domains, penalty_weight, loss=loss, loss_options=loss_options, weight_before=weight_before,
            start_step=start_step, ramp_steps=ramp_steps,
        )  # fmt: skip
        if ema_bias not in ("corrected", "reference"):
            raise DebiasError(f"Expected `ema_bias` to be 'corrected' or 'reference', but got {ema_bias!r}.")
        if reduction not in ("mean", "sum"):
            raise DebiasError(f"Expected `reduction` to be 'mean' or 'sum', but got {reduction!r}.")
        self.ema = check_number("ema", ema, "[0, 1)")
        self.ema_bias = ema_bias
        self.reduction = reduction
        self.head_bias = head_bias
        # Its size is the head's, which is not known yet.
        self.register_buffer("averages", torch.zeros(self.n_domains, 0, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(self.n_domains, dtype=torch.float64))

    def forward(
        self, features: Tensor, logits: Tensor, targets: Tensor, domains: Tensor, *, step: int | None = None
    ) -> Tensor:
        """The weighted penalty of one batch; ``step`` is the number of optimiser steps taken so far."""
        members = make_members(domains, self.n_domains, len(logits))
        loss = self.counted_loss(logits, targets, domains)
        return self.weighted(step, lambda f: self.of(HeadStatistics(f, loss, members, self.head_bias)), features)

    def of(self, statistics: HeadStatistics) -> Tensor:
        """The penalty, not yet weighted, from statistics of any head; in training mode the averages are updated."""
        return fishr_penalty(
            self.averaged(statistics.gradient_variances, statistics.present), statistics.present,
            reduction=self.reduction,
        )  # fmt: skip

    def averaged(self, variances: Tensor, present: Tensor) -> Tensor:
        """The running averages after this batch, ``(E, P)``, with a gradient to its variances ``(E, ...)``."""
        flat = variances.flatten(1)
        if self.ema == 0:
            return flat
        if self.averages.shape[1] == 0:
            self.averages = self.averages.new_zeros(flat.shape)
        if self.averages.shape != flat.shape:
            raise DebiasError(
                f"Expected a head with {self.averages.shape[1]} parameters, as in the saved averages, but got"
                f" {flat.shape[1]}. Resume with the head the checkpoint was made with."
            )
        new = self.ema * self.averages.to(flat.dtype) + (1 - self.ema) * flat
        updates = self.updates + 1
        if self.training:
            with torch.no_grad():
                # A batch with a row that is not finite must not stay in the average.
                good = present & flat.isfinite().all(1)
                self.averages = torch.where(good.unsqueeze(1), new.to(self.averages.dtype), self.averages)
                self.updates = torch.where(good, updates, self.updates)
        if self.ema_bias == "reference":
            return new / (1 - self.ema)
        return new / (1 - self.ema**updates).to(flat.dtype).unsqueeze(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "averages")
        if saved is not None and saved.ndim == 2 and len(saved) == self.n_domains:
            self.averages = self.averages.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Fishr(DomainPenalty):
    """Make the variance of the samples' head gradients equal across domains.

    The method and its formula are described at the top of :mod:`debias.methods.fishr`.

    Args:
        domain: where the domain ids are; see :class:`debias.HessianAlignment`.
        n_domains: number of domains, one per key; at least 2 in all.
        penalty_weight: weight of the penalty.
        ema: share of the past in the running average of the variances, in [0, 1).
        ema_bias: ``"reference"`` or ``"corrected"``, what the average is divided by; published weights are of the
            first.
        reduction: mean or sum, over domains and parameters.
        weight_before, start_step, ramp_steps: the weight before optimiser step ``start_step``, and the steps within
            which it then grows to ``penalty_weight``.
        divide_loss: while the weight is above 1, divide the whole loss by it, as the IRM protocol does.
        reset_optimizer: forget the optimiser's running averages at ``start_step``, as DomainBed does.
        derivatives: ``"closed_form"`` for a linear head, ``"autograd"`` for any head.
        head: dotted path of the head; found by default.
        loss, rows, name, allow_untested_strategy: see :class:`debias.Debiaser`; ``loss="sum"`` with ``ema=0`` only, as
            the averages are those of one loss.

    Logs ``train/fishr_penalty``, before its weight, on logging steps, and the weight where it changes;
    with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import Fishr
        >>> Fishr(domain="hospital", n_domains=3).state_key
        'Fishr(hospital)'
    """

    reference: ClassVar[str] = "Rame et al., ICML 2022, arXiv 2109.02934"
    needs: ClassVar[tuple[str, ...]] = ("domain", "features")
    needs_features: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    key: ClassVar[str] = "fishr"

    def __init__(
        self,
        domain: tuple[BatchKey, ...] | BatchKey,
        n_domains: int | tuple[int, ...],
        *,
        penalty_weight: float = 1000.0,
        ema: float = 0.95,
        ema_bias: Literal["corrected", "reference"] = "reference",
        reduction: Literal["mean", "sum"] = "mean",
        weight_before: float = 0.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        divide_loss: bool = False,
        reset_optimizer: bool = False,
        derivatives: Literal["closed_form", "autograd"] = "closed_form",
        head: str | None = None,
        loss: int | str | Callable[[LossCall], bool] | None = None,
        rows: str | Callable[[LossCall, int], Tensor] | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(
            domain,
            n_domains,
            FishrPenalty(
                n_domains, penalty_weight=penalty_weight, ema=ema, ema_bias=ema_bias, reduction=reduction,
                weight_before=weight_before, start_step=start_step, ramp_steps=ramp_steps,
            ),
            divide_loss=divide_loss,
            reset_optimizer=reset_optimizer,
            derivatives=derivatives,
            head=head,
            loss=loss,
            rows=rows,
            name=name,
            allow_untested_strategy=allow_untested_strategy,
        )  # fmt: skip
        if loss == "sum" and ema:
            raise DebiasError(
                "Expected `loss` of Fishr to choose one loss, but got 'sum': the running averages are those of one."
                " Pass `loss=<index>`, in an instance with a `name` of its own for each loss, or `ema=0`."
            )

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for this loss."""
        return self.module.of(self.head_statistics(call, domains, step))


class FishrMixin:
    """Fishr inside a LightningModule, for those who prefer explicit code."""

    fishr: FishrPenalty

    def configure_fishr(self, n_domains: int | Sequence[int], **options: Any) -> None:
        """Make the penalty; takes the arguments of :class:`FishrPenalty`. Call it in ``__init__``."""
        self.fishr = FishrPenalty(n_domains, **options)

    def fishr_penalty(self, features: Tensor, logits: Tensor, targets: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty of one batch at this optimiser step."""
        return self.fishr(features, logits, targets, domains, step=self.global_step)  # type: ignore[attr-defined]
