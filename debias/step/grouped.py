"""What methods that reweigh by group share on Lightning's side: ids, counts of the training set, bad rows, logging."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
)

from debias.errors import BatchKeyError, DebiasError
from debias.step.batch import BatchKey, plain_key, split_tags
from debias.step.context import Step
from debias.step.random import undisturbed
from debias.step.tap import LossCall
from debias.step.watcher import MAX_LOGGED_GROUPS, Debiaser, default_name

__all__ = ["GroupDebiaser", "can_count", "check_keys", "count_groups", "empty_groups", "plain_n_groups", "tag_counts"]


class GroupDebiaser(Debiaser):
    """A method that reweighs the loss by group; its module does the maths.

    Args:
        group: where the group ids are: a BatchKey, or a tuple of them whose ids are crossed.
        n_groups: number of groups, one per key.
        **options: see :class:`Debiaser`.

    On logging steps it logs what the module's ``by_group()`` returns: a value a group, or of more than
    ``MAX_LOGGED_GROUPS`` groups the largest one, ``train/worst_group_<value>`` for a key ``<value>_by_group`` and
    ``train/max_<key>`` for another.

    A subclass whose groups go by another name, such as domains, says so in ``needs``: messages then speak of ``domain``
    and ``n_domains``.
    """

    needs: ClassVar[tuple[str, ...]] = ("group",)
    stateful: ClassVar[bool] = True
    module: Any

    def __init__(
        self, group: tuple[BatchKey, ...] | BatchKey, n_groups: int | Sequence[int], *, name: str | None, **options: Any
    ) -> None:
        super().__init__(name=default_name(name, group, self.needs[0]), **options)
        check_keys(group, n_groups, self.needs[0])
        self.group = plain_key(group)
        self.n_groups = plain_n_groups(n_groups)
        self._said_unlabelled = False
        self._counted: Tensor | None = None  # in the last fit

    def sample_ids(self, step: Step) -> Tensor:
        """Group ids ``(N,)`` or membership ``(N, G)``."""
        ids = step.ids(self.group, self.n_groups, argument=self.needs[0])
        if ids.dtype == torch.bool and ids.shape[1] != self.module.n_groups:
            raise BatchKeyError(
                f"Expected the membership `{self.needs[0]}={self.group!r}` to have shape (N, {self.module.n_groups}),"
                f" but got {tuple(ids.shape)}. Correct `n_{self.needs[0]}s`."
            )
        return ids

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The module's losses for these calls; bad rows raise on CPU at once, elsewhere on logging steps."""
        ids = self.sample_ids(step)
        device = str(calls[0].num.device.type)
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            losses = self.module.reweigh([(call.num, call.den, call.of_rows(ids)) for call in calls])
        if step.logging:
            self.module.raise_if_bad()
            for key, values in self.module.by_group().items():
                if self.module.n_groups > MAX_LOGGED_GROUPS:
                    known = torch.where(values.isnan(), -torch.inf, values)  # not of groups that the batch lacks
                    self.log_value(_largest(key), known.amax(), step)
                    continue
                for name, value in zip(self.module.group_names, values.unbind(), strict=True):
                    self.log_value(f"{key}/{name}", value, step)
            # What the step logs itself may be the reweighed loss.
            self.log_value("average_loss", torch.stack([call.mean().detach() for call in calls]).sum(), step)
        return losses

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the groups of the training set, if the method needs it and nobody gave or saved the counts; else say
        which ones have no sample, where tags tell.
        """
        if self.module.needs_counts:
            counted = self._counted is not None and torch.equal(self._counted, self.module.counts.cpu())
            if counted or not self.module.has_counts:  # of another fit, perhaps on other data
                self.module.set_counts(count_groups(trainer, self.group, self.n_groups, argument=self.needs[0]))
                self._counted = self.module.counts.cpu().clone()
            return
        counts = tag_counts(trainer, trainer.train_dataloader, self.group, self.n_groups)
        empty = empty_groups(counts, self.module.group_names)
        if empty and trainer.is_global_zero:
            warnings.warn(
                f"{self.state_key} was given `n_{self.needs[0]}s={self.n_groups}`, but the tags of the training set"
                f" hold no sample of {empty}. If that counts too many, correct it; else these take no part.",
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; saved counts are not counted anew."""
        super().load_state_dict(state_dict)
        self._counted = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid, nor the first one with unlabelled rows alone."""
        self.module.raise_if_bad()
        if self.module.only_unlabelled() and not self._said_unlabelled:
            self._said_unlabelled = True
            if trainer.is_global_zero:
                warnings.warn(
                    f"{self.state_key} has seen no labelled sample in this epoch: all ids of"
                    f" `{self.needs[0]}={self.group!r}` were negative, so the loss had no gradient. Check the ids; -1"
                    " stands for unlabelled.",
                    stacklevel=2,
                )


def _largest(key: str) -> str:
    """What the largest value is called: ``worst_group_loss`` of ``loss_by_group``, else ``max_...``."""
    value, by, kind = key.partition("_by_")
    return f"worst_{kind}_{value}" if by else f"max_{key}"


def plain_n_groups(n_groups: Any) -> Any:
    """A number of groups, or one per key, in Python's own integers; anything else as it is."""
    n_groups = plain_key(n_groups)
    if isinstance(n_groups, tuple | list):
        return type(n_groups)(plain_n_groups(size) for size in n_groups)
    return int(n_groups) if isinstance(n_groups, Integral) and not isinstance(n_groups, bool) else n_groups


def check_keys(key: Any, n_groups: Any, argument: str = "group") -> None:
    """Refuse keys that are to be crossed without a number of groups for each of them.

    Raises:
        DebiasError: there are not as many numbers as keys.
    """
    key, n_groups = plain_key(key), plain_key(n_groups)
    keys = len(key) if isinstance(key, tuple | list) else 1
    sizes = len(n_groups) if isinstance(n_groups, tuple | list) else 1
    if keys != sizes:
        raise DebiasError(
            f"Expected `n_{argument}s` to hold one number for each key of `{argument}={key!r}`, but got {n_groups!r}."
            f" Write e.g. `{argument}=('target', 'place'), n_{argument}s=(2, 2)`."
        )


def count_groups(trainer: Any, key: Any, n_groups: int | Sequence[int], *, argument: str = "group") -> Tensor:
    """Number of training samples of each group, the same on every rank.

    Tags are counted as they stand; ids inside the batch take one pass over the training set.

    Returns:
        float64 ``(G,)``.

    Raises:
        DebiasError: the training data has no length.
    """
    counts = None
    for loader in _train_loaders(trainer):
        dataset = getattr(loader, "dataset", None)
        if not _has_rows(dataset):
            raise DebiasError(
                f"Expected `{argument}_counts` to be given where the training data cannot be counted, but got"
                f" {type(dataset if dataset is not None else loader).__name__}. Pass `{argument}_counts=[...]`."
            )
        _warn_of_sampler(loader, trainer, argument)
        found = _count(loader, key, n_groups, trainer, argument)
        counts = found if counts is None else counts + found
    return counts  # type: ignore[return-value]


def tag_counts(trainer: Any, loaders: Any, key: Any, n_groups: int | Sequence[int]) -> Tensor | None:
    """Samples of each group in the datasets of these loaders, ``(G,)``; None where their tags do not tell, so that it
    would take a pass over the data.
    """
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    counts = torch.zeros(1)
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        if (tags := _tags(_drawn_from(loader), key)) is None:
            return None
        try:
            counts = counts + _sum_up([(None, tags)], key, n_groups, trainer)
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
    return all(_has_rows(getattr(loader, "dataset", None)) for loader in _train_loaders(trainer))


def _train_loaders(trainer: Any) -> list[Any]:
    loaders = trainer.train_dataloader
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _has_rows(dataset: Any) -> bool:
    return dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def _count(loader: Any, key: Any, n_groups: Any, trainer: Any, argument: str) -> Tensor:
    dataset = _drawn_from(loader)
    if (tags := _tags(dataset, key)) is not None:
        return _sum_up([(None, tags)], key, n_groups, trainer, argument)
    with undisturbed():
        parts = [split_tags(b) for b in DataLoader(dataset, batch_size=256, collate_fn=loader.collate_fn)]
    return _sum_up(parts, key, n_groups, trainer, argument)


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


def _warn_of_sampler(loader: Any, trainer: Any, argument: str) -> None:
    sampler = _sampler(loader)
    known = isinstance(sampler, SubsetRandomSampler | list | tuple | range | None)
    if known or _OF_WHOLE_DATASETS & {kind.__name__ for kind in type(sampler).__mro__} or not trainer.is_global_zero:
        return
    warnings.warn(
        f"The {argument}s of the whole training set were counted, since nothing tells whether {type(sampler).__name__}"
        f" draws from all of it. If it leaves samples out, pass `{argument}_counts=[...]`, or a `Subset` as dataset.",
        stacklevel=2,
    )


def _sum_up(parts: Any, key: Any, n_groups: Any, trainer: Any, argument: str = "group") -> Tensor:
    total = torch.zeros(1)
    for batch, tag_values in parts:
        step = Step(trainer, _OnCPU, "train", batch, tag_values)
        ids = step.ids(key, n_groups, argument=argument)
        size = int(torch.tensor(n_groups).prod())
        found = (
            ids.sum(0).double()
            if ids.dtype == torch.bool
            else torch.bincount(ids[(ids >= 0) & (ids < size)], minlength=size)
        )
        total = total + found.double()
    return total


class _OnCPU:
    device = torch.device("cpu")


def _tags(dataset: Any, key: Any) -> dict[str, Any] | None:
    """The whole arrays of the tags that a key names; None unless all of it is tags."""
    keys = list(key) if isinstance(key, tuple | list) else [key]
    tags = {str(k): _tag_array(dataset, k) for k in keys}
    return None if any(array is None for array in tags.values()) else tags


def _tag_array(dataset: Any, key: Any) -> Any:
    """The whole array of a tag, through subsets, concatenations and nested tags; None if there is none, or another
    dataset between.
    """
    if isinstance(dataset, Subset):
        inner = _tag_array(dataset.dataset, key)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_tag_array(part, key) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)
    if not hasattr(dataset, "__dict__"):
        return None
    tags = vars(dataset).get("tags")
    if not isinstance(tags, dict) or not isinstance(key, str):
        return None
    return tags[key] if isinstance(tags.get(key), Tensor) else _tag_array(vars(dataset).get("dataset"), key)
