"""Losses that torch's functions do not show: how to take them apart per sample.

A library's loss with maths of its own is invisible to the tap. An adapter gives its per-sample losses instead. Adapters
are looked up by the class's qualified name, so that no library is imported for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import DebiasError

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
            ``(numerators, denominators)`` where the mean is ``numerators.sum() / denominators.sum()``.

    Returns:
        The class itself; for a function the function to call in the training step, which does the same and can be seen.

    Raises:
        DebiasError: ``loss`` is neither a class nor a function.

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
        tap = _active[-1] if _active else None
        if tap is None or tap.suspended:  # inside another adapted loss
            return loss(*args, **kwargs)
        tap.suspended += 1  # its inner losses are not seen, its per-sample losses are
        try:
            out = loss(*args, **kwargs)
        finally:
            tap.suspended -= 1
        return tap.adapted(loss.__name__, args, functools.partial(per_sample, **kwargs), out)

    return adapted


def adapter_of(module: nn.Module) -> PerSample | None:
    """The adapter of a loss module, by its class or a parent class."""
    for cls in type(module).__mro__:
        if (adapter := ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            return adapter
    return None
