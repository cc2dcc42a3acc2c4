"""A model and its loaders are audited: as a table of the same predictions is, and with what the features hold."""

from __future__ import annotations

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LinearRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import debias
from _support.runs import ddp
from debias.audit import audit_predictions
from debias.audit.collect import HEAD
from debias.audit.features import Eraser
from debias.errors import DebiasError

N = 240


class Net(L.LightningModule):
    """A fixed network that reads two numbers: the first tells the label, the second the place."""

    def __init__(self, out=2, loss=F.cross_entropy, weight=1.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Identity())
        self.head = nn.Linear(4, out)
        self.loss = loss
        with torch.no_grad():
            self.body[0].weight.copy_(torch.eye(4))
            self.body[0].bias.zero_()
            self.head.weight.zero_()
            self.head.weight[-1, :2] = torch.tensor([1.0, weight])
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.body(x)).squeeze(-1)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/loss", self.loss(self(x), y), sync_dist=True)


def data(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=g)
    place = torch.where(torch.rand(n, generator=g) < 0.75, y, 1 - y)
    x = torch.randn(n, 4, generator=g)
    x[:, 0] += 3.0 * y - 1.5
    x[:, 1] += 5.0 * place - 2.5
    return x, y, place


def loader(x, y, **options):
    return DataLoader(TensorDataset(x, y), batch_size=32, **options)


def audited(model, loaders, **options):
    return debias.audit(model, loaders, progress=False, resamples=20, **options)


def table(model, x, y, place):
    with torch.no_grad():
        z = model.eval()(x)
    return pd.DataFrame({"target": y, "prediction": z.argmax(1), "place": np.array(["land", "water"])[place]})


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_model_is_audited_like_the_table_of_its_predictions(shuffle):
    x, y, place = data()
    model = Net()
    frame = table(model, x, y, place)
    plain = audit_predictions(frame, progress=False, resamples=20)
    report = audited(model, loader(x, y, shuffle=shuffle, drop_last=True), metadata=frame[["place"]])
    pd.testing.assert_frame_equal(report.frame, plain.frame)
    assert report.overall == plain.overall
    assert report.overall["count"] == N


def test_tags_are_columns_and_the_training_set_says_what_goes_with_the_label():
    x, y, place = data()
    test = debias.tag(TensorDataset(x, y), place=place, unknown=torch.full((N,), -1))
    train = debias.tag(TensorDataset(x, y), place=y)
    sets = {"train": DataLoader(train, 16, shuffle=True), "test": DataLoader(test, 16)}
    report = audited(Net(), sets)
    row = report.tables["shortcuts"].set_index("column").loc["place"]
    assert row["train_cramers_v"] == pytest.approx(1)
    assert row["test_cramers_v"] < 0.7
    assert row["value"] == "1"
    assert report.left_out["unknown"] == "all values are missing"


def test_what_the_features_hold_and_what_happens_when_it_is_erased():
    x, y, place = data()
    frame = pd.DataFrame({"place": place.numpy(), "noise": np.random.default_rng(0).integers(0, 2, N)})
    report = audited(Net(), loader(x, y), metadata=frame, layers=["body.1"])
    probes = report.tables["probes"].set_index(["column", "layer"])
    assert set(probes.index.get_level_values("layer")) == {HEAD, "body.1"}
    assert probes.loc[("place", HEAD), "accuracy"] > 0.95
    assert probes.loc[("noise", HEAD), "accuracy"] < 0.65
    assert probes.loc[("place", HEAD), "shuffled_accuracy"] < 0.65
    erased = report.tables["erasure"].set_index("column")
    assert erased.index[0] == "place"
    assert erased.loc["place", "lean_before"] > 0.5
    assert abs(erased.loc["place", "lean_after"]) < 0.25
    assert erased.loc["place", "lean_random"] > 0.4
    assert erased.loc["place", "changed"] > 3 * erased.loc["place", "changed_random"]
    assert any("Erasing it from the features" in sentence for sentence in report.findings)


def test_what_is_erased_is_read_by_no_linear_model_and_all_else_stays():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 6)) @ random.normal(size=(6, 6)) + 3
    z = np.eye(3)[random.integers(0, 3, 300)]
    x[:, :3] += 2 * z
    x[:, 5] = x[:, 4]  # of no full rank
    y = Eraser(x).erase(z)
    assert LinearRegression().fit(x, z).score(x, z) > 0.15
    assert LinearRegression().fit(y, z).score(y, z) < 1e-9
    np.testing.assert_allclose(y.mean(0), x.mean(0))
    assert np.linalg.matrix_rank((y - x), tol=1e-8) == 2
    # Of all maps that do so this one changes least: the orthogonal projection is one of them.
    cross = np.linalg.svd((x - x.mean(0)).T @ (z - z.mean(0)), full_matrices=False)[0][:, :2]
    projected = x - (x - x.mean(0)) @ cross @ cross.T
    assert ((y - x) ** 2).sum() < ((projected - x) ** 2).sum()
    np.testing.assert_allclose(Eraser(x).erase(np.ones((300, 1))), x)


class Flipped(Net):
    def test_step(self, batch, batch_idx):
        x, y = (part.flip(0) for part in batch)
        super().test_step((x, y), batch_idx)


def test_a_step_that_reorders_its_batch_is_followed_or_refused():
    x, y, place = data()
    frame = pd.DataFrame({"place": place.numpy()})
    plain, flipped = (audited(model, loader(x, y), metadata=frame) for model in (Net(), Flipped()))
    for name in ("groups", "probes", "erasure"):
        pd.testing.assert_frame_equal(plain.tables[name], flipped.tables[name])
    with pytest.raises(DebiasError, match="Leave out `layers`"):
        audited(Flipped(), loader(x, y), metadata=frame, layers=["body"])


def binary(z, y):
    return F.binary_cross_entropy_with_logits(z, y.float())


@pytest.mark.parametrize(
    ("out", "loss", "task"), [(1, binary, "classification"), (1, F.mse_loss, "regression"), (3, binary, "multilabel")]
)
def test_the_loss_says_what_is_predicted(out, loss, task):
    x, y, place = data()
    y = y if out == 1 else torch.stack([y, place, y], 1)
    report = audited(Net(out, loss), loader(x, y.float()), metadata=pd.DataFrame({"place": place.numpy()}))
    assert report.task == task
    assert "groups" in report.tables


class OnlyNetwork(nn.Module):
    def __init__(self, out=2):
        super().__init__()
        self.net = Net(out)

    def forward(self, x):
        return self.net.head(self.net.body(x))


def test_a_module_without_steps_is_run_on_the_first_part_of_the_batch():
    x, y, place = data()
    frame = table(Net(), x, y, place)
    report = audited(OnlyNetwork(), loader(x, y), metadata=frame[["place"]], layers=["net.body"])
    assert set(report.tables["probes"]["layer"]) == {HEAD, "net.body"}
    pd.testing.assert_frame_equal(report.frame, audit_predictions(frame, progress=False).frame)
    with pytest.raises(DebiasError, match="Pass `scores='logits'`"):
        audited(OnlyNetwork(1), loader(x, y))
    assert audited(OnlyNetwork(1), loader(x, y), scores="logits").classes == ("0", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": pd.DataFrame({"a": [1]})}, "each of the 240 samples of the test loader"),
        ({"metadata": {"val": pd.DataFrame({"a": [1]})}}, "sets .'test'., but got .'val'."),
        ({"layers": ["bodi"]}, "bodi"),
        ({"classes": ["a"]}, "a name for each of 2 classes"),
        ({"positive": "x"}, "`positive` to be one of the classes"),
        ({"task": "x"}, "`task` to be one of"),
        ({"scores": "x"}, "`scores` to be one of"),
        ({"layer": ["body"]}, r"(?s)arguments of Settings .*but got `layer`"),
    ],
)
def test_bad_input_has_one_clear_message(options, message):
    x, y, _ = data()
    with pytest.raises(DebiasError, match=message):
        audited(Net(), loader(x, y), **options)


def test_predictions_that_are_not_finite_are_refused():
    x, y, _ = data()
    x[3] = torch.nan
    with pytest.raises(DebiasError, match="1 of 240 samples are not"):
        audited(Net(), loader(x, y))


def test_loaders_that_cannot_be_numbered_are_refused():
    with pytest.raises(DebiasError, match="DataLoader over a dataset with a length"):
        audited(Net(), [1, 2])
    with pytest.raises(DebiasError, match="to hold `test`"):
        audited(Net(), {"val": loader(*data()[:2])})


def test_nothing_of_the_model_and_the_trainer_is_changed():
    x, y, _ = data()
    model, trainer = (
        Net(),
        L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    callbacks = list(trainer.callbacks)
    audited(model, loader(x, y), trainer=trainer)
    assert trainer.callbacks == callbacks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert "test_step" not in vars(model)


def _on_rank(rank):
    x, y, place = data(n=61)
    options = {"strategy": ddp(), "devices": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(**options, enable_checkpointing=False, enable_model_summary=False)
    report = audited(Net(), loader(x, y), metadata=pd.DataFrame({"place": place.numpy()}), trainer=trainer, min_count=5)
    return report.tables


def test_two_uneven_ranks_are_one_process(ranks):
    x, y, place = data(n=61)
    alone = audited(Net(), loader(x, y), metadata=pd.DataFrame({"place": place.numpy()}), min_count=5)
    for tables in ranks.run(_on_rank):
        assert set(tables) == set(alone.tables)
        for name, table in tables.items():
            pd.testing.assert_frame_equal(table, alone.tables[name], rtol=1e-9)
