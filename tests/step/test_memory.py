"""Nothing that a step has made outlives it: not even until the garbage collector comes by."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import make_trainer
from debias import CORAL, AttributeProbe, Fishr, GroupDRO, GroupMonitor

WATCHERS = {
    "reweighing": lambda: GroupDRO(2, 2),
    "head that is found": lambda: Fishr(2, 2),
    "head that is named": lambda: Fishr(2, 2, head="net.2"),
    "features": lambda: CORAL(2, 2, features="net.1"),
    "monitor": lambda: GroupMonitor(2, 2),
    "monitor of features": lambda: AttributeProbe(2, 2, features="net.1"),
}


class Counting(L.LightningModule):
    """Counts in each step what is left of earlier ones."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        self.reduction = reduction
        self.made: list[Any] = []
        self.left: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        self.left.append(sum(tensor() is not None for tensor in self.made))
        features = self.net[:2](x)
        logits = self.net[2](features)
        self.made += [weakref.ref(features), weakref.ref(logits)]
        return F.cross_entropy(logits.double().view(-1, 3), y, reduction=self.reduction).mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)  # no divergence


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", WATCHERS)
def test_the_tensors_of_a_step_die_with_it(name: str, reduction: str) -> None:
    module = Counting(reduction)
    rows = TensorDataset(torch.randn(16, 5), torch.arange(16) % 3, torch.arange(16) % 2)
    trainer = make_trainer([WATCHERS[name]()], max_epochs=2)
    gc.collect()
    gc.disable()
    try:
        trainer.fit(module, DataLoader(rows, 4), DataLoader(rows, 4))
    finally:
        gc.enable()
    assert module.left == [0] * 16
