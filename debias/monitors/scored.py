"""What a monitor scores of an evaluation step: predictions, targets, the samples they belong to, and which count.

Both are those of the loss that the step computes. Logits that the step or its criterion has changed before the loss are
scored as the network made them (:mod:`debias.tap.predictions`); what the loss leaves out is not scored
(:mod:`debias.tap.counted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import DebiasError, RowsError
from debias.tap.calls import LossCall
from debias.tap.selection import select_call

__all__ = [
    "IGNORED",
    "Scored",
    "check_rows",
    "counted_like",
    "is_flattened",
    "logits_of",
    "loss_of",
    "predicted_by",
    "shifted_like",
    "without",
]

IGNORED = -100  # what targets that do not count are renamed to


class Scored(NamedTuple):
    """What one evaluation step has to be scored.

    Attributes:
        logits: ``(rows, ...)``.
        target: ``(rows, ...)``.
        rows: sample of each row, int64 ``(rows,)``; None where row i is sample i.
        counted: which elements of the target count, in its shape; None where all do.
        loss: name of the loss that was computed from them; None of none.
    """

    logits: Tensor
    target: Tensor
    rows: Tensor | None
    counted: Tensor | None
    loss: str | None


def loss_of(calls: list[LossCall], loss: Any, who: str, way: str = "") -> LossCall | None:
    """The loss of the evaluation step that ``loss=`` means; None of a step without one. See :func:`select_call`.

    Raises:
        AmbiguousLossError: there are several, or none that it chooses.
    """
    return select_call(calls, loss, who, way) if calls else None


def predicted_by(call: LossCall, who: str) -> Any:
    """What the network predicted, shaped like the logits of the loss.

    Raises:
        DebiasError: it was given the labels.
    """
    if call.from_labels:
        raise DebiasError(
            f"Expected the logits of `{call.name}` to be predictions for {who}, but the submodule that returns them is"
            " given the target, as one that adds a margin: they tell the label. Pass `logits=`, the dotted path of the"
            " layer before, or a callable of what the step returns, and `target=`."
        )
    return call.logits if call.predicted is None else call.predicted


def counted_like(counted: Tensor | None, target: Tensor) -> Tensor | None:
    """Which elements of a loss count, in the shape of a target; None where all do, or nothing is alike.

    Of a target with one value where the loss has several elements, such as class ids beside a binary loss of each
    class, those count that have an element which does.
    """
    if counted is None or counted.shape == target.shape:
        return counted
    shared = min(counted.ndim, target.ndim)
    if counted.shape[:shared] != target.shape[:shared]:
        return None
    if counted.ndim > target.ndim:
        return counted.flatten(shared).any(-1)
    return counted.reshape(*counted.shape, *[1] * (target.ndim - shared)).expand(target.shape)


def shifted_like(target: Tensor, calls: list[LossCall]) -> Tensor:
    """Labels of tokens ``(N, T)``, moved to the place before where a loss of the step does so: a language model's."""
    if target.ndim != 2 or target.is_floating_point() or target.shape[1] < 2:
        return target
    shifted = target[:, 1:]
    for call in calls:
        labels = call.target
        if isinstance(labels, Tensor) and labels.numel() in (target.numel(), shifted.numel()):
            labels = labels.reshape(len(target), -1)[:, : shifted.shape[1]]
            if torch.equal(labels, shifted) and not torch.equal(labels, target[:, :-1]):
                return F.pad(shifted, (0, 1), value=IGNORED)
    return target


def is_flattened(target: Tensor, labels: Any) -> bool:
    """Whether the labels of a loss are the target itself, flattened by the step, without the last place or with it."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or target.ndim < 2:
        return False
    return any(torch.equal(form.flatten(), labels) for form in (target, target[:, :-1]))


def check_rows(logits: Tensor, target: Tensor, n: int) -> None:
    """Refuse logits and target that have not as many rows, or none that are known to be of ``n`` samples.

    Raises:
        RowsError: they have not.
    """
    for what, tensor in (("logits", logits), ("target", target)):
        if tensor.ndim == 0 or tensor.shape[0] != n:
            raise RowsError(
                f"Expected the {what} to have one row for each of the {n} group ids, but got shape"
                f" {tuple(tensor.shape)}. Pass `logits=` and `target=` that have one row per sample; a `collate_fn`"
                " must not leave samples out, as ids cannot follow."
            )


def logits_of(output: Any) -> Any:
    """What a network returns, or its ``logits`` where it returns several things by name."""
    inner = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return inner if isinstance(inner, Tensor) else output


def without(target: Tensor, counted: Tensor | None) -> Tensor:
    """A target with what does not count renamed, so that it is missing."""
    if counted is None:
        return target
    return torch.where(counted, target if target.is_floating_point() else target.long(), IGNORED)
