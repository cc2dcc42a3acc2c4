"""
Birds on land and on water
==========================

Most birds are where they belong, so the background tells the label. ``GroupDRO`` trains for the group that is not.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from debias import GroupDRO, GroupMonitor, tag

GROUPS = ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]


def draw(n, belongs, seed):
    """Images of 16 pixels: a bird is a bright bar, lying or upright; the background is green or blue."""
    random = torch.Generator().manual_seed(seed)
    bird = torch.randint(2, (n,), generator=random)
    water = torch.where(torch.rand(n, generator=random) < belongs, bird, 1 - bird)
    x = 0.6 * torch.rand(n, 3, 16, 16, generator=random)
    x[torch.arange(n), 1 + water] += 0.4
    x[bird == 0, :, 3:13, 7:9] += 0.2
    x[bird == 1, :, 7:9, 3:13] += 0.2
    return tag(TensorDataset(x, bird), group=2 * bird + water)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, 2), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(256, 2),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


# %%
# The module knows nothing of groups. One callback measures, the other changes the training.


def accuracies(*methods):
    L.seed_everything(0, verbose=False)
    monitor = GroupMonitor("group", 4, group_names=GROUPS)
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[*methods, monitor], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip
    train, val = DataLoader(draw(600, 0.95, 0), 32, shuffle=True), DataLoader(draw(400, 0.5, 1), 200)
    trainer.fit(Model(), train, val)
    return [100 * float(trainer.callback_metrics[f"val/accuracy_by_group/{name}"]) for name in GROUPS]


results = {"ERM": accuracies(), "GroupDRO": accuracies(GroupDRO("group", 4, step_size=0.3))}

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 2), layout="constrained")
sample = draw(12, 0.5, 2)
rows = [torch.cat([sample[i].sample[0] for i in range(row, 12, 3)], 2) for row in range(3)]
left.imshow(torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1).numpy())
left.set_axis_off()
for i, (name, values) in enumerate(results.items()):
    right.barh([g + 0.35 * (0.5 - i) for g in range(4)], values, 0.35, label=name)
right.set(yticks=range(4), yticklabels=GROUPS, xlim=(0, 100), xlabel="validation accuracy, %")
right.legend(loc="lower left")
plt.show()
