"""Detection metrics by domain: against loops, against torchmetrics on each domain alone, and on ranks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from torchmetrics.detection import MeanAveragePrecision

from debias.errors import BadRowsError, DebiasError
from debias.metrics import DetectionAccuracy, GroupMeanAveragePrecision, detection_accuracy


def boxes(n, g):
    corners = torch.rand(n, 2, generator=g) * 30
    return torch.cat([corners, corners + 5 + torch.rand(n, 2, generator=g) * 20], 1)


def images(n=12, seed=0):
    """Predictions near the true boxes, some of them twice, some missed; some images without any."""
    g = torch.Generator().manual_seed(seed)
    preds, targets = [], []
    for i in range(n):
        true = boxes(i % 4, g)
        found = torch.cat([true[: i % 3], true[:1] + 1, boxes(i % 2, g)]) + torch.rand(1, generator=g)
        scores = torch.rand(len(found), generator=g)
        labels = torch.ones(len(found)).long()
        preds.append({"boxes": found, "scores": scores, "labels": labels})
        targets.append({"boxes": true, "labels": torch.ones(len(true)).long()})
    return preds, targets


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def by_loop(predicted, true, threshold):
    """WILDS in words: every prediction goes to the true box it overlaps most; hits / (hits + false alarms + misses)."""
    if not predicted or not true:
        return float(len(predicted) == len(true))
    found, alarms = set(), 0
    for p in predicted:
        best = max(range(len(true)), key=lambda t: overlap(p, true[t]))
        if overlap(p, true[best]) >= threshold and best not in found:
            found.add(best)
        else:
            alarms += 1
    return len(found) / (len(found) + alarms + len(true) - len(found))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_detection_accuracy_of_an_image(threshold):
    values = []
    for prediction, target in zip(*images(40), strict=True):
        p, t = prediction["boxes"], target["boxes"]
        value = detection_accuracy(p, t, iou_threshold=threshold)
        assert float(value) == pytest.approx(by_loop(p.tolist(), t.tolist(), threshold), rel=1e-12)
        values.append(float(value))
    assert len(set(values)) > 1
    assert 0 < sum(values) < len(values)
    nothing = torch.zeros(0, 4)
    assert detection_accuracy(nothing, nothing) == 1
    assert detection_accuracy(nothing, torch.ones(1, 4)) == detection_accuracy(torch.ones(1, 4), nothing) == 0


DOMAINS = torch.tensor([0, 2, 0, 0, 2, 2, -1, 0, 2, 2, 0, -1])


def test_detection_accuracy_under_another_default_dtype():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert detection_accuracy(boxes[:1], boxes) == 0.5
    finally:
        torch.set_default_dtype(torch.float32)


def test_detection_accuracy_by_domain():
    metric, (preds, targets) = DetectionAccuracy(3, score_threshold=0.4), images()
    for rows in (range(5), range(5, 12)):
        metric.update([preds[i] for i in rows], [targets[i] for i in rows], DOMAINS[list(rows)])
    each = [
        by_loop(p["boxes"][p["scores"] > 0.4].tolist(), t["boxes"].tolist(), 0.5)
        for p, t in zip(preds, targets, strict=True)
    ]
    mean = {d: math.fsum(x for x, e in zip(each, DOMAINS, strict=True) if e == d) / 5 for d in (0, 2)}
    found = metric.compute()
    assert found["detection_accuracy_by_group"].tolist() == pytest.approx([mean[0], math.nan, mean[2]], nan_ok=True)
    assert float(found["detection_accuracy"]) == pytest.approx(math.fsum(each) / 12)
    assert float(found["average_domain_accuracy"]) == pytest.approx((mean[0] + mean[2]) / 2)
    assert float(found["worst_group_detection_accuracy"]) == pytest.approx(min(mean.values()))


def test_mean_average_precision_is_torchmetrics_on_each_domain():
    metric, (preds, targets) = GroupMeanAveragePrecision(3), images(24)
    domains = DOMAINS.repeat(2)
    for rows in (range(7), range(7, 24)):
        metric.update([preds[i] for i in rows], [targets[i] for i in rows], domains[list(rows)])
    found = metric.compute()
    expected = {}
    for d in (None, 0, 2):
        rows = [i for i in range(24) if d is None or domains[i] == d]
        alone = MeanAveragePrecision()
        alone.update([preds[i] for i in rows], [targets[i] for i in rows])
        expected[d] = {k: float(v) for k, v in alone.compute().items() if k in ("map", "map_50")}
    for name in ("map", "map_50"):
        assert float(found[name]) == pytest.approx(expected[None][name])
        values = [expected[0][name], math.nan, expected[2][name]]
        assert found[f"{name}_by_group"].tolist() == pytest.approx(values, nan_ok=True)
        assert float(found[f"worst_group_{name}"]) == pytest.approx(min(values[0], values[2]))
    assert float(found["average_domain_map"]) == pytest.approx((expected[0]["map"] + expected[2]["map"]) / 2)
    assert float(found["map_difference"]) == pytest.approx(abs(expected[0]["map"] - expected[2]["map"]))
    assert 0 < expected[0]["map"] != expected[2]["map"]
    metric.reset()
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    metric.update([empty], [{k: empty[k] for k in ("boxes", "labels")}], torch.tensor([1]))
    assert metric.compute()["map_by_group"].isnan().all()  # nothing there to be found


def on_rank(rank, rows):
    preds, targets = images()
    metrics = [GroupMeanAveragePrecision(3), DetectionAccuracy(3)]
    mine = rows[rank]
    for metric in metrics:
        metric.update([preds[i] for i in mine], [targets[i] for i in mine], DOMAINS[torch.tensor(mine).long()])
    return [metric.compute() for metric in metrics]


@pytest.mark.parametrize("rows", [([0, 2, 3, 6], [1, 4, 5, 7, 8, 9, 10, 11]), ([*range(12)], [])])
def test_ranks_that_lack_a_domain_are_one_process(ranks, rows):
    whole = on_rank(0, [list(range(12))])
    for found in ranks.run(on_rank, rows):
        assert_close(found, whole, rtol=1e-12, atol=0, equal_nan=True)


def test_wrong_arguments():
    preds, targets = images(2)
    for metric in (DetectionAccuracy(2), GroupMeanAveragePrecision(2)):
        with pytest.raises(BadRowsError, match=r"ids below `n_domains=2`, but got \[2\]"):
            metric.update(preds, targets, torch.tensor([0, 2]))
        with pytest.raises(DebiasError, match="as many predictions, targets and ids, but got 2, 1 and 2"):
            metric.update(preds, targets[:1], torch.tensor([0, 1]))


def many(n=150, labels=1):
    """One image with many boxes, the worse the lower their score."""
    corners = torch.stack([torch.arange(n) % 15, torch.arange(n) // 15], 1) * 40.0
    true = torch.cat([corners, corners + 32], 1)
    found = true + torch.linspace(0, 8, n)[:, None]
    label = torch.arange(n) % labels
    prediction = {"boxes": found, "scores": torch.linspace(0.9, 0.1, n), "labels": label}
    return [prediction], [{"boxes": true, "labels": label}]


def coco(preds, targets, limit):
    """Average precision by pycocotools alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def boxes(item):
        corners, sizes = item["boxes"][:, :2], item["boxes"][:, 2:] - item["boxes"][:, :2]
        return torch.cat([corners, sizes], 1).double().tolist()

    truth, label = COCO(), targets[0]["labels"].tolist()
    names = [{"id": i} for i in sorted(set(label))]
    made = [
        {"id": i + 1, "image_id": 0, "category_id": k, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for i, (b, k) in enumerate(zip(boxes(targets[0]), label, strict=True))
    ]
    truth.dataset = {"info": {}, "images": [{"id": 0}], "categories": names, "annotations": made}
    truth.createIndex()
    rows = zip(boxes(preds[0]), preds[0]["scores"].tolist(), preds[0]["labels"].tolist(), strict=True)
    found = truth.loadRes([{"image_id": 0, "category_id": k, "bbox": b, "score": s} for b, s, k in rows])
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]
    return precision[precision > -1].mean(), precision[0][precision[0] > -1].mean()


@pytest.mark.parametrize("limit", [100, 120, 1000])
def test_boxes_beyond_the_limit_are_left_out_and_said(limit):
    metric = GroupMeanAveragePrecision(1, max_detections=limit)
    batch = many()
    for epoch in range(2):
        metric.reset()
        metric.update(*batch, torch.tensor([0]))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = metric.compute()
        match = f"1 of 1 images have more than `max_detections={limit}` boxes of one label"
        assert [match in str(w.message) for w in said] == ([True] if limit < 150 and not epoch else [])
    expected = coco(*batch, limit)
    assert (float(found["map"]), float(found["map_50"])) == pytest.approx(expected, rel=1e-3)
    assert expected[0] <= coco(*batch, 150)[0]


def test_the_limit_is_one_of_a_label():
    metric = GroupMeanAveragePrecision(1)
    metric.update(*many(labels=2), torch.tensor([0]))
    assert float(metric.compute()["map"]) == pytest.approx(coco(*many(labels=2), 100)[0], rel=1e-3)
    with pytest.raises(DebiasError, match="max_detections"):
        GroupMeanAveragePrecision(1, max_detections=0)
