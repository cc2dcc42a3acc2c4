"""What the network predicted, where the step or its criterion changed that before the loss. Torch only.

Margins, the logarithm of a prior and the offsets of logit adjustment make a classification loss, not a prediction:
they depend on the labels, or are left out when the network is used. In an evaluation step, and in a training step
where somebody asks, it is remembered what the network makes: the outputs of the module's ``forward`` and of its direct
children, parameters, and what is computed of these. Logits that are one output with something that the network has not
made added, subtracted, put in or multiplied have that output, brought to their shape, as their prediction.

Part of the network, and kept, are: reshapes, functions of each number (softmax, a cosine), factors that are one number
(a scale, a temperature, learned or not), classes that are masked, with a number or by adding a very large one, and
numbers that bring probabilities to [0, 1]. What is subtracted from something keeps its sign. What is made of two
outputs or parameters (two networks, a residual, a bias) is an output of its own. What a direct child returns is one as
a whole, unless it is given the labels.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from debias.tap.calls import shares_memory
from debias.tap.counted import CountedElements
from debias.tap.moves import CASTS, MOVES, functions, tensors_in, values_read

__all__ = ["CLASSIFYING", "SOFTMAX", "Evaluated", "Predictions"]

# Losses whose logits may be changed without changing what is predicted; numbers are predicted as the loss reads them.
CLASSIFYING = frozenset(
    {"cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "multi_margin_loss"}
    | {"LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"}  # timm's
)

# Those in which one class is predicted.
SOFTMAX = frozenset({"cross_entropy", "nll_loss", "LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"})

_SUM = functions("add sub subtract rsub")
_RSUB = functions("rsub")
_SUB = functions("sub subtract") - _RSUB
_PRODUCT = functions("mul multiply div true_divide truediv divide")
_CHOICE = functions("where scatter scatter_add index_add index_put index_copy setitem")
_SMOOTH = "softmax log_softmax sigmoid logsigmoid log exp acos arccos cos asin arcsin sin pow sqrt square tanh softplus"
_CLIPS = "clamp clamp_min clamp_max clip relu hardtanh nan_to_num masked_fill index_fill"
_KEPT = MOVES | CASTS | functions(f"{_SMOOTH} {_CLIPS} neg negative")
_FOLLOWED = _SUM | _PRODUCT | _CHOICE | _KEPT


class _Made(NamedTuple):
    """How a tensor was made.

    Attributes:
        output: the output that it was made of; None of an output itself.
        steps: what was done to it that is part of the network.
        changed: whether something else was done to it; a boolean of shape () is on the device, and not read.
        shifted: whether that is no more than numbers that were added to all of it.
        labels: integer tensors that the child, whose output it is, was given.
        inside: how it was made inside that child.
    """

    output: Tensor | None = None
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    changed: bool | Tensor = False
    shifted: bool = True
    labels: tuple[Any, ...] = ()
    inside: _Made | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """How much was done to it."""
        return 2 if self.changed is True else int(self.changed is not False), len(self.steps)

    def then(
        self, step: Callable[[Tensor], Tensor], changes: bool | Tensor, *, number: bool = False, sign: int = 1
    ) -> _Made:
        """How it is made with one more step.

        Args:
            step: the step; part of the network unless it changes what that predicts.
            changes: whether it does.
            number: it adds a number to all of it, which may be a prior.
            sign: -1 where it subtracts it from something else: what is subtracted from a number has no prior.
        """
        if changes is False:
            return self._replace(steps=(*self.steps, step))
        if changes is True:
            steps = self.steps if sign > 0 else (*self.steps, step if number else torch.neg)
            return self._replace(steps=steps, changed=True, shifted=self.shifted and number)
        unless = functools.partial(_unless, changes, step, sign)
        return self._replace(steps=(*self.steps, unless), changed=self.changed | changes, shifted=False)

    def replayed(self, output: Tensor) -> Tensor:
        """The steps done to an output."""
        for step in self.steps:
            output = step(output)
        return output


_OUTPUT = _Made()


def _unless(changes: Tensor, step: Callable[[Tensor], Tensor], sign: int, x: Tensor) -> Tensor:
    """The step, unless it changes what is predicted; without reading whether it does, which would wait for a GPU."""
    return torch.where(changes, sign * x, step(x))


class Predictions:
    """Remembers what one evaluation step makes of the network's outputs."""

    def __init__(self) -> None:
        self._made: Any = WeakTensorKeyDictionary()

    def close(self) -> None:
        """Let go of every tensor."""
        self._made = WeakTensorKeyDictionary()

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember what the module, or a child of it, has returned for these arguments."""
        given = [x for x in tensors_in((args, kwargs)) if not x.is_floating_point()]
        labels = tuple(weakref.ref(x) for x in given)
        for x in tensors_in(output):
            if x.is_floating_point() and x.ndim:
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
            for made in tensors_in(out):  # of several, as a maximum and its places
                if made.ndim and made.is_floating_point() and not any(made is x for x in operands):
                    self._made[made] = _OUTPUT
            return out
        if func in _PRODUCT and len(known) > 1:  # a learned scale is part of the network, whatever was done before
            known = {x: made for x, made in known.items() if x.numel() > 1} or known
        others = [x for x in operands if x not in known]
        changes = _changes(func, args, others, list(known.values()))
        in_place = _in_place(func) and args[0] in known
        mine: Tensor = args[0] if in_place else min(known, key=lambda x: known[x].rank)
        origin, sign = known[mine], -1 if _subtracts(func, args, mine) else 1
        number = changes is True and func in _SUM and len(known) == 1 and all(x.numel() == 1 for x in others)
        if in_place and origin.output is mine:
            if changes is False:  # a masked output is one still
                return run(func, args, kwargs)
            origin = origin if changes is None else self._kept(mine)

        out = run(func, args, kwargs)
        results = enumerate(out) if isinstance(out, tuple | list) else [(None, out)]
        for i, x in [(None, mine)] if in_place else results:
            if not isinstance(x, Tensor) or (not in_place and any(x is operand for operand in operands)):
                continue
            if changes is None:
                self._made[x] = _OUTPUT
            elif isinstance(changes, Tensor) and len(known) > 1 and func in _SUM and not in_place:
                # Of two columns, masked or not.
                self._made[x] = _Made(origin.output, (_step(func, args, kwargs, known),), changes, shifted=False)
            elif changes is False or mine.shape == x.shape:
                step = _step(func, args, kwargs, {mine: _OUTPUT}, i)
                self._made[x] = origin.then(step, changes, number=number, sign=sign)
        return out

    def of(self, logits: Any, target: Any, loss: str) -> tuple[Tensor | None, bool]:
        """The prediction that logits were made of, shaped like them; None where they are the prediction themselves, or
        nobody knows. And whether they come from a child that was given the target, and that nobody can look into.
        """
        made = self._made.get(logits) if isinstance(logits, Tensor) else None
        steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        found, changed, shifted = logits, False, True
        while made is not None:
            if made.output is not None:
                found, steps, changed = made.output, made.steps + steps, changed or made.changed is not False
                shifted = shifted and made.shifted
                made = self._made.get(found)
            elif isinstance(target, Tensor) and any(_are_same(ref(), target) for ref in made.labels):
                if made.inside is None:
                    return None, True
                made = made.inside
            else:
                break
        if not changed or (shifted and loss == "binary_cross_entropy"):  # a probability was brought to [0, 1]
            return None, False
        return _Made(steps=steps).replayed(found), False

    def _origin(self, x: Tensor) -> _Made:
        """How a known tensor was made: of itself, where it is an output or a parameter."""
        made = self._made.get(x, _OUTPUT)
        return _Made(x) if made.output is None else made

    def _kept(self, x: Tensor) -> _Made:
        """How an output was made that is about to be changed in place: of a copy of it."""
        copy = x.clone()
        self._made[copy] = self._made.get(x, _OUTPUT)
        return _Made(copy)


class Evaluated:
    """Follows the outputs of the network to the losses, and the losses to what the step makes of them."""

    def __init__(self) -> None:
        self.elements = CountedElements()
        self.predictions = Predictions()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the step."""
        return self.predictions.run(func, args, kwargs, self.elements.run)

    def close(self) -> None:
        """Let go of every tensor."""
        self.elements.close()
        self.predictions.close()


def _in_place(func: Any) -> bool:
    name = func.__name__
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))


def _are_same(labels: Tensor | None, target: Tensor) -> bool:
    """Whether these are the labels that a loss is given, but for their shape."""
    return labels is target or (
        labels is not None and labels.numel() == target.numel() and shares_memory(labels, target)
    )


def _subtracts(func: Any, args: tuple[Any, ...], x: Tensor) -> bool:
    """Whether an operation subtracts this from something else."""
    return x is args[0] if func in _RSUB else func in _SUB and len(args) > 1 and x is args[1]


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
    one_number = not any(x.numel() > 1 and x.dtype != torch.bool for x in others)
    masks = func.__name__ == "where" and len(origins) == 1
    return not (func in _KEPT or (one_number and (func in _PRODUCT or masks)))


def _step(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: dict[Tensor, _Made], part: int | None = None
) -> Callable[[Tensor], Tensor]:
    """The same operation on another tensor, which it leaves as it is: ``made`` tells what it reads of that."""
    names = list(kwargs)
    # The tensors themselves are not kept.
    given = [made.get(x, x) if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
    in_place = _in_place(func)

    def step(x: Tensor) -> Any:
        x = x.clone() if in_place else x
        values = [y.replayed(x) if isinstance(y, _Made) else y for y in given]
        positional = len(values) - len(names)
        out = func(*values[:positional], **dict(zip(names, values[positional:], strict=True)))
        return x if in_place else out if part is None else out[part]

    return step
