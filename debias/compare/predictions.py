"""What a run predicted on its test set, row by row, so that every figure can be computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from debias.monitors.group_monitor import GroupMonitor
from debias.ops.distributed import gather
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["Predictions"]


class Predictions(GroupMonitor):
    """Write logits, targets and groups of every test to an ``.npz`` file.

    Arrays ``logits_<i>`` ``(N, ...)``, ``target_<i>`` ``(N, ...)`` and ``group_<i>`` ``(N,)`` or ``(N, G)`` for loader
    ``i``, rows in the order in which they were seen, those of all ranks one after another.

    Args:
        monitor: the recipe's GroupMonitor, whose rows these are.
    """

    def __init__(self, monitor: GroupMonitor) -> None:
        super().__init__(
            monitor.group,
            monitor.n_groups,
            metric=monitor.metric,
            logits=monitor.logits,
            target=monitor.target,
            ignore_index=monitor.ignore_index,
            loss=monitor.loss,  # type: ignore[arg-type]
            threshold=monitor.threshold,
            name="predictions",
            allow_untested_strategy=monitor.allow_untested_strategy,
        )
        self.path: Path | None = None  # of the next test; None writes nothing

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Keep the rows of a test batch."""
        if self.path is not None:
            super().observe(step, calls, forward_output, output)

    def _make(self) -> list[Any]:
        return [_Rows()]

    def _end(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.path is None or stage != "test":
            return
        arrays: dict[str, Any] = {}
        for i, (rows,) in enumerate(self._metrics):
            for name, parts in rows.parts.items():
                arrays[f"{name}_{i}"] = gather(torch.cat(parts)).cpu().numpy()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("wb") as file:
                np.savez_compressed(file, **arrays)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing to say; the recipe's monitor does."""


class _Rows:
    name = "predictions"
    higher_is_better = True

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {"logits": [], "target": [], "group": []}

    def to(self, device: Any) -> _Rows:
        return self

    def reset(self) -> None:
        self.parts = {name: [] for name in self.parts}

    def update(self, logits: Tensor, target: Tensor, group: Tensor) -> None:
        for name, part in (("logits", logits), ("target", target), ("group", group)):
            self.parts[name].append(part.detach())
