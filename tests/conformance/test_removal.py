"""After a fit, an exception or Ctrl-C nothing of a method is left; copies made meanwhile are plain modules."""

from __future__ import annotations

import copy
import functools
import pickle
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from _support.cases import build
from _support.fits import PACKAGES, Classifier, loader, make_trainer, parameters, same, train, val_loader
from debias import GroupMonitor
from debias.step.proxy import StepProxy
from debias.tap.hooks import Hook


class Outside:
    """Everything a run could leave behind, as it is now."""

    def __init__(self, module, strategy=None, *loaders):
        self.module = module
        self.loaders = loaders
        self.before = self.look(strategy)

    def look(self, strategy):
        module = self.module
        # Lightning itself leaves `_hparams` on a module that has been trained, and sets its own flags.
        own = {k: id(v) if callable(v) else None for k, v in vars(module).items() if k != "_hparams"}
        hooks = [
            list(hooks)
            for m in module.modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        strategy_vars = [k for k, v in vars(strategy).items() if isinstance(v, StepProxy)] if strategy else []
        steps = [module.training_step, module.validation_step, module._on_before_batch_transfer]
        return own, hooks, strategy_vars, steps, [ld.collate_fn for ld in self.loaders], list(module.state_dict())

    def assert_same(self, strategy):
        for before, after in zip(self.before, self.look(strategy), strict=True):
            assert before == after
        assert not any(isinstance(v, StepProxy) for v in vars(self.module).values())


class Interrupt(L.Callback):
    """Raises in the middle of training."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise self.error


def collated(items):
    return torch.utils.data.default_collate(items)


@pytest.fixture
def loaders():
    train, val = loader(), val_loader()
    train.collate_fn = val.collate_fn = collated
    return train, val


@pytest.mark.parametrize("package", PACKAGES)
def test_after_fit_nothing_is_left(method, package, loaders):
    lightning, module = PACKAGES[package]
    model = module()
    model.training_step = model.training_step  # as torch.compile does: an instance attribute that was there before
    outside = Outside(model, None, *loaders)
    trainer = make_trainer([*build(method), GroupMonitor("place", 3)], package=lightning, max_epochs=2)
    trainer.fit(model, *loaders)
    outside.assert_same(trainer.strategy)
    assert not same(parameters(model), parameters(module()))


@pytest.mark.parametrize(("error", "surfaces"), [(ValueError, ValueError), (KeyboardInterrupt, SystemExit)])
def test_after_an_exception_nothing_is_left(method, loaders, error, surfaces):
    model = Classifier()
    outside = Outside(model, None, *loaders)
    trainer = make_trainer([*build(method), GroupMonitor("place", 3), Interrupt(error())])
    with pytest.raises(surfaces):
        trainer.fit(model, *loaders)
    outside.assert_same(trainer.strategy)


def test_the_step_is_wrapped_while_training(method):
    """Without this, the tests above could not fail."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            hooks = [h for m in pl_module.modules() for h in m._forward_hooks.values() if isinstance(h, Hook)]
            seen.append((isinstance(pl_module.training_step, StepProxy), bool(hooks)))

    train(Classifier(), [*build(method), GroupMonitor("place", 3), Look()])
    assert seen == [(True, True)] * 3


def plainly_trained(module, **options):
    train(module, bare=True, **options)
    return parameters(module)


def copies(module):
    return {"deepcopy": copy.deepcopy(module), "pickle": pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_copies_of_the_module_are_plain_modules(method, when):
    made = {}

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if when == "during" and batch_idx == 1:
                made.update(copies(pl_module))

    model = Classifier()
    callbacks = build(method)
    if when == "before":
        made.update(copies(model))
    train(model, [*callbacks, Copy()])
    if when == "after":
        made.update(copies(model))
    plain = Classifier()
    plain.load_state_dict(made["pickle"].state_dict())
    expected = plainly_trained(plain)
    for twin in made.values():
        assert same(plainly_trained(twin), expected)
        assert not [v for v in vars(twin).values() if isinstance(v, StepProxy)]
    assert len(made) == 2


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_copies_of_the_method_work_as_it_does(method, when):
    made = {}

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if when == "during" and batch_idx == 1:
                made.update(copies(callbacks[0]) | {"state": copy.deepcopy(callbacks[0].state_dict())})

    callbacks = build(method)
    if when == "before":
        made.update(copies(callbacks[0]) | {"state": copy.deepcopy(callbacks[0].state_dict())})
    original = Classifier()
    train(original, [*callbacks, Copy()])
    if when == "after":
        made.update(copies(callbacks[0]) | {"state": copy.deepcopy(callbacks[0].state_dict())})
    state = made.pop("state")
    results = []
    for twin in made.values():
        assert twin.engine is None
        assert same(twin.state_dict(), state)
        model = Classifier()
        train(model, [twin])
        results.append(parameters(model))
    assert same(*results)
    if when == "before":
        assert same(results[0], parameters(original))


def averaged(averaging, name):
    model = Classifier()
    last = StochasticWeightAveraging(0.05, swa_epoch_start=1) if averaging == "swa" else WeightAveraging()
    train(model, [*build(name), last], max_epochs=3, bare=name is None)
    return model


@functools.cache
def plainly_averaged(averaging):
    return parameters(averaged(averaging, None))


@pytest.mark.parametrize("averaging", ["swa", "ema"])
def test_weight_averaging(method, averaging):
    """The averaged model is a copy made while the method is in place."""
    model = averaged(averaging, method)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not [v for v in vars(model).values() if isinstance(v, StepProxy)]
    assert not same(parameters(model), plainly_averaged(averaging))
    assert same(plainly_trained(copy.deepcopy(model)), plainly_trained(model))


def test_fitting_twice(method):
    """A second fit with the same objects starts where the first ended, with the method in place.

    Two epochs each, as a method may leave its first one as it is.
    """
    model, plain, callbacks = Classifier(), Classifier(), build(method)
    train(model, callbacks, max_epochs=2)
    plain.load_state_dict(model.state_dict())
    outside = Outside(model)
    trainer = train(model, callbacks, max_epochs=2)
    outside.assert_same(trainer.strategy)
    assert not same(parameters(model), plainly_trained(plain, max_epochs=2))


def test_validate_alone(method):
    model = Classifier()
    outside = Outside(model)
    monitor = GroupMonitor("place", 3)
    trainer = make_trainer([*build(method), monitor])
    metrics = trainer.validate(model, val_loader(), verbose=False)[0]
    plain = make_trainer([GroupMonitor("place", 3)]).validate(Classifier(), val_loader(), verbose=False)[0]
    assert metrics == pytest.approx(plain, nan_ok=True, abs=0)
    assert "val/worst_group_accuracy" in metrics
    outside.assert_same(trainer.strategy)


def test_names_hold_no_reference_to_a_run(method):
    """A finished method keeps neither Trainer nor module alive, and its key is class and name alone."""
    callback = build(method)[0]
    train(Classifier(), [callback])
    assert callback.engine is None
    assert re.fullmatch(rf"{method}(\(\w+\))?", callback.state_key)
