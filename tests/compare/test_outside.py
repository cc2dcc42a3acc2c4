"""The table of one comparison, made by one command, against clocks and predictions that are none of ours."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.forked import Forked

ROOT = Path(__file__).parents[2]
COUNTS = (360, 40, 40, 360)
SLEEP = 0.01
GROUPS = range(4)
# The backbone is frozen: an adversary on its features is plain training.
MODULE = """
import json, os, time
import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from debias import tag

class Birds(L.LightningDataModule):
    def __init__(self, n_groups: int = 4, n_domains: int = 2, seed: int = 0):
        super().__init__()
        self.seed = seed

    def setup(self, stage=None):
        random = torch.Generator().manual_seed(self.seed)
        sizes = COUNTS, (50,) * 4, (70, 60, 50, 40)
        self.train_set, self.val_set, self.test_set = (self.draw(each, random) for each in sizes)

    def draw(self, sizes, random):
        group = torch.arange(4).repeat_interleave(torch.tensor(sizes))
        label, place = group // 2, group % 2
        x = torch.randn(len(group), 3, generator=random)
        x[:, 0] += 1.5 * label
        x[:, 1] += 3 * place
        order = torch.randperm(len(group), generator=random)
        x, label, group = x[order], label[order], group[order]
        return tag(TensorDataset(x, label), group=group, domain=torch.arange(len(group)) % 2)

    def train_dataloader(self):
        return DataLoader(self.train_set, 64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, 64)

    def test_dataloader(self):
        return DataLoader(self.test_set, 64)

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 8).requires_grad_(False), nn.Linear(8, 2)
        self.steps = []

    def loss(self, batch):
        x, y = batch
        return cross_entropy(self.head(self.backbone(x).relu()), y)

    def training_step(self, batch, batch_idx):
        begin = time.perf_counter()
        time.sleep(SLEEP * (1 + 2 * (self.current_epoch == 0)))
        loss = self.loss(batch)
        self.steps.append([self.current_epoch, begin, time.perf_counter()])
        return loss

    def on_train_end(self):
        with open(os.path.join(self.trainer.default_root_dir, "clock.json"), "w") as file:
            json.dump(self.steps, file)

    def validation_step(self, batch, batch_idx):
        self.loss(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=0.01)
"""
BASE = f"""
seed_everything: 0
data:
  class_path: outside_birds.Birds
  init_args: {{n_groups: 4, n_domains: 2, seed: "${{seed_everything}}"}}
model: {{class_path: outside_birds.Net}}
trainer:
  max_epochs: 3
  accelerator: cpu
  log_every_n_steps: 5
  callbacks:
    - class_path: debias.GroupMonitor
      init_args: {{group: group, n_groups: 4, train_counts: {list(COUNTS)}}}
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """ERM and DANN on two seeds; the folder, and each line that was said with the time when it was."""
    cwd = tmp_path_factory.mktemp("outside")
    (cwd / "outside_birds.py").write_text(f"COUNTS, SLEEP = {COUNTS}, {SLEEP}\n" + textwrap.dedent(MODULE))
    (cwd / "birds").mkdir()
    (cwd / "birds" / "base.yaml").write_text(BASE)
    words = ["./birds", "--methods", "dann", "--seeds", "0", "1", "--out", "out", "--select", "val_worst_group"]
    with Forked(
        [sys.executable, "-m", "debias", "compare", *words],
        cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = [(time.monotonic(), line.rstrip()) for line in process.stdout]
    assert process.returncode == 0, said
    return cwd, said


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def chosen(cwd, method, seed):
    run = cwd / "out" / "runs" / f"{method}-seed{seed}"
    return run, json.loads((run / "result.json").read_text())["candidates"]["val_worst_group"]


def hits(cwd, monkeypatch, method, seed):
    """Right guesses and groups on the test set, from the chosen checkpoint's weights alone."""
    monkeypatch.syspath_prepend(str(cwd))
    from outside_birds import Birds

    run, candidate = chosen(cwd, method, seed)
    weights = torch.load(run / candidate["checkpoint"], weights_only=False)["state_dict"]
    data = Birds(seed=seed)
    data.setup()
    x, y = data.test_set.dataset.tensors
    features = (x @ weights["backbone.weight"].T + weights["backbone.bias"]).relu()
    logits = features @ weights["head.weight"].T + weights["head.bias"]
    return (logits.argmax(1) == y).numpy(), data.test_set.tags["group"].numpy()


def test_accuracies_are_those_of_the_weights(compared, monkeypatch):
    cwd, _ = compared
    table = {row["method"]: row for row in read(cwd / "out" / "table.csv")}
    assert set(table) == {"erm", "dann"}
    for method, row in table.items():
        right = [hits(cwd, monkeypatch, method, seed) for seed in (0, 1)]
        by_group = np.array([[hit[group == g].mean() for g in GROUPS] for hit, group in right])
        expected = {
            "average": np.array([hit.mean() for hit, _ in right]),
            "adjusted_average": by_group @ np.array(COUNTS) / sum(COUNTS),
            "worst_group": by_group.min(1),
            **{f"group/{g}": by_group[:, g] for g in GROUPS},
        }
        expected["gap"] = expected["average"] - expected["worst_group"]
        for name, values in expected.items():
            assert float(row[f"{name}_mean"]) == pytest.approx(values.mean(), abs=1e-6), name
            assert float(row[f"{name}_std"]) == pytest.approx(values.std(ddof=1), abs=1e-6), name
        assert abs(expected["average"] - expected["adjusted_average"]).min() > 0.01  # they are two numbers


def test_times_are_those_of_a_clock_outside(compared):
    cwd, said = compared
    for row in read(cwd / "out" / "table.csv"):
        outside = []
        for seed in (0, 1):
            steps = json.loads((chosen(cwd, row["method"], seed)[0] / "clock.json").read_text())
            spans = [[(a, b) for epoch, a, b in steps if epoch == e] for e in (1, 2)]  # without the first, slow epoch
            outside.append(sum(span[-1][1] - span[0][0] for span in spans) / sum(map(len, spans)))
        assert float(row["seconds_per_step_mean"]) >= SLEEP
        assert float(row["seconds_per_step_mean"]) == pytest.approx(np.mean(outside), rel=0.25)
    started = {line.split()[-2]: at for at, line in said if line.endswith(" started")}
    finished = {line.split(" finished in ")[0].split()[-1]: (at, line) for at, line in said if " finished in " in line}
    assert list(started) == list(finished) == ["erm-seed0", "dann-seed0", "erm-seed1", "dann-seed1"]
    for name, (at, line) in finished.items():
        seconds = float(re.search(r"finished in (\d+) s", line)[1])
        assert 0.7 * (at - started[name]) - 0.5 <= seconds <= at - started[name] + 1


def test_a_dead_adversary_is_said_under_the_table(compared):
    cwd, said = compared
    told = "Warning of dann, 2 of 2 runs: DomainAdversarial(domain) reaches no trainable parameter"
    page = (cwd / "out" / "report.md").read_text()
    assert told in page[page.index("## Notes") :]
    lines = [line for _, line in said]
    table = next(i for i, line in enumerate(lines) if "birds: test accuracy in %" in line)
    assert told in " ".join(line.strip() for line in lines[table:])
    (row,) = [row for row in read(cwd / "out" / "table.csv") if row["method"] == "dann"]
    assert float(row["worst_group_to_erm_mean"]) == 0  # which is what it is about
    assert "Adjusted: mean over groups" in " ".join(line.strip() for line in lines[table:])


def test_the_log_of_a_run_has_its_epochs(compared):
    cwd, _ = compared
    for run in (cwd / "out" / "runs").iterdir():
        log = (run / "log.txt").read_text()
        assert [int(n) for n in re.findall(r"^Epoch (\d)/3: step \d+, ", log, re.MULTILINE)] == [1, 2, 3]
