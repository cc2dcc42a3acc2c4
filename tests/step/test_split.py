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
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall
from torchmetrics.wrappers import MinMaxMetric, Running

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


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "log_every_n_steps": 1,
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
}


def fit(losses: str, step: Any = None, model: Any = None, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model = model or Model(step, **options)
    trainer = L.Trainer(callbacks=[GroupDRO("g", 3, step_size=0.5, losses=losses)], max_epochs=2, **QUIET)
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


class Keeping(Model):
    """A step that keeps something of each batch: in buffers, metrics, numbers, lists."""

    def __init__(self, step: Any = None) -> None:
        super().__init__(step or keeping)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, C))
            self.teacher = nn.Linear(4, C).requires_grad_(False)
        self.net = nn.Sequential(
            *self.net[:2], nn.InstanceNorm2d(4, track_running_stats=True), *self.net[2:4], spectral
        )
        self.net.double()
        self.register_buffer("center", torch.zeros(C).double())
        self.last, self.sizes, self.count, self.by_number = torch.zeros(()), [], 0, {}
        self.smallest, self.lately = MinMaxMetric(MulticlassAccuracy(C)), Running(MeanMetric(), window=3)


def keeping(model: Keeping, x: Tensor, y: Tensor) -> Tensor:
    logits = model.net(x)
    loss = F.cross_entropy(logits - model.center, y)
    model.center.lerp_(logits.detach().mean(0), 0.5)
    model.count += 1
    model.sizes.append(len(x))
    model.by_number.setdefault(model.count, []).append(len(x))
    model.last = logits.detach()
    model.log_dict(model.smallest(logits, y))
    model.lately(loss.detach())
    return loss


@pytest.mark.parametrize("losses", ["split", "image"])
def test_what_a_step_keeps_is_that_of_the_whole_batch_and_parts_see_what_was_kept_before(losses):
    (whole, expected), (parts, logged) = fit("whole", model=Keeping()), fit(losses, model=Keeping())
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())
    torch.testing.assert_close(logged, expected)
    names = ("last", "sizes", "count", "by_number")
    torch.testing.assert_close([getattr(parts, name) for name in names], [getattr(whole, name) for name in names])
    assert parts.smallest.compute() == whole.smallest.compute()
    assert parts.lately.compute() == pytest.approx(whole.lately.compute())


def test_what_a_step_keeps_is_put_back_when_a_part_raises():
    def step(model: Keeping, x: Tensor, y: Tensor) -> Tensor:
        loss = keeping(model, x, y)
        if len(x) < N:
            raise KeyboardInterrupt
        return loss

    model = Keeping(step)
    with pytest.raises(SystemExit):
        fit("split", model=model)
    assert (model.count, model.sizes, model.net[1].num_batches_tracked) == (1, [N], 1)
    assert "log" not in vars(model)


def test_hooks_that_a_network_installs_in_its_first_call_are_installed_once():
    def step(model: Any, x: Tensor, y: Tensor) -> Tensor:
        if not getattr(model, "installed", False):
            model.net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
            model.installed = True
        return F.cross_entropy(model.net(x), y)

    (whole, _), (parts, _) = fit("whole", model=Model(step)), fit("split", model=Model(step))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())
    assert len(parts.net[0]._forward_hooks) == 1


def test_a_lazy_network():
    def lazy() -> Model:
        model = Model(lambda model, x, y: F.cross_entropy(model.net(x), y))
        model.net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), *model.net[2:]).double()
        return model

    (whole, _), (parts, _) = fit("whole", model=lazy()), fit("split", model=lazy())
    assert parts.net[1].num_batches_tracked == whole.net[1].num_batches_tracked == 4


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("how", ["in place", "by data", "new data"])
def test_a_step_that_changes_parameters_is_refused(how, frozen):
    def step(model: Keeping, x: Tensor, y: Tensor) -> Tensor:
        weight = model.teacher.weight
        with torch.no_grad():
            if how == "new data":
                weight.data = 0.99 * weight.data
            else:
                (weight if how == "in place" else weight.data).mul_(0.99)
        return F.cross_entropy(model.net(x), y)

    model = Keeping(step)
    model.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
    model.teacher.requires_grad_(not frozen)
    with pytest.raises(UnsupportedStrategyError, match=r"changed `teacher.weight`.*`on_train_batch_end`"):
        fit("split", model=model)


def test_a_step_that_freezes_a_layer():
    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        model.net[0].requires_grad_(False)
        return F.cross_entropy(model.net(x), y)

    (whole, _), (parts, _) = fit("whole", model=Model(step)), fit("split", model=Model(step))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def test_beyond_the_cpu_values_are_read_where_that_is_allowed():
    from debias.step.kept import Kept
    from debias.step.statistics import BatchStatistics

    layer = nn.Linear(2, 2, device="meta").requires_grad_(False)  # which has no values that could be read
    layer.register_buffer("running_var", torch.ones(2, device="meta"))
    with BatchStatistics(layer).of_whole():
        Kept(layer, reads=False).check_parameters("split")
    with pytest.raises((NotImplementedError, RuntimeError)):
        Kept(layer, reads=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", ["scripted", "own"])
def test_layers_with_statistics_of_their_own_are_refused(kind):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(()).double())

        def forward(self, x: Tensor) -> Tensor:
            self.running_var.lerp_(x.detach().var(), 0.1)
            return x / x.std()

    model = Model(lambda model, x, y: F.cross_entropy(model.run(x), y))
    model.run = torch.jit.script(model.net) if kind == "scripted" else nn.Sequential(model.net, Own())
    with pytest.raises(UnsupportedStrategyError, match=r"statistics of the batch to be torch's.*Freeze it"):
        fit("split", model=model)


def test_a_step_that_changes_a_list_of_samples():
    def change(model: Model, images: Any, targets: Any) -> Tensor:
        for target in targets:
            target["label"] += 1
        return F.cross_entropy(model.net(torch.stack(images)), torch.stack([t["label"] % C for t in targets]))

    def collate(items: Any) -> Any:
        tags = torch.utils.data.default_collate([group for *_, group in items])
        return [x for x, *_ in items], [{"label": y.clone()} for _, y, _ in items], tags

    def run(losses: str) -> dict[str, Tensor]:
        model = Model(lambda model, images, targets, _: change(model, images, targets))
        trainer = L.Trainer(callbacks=[GroupDRO(2, 3, losses=losses, name="g")], max_epochs=1, **QUIET)
        trainer.fit(model, DataLoader(TensorDataset(X, Y, G), batch_size=N, collate_fn=collate))
        return model.state_dict()

    torch.testing.assert_close(run("split"), run("image"))
    torch.testing.assert_close(run("split"), run("whole"))


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_too(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16

    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.cross_entropy(model.run(x.to(dtype)), y)

    (whole, _), (parts, _) = (fit(losses, model=Model(step).to(dtype)) for losses in ("whole", "split"))
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

    with pytest.raises(DebiasError, match=r"same BatchNorm layers on every part.*4 channels.*more often.*Freeze it"):
        fit("split", step)


def test_a_layer_that_is_run_on_chunks_of_the_whole_batch_is_refused():
    def step(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.cat([model.run(chunk) for chunk in x.split(10)]), y)

    with pytest.raises(DebiasError, match=r"same BatchNorm layers on every part.*4 channels.*less often"):
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


def apart(rank: int) -> tuple[float, int]:
    """Rank 1 has more parts than rank 0; a metric asks the other ranks in the step."""
    from debias.step.kept import Kept
    from debias.step.split import _apart

    module = L.LightningModule()
    module.mean = MeanMetric(dist_sync_on_step=True)
    kept = Kept(module, reads=True)
    module.mean(torch.tensor(float(rank)))
    for _ in range(1 + rank):
        with kept.put_back(), _apart(module):
            module.mean(torch.tensor(10.0))
            module.mean.compute()
    return float(module.mean.compute()), module.mean.update_count


def test_metrics_do_not_wait_for_ranks_with_fewer_parts(ranks):
    assert ranks.run(apart) == [(0.5, 1), (0.5, 1)]
