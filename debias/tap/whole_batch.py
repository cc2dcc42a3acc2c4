"""Numbers that a step makes of the whole batch: the mean of weights, counts of classes, a threshold, a loss itself.

A group alone has another one. So a loss that is multiplied by it, selected by it or weighed with it has no value for a
group. In the first step of an epoch every operation is looked at: what is computed of rows of the batch is such a
number, unless the operation is known to keep the rows, or gives the same where it is done to a part of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from debias.tap.moves import (
    ALONG,
    CHANGING,
    ELEMENTWISE,
    LIKE,
    MOVES,
    PUTTING,
    RECORDED,
    REDUCTIONS,
    SORTING,
    among,
    axes_of,
    named,
    read_arguments,
    sorts_rows,
    tensors_in,
)
from debias.tap.rows import RowTracker

__all__ = ["STATISTICS", "WholeBatch", "is_statistic"]

# Make numbers of the batch out of its values.
STATISTICS = REDUCTIONS | named(
    "var std norm quantile nanquantile median nanmedian mode bincount histc logsumexp unique"
)
is_statistic = among(STATISTICS)
# Say where a mask is true, which is no more than the mask says.
_PLACES = named("nonzero argwhere")
# Compare the rows of two tensors: sum over the last axis of the first and the last but one, or the last, of the second.
_MATMUL = named("matmul mm bmm __matmul__")
_BY_ROWS = named("cdist linear inner")
_PAIRING = _MATMUL | _BY_ROWS | named("__rmatmul__ addmm einsum outer tensordot")
# Add samples up, as mixup does, or put them below each other: no comparison, so that the result is not one of pairs.
_ADDING = named("add add_ sub subtract sub_ rsub lerp lerp_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__") | {
    torch._C._nn.pad_sequence  # type: ignore[attr-defined]
}
# Of numbers of pairs, those of each sample with itself.
_OF_ITSELF = named("diagonal diag trace")
# Make constants; where they read a number, it is a size.
_SHAPED = LIKE | named("arange zeros ones empty eye tril_indices triu_indices")
# Make them of nothing, or of other constants.
_FACTORIES = (_SHAPED - named("new_tensor")) | named("linspace full rand randn randint randperm normal")
# Marks of a tensor. What an operation makes has those of what it was given, see `WholeBatch._inherited`.
_OF_ROWS = "rows"  # made of rows of the batch
_OF_PAIRS = "pairs"  # made of numbers of which there is one for each two samples
_RANKED = "ranked"  # made of rows in the order of a value
_RANKS = "ranks"  # made of the places of rows in such an order
_TRAINED = "trained"  # made of a number of the whole batch that may be trained
_BY_NETWORK = "network"  # made by a network
_MIXED = "mixed"  # made, by no network, of rows that an operation of no known kind has mixed or moved
_CONSTANT = "constant"  # made of parameters, buffers and constants alone, whatever its shape


class WholeBatch:
    """Finds the numbers of the whole batch in one step.

    Args:
        tracker: of the step; None where nobody reads ids.
        is_unreduced: whether a tensor holds losses that nobody has reduced yet.
        is_proportional: whether it is a loss, or what is proportional to some.
        constants: buffers of the network.
        careful: look at every operation, as in the first step of an epoch.

    Attributes:
        constant_nodes: of the autograd graph, for what is made of parameters alone.
    """

    def __init__(
        self,
        tracker: RowTracker | None,
        is_unreduced: Callable[[Tensor], bool],
        is_proportional: Callable[[Tensor], bool],
        constants: Iterable[Tensor],
        *,
        careful: bool,
    ) -> None:
        self.tracker = tracker
        self._n = 0 if tracker is None else tracker.n
        self.careful = careful and self._n > 1  # a batch of one sample is its group's
        self._is_unreduced, self._is_proportional = is_unreduced, is_proportional
        self.constant_nodes: set[Any] = set()
        self._numbers: list[Tensor] = []
        self._marks: Any = WeakTensorKeyDictionary() if self.careful else {}
        for x in constants if self.careful else ():
            self._marks[x] = {_CONSTANT}
        for x in tracker.roots if tracker is not None and self.careful else ():
            self._marks[x] = {_OF_ROWS}

    @property
    def looks(self) -> bool:
        """Whether every operation is looked at; not those inside a compiled graph."""
        return not torch.compiler.is_compiling() and self.careful

    @property
    def known(self) -> bool:
        """Whether there is one, or every operation has to be looked at."""
        return bool(self._numbers) or self.looks

    def _is(self, x: Any, mark: str) -> bool:
        return mark in self._marks.get(x, ())

    def holds(self, *values: Any) -> bool:
        """Whether one of these is a number of the whole batch."""
        return bool(self._numbers) and any(x is number for x in tensors_in(values) for number in self._numbers)

    def add(self, number: Tensor) -> None:
        """Take something for a number of the whole batch."""
        self._numbers.append(number)

    def scales(self, *values: Any) -> bool:
        """Whether one of these is a number of the whole batch, also one that may be trained."""
        return self.holds(*values) or (self.looks and any(self._is(x, _TRAINED) for x in tensors_in(values)))

    def enters(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Whether a number of the whole batch enters what an operation makes. Another order of all rows is none, but an
        order of values that chooses some of them is one.
        """
        if func in MOVES and isinstance(args[0], Tensor) and args[0].ndim:
            if out.shape[:1] == args[0].shape[:1]:
                return self.holds(args[0])
            selects = not out.ndim or len(out) % max(self._n, 1) or out.numel() < args[0].numel()
            if selects and self.looks and self._is_made_of_rows(args[0]):
                return self.holds(args, kwargs) or self._by_ranks(*tensors_in((args, kwargs)))
        return self.holds(args, kwargs)

    def _by_ranks(self, *given: Tensor) -> bool:
        """Whether rows are chosen by their places in an order of values, and not by a mask of the batch alone."""
        own = len(given) > 1 and all(map(self._is_mask_of_batch, given[1:]))
        return any(self._is(x, _RANKS) or (not own and self._is(x, _RANKED)) for x in given)

    def _is_mask_of_batch(self, x: Tensor) -> bool:
        tracker = self.tracker
        return tracker is not None and x.dtype == torch.bool and tracker.is_of_batch(x) and not tracker.is_lost(x)

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at what an operation has made: is it a number of the whole batch, and which marks has it?"""
        looks = self.looks
        read = read_arguments(func, args)
        given = tensors_in((read, kwargs)) if looks else [x for x in read if isinstance(x, Tensor)]
        of_layer = looks and any(map(self._is_weight, given))
        marks = self._inherited(func, args, kwargs, given, of_layer=of_layer) if looks else set()
        rows, trained, of_pairs = _OF_ROWS in marks, _TRAINED in marks, _OF_PAIRS in marks
        sorts = _RANKED in marks and func in SORTING and func.__name__ != "msort"
        mixes = rows and func not in RECORDED and any(x.shape[:1] == (self._n,) for x in given)
        marks.discard(_TRAINED)
        for x in tensors_in(args[:1] if func is Tensor.__setitem__ else out):
            # Also of what some rows of sorted ones are written to.
            ranks = x is tensors_in(out)[-1] if sorts else _RANKED in marks and func is Tensor.__setitem__
            own = {_RANKS} if ranks else set()
            if (trained or self._is_number(func, args, kwargs, given, x, rows)) and func not in _SHAPED:
                if not x.requires_grad:
                    self._numbers.append(x)
                    if self.tracker is not None and func in CHANGING:  # and so are the other views of the same memory
                        self._numbers += self.tracker.changed_with(x)
                    if mixes and x.shape[:1] == (self._n,) and _BY_NETWORK not in marks:
                        marks.add(_MIXED)
                elif not of_layer or x.shape[:1] != (self._n,):  # what a layer makes of it is the network's
                    own.add(_TRAINED)
            if looks:
                kept = self._marks.get(x, set()) - {_CONSTANT}  # of what is changed in place
                self._marks[x] = kept | marks | own
            if _CONSTANT in marks:
                self.constant_nodes.add(x.grad_fn)
            if of_pairs or (rows and self._compares(func, args, kwargs, given, x)):
                self._marks[x].add(_OF_PAIRS)
                self._numbers += [] if x.requires_grad else [x]

    def _inherited(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], *, of_layer: bool
    ) -> set[str]:
        """The marks that an operation hands on from what it was given, or makes of whatever it was given."""
        marks: set[str] = set().union(*(self._marks.get(x, ()) for x in given)) - {_CONSTANT}
        if any(map(self._is_made_of_rows, given)):
            marks.add(_OF_ROWS)
            if func in SORTING and sorts_rows(func, args, kwargs):
                marks.add(_RANKED)
            moved = args[:1] if func in MOVES and isinstance(args[0], Tensor) else given
            if _RANKS in marks and not any(self._is(x, _RANKS) for x in moved):  # by them
                marks = marks - {_RANKS} | {_RANKED}
        elif all(map(self._is_constant, given)) and (given or func in _FACTORIES):
            marks.add(_CONSTANT)
        if func is F.batch_norm or of_layer:  # the weights of the first may be plain tensors
            marks.add(_BY_NETWORK)
        if _BY_NETWORK in marks:
            marks.discard(_MIXED)
        if func in _OF_ITSELF:
            marks.discard(_OF_PAIRS)
        return marks

    def of_pairs(self, *values: Any) -> bool:
        """Whether one has a number for each two samples, such as their similarity; a group alone has fewer."""
        return self.looks and any(self._is(x, _OF_PAIRS) for x in values)

    def makes(self, target: Any) -> bool:
        """Whether a target is made of the whole batch, and by no network. Numbers of pairs are refused elsewhere, where
        rows are found.
        """
        if not self.holds(target) or self.of_pairs(target):
            return False
        return self._is(target, _MIXED) or (self.tracker is not None and self.tracker.is_of_batch(target))

    def _compares(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], out: Tensor
    ) -> bool:
        """Whether an operation makes a number for each two samples, of tensors that have one for each sample."""
        tracker, rows = self.tracker, [x for x in given if x.ndim and self._is_made_of_rows(x)]
        moves_one = func in MOVES and isinstance(args[0], Tensor)  # perhaps by rows of another one
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        by_weights = func is F.linear and not self._is(weight, _OF_ROWS)  # of as many rows, by chance
        if tracker is None or not out.ndim or len(rows) < 2 or moves_one or by_weights:
            return False
        if func in _PAIRING:
            if (axes := _axes_in_product(tracker, func, args, rows)) is not None:
                return axes[0] != axes[1]
            return out.ndim == 2 and not (out.shape[0] % self._n or out.shape[1] % self._n)
        return _meet(tracker, func, rows, out)

    def _keeps_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Whether a reduction leaves every row. Rows that nobody knows are taken to lie along the first axis."""
        if self.tracker is None:
            return False
        data = args[0]
        known = self.tracker.index(data)
        if known is not None and self.tracker.only([known]) is not None:
            return True  # of one sample
        if not out.ndim:
            return False
        if known is None and out.requires_grad and len(data) % self._n:
            return True  # of one sample, or time first, perhaps: then what is trained is not refused
        first = 0 not in axes_of(args, kwargs, data.ndim) and not len(data) % self._n and not self._is(data, _OF_PAIRS)
        return self.tracker.index(out) is not None or (first and known is None)

    def _is_made_of_rows(self, x: Tensor) -> bool:
        """Whether values of samples are in it; also of what a network has made, which perhaps nobody saw."""
        if self._is(x, _OF_ROWS):
            return True
        return x.grad_fn is not None and x.ndim > 0 and len(x) == self._n and not self._is(x, _CONSTANT)

    def _is_weight(self, x: Tensor) -> bool:
        """Whether it is a parameter, frozen or not, or is made of such that are trained."""
        return isinstance(x, nn.Parameter) or (x.requires_grad and self._is_constant(x))

    def _is_constant(self, x: Tensor) -> bool:
        """Whether no sample is in it: it is made of parameters; it may have as many rows by chance."""
        return isinstance(x, nn.Parameter) or self._is(x, _CONSTANT)

    def _is_number(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], out: Tensor, rows: bool
    ) -> bool:
        """Whether an operation has made a number of the whole batch."""
        detached = not out.requires_grad
        if detached and (self._numbers or self.looks) and self.enters(func, args, kwargs, out):
            return True
        data, tracker = args[0] if args else None, self.tracker
        if is_statistic(func) and isinstance(data, Tensor) and not (len(args) > 1 and isinstance(args[1], Tensor)):
            if tracker is None or data.numel() < 2:
                return False
            of_rows = self._is_unreduced(data) or tracker.is_of_batch(data) or rows
            return of_rows and not self._keeps_rows(args, kwargs, out)
        # As soon as nothing is differentiated any more a loss of the batch is such a number, too.
        if detached and any(map(self._is_proportional, given)):
            return True
        if rows and func in ALONG:
            return not self._keeps_rows(args, kwargs, out)
        return detached and rows and self._mixes(func, args, kwargs, out)

    def _mixes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """Whether rows of what an operation makes of rows are of several samples."""
        if func in SORTING and args[0] is not None:  # places of places are ranks
            ranks = self._is(args[0], _RANKS) or out.shape[:1] != args[0].shape[:1]
            return ranks and sorts_rows(func, args, kwargs)
        if func in PUTTING:  # counts of classes, say; along other axes than the first it is done to each row
            adds = kwargs.get("accumulate", args[-1]) is True
            return adds or (len(args) > 1 and type(args[1]) is int and args[1] == 0)
        if func in RECORDED or func in _PLACES or func in _SHAPED:
            return False
        # Something else may have as many rows by chance, such as a window of `stft`.
        same = functools.partial(_does_the_same_to_parts, func, args, kwargs, out)
        return not (same(lambda x: True) or same(self._is_made_of_rows))


def _meet(tracker: RowTracker, func: Any, rows: list[Tensor], out: Tensor) -> bool:
    """Whether rows of one tensor meet other samples' rows of another one, as in ``x[:, None] - x[None]``."""
    if all(map(tracker.keeps_rows, rows)) and len({x.ndim for x in rows}) == 1:
        return False
    if func in MOVES:  # joined so that a row holds several samples
        index = tracker.index(out)
        return index is not None and len(list(tracker.moving(index))) > 1
    spreads = func in ELEMENTWISE or len({x.ndim for x in rows}) == 1
    if spreads and len({_axis_of_rows(tracker, x) for x in rows} - {None}) > 1:
        return True
    known = [index for x in rows if (index := tracker.index(x)) is not None and x.shape == rows[0].shape]
    return func not in _ADDING and not all(torch.equal(x, known[0]) for x in known[1:])


def _axis_of_rows(tracker: RowTracker, x: Tensor) -> int | None:
    """The axis along which samples lie, from the end; None where that is not known."""
    if tracker.keeps_rows(x):
        return -x.ndim
    index = tracker.index(x)
    axes = [] if index is None else list(tracker.moving(index))
    return axes[0] - x.ndim if len(axes) == 1 else None


def _axes_in_product(tracker: RowTracker, func: Any, args: tuple[Any, ...], rows: list[Tensor]) -> list[Any] | None:
    """The axes of a product along which the rows of its factors lie, "" of those that it sums over; None if unknown."""
    first, second = (_axis_of_rows(tracker, x) for x in rows) if len(rows) == 2 else (None, None)
    if first is None or second is None:
        return None
    if func is torch.einsum and isinstance(args[0], str) and "." not in args[0]:
        names = args[0].replace(" ", "").partition("->")[0].split(",")
        return [names[0][first], names[1][second]]
    if func in _BY_ROWS:  # the matrix product with the second one transposed
        second = {-1: -2, -2: -1}.get(second, second)
    elif func not in _MATMUL:
        return None
    return ["" if first == -1 else first, "" if second == -2 else second]


@torch.no_grad()
def _does_the_same_to_parts(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, has_rows: Callable[[Tensor], bool]
) -> bool:
    """Whether each row of a result is made of the rows in its place alone: half of those give half of the result.

    It is also where doing all of it again gives another result: that is random, and nothing can be told. ``has_rows``
    says which of the tensors with as many rows as the result are cut.
    """
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if not out.ndim or len(out) < 2 or in_place or func is torch.autograd.grad:  # whose graph may be used up
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(out):  # as under vmap, where no value can be looked at
        return True
    size = out.abs().amax() if out.numel() and out.dtype != torch.bool else 0

    def gives(part: slice) -> bool | None:
        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):  # a copy, as running means are changed in place
                return (value[part] if value.ndim and len(value) == len(out) and has_rows(value) else value).clone()
            return type(value)(map(cut, value)) if type(value) in (tuple, list) else value

        try:
            with torch.random.fork_rng(devices=[out.device] if out.is_cuda else []):
                alone = func(*map(cut, args), **{key: cut(value) for key, value in kwargs.items()})
        except Exception:  # whatever it says, it cannot be done again
            return None
        if not isinstance(alone, Tensor) or alone.shape != out[part].shape or alone.dtype != out.dtype:
            return False
        differ = alone != out[part] if out.dtype == torch.bool else (alone - out[part]).abs() > 1e-4 * size
        return not bool(differ.any())

    half = len(out) // 2
    return all(map(gives, (slice(half), slice(half, None)))) or gives(slice(None)) is False
