"""Two models on the same samples: McNemar, bootstrap, and what the page says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from _support.planted import planted
from debias.audit import compare_predictions
from debias.cli import main
from debias.errors import DebiasError

QUIET = {"progress": False, "resamples": 100, "slices": 0}


def pair(n=1200):
    before = planted(n, 0.5, columns=1)
    after = before.copy()
    random = np.random.default_rng(1)
    better = (before["target"] != before["prediction"]) & (random.random(n) < 0.6)
    after.loc[better, "prediction"] = before["target"][better]
    worse = (before["target"] == before["prediction"]) & (random.random(n) < 0.03)
    after.loc[worse, "prediction"] = 1 - before["target"][worse]
    return before, after


def test_changes_are_paired_and_counted():
    before, after = pair()
    report = compare_predictions(before, after, **QUIET)
    changes = report.tables["changes"].set_index("group")
    right = [frame["target"] == frame["prediction"] for frame in (before, after)]
    for name, mask in (("all", before["age"] < 1e9), ("place = land", before["place"] == "land")):
        row = changes.loc[name]
        up, down = (right[1] & ~right[0])[mask].sum(), (right[0] & ~right[1])[mask].sum()
        assert (row["better"], row["worse"]) == (up, down)
        assert row["p_value"] == pytest.approx(stats.binomtest(int(up), int(up + down)).pvalue)
        assert row["change"] == pytest.approx(right[1][mask].mean() - right[0][mask].mean())
        theirs = stats.bootstrap(
            ((right[1].astype(int) - right[0])[mask].to_numpy(),), np.mean, method="percentile", rng=0, n_resamples=2000
        ).confidence_interval
        np.testing.assert_allclose((row["low"], row["high"]), theirs, atol=0.02)
    assert changes.index[0] == "all"
    assert report.findings[0].startswith("Before, accuracy was")
    assert "better" in report.findings[0]
    assert any("Most helped" in sentence for sentence in report.findings)
    pulls = report.tables["pulls"].set_index("column").loc["place"]
    assert abs(pulls["lean_after"]) < abs(pulls["lean_before"])


def test_no_change_is_said():
    before, _ = pair(300)
    report = compare_predictions(before, before, **QUIET)
    assert "no change beyond noise" in report.findings[0]
    assert not report.tables["changes"]["significant"].any()
    assert (report.tables["changes"]["p_value"] == 1).all()


def test_with_noise_alone_changes_are_rare():
    alarms = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        before = planted(400, seed=seed, columns=2)
        after = before.copy()
        flip = random.random(400) < 0.1
        after["prediction"] = np.where(flip, random.integers(0, 2, 400), before["prediction"])
        before["prediction"] = np.where(random.random(400) < 0.1, random.integers(0, 2, 400), before["prediction"])
        alarms += compare_predictions(before, after, **QUIET).tables["changes"]["significant"].any()
    assert alarms <= 3


def test_a_regression_is_compared_by_ranks():
    random = np.random.default_rng(0)
    y = random.normal(size=200)
    before = pd.DataFrame({"target": y, "prediction": y + random.normal(0, 1, 200), "place": ["a", "b"] * 100})
    after = before.assign(prediction=y + 0.5 * (before["prediction"] - y))
    report = compare_predictions(before, after, **QUIET)
    row = report.tables["changes"].iloc[0]
    assert row["change"] < 0
    assert row["significant"]
    assert "better (200 of 200" in report.findings[0]


def test_ids_bring_the_rows_together():
    before, after = (frame.assign(file=[f"{i}.png" for i in range(300)]) for frame in pair(300))
    plain = compare_predictions(before, after, id="file", **QUIET)
    shuffled = compare_predictions(before.sample(frac=1, random_state=0), after, id="file", **QUIET)
    pd.testing.assert_frame_equal(plain.tables["changes"], shuffled.tables["changes"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.iloc[:-1], {}, "the same samples in the same order"),
        (lambda f: f.iloc[::-1], {}, "the same samples in the same order"),
        (lambda f: f.assign(file=range(1, 301)), {"id": "file"}, "2 are in one of them alone"),
        (lambda f: f.drop(columns="file"), {"id": "file"}, "a column of `after`"),
    ],
)
def test_other_samples_are_refused(change, options, message):
    before, after = (frame.assign(file=range(300)) for frame in pair(300))
    with pytest.raises(DebiasError, match=message):
        compare_predictions(before, change(after), **options, **QUIET)


def test_the_command_compares_two_tables(tmp_path, capsys):
    for name, frame in zip(("a", "b"), pair(400), strict=True):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    words = ["--compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--out", str(tmp_path / "audit")]
    main(["audit", *words])
    assert "- Before, accuracy was" in capsys.readouterr().out
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert page.index("What helped?") < page.index("Whom does it hurt?")
    assert (tmp_path / "audit" / "changes.csv").exists()
