"""What methods that reweigh by group share on Lightning's side: ids, counts of the training set, bad rows, logging."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from debias.errors import BatchKeyError, DebiasError
from debias.step.batch import BatchKey, split_tags
from debias.step.context import Step
from debias.step.tap import LossCall
from debias.step.watcher import Debiaser, default_name

__all__ = ["GroupDebiaser", "can_count", "count_groups"]


class GroupDebiaser(Debiaser):
    """A method that reweighs the loss by group; its module does the maths.

    Args:
        group: where the group ids are: a BatchKey, or a tuple of them whose ids are crossed.
        n_groups: number of groups, one per key.
        **options: see :class:`Debiaser`.

    A subclass whose groups go by another name, such as domains, says so in ``needs``: messages then speak of ``domain``
    and ``n_domains``.
    """

    needs: ClassVar[tuple[str, ...]] = ("group",)
    stateful: ClassVar[bool] = True
    module: Any

    def __init__(
        self, group: BatchKey | tuple[BatchKey, ...], n_groups: int | Sequence[int], *, name: str | None, **options: Any
    ) -> None:
        super().__init__(name=default_name(name, group, self.needs[0]), **options)
        keys = len(group) if isinstance(group, tuple | list) else 1
        sizes = len(n_groups) if isinstance(n_groups, tuple | list) else 1
        if keys != sizes:
            raise DebiasError(
                f"Expected `n_{self.needs[0]}s` to hold one number for each key of `{self.needs[0]}={group!r}`, but got"
                f" {n_groups!r}. Write e.g. `{self.needs[0]}=('target', 'place'), n_{self.needs[0]}s=(2, 2)`."
            )
        self.group = group
        self.n_groups = n_groups

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
                for name, value in zip(self.module.group_names, values.unbind(), strict=True):
                    self.log_value(f"{key}/{name}", value, step)
        return losses

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the groups of the training set once, if the method needs it and nobody gave or saved the counts."""
        if self.module.needs_counts and not self.module.has_counts:
            self.module.set_counts(count_groups(trainer, self.group, self.n_groups, argument=self.needs[0]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid."""
        self.module.raise_if_bad()


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
        found = _count(loader, dataset, key, n_groups, trainer, argument)
        counts = found if counts is None else counts + found
    return counts  # type: ignore[return-value]


def can_count(trainer: Any) -> bool:
    """Whether the training data can be counted: it is no stream."""
    return all(_has_rows(getattr(loader, "dataset", None)) for loader in _train_loaders(trainer))


def _train_loaders(trainer: Any) -> list[Any]:
    loaders = trainer.train_dataloader
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]


def _has_rows(dataset: Any) -> bool:
    return dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def _count(loader: Any, dataset: Any, key: Any, n_groups: Any, trainer: Any, argument: str) -> Tensor:
    if isinstance(sampler := getattr(loader, "sampler", None), SubsetRandomSampler):
        dataset = Subset(dataset, list(sampler.indices))
    keys = list(key) if isinstance(key, tuple | list) else [key]
    tags = [_tag_array(dataset, k) for k in keys]
    if all(t is not None for t in tags):
        parts: Any = [(None, dict(zip([str(k) for k in keys], tags, strict=True)))]
    else:
        with torch.random.fork_rng(devices=[]):
            parts = [split_tags(b) for b in DataLoader(dataset, batch_size=256, collate_fn=loader.collate_fn)]
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


def _tag_array(dataset: Any, key: Any) -> Any:
    """The whole array of a tag, through subsets and nested tags; None if there is none, or another dataset between."""
    if isinstance(dataset, Subset):
        inner = _tag_array(dataset.dataset, key)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    tags = vars(dataset).get("tags")
    if not isinstance(tags, dict) or not isinstance(key, str):
        return None
    return tags[key] if isinstance(tags.get(key), Tensor) else _tag_array(vars(dataset).get("dataset"), key)
