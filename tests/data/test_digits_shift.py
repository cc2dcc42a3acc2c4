"""DigitsShift: who is in which set, what MNIST becomes, and which files are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from debias.data import DigitsShift, EvalSampler
from debias.errors import DataError, DebiasError

MNIST = Path(os.environ.get("DATA", "data")) / "mnist.npz"


@pytest.fixture
def mnist(tmp_path):
    """A small file in MNIST's layout."""
    random = np.random.RandomState(0)
    arrays = {"x_train": random.randint(0, 256, (40, 28, 28)), "x_test": random.randint(0, 256, (30, 28, 28))}
    arrays |= {"y_train": np.arange(40) % 10, "y_test": np.arange(30) % 10}
    np.savez(tmp_path / "mnist.npz", **{name: array.astype(np.uint8) for name, array in arrays.items()})
    return tmp_path / "mnist.npz", arrays


def ready(**options):
    data = DigitsShift(**options)
    data.setup("fit")
    return data


def tensors(dataset):
    return dataset.dataset.tensors


def test_the_writers_of_the_test_set_come_last():
    data = ready(seed=3)
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8)
    x, y = tensors(data.test_set)
    assert torch.equal(x, images[1078:])
    assert y.tolist() == labels[1078:].tolist()
    both = torch.cat([tensors(data.train_set)[0], tensors(data.val_set)[0]])
    key = lambda x: sorted(tuple(image.flatten().tolist()) for image in x)  # noqa: E731
    assert key(both) == key(images[:1078])
    assert (len(data.train_set), len(data.val_set)) == (862, 216)
    assert data.other_set is None
    assert len(data.test_dataloader()) == 1


def test_labels_are_the_groups():
    data = ready()
    assert torch.equal(data.train_groups, tensors(data.train_set)[1])
    assert data.group_names == [str(i) for i in range(10)]
    assert data.group_counts.sum() == 862
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch.tags["group"], batch.batch[1])
    assert isinstance(data.val_dataloader().sampler, EvalSampler)


def test_the_split_follows_the_seed():
    a, b, c = ready(seed=1), ready(seed=1), ready(seed=2)
    assert torch.equal(tensors(a.train_set)[0], tensors(b.train_set)[0])
    assert not torch.equal(tensors(a.train_set)[0], tensors(c.train_set)[0])
    assert torch.equal(tensors(a.test_set)[0], tensors(c.test_set)[0])


def test_mnist_is_a_second_test_set(mnist):
    path, arrays = mnist
    data = ready(mnist=str(path))
    x, y = tensors(data.other_set)
    # Each of the eight bins has three rows; neighbours share one, as 20 is no multiple of 8.
    bins = [slice(4 + i * 20 // 8, 4 + -(-(i + 1) * 20 // 8)) for i in range(8)]
    middle = [[[image[r, c].mean() / 255 for c in bins] for r in bins] for image in arrays["x_test"]]
    torch.testing.assert_close(x[:, 0].double(), torch.tensor(middle, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert y.tolist() == arrays["y_test"].tolist()
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [719, 30]


def test_training_on_mnist(mnist):
    path, arrays = mnist
    data = ready(source="mnist", mnist=str(path), image_size=28, val_fraction=0.25, train_size=20)
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set, data.other_set)] == [20, 10, 30, 1797]
    x = tensors(data.test_set)[0]
    assert torch.equal(x[:, 0], torch.from_numpy(arrays["x_test"]).float() / 255)
    digits = tensors(data.other_set)[0]
    assert digits.shape == (1797, 1, 28, 28)
    assert (digits[:, :, :4] == 0).all()
    assert 0 <= digits.min() < digits.max() <= 1
    assert tensors(ready(source="mnist", mnist=str(path), image_size=16).other_set)[0].shape == (1797, 1, 16, 16)


@pytest.mark.skipif(not MNIST.exists(), reason="needs $DATA/mnist.npz")
def test_the_real_mnist():
    data = ready(mnist=str(MNIST))
    x, y = tensors(data.other_set)
    assert x.shape == (10000, 1, 8, 8)
    assert torch.bincount(y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_groups": 4}, DataError, "`n_groups` to be 10, one group for each digit, but got 4"),
        ({"source": "usps"}, DebiasError, "`source` to be 'digits' or 'mnist', but got 'usps'"),
        ({"source": "mnist"}, DataError, "`mnist` to be the path of an `mnist.npz`"),
        ({"image_size": 7}, DebiasError, "`image_size` to be from 8 to 28"),
        ({"val_fraction": 1.0}, DebiasError, "`val_fraction`"),
        ({"train_size": 0}, DebiasError, "`train_size` to be at least 1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        DigitsShift(**options)


def test_bad_files(tmp_path, mnist):
    arrays = mnist[1]
    with pytest.raises(DataError, match=r"reading .*nothing.npz failed"):
        ready(mnist=str(tmp_path / "nothing.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"reading .*text.npz failed"):
        ready(mnist=str(tmp_path / "text.npz"))
    np.savez(tmp_path / "part.npz", x_train=arrays["x_train"])
    with pytest.raises(DataError, match=r"part.npz failed.*y_train"):
        ready(mnist=str(tmp_path / "part.npz"))
    np.savez(tmp_path / "flat.npz", **{k: v.reshape(len(v), -1) if k[0] == "x" else v for k, v in arrays.items()})
    with pytest.raises(DataError, match=r"bytes of shape \(N, 28, 28\).*\(40, 784\)"):
        ready(mnist=str(tmp_path / "flat.npz"))


def test_the_order_of_the_digits_follows_the_writers():
    """As the docstring says: neighbours in the file look alike, so a split in order parts people."""
    nearest = NearestNeighbors(n_neighbors=2).fit(load_digits().data)
    places = np.arange(1797)
    near = abs(nearest.kneighbors(load_digits().data)[1][:, 1] - places) <= 140
    assert near.mean() == pytest.approx(0.59, abs=0.01)
    by_chance = (abs(places[:, None] - places) <= 140).sum() / (1797 * 1797)
    assert by_chance == pytest.approx(0.15, abs=0.01)
