"""
Compare methods over seeds
==========================

``debias compare`` does this with processes, checkpoints and a page. This is the idea in one screen: every method with
every seed, and the baseline that most papers leave out, plain training on balanced batches.
"""

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from debias import GroupBalancedSampler, GroupDRO, GroupMonitor, GroupReweighting, InferGroups, tag


def draw(n, agrees, seed):
    """A faint feature that counts, and a loud one that agrees with the label."""
    random = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=random)
    place = torch.where(torch.rand(n, generator=random) < agrees, y, 1 - y)
    x = torch.randn(n, 6, generator=random)
    x[:, 0] += 1.5 * y
    x[:, 1] += 4 * place
    return tag(TensorDataset(x, y), group=2 * y + place)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


METHODS = {
    "ERM": lambda: [],
    "balanced ERM": lambda: [],
    "GroupReweighting": lambda: [GroupReweighting("group", 4)],
    "GroupDRO": lambda: [GroupDRO("group", 4, step_size=0.1)],
    "errors, then GroupDRO": lambda: [InferGroups("errors", epochs=1), GroupDRO("inferred", 2, step_size=0.1)],
}


def worst(name, seed):
    L.seed_everything(seed, verbose=False)
    train = draw(400, 0.95, seed)
    sampler = GroupBalancedSampler(train.tags["group"], 32, seed=seed) if name == "balanced ERM" else None
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[*METHODS[name](), GroupMonitor("group", 4)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip
    loader = DataLoader(train, 32, sampler=sampler, shuffle=sampler is None)
    trainer.fit(Model(), loader, DataLoader(draw(200, 0.5, 100 + seed), 200))
    return 100 * float(trainer.callback_metrics["val/worst_group_accuracy"])


# %%
# A dot is the mean over seeds, small dots are the seeds.

results = {name: [worst(name, seed) for seed in range(3)] for name in METHODS}
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for i, (name, values) in enumerate(sorted(results.items(), key=lambda item: np.mean(item[1]))):
    axis.plot(values, [i] * len(values), ".", color="gray")
    axis.plot(np.mean(values), i, "o", markersize=9)
    axis.annotate(name, (np.mean(values), i), (0, 8), textcoords="offset points", ha="center", fontsize=9)
axis.set(yticks=[], ylim=(-0.5, len(results)), xlim=(0, 100), xlabel="worst group, validation accuracy, %")
plt.show()
