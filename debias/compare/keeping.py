"""The callback that keeps a checkpoint for each selection rule, and lets a killed run go on."""

from __future__ import annotations

import json
import math
import random
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from debias.compare.records import PROGRESS, Candidate, measures, shift_score, worst_of, write_json
from debias.compare.schema import is_checkpoint
from debias.errors import DebiasError, unwritable
from debias.ops.distributed import gather_objects, global_rank

__all__ = ["Keeper", "begin_again", "check_checkpoint", "validation_metrics"]


def validation_metrics(trainer: Any) -> dict[str, float]:
    """What the validation that has just ended logged, by name."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}


class Keeper(Checkpoint):
    """Keep the best checkpoint by each rule that reads the validation set, and the last one.

    Files are ``checkpoints/<rule>-step<N>.ckpt`` and ``checkpoints/last.ckpt`` in the run's folder. The last one is
    written at the end of an epoch when ``every`` seconds have passed since (where a training loader keeps its own
    position, at the last step before its last batch: at the end Lightning and torchdata would repeat the epoch's
    order, and within it they do not); with it, a run that was killed goes on as
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
        self._loaders: list[Any] = []
        self._orders: list[Any] = []  # states of the generators that loaders have of their own
        self._stateful = False  # whether the training loaders keep their positions
        self._within = False  # whether the last checkpoint is of within an epoch
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
        for rule, score in self.scores(self.val).items():
            sign = 1 if self.direction == "max" or rule == "val_shift" else -1
            known = self.best.get(rule)
            if known is None or sign * score > sign * known["score"]:
                self._keep(trainer, rule, score)

    def scores(self, val: dict[str, float]) -> dict[str, float]:
        """The score of a validation by each rule that it serves, from what it logged."""
        found = measures(val, "val", self.direction)
        scores = {"val_average": found.average, "val_worst_group": found.worst, "val_shift": shift_score(val)}
        scores |= {f"val_worst_{name}": worst_of(val, name) for name in ("class", "inferred")}
        return {rule: score for rule, score in scores.items() if not math.isnan(score)}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """After a resume: see that what it refers to is whole, and take up the random streams where they were.

        Not at the start of the epoch: the iterator of its batches, which draws, is made before that. Within an epoch
        it had been made before the run was saved, so its draws now are too many.
        """
        if self._generators is not None:
            for name in sorted(self._needed - {"checkpoints/last.ckpt"}):
                check_checkpoint(self.folder / name, begin_again(self.last))
            if not self._within:
                self._take_up()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """After a resume: a run that was stopped early before it was killed trains no further."""
        self._loaders = _loaders(trainer.train_dataloader)
        self._stateful = all(hasattr(loader, "load_state_dict") for loader in self._loaders)
        self._take_up()
        if self._stopped:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say how far the run is, about once a second; write the last checkpoint where the loader asks for it here."""
        if time.monotonic() - self._reported > 1:
            self._report(trainer)
        if batch_idx + 1 == self._last_step_within(trainer):
            self._save_if_due(trainer, within=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count."""
        self._epochs = trainer.current_epoch + 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the last checkpoint, unless that was just done."""
        if not self._last_step_within(trainer):
            self._save_if_due(trainer)

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

    def _last_step_within(self, trainer: Any) -> int:
        """Batches of an epoch until the last optimiser step that is not of its last batch, for loaders with a state; 0
        where there is none.
        """
        batches = trainer.num_training_batches
        if not self._stateful or math.isinf(batches):
            return 0
        return (int(batches) - 1) // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches

    def _save_if_due(self, trainer: Any, within: bool = False) -> None:
        due = time.monotonic() - self._saved_at >= self.every
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # ranks' clocks differ; saving takes all of them
            self._save_last(trainer, within)

    def _take_up(self) -> None:
        if self._generators is not None:
            _restore_generators(self._generators, global_rank())
            for loader, state in zip(self._loaders, self._orders, strict=False):
                if state is not None:  # torchdata restores the order of the epoch, and not what the next one's is from
                    loader.generator.set_state(state)
            self._generators = None

    def state_dict(self) -> dict[str, Any]:
        """Scores, last metrics and the states of the random streams: all ranks' in each, as one rank's is written."""
        return {
            "epochs": self._epochs, "best": json.dumps(self.best), "val": json.dumps(self.val),
            "validated": self.validated, "stopped": self._stopped, "within": self._within,
            "generators": gather_objects(_generators()), "orders": [_order(x) for x in self._loaders],
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            DebiasError: it names a checkpoint that is not one of this folder.
        """
        best, self.val = json.loads(state_dict["best"]), json.loads(state_dict["val"])
        for rule, entry in best.items():
            if not is_checkpoint(entry["checkpoint"]):
                raise DebiasError(
                    f"Expected {self.last} to name checkpoints in its own folder, but for `{rule}` it names"
                    f" {entry['checkpoint']!r}. Nothing was changed. {begin_again(self.last)}"
                )
        self.best = best
        self._epochs, self._generators = state_dict["epochs"], state_dict["generators"]
        self.validated, self._stopped = state_dict["validated"], state_dict["stopped"]
        self._within, self._orders = state_dict.get("within", False), state_dict.get("orders", [])
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
        self._save(trainer, self._note(trainer, rule, score, f"{rule}-step{trainer.global_step}"))
        self._remove_others(trainer)

    def _save(self, trainer: Any, path: Path) -> None:
        """Whole or not at all: a run killed while it writes keeps the checkpoint before."""
        draft = path.with_name("draft")
        try:
            trainer.save_checkpoint(draft, weights_only=False)
            if trainer.is_global_zero:
                draft.replace(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise unwritable(path, error) from error
        trainer.strategy.barrier()

    def _remove_others(self, trainer: Any) -> None:
        wanted = self._needed | self._named()
        for path in self.last.parent.glob("*-step*.ckpt") if trainer.is_global_zero else ():
            if f"checkpoints/{path.name}" not in wanted:
                trainer.strategy.remove_checkpoint(path)

    def _save_last(self, trainer: Any, within: bool = False) -> None:
        self._note(trainer, "last", math.nan, "last")
        self._stopped, self._within = trainer.should_stop, within
        self._save(trainer, self.last)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._needed = self._named()
        self._remove_others(trainer)
        self._report(trainer)

    def _report(self, trainer: Any) -> None:
        self._reported = time.monotonic()
        total = trainer.estimated_stepping_batches
        if trainer.is_global_zero and total and math.isfinite(total):
            with suppress(DebiasError):  # only shown; what has to be written says so itself
                write_json(self.folder / PROGRESS, {"step": trainer.global_step, "steps": total})


def check_checkpoint(path: Path, remedy: str) -> None:
    """Refuse a checkpoint that is damaged or holds more than tensors and plain values, before it is loaded.

    Args:
        path: of the checkpoint; a folder, as sharded strategies write it, is left to what loads it.
        remedy: what to do about it, a sentence.

    Raises:
        DebiasError: it is not there, damaged, or holds objects of other classes, which loading would run code of.
    """
    if path.is_dir():
        return
    try:
        mapped = zipfile.is_zipfile(path)
        if mapped:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} in it is damaged")
        torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of any kind, as the file may hold anything
        reason = " ".join(str(error).split())[:300]
        raise DebiasError(
            f"Expected {path} to be a checkpoint of tensors and plain values, as runs write it, but it cannot be read"
            f" ({type(error).__name__}: {reason}). Nothing was changed. {remedy} A class that your own module"
            " saves there is allowed by `torch.serialization.add_safe_globals` in that module."
        ) from error


def begin_again(delete: Path) -> str:
    """What to do about a run that cannot go on."""
    return f"Delete {delete}, and the run begins again."


def _loaders(loaders: Any) -> list[Any]:
    return (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened


def _order(loader: Any) -> Tensor | None:
    generator = getattr(loader, "generator", None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


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
