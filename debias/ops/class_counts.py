"""Criteria that need the training counts of the classes, as functions of logits and targets; formulas and references
stand at the top of :mod:`debias.methods.class_imbalance`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.arguments import checked, shown

__all__ = [
    "class_balanced_weights",
    "focal_loss",
    "ldam_loss",
    "ldam_margins",
    "logit_adjustment",
    "margin_at_target",
]


@checked("class_counts: float C | int C", tau="[0, inf)")
def logit_adjustment(class_counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """What is added to the logits while training: ``tau log pi``. Taken off the logits of a plainly trained network, it
    is the post-hoc form.

    Args:
        class_counts: training samples ``(C,)``; a class without any counts as one with one.
        tau: strength.

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


@checked("class_counts: float C | int C", beta="[0, 1)")
def class_balanced_weights(class_counts: Tensor, *, beta: float = 0.9999) -> Tensor:
    """Weights by the effective number of samples, ``(1 - beta) / (1 - beta^N_c)``, scaled to sum C.

    Args:
        class_counts: training samples ``(C,)``; a class without any gets weight 0.
        beta: in [0, 1): 0 gives equal weights, towards 1 inverse frequencies.

    Returns:
        ``(C,)``.
    """
    present = class_counts > 0
    number = -torch.expm1(class_counts * (math.log(beta) if beta else -math.inf))
    raw = torch.where(present, 1 / torch.where(present, number, 1), 0)
    return raw * (len(raw) / raw.sum())


@checked("class_counts: float C | int C", max_margin="(0, inf)")
def ldam_margins(class_counts: Tensor, *, max_margin: float = 0.5) -> Tensor:
    """Margins ``N_c^-1/4``, the largest of them ``max_margin``.

    Args:
        class_counts: training samples ``(C,)``; a class without any counts as one with one.
        max_margin: of the rarest class, in units of the cosine.

    Returns:
        ``(C,)``.
    """
    raw = class_counts.clamp_min(1) ** -0.25
    return raw * (max_margin / raw.max())


@checked("cosines: float N C, targets: int N < C, margins: float C", scale="(0, inf)")
def ldam_loss(cosines: Tensor, targets: Tensor, margins: Tensor, *, scale: float = 30.0) -> Tensor:
    """Cross-entropy in which the true class has to win by its margin.

    Args:
        cosines: logits of a normalised head ``(N, C)``.
        targets: class ids ``(N,)``.
        margins: ``(C,)``.
        scale: s, the inverse temperature.

    Returns:
        Losses ``(N,)``.
    """
    return F.cross_entropy(scale * (cosines - margin_at_target(targets, margins, cosines)), targets, reduction="none")


def margin_at_target(targets: Tensor, margins: Tensor, logits: Tensor) -> Tensor:
    """The margin at the true class, 0 elsewhere, in the shape of the logits ``(N, C, ...)``; without waiting."""
    classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    return (targets.unsqueeze(1) == classes) * margins.to(logits.dtype).view_as(classes)


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
