"""Detection metrics by domain while validating and testing, and drawings of what was found.

Reads the predictions where the module's ``forward``, or a submodule, returns them, and the targets in the batch.
Nothing is changed and nothing is computed twice. Works alone, on a plain ERM baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias.errors import BatchKeyError, LossNotFoundError
from debias.extras import needs_extra
from debias.metrics.detection import DetectionAccuracy, GroupMeanAveragePrecision
from debias.monitors._epoch import EpochMonitor, by_group
from debias.ops.arguments import checked
from debias.ops.groups import check_n_groups, name_groups
from debias.step.batch import BatchKey, describe, key_name
from debias.step.context import Step
from debias.step.ids import check_keys, plain_key, plain_n_groups
from debias.step.indices import evaluation_sets
from debias.tap.calls import LossCall
from debias.tap.head import submodule
from debias.tap.hooks import Hook

__all__ = ["DetectionMonitor", "draw_detections", "find_predictions"]


class DetectionMonitor(EpochMonitor):
    """Log mean average precision and detection accuracy overall, by domain and for the worst domain.

    Logged at the end of every validation and test epoch, ready for ``ModelCheckpoint(monitor=...)``::

        val/map, val/map_50                    all images
        val/worst_domain_map                   the worst domain that has boxes; also _map_50
        val/average_domain_map                 mean over domains
        val/map_by_domain/<name>               NaN for a domain without boxes; also map_50
        val/map_difference                     best minus worst domain
        val/detection_accuracy                 mean over images
        val/average_domain_accuracy            mean over domains: the headline of GWHD in WILDS
        val/worst_domain_detection_accuracy    the worst domain
        val/detection_accuracy_by_domain/<name>

    Of more than 100 domains the values by domain are left out.
    With several loaders every name ends in ``/dataloader_idx_<i>``. The sanity check is skipped. Give the loaders
    ``sampler=EvalSampler(dataset)``, or Lightning pads them on several ranks and counts images twice.

    Args:
        domain: where the domain ids are: a tag, an index, a name, a dotted path, a callable, or a tuple whose ids are
            crossed.
        n_domains: number of domains, one per key.
        domain_names: one name per domain.
        predictions: dotted path of the submodule whose output the predictions are, or a callable of the step's output;
            by default the output of the module's ``forward``. A list of dictionaries ``boxes``, ``scores``, ``labels``.
        targets: where the targets are in the batch: a list of dictionaries ``boxes``, ``labels``.
        images: where the images are, for drawing.
        iou_threshold: least overlap of a hit of the detection accuracy.
        score_threshold: predictions below it are left out of the detection accuracy and the drawings.
        max_detections: how many boxes of a label count in an image in mAP, those with the highest scores; COCO: 100. A
            warning says where there are more.
        draw: images of each domain to draw in every validation and test epoch; 0 for none.
        folder: where drawings go; by default ``detections`` in the Trainer's ``default_root_dir``. They also go to
            loggers of TensorBoard and W&B.
        name: prefix of several monitors' logged names.
        allow_untested_strategy: run under a strategy that was not tested.

    Raises:
        LossNotFoundError: no predictions were found.
        BatchKeyError: ids or targets are not where the argument says.
        DebiasError: pycocotools is not installed (extra ``detection``).
    """

    needs: ClassVar[tuple[str, ...]] = ("domain",)
    reference: ClassVar[str] = "mAP: COCO (torchmetrics); detection accuracy: WILDS, GWHD 2021"
    _value_names = ("map", "map_50", "detection_accuracy")

    @checked(iou_threshold="[0, 1]", score_threshold="[0, 1]", draw="[0, inf)")
    def __init__(
        self,
        domain: tuple[BatchKey, ...] | BatchKey,
        n_domains: int | tuple[int, ...],
        *,
        domain_names: list[str] | None = None,
        predictions: str | Callable[[Any], Any] | None = None,
        targets: BatchKey = 1,
        images: BatchKey = 0,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.5,
        max_detections: int = 100,
        draw: int = 0,
        folder: str | None = None,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name, allow_untested_strategy=allow_untested_strategy)
        check_keys(domain, n_domains, "domain")
        self.domain = plain_key(domain)
        self.n_domains = plain_n_groups(n_domains)
        self.total = check_n_groups(n_domains, "domain")
        self.domain_names = name_groups(n_domains, domain_names, "domain")
        self.predictions = predictions
        self.targets = targets
        self.images = images
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        self.draw = draw
        self.folder = folder
        self._metrics: list[Any] = []
        self._drawn: list[list[tuple[Tensor, Any, Any]]] = []
        self._captured: Any = None
        self._handle: Any = None
        self._make()  # what is not installed is said now, not after the first epoch

    @property
    def state_key(self) -> str:
        """Class, name and key: several monitors of one run are told apart."""
        return f"{type(self).__qualname__}({self.name or key_name(self.domain) or 'callable'})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine; watch the submodule that ``predictions`` names."""
        super().setup(trainer, pl_module, stage)
        if isinstance(self.predictions, str) and self._handle is None:
            watched = submodule(pl_module, self.predictions, argument="predictions")
            self._handle = watched.register_forward_hook(Hook(self._capture))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._captured, self._metrics, self._drawn = None, [], []
        super().teardown(trainer, pl_module, stage)

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Add one batch to the metrics of its loader."""
        ids = step.ids(self.domain, self.n_domains, argument="domain")
        found = find_predictions(self.predictions, self._captured, forward_output, output, "DetectionMonitor")
        self._captured = None
        targets = step.read(self.targets, argument="targets")
        if not _are_boxes(targets):
            raise BatchKeyError(
                f"Expected `targets={self.targets!r}` to name a list of dictionaries with `boxes` and `labels`, but got"
                f" {describe(targets)}. Correct the key."
            )
        for metric in self._metrics[step.dataloader_idx]:
            metric.update(found, targets, ids)
        if self.draw and step.trainer.is_global_zero:
            images = step.read(self.images, argument="images")
            for image, prediction, target, d in zip(images, found, targets, ids.tolist(), strict=True):
                if d >= 0 and len(self._drawn[d]) < self.draw:
                    self._drawn[d].append((image.cpu(), _to_cpu(prediction), _to_cpu(target)))

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._in_step(module):
            self._captured = output

    def _make(self) -> list[Any]:
        options = {"iou_threshold": self.iou_threshold, "score_threshold": self.score_threshold}
        precision = GroupMeanAveragePrecision(self.total, max_detections=self.max_detections)
        return [precision, DetectionAccuracy(self.total, **options)]

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        self._metrics += [self._make() for _ in loaders[len(self._metrics) :]]  # those of the last stage are used again
        for metric in (metric for metrics in self._metrics for metric in metrics):
            metric.reset()
            metric.to(pl_module.device)
        self._drawn = [[] for _ in range(self.total)]

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        used = self._metrics[: len(evaluation_sets(trainer))]
        computed = [{k: v for metric in metrics for k, v in metric.compute().items()} for metrics in used]
        named = [{key.replace("group", "domain"): value for key, value in values.items()} for values in computed]
        return [by_group(values, self.domain_names) for values in named]

    def _end(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super()._end(trainer, pl_module, stage)
        if any(self._drawn) and not trainer.sanity_checking:
            self._draw(trainer, stage)

    def _draw(self, trainer: Any, stage: str) -> None:
        grid = draw_detections(self._drawn, score_threshold=self.score_threshold)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "detections")
        folder.mkdir(parents=True, exist_ok=True)
        with needs_extra("detection"):
            from PIL import Image

        name = f"{self.name}-" if self.name else ""
        pixels = grid.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{name}{stage}-epoch={trainer.current_epoch}.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # W&B
                logger.log_image(f"{self._prefix(stage)}detections", [pixels], step=trainer.global_step)
            elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
                logger.experiment.add_image(f"{self._prefix(stage)}detections", grid, trainer.global_step)


def find_predictions(chosen: Any, captured: Any, forward_output: Any, output: Any, who: str) -> Any:
    """The predictions of an evaluation step.

    Raises:
        LossNotFoundError: there are none.
    """
    found = forward_output if chosen is None else captured if isinstance(chosen, str) else chosen(output)
    if not _are_boxes(found):
        raise LossNotFoundError(
            f"Expected the evaluation step to call the module's `forward` with a list of dictionaries with `boxes` as"
            f" output for {who}, but got {describe(found)}. Pass `predictions='dotted.path'` of the submodule that"
            " predicts, or `predictions=callable(step_output)`."
        )
    return found


def draw_detections(rows: Sequence[Sequence[tuple[Tensor, Any, Any]]], *, score_threshold: float = 0.5) -> Tensor:
    """A grid of images, a domain in each row: true boxes green, predicted ones red.

    Args:
        rows: for each row images ``(3, H, W)`` in [0, 1] with their predictions and targets; images of a grid may
            differ in size, and rows in length.
        score_threshold: predictions below it are left out.

    Returns:
        uint8 ``(3, height, width)``.
    """
    with needs_extra("detection"):
        from torchvision.utils import draw_bounding_boxes

    height = max(image.shape[1] for row in rows for image, _, _ in row)
    width = max(image.shape[2] for row in rows for image, _, _ in row)
    grid = torch.full((3, len(rows) * (height + 2), max(map(len, rows)) * (width + 2)), 255, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for c, (image, prediction, target) in enumerate(row):
            drawn = (image.clamp(0, 1) * 255).to(torch.uint8)
            kept = prediction["boxes"][prediction["scores"] > score_threshold]
            for boxes, color in ((target["boxes"], (0, 160, 0)), (kept, (220, 0, 0))):
                if len(boxes):
                    drawn = draw_bounding_boxes(drawn, boxes, colors=color)
            y, x = r * (height + 2), c * (width + 2)
            grid[:, y : y + drawn.shape[1], x : x + drawn.shape[2]] = drawn
    return grid


def _are_boxes(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(item, dict) and "boxes" in item for item in x)


def _to_cpu(item: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() for k, v in item.items() if isinstance(v, Tensor) and k in ("boxes", "scores", "labels")}
