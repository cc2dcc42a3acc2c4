"""Losses that torch's functions do not show: how to take them apart per sample.

A library's loss with maths of its own is invisible to the tap. An adapter gives its per-sample losses instead. Adapters
are looked up by the class's qualified name, so that no library is imported for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import SPLIT, DebiasError, LossNotFoundError
from debias.ops.arguments import shown

__all__ = ["ADAPTERS", "SET_LOSSES", "adapter_of", "register_loss"]

PerSample = Callable[..., Tensor | tuple[Tensor, Tensor]]
_active: list[Any] = []  # the tap of the running step, for adapted functions


def _label_smoothing(loss: Any, logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=loss.smoothing, reduction="none")


def _soft_target(loss: Any, logits: Tensor, target: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


# Qualified name of a loss class -> per-sample losses (module, *args) -> (N, ...) or (num, den).
ADAPTERS: dict[str, PerSample] = {
    "timm.loss.cross_entropy.LabelSmoothingCrossEntropy": _label_smoothing,
    "timm.loss.cross_entropy.SoftTargetCrossEntropy": _soft_target,
}

# Losses that compare whole sets of samples and so have no value per sample; named in the error message.
SET_LOSSES = frozenset(
    {"DiceLoss", "JaccardLoss", "TverskyLoss", "LovaszLoss", "NTXentLoss", "SupConLoss"}
    | {"ContrastiveLoss", "CircleLoss", "MultiSimilarityLoss", "SelfSupervisedLoss"}
    | {"VICRegLoss", "BarlowTwinsLoss", "DINOLoss", "JsdCrossEntropy"}
)


def register_loss(loss: Any, per_sample: PerSample) -> Any:
    """Teach debias a loss with maths of its own.

    Args:
        loss: a loss class (``nn.Module``), recognised wherever it is a submodule of the trained module, or a function.
        per_sample: computes what the loss averages. For a class it is called as ``per_sample(module, *args,
            **kwargs)``, for a function as ``per_sample(*args, **kwargs)``. It returns losses of shape ``(N, ...)``, or
            ``(numerators, denominators)`` where the mean is ``numerators.sum() / denominators.sum()``. That the loss
            returns this mean is checked in the first training step of an epoch and on logging steps.

    Returns:
        The class itself; for a function the function to call in the training step, which does the same and can be seen.

    Raises:
        DebiasError: ``loss`` is neither a class nor a function.
        LossNotFoundError: in a step: the loss returns anything but that mean, as one number, or ``per_sample`` anything
            but such losses.

    Example:
        >>> import torch
        >>> from debias import register_loss
        >>> class LogCosh(torch.nn.Module):
        ...     def forward(self, prediction, target):
        ...         return torch.log(torch.cosh(prediction - target)).mean()
        >>> _ = register_loss(LogCosh, lambda loss, prediction, target: torch.log(torch.cosh(prediction - target)))
    """
    if isinstance(loss, type):
        ADAPTERS[f"{loss.__module__}.{loss.__qualname__}"] = per_sample
        return loss
    if not callable(loss):
        raise DebiasError(
            f"Expected `loss` to be a loss class or function, but got {loss!r}. Pass the class of the module, not an"
            " instance's name."
        )

    @functools.wraps(loss)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        if not _active:
            return loss(*args, **kwargs)
        tap = _active[-1]
        return take(tap, loss.__name__, args, lambda: loss(*args, **kwargs), lambda *a: per_sample(*a, **kwargs))

    return adapted


def adapter_of(module: nn.Module) -> PerSample | None:
    """The adapter of a loss module, by its class or a parent class."""
    for cls in type(module).__mro__:
        if (adapter := ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return adapter
    return None


def take(
    tap: Any, name: str, args: tuple[Any, ...], original: Callable[[], Any], per_sample: Callable[..., Any]
) -> Any:
    """Run an adapted loss under a tap: its inner losses are not seen, its per-sample losses are."""
    if tap.suspended:  # inside another adapted loss
        return original()
    tap.suspended += 1
    try:
        out = original()
    finally:
        tap.suspended -= 1
    if tap.training and isinstance(out, Tensor) and not out.requires_grad:
        return out
    if tap.training and not (isinstance(out, Tensor) and out.numel() == 1):
        raise LossNotFoundError(
            f"Expected the registered loss `{name}` to return one number, the mean of what its `per_sample` computes,"
            f" but got {shown(out)}. Register a function that ends with the mean, and call that in the step. {SPLIT}"
        )
    n = (
        tap.tracker.n
        if tap.tracker is not None
        else next((len(x) for x in args if isinstance(x, Tensor) and x.ndim), 1)
    )
    return tap.adapted(name, args, functools.partial(_computed, name, per_sample, n), out)


def _computed(name: str, per_sample: Callable[..., Any], n: int, *args: Any) -> Any:
    """What an adapter gives, where that is losses of rows, or such and their denominators."""
    found = per_sample(*args)
    losses, den = found if isinstance(found, tuple) and len(found) == 2 else (found, found)
    with suppress(AttributeError, RuntimeError):
        if losses.ndim or n == 1:
            den.expand(losses.shape)
            return found
    raise LossNotFoundError(
        f"Expected `per_sample` of the registered loss `{name}` to return losses of shape (N, ...), or these and their"
        f" denominators, but got {shown(found)}. Return a value for each sample, without the mean; where the loss has a"
        " `reduction`, set it to 'none' in `each = copy.copy(loss)`, and return `type(loss).forward(each, *args)`."
    )
