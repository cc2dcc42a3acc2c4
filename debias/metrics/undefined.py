"""Where a metric has a value, and where the targets leave it none.

Recall without a positive, AUROC with one class and R2 of equal targets have no value; torchmetrics then returns 0,
raises, or returns NaN. Which targets a metric needs is found by trying it, once, on a few made-up samples. It is
undefined on targets of one kind (positives only, negatives only, all alike) if there it raises, is not finite, or gives
two predictions that are wrong in different places the same value, unless that is its best one. So the rule holds for
any metric, and there is no list of names.

It depends on the targets alone: whatever the network predicts, the same groups are compared in every epoch.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["DefinedMetric", "fresh", "is_better_high", "task_of"]

TASKS = ("Binary", "Multiclass", "Multilabel")


def task_of(metric: Metric) -> str:
    """Which of torchmetrics' kinds of classification metrics it is, or is derived from; empty if none."""
    names = [c.__name__ for c in type(metric).__mro__ if c.__module__.startswith("torchmetrics.classification.")]
    return next((task for task in TASKS for name in names if name.startswith(task)), "")


def fresh(metric: Metric) -> Metric:
    """A copy that has seen nothing and never gathers from other ranks by itself."""
    clone = copy.deepcopy(metric)
    clone.reset()
    for part in clone.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _never
    return clone


def _never() -> bool:
    return False


def is_better_high(metric: Metric) -> bool | None:
    """Which end of a metric is the good one; None where nobody knows.

    Some of torchmetrics' own do not say it, such as Pearson's correlation and the specificity: right predictions do.
    """
    if metric.higher_is_better is not None or not type(metric).__module__.startswith("torchmetrics."):
        return metric.higher_is_better
    task = task_of(metric)
    if task:
        values = [
            _tried(metric, *_labelled(metric, task, preds, [1, 0, 1, 0])) for preds in ([1, 0, 1, 0], [0, 1, 0, 1])
        ]
    else:
        values = [_tried(metric, torch.tensor(p), torch.tensor([1.0, 2.0, 4.0, 3.0])) for p in _RIGHT_AND_WRONG]
    if any(value is None or value.numel() != 1 for value in values):
        return None
    right, wrong = (float(value) for value in values if value is not None)
    return None if right == wrong or math.isnan(right - wrong) else right > wrong


class Needs(NamedTuple):
    """What the targets must hold for a metric to have a value.

    Attributes:
        high: a positive; with classes, one of the class.
        low: a negative; with classes, one of another class.
        different: two different targets.
    """

    high: bool = False
    low: bool = False
    different: bool = False


class DefinedMetric(Metric):
    """A metric that is NaN on targets that leave it no value.

    An average over classes or labels (``average="macro"`` or ``"weighted"`` of ``torchmetrics.classification``) is one
    over those for which it is defined; of classes, over those that occur among the targets. All other values are the
    metric's own.

    Args:
        metric: the metric; it is copied.

    Attributes:
        reason: why the last value is NaN, as a clause; empty if it is defined.
        left_out: the classes or labels that the last average leaves out.
    """

    full_state_update = True

    lowest: Tensor
    highest: Tensor
    support: Tensor

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.task = task_of(metric)
        self.average = _class_average(metric, self.task)
        self.metric = fresh(metric)
        if self.average:
            self.metric.average = None
        self.needs = _needs(self.metric, self.task, bool(self.average))
        self.reason = ""
        self.left_out: list[int] = []
        # Of the targets of each class, label or column.
        self.add_state("lowest", torch.tensor(math.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-math.inf, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("support", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add rows, in the form that the metric takes."""
        self.metric.update(preds, target)
        lowest, highest, support = self._facts(target)
        self.lowest, self.highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
        self.support = self.support + support

    def compute(self) -> Tensor:
        """The value, NaN where it is undefined."""
        self.reason, self.left_out = "", []
        nan = torch.full((), torch.nan, device=self.lowest.device)
        lacks = self._lacks()
        if bool((self.highest == -math.inf).all()):
            self.reason = "it has no target that counts"
            return nan
        if not self.average and bool(lacks.any()):
            self.reason = "its targets are all alike"
            return nan
        try:
            value = self._value()
        except (ValueError, IndexError, ZeroDivisionError) as error:
            self.reason = f"{type(self.metric).__name__} says: {str(error).rstrip('. ')}"
            return nan
        if self.average:
            return self._averaged(value, lacks)
        if value.numel() == 1 and value.is_floating_point() and not value.isfinite().all():
            self.reason = "it is not finite there"
            return torch.where(value.isfinite(), value, torch.nan)
        return value

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Add rows, and return the value of these rows alone."""
        alone = copy.deepcopy(self)
        alone.reset()
        alone.update(preds, target)
        self.update(preds, target)
        return alone.compute()

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.metric.reset()

    def _value(self) -> Any:
        with warnings.catch_warnings():
            # What they say of classes without a sample is said, with the group's name, by those who read `left_out`.
            for message in ("No (positive|negative) samples", ".*for one or more classes"):
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            return self.metric.compute()

    def _facts(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lowest and highest target, and number of positives, of each class, label or column."""
        ignored = getattr(self.metric, "ignore_index", None) if self.task else None
        kept = torch.ones_like(target, dtype=torch.bool) if ignored is None else target.ne(ignored)
        if self.task == "Multiclass" and self.average:
            n_classes = _width(self.metric, self.task)
            counts = torch.bincount(target[kept].flatten().long().clamp(0, n_classes - 1), minlength=n_classes).double()
            return (counts == counts.sum()).double(), (counts > 0).double(), counts
        if self.task == "Multilabel" and self.average:
            target, kept = (x.movedim(1, -1).flatten(0, -2) for x in (target, kept))
        elif self.task or target.ndim > 2:
            target, kept = target.flatten(), kept.flatten()
        values = target.double()
        # Where nothing is kept the extremes stay infinite, which no rule takes for a target.
        lowest = torch.where(kept, values, math.inf).amin(0) if len(values) else self.lowest
        highest = torch.where(kept, values, -math.inf).amax(0) if len(values) else self.highest
        return lowest, highest, torch.where(kept, values, 0).sum(0)

    def _lacks(self) -> Tensor:
        """Whether the targets lack what the metric needs, for each class, label or column."""
        lacks = torch.zeros_like(self.highest, dtype=torch.bool)
        if self.needs.high:
            lacks = lacks | ~(self.highest > 0)
        if self.needs.low:
            lacks = lacks | ~(self.lowest < 1)
        if self.needs.different:
            lacks = lacks | (self.lowest == self.highest)
        return lacks

    def _averaged(self, values: Tensor, lacks: Tensor) -> Tensor:
        defined = ~lacks & values.isfinite()
        if self.average == "macro":  # where classes are weighted by their number, those that do not occur weigh nothing
            self.left_out = (~defined).nonzero().flatten().tolist()
        if not bool(defined.any()):
            self.reason = "it is undefined for each of its " + ("labels" if self.task == "Multilabel" else "classes")
        weights = torch.where(defined, self.support if self.average == "weighted" else 1, 0).to(values)
        return (weights * torch.where(defined, values, 0)).sum() / weights.sum()


def _class_average(metric: Metric, task: str) -> str:
    """``"macro"`` or ``"weighted"`` where torchmetrics itself would average values of classes or labels; else empty."""
    average = getattr(metric, "average", None)
    own = type(metric).__module__.startswith("torchmetrics.") and task in ("Multiclass", "Multilabel")
    if not own or average not in ("macro", "weighted"):
        return ""
    each = fresh(metric)
    each.average = None
    values = _tried(each, *_labelled(each, task, [1, 0, 1, 0], [1, 0, 1, 0]))
    return str(average) if values is not None and values.ndim == 1 and len(values) == _width(metric, task) else ""


def _width(metric: Metric, task: str) -> int:
    return int(getattr(metric, "num_classes" if task == "Multiclass" else "num_labels", None) or 2)


# Predictions that are wrong in different places, of three positives, of three negatives, and of three equal numbers.
_OF_POSITIVES = [1, 0, 0], [1, 1, 0]
_OF_NEGATIVES = [0, 1, 1], [0, 0, 1]
_RIGHT_AND_WRONG = [1.0, 2.0, 4.0, 3.0], [4.0, 3.0, 1.0, 2.0]
_OF_EQUALS = [1.0, 2.0, 3.0], [1.0, 1.0, 30.0]


def _needs(metric: Metric, task: str, by_class: bool) -> Needs:
    if not task:
        best = _tried(metric, *(torch.tensor(_RIGHT_AND_WRONG[0]) for _ in range(2)))
        equal = [_tried(metric, torch.tensor(preds), torch.ones(3)) for preds in _OF_EQUALS]
        return Needs(different=best is not None and best.numel() == 1 and _says_nothing(metric, equal, best))
    best = _tried(metric, *_labelled(metric, task, [1, 0, 1, 0], [1, 0, 1, 0]))
    if best is None or (best.numel() != 1 and not by_class):
        return Needs()
    # torchmetrics gives some of the predictions of one class a correlation.
    correlation = any(c.__name__.endswith("MatthewsCorrCoef") for c in type(metric).__mro__)

    def nothing(target: int, preds: Sequence[Sequence[int]]) -> bool:
        values = [_tried(metric, *_labelled(metric, task, each, [target] * 3)) for each in preds]
        at = _first_two(metric)[1] if task == "Multiclass" else 0
        one = [value[at] if value is not None and by_class else value for value in values]
        return correlation or _says_nothing(metric, one, best[at] if by_class else best)

    low = nothing(1, _OF_POSITIVES)  # positives only say nothing, so it needs a negative
    if task == "Multiclass":
        return Needs(high=True, low=low) if by_class else Needs(different=low)
    return Needs(high=nothing(0, _OF_NEGATIVES), low=low)


def _says_nothing(metric: Metric, values: list[Tensor | None], best: Tensor) -> bool:
    """Whether the values of differently wrong predictions say nothing of them. Errors are means, and say something."""
    numbers = [math.nan if value is None else float(value) for value in values]
    if not all(abs(number) < 1e6 for number in numbers):  # a division by almost nothing
        return True
    first, second = numbers
    if metric.higher_is_better is False:
        return False
    return math.isclose(first, second, abs_tol=1e-6) and not math.isclose(first, float(best), abs_tol=1e-6)


def _tried(metric: Metric, preds: Tensor, target: Tensor) -> Tensor | None:
    """The value of a few rows; None if there is none, or it is not a number."""
    clone = fresh(metric).cpu()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # nothing here is of the user's data
        try:
            clone.update(preds, target)
            value = clone.compute()
        except Exception:  # any metric, and rows that it may never have been made for
            return None
    return value if isinstance(value, Tensor) else None


def _first_two(metric: Metric) -> tuple[int, int]:
    """Two classes that count."""
    first, second, *_ = (c for c in range(4) if c != getattr(metric, "ignore_index", None))
    return first, second


def _labelled(metric: Metric, task: str, preds: Sequence[int], target: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores and targets, in the form that the metric takes, of the labels 0 and 1."""
    labels, truth = torch.tensor(preds), torch.tensor(target)
    if task == "Multiclass":
        classes = torch.tensor(_first_two(metric))
        scores = torch.nn.functional.one_hot(classes[labels], max(_width(metric, task), int(classes.max()) + 1))
        return scores * 0.9 + 0.01 * torch.arange(scores.shape[1]) / scores.shape[1], classes[truth]
    # No two of the same score, so that nothing hangs on the order of equals.
    scores = 0.8 * labels + 0.1 + 0.01 * torch.arange(len(labels))
    if task == "Multilabel":
        width = _width(metric, task)
        return scores[:, None].expand(-1, width).clone(), truth[:, None].expand(-1, width).clone()
    return scores, truth
