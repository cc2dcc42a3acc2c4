"""A plain classifier that also sees unlabelled samples: what recipes of domain adaptation train."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from debias.models.classifier import Classifier

__all__ = ["AdaptedClassifier"]


class AdaptedClassifier(Classifier):
    """A :class:`Classifier` that is trained on batches ``{"source": (x, y), "target": x}``.

    The loss is that of the source. The network runs on the target, too, for methods that read its features there;
    without one it trains on the source alone.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the mean loss of the source, and the features of the target."""
        loss = super().training_step(batch["source"], batch_idx)
        self(batch["target"])
        return loss
