"""Tiny images with something to see on them, and plain modules that classify them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debias import EvalSampler, tag

SIDE = 12


def images(n: int, channels: int = 1, side: int = SIDE, *, seed: int = 0) -> Tensor:
    """Smooth blobs of different colours on a dark ground, float32 ``(n, channels, side, side)`` in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, side)
    centres, widths = 0.8 * torch.rand(n, 2, generator=g) - 0.4, 0.15 + 0.2 * torch.rand(n, 1, 1, generator=g)
    dx, dy = axis.view(1, 1, -1) - centres[:, :1, None], axis.view(1, -1, 1) - centres[:, 1:, None]
    blobs = torch.exp(-(dx**2 + dy**2) / widths).unsqueeze(1)
    colors = 0.4 + 0.6 * torch.rand(n, channels, 1, 1, generator=g)
    return (blobs * colors + 0.02 * torch.rand(n, channels, side, side, generator=g)).clamp(0, 1)


def labels(n: int) -> Tensor:
    """Three classes in turn."""
    return torch.arange(n) % 3


class Net(L.LightningModule):
    """Logits from images; nothing here knows of debias."""

    def __init__(self, channels: int = 1, side: int = SIDE, *, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(channels * side * side, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
            )
            self.net[1].weight.data.mul_(6)  # so that what it says depends on the image

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def dataset(n: int = 23, channels: int = 1, **tags: Any) -> Any:
    """Images and labels, with tags if there are any."""
    plain = TensorDataset(images(n, channels), labels(n))
    return tag(plain, **tags) if tags else plain


def eval_loader(n: int = 23, channels: int = 1, *, batch_size: int = 8) -> DataLoader:
    """Every image exactly once over all ranks."""
    data = dataset(n, channels)
    return DataLoader(data, batch_size=batch_size, sampler=EvalSampler(data))
