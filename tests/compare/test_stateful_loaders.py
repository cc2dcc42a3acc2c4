"""A run whose loader keeps its own position goes on in the order that an undisturbed run would have had."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import make_trainer
from debias.compare.keeping import Keeper

stateful = pytest.importorskip("torchdata.stateful_dataloader")
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
ROWS = TensorDataset(torch.arange(12.0).view(12, 1))


def seven():
    return torch.Generator().manual_seed(7)


def torchdata_sampler():
    from torchdata.stateful_dataloader.sampler import RandomSampler as Own

    return Own(ROWS, generator=seven())


LOADERS = {
    "shuffled by the global generator": lambda: stateful.StatefulDataLoader(ROWS, 3, shuffle=True),
    "shuffled by its own": lambda: stateful.StatefulDataLoader(ROWS, 3, shuffle=True, generator=seven()),
    "torchdata's sampler": lambda: stateful.StatefulDataLoader(ROWS, 3, sampler=torchdata_sampler()),
    "workers": lambda: stateful.StatefulDataLoader(ROWS, 3, shuffle=True, num_workers=2),
    "a plain loader": lambda: DataLoader(ROWS, 3, shuffle=True),
}


class Seen(LightningModule):
    """Notes the rows of each step and a draw beside them."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].flatten().int().tolist(), float(torch.rand(()))))
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(pl_module.seen) == 9:  # in the third epoch
            raise KeyboardInterrupt


def run(folder: Path, make, *, seed=0, kill=False, ckpt_path=None, **options):
    torch.manual_seed(seed)
    model = Seen()
    callbacks = [*[Kill()] * kill, Keeper(folder, every=0.0)]
    trainer = make_trainer(callbacks, max_epochs=4, enable_checkpointing=True, **options)
    try:
        trainer.fit(model, make(), ckpt_path=ckpt_path, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert kill
    return model.seen, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_a_run_that_was_killed_sees_the_order_of_an_undisturbed_one(tmp_path, name, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    whole, end = run(tmp_path / "whole", LOADERS[name], **options)
    run(tmp_path / "killed", LOADERS[name], kill=True, **options)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    within = torch.load(last, weights_only=True)["callbacks"]["Keeper"]["within"]
    assert within == (name != "a plain loader")
    seen, parameters = run(tmp_path / "killed", LOADERS[name], seed=99, ckpt_path=last, **options)
    assert seen == whole[-len(seen) :]
    assert len(seen) in (8, 9, 10)  # the last batch, or two, of the second epoch, and two epochs
    assert all(torch.equal(parameters[key], end[key]) for key in end)
