"""``debias.audit(model, loaders)``: what the model predicts is collected, then audited."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from debias.audit.collect import HEAD, Collector, in_order
from debias.audit.detection import map_table
from debias.audit.features import erasure_table, probe_table
from debias.audit.pictures import shown
from debias.audit.reading import SCORES
from debias.audit.report import Report
from debias.audit.run import Settings, examine
from debias.audit.samples import TASKS, Samples
from debias.errors import DebiasError
from debias.ops.arguments import check_choice, checked
from debias.step.batch import BatchKey
from debias.tap.calls import LossCall

__all__ = ["audit", "collect", "own_steps", "quiet"]

Array = np.ndarray[Any, Any]
_CLASSES = ("cross_entropy", "nll_loss", "multi_margin_loss", "LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy")
_BINARY = ("binary_cross_entropy_with_logits", "binary_cross_entropy")
_REAL = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "poisson_nll_loss")


@checked(first=True)
def audit(
    model: nn.Module,
    loaders: Any,
    *,
    metadata: pd.DataFrame | Mapping[str, pd.DataFrame] | None = None,
    layers: Sequence[str] = (),
    target: BatchKey | None = None,
    logits: str | Callable[[Any], Tensor] | None = None,
    loss: int | Callable[[LossCall], bool] | None = None,
    task: str | None = None,
    scores: str | None = None,
    classes: Sequence[str] | None = None,
    positive: str | None = None,
    ckpt_path: str | Path | None = None,
    trainer: Any = None,
    title: str = "Audit",
    progress: bool = True,
    **settings: Any,
) -> Report:
    """Audit a model: whom does it hurt, does it use a shortcut, what do its features hold?

    The module's own ``test_step`` runs, or where it has none ``validation_step``, or else ``forward`` of the first part
    of each batch. Logits and targets are read as :class:`debias.GroupMonitor` reads them; nothing is changed.

    Args:
        model: a LightningModule, or any module that maps the first part of a batch to logits.
        loaders: a loader, or those of ``"train"`` and ``"test"``; a datamodule's are taken from it. Samples are seen
            once and in the order of the dataset, whatever the loader's own order is.
        metadata: one row for each sample of the test set, in its order; or a table for each set. Tags of the samples
            are columns, too.
        layers: dotted paths of modules, from early to late, whose outputs are features besides the input of the head.
        target: where the target is in a batch; by default what the loss is computed from.
        logits: see :class:`debias.GroupMonitor`.
        loss: likewise.
        task: where no loss says it: ``"classification"``, ``"multilabel"`` or ``"regression"``.
        scores: where no loss says it: whether the model returns ``"logits"`` or ``"probabilities"``, for one score a
            sample or a label.
        classes: names of the classes or labels.
        positive: the positive class of two; the last by default.
        ckpt_path: a checkpoint of a LightningModule to load first.
        trainer: a Trainer to evaluate with, e.g. of several ranks: then every rank returns the report.
        title: of the page.
        progress: show bars.
        **settings: those of :class:`debias.audit.run.Settings`.

    Raises:
        DebiasError: metadata do not fit the loader, or nothing says what is predicted.
    """
    how = Settings(**settings)
    for name, value, choices in (("task", task, TASKS), ("scores", scores, SCORES)):
        if value is not None:
            check_choice(name, value, choices)
    sets = _sets(loaders)
    tables = dict(metadata) if isinstance(metadata, Mapping) else {} if metadata is None else {"test": metadata}
    if unknown := [name for name in tables if name not in sets]:
        raise DebiasError(f"Expected `metadata` of the sets {list(sets)}, but got {unknown}.")
    for name, table in tables.items():
        n = len(sets[name].dataset)
        if len(table) != n:
            raise DebiasError(
                f"Expected `metadata` to have a row for each of the {n} samples of the {name} loader, in the order of"
                f" its dataset, but got {len(table)}. Join it to the samples first."
            )
    options = {
        "logits": logits, "target": target, "loss": loss, "task": task, "scores": scores, "positive": positive,
        "ckpt_path": ckpt_path, "trainer": trainer, "progress": progress,
    }  # fmt: skip
    samples, test = _collected(
        model, sets["test"], metadata=tables.get("test"), layers=layers, classes=classes, **options
    )
    train = None
    if "train" in sets:
        known = samples.classes or None  # regression and detection have none
        own, _ = _collected(
            model, sets["train"], metadata=tables.get("train"), features=False, classes=known, **options
        )
        samples.train_target, train = own.target, own.metadata
    more: list[Any] = []
    if boxes := test.collected.get("boxes"):
        drawn_boxes: dict[str, Any] = {
            "confidence": how.confidence,
            "resamples": how.resamples,
            "seed": how.seed,
        }
        more.append(("map", lambda s, t: map_table(s, boxes, **drawn_boxes)))
    if samples.features:
        drawn = {"seed": how.seed}
        more.append(("probes", lambda s, t: probe_table(s, confidence=how.confidence, **drawn)))
        if samples.task == "classification" and test.found_head is not None and HEAD in samples.features:
            head = _numpy(test.found_head)
            more.append(("erasure", lambda s, t: erasure_table(s, head, HEAD, **drawn)))
    return examine(samples, how, train, title=title, progress=progress, more=more)


def collect(model: nn.Module, loader: Any, **options: Any) -> Samples:
    """Predictions, metadata and features of the samples of one loader; options are those of :func:`audit`."""
    return _collected(model, in_order(loader), **options)[0]


def _collected(
    model: nn.Module, loader: Any, *, metadata: pd.DataFrame | None = None, layers: Sequence[str] = (),
    features: bool = True, target: Any = None, logits: Any = None, loss: Any = None, task: str | None = None,
    scores: str | None = None, classes: Sequence[str] | None = None, positive: str | None = None,
    ckpt_path: Any = None, trainer: Any = None, progress: bool = True,
) -> tuple[Samples, Collector]:  # fmt: skip
    inside = "" if own_steps(model) else "network."  # of the module around one without steps
    paths = [f"{inside}{path}" for path in layers]
    where = {"logits": logits, "target": target, "loss": loss}
    collector = Collector(len(loader.dataset), layers=paths, features=features, **where)
    _evaluate(model, loader, collector, trainer, ckpt_path, progress)
    samples, kept = _samples(collector, task, scores, classes, positive)
    samples.metadata = _metadata(collector, metadata, kept)
    samples.features = {name.removeprefix(inside): rows[kept] for name, rows in collector.named("features").items()}
    numbers = np.flatnonzero(kept)
    samples.shown = lambda row: shown(loader.dataset, int(numbers[row]))
    return samples, collector


def _sets(loaders: Any) -> dict[str, Any]:
    if hasattr(loaders, "test_dataloader"):
        loaders.prepare_data()
        for stage in ("fit", "test"):
            loaders.setup(stage)
        loaders = {"train": loaders.train_dataloader(), "test": loaders.test_dataloader()}
    elif not isinstance(loaders, Mapping):
        loaders = {"test": loaders}
    if "test" not in loaders or not set(loaders) <= {"train", "test"}:
        raise DebiasError(f"Expected `loaders` to hold `test`, and `train` or not, but got {list(loaders)}.")
    return {name: in_order(loader) for name, loader in loaders.items()}


class _Forward(LightningModule):
    """A module without an evaluation step of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any) -> Any:
        return self.network(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch if isinstance(batch, Tensor) else batch[0])


def _evaluate(model: Any, loader: Any, collector: Collector, trainer: Any, ckpt_path: Any, progress: bool) -> None:
    steps = own_steps(model)
    own = [cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule"]
    package = own[0].__module__.partition(".")[0] if steps else "lightning"
    options = {"verbose": False} | ({} if ckpt_path is None else {"ckpt_path": ckpt_path})
    with quiet():
        if trainer is None:
            pytorch = import_module("lightning.pytorch" if package == "lightning" else package)
            trainer = pytorch.Trainer(
                accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
                enable_progress_bar=progress,
            )  # fmt: skip
        run = trainer.validate if steps[:1] == ["validation_step"] else trainer.test
        before = list(trainer.callbacks)
        trainer.callbacks.append(collector)
        try:
            run(model if steps else _Forward(model), dataloaders=loader, **options)
        finally:
            trainer.callbacks[:] = before
    if not collector.collected:
        raise DebiasError(
            f"Expected the Trainer to evaluate in this process, but nothing was collected under"
            f" {type(trainer.strategy).__name__}. Use one device, or `strategy='ddp'`."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Which devices there are is of no interest in an audit."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def own_steps(model: Any) -> list[str]:
    """The evaluation steps that a LightningModule has of its own."""
    bases = [cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule"]
    names = ("test_step", "validation_step") if bases else ()
    return [name for name in names if getattr(type(model), name) is not getattr(bases[0], name)]


def _metadata(collector: Collector, table: pd.DataFrame | None, kept: Array) -> pd.DataFrame:
    tags = {}
    for name, values in collector.named("tag").items():
        column = pd.Series(values)
        tags[name] = column.where(column >= 0).astype("Int64") if column.dtype.kind == "i" else column
    frame = pd.DataFrame(tags, index=range(len(collector.collected["tag_index"])))
    if table is not None:
        table = table.reset_index(drop=True)
        frame = pd.concat([table, frame.drop(columns=[name for name in tags if name in table])], axis=1)
    return frame[kept].reset_index(drop=True)


def _samples(
    collector: Collector, task: str | None, scores: str | None, classes: Sequence[str] | None, positive: str | None
) -> tuple[Samples, Array]:
    """Samples without metadata, and which of the dataset they are: those that have a target."""
    rows = collector.collected
    if "accuracy" in rows:
        empty = pd.DataFrame(index=range(len(rows["accuracy"])))
        samples = Samples("detection", None, None, (), None, "detection accuracy", rows["accuracy"], True, empty)
        return samples, np.ones(len(empty), bool)
    z, y, name = rows["logits"], rows["target"], collector.loss_name
    task = task or _task(name, z, y)
    kept = np.isfinite(y.astype(float)).reshape(len(y), -1).all(1)
    if task != "regression" and not (name in _CLASSES and y.dtype.kind == "f" and y.shape == z.shape):
        kept &= (y >= 0).reshape(len(y), -1).all(1)
    z, y = z[kept], y[kept]
    if not np.isfinite(z).all():
        bad = int((~np.isfinite(z)).reshape(len(z), -1).any(1).sum())
        raise DebiasError(
            f"Expected finite predictions, but those of {bad} of {len(z)} samples are not."
            " Check the inputs and the checkpoint."
        )
    empty = pd.DataFrame(index=range(len(z)))
    if task == "regression":
        if z.size != y.size or z.size != len(z):
            raise DebiasError(f"Expected one number a sample, but got {z.shape} and targets {y.shape}.")
        y, z = (each.reshape(len(each)).astype(float) for each in (y, z))
        return Samples(task, y, z, (), None, "absolute error", np.abs(y - z), False, empty), kept
    cut = 0.5 if name == "binary_cross_entropy" or (name is None and scores == "probabilities") else 0.0
    if name is None and scores is None and (task == "multilabel" or z.ndim == 1 or z.shape[1] == 1):
        raise DebiasError(
            "Expected `scores` to say what the model returns, as no loss does. Pass `scores='logits'` or"
            " `scores='probabilities'`."
        )
    if task == "multilabel":
        names = _class_names(classes, z.shape[1])
        true, chosen = y > 0.5, z > cut
        quality = (true == chosen).mean(1)
        return Samples(task, true, chosen, names, z, "share of right labels", quality, True, empty), kept
    if y.dtype.kind == "f" and y.shape == z.shape and z.ndim == 2 and z.shape[1] > 1:
        y = y.argmax(1)  # class probabilities
    y = y.reshape(len(y)).astype(int)
    if z.ndim == 1 or z.shape[1] == 1:
        one = z.reshape(len(z)) - cut
        z = np.stack([-one, one], 1)
    if z.ndim != 2:
        raise DebiasError(f"Expected one prediction a sample, but got logits of shape {z.shape}.")
    names = _class_names(classes, z.shape[1])
    if positive is not None and positive not in names:
        raise DebiasError(f"Expected `positive` to be one of the classes {names}, but got {positive!r}.")
    chosen = z.argmax(1)
    place = names.index(positive) if positive is not None else 1
    return Samples(
        task, y, chosen, names, z, "accuracy", chosen == y, True, empty, positive=place if len(names) == 2 else -1
    ), kept


def _class_names(classes: Sequence[str] | None, n: int) -> tuple[str, ...]:
    if classes is not None and len(classes) != n:
        raise DebiasError(
            f"Expected `classes` to hold a name for each of {n} classes, but got {list(classes)}. Name them all, or"
            " leave it out."
        )
    return tuple(map(str, range(n))) if classes is None else tuple(classes)


def _task(loss: str | None, logits: Array, target: Array) -> str:
    if loss in _CLASSES:
        return "classification"
    if loss in _BINARY:
        return "classification" if logits.ndim == 1 or logits.shape[1] == 1 else "multilabel"
    if loss in _REAL:
        return "regression"
    if target.ndim == 1 and target.dtype.kind in "iub" and (logits.ndim == 2 or loss is None):
        return "classification"
    raise DebiasError(
        f"Expected `task` to say what is predicted, as {'no loss is computed' if loss is None else f'`{loss}`'} with"
        f" logits {logits.shape} and targets {target.shape} does not. Pass `task='classification'`, `'multilabel'` or"
        " `'regression'`."
    )


def _numpy(head: nn.Module) -> Any:
    """The head as a function of arrays."""
    weight = next(head.parameters())

    def apply(features: Array) -> Array:
        with torch.inference_mode():
            return head(torch.from_numpy(features).to(weight)).float().cpu().numpy()

    return apply
