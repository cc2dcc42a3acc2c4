"""Tables of what a network makes of every sample, against a network that is run by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, loader, make_trainer, parameters, problem, same, val_loader
from _support.runs import ddp
from debias import EvalSampler, JustTrainTwice, SampleRecorder, tag
from debias.errors import DebiasError

ALL = ["loss", "running_loss", "prediction", "correct", "logits", "features"]


def by_hand(epochs, n=39):
    """Plain training in a loop that notes everything, sample by sample."""
    model, data = Classifier(), problem(n)
    optimizer, tables, running = model.configure_optimizers(), [], {}
    for _ in range(epochs):
        table = {}
        for start in range(0, n, 16):
            rows = range(start, min(start + 16, n))
            x, y = data[list(rows)]
            features = model.backbone(x)
            logits = model.head(features)
            losses = F.cross_entropy(logits, y, reduction="none")
            for k, i in enumerate(rows):
                loss = losses[k].item()
                running[i] = 0.7 * running[i] + 0.3 * loss if i in running else loss
                best = logits[k].argmax().item()
                table[i] = (loss, running[i], best, best == y[k].item(), logits[k].tolist(), features[k].tolist())
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        tables.append({c: [table[i][j] for i in range(n)] for j, c in enumerate(ALL)})
    return tables, parameters(model)


def run(folder, rank=0, sizes=(16,), last=(7,), epochs=2, **options):
    many = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False} if len(sizes) > 1 else {}
    model = Classifier()
    trainer = make_trainer([SampleRecorder(f"{folder}/{{epoch}}.npz", ALL, **options)], max_epochs=epochs, **many)
    trainer.fit(model, loader(sizes=sizes, last=last, rank=rank), val_loader())
    return parameters(model)


def test_training_is_noted_and_not_changed(tmp_path):
    expected, weights = by_hand(2)
    found = run(tmp_path)
    assert max((found[k] - weights[k]).abs().max() for k in weights) < 1e-14
    for epoch in (0, 1):
        table = np.load(tmp_path / f"{epoch}.npz")
        assert set(table.files) == {*ALL, "seen"}
        assert table["seen"].all()
        for name in ALL:
            np.testing.assert_allclose(table[name], expected[epoch][name], rtol=1e-12)


def test_two_uneven_ranks_write_what_one_process_does(ranks, tmp_path):
    ranks.run(_run, tmp_path)
    expected, _ = by_hand(2)
    for epoch in (0, 1):
        table = np.load(tmp_path / f"{epoch}.npz")
        for name in ALL:
            np.testing.assert_allclose(table[name], expected[epoch][name], rtol=1e-9, err_msg=name)


def _run(rank, folder):
    return run(folder, rank, (5, 11), (2, 5))


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_only_chosen_epochs_are_written_and_a_resumed_run_goes_on(tmp_path):
    run(tmp_path / "whole", epochs=3)
    assert len(list((tmp_path / "whole").iterdir())) == 3
    save = ModelCheckpoint(tmp_path / "c", filename="x", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=1)
    recorder = SampleRecorder(f"{tmp_path}/part/{{epoch}}.npz", ALL, epochs=[2])
    trainer = make_trainer([recorder, save], max_epochs=2, enable_checkpointing=True)
    trainer.fit(Classifier(), loader(), val_loader())
    recorder = SampleRecorder(f"{tmp_path}/part/{{epoch}}.npz", ALL, epochs=[2])
    save = ModelCheckpoint(tmp_path / "d", filename="y", every_n_epochs=1, save_on_train_epoch_end=True)
    make_trainer([recorder, save], max_epochs=3, enable_checkpointing=True).fit(
        Classifier(), loader(), val_loader(), ckpt_path=tmp_path / "c" / "x.ckpt"
    )
    (only,) = (tmp_path / "part").iterdir()
    whole, part = np.load(tmp_path / "whole" / "2.npz"), np.load(only)
    assert all(np.array_equal(whole[c], part[c]) for c in ALL)


@pytest.mark.parametrize("on", ["train", "val"])
def test_another_module_begins_with_an_empty_table(tmp_path, on):
    recorder = SampleRecorder(f"{tmp_path}/{{epoch}}.npz", ["running_loss"], on=on)
    found = []
    for model in (Classifier(), Classifier()):
        make_trainer([recorder], max_epochs=2).fit(model, loader(), val_loader())
        found.append(np.load(tmp_path / "1.npz")["running_loss"])
    assert np.array_equal(*found)


def test_validation_can_be_recorded(tmp_path):
    model, data = Classifier(), tag(problem(21, seed=1))
    recorder = SampleRecorder(str(tmp_path / "val.npz"), ["loss", "logits", "features"], on="val")
    trainer = make_trainer([recorder], num_sanity_val_steps=1)
    trainer.fit(model, loader(), DataLoader(data, 4, sampler=EvalSampler(data)))
    table, (x, y) = np.load(tmp_path / "val.npz"), problem(21, seed=1)[:]
    with torch.no_grad():
        np.testing.assert_allclose(table["logits"], model(x).numpy())
        np.testing.assert_allclose(table["features"], model.backbone(x).numpy())
        np.testing.assert_allclose(table["loss"], F.cross_entropy(model(x), y, reduction="none").numpy())


def test_samples_that_are_not_seen_are_said(tmp_path):
    dataset = tag(problem(10))
    recorder = SampleRecorder(str(tmp_path / "x.npz"))
    rows = DataLoader(torch.utils.data.Subset(dataset, [7, 2, 4]), 2)
    make_trainer([recorder]).fit(Classifier(), rows, val_loader())
    assert np.load(tmp_path / "x.npz")["seen"].nonzero()[0].tolist() == [2, 4, 7]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": "x.csv"}, "'.npz' or '.parquet', but got 'x.csv'"),
        ({"columns": ["losses"]}, r"(?s)`columns` to be of 'loss'.*got \['losses'\]"),
        ({"columns": []}, r"`columns` to be of 'loss'.*got \[\]"),
        ({"epochs": [0, -1]}, "`epochs` to be an integer >= 0, but got -1"),
        ({"epochs": []}, "`epochs` to hold at least one epoch"),
        ({"path": "{step}.npz"}, "no braces but `{epoch}`, but got '{step}.npz'"),
        ({"on": "test"}, "'train' or 'val'"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(DebiasError, match=match):
        SampleRecorder(**({"path": "x.npz"} | options))


def test_a_set_without_numbers_is_refused_before_training():
    model = Classifier()
    before = parameters(model)
    with pytest.raises(DebiasError, match=r"its number in the dataset for SampleRecorder"):
        make_trainer([SampleRecorder("x.npz")]).fit(model, loader(bare=True), val_loader(bare=True))
    assert same(before, parameters(model))


def test_parquet_needs_its_packages(tmp_path):
    pytest.importorskip("pandas")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(DebiasError, match="pip install pandas pyarrow"):
            SampleRecorder("x.parquet")
        return
    recorder = SampleRecorder(str(tmp_path / "x.parquet"), ["loss", "logits"])
    make_trainer([recorder]).fit(Classifier(), loader(), val_loader())
    import pandas

    assert list(pandas.read_parquet(tmp_path / "x.parquet")) == ["loss", "logits_0", "logits_1", "seen"]


class Numbers(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x)[:, 0], y.to(x.dtype))


def test_a_loss_of_numbers_says_not_who_is_right(tmp_path):
    def fit(callback, epochs=1):
        make_trainer([callback], max_epochs=epochs).fit(Numbers(), loader(), val_loader())

    with pytest.raises(DebiasError, match=r"which compares numbers.*`columns=\['loss', 'logits'\]`"):
        fit(SampleRecorder(str(tmp_path / "a.npz")))
    fit(SampleRecorder(str(tmp_path / "a.npz"), ["loss", "logits"]))
    with pytest.raises(DebiasError, match="which compares numbers"):
        fit(JustTrainTwice(epochs=1), epochs=2)


KNOWN = torch.rand(21, 2, generator=torch.Generator().manual_seed(3)) > 0.4


class Labels(Classifier):
    """Two labels a sample, of which some are unknown."""

    def __init__(self, reduced):
        super().__init__()
        self.reduced = reduced

    def training_step(self, batch, batch_idx):
        logits, known = self(batch[0]), batch[2]
        labels = torch.where(known, F.one_hot(batch[1], 2), 0).to(logits.dtype)
        if self.reduced:
            return F.binary_cross_entropy_with_logits(logits, labels, weight=known.to(logits.dtype))
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (losses * known).sum() / known.sum()

    validation_step = training_step


@pytest.mark.parametrize(("on", "reduced"), [("train", True), ("val", True), ("val", False)])
def test_labels_that_nobody_knows_are_not_wrong(tmp_path, on, reduced):
    x, y = problem(21).tensors
    data = DataLoader(tag(TensorDataset(x, y, KNOWN)), batch_size=8)
    module, path = Labels(reduced), str(tmp_path / "a.npz")
    frozen = torch.optim.SGD(module.parameters(), lr=0.0)
    module.configure_optimizers = lambda: frozen
    make_trainer([SampleRecorder(path, ["loss", "correct"], on=on)], max_epochs=1).fit(module, data, data)
    with np.load(path) as found, torch.no_grad():
        logits, labels = module(x), F.one_hot(y, 2).to(x.dtype)
        seen = found["seen"]
        right = ((logits > 0) == (labels > 0.5)) | ~KNOWN
        np.testing.assert_array_equal(found["correct"][seen], right.all(1).numpy()[seen])
        assert seen[KNOWN.any(1).numpy()].all()
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * KNOWN
        counts = 2 if reduced else KNOWN.sum(1).clamp(min=1)
        np.testing.assert_allclose(found["loss"][seen], (losses.sum(1) / counts).numpy()[seen], rtol=1e-6)
