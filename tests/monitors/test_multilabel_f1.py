"""What the monitor logs against scikit-learn, and the threshold's way from validation to test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _support.f1_oracle import f1
from _support.fits import Classifier, make_trainer
from _support.runs import ddp
from debias import EvalSampler, MultilabelF1Monitor, tag
from debias.errors import DebiasError, LossNotFoundError, RowsError

NAMES = ["AU1", "AU2", "AU4"]


def data(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    y = (x[:, :3] + torch.randn(n, 3, generator=g, dtype=torch.float64) > 0.7).float()
    y[torch.rand(n, 3, generator=g) < 0.2] = -1
    return tag(TensorDataset(x, y), person=torch.arange(n) % 4 - (torch.arange(n) % 8 == 7).long() * 4)


class Labels(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3).double()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        known = (y >= 0).double()
        losses = F.binary_cross_entropy_with_logits(self(x), y.clamp_min(0).double(), reduction="none")
        return (losses * known).sum() / known.sum()

    training_step = validation_step

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


def loaders(seed=0):
    return DataLoader(data(seed=seed), batch_size=8, sampler=EvalSampler(data(seed=seed)))


def test_the_threshold_is_chosen_in_validation_and_used_at_test(tmp_path):
    model, monitor = Labels(), MultilabelF1Monitor(NAMES, group="person", n_groups=4)
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(model, loaders(2), loaders(0))
    validation = {k: float(v) for k, v in trainer.callback_metrics.items()}
    with torch.no_grad():
        scores, test_scores = (model(data(seed=s).dataset.tensors[0]).sigmoid().float() for s in (0, 1))
    targets, test_targets = (data(seed=s).dataset.tensors[1] for s in (0, 1))
    means = [f1(scores, targets, t / 100).nanmean() for t in (torch.arange(1, 100))]
    best = int(torch.stack(means).argmax())
    assert validation["val/threshold"] == pytest.approx((best + 1) / 100)
    assert validation["val/f1"] == pytest.approx(float(means[best]))
    checkpoint = {"state": monitor.state_dict()}
    torch.save(checkpoint, tmp_path / "state.pt")

    other = MultilabelF1Monitor(NAMES, group="person", n_groups=4)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["state"])
    (tested,) = make_trainer([other]).test(model, loaders(1), verbose=False)
    expected = f1(test_scores, test_targets, torch.tensor((best + 1) / 100))
    assert [tested[f"test/f1_by_label/{name}"] for name in NAMES] == pytest.approx(expected.tolist())
    assert tested["test/threshold"] == pytest.approx((best + 1) / 100)
    people = data(seed=1).tags["person"]
    groups = [f1(test_scores[people == k], test_targets[people == k], (best + 1) / 100).nanmean() for k in range(4)]
    assert [tested[f"test/f1_by_group/{k}"] for k in range(4)] == pytest.approx([float(v) for v in groups], nan_ok=True)
    assert tested["test/worst_group_f1"] == pytest.approx(min(float(v) for v in groups if v == v))


def test_without_a_validation_the_threshold_is_a_half():
    (tested,) = make_trainer([MultilabelF1Monitor(NAMES)]).test(Labels(), loaders(1), verbose=False)
    assert tested["test/threshold"] == 0.5
    assert "test/worst_group_f1" not in tested


@pytest.mark.parametrize(("thresholds", "expected"), [(3, 1 / 2), (2, 1 / 3), (4, 2 / 5)])
def test_without_a_validation_an_even_number_of_thresholds_has_the_one_below_a_half(thresholds, expected):
    trainer = make_trainer([MultilabelF1Monitor(NAMES, thresholds=thresholds)])
    (tested,) = trainer.test(Labels(), loaders(1), verbose=False)
    assert tested["test/threshold"] == pytest.approx(expected)


class Unlabelled(Labels):
    def validation_step(self, batch, batch_idx):
        F.binary_cross_entropy_with_logits(self(batch[0]), torch.zeros(len(batch[0]), 3).double())


def unlabelled():
    dataset = tag(TensorDataset(torch.randn(8, 4).double(), torch.full((8, 3), -1.0)), person=[0] * 8)
    return DataLoader(dataset, batch_size=4, sampler=EvalSampler(dataset))


@pytest.mark.parametrize("chosen", [None, 7])
def test_a_validation_without_a_label_chooses_no_threshold(chosen):
    monitor = MultilabelF1Monitor(NAMES, group="person", n_groups=4)
    monitor.load_state_dict({"chosen": chosen})
    (found,) = make_trainer([monitor]).validate(Unlabelled(), unlabelled(), verbose=False)
    assert monitor.state_dict() == {"chosen": chosen}
    assert found["val/threshold"] == pytest.approx(0.5 if chosen is None else 0.08)
    assert math.isnan(found["val/f1"])
    assert math.isnan(found["val/worst_group_f1"])


def test_two_ranks_are_one_process(ranks):
    runs = ranks.run(_validate, 2)
    assert runs[0] == pytest.approx(_validate(0, 1), abs=0)
    assert runs[1] == runs[0]


def _validate(rank, devices):
    options = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False} if devices == 2 else {}
    trainer = make_trainer([MultilabelF1Monitor(NAMES, group="person", n_groups=4)], **options)
    trainer.validate(Labels(), loaders(), verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if "f1" in k or "threshold" in k}


class Sorted(Labels):
    def validation_step(self, batch, batch_idx):
        order = batch[0][:, 0].argsort()
        return super().validation_step([part[order] for part in batch], batch_idx)


@pytest.mark.parametrize("options", [{}, {"group": "person", "n_groups": 4}])
def test_a_step_that_puts_samples_in_another_order(options):
    expected, found = (
        make_trainer([MultilabelF1Monitor(NAMES, **options)]).validate(model, loaders(), verbose=False)[0]
        for model in (Labels(), Sorted())
    )
    assert found == pytest.approx(expected, nan_ok=True)


def test_what_is_refused():
    with pytest.raises(RowsError, match=r"shape \(N, 2\), one column per name .* \(8, 3\)"):
        make_trainer([MultilabelF1Monitor(["a", "b"])]).validate(Labels(), loaders(), verbose=False)
    with pytest.raises(LossNotFoundError, match=r"one binary cross-entropy .*\['cross_entropy'\]"):
        make_trainer([MultilabelF1Monitor(NAMES)]).validate(
            Classifier(),
            DataLoader(tag(TensorDataset(torch.randn(8, 4).double(), torch.arange(8) % 2), person=[0] * 8)),
            verbose=False,
        )  # fmt: skip
    with pytest.raises(DebiasError, match="`label_names` to be different names"):
        MultilabelF1Monitor(["a", "a"])
    with pytest.raises(DebiasError, match="`thresholds` to be an integer >= 1"):
        MultilabelF1Monitor(["a"], thresholds=0)
