"""Reading parts of any batch, replacing them without touching the original, and carrying tags beside it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from debias.errors import BatchKeyError, RowsError
from debias.tap.batches import attributes, one_per_sample

__all__ = [
    "LOADER",
    "BatchKey",
    "input_of",
    "key_name",
    "key_parts",
    "map_samples",
    "plain_key",
    "read",
    "repeated",
    "replace",
]

LOADER = "loader"
"""The key of the number of the loader that a sample comes from, unless there is a tag of that name."""

BatchKey: TypeAlias = int | str | Callable[[Any], Any]
"""Where to look in a batch: an index, a name, a dotted path (``"image"``, ``"1.labels.place"``), or a callable of the
batch.

Every step of a path is an integer index, a mapping key or an attribute, whichever fits. A callable can only be given
from Python, never from YAML. Tags of ``debias.tag`` are looked up first. Where several keys are allowed the tuple is
the first type of the union: jsonargparse, which writes a value by the first type that takes it, would write a callable.
"""


def plain_key(key: Any) -> Any:
    """A key, or a tuple of keys whose ids are crossed; a list of any kind, OmegaConf's too, is a tuple of keys."""
    return tuple(key) if not isinstance(key, str) and isinstance(key, Sequence) else key


def key_name(key: Any) -> str | None:
    """A readable name of a key or tuple of keys (``"place"``, ``"target_place"``); None for a callable."""
    key = plain_key(key)
    if isinstance(key, tuple | list):
        names = [key_name(part) for part in key]
        return None if None in names else "_".join(str(name) for name in names)
    return None if callable(key) else str(key)


def read(batch: Any, key: BatchKey, tags: Mapping[str, Any] | None = None, *, argument: str = "key") -> Any:
    """What ``key`` names in ``batch``; tags come first.

    Args:
        batch: the batch as the step receives it.
        key: where to look.
        tags: tags carried beside the batch.
        argument: name of the user's argument, for the error message.

    Raises:
        BatchKeyError: nothing is there.
    """
    if callable(key):
        return key(batch)
    if tags and key in tags:
        return tags[str(key)]
    here: Any = batch
    done: list[str] = []
    for part in key_parts(key):
        try:
            here = _child(here, part)
        except (KeyError, IndexError, AttributeError, TypeError):
            where = f" at {'.'.join(done)!r}" if done else ""
            name = key if isinstance(key, str) and key.isidentifier() else "name"
            raise BatchKeyError(
                f"Expected `{argument}={key!r}` to name a part of the batch or a tag, but the batch{where} is"
                f" {describe(here)} and the tags are {sorted(tags) if tags else 'none'}. Correct the key, or give"
                f" the loader the tagged dataset: `DataLoader(tag(dataset, {name}=ids))`."
            ) from None
        done.append(str(part))
    return here


def input_of(
    network: Any, batch: Any, key: BatchKey, tags: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``input=`` says that a network is called with: what a key names, or what a callable of the batch returns,
    where a tuple holds several arguments by position, and a dictionary by name.

    Raises:
        BatchKeyError: nothing is there, or the network's ``forward`` has other arguments.
    """
    given = read(batch, key, tags, argument="input")
    several = callable(key) and (
        type(given) is tuple or isinstance(given, Mapping)
    )  # no tuple with names, as sequences
    args: tuple[Any, ...] = (given,) if not several else given if isinstance(given, tuple) else ()
    kwargs = dict(given) if several and isinstance(given, Mapping) else {}
    signature = inspect.signature(network.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BatchKeyError(
            f"Expected `input` to name what `forward{signature}` of {type(network).__name__} takes, but got"
            f" {describe(given)}: {error}. Pass a callable of the batch that returns its arguments: a tuple, or a"
            " dictionary by name; of one argument that is itself a dictionary, `lambda batch: (batch,)`."
        ) from None
    return args, kwargs


def replace(batch: Any, key: BatchKey, value: Any) -> Any:
    """A copy of ``batch`` with the part that ``key`` names replaced; containers on the way are copied, nothing else.

    Raises:
        BatchKeyError: nothing is there, or the key is a callable, which cannot be written through.
    """
    if callable(key):
        raise BatchKeyError(
            "Expected a key that can be written through (an index, a name or a dotted path), but got a callable."
            " Name the place in the batch instead."
        )
    return _replaced(batch, key_parts(key), value, key)


def repeated(batch: Any, index: Tensor, n: int) -> Any:
    """A batch with its n samples several times; ``index`` is int64 ``torch.arange(n)``, as often."""
    return map_samples(batch, n, lambda x: x[index], lambda items: items * (len(index) // n))


def map_samples(
    batch: Any,
    n: int,
    of_tensor: Callable[[Tensor], Tensor],
    of_list: Callable[[list[Any]], list[Any]],
    *,
    whole: bool = True,
) -> Any:
    """A copy of a batch with other samples; what does not belong to samples is the same.

    Mappings, lists, tuples, dataclasses and other objects with attributes are looked into.

    Args:
        batch: a batch of ``n`` samples.
        n: number of samples.
        of_tensor: makes the new rows of a tensor with ``n`` rows.
        of_list: makes the new elements of a list with one element per sample.
        whole: keep tensors of another number of rows as they are.

    Raises:
        RowsError: nothing in the batch has ``n`` rows, or something has another number and may not be kept.
    """
    mapping = _SampleMap(n, of_tensor, of_list, whole)
    changed = mapping(batch)
    if not mapping.found:
        raise RowsError(
            f"Expected the batch to hold tensors with a row, or lists with an element, for each of its {n} samples, so"
            f" that some can be taken, but got {describe(batch)} that shows none. Make it of tensors, lists, tuples,"
            " mappings or objects with attributes."
        )
    return changed


@dataclasses.dataclass
class _SampleMap:
    """What :func:`map_samples` does to each part of a batch."""

    n: int
    of_tensor: Callable[[Tensor], Tensor]
    of_list: Callable[[list[Any]], list[Any]]
    whole: bool
    found: bool = False
    _made: dict[int, Any] = dataclasses.field(default_factory=dict)  # objects may refer to each other

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            # The length of a strided nested tensor is an error of torch, its size is not.
            if not value.ndim or (value.size(0) if isinstance(value, Tensor) else len(value)) != self.n:
                if value.ndim and not self.whole:
                    raise RowsError(
                        f"Expected every tensor of the batch to have a row for each of its {self.n} samples, so that"
                        f" some of them can be taken, but got one of shape {tuple(value.shape)}: nodes of graphs, bags"
                        " or tokens of all samples joined? Give the samples one by one: padded, or as a list (torch's"
                        " `DataLoader(..., collate_fn=list)`) that the step joins, graphs by"
                        " `Batch.from_data_list(batch)`. Or use `losses='whole'` with a loss that can be taken apart."
                    )
                return value
            self.found = True
            if isinstance(value, Tensor) and not value.is_nested:
                return self.of_tensor(value)
            places = self.of_list(list(range(self.n)))
            if isinstance(value, np.ndarray):
                return value[places]
            rows = value.unbind()  # a nested tensor knows no index
            return torch.nested.as_nested_tensor([rows[i] for i in places], layout=value.layout)
        if isinstance(value, tuple | list):
            samples = one_per_sample(list(value), self.n) and not hasattr(value, "_fields")
            if samples and not any(map(self._is_long, value)):
                return self._of_samples(value)
            children: Mapping[Any, Any] = dict(enumerate(value))
        else:
            children = value if isinstance(value, Mapping) else attributes(value)
        if not children or id(value) in self._made:
            return self._made.get(id(value), value)
        self._made[id(value)] = value
        parts = self._parts(children)
        if any(part is not children[key] for key, part in parts.items()):
            self._made[id(value)] = _rebuilt(value, parts)
        return self._made[id(value)]

    def _parts(self, parts: Mapping[Any, Any]) -> dict[Any, Any]:
        # A pair (images, targets) of two samples is a pair, not one element per sample. And three images of three
        # channels could be three tensors with a row per sample; the targets beside them tell.
        told = any(self._is_long(part) and one_per_sample(list(part), self.n) for part in parts.values())
        return {k: self._of_samples(x) if told and self._is_long(x) else self(x) for k, x in parts.items()}

    def _is_long(self, value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) == self.n

    def _of_samples(self, items: Any) -> Any:
        self.found = True
        return type(items)(self.of_list(list(items)))


def _rebuilt(value: Any, parts: Mapping[Any, Any]) -> Any:
    """A copy of a container or object with these parts in the place of its own."""
    if isinstance(value, tuple | list):
        items = list(value)
        for i, part in parts.items():
            items[i] = part
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)({**value, **parts})  # type: ignore[call-arg]
    changed = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, Mapping) or isinstance(key, int):
            changed[key] = part
        else:
            object.__setattr__(changed, key, part)  # also of a frozen dataclass
    return changed


def describe(batch: Any) -> str:
    """The layout of a batch in a few words, for error messages."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {list(batch)}"
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return f"a {type(batch).__name__} with fields {list(batch._fields)}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def key_parts(key: int | str) -> list[int | str]:
    """The steps of a path: an index, or the names and indices between its dots."""
    if isinstance(key, int):
        return [key]
    return [int(part) if part.lstrip("-").isdigit() else part for part in key.split(".")]


def _child(here: Any, part: int | str) -> Any:
    if isinstance(here, Tensor | str):
        raise TypeError
    if isinstance(here, Mapping):
        return here[part] if part in here else here[str(part)]
    if isinstance(part, int):
        return here[part]
    return getattr(here, part)


def _replaced(here: Any, parts: list[int | str], value: Any, key: BatchKey) -> Any:
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    try:
        new = _replaced(_child(here, part), rest, value, key)
        if isinstance(here, Mapping):
            return _rebuilt(here, {part if part in here else str(part): new})
        if isinstance(part, int):
            return _rebuilt(here, {part: new})
        if isinstance(here, tuple):  # a field of a named one
            return _rebuilt(here, {here._fields.index(part): new})  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(here):
            return dataclasses.replace(here, **{part: new})  # type: ignore[type-var]
        result = copy.copy(here)
        setattr(result, part, new)
        return result
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise BatchKeyError(
            f"Expected `{key!r}` to name a part of the batch that can be replaced, but got {describe(here)} at"
            f" {part!r}. Correct the key."
        ) from error
