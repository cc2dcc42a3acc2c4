"""BatchNorm on parts of a batch, with the statistics of the whole batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from debias.errors import DebiasError, UnsupportedStrategyError
from debias.ops.distributed import is_distributed

__all__ = ["BatchStatistics"]

_SIGNATURE = inspect.signature(F.batch_norm)


class BatchStatistics(TorchFunctionMode):
    """Lets BatchNorm in training mode treat the samples of a part as it treats them in the whole batch.

    Around the step on the whole batch it keeps mean and variance of every call of a layer, with their gradient; running
    statistics are updated as ever. Around the step on a part these are the mean and variance of the layer.

    Args:
        module: the user's module.

    Raises:
        UnsupportedStrategyError: a layer computes its statistics over several ranks, which have not as many parts, or
            in a way of its own.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        running = [m for m in module.modules() if hasattr(m, "running_var")]
        self._layers = [m for m in running if isinstance(m, _BatchNorm) and (m.training or m.running_var is None)]
        self._others = [m for m in running if not (m.running_var is None or isinstance(m, _BatchNorm | _InstanceNorm))]
        self._numbers: dict[int, tuple[int, Tensor]] = {}  # of the layers, by their buffers and parameters
        self._known: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of each call of a layer
        self._left: dict[int, list[tuple[Tensor, Tensor]]] | None = None  # in this part; None in the whole batch
        if is_distributed() and any(isinstance(layer, nn.SyncBatchNorm) for layer in self._layers):
            raise UnsupportedStrategyError(
                "Expected BatchNorm to be each rank's own with `losses='split'` or `'image'`, but got SyncBatchNorm: a"
                " rank with more groups than another one would wait for it. Leave out `sync_batchnorm=True`, or freeze"
                " the layers."
            )

    @contextlib.contextmanager
    def of_whole(self) -> Iterator[None]:
        """While this lasts the step is run on the whole batch."""
        before = [_versions(layer) for layer in self._others]
        with self._of_layers():
            yield
        for layer, versions in zip(self._others, before, strict=True):
            if _versions(layer) != versions:
                raise UnsupportedStrategyError(
                    "Expected layers with statistics of the batch to be torch's with `losses='split'` or `'image'`, but"
                    f" got {type(layer).__name__}, which would compute those of each part. Freeze it (`eval()`), or use"
                    " BatchNorm or GroupNorm."
                )

    @contextlib.contextmanager
    def _of_layers(self) -> Iterator[None]:
        """While this lasts calls of layers are seen."""
        self._numbers.clear()
        # In a compiled graph no layer would be seen.
        stance = torch.compiler.set_stance("force_eager") if self._layers else contextlib.nullcontext()
        with stance, self:
            yield

    @contextlib.contextmanager
    def of_part(self) -> Iterator[None]:
        """While this lasts the step is run on a part."""
        self._left = {layer: list(calls) for layer, calls in self._known.items()}
        with self._of_layers():
            yield
        for layer, calls in self._left.items():
            if calls and len(calls) < len(self._known[layer]):
                raise _other_calls(len(calls[0][0]), "less")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        given = _SIGNATURE.bind(*args, **kwargs)
        given.apply_defaults()
        if not given.arguments["training"]:
            return func(*args, **kwargs)
        x, weight, bias, eps = (given.arguments[name] for name in ("input", "weight", "bias", "eps"))
        if _is_run_again():
            raise DebiasError(
                "Expected BatchNorm outside of activation checkpointing with `losses='split'` or `'image'`, but a layer"
                " is in `torch.utils.checkpoint`, which runs it again in the backward pass, where the statistics of the"
                " whole batch are not known. Leave out checkpointing, or freeze the layer."
            )
        layer = self._number(given.arguments["running_mean"], weight)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        if self._left is None:
            var, mean = torch.var_mean(precise, [0, *range(2, x.ndim)], correction=0)
            self._known.setdefault(layer, []).append((mean, var))
            return func(*args, **kwargs)
        if not self._left.get(layer):
            raise _other_calls(x.shape[1], "more")
        mean, var = self._left[layer].pop(0)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        out = (precise - mean.view(shape)) * (var + eps).rsqrt().view(shape)
        out = out if weight is None else out * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)).to(x.dtype)

    def _number(self, *tensors: Tensor | None) -> int:
        """The number of the layer that has these; another one where none has, as where a step calls the function."""
        ids = [id(x) for x in tensors if x is not None]
        if not any(x in self._numbers for x in ids):  # a step may have given its layers others
            for number, layer in enumerate(self._layers):
                self._numbers |= {id(x): (number, x) for x in (layer.running_mean, layer.weight) if x is not None}
        return next((self._numbers[x][0] for x in ids if x in self._numbers), ids[0] if ids else -1)


def _versions(layer: Any) -> list[tuple[int, int]]:
    """By which it shows, without reading them, that the buffers of a layer were changed."""
    return [(x.data_ptr(), x._version) for x in layer.buffers(recurse=False)]


def _other_calls(channels: int, how: str) -> DebiasError:
    return DebiasError(
        "Expected the step to run the same BatchNorm layers on every part of the batch as on the whole batch, with"
        f" `losses='split'` or `'image'`, but one of {channels} channels was run {how} often on a part. Freeze it, or"
        " use GroupNorm."
    )


def _is_run_again() -> bool:
    """Whether the caller is in a part of the network that is run again in the backward pass."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
