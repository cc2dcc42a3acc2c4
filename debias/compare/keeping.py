"""The callback that keeps a checkpoint for each selection rule, and lets a killed run go on."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from debias.compare.records import PROGRESS, Candidate, measures, shift_score, worst_of, write_json
from debias.ops.distributed import gather_objects, global_rank

__all__ = ["Keeper", "validation_metrics"]


def validation_metrics(trainer: Any) -> dict[str, float]:
    """What the validation that has just ended logged, by name."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}


class Keeper(Checkpoint):
    """Keep the best checkpoint by each rule that reads the validation set, and the last one.

    Files are ``checkpoints/<rule>-step<N>.ckpt`` and ``checkpoints/last.ckpt`` in the run's folder. The last one is
    written at the end of an epoch when ``every`` seconds have passed since; with it, a run that was killed goes on as
    if nothing had been, on CPUs to the last bit: the states of the generators of every rank are in it, and each gets
    its own back. With more ranks than before, the further ones begin new streams, all different. What it refers to as
    best stays until it is written again, so that a run which goes on otherwise than before still tests what it names.

    Args:
        folder: of the run.
        direction: ``"max"`` where higher metrics are better, else ``"min"``.
        every: seconds between two writes of the last checkpoint.
    """

    def __init__(self, folder: Path, direction: str = "max", every: float = 30.0) -> None:
        self.folder = folder
        self.direction = direction
        self.every = every
        self.best: dict[str, dict[str, Any]] = {}  # by rule: score and candidate, as plain values
        self.val: dict[str, float] = {}
        self.validated = -1  # the step that `val` is of
        self._epochs = 0  # begun, the running one included
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._needed: set[str] = set()  # checkpoints that the last one refers to
        self._stopped = False
        self._reported = 0.0
        self._generators: list[dict[str, Any]] | None = None  # of each rank

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.folder / "checkpoints" / "last.ckpt"

    def candidates(self) -> dict[str, Candidate]:
        """The checkpoints of this run, by rule; without test metrics yet."""
        return {
            rule: Candidate(**{k: v for k, v in entry.items() if k != "score"}, test={})
            for rule, entry in self.best.items()
        }

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep this epoch's checkpoint by each rule that prefers it to all before."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # The one place where the device is waited for; an epoch has ended.
        self.val, self.validated = validation_metrics(trainer), trainer.global_step
        found = measures(self.val, "val", self.direction)
        scores = {"val_average": found.average, "val_worst_group": found.worst, "val_shift": shift_score(self.val)}
        for rule, name in (("val_worst_class", "class"), ("val_worst_inferred", "inferred")):
            scores[rule] = worst_of(self.val, name)
        for rule, score in scores.items():
            sign = 1 if self.direction == "max" or rule == "val_shift" else -1
            known = self.best.get(rule)
            if not math.isnan(score) and (known is None or sign * score > sign * known["score"]):
                self._keep(trainer, rule, score)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """After a resume: take up the random streams where they were.

        Not at the start of the epoch: the iterator of its batches, which draws, is made before that.
        """
        if self._generators is not None:
            _restore_generators(self._generators, global_rank())
            self._generators = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """After a resume: a run that was stopped early before it was killed trains no further."""
        if self._stopped:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Say how far the run is, about once a second."""
        if time.monotonic() - self._reported > 1:
            self._report(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count."""
        self._epochs = trainer.current_epoch + 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last checkpoint, unless that was just done."""
        due = time.monotonic() - self._saved_at >= self.every
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # ranks' clocks differ; saving takes all of them
            self._save_last(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last checkpoint."""
        if self._saved_step != trainer.global_step:
            self._save_last(trainer)

    def forget_stage(self) -> None:
        """Of a method in two stages: no network of stage one is a candidate."""
        self.best, self.val, self.validated = {}, {}, -1

    def module_changed(self) -> None:
        """Of a method that changes the network when training has ended: the last checkpoint alone is of it."""
        self.forget_stage()
        self._saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Scores, last metrics and the states of the random streams: all ranks' in each, as one rank's is written."""
        return {
            "epochs": self._epochs, "best": json.dumps(self.best), "val": json.dumps(self.val),
            "validated": self.validated, "stopped": self._stopped, "generators": gather_objects(_generators()),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.val = json.loads(state_dict["best"]), json.loads(state_dict["val"])
        self._epochs, self._generators = state_dict["epochs"], state_dict["generators"]
        self.validated, self._stopped = state_dict["validated"], state_dict["stopped"]
        self._needed = self._named()

    def _named(self) -> set[str]:
        return {entry["checkpoint"] for entry in self.best.values()}

    def _note(self, trainer: Any, rule: str, score: float, name: str) -> Path:
        path = f"checkpoints/{name}.ckpt"
        val = dict(self.val) if self.validated == trainer.global_step else {}
        self.best[rule] = {
            "score": score, "epoch": self._epochs, "step": trainer.global_step, "val": val, "checkpoint": path,
        }  # fmt: skip
        return self.folder / path

    def _keep(self, trainer: Any, rule: str, score: float) -> None:
        path = self._note(trainer, rule, score, f"{rule}-step{trainer.global_step}")
        trainer.save_checkpoint(path, weights_only=False)
        self._remove_others(trainer)

    def _remove_others(self, trainer: Any) -> None:
        wanted = self._needed | self._named()
        for path in self.last.parent.glob("*-step*.ckpt") if trainer.is_global_zero else ():
            if f"checkpoints/{path.name}" not in wanted:
                trainer.strategy.remove_checkpoint(path)

    def _save_last(self, trainer: Any) -> None:
        self._note(trainer, "last", math.nan, "last")
        self._stopped = trainer.should_stop
        draft = self.last.with_name("last.draft")  # a run killed while it writes keeps the checkpoint before
        trainer.save_checkpoint(draft, weights_only=False)
        if trainer.is_global_zero:
            draft.replace(self.last)
        trainer.strategy.barrier()
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._needed = self._named()
        self._remove_others(trainer)
        self._report(trainer)

    def _report(self, trainer: Any) -> None:
        self._reported = time.monotonic()
        total = trainer.estimated_stepping_batches
        if trainer.is_global_zero and total and math.isfinite(total):
            write_json(self.folder / PROGRESS, {"step": trainer.global_step, "steps": total})


def _generators() -> dict[str, Any]:
    """The states of this process's generators; of CUDA's, that of the device in use."""
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(), "python": json.dumps(random.getstate()),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_generators(states: list[dict[str, Any]], rank: int) -> None:
    state = states[rank % len(states)]
    torch.set_rng_state(state["torch"])
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if rank >= len(states):  # there is none of its own, and another rank has this one
        seed = (int(torch.randint(2**32, ())) + rank) % 2**32
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
