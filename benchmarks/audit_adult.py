"""An audit of a small network on the Adult census data (UCI, CC BY 4.0): sex, race, age and education.

    python benchmarks/audit_adult.py --root data/adult --out audit_adult

The folder holds `adult.data` and `adult.test`. Takes a minute or two on two cores.
"""

import argparse
from pathlib import Path

import lightning as L
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import debias

COLUMNS = [
    "age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship", "race",
    "sex", "capital_gain", "capital_loss", "hours", "country", "income",
]  # fmt: skip
LOOKED_AT = ["sex", "race", "age", "education"]


class Income(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def read(root):
    """Both tables, and their inputs as numbers: what is a name is one-hot, the rest has mean 0 and deviation 1."""
    options = {"names": COLUMNS, "skipinitialspace": True, "na_values": "?", "comment": "|"}
    tables = [pd.read_csv(root / "adult.data", **options), pd.read_csv(root / "adult.test", **options)]
    both = pd.concat(tables, ignore_index=True)
    inputs = pd.get_dummies(both.drop(columns=["income", "fnlwgt"]), dtype=float)
    first = inputs[: len(tables[0])]
    inputs = ((inputs - first.mean()) / first.std().clip(lower=1e-6)).clip(-10, 10)
    x = torch.tensor(inputs.to_numpy(), dtype=torch.float32)
    y = torch.tensor(both["income"].str.startswith(">").to_numpy()).long()
    n = len(tables[0])
    return (tables[0], x[:n], y[:n]), (tables[1], x[n:], y[n:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/adult"))
    parser.add_argument("--out", type=Path, default=Path("audit_adult"))
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    L.seed_everything(0)
    (train, x, y), (test, x_test, y_test) = read(options.root)
    model = Income(x.shape[1])
    trainer = L.Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(model, DataLoader(TensorDataset(x, y), 256, shuffle=True))
    loaders = {
        "train": DataLoader(TensorDataset(x, y), 1024),
        "test": DataLoader(TensorDataset(x_test, y_test), 1024),
    }
    report = debias.audit(
        model, loaders, metadata={"train": train[LOOKED_AT], "test": test[LOOKED_AT]}, classes=["<=50K", ">50K"],
        title="Audit of an MLP on Adult",
    )  # fmt: skip
    print(*report.findings, sep="\n")
    print(report.save(options.out)["audit.html"])


if __name__ == "__main__":
    main()
