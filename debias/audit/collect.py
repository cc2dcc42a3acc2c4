"""What a model predicts, and the features it has: collected while Lightning runs the module's own evaluation step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from debias.data.samplers import EvalSampler
from debias.data.tagging import tag
from debias.errors import DebiasError
from debias.metrics.detection import detection_accuracy
from debias.monitors.detection_monitor import find_predictions
from debias.monitors.group_monitor import GroupMonitor
from debias.monitors.scored import Scored
from debias.ops.distributed import gather_objects
from debias.step.context import Step
from debias.tap.calls import LossCall
from debias.tap.head import submodule
from debias.tap.hooks import Hook

__all__ = ["HEAD", "INDEX", "Collector", "in_order"]

INDEX = "audit_index"
_BOXES = ("boxes", "scores", "labels")
HEAD = "input of the head"
_IN_ORDER_OF_LOGITS = ("index", "logits", "target", f"features {HEAD}")  # which a step may change
Array = np.ndarray[Any, Any]


def in_order(loader: Any) -> Any:
    """A loader of the same batches' samples, each once and numbered, whatever order and sampler the given one has."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise DebiasError(
            f"Expected a DataLoader over a dataset with a length, so that samples can be numbered, but got"
            f" {type(loader).__name__} over {type(getattr(loader, 'dataset', None)).__name__}. Give the dataset a"
            " `__len__` and `__getitem__`, or write predictions to a table and use `audit_predictions`."
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    dataset: Any = tag(loader.dataset, **{INDEX: range(len(loader.dataset))})  # type: ignore[arg-type]
    return DataLoader(
        dataset, batch_size=size, sampler=EvalSampler(dataset), num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
    )  # fmt: skip


class Collector(GroupMonitor):
    """Keeps logits, target, tags and features of every sample; the samples' numbers are the groups.

    How logits and target are found, and how a step that reorders its batch is followed, is GroupMonitor's.

    Args:
        n: number of samples.
        layers: dotted paths of modules whose outputs are features, pooled to one row a sample. The input of the last
            linear layer, if its output is the logits, is always kept.
        features: whether features are kept at all.
        logits: see :class:`debias.GroupMonitor`.
        target: likewise; of a detector where the list of targets is, by default the second part of the batch.
        loss: likewise.
    """

    def __init__(
        self, n: int, *, layers: Sequence[str] = (), features: bool = True, logits: Any = None, target: Any = None,
        loss: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(INDEX, n, metric=MeanMetric(), logits=logits, target=target, loss=loss, name="audit")
        self.layers = list(layers)
        self.keeps_features = features
        self.found_head: nn.Module | None = None
        self.loss_name: str | None = None
        self.collected: dict[str, Any] = {}
        self._logits: Any = None
        self._looked = False
        self._seen: dict[str, Any] = {}
        self._linears: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._hooks: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine, and watch the layers."""
        super().setup(trainer, pl_module, stage)
        if not self.keeps_features or self._hooks:
            return
        for path in self.layers:
            layer = submodule(pl_module, path, argument="layers")
            self._hooks.append(layer.register_forward_hook(Hook(_Keep(self, path))))
        for module in pl_module.modules():
            if isinstance(module, nn.Linear):
                self._hooks.append(module.register_forward_hook(Hook(self._note)))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._linears, self._seen = [], [], {}
        super().teardown(trainer, pl_module, stage)

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Keep one batch."""
        index = step.ids(INDEX, self.n_groups, argument="group")
        if not calls and isinstance(forward_output, list | tuple) and forward_output:
            self._observe_boxes(step, forward_output, output)
        else:
            super().observe(step, calls, forward_output, output)
            if self.keeps_features:
                self._features(len(index), torch.equal(self._kept.last.to(index), index))
        self._kept.add("tag_index", index)
        for name, value in step.tags.items():
            if name != INDEX and isinstance(value, Tensor) and value.ndim == 1:
                self._kept.add(f"tag {name}", value)
        self._linears, self._seen = [], {}

    def _observe_boxes(self, step: Step, forward_output: Any, output: Any) -> None:
        found = find_predictions(None, None, forward_output, output, "the audit")
        targets = step.read(1 if self.target is None else self.target, argument="target")
        for predicted, true in zip(found, targets, strict=True):
            boxes = predicted["boxes"][predicted["scores"] > 0.5]
            self._kept.add("accuracy", detection_accuracy(boxes, true["boxes"]).reshape(1))
            both = [{k: v.cpu() for k, v in each.items() if k in _BOXES} for each in (predicted, true)]
            self._kept.parts["boxes"].append(both)

    def _scored(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> Scored:
        found = super()._scored(step, calls, forward_output, output)
        self._logits, self.loss_name = found.logits, found.loss
        return found

    def _features(self, n: int, in_batch_order: bool) -> None:
        logits = self._logits
        if not self._looked:
            for module, _, made in self._linears:
                if made.numel() == logits.numel() and torch.equal(made.reshape(logits.shape).to(logits), logits):
                    self.found_head = module
            self._looked = True
        for module, given, _ in self._linears:
            if module is self.found_head and given.shape[0] == n:
                self._seen[HEAD] = given
        for name, features in self._seen.items():
            if features.shape[0] != n:
                raise DebiasError(
                    f"Expected the output of `{name}` to have a row for each of {n} samples, but got shape"
                    f" {tuple(features.shape)}. Name another layer in `layers`."
                )
            if name != HEAD and not in_batch_order:  # its rows may be in either order
                raise DebiasError(
                    f"Expected a step that keeps the order of its batch, to read the output of `{name}`, but it puts"
                    " samples elsewhere. Leave out `layers`: the input of the head can be read."
                )
            self._kept.add(f"features {name}", _pooled(features).float())

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_step(module) and (not self._looked or module is self.found_head) and args[0].ndim == 2:
            self._linears.append((module, args[0].detach(), output.detach()))

    def _make(self) -> list[Any]:
        self._kept = _Rows()
        return [self._kept]

    def _end(self, trainer: Any, pl_module: Any, stage: str) -> None:
        own = {
            name: np.concatenate(parts) if isinstance(parts[0], np.ndarray) else parts
            for name, parts in self._kept.parts.items()
        }
        parts = [each for each in gather_objects(own) if each]
        joined = {
            name: np.concatenate([part[name] for part in parts]) if isinstance(first, np.ndarray)
            else [row for part in parts for row in part[name]]
            for name, first in (parts[0] if parts else {}).items()
        }  # fmt: skip
        self.collected = _sorted(joined)
        self._kept = _Rows()

    def named(self, kind: str) -> dict[str, Array]:
        """What was collected of a kind, ``"tag"`` or ``"features"``, by name."""
        return {n.removeprefix(f"{kind} "): rows for n, rows in self.collected.items() if n.startswith(f"{kind} ")}


class _Rows:
    """Rows of the batches so far, by name; in the place of a metric."""

    higher_is_better = True
    name = "rows"

    def __init__(self) -> None:
        self.parts: dict[str, list[Any]] = defaultdict(list)
        self.last = torch.zeros(0)

    def add(self, name: str, value: Tensor) -> None:
        """Keep some rows."""
        self.parts[name].append(value.detach().cpu().numpy())

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Keep what was predicted for the samples of these numbers."""
        for name, value in (("index", index), ("logits", logits.float()), ("target", target)):
            self.add(name, value)
        self.last = index

    def reset(self) -> None:
        """Forget the rows."""
        self.parts.clear()

    def to(self, device: Any) -> _Rows:
        """Stay where it is: rows are on the CPU."""
        return self


class _Keep:
    """Keeps the output of a layer; not a closure, which could not be pickled."""

    def __init__(self, collector: Collector, path: str) -> None:
        self.collector, self.path = collector, path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if self.collector._in_step(module) and isinstance(output, Tensor):
            self.collector._seen[self.path] = output.detach()


def _pooled(x: Tensor) -> Tensor:
    """One row a sample: channels of a map ``(N, C, H, W)``, the mean token of ``(N, T, D)``, else all numbers."""
    if x.ndim >= 4:
        return x.flatten(2).mean(2)
    return x.mean(1) if x.ndim == 3 else x.reshape(len(x), -1)


def _sorted(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in the order of the dataset."""
    found: dict[str, Any] = {}
    for name, values in rows.items():
        key = "index" if name in _IN_ORDER_OF_LOGITS else "tag_index"
        order = np.argsort(rows[key], kind="stable")
        found[name] = values[order] if isinstance(values, np.ndarray) else [values[i] for i in order]
    return found
