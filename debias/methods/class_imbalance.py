"""Class imbalance: four changes of the criterion that need the training counts of the classes, and no group labels.

With N_c training samples of class c, ``pi_c = N_c / N`` and logits z::

    logit adjustment   CE(z + tau log pi)                 Menon et al., ICLR 2021; tau = 1 is the balanced softmax
    class-balanced     w_y CE(z),  w_c ~ (1 - beta) / (1 - beta^N_c), sum C            Cui et al., CVPR 2019
    LDAM               CE(s (z - m_y e_y)),  m_c = m N_c^-1/4 / max_j N_j^-1/4         Cao et al., NeurIPS 2019
    focal              (1 - p_y)^gamma CE(z)                                           Lin et al., ICCV 2017

LDAM's logits are cosines, of a head with normalised features and weights: on ordinary logits its margins mean nothing.
Its deferred reweighting (DRW) leaves all class weights at 1 until a given epoch, then they are class-balanced.

Needs the logits and classes of a cross-entropy; all but focal loss the classes of the training set, which are counted
once. Costs a few kernels on the logits; no second pass.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.data.counting import count_groups
from debias.errors import DebiasError
from debias.methods.base import LossOptions, Method
from debias.ops.arguments import MOST, check_count, check_number
from debias.ops.class_counts import class_balanced_weights, ldam_margins, logit_adjustment, margin_at_target
from debias.ops.distributed import weighted_mean
from debias.ops.fields import arguments
from debias.ops.groups import GroupState, check_counts
from debias.ops.precision import autocast_off
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["LDAM", "ClassBalanced", "CosineLinear", "FocalLoss", "LogitAdjustment"]


class CosineLinear(nn.Module):
    """A classifier head whose logits are cosines: normalised features times normalised weights, as LDAM needs.

    Args:
        in_features: width of the features.
        out_features: number of classes.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_count("in_features", in_features, highest=MOST)
        check_count("out_features", out_features, highest=MOST)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines ``(N, out_features)`` of features ``(N, in_features)``."""
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


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


class Criterion(LossOptions, Method):
    """A changed criterion: elements of the loss anew, and the mean of the global batch."""

    start_epoch: ClassVar[int] = 0  # the first epoch that it is at work in; before, training is plain

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "sum":
            raise DebiasError("Expected `loss` to choose one loss, but got 'sum'. Pass its position.")

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
    """A criterion that depends on the training counts of the classes."""

    stateful = True
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


@arguments
class LogitAdjustment(ClassCriterion):
    """Add the logarithm of the class frequencies to the logits while training: the balanced softmax.

    The module's own logits then are those of
    balanced classes: nothing is to be done at the test.

    Args:
        tau: strength; 1 for the balanced softmax.
    """

    reference = "Menon et al., ICLR 2021; Ren et al., NeurIPS 2020"
    works = "Classes are rare in training and count the same at test."
    fails = "Classes are as frequent at test as in training. It balances classes, not groups inside them."

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tau = check_number("tau", self.tau)

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the adjusted logits."""
        logits = self.logits_of(call)
        added = logit_adjustment(self.module.counts, tau=self.tau).to(logits.dtype)
        return self.again(call, logits + added.view(-1, *[1] * (logits.ndim - 2))), call.record.elements[1]


@arguments
class ClassBalanced(ClassCriterion):
    """Weigh classes by their effective number of samples.

    like torch's weighted cross-entropy the loss
    is divided by the sum of the weights, of the global batch.

    Args:
        beta: in [0, 1); 0.9999 and the like.
        start_epoch: deferred reweighting (DRW): the first epoch with weights.
    """

    reference = "Cui et al., CVPR 2019"
    works = "Classes have very different numbers of samples."
    fails = "It balances classes, not groups inside them."

    beta: float = 0.9999
    start_epoch: int = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta = check_number("beta", self.beta, "[0, 1)")
        self.start_epoch = check_count("start_epoch", self.start_epoch, 0)

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """The elements times the weights of their classes."""
        num, den = call.record.elements
        self.logits_of(call)
        weights = class_balanced_weights(self.module.counts, beta=self.beta).to(num.dtype)[self.ids(call)]
        return num * weights, den * weights


@arguments
class LDAM(ClassCriterion):
    """Margins that grow as classes are rarer, optionally with deferred reweighting.

    The head has to give cosines
    (:class:`debias.CosineLinear`); at the test the largest cosine decides, as ever.

    Args:
        max_margin: margin of the rarest class.
        scale: inverse temperature s.
        reweight_epoch: from this epoch on classes are weighed too (DRW); never by default. Published: epoch 160 of 200.
        beta: of these weights, see :class:`debias.ClassBalanced`.
        check_logits: refuse logits beyond [-1, 1], of which margins would mean nothing; False for those who want it.
    """

    reference = "Cao et al., NeurIPS 2019"
    works = "Classes are rare and the head compares directions: normalised features and weights."
    fails = "Ordinary logits, on which its margins mean nothing. It balances classes, not groups inside them."

    max_margin: float = 0.5
    scale: float = 30.0
    reweight_epoch: int | None = None
    beta: float = 0.9999
    check_logits: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_margin = check_number("max_margin", self.max_margin, "(0, inf)")
        self.scale = check_number("scale", self.scale, "(0, inf)")
        self.beta = check_number("beta", self.beta, "[0, 1)")
        if self.reweight_epoch is not None:
            self.reweight_epoch = check_count("reweight_epoch", self.reweight_epoch, 0)

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the scaled logits, less the margin at the true class."""
        logits, den, ids = self.logits_of(call), call.record.elements[1], self.ids(call)
        # Reading it waits for the device: on logging steps only.
        if self.check_logits and step.logging and (largest := float(logits.detach().abs().max())) > 1 + 1e-3:
            raise DebiasError(
                f"Expected logits that are cosines for {self.state_key}, but got {largest:.3g}: margins in units of the"
                " cosine mean nothing there. Make the head a `debias.CosineLinear`, or pass `check_logits=False`."
            )
        margins = ldam_margins(self.module.counts, max_margin=self.max_margin).to(logits.dtype)
        num = self.again(call, self.scale * (logits - margin_at_target(ids, margins, logits)))
        if self.reweight_epoch is not None and step.epoch >= self.reweight_epoch:
            weights = class_balanced_weights(self.module.counts, beta=self.beta).to(num.dtype)[ids]
            num, den = num * weights, den * weights
        return num, den


@arguments
class FocalLoss(Criterion):
    """Weigh samples down that the network is sure of.

    under label smoothing or class weights p_y
    is ``exp`` of minus the loss, less its weight. Counts nothing; every loss that is minus a log-probability will do.

    Args:
        gamma: 1 or 2; 0 is plain training.
    """

    reference = "Lin et al., ICCV 2017"
    works = "Many easy samples drown the hard ones, as in dense detection."
    fails = "Labels are noisy: what the network is unsure of then counts more. It knows neither classes nor groups."

    gamma: float = field(default=2.0, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gamma = check_number("gamma", self.gamma)

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """The elements times ``(1 - p)^gamma``."""
        num, den = call.record.elements
        return (-torch.expm1(-num / torch.where(den == 0, 1, den))).clamp_min(0) ** self.gamma * num, den


def _whole(call: LossCall, who: str) -> LossCall:
    if call.parts > 1 or call.record.function is not None:
        what = "an augmentation mixes the labels" if call.parts > 1 else "the step reduces the loss itself"
        raise DebiasError(
            f"Expected a loss whose criterion {who} can replace, but {what}. Let the loss reduce"
            " (`reduction='mean'`), without augmentations that mix labels."
        )
    return call
