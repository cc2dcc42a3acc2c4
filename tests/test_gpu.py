"""What only a CUDA device can show: no synchronisation in a step, AMP with a gradient scaler, the same numbers as"
" on CPU."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from _support.cases import METHODS, augments, build
from _support.fits import Classifier, deviation, train
from debias import GroupDRO, GroupMonitor, GroupReweighting, tag
from debias.errors import BadRowsError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}
g = torch.Generator().manual_seed(0)
X, Y, PLACE = torch.randn(64, 8, generator=g), torch.arange(64) % 2, torch.randint(-1, 3, (64,), generator=g)


class Silent(Classifier):
    """Logs nothing."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(place=PLACE):
    return DataLoader(tag(TensorDataset(X, Y), place=place), batch_size=16, pin_memory=True)


def fit(method, accelerator, precision="32-true", place=PLACE, extra=(), **options):
    model = Model()
    options = {"max_epochs": 3, "precision": precision, **options}
    trainer = L.Trainer(
        accelerator=accelerator, callbacks=[method, GroupMonitor("place", 3), *extra], **QUIET, **options
    )
    trainer.fit(model, loader(place), loader())
    return model, trainer


@pytest.mark.parametrize("method", [GroupDRO, GroupReweighting])
def test_same_numbers_as_on_cpu(method):
    on_cpu, on_gpu = method("place", 3), method("place", 3)
    cpu, cpu_trainer = fit(on_cpu, "cpu", "64-true")
    gpu, gpu_trainer = fit(on_gpu, "cuda", "64-true")
    for a, b in zip(cpu.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(on_cpu.module.weights, on_gpu.module.weights.cpu(), rtol=1e-9, atol=0)
    for name, value in cpu_trainer.callback_metrics.items():
        torch.testing.assert_close(value.double(), gpu_trainer.callback_metrics[name].double().cpu(), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in METHODS if not augments(name)])
def test_every_method_gives_the_numbers_of_the_cpu(name):
    """Augmentation draws on the device, which has other random numbers."""
    trained = []
    for accelerator in ("cpu", "cuda"):
        model, methods = Classifier(), build(name)
        train(model, methods, accelerator=accelerator, max_epochs=2)
        trained.append({"model": model.cpu().state_dict(), "methods": [m.state_dict() for m in methods]})
    on_cpu, on_gpu = (torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, state) for state in trained)
    assert deviation(on_cpu, on_gpu) < 1e-9


class ForbidSynchronisation(L.Callback):
    """From the second step on, any synchronisation inside a training step is an error."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", [GroupDRO, GroupReweighting])
def test_no_synchronisation_between_logging_steps(method):
    fit(method("place", 3), "cuda", extra=[ForbidSynchronisation()], log_every_n_steps=1000)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_synchronises_between_logging_steps(name):
    train(Silent(), [*build(name), ForbidSynchronisation()], accelerator="cuda", log_every_n_steps=1000, max_epochs=2)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision(precision):
    method = GroupDRO("place", 3, step_size=0.5)
    model, _ = fit(method, "cuda", precision)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert method.module.log_weights.dtype == torch.float64
    assert float(method.module.weights.sum()) == pytest.approx(1)


def test_bad_ids_raise_on_a_logging_step_and_leave_the_context_alive():
    place = PLACE.clone()
    place[20] = 7
    with pytest.raises(BadRowsError, match="`n_groups=3`, but 1 rows"):
        fit(GroupDRO("place", 3), "cuda", place=place, log_every_n_steps=2)
    torch.ones(1, device="cuda").sum().item()


def test_crafted_shifts_are_those_of_the_cpu():
    """Edges and clusters may decide a near tie otherwise, so a few pixels are allowed to differ."""
    pytest.importorskip("kornia")
    from debias.ops.shifts import FAMILIES, crafted_shift, sample_keys

    x = torch.rand(24, 3, 32, 32, generator=g)
    for family in FAMILIES:
        keys = sample_keys(torch.arange(24), family)
        expected, found = crafted_shift(x, family, keys), crafted_shift(x.cuda(), family, keys).cpu()
        assert ((expected - found).abs() > 1e-3).float().mean() < 0.01, family


class Shards(Classifier):
    """Its parameters are DTensors, here of one shard."""

    def configure_model(self):
        for module in (self.backbone, self.head, self):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def sharded(name, accelerator, backend):
    """Parameters after training of a whole module, and of a sharded one."""
    whole, shards = Classifier(), Shards()
    options = {"accelerator": accelerator, "devices": 1}
    train(whole, build(name), **options)
    try:
        train(shards, build(name), strategy=ModelParallelStrategy(1, 1, process_group_backend=backend), **options)
        found = {key: x.full_tensor().cpu() for key, x in shards.state_dict().items()}
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return {key: x.cpu() for key, x in whole.state_dict().items()}, found


@pytest.mark.parametrize("name", ["GroupDRO", "Fishr", "CORAL", "DomainAdversarial"])
def test_a_sharded_module_gives_the_numbers_of_a_whole_one(name):
    whole, found = sharded(name, "cuda", "nccl")
    assert deviation(whole, found) < 1e-10
