"""What a metric of torchmetrics takes of the logits and the target that a step computes.

torchmetrics takes scores for logits if one of them lies outside [0, 1]. Of the rows of one group there may be none,
though all are logits: a binary logit of 0.3 then counts as a no. Where the loss says what the logits are, metrics get
them in a form that is never mistaken.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torchmetrics import Metric

from debias.errors import DebiasError
from debias.metrics import GroupedMetric
from debias.metrics.undefined import task_of
from debias.monitors.scored import IGNORED, counted_like
from debias.tap.counted import both

__all__ = ["ignoring", "metric_inputs", "update_metric"]

_SOFTMAX = frozenset({"cross_entropy", "nll_loss", "LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"})
_SIGMOID = "binary_cross_entropy_with_logits"
_ADVICE = {
    "Binary": "A binary metric takes one score for each target. For two classes or more choose its multiclass form,"
    " e.g. `Accuracy(task='multiclass', num_classes=2)`; or pass `logits=`, a callable of what the step returns, that"
    " makes one score of two logits: `z[:, 1] - z[:, 0]`.",
    "Multiclass": "A multiclass metric takes a score for each of its `num_classes` classes, (N, C, ...), and class ids,"
    " integers (N, ...); ids that do not count are its `ignore_index`. For one score a sample choose its binary form.",
    "Multilabel": "A multilabel metric takes a score, and a target 0 or 1, for each of its `num_labels` labels;"
    " targets that do not count are its `ignore_index`.",
    "": "Choose a metric that takes them, for class scores one of `torchmetrics.classification`; or pass `logits=` and"
    " `target=` that it takes.",
}


def metric_inputs(metric: Metric, logits: Tensor, target: Tensor, loss: str | None) -> tuple[Tensor, Tensor]:
    """Predictions and target in the form that the metric takes, where the loss says what they are.

    Metrics of ``torchmetrics.classification`` get the probability of class 1 (binary, also of two logits under a
    softmax), of each label (multi-label), or the log-probability of each class (multi-class: there no class rounds to
    0); and labels for the float targets of a binary loss and for class probabilities. All other metrics, and those
    under losses that do not say it, get what there is.

    Args:
        metric: the metric.
        logits: floating point, shape ``(N, ...)``.
        target: shape ``(N, ...)``.
        loss: name of the loss that was computed from them, see :class:`debias.LossCall`; None if there is none.
    """
    task = task_of(metric)
    if not task or not logits.is_floating_point():
        return logits, target
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if loss in _SOFTMAX and logits.ndim > 1:
        if target.is_floating_point() and target.shape == logits.shape:
            target = target.argmax(1)  # class probabilities
        if task == "Multiclass":
            return precise.log_softmax(1), target
        if task == "Binary" and logits.shape[1] == 2 and target.ndim == logits.ndim - 1:
            return (precise[:, 1] - precise[:, 0]).sigmoid(), target
    elif loss in (_SIGMOID, "binary_cross_entropy") and task != "Multiclass":
        if target.is_floating_point():  # smoothed labels count as labels, negative ones and NaN as missing
            missing = getattr(metric, "ignore_index", None)
            missing = -1 if missing is None else missing
            labels = torch.where(target > 0.5, 1, 0)
            target = torch.where(target.isnan() | (target < 0) | (target == missing), missing, labels)
        return (precise.sigmoid() if loss == _SIGMOID else logits), target
    return logits, target


def ignoring(metric: Metric) -> Metric:
    """A metric that can leave elements out: one of classification with an ``ignore_index``, its own or a new one."""
    if not task_of(metric) or getattr(metric, "ignore_index", IGNORED) is not None:
        return metric
    metric = copy.deepcopy(metric)
    metric.ignore_index = IGNORED
    return metric


def update_metric(
    metric: GroupedMetric, logits: Tensor, target: Tensor, groups: Tensor, loss: str | None, counted: Tensor | None
) -> None:
    """Add a batch to a metric that is split by group.

    Args:
        metric: the metric.
        logits: see :func:`metric_inputs`.
        target: see :func:`metric_inputs`.
        groups: int ids ``(N,)`` or boolean membership ``(N, G)``.
        loss: see :func:`metric_inputs`.
        counted: which elements of the target are scored, boolean, in its shape; None for all.

    Raises:
        DebiasError: the metric does not take them.
    """
    inner = metric.overall.metric
    task = task_of(inner)
    preds, labels = metric_inputs(inner, logits, target, loss)
    try:
        if task in ("Binary", "Multilabel") and preds.shape != labels.shape:  # some binary metrics do not look
            raise ValueError("predictions and target are not of one shape")
        counted = counted_like(counted, labels)
        if loss is None:  # nothing else says what is missing
            counted = both(counted, labels >= 0 if task else ~labels.isnan())
        metric.update(*_counted_only(inner, preds, labels, groups, counted))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):  # Lightning's BatchSizeFinder reads it
            raise
        raise DebiasError(
            f"Expected `metric` of GroupMonitor to take what the step predicts, but `{metric.name}`"
            f" ({type(inner).__name__}) got logits {tuple(logits.shape)} of {logits.dtype} and a target"
            f" {tuple(target.shape)} of {target.dtype}{f' from `{loss}`' if loss else ''}, and says:"
            f" {str(error).rstrip('. ')}. {_ADVICE[task]}"
        ) from error


def _counted_only(
    metric: Metric, preds: Tensor, target: Tensor, groups: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, target and groups without what does not count: whole rows, then single elements."""
    if counted is None or bool(counted.all()):
        return preds, target, groups
    some = counted.flatten(1).any(1) if counted.ndim > 1 else counted
    preds, target, groups, counted = preds[some], target[some], groups[some], counted[some]
    if bool(counted.all()):
        return preds, target, groups
    ignored = getattr(metric, "ignore_index", None) if task_of(metric) else None
    if ignored is not None:
        return preds, torch.where(counted, target.long(), ignored), groups
    if hasattr(metric, "multioutput") or (getattr(metric, "num_outputs", None) or 1) > 1:
        raise DebiasError(
            f"Expected whole samples to be left out for {type(metric).__name__}, which has a value of each column, but"
            " the loss, or a target of NaN, leaves out some columns of a sample. Choose a metric over all elements, as"
            " `torchmetrics.MeanAbsoluteError()`, or one monitor for each column, with `logits=` and `target=`."
        )
    if preds.ndim == target.ndim + 1:
        preds = preds.movedim(1, -1)
    return preds[counted], target[counted], groups.repeat_interleave(counted.flatten(1).sum(1), 0)
