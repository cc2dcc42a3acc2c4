"""Drawn faces: habits in training, other people at test, and what can be read from pixels."""

from __future__ import annotations

import pytest
import torch

from debias.data import IdentityShortcut
from debias.errors import DebiasError
from debias.functional import probe_attribute


def make(**options):
    data = IdentityShortcut(**({"n_identities": 10, "n_test_identities": 6, "images": 20} | options))
    data.setup()
    return data


def test_habits_in_training_and_none_at_test():
    data = make(agreement=0.8)
    _, y = data.train_set.dataset.tensors
    tags = data.train_set.tags
    for person in range(10):
        mine = tags["identity"] == person
        (habit,) = tags["habit"][mine].unique().tolist()
        assert (y[mine] == habit).float().mean() == pytest.approx(0.8)
    assert sorted(tags["habit"][::20].tolist()) == [0] * 5 + [1] * 5
    assert torch.equal(tags["group"], 2 * y + tags["habit"])
    for part in (data.val_set, data.test_set):
        assert part.dataset.tensors[1].float().mean() == 0.5
        assert set(part.tags["habit"].tolist()) == {-1}
        assert part.tags["identity"].unique().tolist() == list(range(6))
    assert data.group_counts.tolist() == [80, 20, 20, 80]


def test_images_are_seeded_and_people_are_others():
    first, again, other = make(), make(), make(seed=1)
    assert torch.equal(first.train_set.dataset.tensors[0], again.train_set.dataset.tensors[0])
    assert not torch.equal(first.train_set.dataset.tensors[0], other.train_set.dataset.tensors[0])
    batch = next(iter(first.train_dataloader()))
    assert batch.batch[0].shape == (64, 1, 24, 24)
    assert batch.batch[0].dtype == torch.float32
    assert batch.batch[1].dtype == torch.int64
    means = [part.dataset.tensors[0].view(-1, 20, 576).mean(1) for part in (first.train_set, first.test_set)]
    assert torch.cdist(*means).min() > 3  # nobody of the training set is in the test set


@pytest.mark.parametrize(("texture", "told"), [(1.0, True), (0.0, False)])
def test_the_texture_tells_who_it_is(texture, told):
    data = make(texture=texture)
    pixels = data.train_set.dataset.tensors[0].flatten(1)
    scores = probe_attribute(pixels, data.train_set.tags["identity"], 10)
    assert (scores["accuracy"] > 0.9) == told
    assert (scores["accuracy"] < 0.3) != told  # the expression alone halves the guess of 10 people


@pytest.mark.parametrize(("expression", "told"), [(2.0, True), (0.0, False)])
def test_the_mouth_tells_the_expression(expression, told):
    data = make(texture=0.0, expression=expression, agreement=0.5, images=40)
    pixels = data.train_set.dataset.tensors[0].flatten(1)
    scores = probe_attribute(pixels, data.train_set.dataset.tensors[1], 2)
    assert (scores["accuracy"] > 0.9) == told
    assert (scores["accuracy"] < 0.65) != told


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"agreement": 1.2}, "`agreement` to be from 0 to 1"),
        ({"n_identities": 1}, "`n_identities` to be an integer >= 2"),
        ({"images": 2.5}, "`images` to be an integer >= 2"),
        ({"noise": -1.0}, "`noise` to be a number >= 0"),
        ({"n_groups": 2}, "`n_groups` to be 4, label x habit"),
        ({"balance": "place"}, '`balance` to be None or "group"'),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(DebiasError, match=match):
        IdentityShortcut(**options)


def test_balanced_batches():
    data = make(balance="group", batch_size=8)
    for batch in data.train_dataloader():
        assert torch.bincount(batch.tags["group"], minlength=4).tolist() == [2] * 4
