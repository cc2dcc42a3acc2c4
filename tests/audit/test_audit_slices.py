"""Slices: a planted one is found, described and stable; where errors are noise, alarms are as rare as promised."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils.data import DataLoader, Dataset

import debias
from debias.audit.columns import Column
from debias.audit.samples import Samples
from debias.audit.slices import error_mixture, slice_table


def samples(planted, seed=0, n=1600):
    """Four blobs of features; in one of them a third of the predictions are wrong, if planted, and nobody names it."""
    random = np.random.default_rng(seed)
    blob = random.integers(0, 4, n)
    x = np.eye(4, 12)[blob] * 6 + random.normal(size=(n, 12))
    y = random.integers(0, 2, n)
    wrong = random.random(n) < np.where((blob == 2) & planted, 0.35, 0.05)
    z = np.where(wrong, 1 - y, y)
    hint = np.where(random.random(n) < 0.8, blob == 2, random.integers(0, 2, n)).astype(int)
    columns = [Column("noise", ("a", "b"), random.integers(0, 2, n)), Column("hint", ("no", "yes"), hint)]
    return Samples(
        "classification", y, z, ("0", "1"), None, "accuracy", y == z, True, pd.DataFrame(),
        columns=columns, features={"layer": x.astype(np.float32)},
    ), blob  # fmt: skip


def found(planted, seed=0, slices=4, **options):
    one, blob = samples(planted, seed)
    settings = {"min_count": 20, "alpha": 0.05, "confidence": 0.95, "seed": seed} | options
    return slice_table(one, slices=slices, **settings), blob


def test_a_planted_slice_is_found_described_and_stable():
    table, blob = found(True)
    for kind, part in table.groupby("kind"):
        top = part.iloc[0]
        assert top["significant"], kind
        assert top["low"] <= 0.7, kind
        assert top["rest"] > 0.85
        assert "hint = yes" in top["described_by"]
        assert np.mean(blob[top["examples"]] == 2) > 0.8
        assert 0 < top["stability"] <= 1
    assert set(table["kind"]) == {"mixture", "clusters"}


def test_slices_are_no_alarm_where_errors_are_noise():
    alarms = sum(found(False, seed)[0]["significant"].any() for seed in range(20))
    assert alarms <= 4


def test_what_is_reported_was_not_searched():
    table, _ = found(True, slices=2)
    assert table["count"].sum() <= 2 * 800
    assert table.groupby("kind").size().max() <= 2


def test_without_labels_the_mixture_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    x = np.vstack([random.normal(0, 1, (200, 3)), random.normal(8, 2, (200, 3)), random.normal(-8, 1, (200, 3))])
    one = np.ones((600, 1))
    score = error_mixture(x, one, one, 3)
    own = score(x, one, one).argmax(1)
    theirs = GaussianMixture(3, covariance_type="diag", random_state=0).fit_predict(x)
    assert adjusted_rand_score(own, theirs) == 1
    density = np.logaddexp.reduce(score(x, one, None), axis=1)
    fitted = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x)
    np.testing.assert_allclose(density.mean(), fitted.score(x), rtol=0.02)


def test_errors_come_together_in_the_mixture():
    one, blob = samples(True, n=800)
    classes = np.eye(2)
    score = error_mixture(one.features["layer"].astype(float), classes[one.target], classes[one.prediction], 8)
    codes = score(one.features["layer"].astype(float), classes[one.target], classes[one.prediction]).argmax(1)
    accuracy = [one.quality[codes == i].mean() for i in np.unique(codes)]
    assert min(accuracy) < 0.05
    assert np.mean(blob[codes == np.unique(codes)[int(np.argmin(accuracy))]] == 2) > 0.5


@pytest.mark.parametrize("task", ["regression", "detection"])
def test_without_classes_large_errors_make_the_slices(task):
    one, _ = samples(True)
    error = np.where(one.quality, 0.1, 1.0) + np.random.default_rng(0).random(len(one)) * 0.1
    one.task, one.quality, one.higher_is_better = (
        task,
        error if task == "regression" else 1 - error,
        task == "detection",
    )
    table = slice_table(one, slices=3, min_count=20, alpha=0.05, confidence=0.95, seed=0)
    assert table.iloc[0]["significant"]


def test_metadata_stand_in_for_features_and_few_samples_make_none():
    one, _ = samples(True)
    one.features = {}
    assert len(slice_table(one, slices=2, min_count=20, alpha=0.05, confidence=0.95, seed=0))
    one.columns = []
    assert slice_table(one, slices=2, min_count=20, alpha=0.05, confidence=0.95, seed=0).empty
    assert slice_table(samples(True, n=30)[0], slices=8, min_count=2, alpha=0.05, confidence=0.95, seed=0).empty


class Reports(Dataset):
    """Texts beside their features; those of the second cluster are classified wrong."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.cluster = torch.arange(800) % 5 == 0
        self.y = torch.arange(800) % 2
        self.x = torch.randn(800, 4, generator=generator) * 0.1
        self.x[:, 0] += (2 * self.y - 1) * torch.where(self.cluster, -1, 1)
        self.x[:, 1] += 5.0 * self.cluster

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i], f"<b>report {i}</b> " + "word " * 100


def test_slices_of_texts_show_how_they_begin(tmp_path):
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        model[1].bias.zero_()
    report = debias.audit(model, {"test": DataLoader(Reports(), 50)}, progress=False)
    page = report.to_html(tmp_path / "audit.html").read_text()
    rows = report.tables["slices"]["examples"][0]
    assert rows
    assert all(i % 5 == 0 for i in rows)
    for i in rows:
        assert f"&lt;b&gt;report {i}&lt;/b&gt; word" in page
        assert len(report.examples[i]["text"]) <= 120
    assert "<b>report" not in page
