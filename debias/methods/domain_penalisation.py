"""Domain penalisation: weigh each domain by its training loss. Jena et al., 2024, arXiv 2408.01746.

With ``l_i`` the loss of sample i, d(i) its domain, and ``M_d`` the samples of domain d in an epoch::

    L_d = sum_{i in d} l_i / M_d                              over the epoch, under the weights of that epoch
    w_d = exp(L_d / T) / sum_k exp(L_k / T)                   for the next epoch; all ones in the first one
    loss = sum_i w_d(i) l_i / N                               over the N samples of the batch, no gradient through w

The paper has temperature T = 1. Its weights sum to 1, so after the first epoch they cut the loss, and with SGD the
step, by the number of domains D (18 on GWHD). ``normalize="mean"``, the default here, multiplies them by D: they
average 1 and change how domains compare, not the learning rate. ``normalize="sum"`` is the paper's formula. The paper
does not say whether a batch's losses are summed or averaged; here they are averaged. No code of the authors was found.

Weak on purpose: losses from 0.4 to 1.2 give weights that differ by a factor of 2.2. Not invariant to the scale of the
loss (doubling it squares the ratios, unless T is doubled too), and without memory beyond one epoch unless ``ema`` is
set.

A domain absent from a batch has no part in it; absent from a whole epoch, it keeps its last loss; never seen, it counts
with the mean loss of the others. One sample is a domain's mean. Unlabelled samples (negative ids) have no part in the
loss. Costs: one all-reduce of 3D + 9 doubles and a few small kernels a step. Needs per-sample losses and domain ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from typing import Any, Literal

import torch
from torch import Tensor

from debias.data.counting import can_count
from debias.methods.base import DomainDebiaser, configures
from debias.ops.arguments import check_count, checked
from debias.ops.fields import arguments
from debias.ops.groups import GroupSums, summed
from debias.ops.reweighing import DomainLoss

__all__ = ["DomainPenalisation", "DomainPenalisationLoss", "DomainPenalisationMixin", "domain_penalisation_weights"]


@checked("losses: float G, seen: bool G", temperature="(0, inf)")
def domain_penalisation_weights(
    losses: Tensor,
    *,
    temperature: float = 1.0,
    normalize: Literal["mean", "sum"] = "mean",
    seen: Tensor | None = None,
) -> Tensor:
    """Weights of the domains from their mean losses: a softmax.

    Args:
        losses: mean loss by domain, ``(D,)``.
        temperature: T > 0 of the softmax; larger is closer to equal weights, the paper has 1.
        normalize: ``"mean"``: weights average 1; ``"sum"``: they sum to 1 after the first update (the paper).
        seen: boolean ``(D,)``; the other domains count with the mean loss of these.

    Returns:
        Weights ``(D,)``, in the dtype of the losses.

    Example:
        >>> import torch
        >>> from debias.functional import domain_penalisation_weights
        >>> domain_penalisation_weights(torch.tensor([0.4, 1.2]))
        tensor([0.6201, 1.3799])
    """
    if seen is not None:
        known = torch.where(seen, losses, 0)
        losses = torch.where(seen, losses, known.sum() / seen.sum().clamp_min(1))
    # Below 1e-30 a softmax of losses cannot tell temperatures apart; a quotient would overflow.
    weights = torch.softmax(losses / max(temperature, 1e-30), dim=0)
    return weights * len(losses) if normalize == "mean" else weights


@arguments(kw_only=False, of=domain_penalisation_weights, ema="[0, 1)")
class DomainPenalisationOptions:
    """Options of domain penalisation.

    Args:
        update: when the weights follow the losses: ``"epoch"`` (the paper) or after every so many batches.
        ema: share of the earlier loss that stays at an update, in [0, 1); the paper has 0. The first is taken whole.
        domain_counts: training samples per domain, ``(D,)``; only checked: a domain without one is an error. The
            callback counts them if not given (tags without reading a sample), but not in a stream.
        domain_names: one name per domain, for logs and messages.
    """

    update: int | str = "epoch"
    temperature: float = 1.0
    normalize: Literal["mean", "sum"] = "mean"
    ema: float = 0.0
    _: KW_ONLY
    domain_counts: Sequence[int] | None = None
    domain_names: Sequence[str] | None = None


@arguments
class DomainPenalisationLoss(DomainPenalisationOptions, DomainLoss):
    """The domain-penalisation objective with its state, for any training loop.

    Shape:
        losses ``(N,)`` floating point, unreduced; domains ``(N,)`` int64 (negative = left out) or boolean ``(N, D)``;
        output: scalar. Under DDP its value and its gradient are those of the global batch.

    In a loop of your own, call :meth:`start_epoch` before every batch or :meth:`update_weights` after every epoch.

    Raises:
        DebiasError: an argument is out of range, or a domain has no training sample.
        BadRowsError: an id is out of range or a loss is not finite.

    Example:
        >>> import torch
        >>> from debias import DomainPenalisationLoss
        >>> criterion = DomainPenalisationLoss(n_domains=2)
        >>> criterion(torch.tensor([0.4, 1.2]), torch.tensor([0, 1]))  # the first epoch is plain training
        tensor(0.8000)
        >>> criterion.update_weights()
        >>> criterion.weights
        tensor([0.6201, 1.3799], dtype=torch.float64)
    """

    needs_counts = True
    weights: Tensor = field(init=False)
    losses: Tensor = field(init=False)
    seen: Tensor = field(init=False)
    running: Tensor = field(init=False)
    steps: Tensor = field(init=False)
    epoch: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        D, batches = len(self.counts), "'epoch' or a number of batches"
        self.update = self.update if self.update == "epoch" else check_count("update", self.update, what=batches)
        self.register_buffer("weights", torch.ones(D, dtype=torch.float64))
        self.register_buffer("losses", torch.zeros(D, dtype=torch.float64))  # of the last epoch, or averaged
        self.register_buffer("seen", torch.zeros(D, dtype=torch.bool))
        self.register_buffer("running", torch.zeros(2, D, dtype=torch.float64))  # sums and counts since the last update
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # since the last update
        self.register_buffer("epoch", torch.full((), -1, dtype=torch.int64))  # of `start_epoch`
        if self.domain_counts is not None:
            self.set_counts(self.domain_counts)

    def start_epoch(self, epoch: int) -> None:
        """Update the weights if ``epoch`` is another one than at the last call; does not wait for the device.

        Called before every batch it is exact also where a run is resumed, in the middle of an epoch or at its end.
        """
        if self.update == "epoch":
            self._settle(self.epoch != epoch)  # a first call finds no losses, and changes nothing
            self.epoch.fill_(epoch)

    def update_weights(self) -> None:
        """Make the weights from the losses since the last update; without any they stay."""
        self._settle(self.weights.new_ones((), dtype=torch.bool))

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """The objective for several losses of one batch, whose sum is a sample's loss.

        Over an epoch a domain's loss is ``sum num / sum den``; of several losses the sum, with their mean denominators.
        """
        sums = self.sums(calls)
        weights = self.weights.clone()
        if self.training:
            self._accumulate(sums)
        return [s.weighted(weights, by=s.den.sum()) for s in sums]

    def by_group(self) -> dict[str, Tensor]:
        """What is worth logging: weights, and mean losses since the last update, or else the last known, ``(D,)``."""
        num, den = self.running
        return {"domain_weight": self.weights, "loss_by_domain": torch.where(den != 0, num / den, self.losses)}

    @torch.no_grad()
    def _accumulate(self, sums: Sequence[GroupSums]) -> None:
        den = summed([s.den.to(self.running.dtype) for s in sums]) / len(sums)
        loss = summed([s.num.to(den.dtype) / s.divisors.to(den.dtype) for s in sums])
        num = sums[0].num if len(sums) == 1 else loss * den
        self.running += torch.stack((num.to(den.dtype), den))
        self.steps += 1
        if isinstance(self.update, int):
            self._settle(self.steps >= self.update)

    @torch.no_grad()
    def _settle(self, due: Tensor) -> None:
        """Update the weights where ``due``, a boolean scalar; asking on the host would wait for the device."""
        num, den = self.running
        present = (den != 0) & due
        rate = torch.where(self.seen, self.losses.new_full((), 1 - self.ema), 1.0) * present
        self.losses += rate * (num / torch.where(den != 0, den, 1) - self.losses)
        self.seen |= present
        new = domain_penalisation_weights(
            self.losses, temperature=self.temperature, normalize=self.normalize, seen=self.seen
        )
        self.weights.copy_(torch.where(present.any(), new, self.weights))
        self.running *= ~due
        self.steps *= ~due


@arguments
class DomainPenalisation(DomainPenalisationOptions, DomainDebiaser):
    """Weigh each domain by its training loss of the last epoch.

    Domains in which a shortcut fails have higher losses while the network relies on it; as they count more, it cannot
    neglect them.

    Logs:
        On logging steps ``train/domain_weight/<name>`` and ``train/loss_by_domain/<name>``, of more than 100 domains
        ``train/max_domain_weight`` and ``train/worst_domain_loss``, the largest ones, instead; and
        ``train/average_loss``, unweighted: the loss that the step logs itself is the reweighted one.

    Example:
        >>> from debias import DomainPenalisation
        >>> DomainPenalisation(domain="session", n_domains=18, losses="heads").state_key
        'DomainPenalisation(session)'
    """

    reference = "Jena et al., 2024, arXiv 2408.01746"
    works = "Domains differ in how hard they are, and the loss has a scale on which these differences matter."
    fails = (
        "A domain is hard for its label noise. At temperature 1 it is gentle; doubling the loss squares the "
        "ratios of the weights."
    )
    module_class = DomainPenalisationLoss

    def new_epoch(self, epoch: int) -> None:
        """Update the weights."""
        if self.module.update == "epoch":
            self.module.update_weights()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a domain without a training sample; a stream cannot be counted."""
        if can_count(trainer):
            super().on_train_start(trainer, pl_module)


class DomainPenalisationMixin:
    """Domain penalisation inside a LightningModule, for those who prefer explicit code.

    Example:
        >>> import lightning as L, torch
        >>> from debias import DomainPenalisationMixin
        >>> class Model(DomainPenalisationMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 1)
        ...         self.configure_domain_penalisation(n_domains=18)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, domain = batch
        ...         losses = torch.nn.functional.mse_loss(self.net(x).squeeze(1), y, reduction="none")
        ...         return self.domain_penalisation_loss(losses, domain)
    """

    domain_penalisation: DomainPenalisationLoss
    configure_domain_penalisation = configures("domain_penalisation", DomainPenalisationLoss)
    current_epoch: int

    def domain_penalisation_loss(self, losses: Tensor, domains: Tensor) -> Tensor:
        """The objective for losses ``(N,)`` and domains ``(N,)`` or ``(N, D)``."""
        self.domain_penalisation.start_epoch(self.current_epoch)
        return self.domain_penalisation(losses, domains)
