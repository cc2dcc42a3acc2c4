"""What the network predicted, where the step or its criterion changed that before the loss. Torch only.

Margins, the logarithm of a prior and the offsets of logit adjustment make a classification loss, not a prediction:
they depend on the labels, or are left out when the network is used. In an evaluation step, and in a training step
where somebody asks, it is remembered what the network makes: the outputs of the module's ``forward`` and of its direct
children, parameters, and what is computed of these. Logits that are one output with something that the network has not
made added, subtracted, put in or multiplied have that output, brought to their shape, as their prediction.

Part of the network, and kept, are: reshapes, functions of each number (softmax, a cosine), factors that are one number
(a scale, a temperature), and classes that are masked, with a number or by adding a very large one. What is made of two
outputs or parameters (two networks, a residual, a bias) is an output of its own. What a direct child returns is one as
a whole, unless it is given the labels.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from debias.tap.counted import functions
from debias.tap.moves import CASTS, MOVES, values_read

__all__ = ["CLASSIFYING", "SOFTMAX", "Predictions", "hook_outputs"]

# Losses whose logits may be changed without changing what is predicted; numbers are predicted as the loss reads them.
CLASSIFYING = frozenset(
    {"cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "multi_margin_loss"}
    | {"LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"}  # timm's
)

# Those in which one class is predicted.
SOFTMAX = frozenset({"cross_entropy", "nll_loss", "LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"})

_SUM = functions("add sub subtract rsub")
_PRODUCT = functions("mul multiply div true_divide truediv divide")
_CHOICE = functions("where scatter scatter_add index_add index_put index_copy setitem")
_SMOOTH = "softmax log_softmax sigmoid logsigmoid log exp acos arccos cos asin arcsin sin pow sqrt square tanh"
_KEPT = MOVES | CASTS | functions(f"{_SMOOTH} clamp clamp_min clamp_max clip masked_fill")
_KEPT |= {F.softmax, F.log_softmax, F.logsigmoid}
_FOLLOWED = _SUM | _PRODUCT | _CHOICE | _KEPT


def hook_outputs(module: nn.Module, hook: Callable[..., None]) -> list[Any]:
    """Handles of a forward hook on a module and its direct children; a compiled child would compile the hook, too."""
    watched = [module, *(child for child in module.children() if getattr(child, "_compiled_call_impl", None) is None)]
    return [each.register_forward_hook(hook, with_kwargs=True) for each in watched]


class _Made(NamedTuple):
    """How a tensor was made.

    Attributes:
        output: the output that it was made of; None of an output itself.
        steps: what was done to it that is part of the network.
        changed: whether something else was done to it; a boolean of shape () is on the device, and not read.
        labels: integer tensors that the child, whose output it is, was given.
        inside: how it was made inside that child.
    """

    output: Tensor | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    changed: bool | Tensor = False
    labels: tuple[Any, ...] = ()
    inside: _Made | None = None

    def then(self, step: Callable[[Tensor], Tensor], changes: bool | Tensor) -> _Made:
        """How it is made with one more step, which is part of the network unless it changes what that predicts."""
        if changes is True:
            return self._replace(changed=True)
        if changes is False:
            return self._replace(steps=(*self.steps, step))
        unless = functools.partial(_unless, changes, step)
        return self._replace(steps=(*self.steps, unless), changed=self.changed | changes)


_OUTPUT = _Made()


def _unless(changes: Tensor, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The step, unless it changes what is predicted; without reading whether it does, which would wait for a GPU."""
    return torch.where(changes, x, step(x))


class Predictions:
    """Remembers what one evaluation step makes of the network's outputs."""

    def __init__(self) -> None:
        self._made: Any = WeakTensorKeyDictionary()

    def close(self) -> None:
        """Let go of every tensor."""
        self._made = WeakTensorKeyDictionary()

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember what the module, or a child of it, has returned for these arguments."""
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point()]
        labels = tuple(weakref.ref(x) for x in given)
        parts = (
            output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
        )
        for x in parts:
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim:
                known = self._made.get(x)
                if known is None or known.output is not None:
                    self._made[x] = _Made(labels=labels, inside=known) if labels else _OUTPUT

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """Run an operation, and remember what it makes of outputs."""
        joined = args[0] if args and isinstance(args[0], tuple | list) else ()
        operands = values_read(func, (*args, *joined), kwargs)
        known = {x: self._origin(x) for x in operands if isinstance(x, nn.Parameter) or x in self._made}
        if not known:
            return run(func, args, kwargs)
        if func not in _FOLLOWED or joined:
            out = run(func, args, kwargs)
            if isinstance(out, Tensor) and out.ndim and out.is_floating_point() and not any(out is x for x in operands):
                self._made[out] = _OUTPUT
            return out
        changes = _changes(func, args, [x for x in operands if x not in known], list(known.values()))
        in_place = _in_place(func) and args[0] in known
        mine: Tensor = args[0] if in_place else _least_changed(known)
        origin = known[mine]
        if in_place:
            itself = origin.output is mine
            if changes is None:
                self._made[mine] = _OUTPUT
            elif changes is not False or not itself:  # a masked output is one still
                origin = self._kept(mine) if itself else origin
                self._made[mine] = origin.then(_step(func, args, kwargs, mine), changes)
            return run(func, args, kwargs)
        out = run(func, args, kwargs)
        for i, x in enumerate(out) if isinstance(out, tuple | list) else [(None, out)]:
            if not isinstance(x, Tensor) or any(x is operand for operand in operands):
                continue
            if changes is None:
                self._made[x] = _OUTPUT
            elif changes is False or mine.shape == x.shape:
                self._made[x] = origin.then(_step(func, args, kwargs, mine, i), changes)
        return out

    def of(self, logits: Any, target: Any) -> tuple[Tensor | None, bool]:
        """The prediction that logits were made of, shaped like them; None where they are the prediction themselves, or
        nobody knows. And whether they come from a child that was given the target, and that nobody can look into.
        """
        made = self._made.get(logits) if isinstance(logits, Tensor) else None
        steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        found, changed = logits, False
        while made is not None:
            if made.output is not None:
                found, steps, changed = made.output, made.steps + steps, changed or made.changed is not False
                made = self._made.get(found)
            elif isinstance(target, Tensor) and any(ref() is target for ref in made.labels):
                if made.inside is None:
                    return None, True
                made = made.inside
            else:
                break
        if not changed:
            return None, False
        for step in steps:
            found = step(found)
        return found, False

    def _origin(self, x: Tensor) -> _Made:
        """How a known tensor was made: of itself, where it is an output or a parameter."""
        made = self._made.get(x, _OUTPUT)
        return _Made(x) if made.output is None else made

    def _kept(self, x: Tensor) -> _Made:
        """How an output was made that is about to be changed in place: of a copy of it."""
        copy = x.clone()
        self._made[copy] = self._made.get(x, _OUTPUT)
        return _Made(copy)


def _in_place(func: Any) -> bool:
    name = func.__name__
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))


def _least_changed(known: dict[Tensor, _Made]) -> Tensor:
    """Of the operands of an operation, the one that it is done to."""

    def rank(x: Tensor) -> int:
        changed = known[x].changed
        return 2 if changed is True else int(changed is not False)

    return min(known, key=rank)


def _changes(func: Any, args: tuple[Any, ...], others: list[Tensor], origins: list[_Made]) -> bool | Tensor | None:
    """Whether an operation changes what the network predicts, and is no part of it; None if it makes another output."""
    if func.__name__ == "__setitem__":
        return isinstance(args[2], Tensor) and args[2].ndim > 0
    if len({id(origin.output) for origin in origins}) > 1:
        return None
    changed = [origin.changed for origin in origins]
    if len(origins) > 1 and not any(part is True for part in changed):
        unread = [part for part in changed if isinstance(part, Tensor)]
        return torch.stack(unread).any() if unread else None  # parts of one output: a difference of two columns
    adds = len(origins) == 1 and not any(isinstance(x, int | float) and x for x in args)  # `sum(views)` begins with 0
    if func in _SUM and adds and all(x.ndim for x in others):
        parts = [((x != 0) & (x.abs() < 100)).any() for x in others]  # False if it leaves classes out, and no more
        return torch.stack(parts).any() if parts else False
    one_number = not any(x.ndim and x.dtype != torch.bool for x in others)
    masks = func.__name__ == "where" and len(origins) == 1
    return not (func in _KEPT or (one_number and (func in _PRODUCT or masks)))


_HERE = object()


def _step(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mine: Tensor, part: int | None = None
) -> Callable[[Tensor], Tensor]:
    """The same operation on another tensor, which it leaves as it is."""
    args = tuple(_HERE if x is mine else x for x in args)
    kwargs = {name: _HERE if x is mine else x for name, x in kwargs.items()}
    in_place = _in_place(func)

    def step(x: Tensor) -> Any:
        x = x.clone() if in_place else x
        named = {name: x if y is _HERE else y for name, y in kwargs.items()}
        out = func(*(x if y is _HERE else y for y in args), **named)
        return x if in_place else out if part is None else out[part]

    return step
