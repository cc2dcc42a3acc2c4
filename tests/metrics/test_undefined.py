"""Metrics are NaN where they are undefined, against scikit-learn and SciPy on each group."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from torchmetrics import MeanSquaredError, Metric
from torchmetrics import regression as tr
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryCohenKappa,
    BinaryF1Score,
    BinaryJaccardIndex,
    BinaryMatthewsCorrCoef,
    BinaryPrecision,
    BinaryRecall,
    BinarySpecificity,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCohenKappa,
    MulticlassF1Score,
    MultilabelAUROC,
    MultilabelRecall,
)

from debias.metrics import GroupedMetric

pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save:UserWarning")


def labels(function, **options):
    return lambda scores, target: function(target, scores > 0.5, **options)


# Metric, its value by scikit-learn, and whether it needs a positive and a negative.
BINARY = {
    "auroc": (BinaryAUROC(), lambda s, t: sk.roc_auc_score(t, s), True, True),
    "average precision": (BinaryAveragePrecision(), lambda s, t: sk.average_precision_score(t, s), True, False),
    "recall": (BinaryRecall(), labels(sk.recall_score), True, False),
    "precision": (BinaryPrecision(), labels(sk.precision_score, zero_division=0), True, False),
    "f1": (BinaryF1Score(), labels(sk.f1_score), True, False),
    "jaccard": (BinaryJaccardIndex(), labels(sk.jaccard_score), True, False),
    "specificity": (BinarySpecificity(), labels(sk.recall_score, pos_label=0), False, True),
    "matthews": (BinaryMatthewsCorrCoef(), labels(sk.matthews_corrcoef), True, True),
    "kappa": (BinaryCohenKappa(), labels(sk.cohen_kappa_score), True, True),
    "accuracy": (BinaryAccuracy(), labels(sk.accuracy_score), False, False),
}


def by_group(metric, preds, target, groups, n_groups=3, **options):
    grouped = GroupedMetric(metric, n_groups, name="m", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grouped.update(preds, target, groups)
        return {name: value.tolist() for name, value in grouped.compute().items()}


@pytest.mark.parametrize("case", BINARY)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 99), st.booleans(), st.integers(0, 2)), min_size=1, max_size=25))
def test_a_binary_metric_has_a_value_where_the_targets_leave_it_one(case, rows):
    metric, oracle, positive, negative = BINARY[case]
    scores, target, groups = (torch.tensor(x) for x in zip(*rows, strict=True))
    scores, target = scores.double() / 99 * 0.98 + 0.011, target.long()  # none of them at the threshold
    found = by_group(metric, scores, target, groups)
    expected = []
    for group in range(3):
        s, t = scores[groups == group].numpy(), target[groups == group].numpy()
        defined = len(t) and not (positive and not t.any()) and not (negative and t.all())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected.append(float(oracle(s, t)) if defined else math.nan)
    if case == "matthews":  # one label predicted is 0 for scikit-learn, and almost 0 for torchmetrics
        assert found["m_by_group"] == pytest.approx(expected, abs=1.0, nan_ok=True)
        assert [math.isnan(x) for x in found["m_by_group"]] == [math.isnan(x) for x in expected]
        return
    assert found["m_by_group"] == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert found["m_count"] == [int((groups == group).sum()) for group in range(3)]
    known = [x for x in expected if not math.isnan(x)]
    assert found["worst_group_m"] == pytest.approx(min(known, default=math.nan), abs=1e-5, nan_ok=True)


REGRESSION = {
    "r2": (tr.R2Score, lambda p, t: sk.r2_score(t, p)),
    "explained variance": (tr.ExplainedVariance, lambda p, t: sk.explained_variance_score(t, p)),
    "pearson": (tr.PearsonCorrCoef, lambda p, t: stats.pearsonr(p, t)[0]),
    "spearman": (tr.SpearmanCorrCoef, lambda p, t: stats.spearmanr(p, t)[0]),
    "kendall": (tr.KendallRankCorrCoef, lambda p, t: stats.kendalltau(p, t)[0]),
    "error": (tr.MeanAbsoluteError, lambda p, t: np.abs(p - t).mean()),
}


@pytest.mark.parametrize("case", REGRESSION)
def test_correlations_need_two_different_targets(case):
    kind, oracle = REGRESSION[case]
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0] * 9 + [1] * 5 + [2])
    target = torch.where(groups == 1, 2.0, torch.randn(15, generator=generator))
    preds = target + 0.3 * torch.randn(15, generator=generator)
    found = by_group(kind(), preds, target, groups, n_groups=4)["m_by_group"]
    expected = [
        oracle(preds[groups == g].numpy(), target[groups == g].numpy()) if g == 0 else math.nan for g in range(4)
    ]
    if case == "error":
        expected[1:3] = [float((preds - target).abs()[groups == g].mean()) for g in (1, 2)]
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_averages_over_classes_are_over_those_that_occur():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 3, generator=generator).softmax(1)
    target = torch.cat([torch.arange(30) % 3, torch.arange(6) % 2, torch.ones(4).long()])
    groups = torch.tensor([0] * 30 + [1] * 6 + [2] * 4)
    guess = scores.argmax(1)
    of_groups = [(scores[groups == g], guess[groups == g], target[groups == g]) for g in range(3)]

    def one_against_rest(s, _, t):
        found = [sk.roc_auc_score(t == c, s[:, c]) for c in t.unique()] if len(t.unique()) > 1 else [math.nan]
        return float(np.mean(found))

    cases = [
        (MulticlassAccuracy(3), lambda s, p, t: sk.recall_score(t, p, labels=t.unique(), average="macro")),
        (MulticlassF1Score(3), lambda s, p, t: sk.f1_score(t, p, labels=t.unique(), average="macro")),
        (MulticlassF1Score(3, average="weighted"), lambda s, p, t: sk.f1_score(t, p, average="weighted")),
        (MulticlassAccuracy(3, average="micro"), lambda s, p, t: sk.accuracy_score(t, p)),
        (MulticlassAUROC(3), one_against_rest),
        (MulticlassCohenKappa(3), lambda s, p, t: sk.cohen_kappa_score(t, p) if len(t.unique()) > 1 else math.nan),
    ]
    for metric, oracle in cases:
        found = by_group(metric, scores, target, groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = [float(oracle(*rows)) for rows in of_groups]
        assert found["m_by_group"] == pytest.approx(expected, abs=1e-5, nan_ok=True), type(metric).__name__


def test_labels_without_a_positive():
    target = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1]])
    scores = torch.tensor([[0.9, 0.1], [0.7, 0.8], [0.2, 0.3], [0.1, 0.9]])
    groups = torch.tensor([0, 0, 0, 1])
    found = by_group(MultilabelRecall(2), scores, target, groups, n_groups=2)
    assert found["m_by_group"] == [0.5, 1]  # of label 0, and of label 1
    found = by_group(MultilabelAUROC(2), scores, target, groups, n_groups=2)
    assert found["m_by_group"] == pytest.approx([0.5, math.nan], nan_ok=True)


class Fussy(MeanSquaredError):
    """Raises for small groups."""

    def compute(self):
        if self.total < 3:
            raise ValueError("Three samples, please.")
        return super().compute()


class HitRate(Metric):
    """A score of one's own, defined for one sample and for equal targets."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("hits", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.hits += torch.stack([((preds - target).abs() < 1).float().sum(), torch.tensor(float(len(target)))])

    def compute(self):
        return self.hits[0] / self.hits[1]


def test_metrics_of_ones_own():
    values, groups = torch.ones(5), torch.tensor([0, 0, 0, 1, 2])
    metric = GroupedMetric(Fussy(), 3, group_names=["a", "b", "c"], name="mse")
    metric.update(values, values - 1, groups)
    match = r"`mse` is undefined, and NaN, for group `b` \(1 sample\): Fussy says: Three samples, please; group `c`"
    with pytest.warns(UserWarning, match=match):
        found = metric.compute()
    assert found["mse_by_group"].tolist() == pytest.approx([1, math.nan, math.nan], nan_ok=True)
    assert [float(found[name]) for name in ("mse", "worst_group_mse", "mse_difference")] == [1, 1, 0]
    assert by_group(HitRate(), values, values - 0.5, groups)["m_by_group"] == [1, 1, 1]


def test_a_group_is_named_once():
    metric = GroupedMetric(BinaryAUROC(), 2, group_names=["a", "b"], name="auroc")
    batch = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    for epoch in range(2):
        metric.reset()
        metric.update(*batch)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert float(metric.compute()["worst_group_auroc"]) == 1
        assert [str(w.message)[:58] for w in said] == ["`auroc` is undefined, and NaN, for group `b` (1 sample): i"][
            epoch:
        ]


SCORES, TARGET = torch.linspace(0.1, 0.9, 8), torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])


def on_rank(rank):
    share = slice(rank, None, 2)
    regression = by_group(tr.R2Score(), SCORES[share], TARGET[share].float(), GROUPS[share], n_groups=4)
    return by_group(BinaryAUROC(), SCORES[share], TARGET[share], GROUPS[share], n_groups=4), regression


def test_two_ranks_are_one(ranks):
    """Also where the positives of a group are on one rank, and its negatives on the other."""
    whole = by_group(BinaryAUROC(), SCORES, TARGET, GROUPS, n_groups=4)
    regression = by_group(tr.R2Score(), SCORES, TARGET.float(), GROUPS, n_groups=4)
    assert [math.isnan(value) for value in whole["m_by_group"]] == [False, False, True, True]
    for found in ranks.run(on_rank):
        for mine, expected in zip(found, (whole, regression), strict=True):
            for name, value in mine.items():
                assert value == pytest.approx(expected[name], nan_ok=True, rel=1e-5)
