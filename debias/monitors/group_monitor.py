"""Metrics by group while validating and testing: accuracy, worst group, gap.

Reads logits and target from the loss that the step computes, wherever that is; where it computes none, from the
output of the module's ``forward``. Nothing is changed. Works alone, on a plain ERM baseline.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from debias.data.counting import empty_groups, tag_counts
from debias.data.samplers import check_batches
from debias.errors import AmbiguousLossError, BatchKeyError, DebiasError, DebiasWarning, LossNotFoundError, RowsError
from debias.metrics import GroupAccuracy, GroupedMetric
from debias.monitors._epoch import EpochMonitor, by_group
from debias.monitors.metric_inputs import ignoring, update_metric
from debias.monitors.scored import (
    IGNORED,
    Scored,
    check_rows,
    counted_like,
    is_flattened,
    logits_of,
    loss_of,
    predicted_by,
    shifted_like,
    without,
)
from debias.ops.arguments import checked
from debias.ops.groups import check_n_groups, name_groups
from debias.step.batch import BatchKey, describe, key_name
from debias.step.context import Step
from debias.step.ids import check_keys, plain_key, plain_n_groups
from debias.step.indices import evaluation_sets
from debias.step.watcher import check_loss
from debias.tap.calls import LossCall
from debias.tap.head import submodule
from debias.tap.hooks import Hook
from debias.tap.predictions import CLASSIFYING

__all__ = ["GroupMonitor"]

_CLASSIFICATION = CLASSIFYING | {"losses"}


class GroupMonitor(EpochMonitor):
    """Log a metric overall, by group and for the worst group.

    Logged at the end of every validation and test epoch, ready for ``ModelCheckpoint(monitor=...)`` and early
    stopping::

        val/accuracy                        all samples
        val/worst_group_accuracy            the worst group that occurs
        val/accuracy_by_group/<name>        NaN for a group without a sample, or where the metric is undefined
        val/accuracy_count/<name>           samples of the group that were scored; of a collection its first metric's
        val/accuracy_difference             best minus worst group
        val/accuracy_ratio                  worst over best group
        val/adjusted_accuracy               with `train_counts`: groups weighted by their share of the training set

    Scored is what the network predicted, where it is a prediction and counts: elements that the loss ignores or weighs
    with 0, or that the step masks or selects from an unreduced loss, are not scored; where the step or its criterion
    adds margins or priors to the logits, those before are scored, if they are the output of ``forward`` or of a direct
    child of the module. Rows that are tokens, pixels or views of a sample count as its elements.

    Of more than 100 groups the values by group are left out: logging takes about a millisecond for each.
    With several loaders every name ends in ``/dataloader_idx_<i>``. The sanity check is skipped. On several ranks the
    sums are exact; give the loader ``sampler=EvalSampler(dataset)``, or Lightning pads it and counts samples twice.

    Args:
        group: where the group ids are: a tag, an index, a name, a dotted path, a callable, or a tuple whose ids are
            crossed.
        n_groups: number of groups, one per key.
        group_names: one name per group.
        metric: any torchmetrics metric of one number, to be split by group instead of accuracy; logged under its class
            name in snake case. Or a ``MetricCollection``: each of its metrics is split and logged under its key, with
            the collection's prefix and postfix; what precedes a slash stays in front
            (``val/clean/worst_group_auroc``). Every metric keeps states of its own, whatever ``compute_groups`` says.
            Metrics of ``torchmetrics.classification`` get the logits of a torch loss as probabilities, a binary one
            also the two logits of a cross-entropy: that of class 1.
        logits: where the step computes no loss: dotted path of the submodule whose output they are, or a callable of
            the step's output. By default the output of the module's ``forward``.
        target: where the target is in the batch; by default the one of the loss. Labels of tokens are moved by one
            place where a loss of the step does so.
        ignore_index: a target that is not scored, beside those that the loss leaves out and negative ones.
        loss: which of several losses is meant: its position, or a callable of :class:`LossCall`.
        threshold: for binary and multi-label outputs: a logit above it is a positive; 0 by default. Probabilities p
            that a loss reads have the logit ``log(p / (1 - p))``. Without a loss, or with ``logits``, nothing says
            whether the scores are logits, so it has to be given: they are compared themselves.
        train_counts: training samples per group, for the adjusted average.
        name: prefix of several monitors' logged names, e.g. ``"place"`` gives ``val/place/accuracy``.
        allow_untested_strategy: run under a strategy that was not tested.

    Raises:
        LossNotFoundError: a step computes neither a loss nor ``forward``, and ``logits`` is not given.
        AmbiguousLossError: a step computes several losses, or none and calls what ``logits`` names more than once.
        RowsError: a step reorders the batch in a way that cannot be followed.
        BatchKeyError: ids or target are not where the argument says.
        DebiasError: an argument is wrong, or a metric cannot be split by group or does not take the logits and target.
    """

    needs: ClassVar[tuple[str, ...]] = ("group",)
    reference: ClassVar[str] = "by group, difference, ratio: fairlearn; worst group, adjusted average: WILDS"

    @checked()
    def __init__(
        self,
        group: tuple[BatchKey, ...] | BatchKey,
        n_groups: int | tuple[int, ...],
        *,
        group_names: list[str] | None = None,
        metric: Any = None,
        logits: str | Callable[[Any], Tensor] | None = None,
        target: BatchKey | None = None,
        ignore_index: int | None = None,
        loss: int | Callable[[LossCall], bool] | None = None,
        threshold: float | None = None,
        train_counts: list[int] | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name, allow_untested_strategy=allow_untested_strategy)
        check_loss(loss)
        check_keys(group, n_groups)
        self.group = plain_key(group)
        self.n_groups = plain_n_groups(n_groups)
        self.total = check_n_groups(n_groups)
        self.group_names = name_groups(n_groups, group_names)
        self.metric = metric
        self.logits = logits
        self.target = target
        self.ignore_index = ignore_index
        self.loss = loss
        self.threshold = threshold
        self.train_counts = train_counts
        self._metrics: list[list[Any]] = []  # of each loader; those of the last stage are used again
        self._captured: Any = None
        self._captured_inputs: list[Tensor] = []
        self._captures = 0
        self._handle: Any = None
        made = self._make()  # a wrong argument is an error now, not after the first epoch
        self.higher_is_better: bool = made[0].higher_is_better  # the value that is logged first
        self._value_names = ["accuracy"] if metric is None else [each.name for each in made]
        self._elements = 0
        self._exclusive: Tensor | None = None  # whether all binary targets of the epoch have exactly one positive
        self._said_exclusive = False

    @property
    def state_key(self) -> str:
        """Class, name and key: several monitors of one run are told apart."""
        which = self.name or key_name(self.group) or "callable"
        what = [] if self.metric is None else self._value_names
        return f"{type(self).__qualname__}({', '.join([which, *what])})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine; watch the submodule that ``logits`` names."""
        super().setup(trainer, pl_module, stage)
        if isinstance(self.logits, str) and self._handle is None:
            self._handle = submodule(pl_module, self.logits, argument="logits").register_forward_hook(
                Hook(self._capture)
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._captured, self._captured_inputs, self._metrics = None, [], []
        super().teardown(trainer, pl_module, stage)

    def begin(self, step: Step) -> None:
        """Read the ids."""
        step.ids(self.group, self.n_groups, argument="group")
        self._captures = 0

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Add one batch to the metrics of its loader."""
        groups = step.ids(self.group, self.n_groups, argument="group")
        scored = self._scored(step, calls, forward_output, output)
        self._captured, self._captured_inputs = None, []
        logits, target, rows, counted, loss = scored
        check_rows(logits, target, len(groups) if rows is None else len(rows))
        if logits.ndim == target.ndim + 1 and logits.shape[1] == 1 and logits.numel() == target.numel():
            logits = logits.squeeze(1)
        of_rows = groups if rows is None else groups[rows]
        with torch.no_grad():
            for metric in self._metrics[step.dataloader_idx]:
                if isinstance(metric, GroupedMetric):
                    update_metric(metric, logits.detach(), target, of_rows, loss, counted)
                    continue
                kept = without(target, counted)
                if isinstance(metric, GroupAccuracy):
                    metric.update(logits.detach(), kept, groups, rows)
                else:
                    metric.update(logits.detach(), kept, of_rows)

    def _scored(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> Scored:
        call = None
        if self.logits is not None:
            logits = logits_of(self._captured if isinstance(self.logits, str) else self.logits(output))
        else:
            way = "; of several losses of one prediction, as of each class, `logits=` and `target=`"
            call = loss_of(calls, self.loss, type(self).__name__, way)
            logits = logits_of(forward_output) if call is None else predicted_by(call, type(self).__name__)
        if call is not None and self.metric is None and call.name not in _CLASSIFICATION:
            raise DebiasError(
                f"Expected a classification loss for GroupMonitor's accuracy, but the step computes `{call.name}`. If"
                " it is one, pass `logits=`, the submodule whose output they are, and `target=`; else a metric that"
                " fits, e.g. `metric=torchmetrics.MeanAbsoluteError()`."
            )
        if not isinstance(logits, Tensor):
            raise self._no_logits(logits, step)
        rows = self._rows(logits, call)
        target = self._target(step, calls, call, logits, rows)
        counted = None if call is None else counted_like(call.counted, target)
        if self.ignore_index is not None:
            kept = target != self.ignore_index
            counted = kept if counted is None else counted & kept
        self._look_for_exclusive_classes(target, call)
        binary = logits.is_floating_point() and logits.numel() == target.numel()
        if call is None and binary and self.metric is None and self.threshold is None:
            raise DebiasError(
                "Expected `threshold` of GroupMonitor to be given where no loss says whether scores are logits or"
                f" probabilities, but got one score {tuple(logits.shape)} for each target {tuple(target.shape)}. Pass"
                " `threshold=0.0` for logits, `threshold=0.5` for probabilities."
            )
        if call is not None and call.name == "binary_cross_entropy" and self.metric is None:
            # Of probabilities; those of 0 and 1 stay finite, or they would be counted as wrong.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).logit(eps=1e-7)
        return Scored(logits, target, rows, counted, None if call is None else call.name)

    def _no_logits(self, found: Any, step: Step) -> LossNotFoundError:
        stage = f"{'validation' if step.stage == 'validate' else step.stage}_step"
        if isinstance(self.logits, str):
            return LossNotFoundError(
                f"Expected the output of `logits={self.logits!r}` to be a tensor, or to hold one as `logits`, but got"
                f" {describe(found)} in {stage}. Name the layer that makes the logits."
            )
        if self.logits is not None:
            return LossNotFoundError(
                f"Expected `logits=` of GroupMonitor to return a tensor from what {stage} returns, but got"
                f" {describe(found)}. Return the logits from the step."
            )
        return LossNotFoundError(
            f"Expected {stage} to compute a torch loss (not in a metric), or to call the module's `forward` with a"
            f" tensor as output (or something that holds one as `logits`), but got {describe(found)}. Pass"
            " `logits='dotted.path'` of the submodule whose output they are, with `target=` where it is in the batch:"
            " then validation and test need no loss; or `logits=callable(step_output)`."
        )

    def _rows(self, logits: Tensor, call: LossCall | None) -> Tensor | None:
        seen = None if self.engine is None else self.engine.seen
        if seen is None or logits.ndim == 0:
            return None
        if callable(self.logits):
            try:
                return seen.rows_of(logits, None, "GroupMonitor", seen.inputs)
            except RowsError:
                if seen.tracker is None or not seen.tracker.reordered(read=True):
                    return None  # in the order of the batch, as far as can be seen
                raise
        times = seen.calls if self.logits is None else self._captures
        if call is None and times > 1:
            what = "the module's `forward`" if self.logits is None else f"`{self.logits}`"
            raise AmbiguousLossError(
                f"Expected the evaluation step to call {what} once for GroupMonitor, but it did {times} times: what it"
                " predicts from the outputs cannot be seen. Return the logits from the step and pass"
                " `logits=callable(step_output)`."
            )
        inputs = seen.inputs if self.logits is None else self._captured_inputs
        way = (
            ", or return them from the step with a row for each sample, (N, C, views), and pass"
            " `logits=callable(step_output)` and `target=callable(batch)`, (N, views)"
        )
        return seen.rows_of(logits, call, "GroupMonitor", inputs, way)

    def _target(
        self, step: Step, calls: list[LossCall], call: LossCall | None, logits: Tensor, rows: Tensor | None
    ) -> Tensor:
        if self.target is not None:
            target = step.read(self.target, argument="target")
            if isinstance(target, Tensor):
                target = shifted_like(target, calls)
                if call is not None and is_flattened(target, call.target):
                    target = call.target
        elif call is not None:
            target = call.target
        elif isinstance(step.batch, tuple | list) and len(step.batch) >= 2:
            target = step.batch[1]  # (x, y, ...), where no loss says what the target is
        else:
            target = None
        in_batch_order = self.target is not None or call is None
        if in_batch_order and rows is not None and isinstance(target, Tensor) and target.shape[:1] == (step.n,):
            target = target[rows]
        soft = call is not None and call.name in ("cross_entropy", "SoftTargetCrossEntropy")
        if soft and self.metric is None and self.target is None and target.is_floating_point():  # type: ignore[union-attr]
            target = target.argmax(1)  # type: ignore[union-attr]  # class probabilities
        if not isinstance(target, Tensor):
            raise BatchKeyError(
                f"Expected `target` to be given where the evaluation step computes no loss, but the batch is"
                f" {describe(step.batch)}. Pass e.g. `target='label'`."
            )
        return target

    def _look_for_exclusive_classes(self, target: Tensor, call: LossCall | None) -> None:
        """Binary targets are scored element by element, which is not what is meant where classes exclude each other."""
        if call is None or self.target is not None or self.metric is not None or target.ndim != 2:
            return
        if target.shape[1] > 1 and target.is_floating_point():
            one = ((target > 0.5).sum(1) == 1).all()
            self._exclusive = one if self._exclusive is None else self._exclusive & one
            self._elements = target.shape[1]

    def _warn_of_exclusive_classes(self) -> None:
        if self._exclusive is None or self._said_exclusive or not bool(self._exclusive):
            return
        self._said_exclusive = True
        right = (self._elements - 1) / self._elements
        warnings.warn(
            f"{self.state_key} scores each of the {self._elements} elements of the binary targets, but all samples of"
            f" this epoch have exactly one positive: who always says no is right in {right:.1%}. If the classes exclude"
            " each other, pass `target=`, where the class ids are in the batch: the accuracy is then that of the"
            " largest logit.",
            DebiasWarning,
            stacklevel=2,
        )

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_step(module):
            self._captured, self._captured_inputs = output, [x for x in args if isinstance(x, Tensor)]
            self._captures += 1

    def _make(self) -> list[Any]:
        """One metric for each value, all with states of their own."""
        options: dict[str, Any] = {"group_names": self.group_names, "train_counts": self.train_counts}
        if self.metric is None:
            return [GroupAccuracy(self.total, threshold=self.threshold or 0.0, ignore_index=IGNORED, **options)]
        if isinstance(self.metric, MetricCollection):
            if not len(self.metric):
                raise DebiasError("Expected `metric` to hold at least one metric, but got an empty MetricCollection.")
            return [GroupedMetric(ignoring(m), self.total, name=name, **options) for name, m in self.metric.items()]
        if isinstance(self.metric, Sequence | Mapping):
            raise DebiasError(
                f"Expected `metric` to be a torchmetrics Metric or MetricCollection, but got"
                f" {type(self.metric).__name__}. Several metrics go into one: `torchmetrics.MetricCollection(metrics)`."
            )
        metric = ignoring(self.metric) if isinstance(self.metric, Metric) else self.metric
        return [GroupedMetric(metric, self.total, **options)]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say which groups have a sample neither in the training nor in the validation set, where tags tell.

        Raises:
            DebiasError: a sampler balances batches of another size than the loader's, or ranks have different numbers
                of batches.
        """
        super().on_train_start(trainer, pl_module)
        check_batches(trainer.train_dataloader)
        if trainer.val_dataloaders is None or not trainer.is_global_zero:
            return
        loaders = trainer.train_dataloader, trainer.val_dataloaders
        counts = [tag_counts(trainer, loader, self.group, self.n_groups) for loader in loaders]
        total = None if counts[0] is None or counts[1] is None else counts[0] + counts[1]
        empty = empty_groups(total, self.group_names)
        if empty:
            warnings.warn(
                f"{self.state_key} was given `n_groups={self.n_groups}`, but the tags of the training and validation"
                f" set hold no sample of {empty}: their metrics are NaN. If `n_groups` counts too many, correct it.",
                DebiasWarning,
                stacklevel=2,
            )

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        self._metrics += [self._make() for _ in loaders[len(self._metrics) :]]
        for metric in (metric for metrics in self._metrics for metric in metrics):
            metric.reset()
            metric.to(pl_module.device)
        self._exclusive = None

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        if trainer.is_global_zero:
            self._warn_of_exclusive_classes()
        loaders = len(evaluation_sets(trainer))
        computed = [[metric.compute() for metric in metrics] for metrics in self._metrics[:loaders]]
        return [by_group(_joined(values), self.group_names) for values in computed]


def _joined(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The values of several metrics, with the counts, which are those of all of them, once."""
    first, *others = values
    return first | {k: v for other in others for k, v in other.items() if not k.endswith("_count")}
