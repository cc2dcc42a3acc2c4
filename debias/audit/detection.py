"""Mean average precision of each group, with bootstrap intervals over images; by pycocotools, as torchmetrics does."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from debias.audit.columns import Column
from debias.audit.samples import Samples
from debias.audit.statistics import bootstrap_interval
from debias.extras import needs_extra

__all__ = ["map_table"]

Array = np.ndarray[Any, Any]
RESAMPLES = 100  # at most: each is an evaluation of its own


def map_table(samples: Samples, boxes: Sequence[Any], *, confidence: float, resamples: int, seed: int) -> pd.DataFrame:
    """COCO's mAP over all images and in each group of one column.

    Args:
        samples: of a detector.
        boxes: of each image its prediction and target, dictionaries of tensors ``boxes`` ``(n, 4)`` as x1, y1, x2, y2,
            ``labels`` ``(n,)``, and ``scores`` ``(n,)``.
        confidence: of the intervals.
        resamples: of the bootstrap, at most 100.
        seed: of its draws.

    Returns:
        One row a group: ``count`` of images, number of true ``boxes``, ``map`` with ``low`` and ``high``, ``map_50``;
        NaN without true boxes.
    """
    evaluated = _evaluate(boxes)
    found = np.array([len(true["boxes"]) for _, true in boxes])
    rows = []
    for column in [Column("", ("all",), np.zeros(len(samples), int)), *samples.columns]:
        for i, value in enumerate(column.values):
            members = np.flatnonzero(column.codes == i)
            if not len(members):
                continue
            whole, half = _average(evaluated, members)
            low, high = bootstrap_interval(
                lambda drawn, members=members: _average(evaluated, members[drawn])[0],  # type: ignore[misc]
                len(members), resamples=min(resamples, RESAMPLES), confidence=confidence, seed=seed,
            )  # fmt: skip
            rows.append(
                {"column": column.name, "value": value, "count": len(members), "boxes": int(found[members].sum()),
                 "map": whole, "low": low, "high": high, "map_50": half}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _evaluate(boxes: Sequence[Any]) -> Any:
    """Match the boxes of every image once."""
    with needs_extra("detection"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    true: list[dict[str, Any]] = []
    predicted: list[dict[str, Any]] = []
    for i, (guess, target) in enumerate(boxes):
        for kind, each in ((true, target), (predicted, guess)):
            x = np.asarray(each["boxes"], dtype=float).reshape(-1, 4)
            for j, (box, label) in enumerate(zip(x, np.asarray(each["labels"]), strict=True)):
                size = box[2:] - box[:2]
                row = {"image_id": i, "category_id": int(label), "bbox": [*box[:2], *size], "area": float(size.prod())}
                row |= {"id": len(kind) + 1, "iscrowd": 0}
                kind.append(row | ({"score": float(each["scores"][j])} if kind is predicted else {}))
    names = sorted({row["category_id"] for row in [*true, *predicted]})
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (true, predicted):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": i} for i in range(len(boxes))], "categories": [{"id": c} for c in names],
                "annotations": rows,
            }  # fmt: skip
            coco.createIndex()
            sets.append(coco)
        evaluation = COCOeval(*sets, iouType="bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    return evaluation


def _average(evaluation: Any, images: Array) -> tuple[float, float]:
    """MAP and mAP at an overlap of 0.5 of these images, which may occur more than once."""
    part = copy.copy(evaluation)
    part.params, part._paramsEval = copy.copy(evaluation.params), copy.copy(evaluation._paramsEval)
    part.params.imgIds = part._paramsEval.imgIds = list(range(len(images)))
    total = len(evaluation.params.imgIds)
    classes = range(len(evaluation.params.catIds))
    part.evalImgs = [evaluation.evalImgs[c * total + i] for c in classes for i in images]
    with contextlib.redirect_stdout(io.StringIO()):
        part.accumulate()
    precision = part.eval["precision"]  # overlap x recall x class x area x number of detections
    return tuple(float(x[x > -1].mean()) if (x > -1).any() else np.nan for x in (precision, precision[:1]))  # type: ignore[return-value]
