"""Statistics of second order in at least float32, whatever the step around them computes in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["autocast_off", "float32_by_default", "in_full_precision"]

P = ParamSpec("P")
T = TypeVar("T")


def autocast_off(device: str) -> AbstractContextManager[Any]:
    """No autocast inside; where there is none it costs nothing."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """The function outside autocast, with half-precision tensors among its arguments as float32."""

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> T:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        with autocast_off(device):
            return function(*map(_upcast, args), **{k: _upcast(x) for k, x in kwargs.items()})  # type: ignore[arg-type]

    return precise


def _upcast(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32 inside, whatever the default dtype: ``precision="bf16-true"`` changes it in a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
