"""Counting the groups of the training set: from tags as they stand, or in one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
)

from debias.errors import BatchKeyError, DebiasError, DebiasWarning
from debias.step.agreement import flat_loaders, tag_array
from debias.step.ids import read_ids
from debias.step.random import undisturbed
from debias.step.tagged import split_tags

__all__ = ["can_count", "count_groups", "empty_groups", "tag_counts"]


def count_groups(trainer: Any, key: Any, n_groups: int | Sequence[int], *, argument: str = "group") -> Tensor:
    """Number of training samples of each group, the same on every rank.

    Tags are counted as they stand; ids inside the batch take one pass over the training set.

    Returns:
        float64 ``(G,)``.

    Raises:
        DebiasError: the training data has no length.
    """
    counts, counts_name = None, f"{'class' if argument == 'target' else argument}_counts"
    loaders = flat_loaders(trainer.train_dataloader)
    if len(loaders) > 1:  # samples of the others have no id
        loaders = [loader for loader in loaders if _tags(_drawn_from(loader), key) is not None]
        if not loaders:
            raise DebiasError(
                f"Expected `{counts_name}` to be given where no tag of several training loaders is called"
                f" {key!r}, but got none. Pass `{counts_name}=[...]`."
            )
    for loader in loaders:
        dataset = getattr(loader, "dataset", None)
        if not _has_rows(dataset):
            raise DebiasError(
                f"Expected `{counts_name}` to be given where the training data cannot be counted, but got"
                f" {type(dataset if dataset is not None else loader).__name__}. Pass `{counts_name}=[...]`."
            )
        _warn_of_sampler(loader, trainer, argument, counts_name)
        try:
            found = _count(loader, key, n_groups, argument)
        except BatchKeyError as error:
            raise BatchKeyError(
                f"{error} Where a hook adds the ids to the batch, or the set yields whole batches, pass"
                f" `{counts_name}=[...]`."
            ) from None
        counts = found if counts is None else counts + found
    return counts  # type: ignore[return-value]


def tag_counts(trainer: Any, loaders: Any, key: Any, n_groups: int | Sequence[int]) -> Tensor | None:
    """Samples of each group in the datasets of these loaders, ``(G,)``; None where their tags do not tell, so that it
    would take a pass over the data.
    """
    counts = torch.zeros(1)
    for loader in flat_loaders(loaders):
        if (tags := _tags(_drawn_from(loader), key)) is None:
            return None
        try:
            counts = counts + _sum_up([(None, tags)], key, n_groups)
        except BatchKeyError:  # the first step says it, and the shape it has in a batch
            return None
    return counts if len(counts) == torch.tensor(n_groups).prod() else None


def empty_groups(counts: Tensor | None, names: Sequence[str]) -> str:
    """The names of the groups without a sample, to be read; empty if there are none or nobody knows."""
    if counts is None:
        return ""
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
    return ("group " if len(empty) == 1 else "groups ") + ", ".join(empty[:10]) + more if empty else ""


def can_count(trainer: Any) -> bool:
    """Whether the training data can be counted: it is no stream."""
    return all(_has_rows(getattr(loader, "dataset", None)) for loader in flat_loaders(trainer.train_dataloader))


def _has_rows(dataset: Any) -> bool:
    return dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def _count(loader: Any, key: Any, n_groups: Any, argument: str) -> Tensor:
    dataset = _drawn_from(loader)
    if (tags := _tags(dataset, key)) is not None:
        return _sum_up([(None, tags)], key, n_groups, argument)
    with undisturbed():
        batches = DataLoader(dataset, batch_size=256, collate_fn=loader.collate_fn)
        return _sum_up(map(split_tags, batches), key, n_groups, argument)


# By name: torchdata has some of its own that share no base class with PyTorch's.
_OF_WHOLE_DATASETS = {"SequentialSampler", "RandomSampler", "WeightedRandomSampler", "DistributedSampler"}


def _drawn_from(loader: Any) -> Any:
    """The dataset, or the part of it that the loader's sampler is known to leave."""
    dataset: Any = getattr(loader, "dataset", None)
    sampler = _sampler(loader)
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(dataset, [int(i) for i in sampler.indices])
    if isinstance(sampler, list | tuple | range):
        return Subset(
            dataset, [int(i) for part in sampler for i in (part if isinstance(part, list | tuple) else [part])]
        )
    return dataset


def _sampler(loader: Any) -> Any:
    """What draws single indices, below the samplers that only batch them or share them out among ranks."""
    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    while True:
        if isinstance(sampler, BatchSampler):
            sampler = sampler.sampler
        elif isinstance(sampler, DistributedSamplerWrapper):
            sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
        else:
            return sampler


def _warn_of_sampler(loader: Any, trainer: Any, argument: str, counts_name: str) -> None:
    sampler = _sampler(loader)
    known = isinstance(sampler, SubsetRandomSampler | list | tuple | range | None)
    if known or _OF_WHOLE_DATASETS & {kind.__name__ for kind in type(sampler).__mro__} or not trainer.is_global_zero:
        return
    warnings.warn(
        f"The {argument}s of the whole training set were counted, since nothing tells whether {type(sampler).__name__}"
        f" draws from all of it. If it leaves samples out, pass `{counts_name}=[...]`, or a `Subset` as dataset.",
        DebiasWarning,
        stacklevel=2,
    )


def _sum_up(parts: Any, key: Any, n_groups: Any, argument: str = "group") -> Tensor:
    total = torch.zeros(1)
    for batch, tag_values in parts:
        ids = read_ids(batch, tag_values, key, n_groups, torch.device("cpu"), argument=argument)
        size = int(torch.tensor(n_groups).prod())
        found = (
            ids.sum(0).double()
            if ids.dtype == torch.bool
            else torch.bincount(ids[(ids >= 0) & (ids < size)], minlength=size)
        )
        total = total + found.double()
    return total


def _tags(dataset: Any, key: Any) -> dict[str, Any] | None:
    """The whole arrays of the tags that a key names; None unless all of it is tags."""
    keys = list(key) if isinstance(key, tuple | list) else [key]
    tags = {str(k): tag_array(dataset, k) for k in keys}
    return None if any(array is None for array in tags.values()) else tags
