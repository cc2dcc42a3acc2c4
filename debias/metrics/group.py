"""Accuracy, or any torchmetrics metric, by group.

Names follow fairlearn's ``MetricFrame`` (by group, difference, ratio) and WILDS (worst group, adjusted average).
Everything is NaN-aware: a group without samples, or where the metric is undefined (:mod:`debias.metrics.undefined`), is
NaN and left out of the worst, the difference, the ratio and the adjusted average.

torchmetrics' own group metrics count only the groups present in a batch and number those from 0, so a batch that lacks
a group puts counts into the wrong rows. Here every state has one row per group, whatever the batch holds.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from debias.errors import BadRowsError, DebiasError
from debias.metrics.ranks import RankMetric
from debias.metrics.undefined import DefinedMetric, fresh, is_better_high
from debias.ops.arguments import MOST, check_count, checked

__all__ = [
    "GroupAccuracy",
    "GroupedMetric",
    "adjusted_average",
    "group_difference",
    "group_ratio",
    "group_sums",
    "worst_group",
]


@checked("values: float N, groups: any N | bool N n_groups")
def group_sums(values: Tensor, groups: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Sum and number of the values of each group.

    ``sums[g] = sum_i values[i] [i in g]`` and ``counts[g] = sum_i [i in g]``, without loops and without waiting for the
    device.

    Args:
        values: floating point, shape ``(N,)``.
        groups: int ids ``(N,)``, or membership ``(N, n_groups)``, boolean or of integers 0 and 1. Rows with ids
            outside ``[0, n_groups)`` are left out; negative ids mean unlabelled.
        n_groups: number of groups ``G``.

    Returns:
        ``(sums, counts)``, each of shape ``(G,)`` and the dtype of ``values``; a group without samples has 0 and 0.

    Raises:
        DebiasError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from debias.metrics import group_sums
        >>> group_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2, 0, 2, -1]), n_groups=3)
        (tensor([2., 0., 4.]), tensor([1., 0., 2.]))
    """
    groups = _checked_groups(groups, len(values), n_groups)
    if groups.ndim == 2:
        # where, not a product: a NaN must not reach the groups that its sample does not belong to
        return torch.where(groups, values[:, None], 0).sum(0), groups.sum(0).to(values.dtype)
    row = _row(groups, n_groups)
    both = torch.stack([values, torch.ones_like(values)], dim=1)
    totals = values.new_zeros(n_groups + 1, 2).index_add_(0, row, both)[:n_groups]
    return totals[:, 0], totals[:, 1]


@checked("by_group: float G")
def worst_group(by_group: Tensor, *, higher_is_better: bool = True) -> Tensor:
    """The worst value of any group: the smallest, or the largest where ``higher_is_better`` is False.

    Args:
        by_group: floating point, shape ``(G,)``; NaN where a group has no samples.
        higher_is_better: which end is the bad one.

    Returns:
        A scalar tensor; NaN if all groups are NaN.
    """
    sign = 1 if higher_is_better else -1
    return sign * _smallest(sign * by_group)


@checked("by_group: float G")
def group_difference(by_group: Tensor) -> Tensor:
    """The largest value of any group minus the smallest; a scalar tensor, NaN if all groups are NaN.

    Args:
        by_group: floating point, shape ``(G,)``; NaN where a group has no samples.
    """
    return -_smallest(-by_group) - _smallest(by_group)


@checked("by_group: float G")
def group_ratio(by_group: Tensor) -> Tensor:
    """The smallest value of any group over the largest; a scalar tensor, NaN if all are NaN or the largest is 0.

    Args:
        by_group: floating point and not negative, shape ``(G,)``; NaN where a group has no samples.
    """
    return _smallest(by_group) / -_smallest(-by_group)


@checked("by_group: float G, train_counts: any G")
def adjusted_average(by_group: Tensor, train_counts: Tensor) -> Tensor:
    """The average that a set with the group proportions of the training set would have.

    ``sum_g n_g v_g / sum_g n_g`` over the groups with a value; WILDS and the published GroupDRO code report it for sets
    whose groups were balanced by hand, such as Waterbirds' validation and test sets.

    Args:
        by_group: floating point, shape ``(G,)``; NaN where a group has no samples.
        train_counts: number of training samples of each group, shape ``(G,)``.

    Returns:
        A scalar tensor; NaN if no group with training samples has a value.
    """
    weights = torch.where(by_group.isnan(), 0, train_counts.to(by_group))
    return (weights * by_group.nan_to_num()).sum() / weights.sum()


class GroupAccuracy(RankMetric):
    r"""Accuracy over all samples, by group, and of the worst group.

    .. math:: \text{accuracy}_g = \frac{\sum_i [i \in g] \, a_i}{\sum_i [i \in g]}

    with :math:`a_i` 1 or 0 for one label per sample, and the share of right elements where a sample has several
    (pixels, tokens, labels). Elements whose target is negative, NaN or ``ignore_index`` are missing and left out; a
    sample without any other element is left out altogether. Counts are kept in float64, hence exact. States are sums of
    a fixed size, so results are the same however samples are spread over batches and ranks.

    ``update(preds, target, groups)`` takes

    - ``preds``: integer labels of the shape of ``target``; or logits ``(N, C, ...)`` where ``target`` is ``(N, ...)``
      (the class dimension may also come last), decided by argmax; or floats of the shape of ``target``, right where
      ``(preds > threshold) == target`` (binary and multi-label). ``(N, 1)`` with a target ``(N,)`` is binary.
    - ``target``: integers, or 0/1 floats for binary and multi-label.
    - ``groups``: int ids ``(N,)``, negative = in no group; or membership ``(N, n_groups)``, boolean or of 0 and 1.
    - ``rows``: where tokens, pixels or views of a sample are rows of their own, the sample of each row of ``preds`` and
      ``target``, int64; ``groups`` are still those of the samples.

    ``compute()`` returns a dictionary of float64 tensors: ``accuracy`` (over all samples, with a group or without),
    ``worst_group_accuracy``, ``accuracy_by_group`` of shape ``(n_groups,)`` with NaN for a group without samples,
    ``accuracy_count``, the number of samples of each group that were scored, ``accuracy_difference``,
    ``accuracy_ratio`` and, where ``train_counts`` is given, ``adjusted_accuracy``.

    Predictions that are not finite are wrong: NaN, and a largest logit, or a score, that is infinite; a logit of -inf
    masks a class. If there are any, a warning says so, and ``accuracy_not_finite`` is the number of their samples.

    Args:
        n_groups: number of groups.
        group_names: their names, for those who print or log; default "0", "1", ...
        threshold: a binary or multi-label prediction is positive above it; 0.0 fits logits, 0.5 fits probabilities.
        train_counts: number of training samples of each group, for the adjusted average.
        ignore_index: a target that marks missing elements, besides negative ones.
        **kwargs: see ``torchmetrics.Metric``.

    Raises:
        DebiasError: an argument is out of range, or shapes do not fit; in ``compute``, targets were above what may be
            predicted: 1, or the last class.
        BadRowsError: an id is not below ``n_groups``; on CPU in ``update``, on other devices, where looking would stop
            the device, in ``compute``, on all ranks together.

    Example:
        >>> import torch
        >>> from debias.metrics import GroupAccuracy
        >>> metric = GroupAccuracy(n_groups=3)
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2]))
        >>> metric.compute()["accuracy_by_group"]
        tensor([1.0000,    nan, 0.5000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor
    correct_all: Tensor
    total_all: Tensor
    bad_ids: Tensor
    bad_targets: Tensor
    not_finite: Tensor
    train_counts: Tensor | None

    @checked()
    def __init__(
        self,
        n_groups: int,
        *,
        group_names: Sequence[str] | None = None,
        threshold: float = 0.0,
        train_counts: Sequence[int] | Tensor | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.n_groups = _check_n_groups(n_groups)
        self.group_names = _names(group_names, n_groups)
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.register_buffer("train_counts", _counts(train_counts, n_groups), persistent=False)
        for name, shape in (("correct", n_groups), ("total", n_groups), ("correct_all", ()), ("total_all", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("bad_ids", "bad_targets"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("not_finite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, groups: Tensor, rows: Tensor | None = None) -> None:
        """Count a batch; shapes and dtypes are in the docstring of the class."""
        groups = _checked_groups(groups, len(target) if rows is None else len(groups), self.n_groups)
        bad_ids = _bad_ids(groups, self.n_groups)
        found, beyond = _hits(preds, target, self.threshold, self.ignore_index)
        right, n_valid, bad = (x.sum(1, dtype=torch.float64) for x in found)
        if rows is not None:
            right, n_valid, bad = (x.new_zeros(len(groups)).index_add_(0, rows, x) for x in (right, n_valid, bad))
        self.not_finite += (bad > 0).sum()
        counted = n_valid > 0
        share = right / n_valid.clamp(min=1)
        correct, total = group_sums(share, _only(groups, counted), self.n_groups)
        self.correct += correct
        self.total += total
        self.correct_all += share.sum()
        self.total_all += counted.sum()
        self.bad_ids += bad_ids
        self.bad_targets += beyond

    def compute(self) -> dict[str, Tensor]:
        """The dictionary that the docstring of the class describes."""
        _raise_bad_ids(self.bad_ids, self.n_groups)
        if self.bad_targets:
            raise DebiasError(
                "Expected argument `target` to be 0 or 1 beside one score for each, class ids below C beside logits"
                f" (N, C, ...), or negative where it does not count, but got {int(self.bad_targets)} larger ones. If a"
                " value marks missing targets, pass it as `ignore_index`; beside class ids pass logits of all classes,"
                " to a monitor by `logits=`."
            )
        overall = self.correct_all / self.total_all
        by_group = self.correct / self.total
        summary = _summary("accuracy", overall, by_group, self.total, self.train_counts, higher_is_better=True)
        return summary | say_not_finite("accuracy", self.not_finite, "They count as wrong.")


class GroupedMetric(RankMetric):
    """Any torchmetrics metric with one value, split by group.

    Each group has a clone of the metric, which sees the rows of its group; another one sees all rows. ``compute()``
    returns the dictionary of :class:`GroupAccuracy` under the metric's name: ``<name>``, ``worst_group_<name>``,
    ``<name>_by_group``, ``<name>_count``, ``<name>_difference``, ``<name>_ratio`` and, with ``train_counts``,
    ``adjusted_<name>``.

    A group is NaN where the metric is undefined: where it raises or is not finite, and where the group's targets leave
    it no value, such as the AUROC of one class, the recall without a positive, R2 and correlations of equal targets.
    :mod:`debias.metrics.undefined` says how that is decided, and what an average over classes is made of. A warning
    names the group, once.

    Some metrics of torchmetrics take a batch for logits if any value lies outside [0, 1]; whether one does may differ
    between groups, so give those metrics probabilities.

    Where predictions are not finite (NaN, or the largest of a sample infinite), the metric is NaN for all groups, and
    ``<name>_not_finite`` is the number of these samples.

    Rows are picked by boolean masks, which stops a GPU once per group and batch: meant for evaluation. For accuracy,
    :class:`GroupAccuracy` does the same in one pass.

    ``update(preds, target, groups)`` takes what the metric takes, first dimension ``N``, and int ids ``(N,)`` (negative
    = in no group) or membership ``(N, n_groups)``, boolean or of integers 0 and 1.

    Args:
        metric: the metric; it is cloned and left alone.
        n_groups: number of groups.
        group_names: their names, for those who print or log; default "0", "1", ...
        name: name of the value; default: the class name in snake case. What precedes a slash stays in front:
            ``clean/auroc`` gives ``clean/worst_group_auroc``.
        train_counts: number of training samples of each group, for the adjusted average.
        higher_is_better: which end is the bad one; default: the metric's own attribute, or where one of torchmetrics'
            metrics does not say it, the end that right predictions reach.
        **kwargs: see ``torchmetrics.Metric``.

    Raises:
        DebiasError: an argument is out of range; the metric does not say which end is the bad one, is not updated
            with ``(preds, target)``, or its value is not a scalar.
        BadRowsError: an id is not below ``n_groups``; on CPU in ``update``, on other devices in ``compute``.

    Example:
        >>> import torch
        >>> from torchmetrics import MeanSquaredError
        >>> from debias.metrics import GroupedMetric
        >>> metric = GroupedMetric(MeanSquaredError(), n_groups=2, name="mse")
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 1, 1]))
        >>> metric.compute()["worst_group_mse"]
        tensor(2.)
    """

    full_state_update = True

    total: Tensor
    bad_ids: Tensor
    not_finite: Tensor
    train_counts: Tensor | None

    @checked()
    def __init__(
        self,
        metric: Metric,
        n_groups: int,
        *,
        group_names: Sequence[str] | None = None,
        name: str | None = None,
        train_counts: Sequence[int] | Tensor | None = None,
        higher_is_better: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, Metric):
            raise DebiasError(
                f"Expected argument `metric` to be a torchmetrics Metric, but got {type(metric).__name__}. Pass an"
                " instance, e.g. `torchmetrics.classification.BinaryAUROC()`."
            )
        kind = type(metric).__name__
        self.name = _snake_case(kind) if name is None else name
        higher = is_better_high(metric) if higher_is_better is None else higher_is_better
        if higher is None:
            raise DebiasError(
                f"Expected the metric `{self.name}` to say which group is the worst, but `{kind}.higher_is_better` is"
                " None. Set it in a subclass, or pass `higher_is_better=True` or `False` to `GroupedMetric`."
            )
        _check_takes_two_and_makes_one(metric, self.name)
        self._higher_is_better = bool(higher)
        self.n_groups = _check_n_groups(n_groups)
        self.group_names = _names(group_names, n_groups)
        self.register_buffer("train_counts", _counts(train_counts, n_groups), persistent=False)
        self.overall = DefinedMetric(metric)
        self.grouped = nn.ModuleList(fresh(self.overall) for _ in range(n_groups))
        self._said: set[str] = set()
        self.add_state("total", torch.zeros(n_groups + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bad_ids", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("not_finite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether the lowest value of a group is the worst one."""
        return self._higher_is_better

    def update(self, preds: Tensor, target: Tensor, groups: Tensor) -> None:
        """Give each clone its rows of a batch."""
        self._each(preds, target, groups, lambda clone, *rows: clone.update(*rows))

    def compute(self) -> dict[str, Tensor]:
        """The dictionary that the docstring of the class describes."""
        _raise_bad_ids(self.bad_ids, self.n_groups)
        clones = self._clones()
        if self._is_synced:
            clones = _merged(clones, self.process_group, self.device)
        counts = self.total.tolist()
        if self.not_finite:  # what a metric makes of them is no measurement
            return self._collected([None] * len(counts)) | say_not_finite(
                self.name, self.not_finite, "The metric is NaN."
            )
        values = [self._value(clone) if count else None for clone, count in zip(clones, counts, strict=True)]
        self._say(clones, counts)
        return self._collected(values)

    def forward(self, preds: Tensor, target: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Update, and return the dictionary of this batch alone."""
        values: list[Any] = [None] * (self.n_groups + 1)

        def run(clone: DefinedMetric, *rows: Tensor) -> None:
            values[next(i for i, other in enumerate(self._clones()) if other is clone)] = clone(*rows)

        self._update_count += 1
        self._computed = None
        self._each(preds, target, groups, run)
        return self._collected(values)

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        for clone in self._clones():
            clone.reset()

    def _value(self, clone: DefinedMetric) -> Any:
        with warnings.catch_warnings():
            # On a rank without samples of a group the clone has the other ranks' state, but was never updated itself.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            return clone.compute()

    def _say(self, clones: list[DefinedMetric], counts: list[int]) -> None:
        """Name, once, the groups where the metric is undefined, and those that lack classes."""
        places = [*(f"group `{name}`" for name in self.group_names), "all samples"]
        of_places = [(place, count, clone) for place, count, clone in zip(places, counts, clones, strict=True) if count]
        undefined = {
            p: f"{p} ({count} sample{'s' if count > 1 else ''}): {clone.reason}"
            for p, count, clone in of_places
            if clone.reason
        }
        fewer = {
            p: f"{p} lacks {_few([str(c) for c in clone.left_out])}"
            for p, _, clone in of_places
            if clone.left_out and not clone.reason
        }
        new = [text for texts in (undefined, fewer) for place, text in texts.items() if place not in self._said]
        self._said |= {*undefined, *fewer}
        if undefined and new:
            rank_zero_warn(
                f"`{self.name}` is undefined, and NaN, for {_few([*undefined.values()], '; ')}. A group that is NaN is"
                " left out of the worst group, the difference, the ratio and the adjusted average. Join small groups,"
                " or choose a metric that is defined for them.",
                UserWarning,
                stacklevel=4,
            )
        if fewer and new:
            what = "labels" if self.overall.task == "Multilabel" else "classes"
            rank_zero_warn(
                f"`{self.name}` is averaged over the {what} for which the targets define it:"
                f" {_few([*fewer.values()], '; ')}.",
                UserWarning,
                stacklevel=4,
            )

    def _clones(self) -> list[DefinedMetric]:
        return [*self.grouped, self.overall]  # type: ignore[list-item]

    def _each(self, preds: Tensor, target: Tensor, groups: Tensor, run: Callable[..., None]) -> None:
        groups = _checked_groups(groups, len(target), self.n_groups)
        bad_ids = _bad_ids(groups, self.n_groups)
        members = _membership(groups, self.n_groups)
        counts = members.sum(0)
        for clone, mask, count in zip(self.grouped, members.unbind(1), counts.tolist(), strict=True):
            if count:
                run(clone, preds[mask], target[mask])
        if len(target):
            run(self.overall, preds, target)
        self.not_finite += _not_finite_rows(preds)
        self.total += torch.cat([counts, counts.new_full((1,), len(target))])
        self.bad_ids += bad_ids

    def _collected(self, values: list[Any]) -> dict[str, Tensor]:
        for value in values:
            if value is not None and not (isinstance(value, Tensor) and value.numel() == 1):
                raise DebiasError(
                    f"Expected the metric `{self.name}` to compute one number, but got"
                    f" {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}. Choose an averaged"
                    ' variant, e.g. `average="macro"`.'
                )
        given = [value for value in values if value is not None]
        dtype = given[0].dtype if given and given[0].is_floating_point() else torch.get_default_dtype()
        nan = torch.full((), torch.nan, dtype=dtype, device=self.total.device)
        *by_group, overall = [nan if value is None else value.reshape(()).to(nan) for value in values]
        counts, higher = self.total[:-1], self.higher_is_better
        return _summary(self.name, overall, torch.stack(by_group), counts, self.train_counts, higher_is_better=higher)


def _few(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - 10} more" if len(names) > 10 else ""
    return separator.join(names[:10]) + more


def _summary(
    name: str,
    overall: Tensor,
    by_group: Tensor,
    counts: Tensor,
    train_counts: Tensor | None,
    *,
    higher_is_better: bool,
) -> dict[str, Tensor]:
    folder, slash, last = name.rpartition("/")
    front = folder + slash
    summary = {
        name: overall,
        f"{front}worst_group_{last}": worst_group(by_group, higher_is_better=higher_is_better),
        f"{name}_by_group": by_group,
        f"{name}_count": counts.to(by_group),
        f"{name}_difference": group_difference(by_group),
        f"{name}_ratio": group_ratio(by_group),
    }
    if train_counts is not None:
        summary[f"{front}adjusted_{last}"] = adjusted_average(by_group, train_counts)
    return summary


def say_not_finite(name: str, number: Tensor, then: str) -> dict[str, Tensor]:
    if not number:
        return {}
    rank_zero_warn(
        f"The predictions of {int(number)} samples are not finite (NaN or infinite): training has diverged, or the step"
        f" computes something else than predictions. {then} `{name}_not_finite` is their number.",
        stacklevel=4,
    )
    return {f"{name}_not_finite": number.double()}


def _not_finite_rows(preds: Tensor) -> Tensor | int:
    if not preds.is_floating_point() or not preds.numel():
        return 0
    return (~preds.reshape(len(preds), -1).amax(1).isfinite()).sum()  # NaN where any is


def _hits(
    preds: Tensor, target: Tensor, threshold: float, ignore_index: int | None
) -> tuple[list[Tensor], Tensor | int]:
    """Which elements are right, which count, and which of these are not finite; boolean ``(N, elements)``. And how many
    targets are above every label that may be predicted.

    No missing element is right, and none that is not finite.
    """
    labels, finite, last = _labels(preds, target, threshold)
    valid = target >= 0  # False for NaN too
    if ignore_index is not None:
        valid = valid & (target != ignore_index)
    beyond = 0 if last is None else (valid & (target > last)).sum()
    if labels.dtype == torch.bool and target.is_floating_point():
        target = target > 0.5  # smoothed labels are never equal to a prediction
    hits = (labels == target) & valid & finite
    return [x[:, None] if x.ndim == 1 else x.flatten(1) for x in (hits, valid, valid & ~finite)], beyond


def _labels(preds: Tensor, target: Tensor, threshold: float) -> tuple[Tensor, Tensor, int | None]:
    """Predicted labels, whether they come from finite numbers, both of the shape of ``target``, and the last label."""
    if not preds.is_floating_point():
        if preds.shape == target.shape:
            return preds, torch.ones_like(preds, dtype=torch.bool), 1 if preds.dtype == torch.bool else None
        raise DebiasError(
            f"Expected integer `preds` to have the shape of `target`, but got {tuple(preds.shape)} and"
            f" {tuple(target.shape)}. Pass labels, or logits as floats."
        )
    if preds.ndim == target.ndim + 1 and preds.numel() == target.numel() and 1 in (preds.shape[1], preds.shape[-1]):
        preds = preds.reshape(target.shape)  # one logit: binary, for which argmax would always say 0
    if preds.shape == target.shape:
        return preds > threshold, preds.isfinite(), 1
    if preds.ndim == target.ndim + 1 and not target.is_floating_point():
        for dim, shape in ((1, preds.shape[:1] + preds.shape[2:]), (-1, preds.shape[:-1])):
            if shape == target.shape:
                largest, labels = preds.max(dim)  # NaN where any is; -inf masks a class
                return labels, largest.isfinite(), preds.shape[dim] - 1
    raise DebiasError(
        "Expected `preds` to be labels or scores of the shape of `target`, or logits (N, C, ...) for integer targets"
        f" (N, ...), but got {tuple(preds.shape)} for a target {tuple(target.shape)} of {target.dtype}. Check that both"
        " are those of the same batch. Class ids are integers without an axis of classes: of (N, 1, ...), or of floats,"
        " make `target.squeeze(1).long()`, for GroupMonitor by `target=callable(batch)`."
    )


def _checked_groups(groups: Tensor, n_rows: int, n_groups: int) -> Tensor:
    """Integer ids or a boolean membership; the values of ids are not looked at, which would stop the device."""
    ids = groups.ndim == 1 and not groups.is_floating_point()
    members = groups.ndim == 2 and groups.shape[1] == n_groups and not groups.is_floating_point()
    if members and groups.dtype != torch.bool:
        members = bool(((groups == 0) | (groups == 1)).all())
    if not (ids or members) or len(groups) != n_rows:
        raise DebiasError(
            f"Expected argument `groups` to be integer ids ({n_rows},) or boolean membership ({n_rows}, {n_groups}),"
            f" but got shape {tuple(groups.shape)} of {groups.dtype}. Pass one row per sample; `.bool()` turns 0/1"
            " columns into a membership."
        )
    return groups.bool() if members else groups


def _bad_ids(groups: Tensor, n_groups: int) -> Tensor:
    """The number of ids that are too large; raised at once where looking costs nothing."""
    if groups.ndim == 2:
        return torch.zeros((), dtype=torch.int64, device=groups.device)
    bad_ids = (groups.long() >= n_groups).sum()
    if groups.device.type == "cpu" and bad_ids:
        raise BadRowsError(
            f"Expected argument `groups` to hold ids below `n_groups={n_groups}`, but got {int(groups.max())}. Number"
            " the groups from 0, give negative ids to samples of no group, or raise `n_groups`."
        )
    return bad_ids


def _raise_bad_ids(bad_ids: Tensor, n_groups: int) -> None:
    if count := int(bad_ids):
        raise BadRowsError(
            f"Expected argument `groups` to hold ids below `n_groups={n_groups}`, but got {count} samples with larger"
            " ones. Number the groups from 0, give negative ids to samples of no group, or raise `n_groups`."
        )


def _row(groups: Tensor, n_groups: int) -> Tensor:
    """The row of each id in a table of ``n_groups + 1`` rows, whose last one collects what belongs to no group."""
    ids = groups.long()
    return torch.where((ids >= 0) & (ids < n_groups), ids, n_groups)


def _membership(groups: Tensor, n_groups: int) -> Tensor:
    if groups.ndim == 2:
        return groups
    return _row(groups, n_groups)[:, None] == torch.arange(n_groups, device=groups.device)


def _only(groups: Tensor, kept: Tensor) -> Tensor:
    """``groups`` with the other rows in no group."""
    return groups & kept[:, None] if groups.ndim == 2 else torch.where(kept, groups.long(), -1)


def _smallest(values: Tensor) -> Tensor:
    absent = values.isnan()
    return torch.where(absent.all(), torch.nan, torch.where(absent, torch.inf, values).amin())


def _check_takes_two_and_makes_one(metric: Metric, name: str) -> None:
    """What can be told of a metric before it has seen anything."""
    try:
        inspect.signature(metric.update).bind("preds", "target")
    except TypeError:
        raise DebiasError(
            f"Expected the metric `{name}` to be updated with `(preds, target)`, but got"
            f" `{type(metric).__name__}.update{inspect.signature(metric.update)}`. Choose a metric of predictions and"
            " targets alone."
        ) from None
    if getattr(metric, "average", "") in (None, "none"):
        raise DebiasError(
            f"Expected the metric `{name}` to compute one number, but got a {type(metric).__name__} with"
            f' `average={metric.average!r}`. Choose an averaged variant, e.g. `average="macro"`.'
        )


def _parts(metric: Metric) -> list[Metric]:
    """The metric and those inside it (wrappers, compositions)."""
    return [part for part in metric.modules() if isinstance(part, Metric)]


def _merged(clones: list[DefinedMetric], process_group: Any, device: torch.device) -> list[DefinedMetric]:
    """Copies of the clones with the states of all ranks, reduced as torchmetrics reduces them.

    torchmetrics' own gathering aborts where a rank has no samples of a group and the states are lists: it gathers an
    empty float tensor there and integers elsewhere. Here such a rank contributes nothing.
    """
    own = [
        [part.metric_state if part.update_called else None for part in _parts(clone)]
        for clone in (copy.deepcopy(clone).cpu() for clone in clones)
    ]
    of_ranks: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(of_ranks, own, group=process_group)
    clones = [copy.deepcopy(clone) for clone in clones]
    for clone, clone_states in zip(clones, zip(*of_ranks, strict=True), strict=True):
        for part, part_states in zip(_parts(clone), zip(*clone_states, strict=True), strict=True):
            states = [state for state in part_states if state is not None]
            reductions: dict[str, Any] = part._reductions if states else {}
            for name, reduction in reductions.items():
                if isinstance(states[0][name], list):
                    setattr(part, name, [item.to(device) for state in states for item in state[name]])
                else:
                    stacked = torch.stack([state[name] for state in states]).to(device)
                    setattr(part, name, reduction(stacked) if reduction is not None else stacked)
    return clones


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _check_n_groups(n_groups: int) -> int:
    return check_count("n_groups", n_groups, 1, MOST)


def _names(group_names: Sequence[str] | None, n_groups: int) -> list[str]:
    names = [str(g) for g in range(n_groups)] if group_names is None else [str(name) for name in group_names]
    if len(names) != n_groups or len(set(names)) != n_groups:
        raise DebiasError(
            f"Expected argument `group_names` to be {n_groups} different names, but got {names}. Name each group once,"
            " in the order of the ids."
        )
    return names


def _counts(train_counts: Sequence[int] | Tensor | None, n_groups: int) -> Tensor | None:
    if train_counts is None:
        return None
    counts = torch.as_tensor(train_counts, dtype=torch.float64)
    if counts.shape != (n_groups,) or not (counts >= 0).all() or not 0 < counts.sum() < torch.inf:
        raise DebiasError(
            f"Expected argument `train_counts` to be {n_groups} counts, not negative and not all 0, but got"
            f" {counts.tolist()}. Count the training samples of each group."
        )
    return counts
