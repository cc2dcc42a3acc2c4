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

from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import HeadPenalty, calls, configures
from debias.methods.base.head import features_of
from debias.ops.arguments import checked
from debias.ops.domains import domain_mean
from debias.ops.fields import arguments
from debias.ops.head_statistics import HeadStatistics
from debias.ops.penalties import HeadPenaltyModule, PenaltyOptions
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["Fishr", "FishrMixin", "FishrPenalty", "fishr_penalty"]


@checked("variances: float E ..., present: bool E")
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


@arguments(of=fishr_penalty, ema="[0, 1)")
class FishrOptions(PenaltyOptions):
    """Options of Fishr, at DomainBed's values; the averages are kept from the first step on, whatever the weight.

    Args:
        ema: share of the past in the running average of the variances, in [0, 1).
        ema_bias: ``"reference"`` or ``"corrected"``, what the average is divided by, see :mod:`debias.methods.fishr`;
            published weights are of the first.
    """

    penalty_weight: float = 1000.0
    ema: float = 0.95
    ema_bias: Literal["corrected", "reference"] = "reference"
    reduction: Literal["mean", "sum"] = "mean"


@arguments
class FishrPenalty(FishrOptions, HeadPenaltyModule):
    """The penalty for any training loop, with its running averages."""

    always = True
    averages: Tensor = field(init=False)
    updates: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Its size is the head's, which is not known yet.
        self.register_buffer("averages", torch.zeros(self.n_groups, 0, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros(self.n_groups, dtype=torch.float64))

    def of(self, statistics: HeadStatistics) -> Tensor:
        """The penalty, not yet weighted, from statistics of any head; in training mode the averages are updated."""
        variances = self.averaged(statistics.gradient_variances, statistics.present)
        return fishr_penalty(variances, statistics.present, reduction=self.reduction)

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
        if saved is not None and saved.ndim == 2 and len(saved) == self.n_groups:
            self.averages = self.averages.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@arguments
class Fishr(FishrOptions, HeadPenalty):
    """Make the variance of the samples' head gradients equal across domains.

    Where the network leans on a shortcut, its gradients vary more in domains in which the shortcut fails; equal
    variances leave what works alike in all domains.

    ``loss="sum"`` goes with ``ema=0`` only, as the averages are those of one loss.

    Example:
        >>> from debias import Fishr
        >>> Fishr(domain="hospital", n_domains=3).state_key
        'Fishr(hospital)'
    """

    reference = "Rame et al., ICML 2022, arXiv 2109.02934"
    works = "Each domain has all classes, and several domains are in a batch."
    fails = "The shortcut pays in every domain. The published weight belongs to an average of several hundred steps."
    stateful = True
    key = "fishr"
    module_class = FishrPenalty

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "sum" and self.ema:
            raise DebiasError(
                "Expected `loss` of Fishr to choose one loss, but got 'sum': the running averages are those of one."
                " Pass `loss=<index>`, in an instance with a `name` of its own for each loss, or `ema=0`."
            )

    def head_statistics(self, call: LossCall, domains: Tensor, step: Step) -> HeadStatistics:
        """Statistics of the head that made the logits of this loss."""
        statistics = super().head_statistics(call, domains, step)
        if statistics.loss.kind != "cross_entropy" and call.logits is not None and call.logits.ndim > 2:
            features_of(call, len(statistics.loss.logits) // call.parts)  # which elements are of one position?
        return statistics


class FishrMixin:
    """Fishr inside a LightningModule, for those who prefer explicit code."""

    fishr: FishrPenalty
    configure_fishr = configures("fishr", FishrPenalty)
    fishr_penalty = calls("fishr", FishrPenalty.forward)
