"""What monitors see of an evaluation step beside its losses: what the network made, and whose rows they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debias.errors import HeadNotFoundError, RowsError
from debias.step.context import Step
from debias.tap.calls import LossCall, LossRecord
from debias.tap.head import FeatureTap, HeadTap, check_features
from debias.tap.rows import RowTracker
from debias.tap.selection import select_call
from debias.tap.tap import LossTap

if TYPE_CHECKING:
    from debias.step.watcher import StepWatcher

__all__ = ["Seen"]


class Seen:
    """One evaluation step, while it runs and monitors look at it.

    Args:
        tracker: follows the rows of the samples; None where no monitor reads ids.

    Attributes:
        output: what the module's ``forward`` has returned last.
        inputs: the tensors that it was given.
        calls: how often it was called.
    """

    def __init__(self, tracker: RowTracker | None) -> None:
        self.tracker = tracker
        self.output: Any = None
        self.inputs: list[Tensor] = []
        self.calls = 0

    def keep(self, args: Any, output: Any) -> None:
        """Keep what the module's ``forward`` was given, and what it has returned."""
        self.output, self.inputs = output, [x for x in args if isinstance(x, Tensor)]
        self.calls += 1

    def rows_of(
        self, tensor: Tensor, call: LossCall | None, who: str, inputs: Sequence[Tensor] = (), way: str = ""
    ) -> Tensor | None:
        """Sample of each row of what a monitor reads in an evaluation step; None where row i is sample i.

        Args:
            tensor: the logits or features.
            call: the loss that was computed from them; None where none was.
            who: name of the monitor, for messages.
            inputs: what the network that made them was given.
            way: what else the user may do where rows are unknown, for the message.

        Returns:
            int64 ``(rows,)``.

        Raises:
            RowsError: rows come from samples in a way that cannot be followed.
        """
        tracker = self.tracker
        if tracker is None or not tensor.ndim:
            return None
        count = tensor.shape[0]
        candidates = [tensor, *inputs] if call is None else [call.target, tensor]
        rows = [x for x in candidates if isinstance(x, Tensor) and x.ndim and x.shape[0] == count]
        if any(tracker.is_strange(x) for x in candidates if isinstance(x, Tensor)):
            raise RowsError(
                f"Expected what {who} reads to be of samples that have ids, but its rows are of a loader without them."
                " Tag that loader too (-1 = unlabelled), or evaluate the loaders one after the other, which Lightning"
                " does with a list of them."
            )
        index = tracker.resolve(rows, count)
        if isinstance(index, bool):
            if count != tracker.n:
                raise RowsError(
                    f"Expected the rows of what {who} reads to be those of the {tracker.n} samples of the batch, or"
                    f" views of them, but got shape {tuple(tensor.shape)}, and where its rows come from cannot be"
                    f" followed. Make them of tensors of the batch by reshapes and indexing{way}; a `collate_fn` must"
                    " not leave samples out, as ids cannot follow."
                )
            if not tracker.reordered(read=True) and not any(map(tracker.is_lost, rows)):
                return None
            raise _out_of_order(who)
        if index is None:
            return None
        tracker.needed = True
        index = index.flatten(1) if index.ndim > 1 else index.unsqueeze(1)
        if not torch.equal(index, index[:, :1].expand_as(index)):
            raise _out_of_order(who)
        return index[:, 0]

    def features(self, monitor: StepWatcher, head: HeadTap | FeatureTap, tap: LossTap, step: Step) -> Tensor | None:
        """Features of the loss that the monitor means, or of what the module's ``forward`` returned."""
        if step.of_several:
            if isinstance(head, FeatureTap):
                return _joined(monitor, head, step)
            raise HeadNotFoundError(
                f"Expected the features that {type(monitor).__name__} reads to be named where a batch is of several"
                " loaders: nothing else tells whose samples they are of. Pass `features='dotted.path'`."
            )
        if tap.calls and isinstance(head, HeadTap):
            call = select_call(tap.calls, monitor.loss, type(monitor).__name__)
            read, of_call = call.logits, call
        else:
            call = LossCall("forward", 0, self.output, None, LossRecord(tuple))  # type: ignore[arg-type]
            if tap.finder is not None and isinstance(self.output, Tensor):
                call.record.linear = tap.finder.match(self.output)
            read, of_call = self.output, None
        if isinstance(read, Tensor) and read.ndim:
            rows = self.rows_of(read, of_call, type(monitor).__name__, self.inputs)
            if rows is not None and len(rows) > (step.n or 0):
                raise RowsError(
                    f"Expected one row of features for each of the {step.n} samples for {type(monitor).__name__}, but"
                    f" got {len(rows)} (tokens? views?). Name the module whose output they are, and how it becomes one"
                    " row a sample: `features='dotted.path', pool='mean'`."
                )
            if rows is not None and not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
                raise _out_of_order(type(monitor).__name__)
        head.resolve(call)
        if isinstance(head, FeatureTap) and self.tracker is not None and isinstance(call.features, Tensor):
            samples = torch.arange(self.tracker.n, device=call.features.device)
            if len(call.features) == len(samples) and not torch.equal(call.of_features(samples), samples):
                raise _out_of_order(type(monitor).__name__)
        return call.features


def _joined(monitor: StepWatcher, head: FeatureTap, step: Step) -> Tensor:
    """Features of all runs on the samples that have ids, in the order of the samples."""
    call = LossCall("features", 0, None, None, LossRecord(tuple))  # type: ignore[arg-type]
    head.resolve(call, join=True, having=step.having(monitor))
    features = check_features(call.features)
    rows = call.of_features(torch.arange(step.n or 0, device=features.device))
    if not torch.equal(rows.sort().values, torch.arange(step.n or 0, device=rows.device)):
        raise RowsError(
            f"Expected one row of features for each of the {step.n} samples that have ids for"
            f" {type(monitor).__name__}, but got {len(rows)} rows of `features={head.path!r}`. Run it once on the"
            " samples of each loader in evaluation, or leave the tag of the others out."
        )
    return features[rows.argsort()]


def _out_of_order(who: str) -> RowsError:
    return RowsError(
        f"Expected the evaluation step to keep the samples in the order of the batch for {who}, but it puts them in"
        " another one, where that cannot be followed to what is read. Leave the order as it is."
    )
