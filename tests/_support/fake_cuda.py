"""Training and evaluation steps on CUDA tensors that hold no data, on a machine without CUDA.

Where tensors of two devices meet, and where anything looks at a value or makes a result whose size depends on values,
PyTorch's fake tensors raise. Copies between devices that the host waits for are noted here. The first batch is a real
one on the CPU, as the first step may look at values. Backward passes need a device and are left out.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from _support.fits import make_trainer, val_loader
from debias.step.random import StepRandom
from debias.tap.rows import RowTracker

CUDA = torch.device("cuda", 0)


def can_fake() -> bool:
    """Whether this version of torch fakes copies of real tensors to CUDA without a driver; 2.4 does not."""
    real = torch.zeros(1)
    with FakeTensorMode(allow_non_fake_inputs=True), WaitingCopies():
        try:
            return real.to(CUDA, non_blocking=True).device == CUDA
        except RuntimeError:
            return False


class _Generator(torch.Generator):
    """One of the CPU, which says that it is not: those of a GPU cannot be made without it."""

    device = CUDA


_real = StepRandom.generator


def _generator(self: StepRandom, device: torch.device, place: str = "", *, shared: bool = False) -> torch.Generator:
    made = _real(self, torch.device("cpu"), place, shared=shared)
    return made if device.type == "cpu" else _Generator().manual_seed(made.initial_seed())


_plain_backward, _plain_grad = torch.Tensor.backward, torch.autograd.grad


def _backward(self: Tensor, *args: Any, **options: Any) -> None:
    if self.device != CUDA:
        _plain_backward(self, *args, **options)


def _grad(outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
    if outputs.device != CUDA:
        return _plain_grad(outputs, inputs, *args, **options)
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    edges = [torch.autograd.graph.get_gradient_edge(x) if isinstance(x, Tensor) else x for x in inputs]
    of = [edge.node._input_metadata[edge.output_nr] for edge in edges]
    return tuple(torch.empty(tuple(x.shape), dtype=x.dtype, device=CUDA) for x in of)


class WaitingCopies(TorchDispatchMode):
    """Notes where copies between devices are made that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            waits = source.device.type != result.device.type and not kwargs.get("non_blocking", args[2:3] == (True,))
            if waits:
                lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "/debias/" in f.filename]
                self.found.append(f"{source.device} to {result.device} at {lines[-1] if lines else 'the test'}")
        return result


def _fake(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device=CUDA)
    if isinstance(x, dict):
        return {key: _fake(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_fake(value) for value in x)
    return x


def _held(value: Any) -> list[Any]:
    """What lists hold, and lists of lists, as monitors have of their metrics by loader."""
    return [inner for x in value for inner in _held(x)] if isinstance(value, list) else [value]


class OnFakeCuda:
    """Mixed into a LightningModule: from its second batch on, everything is on a fake device."""

    mode: FakeTensorMode | None = None
    transferred: int = 0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.transferred += 1
        if self.transferred == 1:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)  # type: ignore[misc]
        if self.mode is None:
            self.mode = FakeTensorMode(allow_non_fake_inputs=True)
            with self.mode:
                self._go()
        with self.mode:
            return _fake(batch)

    def _go(self) -> None:
        """Replaces all parameters, buffers and optimiser states."""
        trainer = self.trainer  # type: ignore[attr-defined]
        modules: list[Any] = [self]
        optimizers = list(trainer.optimizers)
        for callback in trainer.callbacks:
            modules += [value for value in _held(list(vars(callback).values())) if isinstance(value, nn.Module)]
            for one in getattr(callback, "owned", {}).values():
                if one.module is not None:
                    modules.append(one.module)
                    optimizers.append(one.optimizer)
                    one._placed = CUDA, one._placed[1]
        replaced: dict[Tensor, Any] = {}
        for module in (inner for outer in modules for inner in outer.modules()):
            for name, value in list(module._parameters.items()):
                if value is not None and value.device != CUDA:
                    replaced[value] = nn.Parameter(_fake(value.detach()), requires_grad=value.requires_grad)
                    module._parameters[name] = replaced[value]
            for name, value in list(module._buffers.items()):
                module._buffers[name] = _fake(value)
            for name in getattr(module, "_defaults", {}):  # what a metric has counted so far
                setattr(module, name, _fake(getattr(module, name)))
            if hasattr(module, "_device"):
                module._device = CUDA
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [replaced.get(p, p) for p in group["params"]]
            optimizer.state.clear()


class _Done(Exception):
    """Raised before the epoch's end, where values may be read."""


class _Around(Callback):
    """Enters the modes for the time of a step, and ends the epoch after the second one on the fake device."""

    def __init__(self) -> None:
        self.copies = WaitingCopies()
        self.steps = 0
        self.stack = contextlib.ExitStack()

    def _start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.mode is not None:
            self.stack.enter_context(pl_module.mode)
            self.stack.enter_context(self.copies)
            self.steps += 1

    def _end(self, *args: Any) -> None:
        self.stack.close()
        if self.steps == 2:
            raise _Done

    def on_exception(self, *args: Any) -> None:
        self.stack.close()

    on_train_batch_start = on_validation_batch_start = _start
    on_train_batch_end = on_validation_batch_end = _end


def _real_on_the_host(method: Any) -> Any:
    """Sample numbers that are made on the host may be read there; under the mode they would be fake, too."""

    def run(self: RowTracker, *args: Any, **options: Any) -> Any:
        with unset_fake_temporarily() if self.on_host else contextlib.nullcontext():
            return method(self, *args, **options)

    return run


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    with (
        mock.patch.object(RowTracker, "index", _real_on_the_host(RowTracker.index)),
        mock.patch.object(RowTracker, "in_order", _real_on_the_host(RowTracker.in_order)),
        mock.patch.object(torch.Tensor, "backward", _backward),
        mock.patch.object(torch.autograd, "grad", _grad),
        mock.patch.object(StepRandom, "generator", _generator),
        mock.patch.object(SingleDeviceStrategy, "teardown"),
    ):
        yield


def waits_on_cuda(module: Any, callbacks: Any, batches: Any, *, stage: str = "fit", **options: Any) -> list[str]:
    """Two steps on the fake device after one on the CPU; the copies that the host waits for.

    Args:
        module: a LightningModule with :class:`OnFakeCuda`.
        callbacks: methods and monitors.
        batches: at least three.
        stage: ``"fit"`` or ``"validate"``.
        **options: of the Trainer.

    Raises:
        Exception: tensors of two devices meet, or a value is looked at.
    """
    around = _Around()
    trainer = make_trainer([*callbacks, around], **({"log_every_n_steps": 10**9} | options))
    with _without_cuda(), contextlib.suppress(_Done):
        trainer.fit(module, batches, val_loader()) if stage == "fit" else trainer.validate(module, batches)
    assert around.steps == 2
    return around.copies.found
