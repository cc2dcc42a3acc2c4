"""Which sample does a row belong to? Answered by replaying what was done to the batch on sample numbers.

A loss often has more rows than the batch has samples: tokens, pixels, anchors, two views, interleaved or tiled. Inside
a watched step the operations on tensors of the batch are recorded; to learn the order of a loss's rows they are
replayed on sample numbers. A row is known or it is refused. Two things are taken for granted, and nothing else: a
network keeps the rows of its input, and a target of unknown origin with one row per sample is in the order of the
batch, unless the step has put the batch in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from debias.tap.batches import arranged_rows, roots_of
from debias.tap.moves import (
    CHANGING,
    REORDERING,
    among,
    apply_move,
    axes_of,
    effect_of,
    kind_of,
    looked_up,
    pooled_rows,
    values_read,
)
from debias.tap.notes import CHANGED, LOST, Note, Notes, first_version, version
from debias.tap.numbers import SampleNumbers

__all__ = ["RowTracker"]

_may_reorder, _changes = among(REORDERING), among(CHANGING)


class RowTracker(Notes, SampleNumbers):
    """Records the operations of one step and answers which sample each row of a tensor comes from.

    Args:
        batch: what the step receives; tensors of ``n`` rows in it, and tensors inside a list of ``n`` elements, are
            where sample numbers start.
        n: number of samples.
        everything: record operations on all tensors, not only on those that come from the batch. The first step needs
            this; later ones would keep a network's intermediate results alive for nothing.
        arranged: what the user says of rows that cannot be followed, ``"tiled"`` or ``"interleaved"``.
        joined: what other loaders gave, whose samples are numbered after those, each with its number of samples.
        strangers: parts of the batch that hold other samples, such as those of a loader without ids.

    Attributes:
        needed: whether an answer has been other than "row i is sample i".
        mixed: whether samples were found mixed with each other.
        guesses: whether rows of unknown origin may be those of a network's input; not where sequences were packed.
    """

    def __init__(
        self,
        batch: Any,
        n: int,
        *,
        everything: bool = True,
        arranged: str | None = None,
        joined: Sequence[tuple[Any, int]] = (),
        strangers: Sequence[Any] = (),
    ) -> None:
        # Of several loaders, nothing is in "the order of the batch": what is unknown is of any of them.
        Notes.__init__(self)
        SampleNumbers.__init__(self, n + sum(more for _, more in joined), bool(joined), everything)
        self.arranged = arranged
        self.needed = self.mixed = self._put = False  # the last: whether rows of the batch were put elsewhere
        self.guesses = True
        # Whether as many other samples are in the step, so that a number of rows tells nothing.
        self._ambiguous = self.several
        first = 0
        for loader, (part, size) in enumerate([(batch, n), *joined, *((part, None) for part in strangers)]):
            for x, i in roots_of(part, size):
                sample, known = None if i is None else first + i, size is not None
                self._records.append(Note(x, version(x), sample=sample, first=first, loader=loader, known=known))
                self._ambiguous = self._ambiguous or (not known and x.shape[:1] == (self.n,))
            first += size or 0

    # -- recording ---------------------------------------------------------------------------------

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Remember one operation; called for every one in :data:`debias.tap.moves.RECORDED`."""
        kind = kind_of(func)
        if kind == "packing":
            self.guesses = False
        if kind == "packing" or not args:
            return
        # What is made of something unknown matters where samples may trade places: few networks do that.
        of_rows = args[0] if isinstance(args[0], Tensor) else out  # or joined to rows
        reorders = _may_reorder(func) and isinstance(of_rows, Tensor) and of_rows.shape[:1] == (self.n,)
        if not (self.everything or reorders or self._touches(args, kwargs)):
            return
        kind = effect_of(kind, func, args, kwargs, out)
        if kind == "putting":
            self._lose(func, args, kwargs, out)
        elif kind == "in place":
            self._in_place(func, args, kwargs, out)
        elif kind is not None:
            if (key := looked_up(func, args, kwargs)) is not None and self._tracked(key) and self._is_table(args[0]):
                func, args, kwargs, kind = F.embedding, (key,), {}, "lookup"
            results = enumerate(out) if isinstance(out, tuple | list) else [(None, out)]
            made = [Note(x, first_version(x), func, args, kwargs, kind, i) for i, x in results if isinstance(x, Tensor)]
            if not made:
                return
            first = made[0]
            if self.everything or (reorders and not first.same_rows) or any(map(self._tracked, first.sources)):
                self._records.extend(made)

    def follow(self, tensor: Tensor, index: Callable[[], Tensor | None] | None = None) -> None:
        """From now on record what is made of this tensor too; ``index`` gives its sample numbers, if they are known."""
        if index is not None or not self._tracked(tensor):
            self._records.append(Note(tensor, version(tensor), index=index))

    def _in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A change in place is understood if it keeps every row with its sample."""
        target, puts = args[0], kind_of(func) == "putting"
        key = args[1] if func is Tensor.__setitem__ else ... if func is Tensor.copy_ else None
        given = args[2:] if func is Tensor.__setitem__ else values_read(func, args, kwargs)[1:]
        others = [x for x in given if isinstance(x, Tensor) and x.ndim]
        if torch.compiler.is_compiling():  # neither versions nor sample numbers can be looked at
            if others and self._tracked(target):
                self._lose(func, args, kwargs, out)
            return
        tracked = self._tracked(target)
        views = self._changed_with(target) if tracked else []
        if tracked and version(target) != views[0].version + (not target.is_inference()):
            return  # nothing was changed, or something else as well
        lost = any(map(self.is_lost, others))
        if not (tracked or lost):
            known = key is not None and target.shape[:1] == (self.n,)
            if not (known or isinstance(key, Tensor)) or not any(map(self.is_of_batch, others)):
                return
            views = [Note(target, version(target), known=known)]  # to be filled with rows of the batch
            self._records += views
        for note in views:
            note.version = version(target)
        # Masks and weights of unknown origin are taken for rows of the batch, as other operands are.
        if lost or not all(self._same_rows_as(x, target, tuple(map(slice, x.shape)) if puts else key) for x in others):
            for note in views:
                note.version = CHANGED
        if lost:
            self._lose(func, args, kwargs, out)

    def _lose(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """From now on the rows of what an operation has made, or changed, are unknown."""
        made, given = args[0] if out is None else out, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        compiled = torch.compiler.is_compiling()  # then no history can be looked at
        one = None if compiled else self.only([self.index(x) for x in given if self.is_of_batch(x)])
        if one is not None:
            self._records.append(Note(made, version(made), index=lambda: one.expand(made.shape)))
            return
        of_batch = any(map(self._tracked if compiled else self.is_of_batch, given))
        if not of_batch and (compiled or all(map(self._is_constant, given))):
            return
        pooled = None if of_batch else pooled_rows(func, args, kwargs, self.n)
        if pooled and self.pools_in_order(self.by_row(pooled[1]), self._of_rows(pooled[0])):
            self._records.append(Note(made, version(made)))  # of unknown origin
            return
        self._put = self._put or (of_batch and self.n in args[0].shape)
        for x in (made, args[0]) if _changes(func) else (made,):  # two of one, in a compiled graph
            self._records.append(Note(x, first_version(x), func, kind="putting"))

    def _same_rows_as(self, other: Tensor, target: Tensor, key: Any) -> bool:
        """Whether rows fit those of a tensor, or of what of it they are assigned to."""
        if key is None and not self._tracked(other):
            return True
        rows = self.index(target)
        others = self.index(other, None if rows is None or self._tracked(other) else self.by_row(rows))
        if rows is None or others is None:
            spread = key is None and other.shape[:1] != target.shape[:1]
            return spread or (self.is_blank(target) and not self.is_of_batch(other))
        if key is not None:
            rows = apply_move(Tensor.__getitem__, (target, key), {}, rows, None)
        return others.ndim <= rows.ndim and self._equal(rows, others.expand(rows.shape))

    # -- answers -----------------------------------------------------------------------------------

    def of_layer(self, output: Tensor, inputs: Sequence[Tensor]) -> Tensor | bool | None:
        """Sample numbers for the rows of what a layer reads or makes, ``(rows, ...)``.

        Args:
            output: what it reads or makes.
            inputs: what it, and the networks that it is in, were given, the innermost first.

        Returns:
            None if row i is sample i, int64 ``(rows,)``, or False if unknown.
        """
        rows = output.shape[0]
        for tensor in (output, *inputs):
            if self.is_lost(tensor) or self.is_changed(tensor) or self.is_strange(tensor):
                return False
            while (note := self._note(tensor)).same_rows and len(note.sources) == 1:
                tensor = note.sources[0]
            if tensor.shape[:1] != (rows,):
                continue
            known = self.is_of_batch(tensor)
            if known and self.keeps_rows(tensor):
                return None
            index = self._of_rows(tensor) if known or note.func is not None else None
            if known or index is not None:  # moved; where nobody knows of what, of rows in the order of the batch
                self.needed = True
                return _or_false(index if known or not self.reordered() else None)
        if rows == self.n:
            return False if self._ambiguous or self.reordered() else None
        if self.arranged is None or rows % self.n:
            return False
        return arranged_rows(self.arranged, self.n, rows // self.n, output.device)

    def resolve(self, candidates: list[Tensor], rows: int) -> Tensor | bool | None:
        """Sample numbers for the rows of a loss.

        Args:
            candidates: the target and the logits of the loss, in the order in which they are trusted.
            rows: number of rows of the loss.

        Returns:
            None if row i is sample i, an int64 tensor shaped like the candidate it was found from, or False if unknown.
        """
        self.mixed = False
        moves = self.moves(*candidates) if len(candidates) == 2 else None
        # As of `p` and `p.roll(1, 0)`: a loss that compares samples with each other.
        compares = moves is not None and not all(move.same_rows for move in moves)
        if compares or any(map(self.is_changed, candidates)):
            self.mixed = True
            return False
        for tensor in candidates:
            if self.is_lost(tensor):
                return False
            if self.is_of_batch(tensor):  # derived from the batch itself
                return None if self.keeps_rows(tensor) else _or_false(self.index(tensor))
        if any(map(self.is_strange, candidates)):
            return False
        made = [x for x in candidates if self._note(x).func is not None and not self._is_constant(x)]
        in_order = (len(made) > 0 or rows == self.n) and not self.reordered()
        found = [self.index(x) for x in made] if in_order or len(made) == 2 else []
        known = [x for x in found if x is not None]
        # Of the same network, put in two orders; or made of all samples together.
        differ = len(known) == 2 and known[0].shape == known[1].shape and not self._equal(*known)
        if differ or any(map(self._sums_samples, made)) or (self.mixed and in_order):
            self.mixed = True
            return False
        if in_order:
            if any(self.index(x) is None and self.is_joined(x) for x in candidates[-1:]):
                return False
            if known:  # of some tensor with one row per sample, e.g. logits (N, T, C)
                tensor = next(x for x, index in zip(made, found, strict=True) if index is not None)
                return None if self.keeps_rows(tensor) else known[0]
            if rows == self.n and not self._ambiguous:
                return None
        if self.guesses and (rows != self.n or self.several) and (inputs := self._of_inputs(rows)) is not None:
            return _or_false(self.index(made[0], inputs) if made else inputs)
        return False

    def compares(self, tensors: Sequence[Tensor]) -> bool:
        """Whether rows of the first of these tensors are known to stand beside rows of other samples."""
        self.mixed = False
        known = [self._of_rows(x) for i, x in enumerate(tensors) if i == 0 or self._tracked(x)]
        same = [x is None or known[0] is None or x.shape != known[0].shape or self._equal(known[0], x) for x in known]
        return self.mixed or not all(same)

    def _sums_samples(self, tensor: Tensor) -> bool:
        """Whether it was made by a reduction over samples."""
        history = self._history(tensor, lambda note: note.kind != "reduction")
        reduced = [note for note in history if note.kind == "reduction"]
        return any(self.index(note.args[0]) is not None and self.index(note.out) is None for note in reduced)

    def _of_inputs(self, rows: int) -> Tensor | None:
        """The numbers of a network's input of so many rows, e.g. of two concatenated views: it keeps them."""
        outs = [note.out for note in self._records if note.out.shape[:1] == (rows,)]
        found = [index for x in outs if self.is_of_batch(x) and (index := self._of_rows(x)) is not None]
        alike = all(other is found[0] or (self.reads(other) and self._equal(found[0], other)) for other in found[1:])
        return found[0] if found and alike else None

    def index(
        self, tensor: Tensor, inputs: Tensor | None = None, known: dict[Tensor, Tensor | None] | None = None
    ) -> Tensor | None:
        """Sample numbers in the shape of ``tensor``, or None where its origin is unknown.

        Args:
            tensor: the tensor.
            inputs: the numbers that tensors of unknown origin have, where they have as many rows; else these are in the
                order of the batch.
            known: the answers for what it may be made of, to which this one is added.
        """
        known = {} if known is None else known
        if tensor not in known:
            known[tensor] = self._index(tensor, inputs, known)
        return known[tensor]

    def _index(self, tensor: Tensor, inputs: Tensor | None, known: dict[Tensor, Tensor | None]) -> Tensor | None:
        note = self._note(tensor)
        if note.version != version(tensor):
            return None
        if note.func is not None:
            return self._replayed(note, functools.partial(self.index, inputs=inputs, known=known))
        if note.index is not None:
            return None if self.on_host else note.index()
        if note.known:
            return self.start(tensor.shape, tensor.device, note.sample, note.first)
        if inputs is None:
            if not tensor.ndim or self._ambiguous:
                return None
            if len(tensor) == self.n:
                return self.start(tensor.shape, tensor.device)
            if not self.guesses or tensor.grad_fn is None:
                return None
            self.guesses = False  # the numbers of the inputs themselves are no guess
            inputs = self._of_inputs(len(tensor))
            self.guesses = True
        if inputs is None or tensor.shape[:1] != inputs.shape:
            return None
        return inputs.view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape)

    def _replayed(self, note: Note, index: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Numbers in the shape of what an operation made, from those of what it was made of."""
        kind, args, out = note.kind, note.args, note.out
        if kind in LOST or (self.on_host and note.places):  # which would have to be read
            return None
        if kind not in ("move", "lookup", "along", "reduction"):
            return self._in_places(note, index)
        several = isinstance(args[0], tuple | list)
        found = list(map(index, args[0] if several else args[:1]))
        inner = [x for x in found if x is not None]
        if len(inner) < len(found) or self._joins_strangers(note):
            return None
        if (mask := note.mask) is not None and self.is_of_batch(mask) and self.of_others(inner[0], index(mask)):
            self.mixed = True
            return None
        if kind == "move":
            return note.done_to(inner if several else inner[0])
        (numbers,) = inner
        if kind == "lookup":
            return numbers.view(*numbers.shape, *[1] * (out.ndim - numbers.ndim)).expand(out.shape)
        left = self.without(numbers, axes_of(args, note.kwargs, numbers.ndim))
        if left is None:
            return None
        return numbers if kind == "along" else left.reshape(out.shape)

    def _axis(self, tensor: Tensor) -> int | None:
        """The axis along which the samples lie in order. Numbers that may not be read are made again on the host."""
        if (index := self.index(tensor)) is None:
            return None
        axis = self.in_order(index)
        if axis is None and not self.reads(index):
            self.on_host = True
            axis = self._axis(tensor)
            self.on_host = False
        return axis

    def _in_places(self, note: Note, index: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Numbers of elements each of which was computed of those in its place."""
        sources, shape = note.sources, note.out.shape
        # What has another shape counts, too: a mask (N, 1), a number of one sample, or (N,) over (N, N), where each
        # element is of two samples.
        spread = self._spread(note)
        if any(x.ndim and self.is_lost(x) for x in spread):
            self.mixed = True
            return None
        found = list(map(index, sources))
        if not all(self._is_constant(x) for x, numbers in zip(sources, found, strict=True) if numbers is None):
            return None
        known = [numbers for numbers in (*found, *map(index, spread)) if numbers is not None]
        try:
            known = [numbers.expand(shape) for numbers in known]
        except RuntimeError:
            return None
        if not all(self._equal(known[0], numbers) for numbers in known[1:]):
            self.mixed = True  # each element is made of several samples
            return None
        return known[0] if known else None

    def reordered(self, *, read: bool = False) -> bool:
        """Whether the step has put samples of the batch in another order.

        Args:
            read: from now on numbers may be read where operations alone do not tell, which waits for the device.
        """
        self.everything = self.everything or read
        if self.several or self._put:
            return True
        for note in self._records:
            out = note.out
            if note.kind != "move" or note.same_rows or self.n not in out.shape or not self.is_of_batch(out):
                continue
            if self.index(out) is None or (len(out) == self.n and self._axis(out) is None):
                return True
        return False

    # -- the rest ----------------------------------------------------------------------------------

    def _is_table(self, tensor: Tensor) -> bool:
        """Whether it holds constants that are no rows of the batch, such as the weights of the classes."""
        if self._is_constant(tensor):
            if not torch.compiler.is_compiling():
                _TABLES[tensor] = True
            return True
        # Of as many rows as samples: of rows, unless another batch has told.
        return not (self._tracked(tensor) or torch.compiler.is_compiling()) and tensor in _TABLES

    def _is_constant(self, tensor: Tensor) -> bool:
        """Whether nothing of the batch is in it: it was made of constants, none of which has as many rows."""
        if not self._tracked(tensor):
            return not tensor.requires_grad and tensor.shape[:1] != (self.n,)
        note = self._note(tensor)
        made_of = [*note.sources, *(x for x in note.operands if x.ndim)]
        return note.func is not None and note.kind != "putting" and all(map(self._is_constant, made_of))

    def keeps_rows(self, tensor: Tensor) -> bool:
        """Whether row i of it is known to be of sample i."""
        return all(map(self._keeps_rows, self._history(tensor, self._leaves_rows)))

    def _keeps_rows(self, note: Note) -> bool:
        """The same of one operation, where it leaves rows where they are in what it is done to."""
        if note.out.shape[:1] != (self.n,) or note.version != version(note.out):
            return False
        if note.known:
            return note.sample is None and not self.several
        if note.func is None and note.index is None:
            return not self._ambiguous  # of unknown origin, with one row per sample
        if self._leaves_rows(note):
            return True  # no numbers are made for this
        return self._axis(note.out) == 0

    def _leaves_rows(self, note: Note) -> bool:
        return note.same_rows and not self._spread(note)

    def _of_rows(self, tensor: Tensor) -> Tensor | None:
        """Sample numbers along the first axis, or None where its origin is unknown or a row is of several samples."""
        index = self.index(tensor)
        return None if index is None else self.by_row(index)


# Constants in which values were looked up, known again in a batch of as many samples.
_TABLES: Any = WeakTensorKeyDictionary()


def _or_false(index: Tensor | None) -> Tensor | bool:
    return False if index is None else index
