"""The tensors of a batch, and which of them have a row for each sample."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["arranged_rows", "attributes", "one_per_sample", "roots_of"]


def roots_of(batch: Any, n: int | None, sample: int | None = None, depth: int = 0) -> list[tuple[Tensor, int | None]]:
    """Tensors of a batch with a row for each of n samples, or of one sample; all of them where n is None."""
    if depth > 4 or isinstance(batch, str | bytes | int | float):
        return []
    if isinstance(batch, Tensor):
        return [(batch, sample)] if sample is not None or n is None or batch.shape[:1] == (n,) else []
    if isinstance(batch, Mapping):
        children = list(batch.values())
    elif isinstance(batch, tuple | list):
        children = list(batch)
        if n is not None and sample is None and one_per_sample(children, n) and (depth or not _of_lists(children, n)):
            return [root for i, child in enumerate(children) for root in roots_of(child, n, i, depth + 1)]
    else:
        children = list(attributes(batch).values())
    return [root for child in children for root in roots_of(child, n, sample, depth + 1)]


def attributes(value: Any) -> dict[str, Any]:
    """The parts of a batch that is an object: its attributes; none of modules, classes and functions."""
    if isinstance(value, type | nn.Module) or inspect.isroutine(value):
        return {}
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    names = [name for of_kind in slots for name in ([of_kind] if isinstance(of_kind, str) else of_kind)]
    found = {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}
    return found | getattr(value, "__dict__", {})


def one_per_sample(children: list[Any], n: int) -> bool:
    """Whether a list holds one element per sample, such as a detector's images: n alike, none with n rows itself."""
    if len(children) != n or len({type(child) for child in children}) != 1:
        return False
    return not any(isinstance(x, Tensor) and x.ndim and x.shape[0] == n for x in children)


def _of_lists(children: list[Any], n: int) -> bool:
    """Whether a batch holds lists with an element for each sample, as images and targets, of which there may be n."""
    return any(isinstance(x, tuple | list) and len(x) == n for x in children)


def arranged_rows(how: str, n: int, times: int, device: torch.device) -> Tensor:
    """Sample numbers of rows that are all samples, again and again (``"tiled"``), or those of a sample together."""
    numbers = torch.arange(n, device=device)
    return numbers.repeat(times) if how == "tiled" else numbers.repeat_interleave(times)
