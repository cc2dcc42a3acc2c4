"""Which sample does a row of a loss belong to? Answered by replaying the shape operations on an index tensor.

A loss often has more rows than the batch has samples: tokens, pixels, anchors, two views, interleaved or tiled. Inside
a watched step, operations that only move elements are recorded; to learn the order of a loss's rows they are replayed
on sample numbers. Nothing is ever guessed from sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASTS", "MOVES", "RowTracker", "apply_move"]

_T = torch.Tensor

# Operations that change neither order nor number of elements nor shape; an index passes through them unchanged.
CASTS = frozenset(
    {_T.float, _T.double, _T.half, _T.bfloat16, _T.long, _T.int, _T.bool, _T.to, _T.type, _T.contiguous, _T.clone}
    | {_T.detach, _T.type_as, torch.clone, torch.detach, _T.cuda, _T.cpu, _T.requires_grad_}
)
# Operations that move, drop or repeat elements; only the first argument (or its list) holds data.
_METHODS = (
    "view reshape permute transpose t __getitem__ flatten squeeze unsqueeze repeat repeat_interleave expand expand_as"
    " flip roll index_select chunk split tensor_split unbind unflatten movedim swapaxes swapdims narrow select"
    " masked_select take_along_dim gather view_as reshape_as tile moveaxis diagonal"
)
_FUNCTIONS = (
    "reshape permute transpose t flatten squeeze unsqueeze repeat_interleave flip roll index_select chunk split"
    " tensor_split unbind unflatten movedim swapaxes swapdims narrow select masked_select cat concat concatenate stack"
    " hstack vstack tile take_along_dim gather moveaxis diagonal"
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


def apply_move(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], data: Any, part: int | None
) -> Tensor:
    """Run a recorded move on other data of the same shape."""
    if func is _T.view and isinstance(data, Tensor):
        data = data.contiguous()  # expanded, where the original was not
    out = func(data, *args[1:], **kwargs)
    return out if part is None else out[part]


class RowTracker:
    """Records the moves of one step and answers which sample each row of a tensor comes from.

    Args:
        batch: what the step receives; tensors of ``n`` rows in it, and tensors inside a list of ``n`` elements, are
            where sample numbers start.
        n: number of samples.
    """

    def __init__(self, batch: Any, n: int) -> None:
        self.n = n
        self.recording = True
        self._roots: list[tuple[Tensor, int | None]] = list(_roots(batch, n))
        self._moves: list[tuple[Tensor, Any, tuple[Any, ...], dict[str, Any], int | None]] = []

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Remember one move; called for every operation in :data:`MOVES` and :data:`CASTS`."""
        if isinstance(out, Tensor):
            self._moves.append((out, func, args, kwargs, None))
        elif isinstance(out, tuple | list):
            self._moves.extend((x, func, args, kwargs, i) for i, x in enumerate(out) if isinstance(x, Tensor))

    def resolve(self, candidates: list[Tensor], rows: int) -> Tensor | bool | None:
        """Sample numbers for the rows of a loss.

        Args:
            candidates: the target and the logits of the loss, in the order in which they are trusted.
            rows: number of rows of the loss.

        Returns:
            None if row i is sample i, an int64 tensor shaped like the candidate it was found from, or False if unknown.
        """
        for tensor in candidates:  # derived from the batch itself
            if self._known(tensor):
                return None if self._keeps_rows(tensor) else self.index(tensor)
        if rows == self.n:
            return None
        for tensor in candidates:  # derived from some tensor with one row per sample, e.g. logits (N, T, C)
            if self._move_of(tensor) is not None and (index := self.index(tensor)) is not None:
                return index
        found: list[Tensor] = []
        for out, *_ in self._moves:  # the network kept the rows of its input, e.g. two concatenated views
            if out.ndim and out.shape[0] == rows and self._known(out) and (index := self.index(out)) is not None:
                found.append(index.flatten(1)[:, 0] if index.ndim > 1 else index)
        if found and all(torch.equal(found[0], other) for other in found[1:]):
            return found[0]
        return False

    def index(self, tensor: Tensor) -> Tensor | None:
        """Sample numbers in the shape of ``tensor``, or None where its origin is unknown."""
        for root, sample in self._roots:
            if root is tensor:
                return self._start(tensor, sample)
        move = self._move_of(tensor)
        if move is None:
            return self._start(tensor, None) if tensor.ndim and tensor.shape[0] == self.n else None
        _, func, args, kwargs, part = move
        data = args[0]
        if isinstance(data, tuple | list):
            parts = [self.index(x) for x in data]
            return None if any(x is None for x in parts) else apply_move(func, args, kwargs, parts, part)
        if func is not None and getattr(func, "__name__", "") == "__get__":  # .T and .mT
            inner = self.index(data)
            return None if inner is None else func(inner)
        inner = self.index(data)
        if inner is None or func in CASTS:
            return inner
        return apply_move(func, args, kwargs, inner, part)

    def _start(self, tensor: Tensor, sample: int | None) -> Tensor:
        if sample is not None:
            return torch.full((), sample, device=tensor.device).expand(tensor.shape)
        numbers = torch.arange(self.n, device=tensor.device)
        return numbers.view(-1, *[1] * (tensor.ndim - 1)).expand(tensor.shape)

    def _move_of(self, tensor: Tensor) -> Any:
        for move in reversed(self._moves):
            if move[0] is tensor and not (move[1] in CASTS and move[2] and move[2][0] is tensor):  # y.long() may be y
                return move
        return None

    def _known(self, tensor: Tensor) -> bool:
        if any(root is tensor for root, _ in self._roots):
            return True
        move = self._move_of(tensor)
        if move is None:
            return False
        data = move[2][0]
        return all(self._known(x) for x in data) if isinstance(data, tuple | list) else self._known(data)

    def _keeps_rows(self, tensor: Tensor) -> bool:
        for root, sample in self._roots:
            if root is tensor:
                return sample is None
        move = self._move_of(tensor)
        if move is None or tensor.ndim == 0 or tensor.shape[0] != self.n:
            return False
        _, func, args, _, _ = move
        data = args[0]
        if isinstance(data, tuple | list) or data.ndim == 0 or data.shape[0] != self.n:
            return False
        keeps = func in CASTS or func in _ROW_KEEPING
        if func is _T.__getitem__ and isinstance(args[1], tuple) and args[1]:
            first = args[1][0]
            keeps = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
            keeps = keeps and not any(isinstance(key, Tensor) for key in args[1])
        return keeps and self._keeps_rows(data)


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
        if sample is None and depth and len(children) == n and not _stacked(children, n):
            for i, child in enumerate(children):  # one element per sample, such as the image list of a detector
                yield from _roots(child, n, i, depth + 1)
            return
    elif hasattr(batch, "__dict__") and not isinstance(batch, torch.nn.Module):
        children = list(vars(batch).values())
    else:
        return
    for child in children:
        yield from _roots(child, n, sample, depth + 1)


def _stacked(children: list[Any], n: int) -> bool:
    return all(isinstance(x, Tensor) and x.ndim and x.shape[0] == n for x in children)
