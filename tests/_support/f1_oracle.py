"""F1 of every label by scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def f1(scores: Tensor, targets: Tensor, threshold: Tensor) -> Tensor:
    """``(A,)`` of scores and targets ``(N, A)``, negative where missing; NaN without a positive, true or guessed."""
    metrics = pytest.importorskip("sklearn.metrics")
    out = []
    for a in range(targets.shape[1]):
        known = targets[:, a] >= 0
        out.append(metrics.f1_score(targets[known, a], scores[known, a] >= threshold, zero_division=float("nan")))
    return torch.tensor(out, dtype=torch.float32)
