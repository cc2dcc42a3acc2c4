"""Logit adjustment: the balanced softmax. Menon et al., ICLR 2021; Ren et al., NeurIPS 2020.

With N_c training samples of class c, ``pi_c = N_c / N`` and logits z::

    loss = CE(z + tau log pi)               tau = 1 is the balanced softmax

Needs the logits and classes of a cross-entropy, and the classes of the training set, which are counted once. Costs a
few kernels on the logits; no second pass.
"""

from __future__ import annotations

from torch import Tensor

from debias.methods.base import ClassCriterion
from debias.ops.arguments import checked
from debias.ops.fields import arguments
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["LogitAdjustment", "logit_adjustment"]


@checked("class_counts: float C | int C", tau="[0, inf)")
def logit_adjustment(class_counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """What is added to the logits while training: ``tau log pi``. Taken off the logits of a plainly trained network, it
    is the post-hoc form.

    Args:
        class_counts: training samples ``(C,)``; a class without any counts as one with one.
        tau: strength; 1 for the balanced softmax.

    Returns:
        ``(C,)``.

    Example:
        >>> import torch
        >>> from debias.functional import logit_adjustment
        >>> logit_adjustment(torch.tensor([75.0, 25.0])).exp()
        tensor([0.7500, 0.2500])
    """
    counts = class_counts.clamp_min(1)
    return tau * (counts / counts.sum()).log()


@arguments(of=logit_adjustment)
class LogitAdjustment(ClassCriterion):
    """Add the logarithm of the class frequencies to the logits while training: the balanced softmax.

    How frequent a class is in training is a shortcut, too; what the loss adds by itself, the network need not learn.

    The module's own logits then are those of balanced classes: nothing is to be done at the test.
    """

    reference = "Menon et al., ICLR 2021; Ren et al., NeurIPS 2020"
    works = "Classes are rare in training and count the same at test."
    fails = "Classes are as frequent at test as in training. It balances classes, not groups inside them."

    tau: float = 1.0

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the adjusted logits."""
        logits = self.logits_of(call)
        added = logit_adjustment(self.module.counts, tau=self.tau).to(logits.dtype)
        return self.again(call, logits + added.view(-1, *[1] * (logits.ndim - 2))), call.record.elements[1]
