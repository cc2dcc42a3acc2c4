"""Carry group ids, domains or identities beside a batch, without editing the dataset or what the model receives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from debias.errors import DataError
from debias.ops.arguments import checked
from debias.step.samples import INDEX
from debias.step.tagged import TagCollate, TaggedSample, TagRow

__all__ = ["TaggedDataset", "TaggedIterableDataset", "tag", "untag"]

Ids = Sequence[int] | Tensor | Callable[[Any], Any]


@checked()
def tag(dataset: Any, **tags: Any) -> TaggedDataset | TaggedIterableDataset:
    """Wrap ``dataset`` so that its loader carries one tag per sample beside each batch.

    The training step, the transfer hooks and the other callbacks still receive the bare batch; callbacks of debias
    find the tag by its name: ``GroupDRO(group="place", n_groups=4)``. Every sample of a map-style dataset also carries
    its number in the dataset, as the tag ``index``: methods that need no group labels know samples by it, for which
    ``tag(dataset)`` is enough.

    Args:
        dataset: a map-style or iterable dataset; it is wrapped, not edited.
        **tags: name = ids. Ids are a sequence, array, tensor or column of a table, in the order of the dataset, of
            shape ``(len(dataset),)`` or ``(len(dataset), ...)`` (int64 ids, or a boolean membership
            ``(len(dataset), n_groups)``), or a callable of one sample. Negative ids mean unlabelled. Names are
            refused: numbered set by set, one name could get another number in each.

    Returns:
        A dataset of the same length; other attributes are those of ``dataset``, whose own method to make a loader makes
        one without tags: give the tagged dataset to a ``DataLoader``.

    Raises:
        DataError: an iterable dataset gets no tag, the lengths differ, or ids are not numbers.

    Example:
        >>> from debias import tag
        >>> tagged = tag([("image", 0), ("image", 1)], place=[3, 1])
        >>> tagged[1].tags["place"].item()
        1
    """
    if isinstance(dataset, IterableDataset):
        if not tags:
            raise DataError(
                "Expected at least one tag of an iterable dataset, whose samples have no number, but got none. Write"
                " `tag(dataset, place=function_of_a_sample)`."
            )
        return TaggedIterableDataset(dataset, tags)
    return TaggedDataset(dataset, tags)


class _Wrapping(Dataset):
    """A map-style dataset around another one, whose length and other attributes it has."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._wrapped(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples of a batch, read at once where the dataset can, as those of Hugging Face."""
        at_once = getattr(self.dataset, "__getitems__", None)
        samples = at_once(indices) if at_once is not None else None
        if not isinstance(samples, list):  # else it may be a batch already
            samples = [self.dataset[index] for index in indices]
        return [self._wrapped(sample, index) for sample, index in zip(samples, indices, strict=True)]

    def _wrapped(self, sample: Any, index: int) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "tags"):  # pickling, for one, may not be forwarded
            raise AttributeError(name)
        return getattr(self.dataset, name)


class TaggedDataset(_Wrapping):
    """A map-style dataset and the tags of its samples; made by :func:`tag`."""

    @checked()
    def __init__(self, dataset: Any, tags: dict[str, Any]) -> None:
        self.dataset = dataset
        self.tags = {name: _as_ids(name, ids, len(dataset)) for name, ids in tags.items()}
        self.tags.setdefault(INDEX, torch.arange(len(dataset)))
        self._length = len(dataset)
        self._computes = any(map(callable, self.tags.values()))

    def _wrapped(self, sample: Any, index: int) -> TaggedSample:
        one = isinstance(index, int | np.integer)
        if one and not -self._length <= index < self._length:
            raise DataError(
                f"Expected the dataset to keep the length that it had when it was tagged, {self._length}, but it yields"
                f" sample {index}. Tag it anew when it has grown."
            )
        if not isinstance(sample, TaggedSample):
            inner, bare = {}, sample
            if one and not self._computes:
                return TaggedSample(sample, TagRow(self.tags, int(index)))
        else:  # a dataset that is tagged twice carries both sets of tags, side by side
            inner, bare = dict(sample.tags), sample.sample
        tags = {name: ids(bare) if callable(ids) else ids[index] for name, ids in self.tags.items()}
        return TaggedSample(bare, inner | tags)


class TaggedIterableDataset(IterableDataset):
    """An iterable dataset whose tags are computed from each sample; made by :func:`tag`."""

    @checked()
    def __init__(self, dataset: Any, tags: dict[str, Any]) -> None:
        for name, ids in tags.items():
            if not callable(ids):
                raise DataError(
                    f"Expected the tag `{name}` of an iterable dataset to be a callable of one sample, but got"
                    f" {type(ids).__name__}: without an index, ids cannot be looked up. Pass e.g. a function that"
                    " reads the id from the sample."
                )
        self.dataset = dataset
        self.tags = tags

    def __iter__(self) -> Iterator[TaggedSample]:
        for sample in self.dataset:
            yield TaggedSample(sample, {name: of(sample) for name, of in self.tags.items()})


def untag(data: Any) -> Any:
    """The same data without tags, for a loop that knows nothing of them.

    Args:
        data: a dataset, or a ``DataLoader`` of one, whose samples may carry tags: also a subset of a tagged dataset,
            or tagged datasets that were joined.

    Returns:
        A dataset of the same length that returns the bare samples. Of a loader a copy that yields the bare batches:
        it shares dataset, sampler and generator with ``data``, whose ``collate_fn`` is given the bare samples.

    Raises:
        DataError: ``data`` is something else, such as a ``CombinedLoader``.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from debias import tag, untag
        >>> loader = DataLoader(tag([1, 2, 3, 4], place=[0, 0, 1, 1]), batch_size=2)
        >>> list(untag(loader))
        [tensor([1, 2]), tensor([3, 4])]
    """
    if isinstance(data, DataLoader):
        bare = copy.copy(data)
        bare.collate_fn = _BareCollate(data.collate_fn)
        bare._iterator = None  # persistent workers of the other would go on with its `collate_fn`
        return bare
    if isinstance(data, IterableDataset):
        return _BareIterableDataset(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _BareDataset(data)
    raise DataError(
        f"Expected `untag` to get a dataset or a DataLoader, but got {type(data).__name__}. Of several loaders untag"
        " each: `CombinedLoader([untag(loader) for loader in loaders])`."
    )


class _BareDataset(_Wrapping):
    """A map-style dataset whose samples may carry tags, without them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def _wrapped(self, sample: Any, index: int) -> Any:
        return _bare(sample)


class _BareIterableDataset(IterableDataset):
    """An iterable dataset whose samples may carry tags, without them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return map(_bare, self.dataset)


class _BareCollate:
    """A ``collate_fn`` that takes the tags off the samples first."""

    bare = True

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn.collate_fn if isinstance(collate_fn, TagCollate) else collate_fn

    def __call__(self, items: Any) -> Any:
        return self.collate_fn([_bare(item) for item in items] if isinstance(items, list) else _bare(items))


def _bare(sample: Any) -> Any:
    return sample.sample if isinstance(sample, TaggedSample) else sample


def _as_ids(name: str, ids: Any, length: int) -> Any:
    if callable(ids):
        return ids
    kind = type(ids).__name__
    if not isinstance(ids, Tensor | list | tuple):
        # Rows by position: `column[0]` of a filtered pandas frame is the row labelled 0. It may be read-only.
        ids = np.asarray(ids).copy()
        ids = ids.tolist() if ids.dtype == object else ids  # which may hold numbers
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        found = sorted({type(each).__name__ for each in np.asarray(ids, dtype=object).reshape(-1)})
        raise DataError(
            f"Expected the tag `{name}` to be numbers, one row per sample, but got {kind} of {' and '.join(found)}."
            " Give each name one number that holds for all sets,"
            " `ids = {name: i for i, name in enumerate(sorted({*train_names, *val_names}))}`, and tag each set by it,"
            f" `tag(train, {name}=[ids[name] for name in train_names])` and"
            f" `tag(val, {name}=[ids[name] for name in val_names])`. A missing one is -1."
        ) from None
    if ids.ndim == 0 or len(ids) != length:
        raise DataError(
            f"Expected the tag `{name}` to hold one id per sample, but got shape {tuple(ids.shape)} for a dataset of"
            f" {length}. Pass the ids in the order of the dataset."
        )
    return ids
