"""What ranks and loaders have to agree on: one error on all ranks, where one of them would wait for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from debias.errors import BatchKeyError, DebiasError
from debias.ops.distributed import gather_objects, is_distributed
from debias.step.loaders import Part

__all__ = ["Agreement", "flat_loaders", "refuse_contradictions", "tag_array", "tags_of"]


class Agreement:
    """Keeps the ranks of one fit together."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._ends = False  # whether the ranks tell each other when their data ends
        self._group: Any = None

    @contextmanager
    def on_begin(self, trainer: Any, parts: Sequence[Part]) -> Iterator[bool]:
        """Before the user's step: refuse on all ranks what one of them refuses, in the first step of an epoch.

        Yields whether it is that step.

        Raises:
            DebiasError: on all ranks: one of them has a problem, or they have different numbers of batches, or
                different tags.
        """
        first, problem = self._epoch != trainer.current_epoch, None
        self._epoch = trainer.current_epoch
        if not (first and is_distributed()):
            yield first
            return
        try:
            yield first
        except DebiasError as error:
            problem = error
        loaders = flat_loaders(trainer.train_dataloader)
        stream = any(not isinstance(x, DataLoader) or isinstance(x.dataset, IterableDataset) for x in loaders)
        layout = {".".join(map(str, part.path)): ", ".join(sorted(part.tags)) or "none" for part in parts}
        of_ranks = gather_objects((problem, trainer.num_training_batches, layout, stream))
        problems, batches, layouts, streams = (list(values) for values in zip(*of_ranks, strict=True))
        if problem is not None:
            raise problem
        for rank, theirs in enumerate(problems):
            if theirs is not None:
                raise type(theirs)(f"{theirs} (Seen by rank {rank}, not by this one.)")
        if len(set(batches)) > 1:
            raise DebiasError(
                f"Expected all ranks to have equally many training batches, but `train_dataloader` has {batches} of"
                " them: ranks would wait for each other without end. Leave `use_distributed_sampler=True`, take a"
                " GroupBalancedSampler, or pass `limit_train_batches` to the Trainer."
            )
        for path in layouts[0]:
            tags = [each[path] for each in layouts if path in each]
            if len(set(tags)) > 1:
                where = f" of the loader {path!r}" if path else ""
                raise BatchKeyError(
                    f"Expected the training batches{where} to carry the same tags on all ranks, but rank by rank they"
                    f" have: {'; '.join(tags)}. Tag the dataset alike on every rank; -1 stands for unlabelled."
                )
        self._ends = any(streams)

    @contextmanager
    def on_ends(self, trainer: Any) -> Iterator[None]:
        """Around a step: refuse ranks of which some have more batches, where the length of the data does not tell.

        Before it the ranks tell each other whether this is their last batch; the message goes beside the others, on the
        CPU: nothing waits for the device.

        Raises:
            DebiasError: on all ranks, in the step that is the last one of some of them.
        """
        if not self._ends:
            yield
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
        flag = torch.tensor([float(last)])
        work: Any = dist.all_reduce(flag, group=self._group, async_op=True)
        yield
        work.wait()
        if 0 < (ended := int(flag)) < (world := dist.get_world_size()):
            raise DebiasError(
                f"Expected all ranks to have equally many training batches, but the data of {ended} of {world} ranks"
                " ends with this batch: the others would wait for them without end. Give every rank as many samples,"
                " or pass a `limit_train_batches` that all of them reach to the Trainer."
            )


def flat_loaders(loaders: Any) -> list[Any]:
    """The loaders in lists, tuples and dictionaries of them, in the order of their numbers."""
    return list((loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened)


def refuse_contradictions(loaders: Sequence[Any], keys: Iterable[str]) -> None:
    """Refuse tags that say different things of one sample that two loaders draw from.

    It is one sample where both draw from the same dataset, through subsets, concatenations and tags; ids of -1 say
    nothing.

    Raises:
        BatchKeyError: naming the sample and both ids.
    """
    bases: dict[int, Any] = {}
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    origins = [_by_sample(dataset, partial(_origins, bases)) for dataset in datasets]
    for key in keys:
        said: dict[int, tuple[Tensor, Tensor]] = {}  # by dataset: the ids of its samples, and the loader that said them
        for number, (dataset, origin) in enumerate(zip(datasets, origins, strict=True)):
            ids = tag_array(dataset, key)
            if ids is None or origin is None or ids.is_floating_point():
                continue
            for base in origin[:, 0].unique().tolist():
                rows = (origin[:, 0] == base).nonzero().flatten()
                here, places, size = ids[rows], origin[rows, 1], len(bases[base])
                if base not in said or said[base][0].shape[1:] != here.shape[1:]:
                    said[base] = here.new_zeros((size, *here.shape[1:])), torch.full((size,), -1)
                before, by = said[base]
                tells = _by_row(here if here.dtype == torch.bool else here >= 0)
                elsewhere = (by[places] >= 0) & (by[places] != number)
                wrong = (_by_row(before[places] != here) & tells & elsewhere).nonzero()
                if len(wrong):
                    row = int(wrong[0])
                    place = int(places[row])
                    raise BatchKeyError(
                        f"Expected one id of each sample, but the tag `{key}` of sample {place} of"
                        f" {type(bases[base]).__name__} is {before[place].tolist()} in loader {int(by[place])} and"
                        f" {here[row].tolist()} in loader {number}. Give it the same id in both, or -1 in one, which"
                        " stands for unlabelled; to tell the loaders apart, name `'loader'`."
                    )
                before[places[tells]], by[places[tells]] = here[tells], number


def _by_row(x: Tensor) -> Tensor:
    """Whether anything in a row is true, ``(rows,)``."""
    return x.flatten(1).any(1) if x.ndim > 1 else x


def tag_array(dataset: Any, key: Any) -> Any:
    """The whole array of a tag, through subsets, concatenations and nested tags; None if there is none, or another
    dataset between.
    """

    def tag(dataset: Any) -> Tensor | None:
        found = (tags_of(dataset) or {}).get(key)
        return found if isinstance(found, Tensor) else None

    return _by_sample(dataset, tag) if isinstance(key, str) else None


def _by_sample(dataset: Any, of: Callable[[Any], Tensor | None]) -> Tensor | None:
    """A row for each sample, of the datasets that it comes from through subsets, concatenations and tags.

    Args:
        dataset: a dataset; anything else has no rows.
        of: the rows of a dataset that is neither a subset nor a concatenation; None where it has none.
    """
    if isinstance(dataset, Subset):
        rows = _by_sample(dataset.dataset, of)
        return None if rows is None else rows[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [rows for part in dataset.datasets if (rows := _by_sample(part, of)) is not None]
        return torch.cat(parts) if len(parts) == len(dataset.datasets) else None
    found = of(dataset)
    return found if found is not None or tags_of(dataset) is None else _by_sample(vars(dataset).get("dataset"), of)


def tags_of(dataset: Any) -> dict[str, Any] | None:
    """The tags of a tagged dataset, which has other attributes from the one inside of it."""
    tags = getattr(dataset, "__dict__", {}).get("tags")
    return tags if isinstance(tags, dict) else None


def _origins(bases: dict[int, Any], dataset: Any) -> Tensor | None:
    """For each sample of a dataset that is made of no other, which of ``bases`` that is, and the sample's number."""
    tagged = tags_of(dataset) is not None and "dataset" in vars(dataset)
    if tagged or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    bases[id(dataset)] = dataset
    return torch.stack([torch.full((len(dataset),), id(dataset)), torch.arange(len(dataset))], 1)
