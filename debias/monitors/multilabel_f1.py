"""F1 of every label and their mean, overall and by group, at a threshold that is chosen on the validation set.

The published evaluations of action units choose epoch and threshold on the test fold, which is optimistic. Here the
threshold with the best mean F1 in validation is kept, saved with the checkpoint, and used at test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.errors import DebiasError, LossNotFoundError, RowsError
from debias.metrics import MultilabelF1, worst_group
from debias.monitors._epoch import EpochMonitor, by_group
from debias.monitors.scored import counted_like, loss_of, predicted_by
from debias.ops.arguments import check_count, checked
from debias.ops.groups import check_n_groups, name_groups
from debias.step.batch import BatchKey, key_name
from debias.step.context import Step
from debias.step.ids import check_keys, plain_key, plain_n_groups
from debias.step.loggers import safe_names
from debias.step.watcher import check_loss
from debias.tap.calls import LossCall

__all__ = ["MultilabelF1", "MultilabelF1Monitor"]


class MultilabelF1Monitor(EpochMonitor):
    """Log the F1 of every label, the mean, and the worst group, at the threshold that is best in validation.

    Logged at the end of every validation and test epoch, ready for ``ModelCheckpoint(monitor="val/f1", mode="max")``::

        val/f1                  mean over labels
        val/f1_by_label/<name>  NaN for a label without a positive, neither true nor guessed
        val/f1_by_group/<name>  mean over labels, for each group
        val/worst_group_f1      NaN if that of every group is
        val/threshold           of the probability; at test the one of the checkpoint

    Reads the logits from the binary cross-entropy of the evaluation step. Targets below 0 are missing, and so are those
    that the loss leaves out, by a weight of 0 or a mask.
    ``trainer.test`` without an earlier validation uses a threshold of 0.5, or where ``thresholds`` is even the next
    below; a validation in which F1 is NaN at every threshold chooses none. Several loaders of a stage count as one set.

    Args:
        label_names: one name per label.
        target: where the targets are in the batch: of the loss, missing ones may have been filled in.
        group: where group or identity ids are: a key, or a tuple of them whose ids are crossed; or None.
        n_groups: number of groups, one per key.
        group_names: one name per group.
        thresholds: number of thresholds tried; published: 99.
        loss: which of several losses is meant: its position, or a callable of :class:`LossCall`.
        name: prefix of several monitors' logged names, e.g. ``"person"`` gives ``val/person/f1``.
        allow_untested_strategy: run under a strategy that was not tested.

    Raises:
        LossNotFoundError: the evaluation step computes no binary cross-entropy.
    """

    stateful: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    reference: ClassVar[str] = "F1 by unit and mean, as on BP4D and DISFA, the threshold chosen in validation"
    _value_names = ("f1", "threshold")

    @checked()
    def __init__(
        self,
        label_names: list[str],
        *,
        target: BatchKey = 1,
        group: tuple[BatchKey, ...] | BatchKey | None = None,
        n_groups: int | tuple[int, ...] = 1,
        group_names: list[str] | None = None,
        thresholds: int = 99,
        loss: int | Callable[[LossCall], bool] | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name, allow_untested_strategy=allow_untested_strategy)
        if not label_names or len(set(label_names)) != len(label_names):
            raise DebiasError(f"Expected `label_names` to be different names, one per label, but got {label_names!r}.")
        check_loss(loss)
        if group is not None:
            check_keys(group, n_groups)
        self.label_names = [str(name) for name in label_names]
        self.target = target
        self.group = plain_key(group)
        self.n_groups = plain_n_groups(n_groups)
        self.total = check_n_groups(n_groups)
        self.group_names = name_groups(n_groups, group_names)
        self.thresholds = check_count("thresholds", thresholds)
        self.loss = loss
        self.chosen: int | None = None
        self._metric: Any = None

    @property
    def state_key(self) -> str:
        """Class, and name or key: several monitors of one run are told apart."""
        which = self.name or (None if self.group is None else key_name(self.group))
        return f"{type(self).__qualname__}({which})" if which else type(self).__qualname__

    def begin(self, step: Step) -> None:
        """Read the ids, or the target, which has as many rows."""
        if self.group is not None:
            step.ids(self.group, self.n_groups)
        elif step.n is None and isinstance(target := step.read(self.target, argument="target"), Tensor) and target.ndim:
            step.n = target.shape[0]

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Count one batch."""
        bce = [c for c in calls if c.name.startswith("binary_cross_entropy")]
        call = loss_of(bce, self.loss, type(self).__name__)
        if call is None:
            raise LossNotFoundError(
                "Expected the evaluation step to compute one binary cross-entropy of (N, labels), but got"
                f" {[c.name for c in calls] or 'no loss'}. Compute it with torch's function."
            )
        logits, targets = predicted_by(call, type(self).__name__), step.read(self.target, argument="target")
        if logits.shape != targets.shape or logits.ndim != 2 or logits.shape[1] != len(self.label_names):
            raise RowsError(
                f"Expected logits and targets of shape (N, {len(self.label_names)}), one column per name in"
                f" `label_names`, but got {tuple(logits.shape)} and {tuple(targets.shape)}. Correct `label_names` or"
                " `target`."
            )
        groups = targets.new_zeros(len(targets)).long() if self.group is None else step.ids(self.group, self.n_groups)
        seen = None if self.engine is None else self.engine.seen
        rows = None if seen is None else seen.rows_of(logits, call, type(self).__name__)
        if rows is not None:
            targets, groups = targets[rows], groups[rows]
        if (counted := counted_like(call.counted, targets)) is not None:
            targets = torch.where(counted, targets if targets.is_floating_point() else targets.long(), -1)
        with torch.no_grad():
            scores = logits if call.name == "binary_cross_entropy" else logits.float().sigmoid()
            self._metric.update(scores.detach(), targets, groups)

    def state_dict(self) -> dict[str, Any]:
        """The chosen threshold."""
        return {"chosen": self.chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the threshold of a checkpoint."""
        self.chosen = state_dict["chosen"]

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        self._metric = MultilabelF1(len(self.label_names), self.total, self.thresholds).to(pl_module.device)

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        table = self._metric.compute()  # (G + 1, T, A), of all ranks and loaders
        not_finite, self._metric = self._metric.said, None
        if stage == "val":
            by_threshold = table[-1].nanmean(1).nan_to_num(-1)
            best = int(by_threshold.argmax())
            self.chosen = best if by_threshold[best] >= 0 else self.chosen
        place = (self.thresholds - 1) // 2 if self.chosen is None else self.chosen
        by_label, f1_by_group = table[-1, place], table[:-1, place].nanmean(1)
        values = {"f1": by_label.nanmean(), "threshold": torch.tensor((place + 1) / (self.thresholds + 1))}
        names = safe_names(self.label_names)
        values |= {f"f1_by_label/{k}": v for k, v in zip(names, by_label.unbind(), strict=True)}
        if self.group is not None:
            values |= {"worst_group_f1": worst_group(f1_by_group), "f1_by_group": f1_by_group}
        return [by_group(values | not_finite, self.group_names)]
