"""What follows from the training counts of the classes, for several methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from debias.ops.arguments import checked

__all__ = ["class_balanced_weights"]


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
