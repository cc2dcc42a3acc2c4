"""
Write a method
==============

A method is one class with one function. This one counts the worst half of each batch only. debias finds the loss,
follows its rows, and makes it exact on several GPUs where the maths is.
"""

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from debias import Debiaser, GroupMonitor, tag


class WorstHalf(Debiaser):
    """The mean over the worst share of a batch.

    Args:
        share: of the batch that counts.
    """

    def __init__(self, share: float = 0.5):
        super().__init__()
        self.share = share

    def reweigh(self, calls, step):
        (call,) = calls  # num / den are the losses of the rows, and their weights
        losses = call.num / call.den
        kept = losses.topk(max(int(self.share * len(losses)), 1)).values
        if step.logging:
            self.log_value("worst_half_loss", kept.mean().detach(), step)
        return [kept.mean()]


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def draw(n, rare, seed):
    """A tenth of the samples follows another rule."""
    random = torch.Generator().manual_seed(seed)
    other = (torch.rand(n, generator=random) < rare).long()
    x = torch.randn(n, 4, generator=random)
    y = torch.where(other == 0, x[:, 0] > 0, x[:, 1] > 0).long()
    x[:, 3] = other + 0.1 * x[:, 3]
    return tag(TensorDataset(x, y), other=other)


# %%
# It is used like any other method.


def worst(*methods):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=6, accelerator="cpu", callbacks=[*methods, GroupMonitor("other", 2)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(draw(800, 0.1, 0), 32, shuffle=True), DataLoader(draw(400, 0.5, 1), 400))
    return 100 * float(trainer.callback_metrics["val/worst_group_accuracy"])


shares = [0.9, 0.6, 0.4, 0.2]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(shares, [worst(WorstHalf(share)) for share in shares], "o-")
axis.axhline(worst(), color="gray", linestyle="--", label="ERM")
axis.set(xlabel="share of the batch that counts", ylabel="worst group, %", ylim=(0, 100))
axis.legend()
plt.show()
