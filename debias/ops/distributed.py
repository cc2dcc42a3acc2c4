"""The global batch: sums over ranks, and a gather for what is not a function of sums. No Lightning here.

Every rank evaluates the same objective of the global batch. A sum over ranks whose backward is again a sum over ranks
makes DDP's *mean* of gradients the exact gradient of that objective, also where one global statistic enters another,
and double backward works because the operation is its own backward. In one process everything is the identity.

The ranks meant are those that see different samples. They are all, unless :func:`data_parallel` names some of them: the
ranks of one tensor-parallel group see the same samples, which count once.

Each call here is one message, for which all ranks wait, so a penalty should send few: stack what can go together
(:func:`global_sums`), and say ``shared=True`` of sums from which every rank computes the same: then their gradients are
the same on every rank too, and backward sends nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from debias.errors import DebiasError

__all__ = [
    "alike",
    "as_global",
    "data_parallel",
    "gather",
    "gather_objects",
    "gathers",
    "global_rank",
    "global_sum",
    "global_sums",
    "in_place_sum",
    "is_distributed",
    "ranks_group",
    "shared_gradient",
    "use_group",
    "weighted_mean",
    "world_size",
]


_group: Any = None


def use_group(group: Any) -> None:
    """From now on, sum over these ranks.

    Args:
        group: a ``torch.distributed`` process group that holds this process; None for all ranks.
    """
    global _group
    _group = group


@contextmanager
def data_parallel(group: Any) -> Iterator[None]:
    """Inside, sums are over these ranks: for loops of your own in which others see the same samples.

    Both the forward and the backward pass have to be inside.

    Args:
        group: the process group of the ranks that see different samples, as ``mesh["data_parallel"].get_group()``.
    """
    before = _group
    use_group(group)
    try:
        yield
    finally:
        use_group(before)


def ranks_group() -> Any:
    """The process group of the ranks that see different samples; None for all."""
    return _group


def is_distributed() -> bool:
    """Whether several processes train together, on different samples."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(_group) > 1


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size(_group) if is_distributed() else 1


def global_rank() -> int:
    """This process's number among them, 0 without a process group."""
    return dist.get_rank(_group) if is_distributed() else 0


def in_place_sum(x: Tensor, op: Any = None) -> None:
    """Replace ``x`` by its sum over ranks, without gradients; ``op`` is another reduction of ``torch.distributed``."""
    if is_distributed():
        dist.all_reduce(x, op=dist.ReduceOp.SUM if op is None else op, group=_group)


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        in_place_sum(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _GlobalSum.apply(grad)


class _SharedSum(_GlobalSum):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return shared_gradient(grad)


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The gradient itself is no longer computed alike on every rank, so the next one would be another.
        raise DebiasError(
            "Expected sums over ranks from which all ranks compute the same to be differentiated once, but got a second"
            " derivative. Take it in one process, or of sums with `shared=False` (`debias.ops.distributed.global_sum`)."
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(sizes[: global_rank()]), x.shape[0]
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=_group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank computes the gradient of the same objective, so nothing needs to be exchanged: the own rows, times
        # the number of ranks that DDP is about to divide by.
        return grad[ctx.start : ctx.start + ctx.rows] * world_size(), None


def global_sum(x: Tensor, *, shared: bool = False) -> Tensor:
    """Sum of ``x`` over ranks, elementwise, in one message.

    Args:
        x: floating-point tensor of the same shape on every rank.
        shared: every rank computes the same from the sum, with nothing of its own rows in between. Then backward sends
            nothing; it can be taken once. Otherwise it is a message too, and can be taken any number of times.

    Returns:
        The sum, of the same shape, equal on every rank.
    """
    if not is_distributed():
        return x
    total: Tensor = (_SharedSum if shared else _GlobalSum).apply(x)
    return total


def global_sums(parts: Sequence[Tensor], *, shared: bool = False) -> list[Tensor]:
    """:func:`global_sum` of several tensors in one message, in the widest of their dtypes.

    Args:
        parts: floating-point tensors, of the same shapes on every rank.
        shared: see :func:`global_sum`.

    Returns:
        Their sums, in their own shapes and dtypes.
    """
    if not is_distributed():
        return list(parts)
    total = global_sum(torch.cat([part.flatten() for part in parts]), shared=shared)
    pieces = zip(total.split([part.numel() for part in parts]), parts, strict=True)
    return [piece.view(part.shape).to(part.dtype) for piece, part in pieces]


def weighted_mean(num: Tensor, den: Tensor, weights: Tensor | None = None, *, guarded: bool = True) -> Tensor:
    """``sum(weights * num) / sum(weights * den)`` of the global batch; its gradient is this rank's share of it.

    The mean of the ranks' gradients, as DDP takes it, is then that of the global mean, however the rows are divided.
    One message of two numbers, none in backward.

    Args:
        num: numerators of this rank's rows, differentiable.
        den: denominators, of the same shape; 1 for plain losses.
        weights: of the rows, broadcastable to them; 0 leaves a row out, unless it is not finite. 1 by default.
        guarded: where nothing counts it is 0, and not NaN as torch's own means are.

    Returns:
        Scalar, equal on every rank.

    Example:
        >>> import torch
        >>> from debias.ops.distributed import weighted_mean
        >>> losses = torch.tensor([1.0, 2.0, 6.0])
        >>> weighted_mean(losses, torch.ones(3), torch.tensor([1.0, 1.0, 0.0]))
        tensor(1.5000)
    """
    if weights is not None:
        num, den = weights * num, weights * den
    total, count = global_sum(torch.stack((num.sum(), den.sum())), shared=True)
    return total / (count + (count == 0) if guarded else count)


def shared_gradient(grad: Tensor) -> Tensor:
    """The gradient of this rank's part of a global sum, from that of the sum, where it is the same on every rank.

    It is times the number of ranks, by which DDP is about to divide; a second derivative is refused.
    """
    if not is_distributed():
        return grad
    final: Tensor = _Final.apply(grad * world_size())
    return final


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
    sizes = torch.zeros(world_size(), dtype=torch.long, device=x.device)
    sizes[global_rank()] = x.shape[0]
    in_place_sum(sizes)
    return _Gather.apply(x, sizes.tolist())


def gathers(parts: Sequence[Tensor]) -> list[Tensor]:
    """:func:`gather` of several tensors of the same rows in one message.

    Args:
        parts: floating-point tensors ``(rows, ...)``.
    """
    if not is_distributed():
        return list(parts)
    columns = [part.reshape(len(part), prod(part.shape[1:])) for part in parts]
    pieces = gather(torch.cat(columns, 1)).split([column.shape[1] for column in columns], 1)
    return [
        piece.to(part.dtype).unflatten(1, part.shape[1:]) if part.ndim > 1 else piece[:, 0].to(part.dtype)
        for piece, part in zip(pieces, parts, strict=True)
    ]


def gather_objects(x: Any) -> list[Any]:
    """``x`` of all ranks, in rank order: for what is not a tensor, outside of training steps.

    Args:
        x: anything that can be pickled.
    """
    if not is_distributed():
        return [x]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, x, group=_group)
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
