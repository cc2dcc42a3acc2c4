"""Accuracy under crafted distribution shifts while validating and testing: selection without target data.

Crafting Distribution Shifts for Validation and Training in Single Source Domain Generalization, WACV 2025,
arXiv 2409.19774, sec. 3. The ten families of shifts and what differs from the authors' code: ``debias.ops.shifts``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias.errors import BatchKeyError, LossNotFoundError
from debias.metrics import GroupAccuracy
from debias.monitors._epoch import EpochMonitor
from debias.ops.arguments import checked
from debias.ops.distributed import global_sum
from debias.ops.shifts import UnitImages, check_targets, crafted_shift, families_of, held_out_mean, sample_keys
from debias.step.batch import BatchKey, describe, replace
from debias.step.context import Step
from debias.step.indices import evaluation_loaders, evaluation_order
from debias.tap.calls import LossCall
from debias.tap.head import submodule

__all__ = ["ShiftedValidation"]

ORIGINAL = "original"


class ShiftedValidation(EpochMonitor):
    """Log the accuracy on crafted distribution shifts of the validation set, one for each family of shifts.

    Logged at the end of every validation epoch (``test_shift/...`` when testing), ready for
    ``ModelCheckpoint(monitor="val_shift/mean", mode="max")``::

        val_shift/<family>          ten families: arithmetic, artistic, blur, colour, contrast, convolutional, edges,
                                    geometric, segmentation, weather
        val_shift/mean              mean over the families
        val_shift/held_out_mean     mean over those that no `CraftedShifts` in the same list trains on; left out
                                    where it trains on all of them
        val_shift/original          the images as they are

    With several loaders every name ends in ``/dataloader_idx_<i>``. Nothing is logged in the sanity check.

    Every image is shifted by its own draw, a function of (seed, family, index in its dataset): the same in all
    epochs, batch sizes, ranks and world sizes. Images are made on the device, and go through the module's ``forward``
    in evaluation and inference mode, once for each family; ``validation_step`` is not run again, training flags and
    the state of torch's generators are put back. A ``forward`` that logs or counts does so for these images, too.

    On several ranks the sums are exact; give the loader ``sampler=EvalSampler(dataset)``, or Lightning pads it and
    counts samples twice. The cost is that of ``1 + len(families)`` forward passes, and of making the images.

    Args:
        families: which: ``"all"``, the fold ``"first"`` or ``"second"``, or names.
        input: where the images are in a batch: floating point ``(N, C, H, W)`` with C 1 or 3, or bytes in [0, 255].
        target: where the targets are, int64 ``(N,)``; ones of pixels without the family ``"geometric"`` only.
        logits: how logits are computed: by default the module's ``forward`` of the images; or the dotted path of a
            submodule that maps images to logits; or a callable of the module and the batch with shifted images.
        mean: mean of the images' normalisation, a number or one a channel; it is undone, and done again.
        std: its standard deviation; without both, images must lie in [0, 1].
        index: where the sample's index is, if the loader's order is not fixed: a tag, for instance.
        threshold: for binary and multi-label outputs: a logit above it is a positive.
        ignore_index: a target that is not scored, beside negative ones.
        seed: another one gives other shifts.
        name: prefix of several monitors' logged names.
        allow_untested_strategy: run under a strategy that was not tested.

    Raises:
        DebiasError: images leave [0, 1] (in one process in the batch itself, on several ranks at the end of the epoch,
            on all of them together) or have another shape; kornia (extra ``augment``) is not installed; targets lie at
            the pixels of the images, ``(..., H, W)``, which the family ``"geometric"`` moves.
        BatchKeyError: images, targets or index are not where the argument says, or the loader shuffles.
        LossNotFoundError: the module has no ``forward``, or what it returns are not logits.

    Example:
        >>> from debias import ShiftedValidation
        >>> monitor = ShiftedValidation(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        >>> len(monitor.families)
        10
    """

    reference: ClassVar[str] = "Efthymiadis et al., WACV 2025, arXiv 2409.19774"
    _value_names = ("mean", ORIGINAL)

    @checked()
    def __init__(
        self,
        *,
        families: str | list[str] = "all",
        input: BatchKey = 0,
        target: BatchKey = 1,
        logits: str | Callable[[Any, Any], Tensor] | None = None,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        index: BatchKey | None = None,
        threshold: float = 0.0,
        ignore_index: int | None = None,
        seed: int = 0,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name, allow_untested_strategy=allow_untested_strategy)
        self.families = families_of(families)
        self.input = input
        self.target = target
        self.logits = logits
        self.index = index
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.seed = seed
        self._unit = UnitImages(mean, std)
        self._metrics: list[GroupAccuracy] = []
        self._orders: list[Tensor | None] = []
        self._outside: Tensor | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine, unless there is no way to logits."""
        if isinstance(self.logits, str):
            submodule(pl_module, self.logits, argument="logits")
        elif self.logits is None and type(pl_module).forward.__qualname__ == "LightningModule.forward":
            raise LossNotFoundError(
                f"Expected {type(pl_module).__name__} to define `forward(images)`, but it does not. Pass"
                " `logits='dotted.path'` of the submodule that maps images to logits, or"
                " `logits=callable(module, batch)`."
            )
        super().setup(trainer, pl_module, stage)

    def _prefix(self, stage: str) -> str:
        return f"{stage}_shift/{self.name}/" if self.name else f"{stage}_shift/"

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the run."""
        self._metrics, self._orders, self._outside = [], [], None
        super().teardown(trainer, pl_module, stage)

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Shift one batch in every way, and count what the module gets right."""
        images, target = self._tensor(step, self.input, "input"), self._tensor(step, self.target, "target")
        indices = self._indices(step, images.shape[0])
        unit = self._unit.open(images)
        check_targets(images, target, self.families)
        self._check_range(unit, step)
        metric = self._metrics[step.dataloader_idx]
        with _evaluating(step.module):
            for i, family in enumerate((ORIGINAL, *self.families)):
                shifted = images
                if family != ORIGINAL:
                    made = crafted_shift(unit, family, sample_keys(indices, family, seed=self.seed))
                    shifted = self._unit.close(made, images)
                groups = torch.full((images.shape[0],), i, device=target.device)
                metric.update(self._predicted(step, shifted), target, groups)

    def _predicted(self, step: Step, images: Tensor) -> Tensor:
        if callable(self.logits):
            logits = self.logits(step.module, replace(step.batch, self.input, images))
        else:
            network = step.module if self.logits is None else step.module.get_submodule(self.logits)
            logits = network(images)
        if not isinstance(logits, Tensor):
            raise LossNotFoundError(
                f"Expected logits as a tensor, but got {describe(logits)}. Pass `logits='dotted.path'` of the submodule"
                " that maps images to logits, or `logits=callable(module, batch)`."
            )
        return logits

    def _tensor(self, step: Step, key: BatchKey, argument: str) -> Tensor:
        value = step.read(key, argument=argument)
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise BatchKeyError(
                f"Expected `{argument}={key!r}` to name a tensor with one row per sample, but got {describe(value)}."
                " Correct the key."
            )
        return value

    def _indices(self, step: Step, n: int) -> Tensor:
        """Which samples of the dataset these are, int64 ``(N,)`` on the CPU."""
        if self.index is not None:
            return self._tensor(step, self.index, "index").reshape(-1).long().cpu()
        order, loader = self._orders[step.dataloader_idx], evaluation_loaders(step.trainer)[step.dataloader_idx]
        if order is None:
            order = self._orders[step.dataloader_idx] = evaluation_order(loader)
        start = step.batch_idx * loader.batch_size
        found = order[start : start + loader.batch_size]
        if len(found) != n:
            raise BatchKeyError(
                f"Expected batch {step.batch_idx} to hold the {len(found)} samples that its loader drew, but got {n}"
                " images. Tag the samples, `tag(dataset, index=range(len(dataset)))`, and pass `index='index'`."
            )
        return found

    def _check_range(self, unit: Tensor, step: Step) -> None:
        count = self._unit.outside(unit)
        if step.trainer.world_size == 1 and count:
            raise self._unit.error(int(count), unit, f"{step.stage} batch {step.batch_idx} to hold")
        # A rank that raised alone would leave the others waiting.
        bounds = torch.stack([count.float(), -unit.amin().float(), unit.amax().float()])
        seen = bounds if self._outside is None else self._outside
        total = bounds[:1] if self._outside is None else seen[:1] + bounds[:1]
        self._outside = torch.cat([total, torch.maximum(seen[1:], bounds[1:])])

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        names = (ORIGINAL, *self.families)
        options: dict[str, Any] = {"threshold": self.threshold, "ignore_index": self.ignore_index}
        self._metrics = [GroupAccuracy(len(names), group_names=names, **options).to(pl_module.device) for _ in loaders]
        self._orders = [None] * len(loaders)
        self._outside = None

    def _end(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1:  # in the sanity check, too
            self._raise_together(pl_module)
        super()._end(trainer, pl_module, stage)

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        trained_on = [family for callback in trainer.callbacks for family in getattr(callback, "shift_families", ())]
        tables = []
        for metric in self._metrics:
            accuracies = dict(zip(metric.group_names, metric.compute()["accuracy_by_group"].unbind(), strict=True))
            families = {family: accuracies[family] for family in self.families}
            values = accuracies | {"mean": torch.stack([*families.values()]).mean()}
            if set(families) - set(trained_on):
                values["held_out_mean"] = held_out_mean(families, trained_on)
            tables.append(values)
        return tables

    def _raise_together(self, pl_module: Any) -> None:
        bounds = torch.zeros(3, device=pl_module.device) if self._outside is None else self._outside
        if count := int(global_sum(bounds[0].clone())):
            raise self._unit.error(count, torch.stack([-bounds[1], bounds[2]]), "all ranks to hold")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation and inference mode; flags and generators are put back."""
    flags = [(m, m.training) for m in module.modules()]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        for m, _ in flags:
            m.training = False  # and not `eval()`, which a user's module may have overridden
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            yield
    finally:
        for m, flag in flags:
            m.training = flag
