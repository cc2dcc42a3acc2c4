"""A network that has diverged is not scored like any other: its predictions are wrong, counted and said."""

import pytest
import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy

from debias.metrics import GroupAccuracy, GroupedMetric, MultilabelF1

NAN, INF = torch.nan, torch.inf
GROUPS = torch.tensor([0, 0, 1, 1])


def values(metric, preds, target, groups=GROUPS):
    metric.update(torch.as_tensor(preds), torch.as_tensor(target), groups)
    return {key: value.tolist() for key, value in metric.compute().items()}


@pytest.mark.parametrize("bad", [[NAN, NAN], [0.0, NAN], [INF, 0.0], [-INF, -INF]])
def test_logits_that_are_not_finite_are_wrong_whatever_the_target(bad):
    for target in (0, 1):
        with pytest.warns(UserWarning, match=r"predictions of 2 samples are not finite .* count as wrong"):
            found = values(GroupAccuracy(2), [[1.0, 0.0], bad, bad, [0.0, 1.0]], [0, target, target, 1])
        assert found["accuracy"] == 0.5
        assert found["accuracy_by_group"] == [0.5, 0.5]
        assert found["accuracy_not_finite"] == 2


def test_a_masked_class_is_no_divergence():
    found = values(GroupAccuracy(2), [[1.0, -INF], [-INF, 0.0], [0.0, 1.0], [1.0, 0.0]], [0, 1, 1, 0])
    assert found["accuracy"] == 1
    assert "accuracy_not_finite" not in found


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_and_pixels(bad):
    with pytest.warns(UserWarning, match="not finite"):
        found = values(GroupAccuracy(2), [bad, bad, 1.0, -1.0], [0, 1, 1, 0])
    assert (found["accuracy_by_group"], found["accuracy_not_finite"]) == ([0, 1], 2)
    logits = torch.zeros(4, 2, 3)
    logits[:, 1], logits[0, :, 0] = 1, bad
    with pytest.warns(UserWarning, match="of 1 samples"):
        found = values(GroupAccuracy(2), logits, torch.ones(4, 3, dtype=torch.long))
    assert found["accuracy_by_group"] == pytest.approx([5 / 6, 1])


def test_missing_targets_do_not_count():
    found = values(GroupAccuracy(2), [[NAN, NAN], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [-1, 0, 0, 0])
    assert (found["accuracy"], "accuracy_not_finite" in found) == (1, False)


@pytest.mark.parametrize(
    ("metric", "preds", "target"),
    [
        (MulticlassAccuracy(2, average="micro"), [[1.0, 0.0], [NAN, NAN], [0.0, 1.0], [0.0, 1.0]], [0, 0, 1, 1]),
        (torchmetrics.MeanAbsoluteError(), [1.0, INF, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_any_other_metric_is_refused_as_nan(metric, preds, target):
    with pytest.warns(UserWarning, match=r"of 1 samples are not finite .* The metric is NaN"):
        found = values(GroupedMetric(metric, 2, name="m"), preds, target)
    assert found.pop("m_not_finite") == 1
    assert found.pop("m_count") == [2, 2]
    flat = [v for value in found.values() for v in (value if isinstance(value, list) else [value])]
    assert flat
    assert all(v != v for v in flat)


def test_it_starts_afresh():
    metric = GroupAccuracy(2)
    with pytest.warns(UserWarning, match="not finite"):
        values(metric, [[NAN, 0.0]] * 4, [0, 0, 1, 1])
    metric.reset()
    assert "accuracy_not_finite" not in values(metric, [[1.0, 0.0]] * 4, [0, 0, 0, 0])


def test_a_probability_that_is_nan_is_a_wrong_guess_of_a_label():
    metric = MultilabelF1(2, thresholds=1)
    metric.update(torch.tensor([[0.9, NAN], [NAN, 0.1]]), torch.tensor([[1, 0], [1, -1]]), torch.zeros(2).long())
    with pytest.warns(UserWarning, match="predictions of 2 samples are not finite"):
        found = metric.compute()
    assert found[-1, 0].tolist() == [pytest.approx(2 / 3), 0]  # one missed; one false alarm
    assert metric.said["f1_not_finite"] == 2
