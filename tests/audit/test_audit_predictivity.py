"""Before training: a column that tells the label and is easy to read is warned of, others are not."""

from __future__ import annotations

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debias.audit import before_training
from debias.audit.columns import Column
from debias.audit.predictivity import predictivity
from debias.errors import DebiasError

N = 600


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def data(agreement):
    random = np.random.default_rng(0)
    y = random.integers(0, 2, N)
    color = np.where(random.random(N) < agreement, y, 1 - y)
    x = random.normal(size=(N, 6)).astype(np.float32)
    x[:, 0] += 1.2 * y  # the label is hard to read, the colour is not
    x[:, 1] += 5.0 * color
    frame = pd.DataFrame({"color": color, "noise": random.integers(0, 3, N), "file": range(N)})
    return DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), 50, shuffle=True), frame


def test_an_easy_predictive_column_is_warned_of_and_the_model_is_left_alone():
    loader, frame = data(0.9)
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = before_training(model, loader, metadata=frame, progress=False).set_index("column")
    assert table.index[0] == "color"
    assert "expect a shortcut" in table["warning"]["color"]
    assert table["predictivity"]["color"] == pytest.approx(0.9, abs=0.04)
    assert table["untrained"]["color"] > table["untrained"]["target"]
    assert table["warning"][["noise", "target"]].tolist() == ["", ""]
    assert "file" not in table.index
    assert set(table) >= {"untrained", "trained"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_column_that_does_not_tell_the_label_is_none():
    loader, frame = data(0.5)
    table = before_training(Net(), loader, metadata=frame, epochs=0, progress=False)
    assert (table["warning"] == "").all()
    assert "trained" not in table


def test_predictivity_is_scored_on_the_other_half():
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 400)
    many = Column("id", tuple(map(str, range(400))), np.arange(400))  # would tell all labels it was fitted on
    found = predictivity(y, many, confidence=0.95, seed=0)
    assert found["low"] < found["chance"]
    perfect = predictivity(y, Column("y", ("0", "1"), y), confidence=0.95, seed=0)
    assert perfect["predictivity"] == 1


def test_a_module_that_does_not_say_how_it_is_trained_is_refused():
    loader, frame = data(0.9)
    with pytest.raises(DebiasError, match="Pass `epochs=0`"):
        before_training(Net().net, loader, metadata=frame, progress=False)
    assert len(before_training(Net().net, loader, metadata=frame, epochs=0, progress=False))
