"""Methods under the ways people train: accumulation, bf16, compilation, activation checkpointing, tuners, YAML, manual
optimisation; odd batches; and no waiting for the device."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.cli import LightningCLI
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from _support.cases import METHODS, arguments, build, has_groups, names_where, takes
from _support.fits import (
    Classifier,
    Manual,
    deviation,
    loader,
    make_trainer,
    parameters,
    problem,
    same,
    tagged,
    train,
    val_loader,
)
from debias import GroupMonitor
from debias.errors import BadRowsError, UnsupportedStrategyError
from debias.ops import arguments as checks
from debias.ops.groups import GroupState


@functools.cache
def plainly(name, **options):
    """What many tests compare with: :func:`trained`, done once."""
    return trained(name, bare=name is None, **options)


def trained(name, module=None, *, bare=False, extra=(), **options):
    """Parameters and method state after training."""
    model, callbacks = Classifier() if module is None else module, build(name)
    train(model, [*callbacks, *extra], bare=bare, **({"max_epochs": 2} | options))
    return {"parameters": parameters(model), "methods": [callback.state_dict() for callback in callbacks]}


# ------------------------------------------------------------ one epoch, accumulation


def test_a_method_changes_training(method):
    """Unless it does, none of the comparisons of this folder means anything."""
    assert not same(plainly(method)["parameters"], plainly(None)["parameters"])


def test_a_monitor_changes_nothing():
    assert same(trained(None, extra=[GroupMonitor("place", 3)]), plainly(None))


def test_accumulation_updates_state_per_micro_batch(method):
    """The parameters move once per two batches, the method sees every batch."""
    once, accumulated = plainly(method), trained(method, accumulate_grad_batches=2)
    assert all(torch.isfinite(p).all() for p in accumulated["parameters"].values())
    assert not same(once, accumulated)


# ------------------------------------------------------------ precision


def test_bf16(method):
    model, callbacks = Classifier().float(), build(method)
    dataset = tagged(problem(39, dtype=torch.float32))
    batches = DataLoader(dataset, batch_size=16)
    make_trainer([*callbacks, GroupMonitor("place", 3)], precision="bf16-mixed").fit(model, batches, batches)
    full, references = Classifier().float(), build(method)
    make_trainer([*references, GroupMonitor("place", 3)]).fit(full, batches, batches)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for callback, reference in zip(callbacks, references, strict=True):
        for key, value in (callback.module.state_dict() if callback.module is not None else {}).items():
            assert value.dtype == reference.module.state_dict()[key].dtype
    assert 0 < deviation(parameters(full), parameters(model)) < 0.1


# ------------------------------------------------------------ compilation


# Dynamo looks at the gradient of every tensor it meets, also of those that have none.
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Quiet(Classifier):
    """Logs nothing: Dynamo spends half of its time on Lightning's `log`."""

    def log(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("what", ["backbone", "module"])
@pytest.mark.usefixtures("dynamo")
@looks_at_grad
def test_compiled_is_eager(method, what):
    """The backends keep Dynamo's tracing (and autograd's), without a C++ compiler."""
    model = Quiet()
    if what == "module":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.backbone.compile(backend="aot_eager")
    # Of one size, and without validation: Dynamo traces a network again for each.
    short = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0}  # the first one runs as it is written
    assert deviation(plainly(method, **short), trained(method, compiled, **short)) < 1e-12


@pytest.mark.usefixtures("dynamo")
@looks_at_grad
def test_a_compiled_module_that_logs_is_eager():
    compiled = torch.compile(Classifier(), backend="eager")
    assert deviation(trained("GroupDRO", max_epochs=1), trained("GroupDRO", compiled, max_epochs=1)) < 1e-12


@pytest.mark.usefixtures("dynamo")
@looks_at_grad
def test_a_compiled_network_stays_one_graph():
    model = Classifier()
    model.backbone.compile(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    train(model, build("GroupDRO"), max_epochs=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


# ------------------------------------------------------------ activation checkpoints


class Checkpointed(Classifier):
    def forward(self, x):
        return self.head(checkpoint(self.backbone, x, use_reentrant=False))


def test_activation_checkpointing_changes_nothing(method):
    assert same(plainly(method), trained(method, Checkpointed()))


# ------------------------------------------------------------ tuners


class AtStart(Callback):
    """What a method's state and the parameters are when training itself starts."""

    def __init__(self, methods):
        self.methods = methods

    def on_train_start(self, trainer, pl_module):
        self.seen = copy.deepcopy([callback.state_dict() for callback in self.methods]), parameters(pl_module)


def test_learning_rate_finder(method, tmp_path):
    """Methods are inert while the finder runs and at work afterwards, exactly as without it."""
    callbacks = build(method)
    start, finder = AtStart(callbacks), LearningRateFinder(num_training_steps=5, update_attr=False)
    model = Classifier()
    before = copy.deepcopy([callback.state_dict() for callback in build(method)]), parameters(model)
    train(model, [*callbacks, finder, start], max_epochs=2, default_root_dir=tmp_path)
    plain = plainly(method)
    assert finder.optimal_lr is not None
    assert same(start.seen[1], before[1])
    assert same(plain["parameters"], parameters(model))
    assert same(plain["methods"], [callback.state_dict() for callback in callbacks])


class Data(L.LightningDataModule):
    batch_size = 2

    def train_dataloader(self):
        return DataLoader(tagged(problem(32)), batch_size=self.batch_size)

    def val_dataloader(self):
        return val_loader()


def test_batch_size_finder(method, tmp_path, monkeypatch):
    # Looking for garbage between its trials takes ten times as long as the rest.
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)
    callbacks, data, model = build(method), Data(), Classifier()
    start = AtStart(callbacks)
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    make_trainer([*callbacks, finder, start], default_root_dir=tmp_path).fit(model, datamodule=data)
    assert data.batch_size > Data.batch_size
    assert same(start.seen[1], parameters(Classifier()))
    other, others, fixed = Classifier(), build(method), Data()
    fixed.batch_size = data.batch_size
    make_trainer(others).fit(other, datamodule=fixed)
    assert same(parameters(model), parameters(other))
    assert same([c.state_dict() for c in callbacks], [c.state_dict() for c in others])


# ------------------------------------------------------------ YAML


def test_yaml_builds_the_same_method(method, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    cls = METHODS[method]
    entry = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments(method)}
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "callbacks": [entry]}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"trainer": trainer}))  # JSON is YAML
    cli = LightningCLI(
        Classifier, run=False, args=["--config", str(path)], save_config_callback=None, seed_everything_default=False
    )
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, cls)]
    assert same(plainly(method)["parameters"], parameters_of_run(callback))


def parameters_of_run(callback):
    model = Classifier()
    train(model, [callback], max_epochs=2)
    return parameters(model)


# ------------------------------------------------------------ manual optimisation


def test_manual_optimisation(method):
    """Reweighing and augmentation work as under automatic optimisation; what adds to the loss refuses."""
    (callback,) = build(method)
    if callback.adds_to_loss:
        with pytest.raises(
            UnsupportedStrategyError, match=r"automatic optimisation.*`automatic_optimization` is False"
        ):
            train(Manual(), [callback])
    else:
        assert same(plainly(method), trained(method, Manual()))


# ------------------------------------------------------------ odd batches


@pytest.mark.parametrize("place", [0, -1], ids=["one group only", "all unlabelled"])
def test_absent_groups(method, place):
    """Training goes on, with finite numbers, when batches hold one group only or no labelled sample at all."""
    model, callbacks = Classifier(), build(method)
    group = torch.full((39,), place)
    group[:3] = torch.arange(3)  # each occurs somewhere, so that counts exist
    make_trainer(callbacks, max_epochs=2).fit(model, loader(place=group), val_loader())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    states = [c.module.state_dict() for c in callbacks if c.module is not None]
    assert all(torch.isfinite(value).all() for state in states for value in state.values())


GROUPED = [name for name in METHODS if has_groups(name)]
REWEIGHING = [name for name in names_where(lambda c: hasattr(c.module, "reweigh")) if name in GROUPED]
COUNTING = [name for name in names_where(lambda c: isinstance(c.module, GroupState)) if name in GROUPED]


class Before(Callback):
    """Parameters and state before the last batch that started."""

    def __init__(self, methods):
        self.methods = methods

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = parameters(pl_module), copy.deepcopy([callback.state_dict() for callback in self.methods])


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("bad", ["id", "loss"])
def test_bad_rows_raise_before_anything_has_changed(name, bad):
    callbacks, model = build(name), Classifier()
    before = Before(callbacks)
    batches = loader()
    if bad == "id":
        batches.dataset.tags["place"][18] = 3
    else:
        batches.dataset.dataset.tensors[0][18] = torch.nan
    match = {"id": r"below `n_(groups|domains)=3`, but 1 rows", "loss": "finite losses, but 1 rows"}[bad]
    with pytest.raises(BadRowsError, match=match):
        make_trainer([before, *callbacks]).fit(model, batches, val_loader())
    assert same(before.seen[0], parameters(model))
    assert same(before.seen[1], [callback.state_dict() for callback in callbacks])


# ------------------------------------------------------------ host syncs

_SYNCS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "_unique2", "unique_dim",
    "item", "unique_consecutive", "histc",
}  # fmt: skip


class Syncs(TorchDispatchMode):
    """Counts the operations that wait for a CUDA device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in (args[1] or ())) if name in (
            "index", "index_put", "index_put_"
        ) else False  # fmt: skip
        self.count += name in _SYNCS or masks
        return func(*args, **(kwargs or {}))


class CountSyncs(Callback):
    """Counts during whole training steps, from batch start to batch end, and host copies."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, *_):
        self.stack = contextlib.ExitStack()
        self.mode = self.stack.enter_context(Syncs())
        for name in ("tolist", "numpy", "cpu"):
            plain = getattr(torch.Tensor, name)

            def counted(tensor, *args, plain=plain, mode=self.mode, **kwargs):
                mode.count += 1
                return plain(tensor, *args, **kwargs)

            self.stack.enter_context(mock.patch.object(torch.Tensor, name, counted))

    def on_train_batch_end(self, *_):
        self.stack.close()
        self.counts.append(self.mode.count)


def syncs_of(callbacks, *, bare=False):
    count = CountSyncs()
    train(Classifier(), [*callbacks, count], bare=bare, max_epochs=2, log_every_n_steps=1000)
    return count.counts


@functools.cache
def plain_syncs():
    return syncs_of([], bare=True)


def test_no_host_sync_between_logging_steps(method):
    """On CPU a bad row raises at once, which reads a counter; the branch of other devices is put in its place."""
    with mock.patch.object(checks, "on_host", return_value=False):
        ours, plain = syncs_of(build(method)), plain_syncs()
    assert ours[1:] == plain[1:]
    # Whether the head makes the logits from its input is looked at once, in the first step.
    assert ours[0] - plain[0] <= int(METHODS[method].needs_features)


@pytest.mark.parametrize(
    "sync", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.tolist(), lambda x: x.cpu()]
)
def test_a_host_sync_is_counted(sync):
    class Waits(METHODS["LogitVariance"]):
        def penalise(self, call, step):
            sync(call.logits.detach())
            return super().penalise(call, step)

    assert syncs_of([Waits()]) == [count + 1 for count in plain_syncs()]


@pytest.mark.parametrize("name", REWEIGHING)
def test_the_state_machine_never_reads_a_cuda_tensor(name):
    """Fake CUDA tensors hold no data, so whatever would wait for the device raises here."""
    module = build(name, **({"group_counts": [3, 2, 1]} if "group_counts" in takes(name) else {}))[0].module
    with FakeTensorMode(allow_non_fake_inputs=True):
        for key, buffer in list(module._buffers.items()):
            module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        inputs = {
            "losses": torch.empty(7, device="cuda", requires_grad=True),
            "groups": torch.empty(7, dtype=torch.long, device="cuda"),
            "features": torch.empty(7, 4, device="cuda", requires_grad=True),
            "logits": torch.empty(7, 2, device="cuda", requires_grad=True),
            "targets": torch.empty(7, dtype=torch.long, device="cuda"),
            "domains": torch.empty(7, dtype=torch.long, device="cuda"),
        }
        loss = module(*(inputs[key] for key in inspect.signature(module.forward).parameters if key in inputs))
        assert loss.shape == ()
        assert loss.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            module.raise_if_bad()


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("end", ["logging step", "epoch end"])
def test_off_the_cpu_bad_rows_raise_at_the_next_logging_step(name, end):
    callbacks, model = build(name), Classifier()
    before = Before(callbacks)
    batches = loader()
    batches.dataset.tags["place"][1] = 3
    every = 2 if end == "logging step" else 1000
    with mock.patch.object(checks, "on_host", return_value=False), pytest.raises(BadRowsError, match="1 rows"):
        make_trainer([before, *callbacks], log_every_n_steps=every).fit(model, batches, val_loader())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert same(before.seen[0], parameters(model)) == (end == "logging step")


# ------------------------------------------------------------ found features


@pytest.mark.parametrize("head", [None, "head"], ids=["found", "named"])
@pytest.mark.parametrize("compiled", [None, "backbone", "head"])
@pytest.mark.usefixtures("dynamo")
@looks_at_grad
def test_features_are_those_of_the_same_step(head, compiled):
    """In every step the head's weights times the features are the logits of that step."""
    (callback,) = build("FeatureNorm", head=head)
    model = Classifier()
    if compiled:
        getattr(model, compiled).compile(backend="aot_eager")
    train(model, [callback], max_epochs=2)
    assert len(callback.mismatch) == 6
    assert max(callback.mismatch) < 1e-12
