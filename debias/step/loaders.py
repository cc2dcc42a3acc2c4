"""What each of several training loaders gave to a batch, and how their samples are numbered together."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debias.errors import BatchKeyError
from debias.step.batch import LOADER, key_parts
from debias.step.tagged import TaggedBatch, TaggedSample, split_tags

__all__ = ["Part", "holders", "join_ids", "open_batch"]


@dataclass(eq=False)
class Part:
    """What one loader gave to a batch.

    Attributes:
        tags: of its samples.
        path: keys and indices that lead to it in the batch of all loaders; none where it is that.
        loader: number of the loader.
        n: number of samples, None where nobody knows.
    """

    tags: dict[str, Any] = field(default_factory=dict)
    path: tuple[Any, ...] = ()
    loader: int = 0
    n: int | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return repr(".".join(map(str, self.path)))

    def batch_in(self, batch: Any) -> Any:
        """It in a batch of all loaders, which augmenters may have changed."""
        return functools.reduce(lambda inside, key: inside[key], self.path, batch)

    def holds(self, key: Any) -> bool:
        """Whether a tag or a place in the batch is of this loader."""
        if isinstance(key, str) and key in self.tags:
            return True
        if callable(key) or not self.path:
            return False
        return [str(x) for x in key_parts(key)[: len(self.path)]] == [str(x) for x in self.path]


def open_batch(batch: Any) -> tuple[Any, list[Part]]:
    """The bare batch, and what each loader gave to it; of a loader that is exhausted there is nothing.

    Args:
        batch: as the loaders, or a ``CombinedLoader`` of them, yield it: lists, tuples and dictionaries are searched.
    """
    bare, parts = _open(batch, ())
    for number, part in enumerate(parts):
        if part is not None:
            part.loader = number
    return bare, [part for part in parts if part is not None] or [Part()]


def _open(batch: Any, path: tuple[Any, ...]) -> tuple[Any, list[Part | None]]:
    """Nothing of a batch that says nothing of loaders; None for a loader that is exhausted."""
    if isinstance(batch, TaggedBatch | TaggedSample):
        bare, tags = split_tags(batch)
        n = getattr(batch, "n", None)
        if n is None and isinstance(batch, TaggedBatch):
            n = next((len(x) for x in tags.values() if isinstance(x, Tensor) and x.ndim), None)
        return bare, [Part(tags, path, n=n)]
    if type(batch) not in (list, tuple, dict):
        return batch, []
    keys = list(batch) if isinstance(batch, dict) else range(len(batch))
    opened = {key: _open(batch[key], (*path, key)) for key in keys}
    # Tagged samples alone are a batch of one loader that does not collate.
    if not any(found for key, (_, found) in opened.items() if not isinstance(batch[key], TaggedSample)):
        return batch, []
    parts: list[Part | None] = []
    for key, (child, found) in opened.items():
        parts += found or [None if child is None else Part(path=(*path, key))]
    bare = {key: child for key, (child, _) in opened.items()}
    return bare if isinstance(batch, dict) else type(batch)(bare.values()), parts


def holders(parts: Sequence[Part], key: Any, batch: Any, argument: str) -> list[Part]:
    """Of which loaders' samples a key, or a tuple of keys, gives the ids in a bare batch of several.

    Raises:
        BatchKeyError: that cannot be told.
    """
    found = list(parts)
    for name in key if isinstance(key, tuple) else (key,):
        of_name = list(_holders(parts, name, batch, argument))
        if not of_name:
            tags = sorted({tag for part in parts for tag in part.tags})
            raise BatchKeyError(
                f"Expected `{argument}={name!r}` to name a tag of a loader, or a place in the batch of one, but the"
                f" loaders {', '.join(part.name for part in parts)} have the tags {tags or 'none'}. Tag at least one:"
                f" `tag(dataset, {name if isinstance(name, str) and name.isidentifier() else 'name'}=ids)`."
            )
        if not any(part in found for part in of_name):
            raise BatchKeyError(
                f"Expected all keys of `{argument}={key!r}` to be of the same loader, but got `{name}` from"
                f" {of_name[0].name} and others from {found[0].name}: a sample has the ids of one. Tag that loader"
                " with all of them."
            )
        found = [part for part in found if part in of_name]
    return found


def _holders(parts: Sequence[Part], key: Any, batch: Any, argument: str) -> Iterator[Part]:
    if key == LOADER and not any(LOADER in part.tags for part in parts):
        for part in parts:
            if part.n is None:
                raise BatchKeyError(
                    f"Expected every loader to be a DataLoader that collates its batches for `{argument}='loader'`,"
                    f" but nothing tells how many samples {part.name} gave. Tag its samples with a number of your own,"
                    " and name that tag."
                )
        yield from parts
    elif callable(key):
        n = len(key(batch))
        of_size = [part for part in parts if part.n == n]
        if len(of_size) != 1:
            sizes = ", ".join(f"{part.n} of {part.name}" for part in parts)
            raise BatchKeyError(
                f"Expected the callable `{argument}` to return the ids of one loader, which its number of samples"
                f" tells, but got {n} ids, and {sizes}. Name the place in the batch, or tag the loaders."
            )
        yield of_size[0]
    else:
        yield from (part for part in parts if part.holds(key))


def join_ids(parts: Sequence[Part], found: Mapping[Part, Tensor], what: str) -> Tensor:
    """Ids of the samples of several loaders, one loader after the other.

    Args:
        parts: the loaders whose samples are numbered; how many samples each of them has is noted.
        found: the ids of those among them whose samples have ids; samples of the others get -1, or are in no group.
        what: the user's argument, for messages.
    """
    for part, ids in found.items():
        if part.n is None:
            part.n = len(ids)
        if len(ids) != part.n:
            raise BatchKeyError(
                f"Expected {what} to be one for each of the {part.n} samples of {part.name}, but got {len(ids)}."
                " Correct the key, or tag the loader."
            )
    first = next(iter(found.values()))
    none = False if first.dtype == torch.bool else -1
    return torch.cat([found[p] if p in found else first.new_full((p.n or 0, *first.shape[1:]), none) for p in parts])
