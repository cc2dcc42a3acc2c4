"""Tensors that are spread over processes (``DTensor``): told, and made whole. No Lightning here."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from debias.errors import HeadNotFoundError

__all__ = ["has_shards", "refuse_sharded_loss", "whole"]


def _sharded() -> Any:
    """The class of tensors of which each process may hold a part; none, and not imported, where nobody has any."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return () if tensor is None else tensor.DTensor


def has_shards(module: nn.Module) -> bool:
    """Whether a parameter of the module is spread over processes."""
    return any(isinstance(x, _sharded()) for x in module.parameters())


def whole(x: Any) -> Any:
    """A sharded tensor on every process, differentiable; all of them have to ask. Anything else as it is."""
    return x.full_tensor() if isinstance(x, _sharded()) else x


def refuse_sharded_loss(name: str, *tensors: Any) -> None:
    """Refuse a loss of logits that no process has whole.

    Raises:
        HeadNotFoundError: naming the loss and how its logits are spread.
    """
    sharded = _sharded()
    for x in tensors:
        if isinstance(x, sharded):
            raise HeadNotFoundError(
                f"Expected the logits of `{name}` to be whole on every process, but they are a DTensor with"
                f" {', '.join(map(str, x.placements))}: the head is sharded along its classes. Let it give whole"
                " logits: `ColwiseParallel(output_layouts=Replicate())`, without `loss_parallel()`."
            )
