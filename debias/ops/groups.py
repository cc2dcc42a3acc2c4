"""Losses by group, over the global batch, without a loop over groups, without a host sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias.errors import BadRowsError, DebiasError
from debias.step.distributed import global_sum, world_size

__all__ = ["GroupState", "GroupSums", "check_n_groups", "group_losses", "membership", "name_groups", "summed"]


def membership(groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Which row is in which group.

    Args:
        groups: int64 ``(rows,)``, negative = unlabelled; or boolean membership ``(rows, n_groups)``.
        n_groups: number of groups.

    Returns:
        Boolean ``(rows, n_groups)``, and boolean ``(rows,)`` where an id is out of range.
    """
    if groups.dtype == torch.bool:
        return groups, torch.zeros(groups.shape[0], dtype=torch.bool, device=groups.device)
    return groups.unsqueeze(1) == torch.arange(n_groups, device=groups.device), groups >= n_groups


class _WeightedSum(torch.autograd.Function):
    """``sum(weights * rows)`` as one node of the graph, with a value that is known already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weights,) = ctx.saved_tensors
        return grad * weights, None, None


@dataclass(eq=False)
class GroupSums:
    """Sums of one loss by group.

    Attributes:
        rows: numerators of this rank by row, differentiable, ``(rows,)``.
        members: which row counts for which group, boolean ``(rows, G)``; nowhere for bad rows.
        num: numerators of the global batch, ``(G,)``, without gradient.
        den: denominators of the global batch, ``(G,)``, without gradient; 0 for a group that is absent.
    """

    rows: Tensor
    members: Tensor
    num: Tensor
    den: Tensor

    @property
    def local(self) -> Tensor:
        """Numerators of this rank by group, differentiable any number of times, ``(G,)``."""
        return torch.where(self.members, self.rows.unsqueeze(1), 0).sum(0)

    @cached_property
    def divisors(self) -> Tensor:
        """The denominators, 1 where a group is absent, ``(G,)``."""
        return torch.where(self.den != 0, self.den, 1)

    @property
    def losses(self) -> Tensor:
        """Mean loss by group, 0 where a group is absent, ``(G,)``."""
        return self.num / self.divisors

    def weighted(self, weights: Tensor, *, by: Tensor | None = None) -> Tensor:
        """``sum_g weights_g num_g / by_g`` over the global batch; the gradient is this rank's share.

        Args:
            weights: ``(G,)`` without gradient.
            by: denominators, none of them 0; those of the groups by default.
        """
        factors = (weights / (self.divisors if by is None else by)).to(self.rows.dtype)
        of_rows = torch.where(self.members, factors, 0).sum(1)
        return _WeightedSum.apply(self.rows, of_rows * world_size(), (factors * self.num).sum())


@torch.no_grad()
def group_losses(calls: Sequence[tuple[Tensor, Tensor, Tensor]], n_groups: int) -> tuple[list[GroupSums], Tensor]:
    """Sums by group of one or more losses, with one all-reduce of ``2 G`` floats a loss.

    Rows with an id out of range or a loss that is not finite are left out and counted.

    Args:
        calls: for each loss numerators ``(rows,)``, denominators ``(rows,)`` and groups ``(rows,)`` or ``(rows, G)``.
        n_groups: number of groups G.

    Returns:
        The sums of each loss, and the number of bad rows of the global batch: ``(2,)``, bad ids and bad losses.
    """
    parts, stats, bad = [], [], []
    for num, den, groups in calls:
        members, bad_ids = membership(groups, n_groups)
        good = num.isfinite()
        members = members & good.unsqueeze(1)
        parts.append((num, members))
        stats.append(torch.where(members, torch.stack((num, den)).unsqueeze(-1), 0).sum(1).flatten())
        # A bad loss of an unlabelled row counts too: its NaN would reach the gradients all the same.
        bad.append(torch.stack((bad_ids, ~good)).sum(1))
    total = global_sum(torch.cat([*stats, summed(bad).to(stats[0].dtype)]))
    sums = [GroupSums(*part, *total[2 * i * n_groups :][: 2 * n_groups].chunk(2)) for i, part in enumerate(parts)]
    return sums, total[-2:]


def summed(terms: Sequence[Tensor]) -> Tensor:
    """Sum of one or more tensors of the same shape."""
    return reduce(torch.add, terms)


class GroupState(nn.Module):
    """Buffers of a method that works with groups, kept in double precision, and its count of bad rows.

    ``module.half()`` or ``precision="bf16-true"`` would round the method's state; here floating-point buffers keep
    their dtype and only follow the device. (On MPS, which has no float64, they are float32.)

    Args:
        n_groups: number of groups G.
        names: one name per group, for messages and logs.
    """

    kind: ClassVar[str] = "group"  # what the method calls its groups, in messages
    bad_rows: Tensor

    def __init__(self, n_groups: int | Sequence[int], names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.n_groups = check_n_groups(n_groups, self.kind)
        self.group_names = name_groups(n_groups, names, self.kind)
        self.register_buffer("bad_rows", torch.zeros(2, dtype=torch.float64), persistent=False)

    def count_bad(self, bad: Tensor) -> None:
        """Add the bad rows of a step; on CPU raise at once, elsewhere at the next :meth:`raise_if_bad`."""
        if bad.device.type == "cpu":
            self._raise(bad)
        else:
            self.bad_rows += bad

    def raise_if_bad(self) -> None:
        """Raise if any row since the last call was bad; waits for the device.

        Raises:
            BadRowsError: on all ranks together, since the count is global.
        """
        bad = self.bad_rows.clone()
        self.bad_rows.zero_()
        self._raise(bad)

    def _raise(self, bad: Tensor) -> None:
        ids, losses = (int(x) for x in bad.tolist())
        if not ids and not losses:
            return
        if ids:
            number = f"n_{self.kind}s"
            raise BadRowsError(
                f"Expected {self.kind} ids below `{number}={self.n_groups}`, but {ids} rows had a higher one. They took"
                f" no part in the loss or the method's state. Number the {self.kind}s 0 .. {number} - 1 (-1 ="
                f" unlabelled), or raise `{number}`."
            )
        raise BadRowsError(
            f"Expected finite losses, but {losses} rows had a NaN or infinite one. They took no part in the method's"
            " state. Check the inputs of this batch and the learning rate; `Trainer(detect_anomaly=True)` finds the"
            " operation."
        )

    def check_shapes(self, losses: Tensor, groups: Tensor) -> None:
        """Refuse losses and groups that do not belong together."""
        if losses.ndim != 1:
            raise DebiasError(
                f"Expected `losses` to have shape (N,), one loss per sample, but got {tuple(losses.shape)}. Compute"
                " them with `reduction='none'`."
            )
        fits = groups.shape == losses.shape and not groups.is_floating_point() and groups.dtype != torch.bool
        if not fits and not (groups.dtype == torch.bool and groups.shape == (len(losses), self.n_groups)):
            raise DebiasError(
                f"Expected `groups` to be integer ids of shape {tuple(losses.shape)} or a boolean membership of shape"
                f" {(len(losses), self.n_groups)}, but got {groups.dtype} of shape {tuple(groups.shape)}."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
        return self


def check_n_groups(n_groups: int | Sequence[int], kind: str = "group") -> int:
    """The total number of groups.

    Raises:
        DebiasError: it is not a positive integer, or not a sequence of them.
    """
    sizes = list(n_groups) if isinstance(n_groups, Sequence) and not isinstance(n_groups, str) else [n_groups]
    if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise DebiasError(
            f"Expected `n_{kind}s` to be a positive integer, or one per key of a crossed `{kind}`, but got"
            f" {n_groups!r}."
        )
    return prod(sizes)


def name_groups(n_groups: int | Sequence[int], names: Sequence[str] | None, kind: str = "group") -> list[str]:
    """One name per group; by default its number, or the numbers of the crossed ids.

    Raises:
        DebiasError: the number of names is wrong.
    """
    total = check_n_groups(n_groups, kind)
    if names is None:
        if not isinstance(n_groups, Sequence):
            return [str(g) for g in range(total)]
        crossed = [""]
        for size in n_groups:
            crossed = [f"{name}_{i}" if name else str(i) for name in crossed for i in range(size)]
        return crossed
    if len(names) != total or len(set(names)) != total:
        raise DebiasError(f"Expected `{kind}_names` to hold {total} different names, but got {list(names)}.")
    return [str(name) for name in names]
