"""Groups and fairness measures: against fairlearn and scikit-learn, against counting, and with nothing to find."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from _support.planted import planted
from debias.audit import audit_predictions
from debias.audit.groups import _auroc, rates


def audited(frame, **options):
    return audit_predictions(frame, progress=False, **{"slices": 0} | options)


@pytest.fixture(scope="module")
def table():
    frame = planted(1500, 0.4, columns=2)
    random = np.random.default_rng(1)
    frame["score"] = np.clip(0.25 + 0.5 * frame["prediction"] + random.normal(0, 0.2, len(frame)), 0, 1)
    return frame


def test_groups_are_counted_as_by_hand(table):
    report = audited(table, scores="probabilities")
    for row in report.frame.sample(40, random_state=0).to_dict("records"):
        if "age" in (row["column"], row["and_column"]):
            continue
        mask = table[row["column"]].astype(str) == row["value"]
        if row["and_column"]:
            mask &= table[row["and_column"]].astype(str) == row["and_value"]
        right = table["target"] == table["prediction"]
        assert row["count"] == mask.sum()
        assert row["estimate"] == pytest.approx(right[mask].mean())
        assert row["rest"] == pytest.approx(right[~mask].mean())
        assert row["difference"] == pytest.approx(right[mask].mean() - right[~mask].mean())
    assert report.overall["estimate"] == accuracy_score(table["target"], table["prediction"])


def test_measures_are_those_of_fairlearn_and_scikit_learn(table):
    fair = pytest.importorskip("fairlearn.metrics")
    y, z, place = table["target"], table["prediction"], table["place"]
    report = audited(table, scores="probabilities", min_count=1)
    row = report.tables["fairness"].set_index("column").loc["place"]
    for name in (
        f"{what}_{how}" for what in ("demographic_parity", "equalized_odds") for how in ("difference", "ratio")
    ):
        assert row[name] == pytest.approx(getattr(fair, name)(y, z, sensitive_features=place)), name
    metrics = {"selection_rate": fair.selection_rate, "tpr": fair.true_positive_rate, "fpr": fair.false_positive_rate}
    frame = fair.MetricFrame(
        metrics=metrics | {"accuracy": accuracy_score}, y_true=y, y_pred=z, sensitive_features=place
    )
    own = report.tables["rates"]
    own = own[own["column"] == "place"].set_index("value")
    for name in metrics:
        np.testing.assert_allclose(own[name].loc[frame.by_group.index], frame.by_group[name])
    assert row["metric_difference"] == pytest.approx(frame.difference()["accuracy"])
    assert row["metric_ratio"] == pytest.approx(frame.ratio()["accuracy"])
    for value, part in table.groupby("place"):
        assert own["auroc"][value] == pytest.approx(roc_auc_score(part["target"], part["score"]))


def test_what_is_not_defined_is_nan_where_fairlearn_says_0():
    fair = pytest.importorskip("fairlearn.metrics")
    frame = pd.DataFrame({"target": [0, 1] * 30 + [0] * 30, "prediction": [0, 1, 1, 0] * 15 + [0, 1] * 15})
    frame["group"] = ["a"] * 60 + ["b"] * 30  # no positive in b
    frame["score"] = frame["prediction"] * 0.8
    report = audited(frame, scores="probabilities")
    own = report.tables["rates"].set_index(["column", "value"]).loc[("group", "b")]
    assert np.isnan(own["tpr"])
    assert np.isnan(own["auroc"])
    assert own["fpr"] == 0.5
    assert fair.true_positive_rate(frame["target"][60:], frame["prediction"][60:], pos_label=1) == 0
    row = report.tables["fairness"].set_index("column").loc["group"]
    assert np.isnan(row["tpr_difference"])
    assert row["equalized_odds_difference"] == pytest.approx(row["fpr_difference"])


def test_auroc_with_ties_and_its_interval_cover():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        y = random.integers(0, 2, 80).astype(bool)
        score = np.round(random.normal(size=80) + y, 1)
        auroc, low, high = _auroc(score, y, 100, 0.95, seed)
        assert auroc == pytest.approx(roc_auc_score(y, score))
        hits += low <= 0.76 <= high  # the normal distribution's at 1 / sqrt(2)
    assert 0.9 <= hits / 200 <= 0.99


def test_a_small_group_is_shown_and_not_ranked():
    frame = planted(400, columns=0)
    frame["rare"] = ["yes"] * 5 + ["no"] * 395
    frame.loc[:4, "prediction"] = 1 - frame["target"][:5]
    report = audited(frame)
    small = report.frame[(report.frame["column"] == "rare") & (report.frame["value"] == "yes")].iloc[0]
    assert small["count"] == 5
    assert not small["ranked"]
    assert not small["significant"]
    assert "none has 300 samples" in audited(frame, min_count=300).findings[1]
    assert "Collect more samples" in audited(frame, min_count=300).advice[0].what
    assert "rare" not in set(report.worst(1000)["column"])  # nor are the others: they have too few to compare with


def test_missing_values_are_a_group_and_numbers_are_in_bins():
    frame = planted(800, columns=1)
    frame.loc[::4, "age"] = np.nan
    frame.loc[::5, "place"] = None
    report = audited(frame, bins=3)
    values = report.frame[report.frame["and_column"].isna()].groupby("column")["value"].agg(set)
    assert "(missing)" in values["age"]
    assert len(values["age"]) == 4
    assert values["place"] == {"land", "water", "(missing)"}


def test_a_crossing_that_is_a_group_over_again_is_left_out():
    frame = planted(400, columns=0)
    frame["site"] = np.where(frame["place"] == "land", "north", "south")
    crossed = audited(frame).frame
    assert not ((crossed["column"] == "place") & (crossed["and_column"] == "site")).any()


def test_with_nothing_to_find_the_worst_groups_are_noise():
    alarms = sum(
        audited(planted(600, seed=seed, columns=2), resamples=20).frame["significant"].any() for seed in range(25)
    )
    assert alarms <= 4  # 5 % are promised: more happen in less than one in a hundred such tests


def test_more_classes_than_two():
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 900)
    site = random.integers(0, 3, 900)
    z = np.where(random.random(900) < 0.3, site, y)
    names = np.array(["cat", "dog", "eel"])
    report = audited(pd.DataFrame({"target": names[y], "prediction": names[z], "site": [f"s{i}" for i in site]}))
    top = report.tables["shortcuts"].iloc[0]
    assert top["significant"]
    assert (top["value"], top["class"]) in {("s0", "cat"), ("s1", "dog"), ("s2", "eel")}
    own = report.tables["rates"].set_index(["column", "value", "class"]).loc[("site", "s0", "cat")]
    assert own["tpr"] == pytest.approx((z == 0)[(site == 0) & (y == 0)].mean())
    assert own["positives"] == ((site == 0) & (y == 0)).sum()


def test_rates_of_no_class_are_empty():
    frame = pd.DataFrame({"target": [0.5, 1.5] * 40, "prediction": [0.4, 1.0] * 40, "place": ["a", "a", "b", "b"] * 20})
    report = audited(frame)
    assert report.task == "regression"
    assert report.metric == "absolute error"
    assert "rates" not in report.tables
    assert report.overall["estimate"] == pytest.approx(0.3)
    assert callable(rates)
