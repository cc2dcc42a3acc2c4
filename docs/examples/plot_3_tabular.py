"""
Tabular data and fairness
=========================

Who earns more than 50,000 dollars? Read from the Adult data where ``data/adult/adult.data`` is, else from made-up
people. The monitor takes any metric of torchmetrics: here recall, so that the worst group is the one whose high
incomes are missed.
"""

from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryRecall

from debias import GroupMonitor, GroupReweighting, tag

FILE = Path("data/adult/adult.data")
if FILE.exists():
    table = pd.read_csv(FILE, header=None, skipinitialspace=True)[[0, 4, 12, 9, 14]].sample(4000, random_state=0)
    table.columns = ["age", "education", "hours", "sex", "income"]
    female, high = table["sex"].eq("Female").to_numpy(), table["income"].eq(">50K").to_numpy()
    numbers = torch.tensor(table[["age", "education", "hours"]].to_numpy(dtype="float32"))
else:
    random = torch.Generator().manual_seed(0)
    female = (torch.rand(4000, generator=random) < 0.33).numpy()
    numbers = torch.randn(4000, 3, generator=random) - 0.3 * torch.tensor(female)[:, None] * torch.tensor([0.0, 0, 1])
    high = (numbers.sum(1) + torch.randn(4000, generator=random) > 1.2 + torch.tensor(female)).numpy()
sex, y = torch.tensor(female).long(), torch.tensor(high).long()
x = torch.cat([(numbers - numbers.mean(0)) / numbers.std(0), sex[:, None].float()], 1)
people = tag(TensorDataset(x, y.float()), sex=sex, group=2 * y + sex)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x).squeeze(1), y)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def recalls(*methods):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[*methods, GroupMonitor("sex", 2, group_names=["men", "women"], metric=BinaryRecall())],
        enable_model_summary=False,
    )  # fmt: skip
    train, val = torch.utils.data.Subset(people, range(3000)), torch.utils.data.Subset(people, range(3000, 4000))
    trainer.fit(Model(), DataLoader(train, 64, shuffle=True), DataLoader(val, 1000))
    return [100 * float(trainer.callback_metrics[f"val/binary_recall_by_group/{name}"]) for name in ("men", "women")]


# %%
# Groups are income x sex: women with a high income are few, and weigh most.

results = {"ERM": recalls(), "GroupReweighting": recalls(GroupReweighting("group", 4))}
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for i, (name, values) in enumerate(results.items()):
    axis.bar([group + 0.35 * (i - 0.5) for group in range(2)], values, 0.35, label=name)
axis.set(xticks=range(2), xticklabels=["men", "women"], ylabel="recall, %", ylim=(0, 100))
axis.legend()
plt.show()
