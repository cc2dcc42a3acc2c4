"""Which sample does a row of a loss belong to? Answered by replaying the shape operations on an index tensor.

A loss often has more rows than the batch has samples: tokens, pixels, anchors, two views, interleaved or tiled. Inside
a watched step, operations that move elements of the batch are recorded; to learn the order of a loss's rows they are
replayed on sample numbers. Two things are taken for granted, and nothing else: a network keeps the rows of its input,
and a target of unknown origin with one row per sample is in the order of the batch, unless the step has reordered the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CASTS", "MOVES", "RECORDED", "Move", "RowTracker", "apply_move", "arranged_rows", "keeps_rows"]

_T = torch.Tensor

# Operations that change neither order nor number of elements nor shape; an index passes through them unchanged.
CASTS = frozenset(
    {_T.float, _T.double, _T.half, _T.bfloat16, _T.long, _T.int, _T.bool, _T.to, _T.type, _T.contiguous, _T.clone}
    | {_T.detach, _T.type_as, torch.clone, torch.detach, _T.cuda, _T.cpu, _T.requires_grad_}
)
# Operations that move, drop or repeat elements; only the first argument (or its list) holds data.
_METHODS = (
    "view reshape permute transpose t __getitem__ flatten squeeze unsqueeze repeat repeat_interleave expand expand_as"
    " flip fliplr flipud roll index_select chunk split tensor_split unbind unflatten movedim swapaxes swapdims narrow"
    " select masked_select take take_along_dim gather view_as reshape_as tile moveaxis diagonal rot90"
)
_FUNCTIONS = (
    "reshape permute transpose t flatten squeeze unsqueeze repeat_interleave flip fliplr flipud roll index_select chunk"
    " split tensor_split unbind unflatten movedim swapaxes swapdims narrow select masked_select cat concat concatenate"
    " stack hstack vstack tile take take_along_dim gather moveaxis diagonal rot90"
)
MOVES = frozenset(
    [getattr(_T, name) for name in _METHODS.split() if hasattr(_T, name)]
    + [getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)]
    + [_T.T.__get__, _T.mT.__get__]  # type: ignore[attr-defined]
)
# Moves that keep every row in its place whenever they keep the number of rows.
_ROW_KEEPING = frozenset(
    {_T.view, _T.reshape, _T.flatten, _T.squeeze, _T.unsqueeze, _T.expand, _T.view_as, _T.reshape_as, _T.unflatten}
    | {_T.expand_as, torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten}
)
# Moves of whole rows, unless they are told of another axis than the first.
_ROW_WISE = frozenset({_T.index_select, torch.index_select, torch.cat, torch.concat, torch.concatenate})
# Operations that compute each element from the element at the same place; targets are often made with them.
_ELEMENTWISE = frozenset(
    getattr(space, name)
    for space in (_T, torch)
    for name in [
        "gt",
        "ge",
        "lt",
        "le",
        "eq",
        "ne",
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "floor_divide",
        "remainder",
        "fmod",
        "clamp",
        "clamp_min",
        "clamp_max",
        "abs",
        "neg",
        "round",
        "floor",
        "ceil",
        "sign",
        "logical_not",
        "logical_and",
        "logical_or",
        "bitwise_and",
        "bitwise_or",
        "sigmoid",
        "exp",
        "log",
        "pow",
        "sqrt",
        "where",
        "__rsub__",
        "__invert__",
        "__and__",
        "__or__",
        "minimum",
        "maximum",
        "isnan",
        "nan_to_num",
    ]
    if hasattr(space, name)
)
# Operations after which nobody knows where a row is.
_SORTING = frozenset({_T.sort, torch.sort, _T.topk, torch.topk, _T.msort, torch.msort})
# Moves by which steps and networks put rows in another order, not merely axes.
_REORDERING = _SORTING | frozenset(
    getattr(space, name)
    for space in (_T, torch)
    for name in ["__getitem__", "flip", "flipud", "roll", "index_select", "gather", "take", "take_along_dim"]
    if hasattr(space, name)
)
RECORDED = MOVES | CASTS | _ELEMENTWISE | _SORTING | {F.one_hot}


class Move(NamedTuple):
    """An operation that moves elements.

    Attributes:
        func: the operation.
        args: its arguments, what is moved first.
        kwargs: its keyword arguments.
        part: which of several results is meant.
        keeps_rows: whether every row is where it was.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None
    keeps_rows: bool


def apply_move(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], data: Any, part: int | None
) -> Any:
    """Run a recorded move on other data of the same shape."""
    if getattr(func, "__name__", "") == "__get__":  # .T and .mT
        return func(data)
    if func is _T.view and isinstance(data, Tensor):
        data = data.contiguous()  # expanded, where the original was not
    out = func(data, *args[1:], **kwargs)
    return out if part is None else out[part]


@dataclass(eq=False)
class _Record:
    """One tensor and the operation that made it."""

    out: Tensor
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: int | None = None

    @property
    def sources(self) -> list[Tensor]:
        """The tensors whose elements it holds."""
        if self.func in MOVES or self.func in CASTS or self.func is F.one_hot:
            data = self.args[0]
            return [x for x in data if isinstance(x, Tensor)] if isinstance(data, tuple | list) else [data]
        return [x for x in self.args if isinstance(x, Tensor) and x.shape == self.out.shape]


class RowTracker:
    """Records the moves of one step and answers which sample each row of a tensor comes from.

    Args:
        batch: what the step receives; tensors of ``n`` rows in it, and tensors inside a list of ``n`` elements, are
            where sample numbers start.
        n: number of samples.
        everything: record moves of all tensors, not only of those that come from the batch. The first step needs this;
            later ones would keep a network's intermediate results alive for nothing.
        arranged: what the user says of rows that cannot be followed, ``"tiled"`` or ``"interleaved"``.

    Attributes:
        needed: whether an answer has been other than "row i is sample i".
    """

    def __init__(self, batch: Any, n: int, *, everything: bool = True, arranged: str | None = None) -> None:
        self.n = n
        self.everything = everything
        self.arranged = arranged
        self.needed = False
        self._followed: list[Tensor] = []
        self._roots: list[tuple[Tensor, int | None]] = list(_roots(batch, n))
        self._records: list[_Record] = []

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Remember one operation; called for every one in :data:`RECORDED`."""
        if not args:
            return
        if isinstance(out, Tensor):
            records = [_Record(out, func, args, kwargs)]
        elif isinstance(out, tuple | list):
            records = [_Record(x, func, args, kwargs, i) for i, x in enumerate(out) if isinstance(x, Tensor)]
        else:
            return
        if out is args[0]:  # y.long() may be y itself, as may x.flatten(): then it is no operation
            return
        if func in _SORTING and not _sorts_rows(func, args, kwargs):
            return
        tracked = self.everything or any(self._tracked(source) for source in records[0].sources)
        # What is made of something unknown matters where samples trade places: few networks do that.
        if tracked or (func in _REORDERING and self._reorders(args, records[0].out, func)):
            self._records.extend(records)

    def follow(self, tensor: Tensor) -> None:
        """From now on record what is made of this tensor too."""
        self._followed.append(tensor)

    def moves(self, tensor: Tensor, source: Tensor) -> list[Move] | None:
        """The moves that made ``tensor`` of ``source``, first to last; None where it was made in another way."""
        made: list[Move] = []
        while tensor is not source:
            record = self._record_of(tensor)
            if record is None or len(record.sources) != 1 or record.func in _SORTING:
                return None
            if record.func in MOVES:
                if not isinstance(record.args[0], Tensor):
                    return None
                made.append(Move(record.func, record.args, record.kwargs, record.part, _same_rows(record)))
            tensor = record.sources[0]
        return made[::-1]

    def of_layer(self, output: Tensor, inputs: list[Tensor]) -> Tensor | bool | None:
        """Sample numbers for the rows of what a layer reads or makes, ``(rows, ...)``.

        Args:
            output: what it reads or makes.
            inputs: what it, and the networks that it is in, were given, the innermost first.

        Returns:
            None if row i is sample i, int64 ``(rows,)``, or False if unknown.
        """
        rows = output.shape[0]
        for tensor in (output, *inputs):
            if self.is_sorted(tensor):
                return False
            while (record := self._record_of(tensor)) is not None and _same_rows(record):
                tensor = record.sources[0]
            if tensor.ndim == 0 or tensor.shape[0] != rows:
                continue
            known = self._known(tensor)
            if known and self._keeps_rows(tensor):
                return None
            index = self._of_rows(tensor) if known or record is not None else None
            if known or index is not None:  # moved; where nobody knows of what, of rows in the order of the batch
                self.needed = True
                return _or_false(index if known or not self._may_reorder() else None)
        if rows == self.n:
            return False if self._may_reorder() else None
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
        found_sorted = [self.is_sorted(tensor) for tensor in candidates]
        candidates = [x for x, is_sorted in zip(candidates, found_sorted, strict=True) if not is_sorted]
        for tensor in candidates:  # derived from the batch itself
            if self._known(tensor):
                return None if self._keeps_rows(tensor) else _or_false(self.index(tensor))
        for tensor in candidates:  # moved from some tensor with one row per sample, e.g. logits (N, T, C)
            if self._record_of(tensor) is not None and (index := self.index(tensor)) is not None:
                return None if self._keeps_rows(tensor) else index
        if any(found_sorted):
            return False
        if rows == self.n and not self._may_reorder():
            return None
        found: list[Tensor] = []
        for record in self._records:  # the network kept the rows of its input, e.g. two concatenated views
            out = record.out
            if out.ndim and out.shape[0] == rows and self._known(out) and (index := self.index(out)) is not None:
                found.append(index.flatten(1)[:, 0] if index.ndim > 1 else index)
        if found and rows != self.n and all(torch.equal(found[0], other) for other in found[1:]):
            return found[0]
        return False

    def index(self, tensor: Tensor) -> Tensor | None:
        """Sample numbers in the shape of ``tensor``, or None where its origin is unknown."""
        for root, sample in self._roots:
            if root is tensor:
                return self.start(tensor.shape, tensor.device, sample)
        record = self._record_of(tensor)
        if record is None:
            of_samples = tensor.ndim > 0 and tensor.shape[0] == self.n
            return self.start(tensor.shape, tensor.device) if of_samples else None
        if record.func in MOVES:
            data = record.args[0]
            if isinstance(data, tuple | list):
                inner: Any = [self.index(x) for x in data]
                if any(x is None for x in inner) or self._joins_strangers(record):
                    return None
            elif (inner := self.index(data)) is None:
                return None
            return apply_move(record.func, record.args, record.kwargs, inner, record.part)
        if record.func is F.one_hot:
            inner = self.index(record.args[0])
            return None if inner is None else inner.unsqueeze(-1).expand(tensor.shape)
        sources = record.sources
        moved = [x for x in sources if not self._keeps_rows(x)]
        if not sources or (moved and len(sources) > 1):  # elementwise in tensors of different orders
            return None
        return self.index(sources[0])

    def _of_rows(self, tensor: Tensor) -> Tensor | None:
        """Sample numbers along the first axis, or None where its origin is unknown or a row is of several samples."""
        record = self._record_of(tensor)
        if record is not None and _same_rows(record):
            return self._of_rows(record.sources[0])
        if record is not None and _along_rows(record):  # so that no index is made for every pixel
            data = record.args[0]
            inner = [self._of_rows(x) for x in (data if isinstance(data, tuple | list) else [data])]
            if any(x is None for x in inner) or self._joins_strangers(record):
                return None
            moved = inner if isinstance(data, tuple | list) else inner[0]
            return apply_move(record.func, record.args, record.kwargs, moved, record.part)
        index = self.index(tensor)
        if index is None or index.ndim == 1:
            return index
        index = index.flatten(1)
        if record is None:
            return index[:, 0]
        # Reading values waits for the device, so beyond the CPU it is done while everything is recorded only.
        check = index.device.type == "cpu" or self.everything
        return None if check and not torch.equal(index, index[:, :1].expand_as(index)) else index[:, 0]

    def _joins_strangers(self, record: _Record) -> bool:
        """Whether rows of the batch are joined with rows of unknown origin, such as those of a replay memory."""
        data = record.args[0]
        if not isinstance(data, tuple | list):
            return False
        dim = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", record.kwargs.get("axis", 0))
        known = [self._known(x) for x in data]
        return dim == 0 and any(known) and not all(known)

    def is_sorted(self, tensor: Tensor) -> bool:
        """Whether its rows are in an order of values."""
        record = self._record_of(tensor)
        return record is not None and (record.func in _SORTING or any(map(self.is_sorted, record.sources)))

    def _reorders(self, args: tuple[Any, ...], out: Tensor, move: Any) -> bool:
        data = args[0]
        if not isinstance(data, Tensor) or 0 in (data.ndim, out.ndim) or data.shape[0] != self.n:
            return False
        return out.shape[0] == self.n and not keeps_rows(move, args, out)

    def start(self, shape: torch.Size, device: torch.device, sample: int | None = None) -> Tensor:
        """Sample numbers of a tensor with one row per sample, or of one that belongs to a single sample."""
        if sample is not None:
            return torch.full((), sample, device=device).expand(shape)
        return torch.arange(self.n, device=device).view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def _tracked(self, tensor: Any) -> bool:
        if any(root is tensor for root, _ in self._roots) or any(x is tensor for x in self._followed):
            return True
        return any(r.out is tensor for r in self._records)

    def _record_of(self, tensor: Tensor) -> _Record | None:
        return next((record for record in reversed(self._records) if record.out is tensor), None)

    def _known(self, tensor: Tensor) -> bool:
        if any(root is tensor for root, _ in self._roots):
            return True
        record = self._record_of(tensor)
        return record is not None and bool(record.sources) and all(self._known(x) for x in record.sources)

    def _keeps_rows(self, tensor: Tensor) -> bool:
        for root, sample in self._roots:
            if root is tensor:
                return sample is None
        if tensor.ndim == 0 or tensor.shape[0] != self.n:
            return False
        record = self._record_of(tensor)
        if record is None:
            return True  # of unknown origin, with one row per sample
        if record.func not in MOVES:
            return all(self._keeps_rows(x) for x in record.sources)
        return _same_rows(record) and self._keeps_rows(record.args[0])

    def puts_samples_elsewhere(self) -> bool:
        """Whether the step has put samples of the batch in another order.

        Looked up in their numbers, unlike :meth:`_may_reorder`, which takes axes that trade places for another order.
        It reads them, which waits for the device.
        """
        order = self.start(torch.Size([self.n]), torch.device("cpu"))
        for record in self._records:
            out = record.out
            if record.func in MOVES and out.ndim and len(out) == self.n and self._known(out):
                index = self.index(out)
                if index is None or not torch.equal((index.flatten(1)[:, 0] if index.ndim > 1 else index).cpu(), order):
                    return True
        return False

    def _may_reorder(self) -> bool:
        """Whether the step may have put samples of the batch in another order, as far as operations alone tell."""
        return any(
            r.func in MOVES
            and r.out.ndim
            and r.out.shape[0] == self.n
            and self._known(r.out)
            and not self._keeps_rows(r.out)
            for r in self._records
        )


def arranged_rows(how: str, n: int, times: int, device: torch.device) -> Tensor:
    """Sample numbers of rows that are all samples, again and again (``"tiled"``), or those of a sample together."""
    numbers = torch.arange(n, device=device)
    return numbers.repeat(times) if how == "tiled" else numbers.repeat_interleave(times)


def keeps_rows(move: Callable[..., Any], args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether a move of one tensor has left every row in its place."""
    data = args[0]
    if not isinstance(data, Tensor) or 0 in (data.ndim, out.ndim) or data.shape[0] != out.shape[0]:
        return False
    if move is _T.__getitem__ and isinstance(args[1], tuple) and args[1]:
        first = args[1][0]
        keeps = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
        return keeps and not any(isinstance(key, Tensor) for key in args[1])
    return move in _ROW_KEEPING


def _same_rows(record: _Record) -> bool:
    """Whether row i is made of row i of one other tensor."""
    moved = record.func in MOVES and not keeps_rows(record.func, record.args, record.out)
    return len(record.sources) == 1 and not moved


def _along_rows(record: _Record) -> bool:
    """Whether a move takes whole rows, so that it does the same to a tensor without the other axes."""
    rest = (*record.args[1:2], *record.kwargs.values())
    if record.func is _T.__getitem__:
        key = record.args[1]
        return isinstance(key, slice) or (isinstance(key, Tensor) and key.ndim == 1)
    return record.func in _ROW_WISE and all(type(x) is not int or x == 0 for x in rest)


def _sorts_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a sort runs over the first axis."""
    place = 2 if func in (_T.topk, torch.topk) else 1
    dim = 0 if func in (_T.msort, torch.msort) else args[place] if len(args) > place else kwargs.get("dim", -1)
    return args[0].ndim > 0 and dim % args[0].ndim == 0


def _or_false(index: Tensor | None) -> Tensor | bool:
    return False if index is None else index


def _roots(batch: Any, n: int, sample: int | None = None, depth: int = 0) -> Iterator[tuple[Tensor, int | None]]:
    if depth > 4:
        return
    if isinstance(batch, Tensor):
        if sample is not None or (batch.ndim and batch.shape[0] == n):
            yield batch, sample
        return
    if isinstance(batch, dict):
        children = list(batch.values())
    elif isinstance(batch, tuple | list):
        children = list(batch)
        if sample is None and depth and one_per_sample(children, n):
            for i, child in enumerate(children):
                yield from _roots(child, n, i, depth + 1)
            return
    elif hasattr(batch, "__dict__") and not isinstance(batch, torch.nn.Module):
        children = list(vars(batch).values())
    else:
        return
    for child in children:
        yield from _roots(child, n, sample, depth + 1)


def one_per_sample(children: list[Any], n: int) -> bool:
    """Whether a list holds one element per sample, such as a detector's images: n alike, none with n rows itself."""
    if len(children) != n or len({type(child) for child in children}) != 1:
        return False
    return not any(isinstance(x, Tensor) and x.ndim and x.shape[0] == n for x in children)
