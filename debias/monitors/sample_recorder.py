"""Write down what a network makes of every sample: a table with a row per sample, one file for each chosen epoch.

For those who want only that: dataset maps, curricula, label errors, groups inferred by code of their own. Costs a step
a few small kernels over the batch, and at the end of a chosen epoch one all-reduce of the table and one file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.arguments import check_count, check_number, checked
from debias.ops.distributed import gather
from debias.ops.group_inference import wrong_predictions
from debias.ops.samples import SampleTable
from debias.step.context import Step
from debias.step.indices import evaluation_loaders
from debias.step.samples import (
    numbered_dataset,
    predictions,
    refuse_regression,
    sample_losses,
    sample_numbers,
    train_set,
)
from debias.step.watcher import Debiaser
from debias.tap.calls import LossCall
from debias.tap.selection import select_calls

__all__ = ["SampleRecorder"]

Column = Literal["loss", "running_loss", "prediction", "correct", "logits", "features"]
PREDICTED = {"prediction", "correct", "logits"}


class SampleRecorder(Debiaser):
    """Write a table with a row for each sample: its loss, what was predicted, logits, features.

    The training set has to carry its numbers, ``tag(train)``; row i of the table is sample i. Nothing of the training
    changes. In the training pass every sample is seen by other weights, in training mode and augmented; ``on="val"``
    records the validation set in evaluation mode. Predictions and logits are those of the network, without a margin or
    a prior that the step adds for its loss.

    Args:
        path: of the file, ``.npz`` or ``.parquet``; ``{epoch}`` in it stands for the epoch. A file that is there is
            replaced.
        columns: what to record: ``"loss"``, ``"running_loss"``, ``"prediction"`` (of several labels each),
            ``"correct"``, ``"logits"``, ``"features"`` (what the head reads).
        epochs: epochs that are recorded and written, from 0 on; all by default. A running loss runs over all.
        on: ``"train"``, the training pass, or ``"val"``, the first validation loader.
        rate: share of the old value in a running loss.
        loss: which of several losses is meant.
        head: dotted path of the head, for ``"features"``.
        features: dotted path of the module whose output the features are.
        name: tells several instances apart.
        allow_untested_strategy: run under a strategy that was not tested, at your own risk.

    A file holds the columns, and ``seen``: whether the sample was seen in this epoch. Load it by
    ``numpy.load(path)["loss"]``, or by ``pandas.read_parquet(path)``, where logits are ``logits_0``, ``logits_1``, ...
    """

    stateful: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("index",)
    reference: ClassVar[str] = "per-sample statistics, e.g. Swayamdipta et al., EMNLP 2020"

    @checked()
    def __init__(
        self,
        path: str,
        columns: list[str] | None = None,
        *,
        epochs: list[int] | None = None,
        on: Literal["train", "val"] = "train",
        rate: float = 0.7,
        loss: int | Callable[[LossCall], bool] | None = None,
        head: str | None = None,
        features: str | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(
            loss=loss, head=head, features=features, name=name, allow_untested_strategy=allow_untested_strategy
        )
        known = get_args(Column)
        self.columns = ["loss", "prediction", "correct"] if columns is None else list(columns)
        if not self.columns or not set(self.columns) <= set(known):
            raise DebiasError(f"Expected `columns` to be of {', '.join(map(repr, known))}, but got {columns!r}.")
        if on not in ("train", "val"):
            raise DebiasError(f"Expected `on` to be 'train' or 'val', but got {on!r}.")
        if Path(path).suffix not in (".npz", ".parquet"):
            raise DebiasError(f"Expected `path` to end in '.npz' or '.parquet', but got {path!r}.")
        if Path(path).suffix == ".parquet":
            _pandas()
        try:
            path.format(epoch=0)
        except (AttributeError, LookupError, ValueError) as error:
            raise DebiasError(
                f"Expected `path` to hold no braces but `{{epoch}}`, but got {path!r}. Write other braces twice."
            ) from error
        self.path = path
        self.epochs = None if epochs is None else [check_count("epochs", epoch, 0) for epoch in epochs]
        if self.epochs == []:
            raise DebiasError("Expected `epochs` to hold at least one epoch, but got none. Leave it out for all.")
        self.on = on
        self.rate = check_number("rate", rate, "[0, 1)")
        self.trains = on == "train"  # type: ignore[misc]
        self.monitors = on == "val"  # type: ignore[misc]
        self.needs_features = "features" in self.columns  # type: ignore[misc]
        self._size = 0

    @property
    def penalises(self) -> bool:
        """In the training pass it looks at the loss, and adds nothing."""
        return self.on == "train"

    @property
    def reads_predictions(self) -> bool:
        """As every monitor; in the training pass, where a column holds them."""
        return super().reads_predictions or bool(PREDICTED & set(self.columns))

    def _start_afresh(self) -> None:
        """The table is about one module: another one begins with an empty one."""
        self.module = self._epoch = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the table of the training set."""
        if self.on == "train":
            self._make(len(train_set(trainer, self.state_key)), pl_module.device)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the table of the validation set."""
        if self.on == "val" and not trainer.sanity_checking:
            loader = evaluation_loaders(trainer)[0]
            self._make(len(numbered_dataset(loader.dataset, self.state_key, "validation")), pl_module.device)

    def _make(self, size: int, device: torch.device) -> None:
        if self.module is None or self.module.size != size:
            self.module = SampleTable(size)
            if self._stash is not None:
                self.module.load_state_dict(self._stash)
        self._stash = None
        self.module.to(device)

    _stash: dict[str, Any] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the table until the size of the set is known."""
        self._epoch = state_dict["epoch"]
        self._stash, self.module = state_dict.get("module"), None

    def sample_ids(self, step: Step) -> Tensor:
        """Numbers of the samples."""
        return sample_numbers(step, self.state_key)

    def begin(self, step: Step) -> None:
        """Read the numbers, so that errors come before the step."""
        if step.dataloader_idx == 0 and not step.trainer.sanity_checking:
            self.sample_ids(step)

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """Note the samples of a training step; nothing is added."""
        self._note(call, step, call.features)
        return call.num.new_zeros(())

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Note the samples of a validation step."""
        if step.dataloader_idx == 0 and not step.trainer.sanity_checking and step.stage == "validate":
            if not calls:
                raise DebiasError(
                    f"Expected the validation step to compute a loss for {self.state_key}, but got none. Compute one,"
                    " or record the training pass."
                )
            self._note(select_calls(calls, self.loss, self.state_key)[0], step, step.features)

    def _note(self, call: LossCall, step: Step, features: Any) -> None:
        table: Any = self.module
        numbers, due = self.sample_ids(step), self._due(step.epoch)
        losses, counts = sample_losses(call, len(numbers))
        values = {}
        if due and {"prediction", "correct"} & set(self.columns):
            refuse_regression(call, self.state_key, "Leave these columns out: `columns=['loss', 'logits']`.")
        if due and PREDICTED & set(self.columns):
            logits, targets = predictions(call, len(numbers), self.state_key)
            several = logits.ndim > 1 and logits.shape != targets.shape
            found = {"prediction": logits.argmax(1) if several else (logits > 0).long(), "logits": logits}
            if "correct" in self.columns:
                found["correct"] = ~wrong_predictions(logits, targets)
            values = {k: v for k, v in found.items() if k in self.columns}
        if due and "features" in self.columns:
            values["features"] = features
        if due and "loss" in self.columns:
            values["loss"] = losses
        if "running_loss" in self.columns:
            # A running value needs the last one, whichever rank has seen it: every rank notes all samples of a step.
            numbers, counts = gather(numbers), gather(counts.long()).bool()
            values = {name: gather(value) for name, value in (values | {"running_loss": losses}).items()}
            table.average("running_loss", numbers, values["running_loss"], self.rate, counts)
            del values["running_loss"]
        if values or "running_loss" in self.columns:
            stamp = (step.counter if self.on == "train" else step.epoch) + 1
            table.record(numbers, stamp, keep=counts, epoch=torch.full_like(numbers, step.epoch), **values)

    def _due(self, epoch: int) -> bool:
        return self.epochs is None or epoch in self.epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table of the training pass."""
        if self.on == "train":
            self._write(trainer)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table of the validation set."""
        if self.on == "val" and not trainer.sanity_checking:
            self._write(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Rank 0 saves for all: it has to know what the others have seen."""
        if isinstance(self.module, SampleTable):
            self.module.merge()
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _write(self, trainer: Any) -> None:
        table: Any = self.module
        if not self._due(trainer.current_epoch) or not table.columns:
            return
        table.merge()
        if not trainer.is_global_zero:
            return
        columns = {name: table[name].cpu().numpy() for name in table.columns if name != "epoch"}
        seen = (table.seen & (table["epoch"] == trainer.current_epoch)).cpu().numpy()
        path = Path(self.path.format(epoch=trainer.current_epoch))
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, {**columns, "seen": seen})


def _save(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write a table, whole or not at all."""
    part = path.with_name(f".{path.name}")
    if path.suffix == ".npz":
        with part.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]
    else:
        wide: dict[str, np.ndarray] = {}
        for name, values in columns.items():
            flat = values.reshape(len(values), -1)
            wide |= {name: values} if values.ndim == 1 else {f"{name}_{i}": flat[:, i] for i in range(flat.shape[1])}
        _pandas().DataFrame(wide).to_parquet(part)
    part.replace(path)


def _pandas() -> Any:
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise DebiasError(
            f"Expected pandas and pyarrow to be installed for a '.parquet' file, but importing them failed: {error}."
            " Run `pip install pandas pyarrow`, or write '.npz'."
        ) from error
    return pandas
