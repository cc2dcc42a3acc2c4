"""The optimiser of a network that belongs to a method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from debias.errors import DebiasError
from debias.step.watcher import Debiaser

__all__ = ["users_optimizer"]


def users_optimizer(method: Debiaser, own: Callable[..., Optimizer] | None = None) -> Callable[..., Optimizer]:
    """What makes the optimiser of an owned network: of the class and with the options of the user's first one.

    Args:
        method: the method that owns the network.
        own: makes it instead, from parameters and ``lr=``; the method's argument ``optimizer``, where it has one.

    Returns:
        For ``OwnedModule(optimizer=)``. It is called when the network is made, and then raises a DebiasError where an
        optimiser cannot be made a second time.
    """
    return functools.partial(_make, method, own)


def _make(method: Any, own: Callable[..., Optimizer] | None, parameters: Any, lr: float) -> Optimizer:
    if own is not None:
        return own(parameters, lr=lr)
    users = method.engine.trainer.optimizers[0]
    taken = inspect.signature(type(users).__init__).parameters
    try:
        return type(users)(parameters, **{k: v for k, v in users.defaults.items() if k in taken} | {"lr": lr})
    except (TypeError, ValueError, AttributeError) as error:
        raise DebiasError(
            f"Expected an optimiser that can be made a second time from its `defaults`, but got"
            f" {type(users).__name__}: {error}. Pass the adversary's own: `optimizer=torch.optim.AdamW`."
        ) from error
