"""Focal loss: what the network is sure of counts less. Lin et al., ICCV 2017.

With the probability ``p_y`` of the true class and logits z::

    loss = (1 - p_y)^gamma CE(z)

Under label smoothing or class weights ``p_y`` is ``exp`` of minus the loss, less its weight.

Needs a loss that is minus a log-probability; counts nothing. Costs a few kernels on the losses; no second pass.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import Criterion
from debias.ops.arguments import checked, shown
from debias.ops.fields import arguments
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["FocalLoss", "focal_loss"]


@checked("logits: float N C | float ..., targets: int N < C | any ...", gamma="[0, inf)")
def focal_loss(logits: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """``(1 - p_y)^gamma`` times cross-entropy, or, with float targets in the shape of the logits, binary cross-entropy.

    Args:
        logits: ``(N, C)``, or any shape of binary outputs.
        targets: class ids ``(N,)``, or 0 / 1 in the shape of the logits.
        gamma: 0 for none; below 1 the slope at ``p_y = 1`` is infinite.

    Returns:
        Losses ``(N,)``, or in the shape of the logits, differentiable.

    Example:
        >>> import torch
        >>> from debias.functional import focal_loss
        >>> focal_loss(torch.tensor([[0.2, 0.1, 0.3]]), torch.tensor([2]), gamma=1.0)
        tensor([0.6341])
    """
    binary = targets.is_floating_point()
    fits = targets.shape == (logits.shape if binary else logits.shape[:1] + logits.shape[2:])
    if not fits or targets.dtype == torch.bool or not (binary or logits.ndim > 1):
        raise DebiasError(
            f"Expected `targets` to be class ids of shape (N,) with `logits` of shape (N, C), or float 0 / 1 in their"
            f" shape, but got {shown(targets)} with {shown(logits)}. Convert them."
        )
    if binary:
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
    # 1 - exp(-l) loses all digits for a small loss; expm1 does not.
    return (-torch.expm1(-losses)) ** gamma * losses


@arguments(of=focal_loss)
class FocalLoss(Criterion):
    """Weigh samples down that the network is sure of.

    Samples that a shortcut answers are soon easy; as these count less, what is left to learn are those that it does not
    answer.

    Args:
        gamma: 1 or 2; 0 is plain training.
    """

    reference = "Lin et al., ICCV 2017"
    works = "Many easy samples drown the hard ones, as in dense detection."
    fails = "Labels are noisy: what the network is unsure of then counts more. It knows neither classes nor groups."

    classifies = True

    gamma: float = field(default=2.0, kw_only=False)

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """The elements times ``(1 - p)^gamma``."""
        num, den = call.record.elements
        return (-torch.expm1(-num / torch.where(den == 0, 1, den))).clamp_min(0) ** self.gamma * num, den
