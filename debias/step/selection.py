"""Which of a step's losses reach the returned loss, and which of those a method means."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from debias.errors import AmbiguousLossError, DebiasError, LossNotFoundError, UntappedLossError
from debias.step.tap import LossCall, LossTap

__all__ = ["ambiguous", "height", "out_of_place", "reaching", "select_call", "select_calls", "untapped"]


def _nodes(start: Any, ends: set[Any]) -> set[Any]:
    """Nodes of the autograd graph above ``ends``, these included."""
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in ends:
            todo.extend(parent for parent, _ in node.next_functions)
    return seen


def reaching(tap: LossTap, loss: Tensor) -> tuple[list[LossCall], list[str]]:
    """The losses that the returned loss depends on, and the names of those that cannot be taken apart.

    Looked up in every step: the autograd graph is walked down to the losses that were handed back, which is a handful
    of nodes unless another term of the loss goes through the network.
    """
    ends = {call.edge.node for call in tap.calls if call.edge is not None}
    seen = _nodes(loss.grad_fn, ends)
    calls = [call for call in tap.calls if call.edge is not None and call.edge.node in seen]
    return calls, [name for name, node in tap.untapped if node in seen and node not in ends]


def untapped(lost: list[str], beside: bool) -> DebiasError:
    """The error for losses that cannot be taken apart, alone or beside others that can."""
    error, what = (UntappedLossError, "next to a loss that can") if beside else (LossNotFoundError, "and no other")
    return error(
        f"Expected every loss that reaches the returned loss to be one that can be taken apart per sample, but"
        f" `{lost[0]}` reaches it in a way that cannot be followed, {what}. Reduce it by `.mean()` or `.sum()`"
        " with masks and weights only, or return {'loss': loss, 'losses': per_sample}, or"
        " `debias.register_loss(...)`."
    )


def select_calls(calls: list[LossCall], loss: Any, who: str) -> list[LossCall]:
    """The calls that ``loss=`` means."""
    if loss == "sum":
        return calls
    if isinstance(loss, int):
        chosen = [call for call in calls if call.position == loss]
    elif callable(loss):
        chosen = [call for call in calls if loss(call)]
    elif len(calls) > 1:
        raise ambiguous([call.name for call in calls], who)
    else:
        return calls
    if not chosen:
        raise AmbiguousLossError(
            f"Expected `loss={loss!r}` of {who} to choose one of the losses that reach the returned loss, but the step"
            f" computed {[(call.position, call.name) for call in calls]}. Correct `loss=`."
        )
    return chosen


def select_call(calls: list[LossCall], loss: Any, who: str) -> LossCall:
    """The one loss of an evaluation step that a monitor means by ``loss=``.

    Raises:
        AmbiguousLossError: it chooses none of them, or several.
    """
    if isinstance(loss, int):
        chosen = [call for call in calls if call.position == loss]
    else:
        chosen = [call for call in calls if loss is None or loss(call)]
    if len(chosen) != 1:
        raise AmbiguousLossError(
            f"Expected the evaluation step to compute one loss for {who}, but got {len(calls)}:"
            f" {', '.join(f'{call.name} at {call.position}' for call in calls)}"
            f"{'' if loss is None else f', of which `loss={loss!r}` chooses {len(chosen)}'}. Say which:"
            " `loss=<position>`, or `loss=callable(call) -> bool`."
        )
    return chosen[0]


def out_of_place(there: list[LossCall], meant: list[LossCall], calls: list[LossCall]) -> AmbiguousLossError:
    """The error for a step that computes another loss where the one that is meant stood."""
    return AmbiguousLossError(
        f"Expected the loss that is meant to stand in the same place in every step, but got"
        f" {[call.name for call in there]} there and {[call.name for call in meant]} in the returned loss of this step,"
        f" which computed {[call.name for call in calls]}. Compute losses that are only logged under"
        " `torch.no_grad()`, or choose: `loss=callable(call) -> bool`."
    )


def height(call: LossCall) -> int:
    """Rows that a loss has of its own, along the first axis: nothing is read from the device."""
    elements = call.elements[0]
    return elements.shape[0] // call.parts if elements.ndim else 1


def ambiguous(names: list[str], who: str) -> AmbiguousLossError:
    """The error for several losses of which nothing says which is meant."""
    return AmbiguousLossError(
        f"Expected the training step to compute one loss for {who}, but got {len(names)}: {', '.join(names)}. Say"
        " which: `loss='sum'` (all of them, with the same weights), `loss=<index>`, or `loss=callable(call) -> bool`."
    )
