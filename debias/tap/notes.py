"""One operation of a step: a tensor, and what it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debias.tap.moves import ALONG, CASTS, LOOKUPS, MOVES, REDUCTIONS, SORTING, apply_move, axes_of, keeps_rows

__all__ = ["CHANGED", "Note", "first_version", "version"]

CHANGED = -3  # no tensor has this version, nor the one after it


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def first_version(tensor: Tensor) -> int:
    """:func:`version` of a tensor that an operation has just made.

    In a compiled graph it is taken for 0, as reading it would cut the graph in two. A view of something that was
    changed in place has another one: it then counts as changed, and its rows as unknown.
    """
    return 0 if torch.compiler.is_compiling() else version(tensor)


@dataclass(eq=False)
class Note:
    """A tensor, and where its rows come from: it is of the batch, an unreduced loss, or made of other tensors.

    Attributes:
        out: the tensor.
        version: of it, while what was done to it in place is understood.
        func: what made it; None for a root, or where that is unknown.
        args: arguments of that.
        kwargs: keyword arguments of that.
        part: which of several results it is.
        sample: the one sample that a root belongs to; None where it has a row for each.
        first: the sample of the first row of a root.
        loader: which of several loaders a root comes from, in the order in which their samples are numbered; None where
            it is not of the batch.
        known: whether ``sample`` or ``first`` tell the samples of a root.
        index: gives the sample numbers of another root.
    """

    out: Tensor
    version: int
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    part: int | None = None
    sample: int | None = None
    first: int = 0
    loader: int | None = None
    known: bool = False
    index: Callable[[], Tensor | None] | None = None

    @property
    def reduces(self) -> bool:
        """Whether it was made by reducing axes; `torch.max` of two tensors does not."""
        return self.func in REDUCTIONS and not (len(self.args) > 1 and isinstance(self.args[1], Tensor))

    @property
    def sources(self) -> list[Tensor]:
        """The tensors whose elements it holds."""
        if self.func in MOVES or self.func in CASTS or self.reduces or self.func in LOOKUPS:
            data = self.args[0]
            return [x for x in data if isinstance(x, Tensor)] if isinstance(data, tuple | list) else [data]
        return [x for x in self.args if isinstance(x, Tensor) and x.ndim and x.shape == self.out.shape]

    @property
    def same_rows(self) -> bool:
        """Whether row i is made of row i of one other tensor."""
        if self.reduces or self.func in ALONG:
            moved = self.out.ndim == 0 or 0 in axes_of(self.args, self.kwargs, self.args[0].ndim)
        else:
            moved = self.func in SORTING or (self.func in MOVES and not keeps_rows(self.func, self.args, self.out))
        return len(self.sources) == 1 and not moved

    def done_to(self, data: Any) -> Any:
        """What a move makes of other data of the same shape."""
        return apply_move(self.func, self.args, self.kwargs, data, self.part)
