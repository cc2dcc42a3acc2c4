"""What the tensors of a step were made of: of the batch alone, of other samples, sorted, changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from debias.tap.moves import MOVES, SORTING
from debias.tap.notes import Note, first_version, version
from debias.tap.numbers import SampleNumbers

__all__ = ["Origins"]


class Origins(SampleNumbers):
    """The operations of one step that were recorded, last ones last."""

    def __init__(self, n: int, *, several: bool, everything: bool) -> None:
        super().__init__(n, several=several, everything=everything)
        self._records: list[Note] = []

    @property
    def roots(self) -> list[Tensor]:
        """The tensors of the batch, those of strangers too."""
        return [note.out for note in self._records if note.func is None]

    def moves(self, tensor: Tensor, source: Tensor) -> list[Note] | None:
        """The moves that made ``tensor`` of ``source``, first to last; None where it was made in another way."""
        made: list[Note] = []
        while tensor is not source:
            note = self._note(tensor)
            if len(note.sources) != 1 or note.func in SORTING or note.reduces:
                return None
            if note.func in MOVES:
                if not isinstance(note.args[0], Tensor):
                    return None
                made.append(note)
            tensor = note.sources[0]
        return made[::-1]

    def is_of_batch(self, tensor: Tensor) -> bool:
        """Whether it is a tensor of the batch, or was made of such alone."""
        return all(note.known for note in self._history(tensor) if not note.sources)

    def is_sorted(self, tensor: Tensor) -> bool:
        """Whether its rows are in an order of values."""
        return any(note.func in SORTING for note in self._history(tensor))

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether something was done to it in place that may have put its rows, or their samples, elsewhere."""
        return any(note.version != version(note.out) for note in self._history(tensor))

    def is_strange(self, tensor: Tensor) -> bool:
        """Whether it is made of samples that the numbers are not of."""
        return any(note.loader is not None and not note.known for note in self._history(tensor))

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

    def _tracked(self, x: Any) -> bool:
        for note in reversed(self._records):  # noqa: SIM110 - a loop takes half as long as any(), and each operation asks
            if note.out is x:
                return True
        return False
