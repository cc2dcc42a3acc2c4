"""A plain detector that knows nothing of debias: what the detection recipes train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.extras import needs_extra

__all__ = ["Detector", "tiny_detector"]

_TINY = ("faster_rcnn", "fcos", "mask_rcnn", "retinanet", "ssd")


class Detector(pl.LightningModule):
    """Train one of torchvision's detectors on batches ``(images, targets)``.

    ``images`` is a list of float tensors ``(3, H, W)`` in [0, 1]; each target holds ``boxes`` float ``(n, 4)`` as x1,
    y1, x2, y2 in pixels and ``labels`` int64 ``(n,)`` from 1. Logs ``train/loss``. In validation and test the module is
    called on the images, for monitors to see what it predicts.

    Args:
        architecture: ``"tiny_fcos"`` (or ``_faster_rcnn``, ``_mask_rcnn``, ``_retinanet``, ``_ssd``): see
            :func:`tiny_detector`; or the name of any torchvision detector, such as ``"fcos_resnet50_fpn"``.
        num_classes: number of classes with the background, which is 0.
        pretrained: start from torchvision's backbone trained on ImageNet; needs the network.
        options: further arguments of the architecture's function, such as ``min_size``.
        optimizer: builds the optimiser from the parameters.
        lr_scheduler: builds a learning-rate scheduler, stepped once an epoch, from the optimiser.

    Raises:
        DebiasError: the architecture is not known, or ``pretrained`` with a tiny one.
    """

    def __init__(
        self,
        architecture: str = "tiny_fcos",
        num_classes: int = 2,
        *,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        # Factories would be pickled into the checkpoint, which then would not load with `weights_only=True`.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer_factory, self.lr_scheduler_factory = optimizer, lr_scheduler
        if architecture.startswith("tiny_"):
            if pretrained:
                raise DebiasError(
                    f"Expected `pretrained` only with torchvision's own architectures, but got {architecture!r}."
                )
            self.network = tiny_detector(architecture.removeprefix("tiny_"), num_classes, **(options or {}))
        else:
            self.network = _torchvision(architecture, num_classes, pretrained, options or {})

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Predict ``boxes``, ``labels`` and ``scores`` of each image; in evaluation mode."""
        return self.network(list(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the sum of the detector's losses."""
        images, targets = batch
        losses = self.network(list(images), list(targets))
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Predict."""
        self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Predict."""
        self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Tensor]]:
        """Predict the boxes of a batch ``(images, targets)`` or ``images``."""
        return self(batch[0] if isinstance(batch[0], list | tuple) else batch)

    def configure_optimizers(self) -> Any:
        """Build the optimiser and the scheduler."""
        optimizer = self.optimizer_factory(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def tiny_detector(
    kind: Literal["faster_rcnn", "fcos", "mask_rcnn", "retinanet", "ssd"] | str,
    num_classes: int,
    *,
    image_size: int = 64,
    width: int = 32,
    **options: Any,
) -> nn.Module:
    """One of torchvision's detectors on a small convolutional network, trained from scratch in seconds on a CPU.

    Three stages of two convolutions, one feature map with a stride of 8; GroupNorm, so nothing depends on the batch.

    Args:
        kind: which detector.
        num_classes: number of classes with the background, which is 0.
        image_size: images are resized so that the longer side has this many pixels.
        width: channels of the feature map, a multiple of 32.
        **options: further arguments of the detector's class, such as ``score_thresh``.

    Raises:
        DebiasError: the kind is not known, or torchvision is not installed (extra ``detection``).
    """
    if kind not in _TINY:
        raise DebiasError(f"Expected `kind` to be one of {', '.join(_TINY)}, but got {kind!r}.")
    detection = _detection()
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.ops import MultiScaleRoIAlign

    backbone = _backbone(width)
    size = {"min_size": image_size, "max_size": image_size}
    if kind == "ssd":
        backbone.out_channels = [width]  # type: ignore[assignment]
        boxes = DefaultBoxGenerator([[2]], scales=[0.25, 0.5], steps=[8])
        return detection.ssd.SSD(backbone, boxes, (image_size, image_size), num_classes, **options)
    if kind == "fcos":
        anchors = AnchorGenerator(((8,),), ((1.0,),))
        return detection.FCOS(backbone, num_classes, anchor_generator=anchors, **(size | options))
    anchors = AnchorGenerator(((12, 24, 40),), ((1.0,),))
    if kind == "retinanet":
        return detection.RetinaNet(backbone, num_classes, anchor_generator=anchors, **(size | options))
    heads: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(["0"], 4, 2),
        "box_head": detection.faster_rcnn.TwoMLPHead(width * 16, 64),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(64, num_classes),
    }
    if kind == "faster_rcnn":
        return detection.FasterRCNN(backbone, **(heads | size | options))
    heads["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 4, 2)
    heads["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(width, (width,), 1)
    heads["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(width, width, num_classes)
    return detection.MaskRCNN(backbone, **(heads | size | options))


def _backbone(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for out in (width // 2, width, width):
        for stride in (2, 1):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU()]
            channels = out
    backbone = nn.Sequential(*layers)
    backbone.out_channels = width  # type: ignore[assignment]  # torchvision reads it
    return backbone


def _torchvision(name: str, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    detection = _detection()
    if not callable(builder := getattr(detection, name, None)) or isinstance(builder, type):
        raise DebiasError(
            f"Expected `architecture` to be one of {', '.join(f'tiny_{kind}' for kind in _TINY)}, or one of"
            f" torchvision's detectors, but got {name!r}. They are listed by"
            " `torchvision.models.list_models(module=torchvision.models.detection)`."
        )
    weights = "DEFAULT" if pretrained else None
    return builder(weights=None, weights_backbone=weights, num_classes=num_classes, **options)


def _detection() -> Any:
    with needs_extra("detection"):
        from torchvision.models import detection
    return detection
