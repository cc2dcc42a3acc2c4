"""Tags beside a batch: a sample and a batch that carry them, and how they are collated."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import default_collate

from debias.errors import BatchKeyError
from debias.ops.arguments import checked
from debias.step.sample_order import reorders

__all__ = ["TagCollate", "TagRow", "TaggedBatch", "TaggedSample", "split_tags"]


class TagRow(Mapping[str, Any]):
    """The tags of one sample of a dataset, looked up when they are read; of a whole batch in one operation.

    Args:
        table: the tags of all samples, tensors ``(N, ...)`` by name.
        index: number of the sample.
    """

    __slots__ = ("index", "table")

    def __init__(self, table: dict[str, Any], index: int) -> None:
        self.table, self.index = table, index

    def __getitem__(self, name: str) -> Any:
        return self.table[name][self.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, ({name: tag.clone() for name, tag in self.items()},)  # without those of all other samples


@dataclass
class TaggedSample:
    """One sample and its tags, as a dataset made by :func:`debias.tag` returns it."""

    sample: Any
    tags: Mapping[str, Any]

    def __iter__(self) -> Any:
        raise BatchKeyError(
            f"Expected the bare sample of a tagged dataset, but got it with its tags {sorted(self.tags)}. Take"
            " `dataset[i].sample` (and `dataset[i].tags`), and put `tag(...)` around everything else: it has to be the"
            " outermost dataset. If tagged and untagged samples meet in one batch, tag all of them (-1 = unlabelled)."
        )

    def __getitem__(self, key: Any) -> Any:
        return iter(self)  # the same advice

    def __len__(self) -> int:
        return len(list(self))  # the same advice

    def __bool__(self) -> bool:
        return True


@dataclass
class TaggedBatch:
    """A batch, untouched, and the collated tags of its samples, each of shape ``(N,)`` or ``(N, ...)``.

    Attributes:
        batch: as the dataset and its ``collate_fn`` make it.
        tags: by name.
        n: number of samples; None where nobody has counted them.
    """

    batch: Any
    tags: dict[str, Any]
    n: int | None = None

    def __iter__(self) -> Any:
        raise BatchKeyError(
            f"Expected a loop that knows tags, but this one unpacks a tagged batch (tags {sorted(self.tags)})"
            " itself. Add a callback of debias to the Trainer, e.g. `GroupMonitor`, which hands out the bare batch;"
            " in a loop of your own use `tagged.batch` and `tagged.tags`, and for a step that takes `dataloader_iter`"
            " pass `untag(loader)`."
        )

    def __getitem__(self, key: Any) -> Any:
        return iter(self)  # the same advice

    def pin_memory(self) -> TaggedBatch:
        """Pin both parts; the DataLoader calls this under ``pin_memory=True``."""
        return dataclasses.replace(self, batch=pin_memory(self.batch), tags=pin_memory(self.tags))

    def to(self, *args: Any, **kwargs: Any) -> TaggedBatch:
        """Move the tensors of both parts, for loops without Lightning."""
        from lightning.fabric.utilities.apply_func import move_data_to_device

        device = torch.empty(0).to(*args, **kwargs).device
        batch, tags = move_data_to_device(self.batch, device), move_data_to_device(self.tags, device)
        return dataclasses.replace(self, batch=batch, tags=tags)


def _collate_tagged(batch: list[TaggedSample], *, collate_fn_map: Any = None) -> TaggedBatch:
    return TagCollate(default_collate)(batch)


def _tags_of(items: list[Any]) -> dict[str, Any]:
    """The tags of a batch of samples, which all carry the same."""
    rows: list[Any] = [item.tags if isinstance(item, TaggedSample) else {} for item in items]
    table = rows[0].table if isinstance(rows[0], TagRow) else None
    if table is not None and all(isinstance(row, TagRow) and row.table is table for row in rows):
        numbers = torch.tensor([row.index for row in rows])
        return {name: values[numbers] for name, values in table.items()}
    # Of datasets that were joined, or tagged twice, or with tags that are functions.
    first, *others = map(sorted, rows)
    for other in others:
        if other != first:
            raise BatchKeyError(
                f"Expected all samples of a batch to carry the same tags, but got {first or 'none'} and"
                f" {other or 'none'}. Where datasets are joined, tag each of them alike, or the joined one:"
                " `tag(ConcatDataset([...]), place=ids)`; -1 stands for unlabelled."
            )
    return default_collate([dict(row) for row in rows])


# PyTorch's own extension point: any DataLoader with the default collate_fn now yields TaggedBatch for tagged datasets.
default_collate_fn_map[TaggedSample] = _collate_tagged


class TagCollate:
    """A ``collate_fn`` around the user's own one, which sees bare samples and never learns about tags.

    The engine puts it around the ``collate_fn`` of every loader that Lightning runs; other loops write
    ``DataLoader(tagged, collate_fn=TagCollate(my_collate))``. It has to keep the order of its samples, which is checked
    with the first batch: by calling it again, with copies of the samples in another order.

    Args:
        collate_fn: the user's own.
        counts: let batches without tags, too, say how many samples they have.
    """

    @checked()
    def __init__(self, collate_fn: Callable[[Any], Any], *, counts: bool = False) -> None:
        self.collate_fn = collate_fn
        self.counts = counts
        self.checked = collate_fn is default_collate  # a copy in a worker that starts before the first batch checks too

    def __call__(self, items: Any) -> Any:
        """Collate the bare samples, and the tags beside them.

        Raises:
            BatchKeyError: samples with and without tags meet, or the order of the samples is not kept.
        """
        tagged = not getattr(self.collate_fn, "bare", False)  # `untag` has taken the tags off: nobody wants them
        if tagged and isinstance(items, TaggedSample):  # batch_size=None: the dataset yields whole batches
            return TaggedBatch(self.collate_fn(items.sample), dict(items.tags))
        if not isinstance(items, list):
            return self.collate_fn(items)
        if tagged and any(isinstance(item, TaggedSample) for item in items):
            tags, samples = _tags_of(items), [item.sample for item in items]
            collate = self.collate_fn if self.checked or len(samples) < 2 else self._collate_and_check
            return TaggedBatch(collate(samples), tags, len(items))
        batch = self.collate_fn(items)
        return TaggedBatch(*split_tags(batch), len(items)) if self.counts else batch

    def _collate_and_check(self, samples: list[Any]) -> Any:
        try:
            copies = copy.deepcopy(samples)  # made first: a collate_fn may take its samples apart
        except Exception:  # samples that cannot be copied cannot be collated twice
            copies = None
        batch = self.collate_fn(samples)
        self.checked = True
        if copies is not None and reorders(self.collate_fn, copies, batch):
            self.checked = False  # so that the next batch is refused too
            name = getattr(self.collate_fn, "__qualname__", type(self.collate_fn).__name__)
            raise BatchKeyError(
                f"Expected `collate_fn` to keep the order of its samples, but {name} sorts or shuffles them, so that"
                " tags would go to the wrong ones. Sort in a batch sampler or in the step (or let"
                " `pack_padded_sequence(..., enforce_sorted=False)` do it), or put the id into the sample and name its"
                " place in the batch, as in `group=2`."
            )
        return batch


def split_tags(batch: Any) -> tuple[Any, dict[str, Any]]:
    """The bare batch of one loader, and its tags."""
    if isinstance(batch, TaggedBatch):
        return batch.batch, batch.tags
    if isinstance(batch, TaggedSample):
        return batch.sample, dict(batch.tags)
    return batch, {}
