"""
Segmentation: groups of images, losses of pixels
================================================

Two scanners; the second one is rare and shows structures dark instead of bright. The loss is a plain mean over
pixels: debias follows which pixels are of which image, so a method that knows groups of images needs nothing else.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from debias import GroupDRO, GroupMonitor, tag


def scans(n, rare, seed):
    random = torch.Generator().manual_seed(seed)
    scanner = (torch.rand(n, generator=random) < rare).long()
    place, size = torch.rand(n, 2, generator=random) * 16 + 4, torch.rand(n, generator=random) * 4 + 5
    grid = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"))
    mask = ((grid[None] - place[:, :, None, None]).square().sum(1) < size[:, None, None] ** 2).long()
    x = (
        0.5
        + torch.where(scanner == 0, 0.3, -0.3)[:, None, None] * mask
        + 0.1 * torch.randn(n, 24, 24, generator=random)
    )
    return tag(TensorDataset(x[:, None], mask), scanner=scanner)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(16, 2, 5, padding=2)
        )

    def training_step(self, batch, batch_idx):
        x, mask = batch
        return F.cross_entropy(self.net(x), mask)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def trained(*methods):
    L.seed_everything(0, verbose=False)
    model, monitor = Model(), GroupMonitor("scanner", 2, group_names=["common", "rare"])
    trainer = L.Trainer(
        max_epochs=8, accelerator="cpu", callbacks=[*methods, monitor], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(model, DataLoader(scans(320, 0.05, 0), 16, shuffle=True), DataLoader(scans(60, 0.5, 1), 60))
    return model.eval(), 100 * float(trainer.callback_metrics["val/worst_group_accuracy"])


# %%
# The scan on the left is of the rare scanner.

test = scans(8, 1.0, 2)
image, mask = test[0].sample
figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
axes[0].imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
axes[0].set_title("scan")
axes[1].imshow(mask.numpy(), cmap="gray")
axes[1].set_title("target")
runs = {"ERM": trained(), "GroupDRO": trained(GroupDRO("scanner", 2, step_size=0.1))}
for axis, (name, (model, worst)) in zip(axes[2:], runs.items(), strict=True):
    with torch.no_grad():
        axis.imshow(model.net(image[None]).argmax(1)[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"{name}, worst scanner {worst:.0f} %", fontsize=10)
for axis in axes:
    axis.set_axis_off()
plt.show()
