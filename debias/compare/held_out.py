"""Leave one training domain out: train without it, validate on it alone, and never look at the test set.

Gulrajani & Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021, sec. 3.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from debias.data.tagging import TaggedDataset
from debias.errors import DataError

__all__ = ["hold_out"]


def hold_out(datamodule: Any, domain: int, tag: str = "domain") -> None:
    """Change a data module so that its ``setup`` takes ``domain`` out of the training set and makes it the validation.

    Args:
        datamodule: keeps its data as ``train_set`` and ``val_set``, datasets made by :func:`debias.tag`, as all of
            ``debias.data`` do.
        domain: id of the domain.
        tag: name of the tag that holds the domains.

    Raises:
        DataError: at ``setup``: it keeps no such datasets, or one of them would be empty.
    """
    original = datamodule.setup

    @functools.wraps(original)
    def setup(stage: str | None = None) -> None:
        original(stage)
        if stage not in (None, "fit", "validate"):
            return
        for name, inside in (("train_set", False), ("val_set", True)):
            dataset = getattr(datamodule, name, None)
            if not isinstance(dataset, TaggedDataset) or not isinstance(dataset.tags.get(tag), Tensor):
                raise DataError(
                    f"Expected `{type(datamodule).__name__}.{name}` to be a dataset with the tag `{tag}`, to leave a"
                    " domain out. Make it with `debias.tag`, or choose by another rule."
                )
            rows = ((dataset.tags[tag] == domain) == inside).nonzero().flatten()
            if not len(rows):
                raise DataError(f"Expected `{name}` to have samples {'of' if inside else 'beside'} domain {domain}.")
            setattr(datamodule, name, _rows(dataset, rows))
        if isinstance(getattr(datamodule, "train_groups", None), Tensor):
            before = datamodule.train_groups
            datamodule.train_groups = datamodule.train_set.tags["group"]
            datamodule.group_counts = torch.bincount(datamodule.train_groups, minlength=len(datamodule.group_names))
            datamodule.left_out = frozenset(before.tolist()) - frozenset(datamodule.train_groups.tolist())

    datamodule.setup = setup


def _rows(dataset: TaggedDataset, rows: Tensor) -> TaggedDataset:
    tags = {name: ids if callable(ids) else ids[rows] for name, ids in dataset.tags.items()}
    return TaggedDataset(Subset(dataset.dataset, rows.tolist()), tags)
