"""What a launcher shares between processes is each rank's own: every launcher gives the same bits."""

import pickle
import socket
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from _support.cases import METHODS, build
from _support.fits import Classifier, make_trainer, parameters, problem, same, tagged, val_loader
from _support.forked import context
from debias import GroupMonitor
from debias.ops.own_memory import _tensors, own_memory


def shared(callback):
    return [t for t in _tensors(vars(callback), set()) if t.is_shared() and t.numel()]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_callback_takes_its_tensors_out_of_shared_memory(name):
    callbacks = [*build(name), GroupMonitor("place", 3, train_counts=[3, 2, 1])]
    for callback in callbacks:
        before = [t.clone() for t in _tensors(vars(callback), set())]
        received = pickle.loads(bytes(ForkingPickler.dumps(callback)))  # as a process that "spawn" starts gets it
        assert len(shared(received)) == sum(t.numel() > 0 for t in before)
        own_memory(vars(received))
        after = list(_tensors(vars(received), set()))
        assert not shared(received)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


class Leave(Callback):
    """Leaves the parameters and the method's state in files, one a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        states = [c.state_dict() for c in trainer.callbacks if c is not self]
        torch.save([parameters(pl_module), states], self.folder / f"{trainer.global_rank}.pt")


class Batches(Classifier):
    """Makes its loader in the process that trains, as Lightning does with a data module."""

    def train_dataloader(self):
        rows = range(self.trainer.global_rank, 39, 2)
        data = torch.utils.data.Subset(tagged(problem(39)), list(rows)[:19])
        return torch.utils.data.DataLoader(data, batch_size=8)

    def val_dataloader(self):
        return val_loader()


def fit(rank, name, start_method, folder):
    """Two epochs on two ranks; with a start method this process starts both, else it is one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"start_method": start_method} if start_method else {}
    if start_method:
        import os

        os.environ["MASTER_PORT"] = str(port)
    strategy = DDPStrategy(process_group_backend="gloo", **options)
    callbacks = [*build(name), GroupMonitor("place", 3), Leave(folder)]
    trainer = make_trainer(callbacks, max_epochs=2, devices=2, strategy=strategy, use_distributed_sampler=False)
    trainer.fit(Batches())


def trained(name, start_method, folder, request):
    folder.mkdir()
    if start_method is None:
        request.getfixturevalue("ranks").run(fit, name, None, folder)
    else:
        fit(0, name, start_method, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def agrees(name, tmp_path, request, monkeypatch, methods):
    monkeypatch.setenv("MASTER_PORT", "0")
    expected = trained(name, None, tmp_path / "ddp", request)
    for method in methods:
        found = trained(name, method, tmp_path / method, request)
        assert same(found, expected), (name, method)


def test_spawned_ranks_do_not_write_to_each_others_buffers(tmp_path, request, monkeypatch):
    """A fork server that has imported all hands arguments over as "spawn" does; the slow test below spawns."""
    start = torch.multiprocessing.start_processes
    served = {"start_method": context().get_start_method()}
    monkeypatch.setattr(
        torch.multiprocessing, "start_processes", lambda *args, **options: start(*args, **options | served)
    )
    agrees("GroupDRO", tmp_path, request, monkeypatch, ["spawn"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_launcher_gives_the_same_bits(tmp_path, request, monkeypatch, name):
    agrees(name, tmp_path, request, monkeypatch, ["spawn", "fork"])
