"""mAP of groups: torchmetrics' on the same images, with intervals; a detector is audited from its own step."""

from __future__ import annotations

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision

import debias
from debias.audit.columns import Column
from debias.audit.detection import map_table
from debias.audit.samples import Samples

pytest.importorskip("pycocotools")
N = 48


def scene(i):
    """Two true boxes of an image, and what a detector says: on dark images it misses one of them and is off."""
    g = torch.Generator().manual_seed(i)
    corner = 50 * torch.rand(2, 2, generator=g)
    true = torch.cat([corner, corner + 10 + 20 * torch.rand(2, 2, generator=g)], 1)
    dark = i % 3 == 0
    guess = true + torch.randn(2, 4, generator=g) * (2.5 if dark else 0.5)
    guess = torch.cat([guess[:1] if dark else guess, torch.tensor([[70.0, 70.0, 90.0, 95.0]])])
    labels = torch.tensor([1, 2])
    scores = torch.rand(len(guess), generator=g) * 0.4 + 0.55
    predicted = {"boxes": guess, "scores": scores, "labels": torch.cat([labels, labels])[: len(guess)]}
    return predicted, {"boxes": true, "labels": labels}


BOXES = [scene(i) for i in range(N)]
LIGHT = np.array(["dark" if i % 3 == 0 else "bright" for i in range(N)])


def test_map_of_groups_is_that_of_torchmetrics():
    column = Column("light", ("bright", "dark"), (LIGHT == "dark").astype(int))
    empty = pd.DataFrame(index=range(N))
    samples = Samples("detection", None, None, (), None, "", np.ones(N), True, empty, columns=[column])
    table = map_table(samples, BOXES, confidence=0.95, resamples=40, seed=0).set_index("value")
    for value in ("all", "bright", "dark"):
        metric = MeanAveragePrecision()
        for i in range(N):
            if value in ("all", LIGHT[i]):
                metric.update([BOXES[i][0]], [BOXES[i][1]])
        theirs = metric.compute()
        assert table.loc[value, "map"] == pytest.approx(float(theirs["map"]), abs=1e-6)
        assert table.loc[value, "map_50"] == pytest.approx(float(theirs["map_50"]), abs=1e-6)
        assert table.loc[value, "low"] < table.loc[value, "map"] < table.loc[value, "high"]
    assert table.loc["dark", "map"] < table.loc["bright", "low"]
    assert table["boxes"].tolist() == [2 * N, 2 * (LIGHT == "bright").sum(), 2 * (LIGHT == "dark").sum()]


def test_a_group_without_boxes_is_nan():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    column = Column("kind", ("a", "b"), np.array([0, 1]))
    samples = Samples("detection", None, None, (), None, "", np.ones(2), True, pd.DataFrame(), columns=[column])
    table = map_table(samples, [BOXES[1], (nothing, nothing)], confidence=0.95, resamples=20, seed=0)
    assert np.isnan(table.set_index("value").loc["b", "map"])


class Detector(L.LightningModule):
    def forward(self, images):
        return [BOXES[int(image[0, 0, 0])][0] for image in images]

    def test_step(self, batch, batch_idx):
        self(batch[0])


def collate(items):
    return [image for image, _ in items], [target for _, target in items]


def test_a_detector_is_audited(tmp_path):
    data = [(torch.full((3, 4, 4), float(i)), BOXES[i][1]) for i in range(N)]
    frame = pd.DataFrame({"light": LIGHT})
    loader = DataLoader(data, 8, collate_fn=collate, shuffle=True)
    report = debias.audit(Detector(), loader, metadata=frame, progress=False, min_count=10, resamples=20)
    assert report.task == "detection"
    worst = report.worst(1).iloc[0]
    assert (worst["column"], worst["value"], worst["significant"]) == ("light", "dark", True)
    assert report.tables["map"].set_index("value").loc["dark", "count"] == 16
    assert "DomainPenalisation" in report.advice[0].code
    assert any("lowest for light = dark" in sentence for sentence in report.findings)
    assert "shortcuts" not in report.tables
    assert "Mean average precision" in report.to_html(tmp_path / "a.html").read_text()
