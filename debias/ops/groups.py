"""Losses by group, over the global batch, without a loop over groups, without a host sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import isfinite, prod
from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import BadRowsError, DebiasError
from debias.ops import arguments
from debias.ops.arguments import MOST, check_count
from debias.ops.distributed import global_sum, is_distributed, shared_gradient, world_size

__all__ = ["GroupState", "GroupSums", "check_counts", "check_n_groups", "group_losses", "name_groups", "summed"]


class _Means(torch.autograd.Function):
    """Means by group of the global batch, from sums that are known already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num: Tensor, divisors: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(divisors, places)
        ctx.dtype = rows.dtype
        return num / divisors

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        divisors, places = ctx.saved_tensors
        factors = shared_gradient(grad / divisors)
        return _of_rows(F.pad(factors.to(ctx.dtype), (1, _EXTRA - 1)), places), None, None, None


class _WeightedSum(torch.autograd.Function):
    """``sum(weights * rows)`` of the global batch, from factors and sums that are known already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, factors: Tensor, num: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        # The sums themselves may be beyond half precision.
        dtype = torch.promote_types(factors.dtype, torch.float32)
        return factors.to(dtype).dot(num.to(dtype)).to(factors.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weights,) = ctx.saved_tensors
        return grad * weights, None, None, None


@dataclass(eq=False)
class GroupSums:
    """Sums of one loss by group.

    Attributes:
        rows: numerators of this rank by row, differentiable, ``(rows,)``.
        places: column of each row in a table of ``G + 3`` columns, int64 ``(rows,)``, or boolean ``(rows, G + 3)``: no
            group, the groups, an id out of range, a loss that is not finite.
        num: numerators of the global batch, ``(G,)``, float64 (float32 on MPS), without gradient.
        den: denominators of the global batch, as ``num``; 0 for a group that is absent.
        checked: whether no row can be bad.
    """

    rows: Tensor
    places: Tensor
    num: Tensor
    den: Tensor
    checked: bool = False

    @cached_property
    def divisors(self) -> Tensor:
        """The denominators, 1 where a group is absent, ``(G,)``."""
        return self.den + self.den.logical_not()

    @cached_property
    def losses(self) -> Tensor:
        """Mean loss by group, 0 where a group is absent, ``(G,)``, without gradient."""
        return self.num / self.divisors

    @property
    def means(self) -> Tensor:
        """:attr:`losses`, differentiable; once, over several ranks. What every rank computes alike from them has the
        gradient of the global batch, for which nothing more is sent.
        """
        means: Tensor = _Means.apply(self.rows, self.num, self.divisors, self.places)
        return means

    @cached_property
    def present(self) -> Tensor:
        """Which groups are in the global batch, boolean ``(G,)``."""
        return self.den != 0

    def weighted(self, weights: Tensor, *, by: Tensor | None = None) -> Tensor:
        """``sum_g weights_g num_g / by_g`` over the global batch; the gradient is this rank's share.

        Args:
            weights: ``(G,)`` without gradient.
            by: denominators, ``(G,)`` or a positive number, where 0 stands for no loss at all; those of the groups by
                default.

        Returns:
            A scalar in the dtype of the rows.
        """
        n_groups = self.num.shape[0]
        of_places = self.rows.new_zeros(n_groups + _EXTRA)
        factors = of_places.narrow(0, 1, n_groups)
        if by is not None:
            by = torch.threshold(by, 0.0, 1.0)  # 1 where it is 0: the factors of a batch without rows must be finite
        torch.div(weights, self.divisors if by is None else by, out=factors)
        of_rows = _of_rows(of_places, self.places)
        if is_distributed():
            of_rows *= world_size()
        elif self.checked:
            return self.rows.dot(of_rows)
        return _WeightedSum.apply(self.rows, of_rows, factors, self.num)


def group_losses(
    calls: Sequence[tuple[Tensor, Tensor, Tensor]], n_groups: int
) -> tuple[list[GroupSums], Tensor | list[float]]:
    """Sums by group of one or more losses, with one all-reduce of ``3 G + 9`` doubles a loss.

    Rows with an id out of range or a loss that is not finite are left out and counted.

    Args:
        calls: for each loss numerators ``(rows,)``, denominators ``(rows,)`` and groups ``(rows,)`` (negative =
            unlabelled) or boolean ``(rows, G)``.
        n_groups: number of groups G.

    Returns:
        The sums of each loss, and the numbers of rows of the global batch by place, ``(G + 3,)``, for
        :meth:`GroupState.count_bad`: a tensor, or plain numbers where reading them waits for nothing.
    """
    at_once = arguments.on_host(calls[0][0])
    places, tables = _tables(calls, n_groups, look_for_bad=not at_once)
    counts: Tensor | list[float]
    if at_once:
        listed = [table.tolist() for table in tables]
        checked = all(isfinite(sum(num)) for num, _, _ in listed)
        if not checked:  # on all ranks alike, since the tables are global
            places, tables = _tables(calls, n_groups, look_for_bad=True)
            listed = [table.tolist() for table in tables]
        counts = [sum(column) for column in zip(*[table[2] for table in listed], strict=True)]
    else:
        checked, counts = False, summed([table[2] for table in tables])
    sums = []
    for (rows, _, _), place, table in zip(calls, places, tables, strict=True):
        num, den, _ = table.narrow(1, 1, n_groups).unbind()
        sums.append(GroupSums(rows, place, num, den, checked))
    return sums, counts


# Columns of a table beside those of the groups: before them no group, after them bad ids and bad losses.
_EXTRA = 3
# Rows whose places are compared with all columns at once, and numbers that this makes of a value of each row: the one
# bounds the memory that a loss per pixel takes, the other that of many groups.
_CHUNK = 2**18
_CHUNK_ENTRIES = 2**24


def _rows_at_once(n_groups: int) -> int:
    return max(1, min(_CHUNK, _CHUNK_ENTRIES // (n_groups + _EXTRA)))


def _tables(
    calls: Sequence[tuple[Tensor, Tensor, Tensor]], n_groups: int, *, look_for_bad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Places of the rows, and numerators, denominators and counts of the global batch by place, ``(3, G + 3)``."""
    places, tables = [], []
    for rows, den, groups in calls:
        num = rows.detach()
        ones, limits = _constants(num.shape[0], n_groups, num.device)
        if groups.dtype == torch.bool:
            place = F.pad(groups, (1, 2))
            place[:, 0] = ~groups.any(1)
        else:
            place = torch.bucketize(groups.long().contiguous(), limits, right=True)
        if look_for_bad:
            difference = num - num  # NaN where the loss is NaN or infinite, in half of isfinite()'s operations
            bad = difference != difference
            # Also a bad loss of an unlabelled row: its NaN would reach the gradients all the same.
            if place.dtype == torch.bool:
                place = place.masked_fill(bad.unsqueeze(1), False)
                place[:, -1] = bad
            else:
                place = place.masked_fill(bad, n_groups + 2)
        places.append(place)
        data = torch.stack((num, den.detach() if den.requires_grad else den, ones))  # promotes to double precision
        tables.append(_table(data, place, n_groups))
    if len(tables) == 1:
        return places, [global_sum(tables[0])]
    return places, list(global_sum(torch.stack(tables)))


def readable(counts: Tensor) -> Tensor | list[float]:
    """Counts for :meth:`GroupState.count_bad`: plain numbers where reading them waits for nothing."""
    return counts.tolist() if arguments.on_host(counts) else counts


def _table(data: Tensor, places: Tensor, n_groups: int) -> Tensor:
    """Sums of the columns of ``data`` ``(3, rows)`` by place."""
    if arguments.on_host(data) and places.dtype != torch.bool:
        return data.new_zeros(3, n_groups + _EXTRA).scatter_add_(1, places.expand(3, -1), data)
    # Elsewhere scattering would add in another order in every run.
    size = _rows_at_once(n_groups)
    parts = zip(data.split(size, dim=1), places.split(size), strict=True)
    return summed([torch.where(_one_hot(place, n_groups), x.unsqueeze(-1), 0).sum(1) for x, place in parts])


def _of_rows(of_places: Tensor, places: Tensor) -> Tensor:
    """From numbers of the places ``(G + 3,)`` to those of the rows."""
    if places.dtype != torch.bool:
        return of_places.index_select(0, places)
    size = _rows_at_once(len(of_places) - _EXTRA)
    return torch.cat([torch.where(part, of_places, 0).sum(1) for part in places.split(size)])


def _one_hot(places: Tensor, n_groups: int) -> Tensor:
    if places.dtype == torch.bool:
        return places
    return places.unsqueeze(1) == torch.arange(n_groups + _EXTRA, device=places.device)


def _constants(rows: int, n_groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A one for each row, in the precision of the sums, and the ids that separate the columns of a table."""
    key = rows, n_groups, device
    if key in _made:
        return _made[key]
    with torch.inference_mode(False):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        made = torch.ones((), dtype=dtype, device=device).expand(rows), torch.arange(n_groups + 1, device=device)
    if type(made[0]) is Tensor:  # and no stand-in of a tracer, which must not outlive it
        if len(_made) >= 32:
            _made.clear()
        _made[key] = made
    return made


_made: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}


def summed(terms: Sequence[Tensor]) -> Tensor:
    """Sum of one or more tensors of the same shape."""
    return reduce(torch.add, terms)


class GroupState(nn.Module):
    """Buffers of a method that works with groups, kept in double precision, and its count of the rows it has seen.

    ``module.half()`` or ``precision="bf16-true"`` would round the method's state; here floating-point buffers keep
    their dtype and only follow the device. (On MPS, which has no float64, they are float32.)

    Args:
        n_groups: number of groups G.
        names: one name per group, for messages and logs.
    """

    kind: ClassVar[str] = "group"  # what the method calls its groups, in messages
    row_counts: Tensor

    def __init__(self, n_groups: int | Sequence[int], names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.n_groups = check_n_groups(n_groups, self.kind)
        self.group_names: Any = name_groups(n_groups, names, self.kind)
        # Rows by place, as group_losses counts them; what the host has read already is kept there.
        self.register_buffer("row_counts", torch.zeros(self.n_groups + _EXTRA, dtype=torch.float64), persistent=False)
        self._read_counts = [0.0, 0.0]

    def count_bad(self, counts: Tensor | list[float]) -> None:
        """Add the rows of a step, by place; bad rows in plain numbers raise at once, those in a tensor at the next
        :meth:`raise_if_bad`.
        """
        if isinstance(counts, Tensor):
            if counts.shape != self.row_counts.shape:  # by other groups than the method's own, told apart by none
                labelled = F.pad(counts[1:-2].sum().view(1), (0, self.n_groups - 1))
                counts = torch.cat((counts[:1], labelled, counts[-2:]))
            self.row_counts += counts
            return
        self._raise(counts[-2:])
        self._read_counts[0] += counts[0]
        self._read_counts[1] += sum(counts[1:-2])

    def only_unlabelled(self) -> bool:
        """Whether there were rows since the last call, but none with a group; waits for the device."""
        counts, read = self.row_counts.tolist(), self._read_counts
        unlabelled, labelled = counts[0] + read[0], sum(counts[1:-2]) + read[1]
        self.row_counts[:-2] = 0
        self._read_counts = [0.0, 0.0]
        return unlabelled > 0 and labelled == 0

    def raise_if_bad(self) -> None:
        """Raise if any row since the last call was bad; waits for the device.

        Raises:
            BadRowsError: on all ranks together, since the count is global.
        """
        bad = self.row_counts[-2:].tolist()
        self.row_counts[-2:] = 0
        self._raise(bad)

    def _raise(self, bad: list[float]) -> None:
        ids, losses = (int(x) for x in bad)
        if not ids and not losses:
            return
        if ids:
            number = f"n_{_plural(self.kind)}"
            raise BadRowsError(
                f"Expected {self.kind} ids below `{number}={self.n_groups}`, but {ids} rows had a higher one. They took"
                f" no part in the loss or the method's state. Number the {_plural(self.kind)} 0 .. {number} - 1 (-1 ="
                f" unlabelled), or raise `{number}`."
            )
        raise BadRowsError(
            f"Expected finite losses, but {losses} rows had a NaN or infinite one. They took no part in the method's"
            f" state. Check the inputs of this batch, the learning rate and {self.weight_in_words()};"
            " `Trainer(detect_anomaly=True)` finds the operation."
        )

    def weight_in_words(self) -> str:
        """The weight under which losses may have diverged, for messages."""
        return "the weights of penalties, if there are any"

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
                f"Expected `{_plural(self.kind)}` to be integer ids of shape {tuple(losses.shape)} or a boolean"
                f" membership of shape {(len(losses), self.n_groups)}, but got {groups.dtype} of shape"
                f" {tuple(groups.shape)}."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and not bool(saved.isfinite().all()):
                raise DebiasError(
                    f"Expected the saved `{name}` of {type(self).__name__} to be finite, but got {saved.tolist()[:10]}."
                    " That training had diverged, or the checkpoint is damaged: resume from an earlier one."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
        return self


def _plural(kind: str) -> str:
    """Groups, domains, classes."""
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def check_n_groups(n_groups: int | Sequence[int], kind: str = "group") -> int:
    """The total number of groups.

    Raises:
        DebiasError: it is not a positive integer, or not a sequence of them.
    """
    sizes = list(n_groups) if isinstance(n_groups, Sequence) and not isinstance(n_groups, str) else [n_groups]
    if not sizes or any(not isinstance(size, int | Integral) or isinstance(size, bool) or size < 1 for size in sizes):
        raise DebiasError(
            f"Expected `n_{_plural(kind)}` to be a positive integer, or one per key of a crossed `{kind}`, but got"
            f" {n_groups!r}."
        )
    total = prod(int(size) for size in sizes)  # NumPy's integers count too, as `ids.max() + 1` gives them
    return check_count(f"n_{_plural(kind)}", total, 1, MOST)


def check_counts(group_counts: Any, names: Sequence[str], kind: str = "group") -> Tensor:
    """Training samples per group as float64 ``(G,)``.

    Raises:
        DebiasError: the number of counts is wrong, one is negative, or a group has no sample.
    """
    counts = torch.as_tensor(group_counts, dtype=torch.float64).cpu()
    if counts.shape != (len(names),) or not bool(((counts >= 0) & counts.isfinite()).all()):
        raise DebiasError(
            f"Expected `{kind}_counts` to be {len(names)} numbers >= 0 and finite, one per {kind}, but got"
            f" {counts.tolist()}."
        )
    if bool((counts == 0).any()):
        empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
        raise DebiasError(
            f"Expected every {kind} to have training samples, but got none of {', '.join(empty)} (counts"
            f" {[int(c) for c in counts.tolist()]}). Merge or renumber the {_plural(kind)}, so that"
            f" `n_{_plural(kind)}` counts only those that occur."
        )
    return counts


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
