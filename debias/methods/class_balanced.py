"""Class-balanced loss: weights by the effective number of samples. Cui et al., CVPR 2019.

With N_c training samples of each of C classes, and logits z::

    loss = mean of w_y CE(z)                w_c ~ (1 - beta) / (1 - beta^N_c), sum C

Like torch's weighted cross-entropy the loss is divided by the sum of the weights, of the global batch. Deferred
reweighting (DRW, Cao et al., NeurIPS 2019) leaves all weights at 1 until a given epoch.

Needs the logits and classes of a cross-entropy, and the classes of the training set, which are counted once. Costs a
few kernels on the logits; no second pass.
"""

from __future__ import annotations

from torch import Tensor

from debias.methods.base import ClassCriterion
from debias.ops.class_counts import class_balanced_weights
from debias.ops.fields import arguments
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["ClassBalanced", "class_balanced_weights"]


@arguments(of=class_balanced_weights, start_epoch="[0, inf)")
class ClassBalanced(ClassCriterion):
    """Weigh classes by their effective number of samples.

    Guessing a frequent class is a shortcut, and it pays less where samples of rare classes count more.

    Args:
        beta: in [0, 1); 0.9999 and the like.
        start_epoch: deferred reweighting (DRW): the first epoch with weights.
    """

    reference = "Cui et al., CVPR 2019"
    works = "Classes have very different numbers of samples."
    fails = "It balances classes, not groups inside them."

    beta: float = 0.9999
    start_epoch: int = 0  # type: ignore[misc]

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """The elements times the weights of their classes."""
        num, den = call.record.elements
        self.logits_of(call)
        weights = class_balanced_weights(self.module.counts, beta=self.beta).to(num.dtype)[self.ids(call)]
        return num * weights, den * weights
