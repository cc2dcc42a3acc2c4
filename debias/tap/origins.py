"""What the tensors of a step were made of: of the batch alone, of other samples, sorted, changed in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from debias.tap.moves import MOVES, SORTING, Move
from debias.tap.notes import Note, same_rows, version
from debias.tap.numbers import SampleNumbers

__all__ = ["Origins"]


class Origins(SampleNumbers):
    """The operations of one step that were recorded, last ones last."""

    def __init__(self, n: int, *, several: bool, everything: bool) -> None:
        super().__init__(n, several=several, everything=everything)
        self._records: list[Note] = []
        self._strangers: list[tuple[Tensor, int]] = []  # of samples without numbers, and the loader they come from

    @property
    def roots(self) -> list[Tensor]:
        """The tensors of the batch, those of strangers too."""
        return [record.out for record in self._records if record.func is None] + [x for x, _ in self._strangers]

    def moves(self, tensor: Tensor, source: Tensor) -> list[Move] | None:
        """The moves that made ``tensor`` of ``source``, first to last; None where it was made in another way."""
        made: list[Move] = []
        while tensor is not source:
            record = self._find(tensor)
            if record is None or record.func is None or len(record.sources) != 1:
                return None
            if record.func in SORTING or record.reduces:
                return None
            if record.func in MOVES:
                if not isinstance(record.args[0], Tensor):
                    return None
                made.append(Move(record.func, record.args, record.kwargs, record.part, same_rows(record)))
            tensor = record.sources[0]
        return made[::-1]

    def is_of_batch(self, tensor: Tensor) -> bool:
        """Whether it is a tensor of the batch, or was made of such alone."""
        record = self._find(tensor)
        if record is None or record.func is None:
            return record is not None and record.known
        return bool(record.sources) and all(map(self.is_of_batch, record.sources))

    def is_sorted(self, tensor: Tensor) -> bool:
        """Whether its rows are in an order of values."""
        record = self._find(tensor)
        if record is None or record.func is None:
            return False
        return record.func in SORTING or any(map(self.is_sorted, record.sources))

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether something was done to it in place that may have put its rows, or their samples, elsewhere."""
        record = self._find(tensor)
        if record is None:
            return False
        return record.version != version(tensor) or any(map(self.is_changed, record.sources))

    def is_strange(self, tensor: Tensor) -> bool:
        """Whether it is made of samples that the numbers are not of."""
        if any(x is tensor for x, _ in self._strangers):
            return True
        record = self._find(tensor)
        return record is not None and any(map(self.is_strange, record.sources))

    def loaders_of(self, tensor: Tensor) -> set[int] | None:
        """Which loaders the rows of a tensor come from, strangers too; None where its origin is unknown."""
        for x, loader in self._strangers:
            if x is tensor:
                return {loader}
        record = self._find(tensor)
        if record is None or (record.func is None and not record.known):
            return None
        if record.func is None:
            return {record.loader}
        found = [self.loaders_of(x) for x in record.sources]
        return None if not found or None in found else set[int]().union(*found)  # type: ignore[arg-type]

    def _find(self, tensor: Any) -> Note | None:
        return next((record for record in reversed(self._records) if record.out is tensor), None)

    def _tracked(self, tensor: Any) -> bool:
        return any(record.out is tensor for record in self._records) or any(x is tensor for x, _ in self._strangers)
