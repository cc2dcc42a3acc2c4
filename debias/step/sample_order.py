"""Whether a ``collate_fn`` keeps the order of its samples, which is what tells whose tag is whose."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from debias.step.random import undisturbed

__all__ = ["reorders"]

_DEPTH = 3  # how deep the parts of a batch are looked for


def reorders(collate_fn: Callable[[Any], Any], samples: list[Any], batch: Any) -> bool:
    """Whether ``collate_fn`` puts samples into an order of its own; False where that cannot be told.

    It is called again with the samples in another order: the rows of the result should be in that order too. And in the
    same order, twice: what differs then is drawn at random. Python's, NumPy's and PyTorch's random numbers go on as if
    it had not been called.

    Args:
        collate_fn: what made the batch.
        samples: copies of the samples, in the order in which they were collated; they may be changed.
        batch: what came of them.
    """
    n = len(samples)
    try:
        with undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            order = _another_order(n)
            one, again = copy.deepcopy(samples[0]), [copy.deepcopy(samples) for _ in range(2)]
            before, after = _parts(batch, n), _parts(collate_fn([samples[i] for i in order]), n)
            # By where they are: the rows, as they should be in that order, and as they are.
            found = [(path, [rows[i] for i in order], after[path]) for path, rows in before.items() if path in after]
            once_more = [_parts(collate_fn(copies), n) for copies in again]
            drawn = {path for path, rows in before.items() if any(parts.get(path) != rows for parts in once_more)}
            # What is drawn at random tells nothing beside parts that are in place, or that are no samples any more.
            if any(Counter(a) != Counter(b) or (path not in drawn and a == b) for path, a, b in found):
                found = [part for part in found if part[0] not in drawn]
            # What Mixup pairs a sample with is in another order, but not what it is paired with; of two parts of a
            # batch the one that tells more samples apart is right.
            kept = max((len(set(a)) for _, a, b in found if b == a), default=0)
            moved = [p for p, a, b in found if b != a and Counter(a) == Counter(b) and len(set(a)) > kept]
            if not moved:
                return False
            # Positions and names stay in place whatever the samples are; rows of equal samples are equal.
            alike = _parts(collate_fn([copy.deepcopy(one) for _ in samples]), n)
            return any(len(set(alike.get(path, ()))) == 1 for path in moved)
    except Exception:  # nothing can be learnt from samples that cannot be copied or collated in another order
        return False


def _another_order(n: int) -> list[int]:
    """A permutation of ``n``, always the same one.

    Turned round, rotated or interleaved batches show in it too: with this seed, and from three samples on, it commutes
    with none of these.
    """
    order = list(range(n))
    random.Random(19).shuffle(order)
    return order


def _parts(value: Any, n: int, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], list[Any]]:
    """The parts of a batch with ``n`` rows, by where they are; rows as something that can be compared and hashed."""
    if isinstance(value, PackedSequence):
        value = pad_packed_sequence(value, batch_first=True)[0]
    if isinstance(value, Tensor | np.ndarray):
        return {path: [_content(row) for row in value]} if value.ndim and len(value) == n else {}
    found = {}
    if isinstance(value, list | tuple) and len(value) == n:
        found[path] = [_content(item) for item in value]
    if len(path) < _DEPTH:
        for key, part in _children(value):
            found |= _parts(part, n, (*path, key))
    return found


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple):
        return enumerate(value)
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return tuple(data.shape), data.dtype, hash(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, hash(value.tobytes())
    if isinstance(value, str | bytes | int | float | np.generic | None):
        return value
    children = [(key, _content(part)) for key, part in _children(value)]
    return (type(value), *children) if children else object()  # the latter equals nothing
