"""The loaders of an evaluation, and which sample of its dataset each row of a batch is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from debias.errors import BatchKeyError

__all__ = ["evaluation_loaders", "evaluation_order", "evaluation_sets"]


def evaluation_loaders(trainer: Any) -> list[Any]:
    """The loaders of the validation or test that runs, in the order of ``dataloader_idx``.

    ``trainer.val_dataloaders`` is what the user gave: a loader, or lists and dictionaries of them.
    """
    return list(trainer._evaluation_loop._combined_loader.flattened)


def evaluation_sets(trainer: Any) -> list[Any]:
    """What values are logged of: each loader, or all of them together where a batch is of several."""
    combined = trainer._evaluation_loop._combined_loader
    return list(combined.flattened) if combined._mode == "sequential" else [combined]


def evaluation_order(loader: Any) -> Tensor:
    """Indices of the samples in the order in which this rank's loader yields them, int64 ``(samples,)``.

    Row ``j`` of batch ``i`` is sample ``order[i * batch_size + j]``.

    Raises:
        BatchKeyError: the order is not the same in every pass, or cannot be known without drawing from the sampler.
    """
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(loader, "sampler", None)
    if type(batch_sampler) is BatchSampler and _is_fixed(sampler):
        return torch.tensor(list(sampler), dtype=torch.int64)
    found = type(sampler if type(batch_sampler) is BatchSampler else batch_sampler or loader).__name__
    raise BatchKeyError(
        f"Expected an evaluation loader in a fixed order, so that every sample can be told by its place, but got"
        f" {found}. Leave out `shuffle`, or tag the samples, `tag(dataset, index=range(len(dataset)))`, and pass"
        " `index='index'`."
    )


def _is_fixed(sampler: Any) -> bool:
    if isinstance(sampler, DistributedSampler):
        # Lightning puts a distributed sampler around the user's own one, which it keeps here.
        inner = getattr(sampler.dataset, "_sampler", None)
        return not sampler.shuffle and (inner is None or _is_fixed(inner))
    return type(sampler) is SequentialSampler
