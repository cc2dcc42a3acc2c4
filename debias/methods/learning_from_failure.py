"""Learning from Failure: a biased twin says which samples the network must learn. Nam et al., NeurIPS 2020.

Two networks of the same architecture see the same batch. The biased one, b, learns what it finds easy even faster, by
generalised cross-entropy; the main one learns what b fails at::

    A[i] = l_i at first, then rate * A[i] + (1 - rate) * l_i      running loss of each sample, of b and of the main one
    w_i  = a_b / (a_b + a_main),  a = A[i] / max of A over the training samples of i's class
    loss = mean_i w_i l_main,i   and for b   mean_i q p_b,i^q l_b,i       (q times the gradient of (1 - p^q) / q)

Three weightings circulate under this name. This is the authors' (rate 0.7, q 0.7); ``running=False`` is SubpopBench's,
which has neither running losses nor class maxima: there the weight of whatever the main network has fitted goes to one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["failure_weights", "generalized_cross_entropy"]


def generalized_cross_entropy(logits: Tensor, targets: Tensor, *, q: float = 0.7) -> Tensor:
    """``(1 - p_y^q) / q``: cross-entropy as q goes to 0, 1 minus the probability at 1. Zhang and Sabuncu, NeurIPS 2018.

    Args:
        logits: ``(N, C)``.
        targets: class ids ``(N,)``.
        q: in (0, 1].

    Returns:
        Losses ``(N,)``, differentiable. Their gradient is ``p_y^q`` times that of cross-entropy.

    Example:
        >>> import torch
        >>> from debias.functional import generalized_cross_entropy
        >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), q=1.0)
        tensor([0.5000])
    """
    return -torch.expm1(-q * torch.nn.functional.cross_entropy(logits, targets, reduction="none")) / q


def failure_weights(
    biased: Tensor, main: Tensor, *, biased_scale: Tensor | None = None, main_scale: Tensor | None = None
) -> Tensor:
    """Relative difficulty of samples: the biased network's part of both (running) losses.

    Args:
        biased: losses of the biased network ``(N,)``, at least 0.
        main: losses of the main network ``(N,)``.
        biased_scale: what the biased ones are divided by, ``(N,)``: the largest of each sample's class.
        main_scale: what the main ones are divided by.

    Returns:
        Weights ``(N,)`` in [0, 1]; 0 where both losses are 0.

    Example:
        >>> import torch
        >>> from debias.functional import failure_weights
        >>> failure_weights(torch.tensor([0.05, 2.4]), torch.tensor([0.4, 0.7]))
        tensor([0.1111, 0.7742])
    """
    tiny = torch.finfo(biased.dtype).tiny
    if biased_scale is not None:
        biased = biased / biased_scale.clamp_min(tiny)
    if main_scale is not None:
        main = main / main_scale.clamp_min(tiny)
    return biased / (biased + main + 1e-8)
