"""What a mixin's ``configure_<method>`` does, stated once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from torch import nn

__all__ = ["configures"]

P = ParamSpec("P")


def configures(attribute: str, make: Callable[P, nn.Module]) -> Callable[Concatenate[Any, P], None]:
    """The ``configure_<method>`` of a mixin: it makes the method's module, and takes the arguments of its class.

    Args:
        attribute: where the module is kept on the LightningModule.
        make: the module's class.
    """

    def configure(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        setattr(self, attribute, make(*args, **kwargs))

    takes = inspect.signature(make)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    configure.__signature__ = takes.replace(parameters=[own, *takes.parameters.values()], return_annotation=None)  # type: ignore[attr-defined]
    configure.__name__ = f"configure_{attribute}"
    configure.__doc__ = (
        f"Make the module; takes the arguments of :class:`debias.{getattr(make, '__name__', '')}`. Call it in"
        " ``__init__``."
    )
    return configure
