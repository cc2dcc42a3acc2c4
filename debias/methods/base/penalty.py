"""What domain penalties share on Lightning's side: head and features of the loss, schedule, bad rows, logging."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from debias.errors import BadRowsError, DebiasError, DebiasWarning
from debias.methods.base.head import (
    check_head,
    check_linear,
    features_of,
    float32,
    head_loss,
    refuse_batch_norm,
    refuse_sharded,
    rows_of,
)
from debias.methods.base.method import DomainKeys, KeyedMethod
from debias.ops.domains import check_domains, make_members
from debias.ops.fields import arguments
from debias.ops.groups import GroupSums, group_losses
from debias.ops.head_autograd import AutogradHeadStatistics
from debias.ops.head_statistics import HeadStatistics
from debias.ops.penalties import PenaltyOptions
from debias.ops.precision import autocast_off
from debias.step.context import Step
from debias.tap.calls import LossCall
from debias.tap.features import Pool, check_features, rows_of_features

__all__ = ["DomainPenalty", "FeaturePenalty", "HeadPenalty", "LossPenalty"]


@arguments
class DomainPenalty(PenaltyOptions, KeyedMethod, DomainKeys):
    """A method that adds a penalty on how domains differ: in their losses, or in what a subclass of it reads.

    Its module, a :class:`debias.ops.penalties.DomainPenaltyModule`, does the maths.

    Args:
        n_domains: number of domains, one per key; at least 2 in all.
        divide_loss: while the weight is above 1, divide the whole loss by it, as the IRM protocol does.
        reset_optimizer: forget the optimiser's running averages at ``start_step``, as DomainBed does.

    Logs:
        On logging steps ``train/<key>_penalty``, before its weight, and ``train/<key>_penalty_weight`` where that
        changes; with ``/name`` behind where there are several of the class.
    """

    ids = ("domain", "n_domains")
    unlabelled = "so there was no penalty"
    needs: ClassVar[tuple[str, ...]] = ("domain",)
    of_one_domain: ClassVar[str] = ": the penalty will be 0"  # what becomes of it without others
    key: ClassVar[str]  # what its values are called in logs

    divide_loss: bool = False
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._checked = False

    # -- what a method overrides -------------------------------------------------------------------

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for this loss, not yet weighted; ``domains`` are those of the samples."""
        return self.module.of(self.loss_sums(call, domains, step))

    # -- the engine's side -------------------------------------------------------------------------

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """The weighted penalty; bad rows raise on CPU at once, elsewhere on logging steps."""
        ids = self.sample_ids(step)
        weight = self.module.schedule(step.global_step)
        with autocast_off(call.num.device.type):
            self._count_rows(call, ids, step)
            if weight:
                value = self.penalty(call, ids, step)
                self.reach.check(self, [value], step)
            elif self.module.always:
                with torch.no_grad():
                    value = self.penalty(call, ids, step)
            else:
                return call.num.new_zeros(())
        if step.logging:
            self.log_value(f"{self.key}_penalty", value.detach(), step)
            if self.module.schedule.changes:
                self.log_value(f"{self.key}_penalty_weight", value.new_full((), weight), step)
        return weight * value if weight else value.new_zeros(())

    def _log_name(self, key: str, step: Step) -> str:
        """With the instance's name where there are several of a class, whose values would overwrite each other."""
        several = sum(type(callback) is type(self) for callback in step.trainer.callbacks) > 1
        return super()._log_name(key, step) + (f"/{self.name}" if several else "")

    def loss_factor(self, step: Step) -> float:
        """``1 / weight`` where the protocol divides the loss by a weight above 1."""
        weight = self.module.schedule(step.global_step) if self.divide_loss else 1.0
        return 1 / weight if weight > 1 else 1.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Forget the optimisers' state at the switch; again in every micro-batch of that step, where it is empty."""
        if self.reset_optimizer and 0 < self.module.schedule.start_step == trainer.global_step:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the tags of the training set hold fewer than two domains."""
        counts = self.tagged(trainer)
        if counts is not None and int((counts > 0).sum()) < 2 and trainer.is_global_zero:
            warnings.warn(
                f"{self.state_key} compares domains, but the tags of the training set hold samples of"
                f" {int((counts > 0).sum())} only{self.of_one_domain}. Check the ids of `domain={self.domain!r}`.",
                DebiasWarning,
                stacklevel=2,
            )

    def loss_sums(self, call: LossCall, ids: Tensor, step: Step) -> GroupSums:
        """Sums of this loss by domain, made once for all penalties on the same domains; ``ids`` are the samples'."""
        return self._sums(call, ids, step)[0][0]

    def _sums(self, call: LossCall, ids: Tensor, step: Step) -> tuple[list[GroupSums], Tensor | list[float]]:
        n = self.module.n_groups
        return step.once((call, ids, n), lambda: group_losses([(call.num, call.den, call.of_rows(ids))], n))

    def _count_rows(self, call: LossCall, ids: Tensor, step: Step) -> None:
        try:
            self.module.count_bad(self._sums(call, ids, step)[1])
        except BadRowsError as error:
            raise self._at(error, step.global_step) from None
        if step.logging:
            self.raise_if_bad(step.trainer)

    def raise_if_bad(self, trainer: Any) -> None:
        """Raise if a row since the last call had a wrong id or was not finite; waits for the device."""
        try:
            self.module.raise_if_bad()
        except BadRowsError as error:
            raise self._at(error, trainer.global_step) from None

    def _at(self, error: BadRowsError, step: int) -> BadRowsError:
        return BadRowsError(f"{error} (Seen by {self.state_key} at optimiser step {step}.)")

    def _checks(self, step: Step) -> bool:
        """Whether to wait for the device and check what is taken for granted: at first, and on logging steps."""
        first, self._checked = not self._checked, True
        return first or step.logging


class LossPenalty(DomainPenalty):
    """A penalty that takes the loss apart; its module is a :class:`debias.ops.penalties.LossPenaltyModule`."""

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for this loss."""
        loss = head_loss(call, check=self._checks(step))
        rows = len(loss.logits)
        domains = rows_of(call, domains, rows)
        check_domains(domains, self.module.n_groups, rows)
        return self.module.of(loss, domains)


@arguments
class FeaturePenalty(DomainPenalty):
    """A penalty on features; its module is a :class:`debias.ops.penalties.FeaturePenaltyModule`."""

    needs = ("domain", "features")
    needs_features = True

    features: str | None = None
    pool: Pool = None
    head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features is not None and self.loss == "sum":
            raise DebiasError(
                f"Expected `loss` of {type(self).__name__} to choose one loss with `features={self.features!r}`, but"
                " got 'sum': these features are the same for every loss, and would be counted as often. Pass `loss=0`."
            )

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The penalty for the features this loss is computed from, or those that are named."""
        return self.module.of(*self.feature_rows(call, domains))

    def feature_rows(self, call: LossCall, domains: Tensor) -> tuple[Tensor, Tensor]:
        """The features ``(rows, d)``, at least float32, and the domains of their rows.

        Raises:
            HeadNotFoundError: those of a named module are not ``(N, d)``.
            RowsError: it is not known which samples they belong to.
        """
        features = call.features
        if self.features is not None:
            features = check_features(features)
        assert features is not None
        return float32(rows_of_features(features, call.head)), call.of_features(domains)


@arguments
class HeadPenalty(DomainPenalty):
    """A penalty on the classifier head; its module is a :class:`debias.ops.penalties.HeadPenaltyModule`.

    Args:
        derivatives: ``"closed_form"`` for a linear head, ``"autograd"`` for any head.
    """

    needs = ("domain", "features")
    needs_features = True

    derivatives: Literal["closed_form", "autograd"] = "closed_form"
    head: str | None = None

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for the head that made the logits of this loss."""
        return self.module.of(self.head_statistics(call, domains, step))

    def head_statistics(self, call: LossCall, domains: Tensor, step: Step) -> HeadStatistics:
        """Statistics of the head that made the logits of this loss.

        Raises:
            HeadNotFoundError: the logits are not what the head makes of its input.
        """
        check = self._checks(step)
        loss = head_loss(call, check=check)
        rows = len(loss.logits)
        members = make_members(rows_of(call, domains, rows), self.module.n_groups, rows)
        logits = loss.logits[: rows // call.parts]  # as the head made them, where mixed samples count several times
        if self.derivatives == "autograd":
            assert call.head is not None
            assert call.features is not None
            features = float32(call.features)
            refuse_sharded(call.head)
            if check:
                refuse_batch_norm(call.head)
                check_head(call, features, logits)
            return AutogradHeadStatistics(call.head, call.of_logits(features), loss, members)
        features = features_of(call, len(logits))
        if check:
            check_linear(call, features, logits)
        return HeadStatistics(call.of_logits(features), loss, members, getattr(call.head, "bias", None) is not None)
