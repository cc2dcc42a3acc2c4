"""A plain classifier that knows nothing of debias: what the recipes train."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn

from debias.extras import needs_extra

__all__ = ["Classifier"]


class Classifier(pl.LightningModule):
    """Train a backbone with cross-entropy on batches ``(x, y)``.

    ``x`` is float of shape ``(N, in_channels, image_size, image_size)``, ``y`` is int64 of shape ``(N,)``.
    Logs ``train/loss``, ``val/loss`` and ``test/loss``.

    Args:
        backbone: ``"mlp"``, ``"cnn"``, ``"strided"`` (a CNN that keeps where things are), or the name of any timm model
            (``pip install 'lightning-debias[images]'``).
        num_classes: number of logits; 1 trains a binary classifier with binary cross-entropy, on ``y`` in {0, 1}.
        in_channels: channels of an image.
        image_size: height and width of an image; only the MLP needs to know.
        width: hidden units of the MLP, channels of the CNN, features of the strided CNN.
        init: initial weights of the MLP and the CNNs: ``"torch"``, as their layers come, or ``"xavier_uniform"`` with
            biases of zero.
        l2: added to the training loss, not to the one that is logged: ``l2`` times the sum of all squared parameters,
            biases included. Its gradient is that of Adam's ``weight_decay=2 * l2``, but as a part of the loss it is
            scaled with it.
        pretrained: start from timm's weights. Those of a file with timm's names take
            ``backbone_args={"pretrained_cfg_overlay": {"file": "weights.pth"}}``, and no network.
        backbone_args: further arguments of ``timm.create_model``, such as ``drop_rate``.
        freeze: submodules of a timm backbone that are not trained, by their dotted paths; their batch norms keep their
            statistics (``timm.utils.freeze``).
        optimizer: builds the optimiser from the parameters.
        lr_scheduler: builds a learning-rate scheduler, stepped once an epoch, from the optimiser.

    Raises:
        ValueError: ``pretrained``, ``backbone_args`` or ``freeze`` with a backbone that is not timm's, ``init`` with
            one that is, a path in ``freeze`` that is not there, or ``l2`` below zero.
    """

    def __init__(
        self,
        backbone: str = "mlp",
        num_classes: int = 2,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 128,
        init: Literal["torch", "xavier_uniform"] = "torch",
        l2: float = 0.0,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        freeze: list[str] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        # Factories would be pickled into the checkpoint, which then would not load with `weights_only=True`.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if not (math.isfinite(l2) and l2 >= 0):
            raise ValueError(f"Expected `l2` to be a finite number of at least 0, but got {l2}.")
        if init not in ("torch", "xavier_uniform"):
            raise ValueError(f"Expected `init` to be `torch` or `xavier_uniform`, but got `{init}`.")
        self.num_classes = num_classes
        self.l2 = l2
        self.optimizer_factory, self.lr_scheduler_factory = optimizer, lr_scheduler
        if backbone in _OWN:
            if pretrained or backbone_args or freeze:
                raise ValueError(
                    "Expected `pretrained`, `backbone_args` and `freeze` only with a timm backbone, but got"
                    f" `{backbone}`."
                )
            self.network = _OWN[backbone](in_channels, image_size, width, num_classes)
            if init == "xavier_uniform":
                self.network.apply(_xavier_uniform)
        elif init != "torch":
            raise ValueError(
                f"Expected `init` only with the backbones `mlp`, `cnn` and `strided`, but got `{backbone}`."
            )
        else:
            self.network = _timm(backbone, pretrained, num_classes, in_channels, backbone_args or {})
            if freeze:
                _freeze(self.network, freeze)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits of shape ``(N, num_classes)``."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the mean loss of a batch, with ``l2``."""
        loss = self._loss(batch, "train")
        if self.l2:
            loss = loss + self.l2 * torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the validation loss."""
        self._loss(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the test loss."""
        self._loss(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the logits of a batch ``(x, y)`` or ``x``."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        """Build the optimiser and the scheduler."""
        optimizer = self.optimizer_factory(self.parameters())
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _loss(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        if self.num_classes == 1:
            loss = F.binary_cross_entropy_with_logits(logits.squeeze(-1), y.to(logits.dtype))
        else:
            loss = F.cross_entropy(logits, y)
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", batch_size=len(y), sync_dist=stage != "train")
        return loss


def _mlp(in_channels: int, image_size: int, width: int, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size**2, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


def _xavier_uniform(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cnn(in_channels: int, image_size: int, width: int, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


def _strided(in_channels: int, image_size: int, width: int, num_classes: int) -> nn.Module:
    size = -(-image_size // 4)
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * size**2, width),
        nn.LayerNorm(width),
        nn.Linear(width, num_classes),
    )


_OWN = {"mlp": _mlp, "cnn": _cnn, "strided": _strided}


def _timm(name: str, pretrained: bool, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    with needs_extra("images"):
        import timm

    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **options)


def _freeze(network: nn.Module, paths: list[str]) -> None:
    from timm.utils import freeze

    known = {name for name, _ in network.named_modules()}
    if missing := [path for path in paths if path not in known]:
        raise ValueError(f"Expected `freeze` to name submodules of the backbone, but there is no `{missing[0]}`.")
    freeze(network, paths)
