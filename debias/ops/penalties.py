"""What the modules of domain penalties share: the schedule, the count of bad rows, the checks of a plain loop, and how
the loss was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.domains import check_domains, make_members
from debias.ops.fields import arguments
from debias.ops.groups import GroupState, GroupSums, group_losses
from debias.ops.head_losses import HeadLoss, make_head_loss
from debias.ops.head_statistics import HeadStatistics
from debias.ops.precision import in_full_precision
from debias.ops.schedule import PenaltySchedule

__all__ = [
    "LOSS_OPTIONS",
    "DomainPenaltyModule",
    "FeaturePenaltyModule",
    "HeadPenaltyModule",
    "LossPenaltyModule",
    "PenaltyOptions",
]

# What the losses that are taken apart can be called with, beside logits and targets; by their names here and torch's.
LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("weight", "label_smoothing", "ignore_index"),
    "binary_cross_entropy": ("weight", "pos_weight"),
    "binary_cross_entropy_with_logits": ("weight", "pos_weight"),
    "squared_error": ("weight",),
    "mse_loss": ("weight",),
}


@arguments
class PenaltyOptions:
    """The weight of a penalty; see :class:`debias.ops.schedule.PenaltySchedule`.

    Args:
        penalty_weight: weight of the penalty in the end.
        weight_before: weight before optimiser step ``start_step``.
        start_step: optimiser steps before the penalty has its weight.
        ramp_steps: optimiser steps within which the weight then grows to it.
    """

    penalty_weight: float = 1.0
    weight_before: float = 0.0
    start_step: int = 0
    ramp_steps: int = 0


@arguments
class DomainPenaltyModule(PenaltyOptions, GroupState):
    """A penalty on how domains differ, for any training loop; a subclass adds :meth:`of`.

    This one is a penalty on their losses, whose sums by domain :meth:`of` receives, a
    :class:`debias.ops.groups.GroupSums`; subclasses read something else.

    Args:
        n_domains: number of domains E, at least 2, or the numbers of crossed ids.

    Raises:
        DebiasError: an argument is out of range.
        BadRowsError: a domain id is out of range, or a row is not finite.

    Shape:
        losses ``(N,)``; domains ``(N,)`` int64 or boolean ``(N, E)``; output: scalar.
    """

    kind: ClassVar[str] = "domain"
    always: ClassVar[bool] = False  # whether it has to see every batch, also before its weight is above 0

    n_domains: int | Sequence[int] = field(kw_only=False)

    def __post_init__(self) -> None:
        given = self.n_domains
        GroupState.__init__(self, given)
        self.n_domains = self.n_groups
        if self.n_groups < 2:
            raise DebiasError(
                f"Expected `n_domains` to be at least 2, but got {given!r}: one domain differs from"
                " none. Number the domains 0, 1, 2, ..."
            )
        self.schedule = PenaltySchedule(self.penalty_weight, self.weight_before, self.start_step, self.ramp_steps)
        self.penalty_weight, self.weight_before = self.schedule.weight, self.schedule.weight_before
        self.start_step, self.ramp_steps = self.schedule.start_step, self.schedule.ramp_steps

    def of(self, *inputs: Any, **options: Any) -> Tensor:
        """The penalty of one batch, not yet weighted."""
        raise NotImplementedError

    def forward(self, losses: Tensor, domains: Tensor, *, step: int | None = None) -> Tensor:
        """The weighted penalty for losses ``(N,)`` and domains ``(N,)``; ``step`` is the number of optimiser steps
        taken so far.
        """
        self.check_shapes(losses, domains)
        sums = self.sums_of(losses, torch.ones_like(losses), domains)
        return self.weighted(step, lambda _: self.of(sums), sums.rows)

    def weight_in_words(self) -> str:
        """The weight under which losses may have diverged, for messages."""
        return f"`penalty_weight={self.schedule.weight:g}`"

    def weight_at(self, step: int | None) -> float:
        """The weight after ``step`` optimiser steps.

        Raises:
            DebiasError: the weight depends on the step and none was given.
        """
        if step is None:
            if self.schedule.changes:
                raise DebiasError(
                    "Expected `step`, the optimiser steps taken so far, because `start_step` or `ramp_steps` makes the"
                    " weight depend on it, but got None. Pass e.g. `step=self.global_step`."
                )
            return self.schedule.weight
        return self.schedule(step)

    def weighted(self, step: int | None, penalty: Any, *inputs: Any) -> Tensor:
        """``weight * penalty(*inputs)``, in at least float32; 0 costs nothing unless a running statistic is kept."""
        weight = self.weight_at(step)
        penalty = in_full_precision(penalty)
        if weight == 0:
            if self.always:
                with torch.no_grad():
                    penalty(*inputs)
            return inputs[0].new_zeros(())
        return weight * penalty(*inputs)

    def sums_of(self, rows: Tensor, den: Tensor, domains: Tensor) -> GroupSums:
        """Sums of ``rows`` by domain, see :func:`debias.ops.groups.group_losses`; bad rows are counted, and raise on
        CPU.
        """
        (sums,), counts = in_full_precision(lambda *call: group_losses([call], self.n_groups))(rows, den, domains)
        self.count_bad(counts)
        return sums

    def count_rows(self, domains: Tensor, rows: Tensor) -> None:
        """Count rows by domain, with ids out of range and rows ``(rows, ...)`` that are not finite, over all ranks;
        raises on CPU.
        """
        rows = rows.detach()
        of_rows = rows if rows.ndim == 1 else rows.flatten(1).float().sum(1)
        self.sums_of(of_rows, of_rows, domains)


class FeaturePenaltyModule(DomainPenaltyModule):
    """A penalty on features.

    Shape:
        features ``(N, d)``; domains ``(N,)`` int64 or boolean ``(N, E)``; output: scalar.
    """

    def forward(self, features: Tensor, domains: Tensor, *, step: int | None = None) -> Tensor:
        """The weighted penalty for features ``(N, d)`` and domains ``(N,)``; ``step`` is the number of optimiser steps
        taken so far.
        """
        make_members(domains, self.n_groups, len(features))
        self.count_rows(domains, features)
        return self.weighted(step, lambda x: self.of(x, domains), features)


@arguments(label_smoothing="[0, 1]")
class LossPenaltyModule(DomainPenaltyModule):
    """A penalty that takes a loss apart, which it is told of.

    Weights of the loss follow the module to its device, and are not saved with it. :meth:`of` receives the loss as a
    :class:`debias.ops.head_losses.HeadLoss`, and the ids ``(rows,)`` or membership ``(rows, E)`` of its rows.

    Args:
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        weight: what the loss is called with, a tensor or a list of numbers >= 0.
        pos_weight: what the binary cross-entropy is called with, as ``weight``.
        label_smoothing: what the cross-entropy is called with.
        ignore_index: what the cross-entropy is called with.

    Raises:
        DebiasError: an argument is out of range, or the loss has no such option.
        BadRowsError: a domain id is out of range, or a row is not finite.

    Shape:
        logits ``(N, C)``; targets of the loss; domains ``(N,)`` int64 or boolean ``(N, E)``; output: scalar.
    """

    loss: str = "cross_entropy"
    weight: Tensor | Sequence[float] | None = None
    pos_weight: Tensor | Sequence[float] | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    loss_weight: Tensor | None = field(init=False)
    loss_pos_weight: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = self.loss
        if loss not in LOSS_OPTIONS:
            raise DebiasError(
                f"Expected `loss` to be one of {', '.join(LOSS_OPTIONS)}, whose derivatives with respect to the logits"
                f" are known, but got {loss!r}. A penalty that needs only losses or features takes any (VREx, CORAL,"
                " MMD)."
            )
        known = LOSS_OPTIONS[loss]
        plain = {"weight": None, "pos_weight": None, "label_smoothing": 0.0, "ignore_index": -100}
        given = {name: vars(self)[name] for name in plain}
        unknown = [n for n, v in given.items() if n not in known and (isinstance(v, Tensor) or v != plain[n])]
        if unknown:
            raise DebiasError(
                f"Expected arguments of {type(self).__name__}, or options of `loss={loss!r}`: {', '.join(known)}, but"
                f" got {', '.join(sorted(unknown))}. Correct the name, or `loss`."
            )
        if type(self.ignore_index) is not int:
            raise DebiasError(f"Expected `ignore_index` to be an integer, but got {self.ignore_index!r}.")
        for name in ("weight", "pos_weight"):
            value = vars(self).pop(name)
            weights = None if value is None else _weights(name, value, classes=loss == "cross_entropy")
            self.register_buffer(f"loss_{name}", weights, persistent=False)

    def head_loss(self, logits: Tensor, targets: Tensor) -> HeadLoss:
        """The loss, taken apart.

        Raises:
            DebiasError: logits, targets and weights do not fit.
        """
        weight = self.loss_weight
        if self.loss == "cross_entropy" and weight is not None and weight.shape != logits.shape[1:]:
            raise DebiasError(
                f"Expected `weight` to hold one number for each class of the logits {tuple(logits.shape)}, but got"
                f" {len(weight)}."
            )
        options = {name: getattr(self, name) for name in ("label_smoothing", "ignore_index")}
        options |= {"weight": weight, "pos_weight": self.loss_pos_weight}
        return make_head_loss(self.loss, logits, targets, **{name: options[name] for name in LOSS_OPTIONS[self.loss]})

    def forward(  # type: ignore[override]
        self, logits: Tensor, targets: Tensor, domains: Tensor, *, step: int | None = None
    ) -> Tensor:
        """The weighted penalty for logits ``(N, C)``, their targets and domains ``(N,)``; ``step`` is the number of
        optimiser steps taken so far.
        """
        check_domains(domains, self.n_groups, len(logits))
        loss = self.counted_loss(logits, targets, domains)
        return self.weighted(step, lambda _: self.of(loss, domains), loss.logits)

    def counted_loss(self, logits: Tensor, targets: Tensor, domains: Tensor) -> HeadLoss:
        """The loss in at least float32; its rows are counted as :meth:`count_rows` does. Bad are those with a loss or a
        logit that is not finite, but for logits of -inf where a class is masked.
        """
        loss = in_full_precision(self.head_loss)(logits, targets)
        with torch.no_grad():
            self.count_rows(domains, loss.checks)
        return loss


@arguments
class HeadPenaltyModule(LossPenaltyModule):
    """A penalty on statistics of the classifier head.

    Args:
        head_bias: whether the head adds a bias.

    Shape:
        features ``(N, d)``; logits ``(N, C)``; targets of the loss; domains ``(N,)`` int64 or boolean ``(N, E)``;
        output: scalar.

    Raises:
        DebiasError: an argument is out of range.
        BadRowsError: a domain id is out of range, or a row is not finite.
    """

    head_bias: bool = True

    def forward(  # type: ignore[override]
        self,
        features: Tensor,
        logits: Tensor,
        targets: Tensor,
        domains: Tensor,
        *,
        step: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The weighted penalty of one batch; ``step`` is the number of optimiser steps taken so far."""
        members = make_members(domains, self.n_groups, len(logits))
        loss = self.counted_loss(logits, targets, domains)

        def penalty(features: Tensor) -> Tensor:
            return self.of(HeadStatistics(features, loss, members, self.head_bias), **options)

        return self.weighted(step, penalty, features)


def _weights(name: str, value: Any, *, classes: bool) -> Tensor:
    """Weights as a buffer: in double precision, as all of a module's."""
    try:
        value = value.detach().cpu() if isinstance(value, Tensor) else value
        weights = torch.as_tensor(value, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError):
        weights = torch.zeros(())
    if (
        not weights.ndim
        or not weights.numel()
        or (classes and weights.ndim > 1)
        or not bool((weights.isfinite() & (weights >= 0)).all())
    ):
        raise DebiasError(
            f"Expected `{name}` to be weights of the loss{', one for each class' if classes else ''}, a tensor or a"
            f" list of numbers >= 0, but got {value!r}. The weight of the penalty is `penalty_weight`."
        )
    return weights
