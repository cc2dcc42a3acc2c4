"""What methods share that change the criterion itself, for classes that are not equally frequent."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.data.counting import count_groups
from debias.errors import DebiasError
from debias.methods.base.method import OneLossMethod
from debias.ops.arguments import check_count
from debias.ops.distributed import weighted_mean
from debias.ops.fields import arguments
from debias.ops.groups import GroupState, check_counts
from debias.ops.precision import autocast_off
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["ClassCriterion", "Criterion"]


class ClassState(GroupState):
    """Training counts of the classes, and what follows from them."""

    kind = "class"
    counts: Tensor

    def __init__(self, n_classes: int, class_counts: Any = None) -> None:
        super().__init__(n_classes)
        self.register_buffer("counts", torch.zeros(self.n_groups, dtype=torch.float64))
        self.given = class_counts is not None
        if class_counts is not None:
            self.counts.copy_(check_counts(class_counts, self.group_names, "class"))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = self.counts.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.given:  # an argument, not state: a resumed run keeps its own
            self.counts.copy_(own)


class Criterion(OneLossMethod):
    """A changed criterion: elements of the loss anew, and the mean of the global batch.

    Logs:
        On logging steps ``train/average_loss``, that of the loss as it is.
    """

    start_epoch: ClassVar[int] = 0  # the first epoch that it is at work in; before, training is plain

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """Numerators and denominators of the changed criterion."""
        raise NotImplementedError

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The mean of the changed criterion over the global batch."""
        if step.epoch < self.start_epoch:
            return [call.mean() for call in calls]
        device = str(calls[0].num.device.type)
        with autocast_off(device):
            found = [self._mean(_whole(call, self.state_key), step) for call in calls]
        if step.logging:
            self.log_value("average_loss", torch.stack([call.mean().detach() for call in calls]).sum(), step)
        return found

    def _mean(self, call: LossCall, step: Step) -> Tensor:
        (num, den), factor = self.elements(call, step), call.record.factor
        return weighted_mean(num if factor is None else num * factor, den)


@arguments
class ClassOptions:
    """What a criterion takes that counts classes.

    Args:
        n_classes: number of classes.
        target: where the class ids are in the batch, to count them.
        class_counts: training samples of each class; counted from the training set if not given.
    """

    n_classes: int = field(kw_only=False)
    target: BatchKey = field(default=1, kw_only=False)
    class_counts: list[int] | None = None


class ClassCriterion(ClassOptions, Criterion):
    """A criterion that depends on the training counts of the classes; its module holds them."""

    stateful = True
    updates = False
    needs = ("target",)

    def make_module(self) -> ClassState:
        """The counts."""
        return ClassState(check_count("n_classes", self.n_classes, 2), self.class_counts)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.module = self.make_module()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the classes, unless somebody gave or saved the counts."""
        if not bool(self.module.counts.any()):
            counts = count_groups(trainer, self.target, self.module.n_groups, argument="target")
            self.module.counts.copy_(check_counts(counts, self.module.group_names, "class"))

    def logits_of(self, call: LossCall) -> Tensor:
        """Logits of a cross-entropy over the classes, in at least float32."""
        logits = call.logits
        if call.name != "cross_entropy" or logits is None or logits.shape[min(1, logits.ndim - 1)] != self.n_classes:
            raise DebiasError(
                f"Expected a cross-entropy over `n_classes={self.n_classes}` for {self.state_key}, but got"
                f" `{call.name}` of logits {None if logits is None else tuple(logits.shape)}. Correct `n_classes`, or"
                " choose the loss, `loss=`."
            )
        return logits if logits.dtype == torch.float64 else logits.float()

    def again(self, call: LossCall, logits: Tensor) -> Tensor:
        """The elements of the loss from other logits, with all that it was called with."""
        options: dict[str, Any] = {k: v.to(logits.dtype) if k == "weight" else v for k, v in call.arguments.items()}
        return F.cross_entropy(logits, call.target, reduction="none", **options)  # type: ignore[arg-type]

    def ids(self, call: LossCall) -> Tensor:
        """Class ids of the elements; 0 where the target does not count."""
        target: Any = call.target
        if target.is_floating_point():
            raise DebiasError(f"Expected class ids as targets for {self.state_key}, but got probabilities of classes.")
        return torch.where((target >= 0) & (target < self.n_classes), target, 0)


def _whole(call: LossCall, who: str) -> LossCall:
    if call.parts > 1 or call.record.function is not None:
        what = "an augmentation mixes the labels" if call.parts > 1 else "the step reduces the loss itself"
        raise DebiasError(
            f"Expected a loss whose criterion {who} can replace, but {what}. Let the loss reduce"
            " (`reduction='mean'`), without augmentations that mix labels."
        )
    return call
