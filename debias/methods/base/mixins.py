"""What the two functions of a mixin do, stated once: one makes the method's module, the other one calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from torch import Tensor, nn

__all__ = ["calls", "configures"]

P = ParamSpec("P")


def configures(attribute: str, make: Callable[P, nn.Module]) -> Callable[Concatenate[Any, P], None]:
    """The ``configure_<method>`` of a mixin: it makes the method's module, and takes the arguments of its class.

    Args:
        attribute: where the module is kept on the LightningModule.
        make: the module's class.
    """

    def configure(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        setattr(self, attribute, make(*args, **kwargs))

    configure.__name__ = f"configure_{attribute}"
    configure.__doc__ = (
        f"Make the module; takes the arguments of :class:`debias.{getattr(make, '__name__', '')}`. Call it in"
        " ``__init__``."
    )
    return _with_signature(configure, list(inspect.signature(make).parameters.values()))


def calls(attribute: str, forward: Callable[Concatenate[Any, P], Tensor]) -> Callable[Concatenate[Any, P], Tensor]:
    """The ``<method>_loss`` or ``<method>_penalty`` of a mixin: it calls the module, and takes what that takes.

    Where the module takes the number of optimiser steps, it is that of the LightningModule.

    Args:
        attribute: where the module is kept on the LightningModule.
        forward: of the module's class.
    """
    _, *takes = inspect.signature(forward).parameters.values()
    counts = any(parameter.name == "step" for parameter in takes)

    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if counts:
            kwargs.setdefault("step", self.global_step)
        return getattr(self, attribute)(*args, **kwargs)

    call.__name__ = f"{attribute}_{'penalty' if counts else 'loss'}"
    default = "\n\n``step`` is by default the ``global_step`` of this module." if counts else ""
    call.__doc__ = f"{inspect.getdoc(forward)}{default}"
    return _with_signature(call, takes)


def _with_signature(function: Any, takes: list[inspect.Parameter]) -> Any:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    returns = inspect.signature(function).return_annotation
    function.__signature__ = inspect.Signature([own, *takes], return_annotation=returns)
    return function
