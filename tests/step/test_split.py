"""``losses="split"`` and ``"image"``: the step on each part, with BatchNorm, logs, metrics as for the whole batch."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

import _support.quick  # noqa: F401 - before the first Trainer
import debias
from debias import Debiaser, GroupDRO, tag
from debias.errors import SPLIT, DebiasError, UnsupportedStrategyError

N, C = 12, 3
random = torch.Generator().manual_seed(0)
X = torch.randn(2 * N, 3, 8, 8, generator=random).double()
Y = torch.randint(C, (2 * N,), generator=random)
G = torch.tensor([0, 1, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0, *[0, 1] * 6])  # one sample of group 2


class Model(L.LightningModule):
    """BatchNorm in two and in no dimensions, with and without parameters; metrics; logs."""

    def __init__(self, step: Any = None, momentum: float | None = 0.1, backend: str | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, affine=False))
            self.net = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), pooled, nn.Linear(4, C)
            ).double()
        self.run = self.net if backend is None else torch.compile(self.net, backend=backend)
        self.accuracy = MulticlassAccuracy(C, average="micro")
        self.several = MetricCollection([MulticlassAccuracy(C), MulticlassRecall(C)])
        self.step = step or two_views
        self.returned: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, *batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.step is not two_views:
            return
        counts = [(m.update_count, int(m.tp.sum())) for m in (self.accuracy, *self.several.values())]
        self.returned.append((outputs["logits"], counts, self.several.compute()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def two_views(model: Model, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    logits = model.run(x) + model.run(x.flip(-1))
    loss = F.cross_entropy(logits, y)
    model.accuracy(logits, y)
    model.log("accuracy", model.accuracy, on_step=True, on_epoch=True)
    model.several.update(logits, y)
    model.several.compute()
    model.log_dict({"loss": loss, "root": loss.detach().sqrt()})
    return {"loss": loss, "logits": logits}


def fit(losses: str, step: Any = None, **options: Any) -> tuple[Model, dict[str, Tensor]]:
    model = Model(step, **options)
    trainer = L.Trainer(
        callbacks=[GroupDRO("g", 3, step_size=0.5, losses=losses)], accelerator="cpu", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, DataLoader(tag(TensorDataset(X, Y), g=G), batch_size=N))
    return model, {name: value for name, value in trainer.callback_metrics.items() if value.isfinite()}


@pytest.mark.parametrize("losses", ["split", "image"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"backend": "eager"}], ids=str)
def test_batch_norm_has_the_statistics_of_the_whole_batch(losses, options):
    whole, expected = fit("whole", **options)
    parts, logged = fit(losses, **options)
    state = parts.state_dict()
    for name, value in whole.state_dict().items():  # running statistics and their counts, too
        torch.testing.assert_close(state[name], value, msg=name)
    assert logged.keys() == expected.keys() >= {"accuracy_step", "root", "train/loss_by_group/1"}
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value, msg=name)
    torch.testing.assert_close(parts.returned, whole.returned)


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_too(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16

    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.cross_entropy(model.to(dtype).run(x.to(dtype)), y)

    (whole, _), (parts, _) = fit("whole", step), fit("split", step)
    torch.testing.assert_close(parts.net[4].weight, whole.net[4].weight, rtol=0.02, atol=0.004)


def test_layers_that_are_frozen_and_normalisation_in_the_step():
    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        model.net[1].eval()
        return F.cross_entropy(F.batch_norm(model.run(x), None, None, training=True), y)

    (whole, expected), (parts, logged) = fit("whole", step), fit("split", step)
    torch.testing.assert_close(parts.net[4].weight, whole.net[4].weight)
    assert logged["train/loss_by_group/1"] == pytest.approx(float(expected["train/loss_by_group/1"]))


def test_a_step_that_changes_its_batch():
    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.run(x.mul_(2)), y.sub_(1).remainder_(C))

    def unchanging(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.run(2 * x), (y - 1) % C)

    (expected, _), (model, _) = fit("split", unchanging), fit("split", step)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_a_layer_that_is_run_on_parts_only_is_refused():
    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.run(x) if len(x) < N else model.net[4](x[:, 0, 0, :4]), y)

    with pytest.raises(DebiasError, match=r"same BatchNorm layers on every part.*4 channels.*Freeze it"):
        fit("split", step)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_run_again_in_the_backward_pass_is_refused(reentrant):
    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(checkpoint(model.run, x.requires_grad_(), use_reentrant=reentrant), y)

    with pytest.raises(DebiasError, match=r"`torch.utils.checkpoint`.*Leave out checkpointing"):
        fit("split", step)


def test_those_that_messages_name_take_it():
    """Methods that reweigh groups or domains, and no other."""
    assert "Methods that reweigh groups or domains" in SPLIT
    methods = [cls for name in debias.__all__ if isinstance(cls := getattr(debias, name), type)]
    for method in (cls for cls in methods if issubclass(cls, Debiaser) and cls.reweigh is not Debiaser.reweigh):
        taken = inspect.signature(method).parameters
        assert ("losses" in taken) == bool({"group", "domain"} & taken.keys()), method


def synchronised(rank: int) -> None:
    from debias.step.statistics import BatchStatistics

    BatchStatistics(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3))).eval())
    BatchStatistics(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3))))


def test_layers_that_wait_for_other_ranks_are_refused(ranks):
    ranks.raises(UnsupportedStrategyError, r"SyncBatchNorm.*Leave out `sync_batchnorm=True`", synchronised)
