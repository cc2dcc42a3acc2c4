"""What ranks and loaders have to agree on: one error on all ranks, where one of them would wait for the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from debias.errors import BatchKeyError, DebiasError
from debias.ops.distributed import gather_objects, is_distributed
from debias.step.loaders import Part

__all__ = ["Agreement", "flat_loaders", "refuse_contradictions", "tag_array"]


class Agreement:
    """Keeps the ranks of one fit together."""

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._ends = False  # whether the ranks tell each other when their data ends
        self._group: Any = None
        self._ending: tuple[Tensor, Any] | None = None

    def begins(self, epoch: int) -> bool:
        """Whether this is the first step of an epoch."""
        return self._epoch != epoch

    def check(self, trainer: Any, parts: Sequence[Part], problem: DebiasError | None) -> None:
        """In the first step of an epoch, before the user's step: refuse on all ranks what one of them refuses.

        Args:
            trainer: the running Trainer.
            parts: what each loader gave to the batch.
            problem: what this rank refuses.

        Raises:
            DebiasError: on all ranks: one of them has a problem, or they have different numbers of batches, or
                different tags.
        """
        self._epoch = trainer.current_epoch
        if not is_distributed():
            if problem is not None:
                raise problem
            return
        loaders = flat_loaders(trainer.train_dataloader)
        layout = {".".join(map(str, part.path)): ", ".join(sorted(part.tags)) or "none" for part in parts}
        of_ranks = gather_objects((problem, trainer.num_training_batches, layout, any(map(_is_stream, loaders))))
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

    def start(self, trainer: Any) -> None:
        """Tell the other ranks whether this is the last batch, where the length of the data does not tell.

        The message goes beside the others, on the CPU: nothing waits for the device.
        """
        if not self._ends:
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
        flag = torch.tensor([float(last)])
        self._ending = flag, dist.all_reduce(flag, group=self._group, async_op=True)

    def end(self) -> None:
        """After the forward pass: refuse ranks of which some have more batches.

        Raises:
            DebiasError: on all ranks, in the step that is the last one of some of them.
        """
        if self._ending is None:
            return
        (flag, work), self._ending = self._ending, None
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


def _is_stream(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)


def refuse_contradictions(loaders: Sequence[Any], keys: Iterable[str]) -> None:
    """Refuse tags that say different things of one sample that two loaders draw from.

    It is one sample where both draw from the same dataset, through subsets, concatenations and tags; ids of -1 say
    nothing.

    Args:
        loaders: of the training.
        keys: the tags that methods read.

    Raises:
        BatchKeyError: naming the sample and both ids.
    """
    for key in keys:
        said: dict[int, tuple[Tensor, Tensor]] = {}  # by dataset: the ids of its samples, and the loader that said them
        for number, loader in enumerate(loaders):
            dataset = getattr(loader, "dataset", None)
            ids = tag_array(dataset, key)
            if ids is None or ids.is_floating_point():
                continue
            for base, places, rows in _origins(dataset):
                here = ids[rows]
                if id(base) not in said or said[id(base)][0].shape[1:] != here.shape[1:]:
                    said[id(base)] = here.new_zeros((len(base), *here.shape[1:])), torch.full((len(base),), -1)
                before, by = said[id(base)]
                tells = _by_row(here if here.dtype == torch.bool else here >= 0)
                elsewhere = (by[places] >= 0) & (by[places] != number)
                wrong = (_by_row(before[places] != here) & tells & elsewhere).nonzero()
                if len(wrong):
                    row = int(wrong[0])
                    place = int(places[row])
                    raise BatchKeyError(
                        f"Expected one id of each sample, but the tag `{key}` of sample {place} of"
                        f" {type(base).__name__} is {before[place].tolist()} in loader {int(by[place])} and"
                        f" {here[row].tolist()} in loader {number}. Give it the same id in both, or -1 in one, which"
                        " stands for unlabelled; to tell the loaders apart, name `'loader'`."
                    )
                before[places[tells]], by[places[tells]] = here[tells], number


def _by_row(x: Tensor) -> Tensor:
    """Whether anything in a row is true, ``(rows,)``."""
    return x.flatten(1).any(1) if x.ndim > 1 else x


def _origins(dataset: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """The datasets that the samples come from: each with the places there of the samples, and their rows here."""
    if isinstance(dataset, Subset):
        chosen = torch.as_tensor(dataset.indices)
        found = []
        for base, places, rows in _origins(dataset.dataset):
            where = torch.full((len(dataset.dataset),), -1)  # type: ignore[arg-type]
            where[rows] = places
            of_base = (where[chosen] >= 0).nonzero().flatten()
            found.append((base, where[chosen[of_base]], of_base))
        return found
    if isinstance(dataset, ConcatDataset):
        starts = [0, *dataset.cumulative_sizes]
        return [
            (base, places, rows + start)
            for start, part in zip(starts, dataset.datasets, strict=False)
            for base, places, rows in _origins(part)
        ]
    inside = vars(dataset) if hasattr(dataset, "__dict__") else {}
    if isinstance(inside.get("tags"), dict) and "dataset" in inside:
        return _origins(inside["dataset"])
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return []
    everything = torch.arange(len(dataset))
    return [(dataset, everything, everything)]


def tag_array(dataset: Any, key: Any) -> Any:
    """The whole array of a tag, through subsets, concatenations and nested tags; None if there is none, or another
    dataset between.
    """
    if isinstance(dataset, Subset):
        inner = tag_array(dataset.dataset, key)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [tag_array(part, key) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)
    if not hasattr(dataset, "__dict__"):
        return None
    tags = vars(dataset).get("tags")
    if not isinstance(tags, dict) or not isinstance(key, str):
        return None
    return tags[key] if isinstance(tags.get(key), Tensor) else tag_array(vars(dataset).get("dataset"), key)
