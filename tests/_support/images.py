"""Tiny images, and a plain convolutional module that knows nothing of debias."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Share, make_trainer, places
from debias import tag

CLASSES = 3


def images(n: int = 23, *, size: int = 6, seed: int = 0) -> TensorDataset:
    """``n`` float64 images ``(2, size, size)`` and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, size, size, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.arange(n) % CLASSES)


def batches(
    n: int = 23,
    *,
    bare: bool = False,
    sizes: tuple[int, ...] = (8,),
    last: tuple[int, ...] = (7,),
    rank: int = 0,
    **tags: Any,
) -> DataLoader:
    """Batches of 8 over all ranks, in order."""
    data: Any = images(n)
    data = data if bare else tag(data, **({"place": places(n)} | tags))
    return DataLoader(data, batch_size=sizes[rank], sampler=Share(data, sizes, last, rank))


class Pictures(L.LightningModule):
    """Two convolutions and a linear layer; logs and keeps its own accuracy."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(2, 4, 3, padding=1)
            self.stage = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Tanh())
            self.head = nn.Linear(5, CLASSES)
        self.double()
        self.lr = lr
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # input, target and loss of each step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.seen.append((x, y, loss.detach()))
        return loss

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Evaluated(Pictures):
    """The same with validation and test."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y), batch_size=len(y))


def train(module: Any, callbacks: Any = (), *, bare: bool = False, **options: Any) -> Any:
    """One epoch of three batches unless told otherwise; the Trainer."""
    trainer = make_trainer(callbacks, **options)
    trainer.fit(module, batches(bare=bare))
    return trainer
