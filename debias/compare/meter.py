"""What a run costs: seconds of a training step, seconds in all, peak memory; and a line for each epoch in its log."""

from __future__ import annotations

import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from debias.compare.keeping import validation_metrics
from debias.compare.records import measures
from debias.compare.runner import duration
from debias.step.loggers import log_hyperparameters

__all__ = ["EpochLines", "Labels", "Meter", "peak_memory"]


class Meter(Callback):
    """Measure time and memory of training, and keep what was warned of; all goes on with a run that was killed.

    A test restores the callbacks of the checkpoint that it tests, this one included: read what was measured before.

    A step's seconds are wall-clock time, waiting for data included, validation and checkpoints not. The first epoch of
    a process, in which caches fill and kernels are chosen, counts only where there is no other. The device is waited
    for once an epoch.

    Args:
        start: when the run's process began, as ``time.monotonic`` counts; now, by default.
        warned: texts of warnings, a list that grows while the run goes on; those from before are put in front.
    """

    def __init__(self, start: float | None = None, warned: list[str] | None = None) -> None:
        self.epochs: list[list[float]] = []  # seconds, steps, and whether it was the first of a process
        self.peak_memory = 0
        self.warned = [] if warned is None else warned
        self.seconds_before = 0.0  # of the processes that were killed, up to the checkpoint that the run went on from
        self._begun = time.monotonic() if start is None else start
        self._start = 0.0
        self._paused: float | None = None
        self._from = 0
        self._first = True

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps; NaN before the first."""
        counted = [epoch for epoch in self.epochs if not epoch[2]] or self.epochs
        steps = sum(epoch[1] for epoch in counted)
        return sum(epoch[0] for epoch in counted) / steps if steps else math.nan

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start."""
        self._from, self._start, self._paused = trainer.global_step, time.perf_counter(), None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Pause."""
        _wait(trainer)
        self._paused = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Go on: not at the end of validation, where checkpoints are written."""
        self._go_on()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        self._go_on()
        _wait(trainer)
        steps = trainer.global_step - self._from
        self.epochs.append([time.perf_counter() - self._start, steps, self._first])
        self._first = False
        self.peak_memory = max(self.peak_memory, peak_memory(trainer))

    def state_dict(self) -> dict[str, Any]:
        """What was measured until now."""
        seconds = self.seconds_before + time.monotonic() - self._begun
        return {
            "epochs": [list(epoch) for epoch in self.epochs], "seconds": seconds, "peak_memory": self.peak_memory,
            "warned": list(self.warned),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.epochs, self.seconds_before = state_dict["epochs"], state_dict["seconds"]
        self.peak_memory = state_dict["peak_memory"]
        self.warned[:0] = [text for text in state_dict["warned"] if text not in self.warned]

    def _go_on(self) -> None:
        if self._paused is not None:
            self._start += time.perf_counter() - self._paused
            self._paused = None


class Labels(Callback):
    """Tell the loggers which run of a comparison this is, with the arguments of its methods.

    Args:
        labels: by flat key.
    """

    def __init__(self, labels: dict[str, Any]) -> None:
        self.labels = labels

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before any other callback tells a part of it: TensorBoard shows what it is told first."""
        if stage == "fit":
            log_hyperparameters(trainer, pl_module, self.labels)


class EpochLines(Callback):
    """Print a line at the end of each epoch: there is no progress bar in the log of a run.

    Args:
        direction: ``"max"`` where higher metrics are better, else ``"min"``.
    """

    def __init__(self, direction: str = "max") -> None:
        self.direction = direction
        self._start = 0.0
        self._seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Print epoch, step, losses, and what the last validation found."""
        # On all ranks: reading a value may reduce it over them.
        values = {key: float(v) for key, v in trainer.callback_metrics.items() if _is_loss(key)}
        found = measures(validation_metrics(trainer), "val", self.direction)
        if found.metric:
            values |= {f"val/{found.metric}": found.average, "worst group": found.worst}
        if not trainer.is_global_zero:
            return
        words = [f"step {trainer.global_step}", *(f"{key} {value:.4g}" for key, value in values.items())]
        words.append(f"{time.monotonic() - self._start:.1f} s")
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
        self._seconds.append(time.monotonic() - self._start)
        end = f"/{total}" if total > 0 else ""
        if total > done:
            words.append(f"{duration((total - done) * sum(self._seconds) / len(self._seconds))} left")
        print(f"Epoch {done}{end}: {', '.join(words)}", flush=True)


def _is_loss(key: str) -> bool:
    return key.rpartition("/")[2] in ("loss", "train_loss", "val_loss")


def peak_memory(trainer: Any) -> int:
    """Bytes: allocated on the device, or, where that is the CPU, resident of the whole process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        # Of this program alone: what `getrusage` says begins with the peak of the process that started it.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(trainer: Any) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
