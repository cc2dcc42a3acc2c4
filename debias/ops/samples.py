"""Tables with a row for each sample of a set: which sample a row of a batch is, what was seen of it, and when.

Samples are told by their number in the *dataset*, which ``debias.tag`` carries as the tag ``index``: a loader's order
differs from epoch to epoch and from rank to rank. Of a sample that is seen twice, the later value counts; of one that
is seen twice in the same step (padding, sampling with replacement), the first row of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.ops.distributed import global_rank, in_place_sum, is_distributed, world_size

__all__ = ["SampleTable"]


class SampleTable(nn.Module):
    """Columns of values by sample, kept in buffers: checkpoints hold them.

    A column is made when it is first recorded. Every rank records the samples that it sees; :meth:`merge` gives all
    ranks all of them.

    Args:
        size: number of samples N.
    """

    stamps: Tensor
    _scratch: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        # One row more than samples, for rows of a batch that are not to be kept: writing there needs no selection.
        self.register_buffer("stamps", torch.zeros(size + 1, dtype=torch.int64))
        self.register_buffer("_scratch", torch.full((size + 1,), 2**62, dtype=torch.int64), persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        """A column, ``(N, ...)``; zeros where nothing was recorded."""
        if name not in self._buffers:
            raise DebiasError(f"Expected a recorded column, one of {self.columns}, but got {name!r}.")
        return self._buffers[name][: self.size]  # type: ignore[index]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [name for name in self._buffers if name not in ("stamps", "_scratch")]

    @property
    def seen(self) -> Tensor:
        """Which samples were recorded, boolean ``(N,)``."""
        return self.stamps[: self.size] > 0

    def record(self, numbers: Tensor, stamp: int, *, keep: Tensor | None = None, **values: Tensor) -> None:
        """Note values of some samples.

        Args:
            numbers: int64 ``(n,)``.
            stamp: when, a positive number that grows from step to step and is the same on all ranks.
            keep: which rows to keep, boolean ``(n,)``; all by default.
            **values: a column each, ``(n, ...)``.
        """
        rows = self.first(numbers, keep)
        self.stamps.index_fill_(0, rows, stamp)
        for name, value in values.items():
            value = value.detach()
            if name not in self._buffers:
                self._make(name, value.shape[1:], value.dtype)
            column: Any = self._buffers[name]
            column.index_copy_(0, rows, value.to(column.dtype))
        self.stamps[self.size :].zero_()

    def average(self, name: str, numbers: Tensor, values: Tensor, rate: float, keep: Tensor | None = None) -> Tensor:
        """Update running values of some samples, the first of a sample as it is; note them before :meth:`record`, which
        stamps the samples.

        Args:
            name: of the column.
            numbers: int64 ``(n,)``; the same on all ranks, whose running values would part otherwise.
            values: ``(n,)``.
            rate: share of the old value.
            keep: which rows to keep, boolean ``(n,)``.

        Returns:
            The running value of each row ``(n,)``, as if it were the only one of its sample.
        """
        if name not in self._buffers:
            self._make(name, values.shape[1:], values.dtype)
        column: Any = self._buffers[name]
        inside = torch.where((numbers >= 0) & (numbers < self.size), numbers, self.size)
        seen = self.stamps[inside] > 0
        values = torch.where(seen, rate * column[inside] + (1 - rate) * values.detach(), values.detach())
        column.index_copy_(0, self.first(numbers, keep), values)
        return values

    def first(self, numbers: Tensor, keep: Tensor | None = None) -> Tensor:
        """Where to write each row of a batch: at its number, or behind the end where it is not to be kept, or comes
        again.
        """
        inside = (numbers >= 0) & (numbers < self.size)
        inside = inside if keep is None else inside & keep
        numbers = torch.where(inside, numbers, self.size)
        places = torch.arange(len(numbers), device=numbers.device)
        self._scratch.scatter_reduce_(0, numbers, places, "amin")
        once = self._scratch[numbers] == places
        self._scratch.index_fill_(0, numbers, 2**62)
        return torch.where(once, numbers, self.size)

    def merge(self) -> None:
        """Give every rank what all have recorded, of each sample the latest, of equally late ones the lowest rank's.

        Every rank calls it. Costs one all-reduce of N integers and one of each column.
        """
        if not is_distributed():
            return
        world = world_size()
        order = self.stamps * world + (world - 1 - global_rank())
        latest = order.clone()
        in_place_sum(latest, dist.ReduceOp.MAX)
        mine = (order == latest) & (self.stamps > 0)
        for name in self.columns:
            column: Any = self._buffers[name]
            part = torch.where(mine.view(-1, *[1] * (column.ndim - 1)), column, 0)
            as_number = part.to(torch.uint8) if part.dtype == torch.bool else part
            in_place_sum(as_number)
            column.copy_(as_number)
        self.stamps.copy_(latest.div(world, rounding_mode="floor"))

    def _make(self, name: str, shape: Any, dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.zeros((self.size + 1, *shape), dtype=dtype, device=self.stamps.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As GroupState: `half()` of whatever holds the table must not round what was recorded.
        device = fn(torch.empty(0)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                single = device.type == "mps" and buffer.dtype == torch.float64
                self._buffers[name] = buffer.to(device, torch.float32 if single else buffer.dtype)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stamps = state_dict.get(f"{prefix}stamps")
        if stamps is not None and len(stamps) != self.size + 1:
            raise DebiasError(
                f"Expected the training set to have as many samples as when the checkpoint was saved,"
                f" {len(stamps) - 1}, but got {self.size}: numbers of samples would mean other ones. Resume with the"
                " same set, or start afresh."
            )
        for key, value in state_dict.items():
            name = key[len(prefix) :]
            if key.startswith(prefix) and "." not in name and name not in self._buffers:
                self._make(name, value.shape[1:], value.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
