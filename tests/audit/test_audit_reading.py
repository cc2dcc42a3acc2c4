"""Bad input: one clear message each, before anything is counted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from _support.planted import planted
from debias.audit import audit_predictions
from debias.errors import DebiasError


def audited(frame, **options):
    return audit_predictions(frame, **{"progress": False, "resamples": 20, "slices": 0} | options)


def changed(**columns):
    return planted(60, columns=1).assign(**columns)


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (changed().iloc[:0], {}, "a row for each sample, but it has none"),
        (changed().rename(columns={"target": "targets"}), {}, "nearest is `targets`"),
        (changed(target=1), {}, "at least two classes, but all 60 samples are '1'"),
        (changed(prediction=[np.nan] + [1] * 59), {}, "`prediction` to have a value for every sample, but 1 of 60"),
        (changed(prediction="x"), {}, "none in common"),
        (changed(prediction=0.3), {}, "Pass `task='regression'`"),
        (changed(score=0.3), {}, "Pass `scores='probabilities'` or `scores='logits'`"),
        (changed(), {"scores": "percent"}, "`scores` to be one of 'probabilities', 'logits', but got 'percent'"),
        (changed(score=3.0), {"scores": "probabilities"}, "from 3 to 3. If they are logits"),
        (changed(score=np.inf), {"scores": "logits"}, "finite numbers, but 60 are not"),
        (changed(score_0=0.5, score_1=0.1), {"scores": "probabilities"}, "sum to 1, but those of row 0"),
        (changed(score_0=0.5), {"scores": "probabilities"}, "no column for 1"),
        (changed(), {"positive": "2"}, "`positive` to be one of the classes 0, 1"),
        (changed(), {"columns": ["plaice"]}, "but got ..plaice.."),
        (changed(), {"task": "ranking"}, "`task` to be one of"),
        (changed(), {"alpha": 0}, "alpha"),
        (changed(), {"bins": 1}, "`bins` to be an integer >= 2"),
        (changed(), {"id": "file"}, "`id` to be a column"),
        (changed(), {"metadata": planted(59)}, "for each of the 60 samples, in their order, but it has 59"),
        (changed(), {"metadata": planted(60, seed=1)[["place"]]}, "their columns `place` differ"),
        (changed(file=range(60)), {"metadata": pd.DataFrame({"a": [1]}), "id": "file"}, "a column of the metadata"),
        (changed(file=0), {"metadata": pd.DataFrame({"file": [0]}), "id": "file"}, "0 occurs 60 times"),
        (changed(file=range(60)), {"metadata": pd.DataFrame({"file": range(9)}), "id": "file"}, "51 of 60 samples"),
        (changed(), {"train": planted(9).drop(columns="target")}, "training table to have the column `target`"),
        (changed(), {"train": planted(9).assign(target=7)}, "among the classes"),
        (pd.DataFrame({"target_a": [0, 1], "x": [1, 2]}), {}, "the column `prediction_a`"),
        (pd.DataFrame({"target_a": [0, 2], "prediction_a": [1, 0]}), {}, "0 and 1, but got 2"),
    ],
)  # fmt: skip
def test_bad_input_has_one_clear_message(frame, options, message):
    with pytest.raises(DebiasError, match=message):
        audited(frame, **options)


def test_columns_that_are_no_groups_are_said_and_left_out():
    report = audited(changed(file=[f"{i}.png" for i in range(60)], empty=np.nan, same="a"))
    assert report.left_out == {
        "file": "every sample has a value of its own: an id, not a group",
        "empty": "all values are missing",
        "same": "all samples have the same value",
    }
    assert "file (every sample" in report.findings[-1]
    assert set(report.frame["column"]) <= {"target", "place", "noise 0", "age"}


def test_no_metadata_is_an_audit_of_classes():
    report = audited(planted(200)[["target", "prediction"]])
    assert set(report.frame["column"]) == {"target"}
    assert report.worst(1)["count"].iloc[0] > 50


def test_metadata_is_joined_by_id_in_any_order():
    frame = planted(300, 0.5, columns=1).assign(file=[f"{i}.png" for i in range(300)])
    meta = frame[["file", "place"]].sample(frac=1, random_state=0)
    joined = audited(frame.drop(columns="place"), metadata=meta, id="file")
    plain = audited(frame, id="file")
    pd.testing.assert_frame_equal(
        joined.frame[joined.frame["column"] == "place"].reset_index(drop=True)[["value", "count", "estimate"]],
        plain.frame[(plain.frame["column"] == "place") & plain.frame["and_column"].isna()].reset_index(drop=True)[
            ["value", "count", "estimate"]
        ],
    )


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_predictions_come_from_scores_where_there_are_none(kind):
    frame = planted(200, columns=0)
    own = frame.assign(
        score=frame["prediction"] * 0.8 + 0.1 if kind == "probabilities" else 8 * frame["prediction"] - 4
    )
    assert audited(own.drop(columns="prediction"), scores=kind).overall == audited(frame).overall
    both = frame.drop(columns="prediction").assign(score_0=-frame["prediction"], score_1=0.0 - 0.5)
    assert audited(both, scores="logits").overall == audited(frame).overall


def test_whole_numbers_in_floats_are_class_ids():
    frame = planted(100, columns=0)
    assert audited(frame.astype({"target": float})).classes == ("0", "1")


def test_many_categories_and_dates():
    frame = planted(400, columns=0)
    frame["city"] = [f"c{min(i % 80, 60)}" for i in range(400)]
    frame["day"] = pd.date_range("2020-01-01", periods=200).repeat(2)
    report = audited(frame, max_values=10)
    assert report.sizes["city"]["values"] == 10
    assert "(other)" in set(report.frame["value"])
    assert report.sizes["day"]["values"] == 4
