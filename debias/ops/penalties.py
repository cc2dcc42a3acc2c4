"""What the modules of domain penalties share: the schedule, the count of bad rows, the checks of a plain loop, and how
the loss was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.arguments import check_number
from debias.ops.groups import GroupState, GroupSums, group_losses
from debias.ops.head_losses import HeadLoss, make_head_loss
from debias.ops.precision import in_full_precision
from debias.ops.schedule import PenaltySchedule

__all__ = ["LOSS_OPTIONS", "DomainPenaltyModule", "LossPenaltyModule"]

# What the losses that are taken apart can be called with, beside logits and targets; by their names here and torch's.
LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("weight", "label_smoothing", "ignore_index"),
    "binary_cross_entropy": ("weight", "pos_weight"),
    "binary_cross_entropy_with_logits": ("weight", "pos_weight"),
    "squared_error": ("weight",),
    "mse_loss": ("weight",),
}


class DomainPenaltyModule(GroupState):
    """A penalty on how domains differ, for any training loop; a subclass adds ``penalty`` and ``forward``.

    Args:
        n_domains: number of domains E, at least 2, or the numbers of crossed ids.
        penalty_weight: weight of the penalty in the end.
        weight_before: weight before ``start_step``.
        start_step: optimiser steps before the penalty has its weight.
        ramp_steps: optimiser steps within which the weight grows to it.

    Raises:
        DebiasError: fewer than two domains, a negative weight or step.
    """

    kind: ClassVar[str] = "domain"
    # Whether the module has to see every batch, also before its weight is above 0.
    always = False

    def __init__(
        self,
        n_domains: int | Sequence[int],
        penalty_weight: float,
        *,
        weight_before: float = 0.0,
        start_step: int = 0,
        ramp_steps: int = 0,
    ) -> None:
        super().__init__(n_domains)
        if self.n_groups < 2:
            raise DebiasError(
                f"Expected `n_domains` to be at least 2, but got {n_domains!r}: one domain differs from"
                " none. Number the domains 0, 1, 2, ..."
            )
        self.schedule = PenaltySchedule(penalty_weight, weight_before, start_step, ramp_steps)

    @property
    def n_domains(self) -> int:
        """Number of domains E."""
        return self.n_groups

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


class LossPenaltyModule(DomainPenaltyModule):
    """A penalty that takes a loss apart, which it is told of.

    Args:
        n_domains: number of domains E, at least 2, or the numbers of crossed ids.
        penalty_weight: weight of the penalty in the end.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        loss_options: what the loss is called with: ``weight`` and ``pos_weight``, tensors or lists of numbers >= 0,
            ``label_smoothing`` and ``ignore_index``. Weights follow the module to its device, and are not saved with
            it.
        **schedule: see :class:`DomainPenaltyModule`.

    Raises:
        DebiasError: the loss is another, has no such option, or an option is out of range.
    """

    loss_weight: Tensor | None
    loss_pos_weight: Tensor | None

    def __init__(
        self,
        n_domains: int | Sequence[int],
        penalty_weight: float,
        *,
        loss: str,
        loss_options: dict[str, Any],
        **schedule: Any,
    ) -> None:
        super().__init__(n_domains, penalty_weight, **schedule)
        if loss not in LOSS_OPTIONS:
            raise DebiasError(
                f"Expected `loss` to be one of {', '.join(LOSS_OPTIONS)}, whose derivatives with respect to the logits"
                f" are known, but got {loss!r}. A penalty that needs only losses or features takes any (VREx, CORAL,"
                " MMD)."
            )
        known = LOSS_OPTIONS[loss]
        if unknown := set(loss_options) - set(known):
            raise DebiasError(
                f"Expected arguments of {type(self).__name__}, or options of `loss={loss!r}`: {', '.join(known)}, but"
                f" got {', '.join(sorted(unknown))}. Correct the name, or `loss`."
            )
        self.loss = loss
        self.label_smoothing = check_number("label_smoothing", loss_options.get("label_smoothing", 0.0), "[0, 1]")
        self.ignore_index = loss_options.get("ignore_index", -100)
        if type(self.ignore_index) is not int:
            raise DebiasError(f"Expected `ignore_index` to be an integer, but got {self.ignore_index!r}.")
        for name in ("weight", "pos_weight"):
            value = loss_options.get(name)
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

    def counted_loss(self, logits: Tensor, targets: Tensor, domains: Tensor) -> HeadLoss:
        """The loss in at least float32; its rows are counted as :meth:`count_rows` does. Bad are those with a loss or a
        logit that is not finite, but for logits of -inf where a class is masked.
        """
        loss = in_full_precision(self.head_loss)(logits, targets)
        with torch.no_grad():
            self.count_rows(domains, loss.checks)
        return loss


def _weights(name: str, value: Any, *, classes: bool) -> Tensor:
    """Weights as a buffer: in double precision, as all of a module's."""
    try:
        value = value.detach().cpu() if isinstance(value, Tensor) else value
        weights = torch.as_tensor(value, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError):
        weights = torch.zeros(())
    if weights.ndim == 0 or (classes and weights.ndim > 1) or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise DebiasError(
            f"Expected `{name}` to be weights of the loss{', one for each class' if classes else ''}, a tensor or a"
            f" list of numbers >= 0, but got {value!r}. The weight of the penalty is `penalty_weight`."
        )
    return weights
