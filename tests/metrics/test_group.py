"""Group metrics against loops in NumPy and scikit-learn, invariants, absent groups, two ranks."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassConfusionMatrix

from debias.errors import BadRowsError, DebiasError
from debias.metrics import (
    GroupAccuracy,
    GroupedMetric,
    adjusted_average,
    group_difference,
    group_ratio,
    group_sums,
    worst_group,
)

NAN = float("nan")


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), equal_nan=True)


def data(n=60, n_classes=3, n_groups=4, seed=0, absent=()):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator)
    target = torch.randint(n_classes, (n,), generator=generator)
    groups = torch.randint(-1, n_groups, (n,), generator=generator)
    for group in absent:
        groups[groups == group] = -1
    return logits, target, groups


# ---------------------------------------------------------------------------------------------------- functions


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(-2, 5)), max_size=30),
    seed=st.integers(0, 99),
)
def test_group_sums_is_a_loop_and_ignores_the_order(rows, seed):
    n_groups = 4
    values = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows], dtype=torch.int64)
    sums, counts = group_sums(values, groups, n_groups)
    close(sums, [sum(v for v, g in rows if g == group) for group in range(n_groups)])
    close(counts, [sum(g == group for _, g in rows) for group in range(n_groups)])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    close(group_sums(values[order], groups[order], n_groups)[0], sums)
    renamed = torch.tensor([2, 0, 3, 1, -1, -1])  # 4 and 5 are outside; -1 and -2 stay outside
    close(group_sums(values, torch.where(groups < 0, groups, renamed[groups]), n_groups)[0][renamed[:4]], sums)
    members = groups[:, None] == torch.arange(n_groups)
    close(group_sums(values, members, n_groups)[0], sums)
    close(group_sums(values, members, n_groups)[1], counts)


def test_group_sums_overlapping_membership():
    members = torch.tensor([[True, True], [False, True], [False, False]])
    sums, counts = group_sums(torch.tensor([1.0, 2.0, 4.0]), members, 2)
    close(sums, [1, 3])
    close(counts, [1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_group_sums_keeps_dtype_and_device_and_a_nan_stays_in_its_group(dtype):
    for groups in (torch.tensor([0, 1, -1]), torch.tensor([[True, False], [False, True], [False, False]])):
        sums, counts = group_sums(torch.tensor([1.0, NAN, NAN], dtype=dtype), groups, 2)
        assert sums.dtype == counts.dtype == dtype
        close(sums, [1, NAN])
        close(counts, [1, 1])


def test_group_sums_gradient():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 2, 2, -1, 0, 5])
    assert torch.autograd.gradcheck(lambda v: group_sums(v, groups, 3)[0], values)
    assert torch.autograd.gradcheck(lambda v: group_sums(v, groups[:, None] == torch.arange(3), 3)[0], values)


@pytest.mark.parametrize(
    "groups",
    [torch.zeros(2, dtype=torch.long), torch.zeros(3), torch.zeros(3, 3, dtype=torch.bool), torch.full((3, 2), 2)],
)
def test_group_sums_rejects_groups_that_do_not_fit(groups):
    with pytest.raises(DebiasError, match=r"`groups` to be integer ids \(3,\) or boolean membership \(3, 2\), but got"):
        group_sums(torch.zeros(3), groups, 2)


def test_summaries_leave_out_absent_groups():
    by_group = torch.tensor([0.5, NAN, 0.9, 0.8])
    close(worst_group(by_group), 0.5)
    close(worst_group(by_group, higher_is_better=False), 0.9)
    close(group_difference(by_group), 0.4)
    close(group_ratio(by_group), 0.5 / 0.9)
    close(adjusted_average(by_group, torch.tensor([1, 100, 2, 1])), (0.5 + 1.8 + 0.8) / 4)
    for empty in (torch.full((3,), NAN),):
        for summary in (worst_group, group_difference, group_ratio):
            assert summary(empty).isnan()
        assert adjusted_average(empty, torch.ones(3)).isnan()
    assert adjusted_average(torch.tensor([NAN, 1.0]), torch.tensor([3, 0])).isnan()


# ---------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 40, 13]])
def test_accuracy_agrees_with_scikit_learn_however_it_is_batched(sizes):
    logits, target, groups = data(absent=[2])
    metric = GroupAccuracy(4, train_counts=[10, 20, 30, 40])
    for parts in zip(*(tensor.split(sizes) for tensor in (logits, target, groups)), strict=True):
        metric.update(*parts)
    result = metric.compute()
    labels = logits.argmax(1)
    expected = [accuracy_score(target[groups == g], labels[groups == g]) if g != 2 else NAN for g in range(4)]
    close(result["accuracy"], accuracy_score(target, labels))
    close(result["accuracy_by_group"], expected)
    close(result["worst_group_accuracy"], np.nanmin(expected))
    close(result["accuracy_difference"], np.nanmax(expected) - np.nanmin(expected))
    close(result["accuracy_ratio"], np.nanmin(expected) / np.nanmax(expected))
    close(result["adjusted_accuracy"], (10 * expected[0] + 20 * expected[1] + 40 * expected[3]) / 70)
    assert list(result) == [
        "accuracy",
        "worst_group_accuracy",
        "accuracy_by_group",
        "accuracy_count",
        "accuracy_difference",
        "accuracy_ratio",
        "adjusted_accuracy",
    ]


def test_a_batch_that_lacks_groups_leaves_their_rows_alone():
    metric = GroupAccuracy(3)
    metric.update(torch.tensor([1, 1]), torch.tensor([1, 0]), torch.tensor([1, 2]))
    close(metric.compute()["accuracy_by_group"], [NAN, 1, 0])
    assert "adjusted_accuracy" not in metric.compute()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40))
def test_permuting_samples_and_renaming_groups(seed, n):
    logits, target, groups = data(n, seed=seed)
    groups = groups.clamp(min=0)

    def result(*batch):
        metric = GroupAccuracy(4)
        metric.update(*batch)
        return metric.compute()

    reference = result(logits, target, groups)
    order = torch.randperm(n)
    renamed = torch.randperm(4)
    permuted = result(logits[order], target[order], renamed[groups[order]])
    close(permuted["accuracy_by_group"][renamed], reference["accuracy_by_group"])
    for name in ("accuracy", "worst_group_accuracy", "accuracy_difference", "accuracy_ratio"):
        close(permuted[name], reference[name])


def test_one_group_is_plain_accuracy():
    logits, target, _ = data()
    metric = GroupAccuracy(1)
    result = metric(logits, target, torch.zeros(60, dtype=torch.long))
    close(result["worst_group_accuracy"], result["accuracy"])


def test_layouts_of_predictions():
    groups = torch.tensor([0, 1])

    def accuracy(preds, target, **options):
        metric = GroupAccuracy(2, **options)
        metric.update(preds, target, groups)
        return metric.compute()["accuracy_by_group"].tolist()

    assert accuracy(torch.tensor([0, 1]), torch.tensor([0, 0])) == [1, 0]
    assert accuracy(torch.tensor([-0.1, 0.2]), torch.tensor([0, 1])) == [1, 1]  # binary logits
    assert accuracy(torch.tensor([0.4, 0.6]), torch.tensor([0.0, 0.0]), threshold=0.5) == [1, 0]
    assert accuracy(torch.tensor([[-0.1], [0.2]]), torch.tensor([0, 1])) == [1, 1]  # one logit
    assert accuracy(torch.tensor([[0.4, 0.6], [0.9, 0.1]]), torch.tensor([1, 1])) == [1, 0]  # classes
    multi_label = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    assert accuracy(multi_label, torch.tensor([[1, 0, 0, 1], [1, 1, 1, -1]])) == [0.5, 1]
    assert accuracy(multi_label, torch.tensor([[1, 0, NAN, 1], [1, 1, 0, NAN]])) == [2 / 3, 2 / 3]
    pixels = torch.zeros(2, 3, 2, 2)
    pixels[:, 1] = 1  # class 1 everywhere
    target = torch.tensor([[[1, 1], [1, 0]], [[1, 255], [0, -1]]])
    assert accuracy(pixels, target, ignore_index=255) == [0.75, 0.5]
    tokens = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [2, 2, 2]]), 5).float()  # classes last
    assert accuracy(tokens, torch.tensor([[0, 1, 1], [2, -100, -100]])) == [2 / 3, 1]


def test_samples_without_a_target_or_group():
    metric = GroupAccuracy(2)
    metric.update(torch.tensor([1, 1, 1]), torch.tensor([1, -1, 0]), torch.tensor([0, 0, -1]))
    result = metric.compute()
    close(result["accuracy_by_group"], [1, NAN])
    close(result["accuracy"], 0.5)  # the sample of no group counts here, the one without target nowhere
    metric.update(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    close(metric.compute()["accuracy"], 0.5)


def test_multi_hot_membership():
    metric = GroupAccuracy(2)
    metric.update(torch.tensor([1, 0]), torch.tensor([1, 1]), torch.tensor([[True, True], [False, True]]))
    close(metric.compute()["accuracy_by_group"], [1, 0.5])


def test_forward_returns_the_batch_and_accumulates_and_reset_forgets():
    metric = GroupAccuracy(2)
    ones = torch.ones(2, dtype=torch.long)
    close(metric(ones, ones, torch.tensor([0, 0]))["accuracy_by_group"], [1, NAN])
    close(metric(1 - ones, ones, torch.tensor([0, 1]))["accuracy_by_group"], [0, 0])
    close(metric.compute()["accuracy_by_group"], [2 / 3, 0])
    close(pickle.loads(pickle.dumps(metric)).compute()["accuracy_by_group"], [2 / 3, 0])
    metric.reset()
    metric.update(ones, ones, torch.tensor([1, 1]))
    close(metric.compute()["accuracy_by_group"], [NAN, 1])


def test_counts_are_exact_beyond_float32():
    metric = GroupAccuracy(1)
    one = torch.ones(1, dtype=torch.long)
    metric.update(one, one, one - 1)
    metric.correct += 2**24
    metric.total += 2**24
    metric.update(one, one, one - 1)
    assert metric.total.item() == 2**24 + 2


def test_ids_that_are_too_large():
    metric = GroupAccuracy(2)
    ones = torch.ones(2, dtype=torch.long)
    with pytest.raises(
        BadRowsError, match=r"`groups` to hold ids below `n_groups=2`, but got 2. Number the groups from 0"
    ):
        metric.update(ones, ones, torch.tensor([0, 2]))
    assert metric.total_all == 0
    metric.bad_ids += 3  # what other devices count without looking
    metric.update(ones, ones, torch.tensor([0, 1]))
    with pytest.raises(BadRowsError, match=r"got 3 samples with larger ones"):
        metric.compute()


BEYOND = {
    "a score": (torch.ones(5), torch.tensor([0, 2, 1, -1, 255])),
    "a score, smoothed": (torch.ones(5), torch.tensor([0.1, 2, 0.9, -1, 255])),
    "classes": (torch.eye(3)[[2, 2, 1, 0, 0]], torch.tensor([0, 3, 1, -1, 255])),
}


@pytest.mark.parametrize("case", BEYOND)
def test_targets_that_cannot_be_predicted(case):
    (preds, target), groups = BEYOND[case], torch.zeros(5, dtype=torch.long)
    metric = GroupAccuracy(1, ignore_index=255)
    metric.update(preds, target, groups)
    with pytest.raises(DebiasError, match=r"`target` to be 0 or 1 .* but got 1 larger ones.*`ignore_index`"):
        metric.compute()
    metric.reset()
    kept = [0, 2, 3, 4]
    metric.update(preds[kept], target[kept], groups[kept])
    assert metric.compute()["accuracy"] == 0.5


def test_updates_on_other_devices_do_not_look_at_values():
    metric = GroupAccuracy(2).to("meta")  # any look at a value raises there
    metric.update(*(torch.zeros(3, dtype=torch.long, device="meta") for _ in range(3)))
    assert metric.correct.shape == (2,)


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (torch.zeros(4, dtype=torch.long), torch.zeros(3, dtype=torch.long), r"integer `preds` to have the shape"),
        (torch.zeros(3, 5, 2), torch.zeros(3, dtype=torch.long), r"but got \(3, 5, 2\) for a target \(3,\)"),
        (torch.zeros(3, 5), torch.zeros(3), r"\(N, C, \.\.\.\) for integer targets.*float32"),
    ],
)
def test_predictions_that_do_not_fit(preds, target, message):
    with pytest.raises(DebiasError, match=message):
        GroupAccuracy(2).update(preds, target, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_groups": 0}, "`n_groups` to be an integer >= 1 and <= 1000000, but got 0"),
        ({"n_groups": 2, "group_names": ["a"]}, r"`group_names` to be 2 different names, but got \['a'\]"),
        ({"n_groups": 2, "group_names": ["a", "a"]}, "different names"),
        ({"n_groups": 2, "train_counts": [1, -1]}, r"`train_counts` to be 2 counts.*\[1.0, -1.0\]"),
        ({"n_groups": 2, "train_counts": [0, 0]}, "not all 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DebiasError, match=message):
        GroupAccuracy(**options)


# ---------------------------------------------------------------------------------------------------- any metric


def test_any_metric_by_group_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    scores, target = torch.rand(90, generator=generator), torch.randint(2, (90,), generator=generator)
    groups = torch.arange(90) % 3
    groups[groups == 1] = -1
    metric = GroupedMetric(BinaryAUROC(), 3, train_counts=[3, 9, 1])
    for parts in zip(*(tensor.split([50, 40]) for tensor in (scores, target, groups)), strict=True):
        metric.update(*parts)
    result = metric.compute()
    first, third = (roc_auc_score(target[groups == g], scores[groups == g]) for g in (0, 2))
    close(result["binary_auroc"].item(), torch.tensor(roc_auc_score(target, scores)).float())
    close(result["binary_auroc_by_group"], torch.tensor([first, NAN, third]).float())
    close(result["worst_group_binary_auroc"], torch.tensor(min(first, third)).float())
    close(result["adjusted_binary_auroc"], torch.tensor((3 * first + third) / 4).float())


def test_a_grouped_accuracy_is_group_accuracy():
    _, target, groups = data(n_classes=2)
    preds = torch.randint(2, (60,), generator=torch.Generator().manual_seed(3))
    mine, general = (
        GroupAccuracy(4, train_counts=[1, 2, 3, 4]),
        GroupedMetric(BinaryAccuracy(), 4, name="accuracy", train_counts=[1, 2, 3, 4]),
    )
    mine.update(preds, target, groups)
    general.update(preds, target, groups)
    expected, actual = mine.compute(), general.compute()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value.float(), equal_nan=True)


def test_errors_are_worst_where_they_are_largest_and_wrapped_metrics_are_left_alone():
    error = MeanSquaredError()
    metric = GroupedMetric(error, 2, group_names=["a", "b"])
    batch = metric(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    close(batch["worst_group_mean_squared_error"], 9)
    metric.update(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([[True, True]]))
    close(metric.compute()["mean_squared_error_by_group"], [5, 9])
    close(batch["mean_squared_error_by_group"], [1, 9])
    assert not error.update_called
    assert metric.group_names == ["a", "b"]
    metric.reset()
    metric.update(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1]))
    close(metric.compute()["mean_squared_error_by_group"], [NAN, 1])


def test_grouped_metric_says_what_it_cannot_do():
    with pytest.raises(DebiasError, match=r"`metric` to be a torchmetrics Metric, but got str"):
        GroupedMetric("accuracy", 2)
    with pytest.raises(DebiasError, match=r"MulticlassConfusionMatrix.higher_is_better` is None"):
        GroupedMetric(MulticlassConfusionMatrix(3), 2)
    metric = GroupedMetric(MulticlassConfusionMatrix(2), 1, higher_is_better=True)
    labels = torch.tensor([0, 1])
    metric.update(labels, labels, labels * 0)
    with pytest.raises(DebiasError, match=r"to compute one number, but got \(2, 2\)"):
        metric.compute()
    with pytest.raises(BadRowsError, match=r"`n_groups=1`, but got 1"):
        metric.update(labels, labels, labels)


# ---------------------------------------------------------------------------------------------------- two ranks


def _two_ranks(rank):
    logits, target, groups = data(n_classes=2)
    logits = logits.sigmoid()
    order = groups.argsort(stable=True)  # so that the ranks hold different groups: rank 0 no 2, rank 1 no 0
    share = order[:30] if rank == 0 else order[30:]
    accuracy, auroc = GroupAccuracy(5), GroupedMetric(BinaryAUROC(), 5)
    composed = GroupedMetric(MeanSquaredError() * 2, 5, name="double", higher_is_better=False)
    for part in share.split(11):
        accuracy.update(logits[part], target[part], groups[part])
        auroc.update(logits[part, 1], target[part], groups[part])
        composed.update(logits[part, 1], target[part].float(), groups[part])
    return [accuracy.compute(), auroc.compute(), composed.compute()]


def test_two_ranks_with_different_groups_are_one(ranks):
    logits, target, groups = data(n_classes=2)
    logits = logits.sigmoid()
    accuracy, auroc = GroupAccuracy(5), GroupedMetric(BinaryAUROC(), 5)
    composed = GroupedMetric(MeanSquaredError(), 5, name="double")
    accuracy.update(logits, target, groups)
    auroc.update(logits[:, 1], target, groups)
    composed.update(logits[:, 1], target.float(), groups)
    same = ("double_ratio", "double_count")
    doubled = {name: value if name in same else 2 * value for name, value in composed.compute().items()}
    for results in ranks.run(_two_ranks):
        for actual, expected in zip(results, [accuracy.compute(), auroc.compute(), doubled], strict=True):
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                close(actual[name], value)
    assert math.isnan(accuracy.compute()["accuracy_by_group"][4])
