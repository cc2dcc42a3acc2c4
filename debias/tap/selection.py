"""Which of a step's losses reach the returned loss, by which factor, and which of them a method means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debias.errors import SPLIT, AmbiguousLossError, DebiasError, LossNotFoundError, UntappedLossError
from debias.tap.calls import LossCall, means
from debias.tap.tap import LossTap

__all__ = ["Reaching", "height", "means", "of_batch", "reaching", "select_call", "select_calls", "untapped"]


@dataclass(eq=False)
class Reaching:
    """What the returned loss is made of.

    Attributes:
        loss: the returned loss.
        calls: the losses that it depends on.
        lost: names of those that cannot be taken apart.
        same: it is the one loss itself.
    """

    loss: Tensor
    calls: list[LossCall]
    lost: list[str] = field(default_factory=list)
    same: bool = False
    _nodes: dict[Any, None] = field(default_factory=dict)
    _factors: dict[LossCall, Tensor] = field(default_factory=dict)

    def has_other_terms(self, constant: set[Any] | frozenset[Any] = frozenset()) -> bool:
        """Whether a term of it depends on what the network made of the batch, other than through these losses.

        It does if it shares a part of the graph with them, or if data enters it: where a layer multiplies something
        that needs no gradient with its weights. Neither is what is made of parameters alone, such as sampled weights.

        Args:
            constant: nodes of the graph that are known to be made of parameters alone.
        """
        ends = {call.record.edge.node for call in self.calls}
        others = ends | constant
        above = [node for node in self._nodes if node not in others and type(node).__name__ != "AccumulateGrad"]
        below = _reached([parent for end in ends for parent in _parents(end)], _parents)
        return any(node in below or _takes_data(node) for node in above)

    def multiply(self, calls: list[LossCall]) -> None:
        """Tell losses what the returned loss multiplies them by.

        Raises:
            DebiasError: a loss is a sum that nothing divides, or the returned loss is not linear in it.
        """
        for call in calls:
            if call.record.undivided:
                raise _undivided(call)
            if call.record.of_batch:
                raise of_batch(call)
        if self.same:
            for call in calls:
                call.multiply(None)
            return
        edges = [call.record.edge for call in calls]
        factors = torch.autograd.grad(self.loss, edges, create_graph=True)
        learned = [factor for factor in factors if factor.requires_grad]
        bends = self._bend() or any(
            x is not None
            for factor in learned
            for x in torch.autograd.grad(factor.sum(), edges, retain_graph=True, allow_unused=True)
        )
        if bends:
            raise UntappedLossError(
                f"Expected the returned loss to be linear in `{calls[0].name}`, a sum with factors, but the step makes"
                f" something else of it ({bends if isinstance(bends, str) else 'a root, a power, flooding'}), so that"
                " the loss of a group is not known. Apply it to the losses of the samples (`reduction='none'`)."
                f" {SPLIT}"
            )
        for call, factor in zip(calls, factors, strict=True):
            self._factors[call] = factor
            call.multiply(factor)

    def _bend(self) -> str:
        """What lies between the losses and the returned one that is not linear, such as a maximum; "" for nothing.

        In a batch a clamp, a maximum or a choice may look like a factor.
        """
        ends = {call.record.edge.node for call in self.calls}
        users: dict[Any, list[Any]] = {}
        for node in self._nodes:
            for parent in _parents(node) if node not in ends else ():
                users.setdefault(parent, []).append(node)
        for node in _reached(list(ends), lambda node: users.get(node, [])):
            kind = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
            own = isinstance(node, torch.autograd.function.BackwardCFunction)  # may be anything, compiled code too
            if node not in ends and not own and kind not in _LINEAR:
                return f"`{kind.lower()}`"
        return ""

    def replaced(self, calls: list[LossCall], value: Tensor) -> Tensor:
        """The returned loss with ``value`` where it has these losses, whose factors are known."""
        if self.same:
            return value
        for call in calls:
            received, version = call.record.received  # type: ignore[misc]
            if received._version != version:  # changed in place since
                received = call.record.value().view_as(self._factors[call])
            value = value - (self._factors[call] * received).sum()
        return self.loss + value


# What autograd calls that which is linear in each of its arguments, or does nothing to numbers that are finite.
_LINEAR = frozenset(
    {"Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Sum", "Mean", "Dot", "Mv", "Mm", "Addmm", "Addmv", "Bmm", "Lerp"}
    | {"Stack", "Cat", "View", "UnsafeView", "ReshapeAlias", "AsStrided", "Unsqueeze", "Squeeze", "Expand", "Repeat"}
    | {"Select", "Slice", "Index", "IndexSelect", "Gather", "Narrow", "Split", "SplitWithSizes", "Unbind", "Clone"}
    | {"T", "Transpose", "Permute", "Alias", "ToCopy", "CopySlices", "Copy", "CopyBackwards", "NanToNum", "Cumsum"}
    | {"Addcmul", "Addcdiv", "Linear", "LinalgVecdot", "Fill", "SelectScatter", "Identity", "Error", "Trace", "Nansum"}
    | {"IndexAdd", "ScatterAdd", "MaskedSelect", "Take", "Flip", "Roll", "Diagonal"}
)

# Where layers of each kind have their data, among what they differentiate; None for anywhere.
_DATA = {
    "AddmmBackward0": 1, "ConvolutionBackward0": 0, "MmBackward0": None, "BmmBackward0": None, "MvBackward0": None,
}  # fmt: skip


def _takes_data(node: Any) -> bool:
    """Whether a layer reads something that needs no gradient."""
    name = node.name().rpartition("::")[2]
    if name == "EmbeddingBackward0":
        return True
    if name not in _DATA:
        return False
    given, place = _parents(node), _DATA[name]
    return None in given if place is None else given[place] is None


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions]


def _reached(todo: list[Any], onward: Callable[[Any], list[Any]]) -> dict[Any, None]:
    """These nodes of the autograd graph, and those that each leads on to, in the order in which they are met."""
    seen: dict[Any, None] = {}
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = None
            todo.extend(onward(node))
    return seen


def reaching(tap: LossTap, loss: Tensor) -> Reaching:
    """The losses that the returned loss depends on.

    Most steps return one loss as it is. Else the autograd graph is walked down to the losses, which is a handful of
    nodes unless another term of the loss goes through the network.
    """
    calls = [call for call in tap.calls if call.record.edge is not None]
    for call in calls:
        edge = call.record.edge
        if edge.node is loss.grad_fn and edge.output_nr == loss.output_nr:
            return Reaching(loss, [call], same=True)
    ends = {call.record.edge.node for call in calls}
    seen = _reached([loss.grad_fn], lambda node: [] if node in ends else _parents(node))
    calls = [call for call in calls if call.record.edge.node in seen]
    lost = [name for name, at in tap.untapped if at in seen and at not in ends]
    return Reaching(loss, calls, lost, _nodes=seen)


def select_calls(calls: list[LossCall], loss: Any, who: str) -> list[LossCall]:
    """The calls that ``loss=`` means.

    Raises:
        AmbiguousLossError: there are several and nothing says which, or none is meant.
    """
    chosen = [call for call in calls if means(loss, call)]
    if loss is None and len(calls) > 1:
        raise ambiguous([call.name for call in calls], who)
    if not chosen:
        raise AmbiguousLossError(
            f"Expected `loss={loss!r}` of {who} to choose one of the losses that reach the returned loss, but the step"
            f" computed {[(call.position, call.name) for call in calls]}. Correct `loss=`."
        )
    return chosen


def select_call(calls: list[LossCall], loss: Any, who: str, way: str = "") -> LossCall:
    """The one loss of an evaluation step that a monitor means by ``loss=``; ``way``: what else it may be told.

    Raises:
        AmbiguousLossError: it chooses none of them, or several.
    """
    chosen = [call for call in calls if means(loss, call)]
    if len(chosen) != 1:
        raise AmbiguousLossError(
            f"Expected the evaluation step to compute one loss for {who}, but got {len(calls)}:"
            f" {', '.join(f'{call.name} at {call.position}' for call in calls)}"
            f"{'' if loss is None else f', of which `loss={loss!r}` chooses {len(chosen)}'}. Say which:"
            f" `loss=<position>`, or `loss=callable(call) -> bool`{way}."
        )
    return chosen[0]


def height(call: LossCall) -> int:
    """Rows that a loss has of its own, along the first axis: nothing is read from the device."""
    elements = call.record.elements[0]
    return elements.shape[0] // call.parts if elements.ndim else 1


def ambiguous(names: Sequence[str], who: str, *, manual: bool = False) -> AmbiguousLossError:
    """The error for several losses of which nothing says which is meant."""
    every = "" if manual else "`loss='sum'` (all of them, with the same weights), "
    return AmbiguousLossError(
        f"Expected the training step to compute one loss for {who}, but got {len(names)}: {', '.join(names)}. Say"
        f" which: {every}`loss=<index>`, or `loss=callable(call) -> bool`."
    )


def untapped(lost: list[str], beside: bool) -> DebiasError:
    """The error for losses that cannot be taken apart, alone or beside others that can."""
    error, what = (UntappedLossError, "next to a loss that can") if beside else (LossNotFoundError, "and no other")
    reduce = "Reduce it by `.mean()`, or by `.sum()` divided by the sum of the mask or weights; or return"
    return error(
        f"Expected every loss that reaches the returned loss to be one that can be taken apart per sample, but"
        f" `{lost[0]}` reaches it in a way that cannot be followed, {what}."
        f" {reduce if 'none' in lost[0] else 'Return'} {{'loss': loss, 'losses': per_sample}}, whose mean the loss is;"
        f" or `debias.register_loss(...)`. {SPLIT}"
    )


def of_batch(call: LossCall, *, manual: bool = False) -> DebiasError:
    """The error for a loss that is multiplied by a number of the whole batch, or has targets made of it."""
    way = (
        f"use automatic optimisation. There m{SPLIT[1:]}"
        if manual
        else f"return {{'loss': loss, 'losses': per_sample}}, which are taken as they are. {SPLIT}"
    )
    return UntappedLossError(
        f"Expected the target of `{call.name}`, and what the step multiplies or selects it by, to be a constant, or of"
        " each sample, but got a number that is made of the whole batch (a mean, a maximum, a count, a rank, samples"
        " mixed or moved by a matrix or by `scatter`): that of a group is another one, so that the loss of a group is"
        f" not known. Divide a sum by the sum of its weights, `(losses * w).sum() / w.sum()`; or {way}"
    )


def _undivided(call: LossCall) -> DebiasError:
    return UntappedLossError(
        f"Expected the step to divide the sum of `{call.name}` by what it runs over, so that the loss of a group does"
        " not depend on how many samples it has, but nothing of that kind divides it. Divide by the number of samples"
        " or elements, `losses.sum() / len(x)`, or by the sum of the weights or of the mask that the losses were"
        f" multiplied by, `losses.sum() / mask.sum()`; or use `.mean()`. {SPLIT}"
    )
