"""A plain multi-label classifier that knows nothing of debias: what the action-unit recipes train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.extras import needs_extra
from debias.models.classifier import Classifier

__all__ = ["MultiLabelClassifier"]


class MultiLabelClassifier(Classifier):
    """Train a timm backbone with masked binary cross-entropy, AdamW with layer-wise decay, warm-up and cosine.

    ``x`` is float of shape ``(N, 3, image_size, image_size)``, ``y`` is float of shape ``(N, num_labels)`` in {0, 1},
    and -1 where a label is missing, which is left out. Logs ``train/loss``, ``val/loss`` and ``test/loss``.

    Args:
        num_labels: number of labels.
        backbone: name of a timm model.
        weights: checkpoint to start from (a state dict, or one under ``"model"`` or ``"state_dict"``); what is of
            another shape, such as the head, is passed over.
        pretrained: start from timm's weights.
        backbone_args: further arguments of ``timm.create_model``, such as ``img_size`` and ``drop_path_rate``.
        lr: learning rate of the head.
        layer_decay: factor of the learning rate from each layer to the one below.
        weight_decay: AdamW's, not on biases and norms.
        warmup_epochs: epochs of linear warm-up, before the cosine.

    Raises:
        ValueError: no tensor of ``weights`` fits the network.
    """

    def __init__(
        self,
        num_labels: int,
        backbone: str = "vit_base_patch16_224",
        *,
        weights: str | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        lr: float = 1.25e-4,
        layer_decay: float = 0.65,
        weight_decay: float = 0.05,
        warmup_epochs: float = 3.0,
    ) -> None:
        super().__init__(backbone, num_labels, pretrained=pretrained, backbone_args=backbone_args)
        self.save_hyperparameters()
        self.lr = lr
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        if weights is not None:
            self._start_from(weights)

    def configure_optimizers(self) -> Any:
        """AdamW whose rate falls layer by layer, warm-up, cosine to zero, stepped with every batch."""
        with needs_extra("images"):
            from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(self.network, self.weight_decay, layer_decay=self.layer_decay)
        for group in groups:
            group["lr"] = self.lr * group.pop("lr_scale")
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.999))
        total = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(total * self.warmup_epochs / max(self.trainer.max_epochs or 1, 1)))
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup)),
        ]
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        known = (y >= 0).to(y.dtype)
        losses = F.binary_cross_entropy_with_logits(self(x), y.clamp_min(0), reduction="none")
        loss = (losses * known).sum() / known.sum().clamp_min(1)
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", batch_size=len(y), sync_dist=stage != "train")
        return loss

    def _start_from(self, weights: str) -> None:
        found = torch.load(weights, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):
            found = found[key] if isinstance(found.get(key), dict) else found
        own = self.network.state_dict()
        fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
        if not fitting:
            raise ValueError(f"Expected `weights` for the network, but none of {weights} has its names and shapes.")
        self.network.load_state_dict(fitting, strict=False)
