"""Which elements of an unreduced loss count, in evaluation: what the step masks, selects or replaces does not.

In training a loss is rebuilt from numerators and denominators. In evaluation nothing is rebuilt: a monitor only asks
which predictions the step itself leaves out, such as padding and labels that nobody gave. Torch only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debias.tap.losses import LOSSES, class_weights, unreduced
from debias.tap.moves import CASTS, MOVES, PRODUCT, apply_move, axes_of, functions, values_read

__all__ = ["CountedElements", "both", "counted_by", "left_out", "replaces"]

_T = torch.Tensor
_WHERE = functions("where")
_FILL = functions("masked_fill")
_SET = frozenset({_T.__setitem__})
_NAN = functions("nan_to_num")
_REDUCE = functions("sum mean nansum nanmean")
# Every element is made of the elements in its place, and none is left out.
_ELEMENTWISE = CASTS | functions(
    "add sub subtract rsub div true_divide truediv divide exp neg negative pow sqrt square abs log log1p clamp"
    " clamp_min clamp_max clip minimum maximum tanh sigmoid"
)
_KEEPS_PLACES = PRODUCT | _WHERE | _FILL | _SET | _NAN | _ELEMENTWISE
_COMPARES = functions("gt ge lt le eq ne greater less")
_FOLLOWED = MOVES | _REDUCE | _KEEPS_PLACES | _COMPARES
# Made of their first argument; what else they are given are places, masks and values to put there.
_OF_THE_FIRST = MOVES | _REDUCE | _FILL | _SET


@dataclass(eq=False)
class _Trace:
    """A tensor made of an unreduced loss.

    Attributes:
        tensor: the tensor.
        loss: number of the loss.
        counts: which of its elements count, in its shape; None where all do.
        source: what it was made of; None of the loss itself.
        places: which element of ``source`` each one is, in its shape; None where they are the same.
        dims: the axes of ``source`` that it is a sum over; None of no sum.
        used: whether something else was made of it.
    """

    tensor: Tensor
    loss: int
    counts: Tensor | None = None
    source: _Trace | None = None
    places: Tensor | None = None
    dims: list[int] | None = None
    used: bool = False


class CountedElements:
    """Follows unreduced losses through one evaluation step."""

    def __init__(self) -> None:
        self._traces: list[_Trace] = []
        self._choices: list[Tensor] = []  # of hard examples: masks that the losses decide leave no label out
        self._losses = 0
        self.returned: Any = None  # what the step returned as its loss

    def start(self, losses: Tensor) -> Callable[[], Tensor | None]:
        """Follow these losses; the function tells, after the step, which elements count: None where all do."""
        number, self._losses = self._losses, self._losses + 1
        self._traces.append(_Trace(losses, number))
        return lambda: self._counted(number)

    def close(self) -> None:
        """Let go of every tensor."""
        self._traces, self._choices, self.returned = [], [], None

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and follow what it makes of the losses."""
        data = (args[:1], {}) if func in _OF_THE_FIRST else (args, kwargs)
        operands = values_read(func, *data) if func in _FOLLOWED else []
        found = [trace for trace in self._traces if any(trace.tensor is x for x in operands)]
        masks = [self._mask(func, args, kwargs, trace) if func in _KEEPS_PLACES else None for trace in found]
        out = func(*args, **kwargs)
        if (func in _COMPARES and found) or (func in CASTS and self._chooses(args)):
            self._choices.append(out)
            return out
        if self._chooses(args):
            return out
        for trace, mask in zip(found, masks, strict=True):
            if func in _SET or out is args[0]:
                if trace.tensor is args[0]:
                    trace.counts = both(trace.counts, mask)
                continue
            for part, x in enumerate(out) if isinstance(out, tuple | list) else [(None, out)]:
                self._traces.append(_made(func, args, kwargs, trace, mask, x, part))
                trace.used = True
        return out

    def _chooses(self, args: tuple[Any, ...]) -> bool:
        return any(x is choice for x in args for choice in self._choices)

    def _mask(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], trace: _Trace) -> Tensor | None:
        """Which elements an operation that keeps their places leaves; None where all."""
        losses = trace.tensor
        others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x is not losses]
        if func in _NAN:
            return ~losses.isnan()
        if (replaced := replaces(func, args, kwargs, losses)) is not None:
            shapes = [x.shape for x in (losses, replaced[0], replaced[1]) if isinstance(x, Tensor)]
            return replaced[0].expand(shapes[0] if func in _SET else torch.broadcast_shapes(*shapes))
        factor = others[0] if func in PRODUCT and others else None
        if factor is None or not factor.ndim or any(other.tensor is factor for other in self._traces):
            return None
        return ~left_out(*torch.broadcast_tensors(factor, losses))

    def _counted(self, number: int) -> Tensor | None:
        """Which elements of a loss count: those that reach the returned loss, or else one of the ends made of it."""
        total: Tensor | None = None
        ends = [trace for trace in self._traces if trace.loss == number and not trace.used]
        # Others may be no more than logged.
        for end in [end for end in ends if end.tensor is self.returned] or ends:
            counts, trace = end.counts, end
            while trace.source is not None:
                counts = both(_at_source(trace, trace.source.tensor, counts), trace.source.counts)
                trace = trace.source
            if counts is None:
                return None
            total = counts if total is None else total | counts
        return total


def replaces(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[Tensor, Any] | None:
    """Which elements an operation leaves, and what it puts in the place of the others; None of one that does not."""
    if func in _SET:
        kept = torch.ones_like(x, dtype=torch.bool)
        kept[args[1]] = False  # of rows, where the place is of rows
        return kept, args[2]
    if func in _FILL:
        mask, value = (*args[1:], *(kwargs[name] for name in ("mask", "value")[len(args) - 1 :]))
        return ~mask, value
    if func in _WHERE and len(args) == 3:
        condition, kept, other = (args[1], args[0], args[2]) if func is _T.where else args
        return (condition, other) if kept is x else (~condition, kept)
    return None


def _made(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], trace: _Trace, mask: Tensor | None, out: Tensor, part: Any
) -> _Trace:
    """What an operation has made of a trace: its result, or one of several."""
    tensor = trace.tensor
    if func in MOVES:
        return _Trace(out, trace.loss, source=trace, places=apply_move(func, args, kwargs, _places(tensor), part))
    if func in _REDUCE:
        if func.__name__.startswith("nan"):
            trace = _Trace(tensor, trace.loss, ~tensor.isnan(), source=trace)
        return _Trace(out, trace.loss, source=trace, dims=axes_of(args, kwargs, tensor.ndim))
    places = _places(tensor).expand(out.shape) if out.shape != tensor.shape else None
    return _Trace(out, trace.loss, mask, source=trace, places=places)


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """What counts in both, where None stands for everything."""
    return second if first is None else first if second is None else first & second


def _at_source(trace: _Trace, source: Tensor, counts: Tensor | None) -> Tensor | None:
    """What counts of a trace, in the places of its source."""
    if trace.dims is not None and counts is not None:
        shape = [1 if d in trace.dims else size for d, size in enumerate(source.shape)]
        return counts.reshape(shape).expand(source.shape)
    if trace.places is None:
        return counts
    kept = torch.zeros(source.numel(), dtype=torch.bool, device=source.device)
    kept[trace.places if counts is None else trace.places[counts]] = True
    return kept.view(source.shape)


def left_out(factor: Tensor, losses: Tensor) -> Tensor:
    """Which elements a factor leaves out: those it is 0 for.

    That of a focal loss is 0, too, where the network is beyond doubt and the loss is 0 itself: such zeros leave nothing
    out, unless all factors are 0 or 1 and other zeros show that they are a mask.
    """
    zeros = factor == 0
    if not factor.is_floating_point():
        return zeros
    doubted = ~(losses.abs() <= 1e-6)
    is_mask = (zeros | (factor == 1)).all() & (zeros & doubted).any()
    return zeros & (doubted | is_mask)


def counted_by(func: Any, arguments: dict[str, Any]) -> Callable[[], Tensor | None]:
    """Which elements a loss counts, by its own arguments; None where all."""

    def counted() -> Tensor | None:
        target, weight = arguments.get("target"), arguments.get("weight")
        if LOSSES[func] is class_weights:
            if target is None or target.is_floating_point():
                return None
            return class_weights(torch.ones((), device=target.device), arguments) != 0
        logits = next(iter(arguments.values()))
        if not isinstance(weight, Tensor) or func.__name__ == "multi_margin_loss" or not bool((weight == 0).any()):
            return None
        losses = unreduced(func, arguments | {"weight": None})
        return ~left_out(*torch.broadcast_tensors(weight, losses)) if losses.shape == logits.shape else None

    return counted
