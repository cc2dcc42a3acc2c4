"""The selection experiment: its statistics against SciPy and brute force, and one run in small."""

from __future__ import annotations

import contextlib
import csv
import io
import os

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from debias.cli import main, make_parser
from debias.cli import shift_selection as experiment
from debias.cli.shift_selection import (
    GRID,
    Setting,
    Trained,
    bootstrap,
    collect,
    compare,
    conclusions,
    rank_correlation,
)
from debias.errors import DebiasError
from debias.ops.shifts import FAMILIES, FOLDS

SMALL = [Setting("mlp", 1e-2, 0.0, False), Setting("mlp", 1e-3, 0.0, False), Setting("cnn", 3e-3, 0.3, True)]


def test_rank_correlation_is_scipys():
    random = np.random.RandomState(0)
    x, y = random.randint(0, 6, (20, 15)), random.rand(20, 15)
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(rank_correlation(x, y), expected, atol=1e-12)
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5)))


def test_bootstrap_intervals(monkeypatch):
    """Resamples of settings, the same for both scores, spelled out."""
    monkeypatch.setattr(experiment, "RESAMPLES", 300)
    random = np.random.RandomState(1)
    real = random.rand(12)
    plain, shift = random.rand(12), real + 0.2 * random.rand(12)
    found = bootstrap(plain, shift, real, seed=5)
    draws, values = np.random.RandomState(5).randint(0, 12, (300, 12)), {"plain": [], "shift": []}
    for rows in draws:
        for name, score in (("plain", plain), ("shift", shift)):
            values[name].append(spearmanr(score[rows], real[rows]).statistic)
    values["difference"] = np.subtract(values["shift"], values["plain"])
    for name, sample in values.items():
        np.testing.assert_allclose(found[name][1:], np.percentile(sample, [2.5, 97.5]), atol=1e-9)
    assert found["shift"][0] == pytest.approx(spearmanr(shift, real).statistic)
    assert found["difference"][0] == pytest.approx(found["shift"][0] - found["plain"][0])


def trained(setting, fold, *, seed=0, plain=0.5, first=0.2, second=0.4, real=0.3):
    shifted = dict.fromkeys(FOLDS["first"], first) | dict.fromkeys(FOLDS["second"], second)
    return Trained(setting, seed, fold, plain, shifted, {"other": real}, 1.0)


def test_the_score_is_of_families_that_were_not_trained_on_and_the_rest_of_the_final_run():
    plain, augmented = SMALL[0], SMALL[2]
    points = collect(
        [
            trained(plain, "none", plain=0.9, first=0.6, second=0.8, real=0.7),
            trained(augmented, "first", plain=0.1, first=1.0, second=0.4, real=0.0),
            trained(augmented, "second", plain=0.1, first=0.2, second=1.0, real=0.0),
            trained(augmented, "all", plain=0.8, first=1.0, second=1.0, real=0.6),
        ]
    )
    assert [p["setting"] for p in points] == [plain, augmented]
    assert [p["plain"] for p in points] == [0.9, 0.8]
    assert [p["shift"] for p in points] == pytest.approx([0.7, 0.3])
    assert [p["real"]["other"] for p in points] == [0.7, 0.6]


def points(plain, shift, real):
    settings = [Setting("mlp", 10.0**-i, 0.0, False) for i in range(len(real))]
    rows = zip(settings, plain, shift, real, strict=True)
    return [{"setting": s, "plain": a, "shift": b, "real": {"other": c}} for s, a, b, c in rows]


@pytest.mark.parametrize(
    ("plain", "shift", "verdict"),
    [
        (lambda r: -r, lambda r: r, "the crafted shifts rank the settings better"),
        (lambda r: r, lambda r: -r, "plain validation ranks the settings better"),
        (lambda r: np.sin(1e3 * r), lambda r: np.cos(1e3 * r), "no difference between the two scores is resolved"),
    ],
)
def test_a_null_result_is_called_one(plain, shift, verdict):
    real = np.random.RandomState(0).rand(12)
    made = points(plain(real), shift(real), real)
    results = compare(made, "other")
    assert [r["settings"] for r in results] == ["all", "plain training"]
    assert verdict in conclusions(results)[0]
    chosen = made[int(np.argmax(shift(real)))]["real"]["other"]
    assert results[0]["real_accuracy_chosen_by_shift"] == pytest.approx(chosen)
    assert results[0]["best_real_accuracy"] == real.max()


def test_the_grid_has_more_than_twenty_settings():
    assert len(set(GRID)) == 24
    assert sum(setting.augmented for setting in GRID) == 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three settings and one epoch: the folder, what was printed, and the process before and after."""
    out, printed = tmp_path_factory.mktemp("selection"), io.StringIO()
    before = torch.get_rng_state(), torch.get_num_threads(), sorted(os.listdir())
    with contextlib.redirect_stdout(printed):
        experiment.run(out, epochs=1, grid=SMALL)
    return out, printed.getvalue(), before, (torch.get_rng_state(), torch.get_num_threads(), sorted(os.listdir()))


def test_one_command_makes_tables_and_figure(small):
    out, text, before, after = small
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trained_on"] for row in rows] == ["none", "none", "first", "second", "all"]
    assert {f"val_shift/{family}" for family in FAMILIES} | {"real/other writers", "val"} <= set(rows[0])
    assert all(0 <= float(row["real/other writers"]) <= 1 for row in rows)
    with (out / "correlations.csv").open() as file:
        (result,) = csv.DictReader(file)
    assert (result["real_shift"], result["number"]) == ("other writers", "3")
    assert (out / "scatter.png").read_bytes().startswith(b"\x89PNG")
    words = " ".join(text.split())
    for phrase in ("Accuracy of each setting", "rank correlation", "other writers, all (3):", "interval"):
        assert phrase in words
    assert before[1:] == after[1:]
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize(
    "options", [{"seeds": []}, {"seeds": [-1]}, {"epochs": 0}, {"grid": GRID[:2]}], ids=lambda o: next(iter(o))
)
def test_refuses(options, tmp_path):
    with pytest.raises(DebiasError, match="seeds >= 0, at least one epoch and at least 3 settings"):
        experiment.run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    options = make_parser().parse_args(["shift-selection", "--mnist", "mnist.npz", "--seeds", "1", "2"])
    assert (options.mnist, options.seeds, options.source) == ("mnist.npz", [1, 2], "digits")
    with pytest.raises(SystemExit):
        main(["shift-selection", "--mnist", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out")])
    assert "none.npz failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
