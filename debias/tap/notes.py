"""The operations of a step that were recorded: what each tensor was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debias.tap.calls import shares_memory
from debias.tap.moves import (
    BY_PLACE,
    JOINING,
    apply_move,
    axes_of,
    keeps_rows,
    named,
    read_arguments,
    tensors_in,
    values_read,
)

__all__ = ["CHANGED", "LOST", "Note", "Notes", "first_version", "version"]

_CHOSEN = named("__getitem__ masked_select")
LOST = ("sorting", "putting")  # kinds after which nobody knows where a row is
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


def _memory_of(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


@dataclass(eq=False)
class Note:
    """A tensor, and where its rows come from: it is of the batch, an unreduced loss, or made of other tensors.

    Attributes:
        out: the tensor.
        version: of it, while what was done to it in place is understood.
        func: what made it; None for a root, or where that is unknown.
        args: arguments of that.
        kwargs: keyword arguments of that.
        kind: what that does to rows (:func:`debias.tap.moves.kind_of`).
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
    kind: str | None = None
    part: int | None = None
    sample: int | None = None
    first: int = 0
    loader: int | None = None
    known: bool = False
    index: Callable[[], Tensor | None] | None = None

    @property
    def sources(self) -> list[Tensor]:
        """The tensors whose elements it holds."""
        if self.func is None:
            return []
        if self.kind in ("move", "cast", "reduction", "lookup"):
            data = self.args[0]
            return [x for x in data if isinstance(x, Tensor)] if isinstance(data, tuple | list) else [data]
        return [x for x in self.operands if x.ndim and x.shape == self.out.shape]

    @property
    def operands(self) -> list[Tensor]:
        """The tensors whose values it was computed of."""
        return [x for x in values_read(self.func, self.args, self.kwargs) if x is not self.out]

    @property
    def mask(self) -> Tensor | None:
        """The mask that elements were chosen by; None where there is none."""
        key = self.args[1] if self.func in _CHOSEN and len(self.args) > 1 else None
        key = key[0] if isinstance(key, tuple) and key else key  # `z[mask, :]`
        return key if isinstance(key, Tensor) and key.dtype == torch.bool else None

    @property
    def places(self) -> list[Tensor]:
        """The tensors whose values say where a move puts elements."""
        return tensors_in((read_arguments(self.func, self.args)[1:], self.kwargs)) if self.kind == "move" else []

    @property
    def same_rows(self) -> bool:
        """Whether row i is made of row i of each of its sources."""
        if self.kind in ("reduction", "along"):
            moved = self.out.ndim == 0 or 0 in axes_of(self.args, self.kwargs, self.args[0].ndim)
        elif self.kind == "move":  # of what is joined, as many as there are in the first
            data = self.args[0][:1] if isinstance(self.args[0], tuple | list) else self.args[:1]
            moved = not keeps_rows(self.func, (*data, *self.args[1:]), self.out)
        else:
            moved = self.kind in LOST
        return not moved and len(self.sources) > 0

    def done_to(self, data: Any) -> Any:
        """What a move makes of other data of the same shape."""
        return apply_move(self.func, self.args, self.kwargs, data, self.part)


class Notes:
    """The notes of one step, and what they say of the tensors: of what each was made."""

    def __init__(self) -> None:
        self._records: list[Note] = []  # last ones last

    @property
    def roots(self) -> list[Tensor]:
        """The tensors of the batch, those of strangers too."""
        return [note.out for note in self._records if note.func is None]

    def moves(self, tensor: Tensor, source: Tensor) -> list[Note] | None:
        """The moves that made ``tensor`` of ``source``, first to last; None where it was made in another way."""
        made: list[Note] = []
        while tensor is not source:
            note = self._note(tensor)
            if len(note.sources) != 1 or note.kind in (*LOST, "reduction"):
                return None
            if note.kind == "move":
                if not isinstance(note.args[0], Tensor):
                    return None
                made.append(note)
            tensor = note.sources[0]
        return made[::-1]

    def is_of_batch(self, tensor: Tensor) -> bool:
        """Whether it is a tensor of the batch, or was made of such alone."""
        return all(note.known for note in self._history(tensor) if not note.sources)

    def is_lost(self, tensor: Tensor) -> bool:
        """Whether its rows are in an order of values, or were put elsewhere."""
        return any(note.kind in LOST for note in self._history(tensor))

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether something was done to it in place that may have put its rows, or their samples, elsewhere."""
        return any(note.version != version(note.out) for note in self._history(tensor))

    def is_strange(self, tensor: Tensor) -> bool:
        """Whether it is made of samples that the numbers are not of."""
        return any(note.loader is not None and not note.known for note in self._history(tensor))

    def is_joined(self, tensor: Tensor) -> bool:
        """Whether its rows were put together of parts; where nobody knows these, nobody knows its order."""
        return any(note.func in JOINING and not note.same_rows for note in self._history(tensor))

    def _joins_strangers(self, note: Note) -> bool:
        """Whether rows of the batch are joined with rows of unknown origin, such as those of a replay memory."""
        data, args, kwargs = note.args[0], note.args, note.kwargs
        if not isinstance(data, tuple | list):
            return False
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        known = [self.is_of_batch(x) for x in data]
        return dim in (0, -note.out.ndim) and any(known) and not all(known)

    def _spread(self, note: Note) -> list[Tensor]:
        """What an operation on elements has spread over what it made, of what is followed."""
        if note.kind != "elementwise":
            return []
        return [x for x in note.operands if x.shape != note.out.shape and self._tracked(x)]

    def is_part(self, tensor: Tensor, n: int) -> bool:
        """Whether rows of ``n`` samples were taken by their places, one by one or in chunks, and not by a mask."""
        taken = [note for note in self._history(tensor) if note.func in BY_PLACE and not note.same_rows]
        keys = [x if isinstance(x := note.args[1] if len(note.args) > 1 else 0, tuple) else (x,) for note in taken]
        by_place = [all(key is None or isinstance(key, int | slice | list) for key in each) for each in keys]
        return any(by and not (x.out.ndim and len(x.out) % n == 0) for x, by in zip(taken, by_place, strict=True))

    def is_blank(self, tensor: Tensor) -> bool:
        """Whether nothing of the batch is in it, nor anything that is learned: it was made to be filled."""
        leaves = [note for note in self._history(tensor) if note.func is None]
        return not any(x.known or x.index or x.loader is not None or x.out.requires_grad for x in leaves)

    def loaders_of(self, tensor: Tensor) -> set[int] | None:
        """Which loaders the rows of a tensor come from, strangers too; None where its origin is unknown."""
        loaders = [note.loader for note in self._history(tensor) if not note.sources]
        return None if None in loaders else {loader for loader in loaders if loader is not None}

    def _history(self, tensor: Tensor, through: Callable[[Note], bool] = lambda note: True) -> list[Note]:
        """The notes of a tensor, and of all that it was made of, each once; only of what ``through`` lets pass."""
        first = self._note(tensor)
        if first.func is None:  # as of the batch itself
            return [first]
        notes: dict[Tensor, Note] = {}
        found = [tensor]
        while found:
            source = found.pop()
            if source not in notes:
                note = notes[source] = self._note(source)
                found.extend(note.sources if through(note) else ())
        return list(notes.values())

    def _note(self, tensor: Tensor) -> Note:
        """How a tensor was made; of one that nobody has recorded, that its origin is unknown."""
        for note in reversed(self._records):
            if note.out is tensor:
                return note
        return Note(tensor, first_version(tensor))

    def _changed_with(self, tensor: Tensor) -> list[Note]:
        """Its note, and those of the other views of the same memory, which count their changes together."""
        first = self._note(tensor)
        others = [note for note in self._records if note is not first and note.version == first.version]
        if tensor.is_inference():  # whose views do not know what they are of
            return [first, *(note for note in others if shares_memory(note.out, tensor))]
        return [first, *(note for note in others if _memory_of(note.out) is _memory_of(tensor))]

    def changed_with(self, tensor: Tensor) -> list[Tensor]:
        """The other views of the memory of a tensor, as far as they were noted."""
        return [note.out for note in self._changed_with(tensor)[1:]]

    def _touches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether rows of an argument are followed: those of few operations in a network are."""
        data = args[0] if isinstance(args[0], tuple | list) else args[:1]
        return any(map(self._tracked, (*data, *args[1:], *kwargs.values())))

    def _tracked(self, x: Any) -> bool:
        for note in reversed(self._records):  # noqa: SIM110 - a loop takes half as long as any(), and each operation asks
            if note.out is x:
                return True
        return False
