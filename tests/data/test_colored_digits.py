"""ColoredDigits keeps its promises about shares, environments, seeds and loaders."""

from __future__ import annotations

import sys
from collections import Counter

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits

from debias.data import ColoredDigits, EvalSampler, GroupBalancedSampler
from debias.errors import DataError, DebiasError


@pytest.fixture(scope="module")
def digits():
    data = ColoredDigits(batch_size=32, seed=3)
    data.setup("fit")
    return data


def parts(dataset):
    x, y = dataset.dataset.tensors
    return x, y, dataset.tags["color"], dataset.tags["environment"], dataset.tags["group"]


def true_digits(x):
    """The digit of each image, looked up among scikit-learn's by its pixels."""
    bunch = load_digits()
    of = {tuple((image / 16).ravel().tolist()): digit for image, digit in zip(bunch.images, bunch.target, strict=True)}
    return torch.tensor([of[tuple(image.double().ravel().tolist())] for image in x.sum(1)])


def test_every_digit_is_in_one_set_and_in_one_color_channel(digits):
    sets = [parts(s) for s in (digits.train_set, digits.val_set, digits.test_set)]
    assert [len(x) for x, *_ in sets] == [719, 359, 719]
    for x, y, color, _, group in sets:
        assert x.shape[1:] == (2, 8, 8)
        assert x.dtype == torch.float32
        assert x.min() == 0
        assert x.max() == 1
        rows = torch.arange(len(x))
        assert (x[rows, 1 - color] == 0).all()
        assert (x[rows, color].flatten(1).sum(1) > 0).all()
        assert torch.equal(group, 2 * y + color)
    key = lambda x: Counter(tuple(image.ravel().tolist()) for image in x.sum(1).double())  # noqa: E731
    whole = Counter(tuple((image / 16).ravel().tolist()) for image in load_digits().images)
    assert sum((key(x) for x, *_ in sets), Counter()) == whole


def test_noise_and_agreement_are_the_shares_that_are_promised(digits):
    shares = {0: 0.8, 1: 0.9, -1: 0.1}
    for dataset, environments in ((digits.train_set, {0, 1}), (digits.val_set, {0, 1}), (digits.test_set, {-1})):
        x, y, color, environment, _ = parts(dataset)
        assert set(environment.tolist()) == environments
        clean = (true_digits(x) >= 5).long()
        for e in environments:
            here = environment == e
            n = int(here.sum())
            assert abs(n - len(x) / len(environments)) <= 1
            assert int((color == y)[here].sum()) == n - round((1 - shares[e]) * n)
            assert int((clean != y)[here].sum()) == round(0.25 * n)


def test_group_names_and_counts(digits):
    assert digits.group_names == ["digit 0-4 red", "digit 0-4 green", "digit 5-9 red", "digit 5-9 green"]
    assert digits.group_counts.tolist() == torch.bincount(digits.train_groups, minlength=4).tolist()
    assert digits.group_counts.sum() == 719
    assert digits.group_counts.min() > 20


def test_everything_follows_the_seed(digits):
    torch.manual_seed(99)
    again, other = ColoredDigits(batch_size=32, seed=3), ColoredDigits(batch_size=32, seed=4)
    for data in (again, other):
        data.setup("test")
    for a, b in zip(parts(digits.train_set), parts(again.train_set), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(digits.train_groups, other.train_groups)
    assert not torch.equal(parts(digits.train_set)[0].sum(1), parts(other.train_set)[0].sum(1))
    first, second = ([b.tags["group"].tolist() for b in d.train_dataloader()] for d in (digits, again))
    assert first == second


def test_loaders(digits):
    batch = next(iter(digits.train_dataloader()))
    x, y = batch.batch
    assert x.shape == (32, 2, 8, 8)
    assert y.dtype == torch.int64
    assert set(batch.tags) == {"group", "color", "domain", "environment", "index"}
    for loader, dataset in ((digits.val_dataloader(), digits.val_set), (digits.test_dataloader(), digits.test_set)):
        assert isinstance(loader.sampler, EvalSampler)
        assert torch.equal(torch.cat([b.tags["group"] for b in loader]), dataset.tags["group"])


def test_balanced_batches():
    data = ColoredDigits(batch_size=16, balance="group")
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, GroupBalancedSampler)
    assert all(torch.bincount(batch.tags["group"]).tolist() == [4] * 4 for batch in loader)


def test_a_group_without_training_samples_is_named():
    data = ColoredDigits(agreement=(1.0, 1.0), balance="group")
    data.setup()
    with pytest.raises(DataError, match=r"got none of digit 0-4 green, digit 5-9 red"):
        data.train_dataloader()


class Bare(L.LightningModule):
    """A module that knows nothing of tags; Lightning's own transfer hands it the TaggedBatch."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch.batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_color_pays_in_training_and_misleads_at_test():
    data = ColoredDigits(seed=0)
    model = Bare()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data.setup()
    L.Trainer(max_epochs=15, enable_checkpointing=False, **quiet).fit(model, data.train_dataloader())
    accuracy = {}
    for name, dataset in (("train", data.train_set), ("test", data.test_set)):
        x, y, *_ = parts(dataset)
        accuracy[name] = (model.net(x).argmax(1) == y).double().mean().item()
    assert accuracy["train"] > 0.8
    assert accuracy["test"] < 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_groups": 3}, DataError, "`n_groups` to be 4, label x colour, but got 3"),
        ({"label_noise": 1.5}, DebiasError, "`label_noise` to be from 0 to 1, but got 1.5"),
        ({"agreement": (0.8, -1)}, DebiasError, "`agreement` to be from 0 to 1, but got -1"),
        ({"agreement": ()}, DebiasError, "one share per training environment, but got none"),
        ({"test_agreement": 2}, DebiasError, "`test_agreement`"),
        ({"balance": "color"}, DebiasError, "`balance` to be None or \"group\", but got 'color'"),
        ({"batch_size": 0}, DebiasError, "`batch_size` to be an integer of at least 1, but got 0"),
        ({"seed": -1}, DebiasError, "`seed` to be an integer of at least 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ColoredDigits(**options)


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DebiasError, match=r"`scikit-learn` to be installed.*pip install 'lightning-debias\[recipes\]'"):
        ColoredDigits().setup()
