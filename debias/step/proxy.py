"""Stand-ins for a module's methods that survive pickling and deep copies, and can be taken back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from debias.tap.hooks import Hook

__all__ = ["StepProxy", "as_written", "attach", "detach", "watch_outputs"]


class StepProxy:
    """Runs ``around(original, args, kwargs)`` where the module's method stood.

    A closure would not pickle and would keep deep copies bound to the original module. Pickles and copies of a module
    that carries this proxy get the plain method back, so they are ordinary modules: weight averaging, SWA and
    ``ddp_spawn`` see nothing of us.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self.owner = owner
        self.name = name
        self.around = around
        self.had_instance_attribute = name in vars(owner)  # torch.compile sets one
        self.original = getattr(owner, name)
        # Sets __wrapped__, which Lightning's is_overridden and signature checks follow to the user's own method.
        functools.update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step, watched."""
        return self.around(self.original, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Exports read a method's code and names (`__code__`, `__globals__`), also while a run lasts.
        if name == "original":  # not there yet
            raise AttributeError(name)
        return getattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.had_instance_attribute:
            return copy.deepcopy(self.original, memo)
        owner = memo.get(id(self.owner), self.owner)
        return getattr(type(owner), self.name).__get__(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.original,)


def attach(owner: Any, name: str, around: Callable[..., Any]) -> StepProxy:
    """Put a proxy where ``owner.name`` stands, as an instance attribute."""
    proxy = StepProxy(owner, name, around)
    setattr(owner, name, proxy)
    return proxy


def detach(proxy: StepProxy) -> None:
    """Take a proxy back, restoring an instance attribute that stood there before. Safe to call twice."""
    if vars(proxy.owner).get(proxy.name) is not proxy:
        proxy.around = _plainly  # somebody else has wrapped it and may put it back: it holds on to no run
        return
    if proxy.had_instance_attribute:
        setattr(proxy.owner, proxy.name, proxy.original)
    else:
        delattr(proxy.owner, proxy.name)


def watch_outputs(module: nn.Module, saw: Callable[[nn.Module, Any, Any, Any], None], undo: ExitStack) -> None:
    """Let ``saw(module, args, kwargs, output)`` see what a module and its direct children make, until ``undo`` closes.

    The module itself has a proxy: a step that calls ``self.forward(x)`` runs none of its hooks.
    """
    depth = 0  # a `forward` may call itself, as one that averages over flips

    def around(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal depth
        depth += 1
        try:
            output = original(*args, **kwargs)
        finally:
            depth -= 1
        if not depth:
            saw(module, args, kwargs, output)
        return output

    undo.callback(detach, attach(module, "forward", around))
    for child in module.children():
        compiled = getattr(child, "_compiled_call_impl", None) is not None  # the hook would be compiled, too
        if not (compiled or isinstance(child, torch.jit.ScriptModule)):
            undo.callback(child.register_forward_hook(Hook(saw), with_kwargs=True).remove)


def as_written(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step without its compilation, as of a module that is compiled; networks that it calls stay compiled."""
    plain: Any = getattr(step, "_torchdynamo_orig_callable", step)
    if plain is not getattr(step, "__wrapped__", step):  # of a compiled step that something else is put around
        return step
    owner = getattr(step, "__self__", None)  # of a method that is decorated
    return plain if owner is None or hasattr(plain, "__self__") else plain.__get__(owner)


def _plainly(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return original(*args, **kwargs)


def _same(x: Any) -> Any:
    return x
