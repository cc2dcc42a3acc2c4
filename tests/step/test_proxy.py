"""A wrapped method runs, copies, pickles and comes off as if it had never been wrapped."""

from __future__ import annotations

import copy
import functools
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.compile import _maybe_unwrap_optimized
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from debias.step.proxy import StepProxy, as_written, attach, detach
from debias.tap.hooks import Hook


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        """What the user wrote."""
        self.calls += 1
        return self.layer.weight.sum() + batch


def double(original, args, kwargs):
    return 2 * original(*args, **kwargs)


def wrapped():
    module = Module()
    return module, attach(module, "training_step", double)


def test_the_original_runs_inside():
    module, proxy = wrapped()
    assert torch.equal(module.training_step(1.0, batch_idx=0), 2 * (module.layer.weight.sum() + 1))
    assert module.calls == 1
    assert module.training_step is proxy


def test_it_looks_like_the_original_to_lightning():
    module, proxy = wrapped()
    assert is_overridden("training_step", module)
    assert proxy.__doc__ == "What the user wrote."
    assert proxy.__wrapped__.__func__ is Module.training_step


def test_a_watched_module_is_exported_as_it_is():
    net = nn.Sequential(nn.Linear(2, 1))
    proxy = attach(net, "forward", lambda original, args, kwargs: original(*args, **kwargs))
    exported = torch.export.export(net, (x := torch.ones(3, 2),)).module()
    assert torch.equal(exported(x), net[0](x))
    assert proxy.__code__ is nn.Sequential.forward.__code__
    with pytest.raises(AttributeError, match="nothing"):
        _ = proxy.nothing


def test_detaching_twice_leaves_nothing():
    module, proxy = wrapped()
    before = set(vars(Module()))
    detach(proxy)
    detach(proxy)
    assert set(vars(module)) == before
    assert module.training_step.__func__ is Module.training_step


def test_an_instance_attribute_that_was_there_comes_back():
    module = Module()
    own = module.training_step = copy.copy(module.training_step)
    detach(attach(module, "training_step", double))
    assert vars(module)["training_step"] is own


def test_a_later_wrapper_of_someone_else_stays():
    module, proxy = wrapped()
    module.training_step = other = lambda *args: None
    detach(proxy)
    assert module.training_step is other
    module.training_step = proxy  # who wrapped it puts back what was there
    assert torch.equal(module.training_step(1.0, 0), module.layer.weight.sum() + 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_carry_the_plain_method_bound_to_themselves(duplicate):
    module, _ = wrapped()
    twin = duplicate(module)
    with torch.no_grad():
        twin.layer.weight.fill_(3)
    assert torch.equal(twin.training_step(0.0, 0), twin.layer.weight.sum())
    assert (twin.calls, module.calls) == (1, 0)
    assert twin.training_step.__self__ is twin
    assert not any(isinstance(value, StepProxy) for value in vars(twin).values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_hooks_are_inert(duplicate):
    layer, seen = nn.Linear(2, 1), []
    layer.register_forward_hook(Hook(lambda module, args, output: seen.append(module)))
    twin = duplicate(layer)
    layer(torch.ones(1, 2))
    twin(torch.ones(1, 2))
    assert seen == [layer]


class Decorated(Module):
    training_step = torch.compile(Module.training_step, backend="eager")


@pytest.mark.parametrize("made", [Module, Decorated, lambda: torch.compile(Module(), backend="eager")])
def test_a_compiled_step_may_run_as_it_is_written(made):
    torch.compiler.reset()
    module = _maybe_unwrap_optimized(made())
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(as_written(module.training_step)(1.0, batch_idx=0), module.layer.weight.sum() + 1)
    assert module.calls == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_what_is_put_around_a_compiled_step_runs_too():
    compiled = torch.compile(Module().training_step, backend="eager")
    around = functools.wraps(compiled)(lambda *args, **kwargs: compiled(*args, **kwargs))
    assert as_written(around) is around
