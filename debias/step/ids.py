"""Reading the ids of samples (groups, domains, identities) from a batch and its tags, in one place for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from debias.errors import BatchKeyError, DebiasError
from debias.ops.groups import name_groups
from debias.step import batch as batches
from debias.step.batch import BatchKey, plain_key

__all__ = ["check_keys", "names_in_data", "plain_key", "plain_n_groups", "read_ids"]


def plain_n_groups(n_groups: Any) -> Any:
    """A number of groups, or one per key, in Python's own integers; anything else as it is."""
    if isinstance(n_groups, Sequence) and not isinstance(n_groups, str):
        sizes = [plain_n_groups(size) for size in n_groups]
        return tuple(sizes) if isinstance(n_groups, tuple) else sizes
    return int(n_groups) if isinstance(n_groups, Integral) and not isinstance(n_groups, bool) else n_groups


def check_keys(key: Any, n_groups: Any, argument: str = "group") -> None:
    """Refuse keys that are to be crossed without a number of groups for each of them.

    Raises:
        DebiasError: there are not as many numbers as keys.
    """
    key, n_groups = plain_key(key), plain_n_groups(n_groups)
    keys = len(key) if isinstance(key, tuple) else 1
    sizes = len(n_groups) if isinstance(n_groups, tuple | list) else 1
    if keys != sizes:
        raise DebiasError(
            f"Expected `n_{argument}s` to hold one number for each key of `{argument}={key!r}`, but got {n_groups!r}."
            f" Write e.g. `{argument}=('target', 'place'), n_{argument}s=(2, 2)`."
        )


def names_in_data(trainer: Any, key: Any, names: Sequence[str], n_groups: Any) -> list[str]:
    """Names of the groups of a key: given ones, else those that the data module holds as ``<key>_names``.

    Another number of names there is of something else, so that the numbers, as which ``names`` come, stay.

    Raises:
        DebiasError: two of the data module's names are the same.
    """
    held = getattr(getattr(trainer, "datamodule", None), f"{key}_names", None) if isinstance(key, str) else None
    if list(names) != name_groups(n_groups, None) or not isinstance(held, Sequence) or len(held) != len(names):
        return list(names)
    return name_groups(n_groups, held, str(key))


def read_ids(
    batch: Any,
    tags: Mapping[str, Any],
    key: Any,
    count: int | Sequence[int],
    device: torch.device,
    *,
    argument: str = "group",
    look: bool = False,
) -> Tensor:
    """Ids of the samples of a batch and its tags, as :meth:`debias.step.context.Step.ids` returns them.

    With ``look`` values may be read, so that integers of 0 and 1 are known for a membership.
    """
    key = plain_key(key)
    if not isinstance(key, tuple):
        return _ids(batch, tags, key, device, argument, look)
    parts = [_ids(batch, tags, k, device, argument, look) for k in key]
    shapes = [tuple(part.shape) for part in parts]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise BatchKeyError(
            f"Expected the keys of the crossed `{argument}={key!r}` to hold ids of the same shape (N,), but got"
            f" shapes {', '.join(map(str, shapes))}. A membership cannot be crossed with other ids: cross it"
            " yourself, and give one membership (N, G) of all crossed groups."
        )
    ids = torch.zeros_like(parts[0])
    unlabelled = bad = torch.zeros_like(ids, dtype=torch.bool)
    total = 1
    for part, size in zip(parts, count if isinstance(count, Sequence) else [count], strict=True):
        ids, total = ids * size + part, total * size
        unlabelled, bad = unlabelled | (part < 0), bad | (part >= size)
    return torch.where(bad, total, torch.where(unlabelled, -1, ids))


def _ids(batch: Any, tags: Mapping[str, Any], key: BatchKey, device: torch.device, argument: str, look: bool) -> Tensor:
    value = batches.read(batch, key, tags, argument=argument)
    try:
        here = isinstance(value, Tensor) and value.device == device
        ids = value if here else torch.as_tensor(value).to(device, non_blocking=device.type != "cpu")
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.is_floating_point() or ids.is_complex():
        raise BatchKeyError(
            f"Expected `{argument}={key!r}` to hold integer ids of shape (N,), but got {batches.describe(value)}"
            f"{'' if ids is None else f' of {ids.dtype}'}. Number the groups 0, 1, 2, ..., -1 for unlabelled."
        )
    shows = (
        look and ids.ndim == 2 and ids.shape[1] > 1 and bool(((ids == 0) | (ids == 1)).all())
    )  # waits for the device
    if ids.ndim == 2 and (ids.dtype == torch.bool or shows):
        return ids.bool()
    if ids.ndim != 1:
        hint = " Turn a membership of 0 and 1 into booleans: `membership.bool()`." if ids.ndim == 2 else ""
        raise BatchKeyError(
            f"Expected `{argument}={key!r}` to hold ids of shape (N,), or a boolean membership (N, G), but got"
            f" shape {tuple(ids.shape)} of {ids.dtype}. Give one id per sample.{hint}"
        )
    return ids.long()
