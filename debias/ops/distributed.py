"""The global batch: sums over ranks, and a gather for what is not a function of sums. No Lightning here.

Every rank evaluates the same objective of the global batch. A sum over ranks whose backward is again a sum over ranks
makes DDP's *mean* of gradients the exact gradient of that objective, also where one global statistic enters another,
and double backward works because the operation is its own backward. In one process everything is the identity.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "alike",
    "as_global",
    "gather",
    "gather_objects",
    "global_rank",
    "global_sum",
    "is_distributed",
    "weighted_mean",
    "world_size",
]


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def global_rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _GlobalSum.apply(grad)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(sizes[: dist.get_rank()]), x.shape[0]
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank computes the gradient of the same objective, so nothing needs to be exchanged: the own rows, times
        # the number of ranks that DDP is about to divide by.
        return grad[ctx.start : ctx.start + ctx.rows] * dist.get_world_size(), None


def global_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, elementwise; differentiable any number of times.

    Args:
        x: floating-point tensor of the same shape on every rank.

    Returns:
        The sum, of the same shape, equal on every rank.
    """
    return _GlobalSum.apply(x) if is_distributed() else x


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order; ranks may hold different numbers of rows, also none.

    The sizes are exchanged first, which waits for the device: use it only for what is not a function of sums.

    Args:
        x: tensor of shape ``(rows, ...)``; the trailing shape is the same on every rank.

    Returns:
        Tensor of shape ``(rows of all ranks, ...)``, equal on every rank. Its gradient is that of an objective which
        every rank evaluates alike.
    """
    if not is_distributed():
        return x
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    sizes[dist.get_rank()] = x.shape[0]
    dist.all_reduce(sizes)
    return _Gather.apply(x, sizes.tolist())


def gather_objects(x: Any) -> list[Any]:
    """``x`` of all ranks, in rank order: for what is not a tensor, outside of training steps.

    Args:
        x: anything that can be pickled.
    """
    if not is_distributed():
        return [x]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def alike(text: str, device: torch.device) -> bool:
    """Whether all ranks have come with the same text; this waits for the device.

    Args:
        text: anything.
        device: of the tensor that is exchanged.
    """
    found = torch.zeros(world_size(), dtype=torch.float64, device=device)
    found[global_rank()] = zlib.crc32(text.encode())
    found = global_sum(found)
    return bool((found == found[0]).all())


def as_global(local: Tensor, value: Tensor) -> Tensor:
    """``value`` forward, the gradient of ``local`` backward: what is logged is global, what is summed by DDP is
    local.
    """
    return value.detach() + (local - local.detach()) if is_distributed() else local


def weighted_mean(num: Tensor, den: Tensor, weights: Tensor | None = None, *, guarded: bool = False) -> Tensor:
    """``sum(weights * num) / sum(den)`` of the global batch; its gradient is this rank's share, which DDP averages.

    Args:
        num: numerators of this rank's rows, ``(rows,)``.
        den: their denominators, ``(rows,)``.
        weights: of the rows, without gradient; 1 by default.
        guarded: of nothing, where all denominators are 0, it is 0, and not NaN as torch's own means are.

    Returns:
        Scalar, equal on every rank.
    """
    num = num if weights is None else num * weights
    local, total = num.sum(), den.detach().sum()
    summed = local.detach()
    if is_distributed():
        summed, total = global_sum(torch.stack((summed, total)))
    if guarded:
        total = total + (total == 0)
    if not is_distributed():
        return local / total
    return as_global(local * (world_size() / total), summed / total)
