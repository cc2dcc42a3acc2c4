"""Detection by domain: mean average precision, and the detection accuracy of WILDS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from debias.errors import BadRowsError, DebiasError
from debias.extras import needs_extra
from debias.metrics.group import group_difference, worst_group
from debias.metrics.ranks import RankMetric
from debias.ops.arguments import check_count, checked
from debias.ops.distributed import gather_objects

__all__ = ["DetectionAccuracy", "GroupMeanAveragePrecision", "detection_accuracy"]


@checked("predicted: any p 4, true: any t 4", iou_threshold="[0, 1]")
def detection_accuracy(predicted: Tensor, true: Tensor, *, iou_threshold: float = 0.5) -> Tensor:
    """Accuracy of an image's boxes: hits over hits, false alarms and misses.

    A predicted box belongs to the true box it overlaps most, if by at least ``iou_threshold``; of several predictions
    of one true box one is a hit, the others are false alarms. An image without any box, true or predicted, has
    accuracy 1.
    This is the ``DetectionAccuracy`` of WILDS (Koh et al., ICML 2021), the metric of GWHD 2021 (David et al., 2021).

    Args:
        predicted: x1, y1, x2, y2, ``(p, 4)``.
        true: the same, ``(t, 4)``.
        iou_threshold: least overlap.

    Returns:
        Scalar in [0, 1], float64.

    Example:
        >>> import torch
        >>> from debias.metrics import detection_accuracy
        >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> detection_accuracy(torch.cat([box, box + 1]), box)
        tensor(0.5000, dtype=torch.float64)
    """
    p, t = len(predicted), len(true)
    if not p or not t:
        return torch.tensor(float(p == t), dtype=torch.float64, device=predicted.device)
    with needs_extra("detection"):
        from torchvision.ops import box_iou

    overlap, best = box_iou(true, predicted).max(0)
    found = (overlap >= iou_threshold).float()
    hit = found.new_zeros(t).scatter_reduce(0, best, found, "amax")
    hits = hit.sum().double()
    return hits / (p + t - hits)


class DetectionAccuracy(RankMetric):
    """Detection accuracy by domain and its mean over domains, the headline of GWHD in WILDS.

    States are sums of a fixed size, so results are the same however images are spread over batches and ranks.

    ``update(preds, target, groups)`` takes lists of dictionaries with ``boxes``, in predictions also ``scores``, and
    ids ``(N,)``, negative = in no domain. ``compute()`` returns float64 ``detection_accuracy`` (mean over images),
    ``average_domain_accuracy``, ``worst_group_detection_accuracy`` and ``detection_accuracy_by_group`` ``(n_groups,)``
    with NaN for a domain without images.

    Args:
        n_groups: number of domains.
        iou_threshold: least overlap of a hit; WILDS: 0.5.
        score_threshold: predictions below it are left out; WILDS: 0.5.
        **kwargs: see ``torchmetrics.Metric``.

    Raises:
        BadRowsError: an id is not below ``n_groups``.
        DebiasError: the numbers of predictions, targets and ids differ.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    sums: Tensor
    counts: Tensor

    @checked(iou_threshold="[0, 1]", score_threshold="[0, 1]")
    def __init__(
        self, n_groups: int, *, iou_threshold: float = 0.5, score_threshold: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.n_groups = n_groups
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        # The last place is for images of no domain, which count in the average over images only.
        self.add_state("sums", torch.zeros(n_groups + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(n_groups + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Sequence[dict[str, Tensor]], target: Sequence[dict[str, Tensor]], groups: Tensor) -> None:
        """Count a batch."""
        ids = checked_ids(preds, target, groups, self.n_groups)
        for prediction, truth, group in zip(preds, target, ids, strict=True):
            boxes = prediction["boxes"][prediction["scores"] > self.score_threshold]
            value = detection_accuracy(boxes, truth["boxes"], iou_threshold=self.iou_threshold)
            self.sums[group] += value.to(self.sums.device)
            self.counts[group] += 1

    def compute(self) -> dict[str, Tensor]:
        """The accuracies; see the docstring of the class."""
        by_group = (self.sums / self.counts)[:-1]
        return {
            "detection_accuracy": self.sums.sum() / self.counts.sum(),
            "average_domain_accuracy": by_group.nanmean(),
            "worst_group_detection_accuracy": worst_group(by_group),
            "detection_accuracy_by_group": by_group,
        }


class GroupMeanAveragePrecision(RankMetric):
    """torchmetrics' mean average precision over all images, by domain, and of the worst domain.

    ``update(preds, target, groups)`` takes torchmetrics' lists of dictionaries and ids ``(N,)``, negative = no domain.
    ``compute()`` returns ``map`` and ``map_50`` over all images, ``map_by_group`` and ``map_50_by_group``
    ``(n_groups,)`` with NaN for a domain without true boxes, ``worst_group_map``, ``worst_group_map_50``,
    ``average_domain_map`` and ``map_difference``.

    Average precision is no sum over images: all boxes are kept, and gathered from all ranks. Where several predictions
    have exactly the same score, it depends on the order of the images, as torchmetrics' does.

    Of an image the ``max_detections`` boxes of each label with the highest scores count, as in COCO. A warning says,
    once, in how many images there are more.

    Args:
        n_groups: number of domains.
        max_detections: how many boxes of a label count in an image; COCO: 100.
        **kwargs: of ``torchmetrics.detection.MeanAveragePrecision``, such as ``iou_thresholds`` or ``backend``.

    Raises:
        BadRowsError: an id is not below ``n_groups``.
        DebiasError: the numbers differ, or pycocotools is not installed (extra ``detection``).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    @checked()
    def __init__(self, n_groups: int, *, max_detections: int = 100, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=False)
        self.n_groups = n_groups
        self.max_detections = check_count("max_detections", max_detections)
        self.options = kwargs
        self._said_more = False
        self._images: list[tuple[dict[str, Tensor], dict[str, Tensor], int]] = []
        self._alone([])  # what is not installed is said now

    def update(self, preds: Sequence[dict[str, Tensor]], target: Sequence[dict[str, Tensor]], groups: Tensor) -> None:
        """Keep the boxes of a batch."""
        ids = checked_ids(preds, target, groups, self.n_groups)
        for prediction, truth, group in zip(preds, target, ids, strict=True):
            kept = _to_cpu(prediction, ("boxes", "scores", "labels")), _to_cpu(truth, ("boxes", "labels"))
            self._images.append((*kept, group))

    def compute(self) -> dict[str, Tensor]:
        """The precisions; see the docstring of the class."""
        images = self._images
        # Not through torchmetrics' own states, which need as many images on every rank.
        images = [image for part in gather_objects(images) for image in part]
        self._say_more(images)
        found = [self._alone([i for i in images if i[2] == group]) for group in range(self.n_groups)]
        found.append(self._alone(images))
        values: dict[str, Tensor] = {}
        for name in ("map", "map_50"):
            every = torch.tensor([f[name] for f in found], dtype=torch.float64)
            # torchmetrics has -1 where there is nothing to find, and where a threshold was not asked for.
            every = torch.where(every < 0, torch.nan, every)
            values |= {
                name: every[-1],
                f"{name}_by_group": every[:-1],
                f"worst_group_{name}": worst_group(every[:-1]),
            }
        values["average_domain_map"] = values["map_by_group"].nanmean()
        values["map_difference"] = group_difference(values["map_by_group"])
        return values

    def reset(self) -> None:
        """Forget all boxes."""
        super().reset()
        self._images = []

    def _alone(self, images: Sequence[tuple[dict[str, Tensor], dict[str, Tensor], int]]) -> dict[str, float]:
        """Torchmetrics' values for some of the images."""
        with needs_extra("detection"):
            from torchmetrics.detection import MeanAveragePrecision

            limits = [min(1, self.max_detections), min(10, self.max_detections), self.max_detections]
            options = {"max_detection_thresholds": limits, "extended_summary": True, **self.options}
            metric = MeanAveragePrecision(sync_on_compute=False, **options)
        if not images:
            return {"map": -1.0, "map_50": -1.0}
        metric.warn_on_many_detections = False  # we say it, with the argument that changes it
        metric.update([image[0] for image in images], [image[1] for image in images])
        # Not its "map", which is -1 where the limit is not 100. By threshold, recall, label, size and limit:
        precision = metric.compute()["precision"][..., 0, -1].double()
        thresholds = torch.tensor(metric.iou_thresholds, dtype=torch.float64)
        return {"map": _mean(precision), "map_50": _mean(precision[(thresholds - 0.5).abs() < 1e-6])}

    def _say_more(self, images: Sequence[tuple[dict[str, Tensor], dict[str, Tensor], int]]) -> None:
        one_label = self.options.get("average") == "micro"
        labels = [torch.zeros_like(found["labels"]) if one_label else found["labels"] for found, _, _ in images]
        more = sum(len(x) > self.max_detections and int(x.bincount().max()) > self.max_detections for x in labels)
        if more and not self._said_more:
            self._said_more = True
            rank_zero_warn(
                f"{more} of {len(images)} images have more than `max_detections={self.max_detections}` boxes of one"
                " label: those with the lowest scores do not count in the average precision. Raise `max_detections` to"
                " count them; COCO's is 100.",
                UserWarning,
                stacklevel=4,
            )


def _mean(precision: Tensor) -> float:
    """Mean of what is known; -1 where there is nothing to find, or nothing was asked for."""
    known = precision[precision > -1]
    return float(known.mean()) if len(known) else -1.0


def _to_cpu(item: dict[str, Tensor], keys: Sequence[str]) -> dict[str, Tensor]:
    return {key: item[key].detach().cpu() for key in keys}


def checked_ids(preds: Sequence[Any], target: Sequence[Any], groups: Tensor, n_groups: int) -> list[int]:
    """Ids of the images, ``n_groups`` where negative."""
    if not len(preds) == len(target) == len(groups):
        raise DebiasError(
            f"Expected as many predictions, targets and ids, but got {len(preds)}, {len(target)} and {len(groups)}."
        )
    ids = groups.tolist()
    if bad := [i for i in ids if i >= n_groups]:
        raise BadRowsError(f"Expected domain ids below `n_domains={n_groups}`, but got {bad}. Number them from 0.")
    return [n_groups if i < 0 else i for i in ids]
