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
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from debias.errors import BatchKeyError, DebiasError
from debias.step.context import Step
from debias.step.distributed import global_rank, is_distributed, world_size
from debias.step.tap import LossCall

__all__ = [
    "INDEX",
    "SampleTable",
    "numbered_dataset",
    "predictions",
    "sample_losses",
    "sample_numbers",
    "train_set",
]

INDEX = "index"
"""The tag that holds the number of a sample in its dataset."""


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
        dist.all_reduce(latest, op=dist.ReduceOp.MAX)
        mine = (order == latest) & (self.stamps > 0)
        for name in self.columns:
            column: Any = self._buffers[name]
            part = torch.where(mine.view(-1, *[1] * (column.ndim - 1)), column, 0)
            as_number = part.to(torch.uint8) if part.dtype == torch.bool else part
            dist.all_reduce(as_number)
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


def sample_numbers(step: Step, who: str) -> Tensor:
    """Numbers of the samples of a batch in their dataset, int64 ``(N,)``.

    Raises:
        BatchKeyError: the batch carries none.
    """
    if not isinstance(step.tags.get(INDEX), Tensor):
        raise BatchKeyError(
            f"Expected every sample to carry its number in the dataset for {who}, but the batch has none. Wrap the"
            " dataset, `train = tag(train)`, outside of everything else."
        )
    return step.ids(INDEX, 1, argument=INDEX)


def train_set(trainer: Any, who: str) -> Any:
    """The tagged training set whose samples are numbered.

    Raises:
        DebiasError: there are several loaders, a stream, or no numbers.
    """
    loaders = trainer.train_dataloader
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    if len(loaders) != 1:
        raise DebiasError(
            f"Expected one training loader for {who}, whose samples have one numbering, but got {len(loaders)}. Join"
            " the sets, `tag(ConcatDataset([...]))`."
        )
    return numbered_dataset(getattr(loaders[0], "dataset", None), who)


def numbered_dataset(dataset: Any, who: str) -> Any:
    """The tagged dataset inside of ``dataset`` whose numbers its samples carry.

    Raises:
        DebiasError: there is none, or more than one.
    """
    if isinstance(dataset, IterableDataset):
        raise DebiasError(
            f"Expected a map-style training set for {who}, which knows samples by their number, but got the stream"
            f" {type(dataset).__name__}. Use a dataset with `__len__` and `__getitem__`."
        )
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    if isinstance(inner, ConcatDataset):
        raise DebiasError(
            f"Expected one numbering of the training samples for {who}, but the training set joins"
            f" {len(inner.datasets)} sets. Tag the joined one, `tag(ConcatDataset([...]))`, outside of everything else."
        )
    tags = vars(inner).get("tags") if hasattr(inner, "__dict__") else None
    if not isinstance(tags, dict) or not isinstance(tags.get(INDEX), Tensor):
        raise DebiasError(
            f"Expected every training sample to carry its number in the dataset for {who}, but got"
            f" {type(dataset).__name__} without. Wrap it, `train = tag(train)`, outside of everything else."
        )
    return inner


def sample_losses(call: LossCall, n: int) -> tuple[Tensor, Tensor]:
    """Mean loss of each sample of a batch, and whether anything of it counts.

    Args:
        call: the loss.
        n: number of samples.

    Returns:
        float64 ``(n,)`` without gradient (float32 on MPS), and boolean ``(n,)``.

    Raises:
        DebiasError: samples were mixed, so that no loss is of one sample.
    """
    if call.parts > 1:
        raise DebiasError(
            "Expected losses of single samples, but an augmentation mixes them. Remove it, or what records samples."
        )
    # `call.num` keeps its graph for others: it is made here, and must not be made without gradients.
    dtype = torch.float32 if call.num.device.type == "mps" else torch.float64
    num, den = call.num.detach().to(dtype), call.den.detach().to(dtype)
    if call.rows is not None:
        num, den = (torch.zeros(n, dtype=dtype, device=x.device).index_add(0, call.rows, x) for x in (num, den))
    return num / torch.where(den == 0, 1, den), den != 0


def predictions(call: LossCall, n: int, who: str) -> tuple[Tensor, Tensor]:
    """Logits and targets of the samples of a batch, in their order.

    Raises:
        DebiasError: they are not one row a sample.
    """
    logits, target = call.logits, call.target
    if logits is None or target is None or call.rows is not None or len(logits) != n or len(target) != n:
        raise DebiasError(
            f"Expected logits and targets with one row for each of the {n} samples for {who}, but `{call.name}` has"
            f" logits {None if logits is None else tuple(logits.shape)}. Choose another loss, `loss=`."
        )
    return logits.detach(), target.detach()
