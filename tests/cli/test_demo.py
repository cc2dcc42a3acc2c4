"""The demo: what it prints and writes, its numbers computed again from the checkpoints, and its claim."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from _support.forked import run
from debias.cli import demo
from debias.data import ColoredDigits
from debias.errors import DebiasError
from debias.models.classifier import Classifier

GROUPS = ["digit 0-4 red", "digit 0-4 green", "digit 5-9 red", "digit 5-9 green"]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def state_of_the_process():
    return {
        "files": sorted(os.listdir()),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("PL_")},
        "threads": torch.get_num_threads(),
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """One seed and two epochs of the demo: its folder, what it printed, and the process before and after."""
    out, here, printed = tmp_path_factory.mktemp("demo"), os.getcwd(), io.StringIO()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    try:
        before = state_of_the_process()
        with contextlib.redirect_stdout(printed):
            demo.run(seeds=[3], out=out, max_epochs=2)
        after = state_of_the_process()
    finally:
        os.chdir(here)
    return out, printed.getvalue(), before, after


def test_table(short):
    _, text, _, _ = short
    for method in demo.METHODS:
        assert f"\n{method} " in text
    words = " ".join(text.split())
    for phrase in ("average worst group", "Chance is 50 %", "75 %", "validation set", "Wilson", "seed 3"):
        assert phrase in words
    sizes = torch.bincount(test_set(3).tags["group"]).tolist()
    assert " ".join(["samples", "3", str(sum(sizes)), *map(str, sizes)]) in words
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 80  # a plain terminal shows the table unbroken


def test_nothing_but_the_table_is_printed(short, tmp_path):
    code = "import sys; from pathlib import Path; from debias.cli.demo import run; run([0], Path(sys.argv[1]), 1)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "GPU" not in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "results.csv", "results.png"]


def test_leaves_the_process_as_it_was(short):
    _, _, before, after = short
    assert before == after


def test_files(short):
    out, text, _, _ = short
    rows = read(out / "results.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [(method, "3") for method in demo.METHODS]
    for name in GROUPS:
        assert {f"accuracy/{name}", f"samples/{name}", f"training_samples/{name}"} <= set(rows[0])
    assert rows[0]["version/torch"] == torch.__version__.split("+")[0]
    assert {"version/python", "version/debias", "version/lightning", "version/scikit-learn"} <= set(rows[0])
    assert all(float(row["seconds"]) > 0 and 1 <= int(row["checkpoint_epoch"]) <= 2 for row in rows)
    figure = (out / "results.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 20_000
    assert str(out / "results.csv") in text
    assert str(out / "results.png") in text


def test_set(seed):
    data = ColoredDigits(seed=seed)
    data.setup()
    return data.test_set


test_set.__test__ = False


@pytest.mark.parametrize("method", demo.METHODS)
def test_numbers_are_those_of_the_checkpoint(short, method):
    out, text, _, _ = short
    (row,) = [row for row in read(out / "results.csv") if row["method"] == method]
    path = out / "checkpoints" / f"{method.lower().replace(' ', '-')}-seed3.ckpt"
    model = Classifier("mlp", in_channels=2, image_size=8)
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    test = test_set(3)
    x, y = (torch.stack([torch.as_tensor(test[i].sample[k]) for i in range(len(test))]) for k in (0, 1))
    group = np.array([int(test[i].tags["group"]) for i in range(len(test))])
    with torch.no_grad():
        right = (model(x).argmax(1) == y).numpy()
    by_group = [right[group == g].mean() for g in range(4)]
    assert float(row["average_accuracy"]) == pytest.approx(right.mean(), abs=1e-12)
    assert float(row["worst_group_accuracy"]) == pytest.approx(min(by_group), abs=1e-12)
    assert row["worst_group"] == GROUPS[int(np.argmin(by_group))]
    for g, name in enumerate(GROUPS):
        assert float(row[f"accuracy/{name}"]) == pytest.approx(by_group[g], abs=1e-12)
        assert int(row[f"samples/{name}"]) == (group == g).sum()
    assert f"{100 * min(by_group):.1f} [" in text


def test_interval_agrees_with_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for hits, size in ((0, 12), (12, 12), (3, 35), (170, 340)):
        expected = binomtest(hits, size).proportion_ci(method="wilson")
        assert demo.wilson_interval(hits, size) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "`seeds` to be one or more integers >= 0, but got \\[\\]"),
        ({"seeds": [-1]}, "`seeds` .* got \\[-1\\]"),
        ({"seeds": [0], "max_epochs": 0}, "`max_epochs` to be at least 1, but got 0"),
    ],
)
def test_refuses(arguments, message, tmp_path):
    with pytest.raises(DebiasError, match=message):
        demo.run(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_a_missing_package_is_named(package):
    # Lightning and torchmetrics look for both themselves, so they come first.
    code = (
        "import sys, lightning, torchmetrics\n"
        f"for name in [{package!r}, *sys.modules]:\n"
        f"    if name.split('.')[0] == {package!r}: sys.modules[name] = None\n"
        "from debias.cli import main; main(['demo'])"
    )
    done = run([sys.executable, "-c", code], timeout=200)
    assert done.returncode == 1
    assert "pip install 'lightning-debias[recipes]'" in done.stderr
    assert package in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_group_dro_is_thirty_points_above_erm_on_every_seed(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        demo.run(seeds=[0, 1, 2], out=tmp_path)
    worst = {(row["method"], row["seed"]): float(row["worst_group_accuracy"]) for row in read(tmp_path / "results.csv")}
    assert len(worst) == 9
    for seed in ("0", "1", "2"):
        assert worst["GroupDRO", seed] >= worst["ERM", seed] + 0.3
        assert worst["balanced ERM", seed] > worst["ERM", seed]
