"""Tensors that a launcher has put into memory which several processes share, taken out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["own_memory"]


def own_memory(*objects: Any) -> None:
    """Give each tensor of CPU memory that other processes share a copy of this process's own, in place.

    A process started by "spawn" receives its arguments pickled, and PyTorch then hands tensors over as shared memory:
    ranks would write to the same buffers. Lightning takes its module out of it, and nothing else.

    Args:
        objects: whose tensors are meant: those of modules and of debias's objects, also in containers, at any depth.
            Of other objects nothing is touched.
    """
    for tensor in _tensors(list(objects), set()):
        if tensor.device.type == "cpu" and tensor.is_shared():
            tensor.data = tensor.data.clone()


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _tensors(part, seen)
    elif isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] == "debias":
        for part in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from _tensors(part, seen)
