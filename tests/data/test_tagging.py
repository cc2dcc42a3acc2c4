"""Tags beside any batch: wrapping, collating, reading and replacing."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, TensorDataset

from _support.fits import Classifier, make_trainer
from debias import GroupDRO
from debias.data import TaggedDataset, tag
from debias.errors import BatchKeyError, DataError
from debias.step.batch import TagCollate, TaggedBatch, TaggedSample, read, replace, split_tags

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Sample:
    image: Any
    label: Any


class Plain:
    def __init__(self, image, label):
        self.image, self.label = image, label


class Images(torch.utils.data.Dataset):
    """A map-style dataset with an attribute and a method of its own."""

    classes = ("a", "b")

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index >= 5:
            raise IndexError(index)
        return torch.full((2,), float(index)), index % 2


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((torch.tensor([float(i)]), i) for i in range(4))


def place_of(sample):
    return sample[1] + 10


def stack_images(items):
    """A user's collate function; it must never see tags."""
    assert all(isinstance(item, tuple) for item in items)
    return {"images": [image for image, _ in items], "labels": torch.tensor([label for _, label in items])}


def test_a_tagged_dataset_is_the_dataset_with_tags():
    images = Images()
    tagged = tag(images, place=[3, 1, 4, 1, 5])
    assert isinstance(tagged, TaggedDataset)
    assert len(tagged) == 5
    assert tagged.classes == ("a", "b")
    assert isinstance(tagged[2], TaggedSample)
    assert tagged[2].sample[1] == 0
    assert tagged[2].tags["place"] == 4
    assert isinstance(images[2], tuple)  # wrapped, not edited
    with pytest.raises(AttributeError, match=r"nothing"):
        _ = tagged.nothing


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_the_bare_batch_and_its_tags(workers):
    tagged = tag(Images(), place=torch.tensor([3, 1, 4, 1, 5]), parity=lambda_free_parity)
    first, second = DataLoader(tagged, batch_size=3, num_workers=workers)
    assert isinstance(first, TaggedBatch)
    x, y = first.batch
    assert x.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert y.tolist() == [0, 1, 0]
    assert first.tags["place"].tolist() == [3, 1, 4]
    assert first.tags["parity"].tolist() == [0, 1, 0]
    assert second.tags["place"].tolist() == [1, 5]
    bare, tags = split_tags(first)
    assert bare is first.batch
    assert tags is first.tags


def lambda_free_parity(sample):
    return sample[1]


def test_rows_of_tags_may_have_a_shape():
    members = torch.tensor([[True, False], [True, True], [False, False], [False, True], [True, False]])
    batch = next(iter(DataLoader(tag(Images(), groups=members), batch_size=5)))
    assert batch.tags["groups"].dtype == torch.bool
    assert torch.equal(batch.tags["groups"], members)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_function_sees_bare_samples(workers):
    tagged = tag(Images(), place=[3, 1, 4, 1, 5])
    loader = DataLoader(tagged, batch_size=5, collate_fn=TagCollate(stack_images), num_workers=workers)
    batch = next(iter(loader))
    assert batch.batch["labels"].tolist() == [0, 1, 0, 1, 0]
    assert len(batch.batch["images"]) == 5
    assert batch.tags["place"].tolist() == [3, 1, 4, 1, 5]
    untagged = next(iter(DataLoader(Images(), batch_size=5, collate_fn=TagCollate(stack_images))))
    assert set(untagged) == {"images", "labels"}
    whole = TagCollate(stack_images)(TaggedSample([(torch.zeros(1), 1)], {"place": torch.tensor([2])}))
    assert whole.tags["place"].tolist() == [2]
    assert whole.batch["labels"].tolist() == [1]


def test_tagging_twice_puts_tags_side_by_side():
    twice = tag(tag(Images(), place=[0, 1, 2, 3, 4]), time=[5, 6, 7, 8, 9])
    batch = next(iter(DataLoader(twice, batch_size=2)))
    assert batch.tags["place"].tolist() == [0, 1]
    assert batch.tags["time"].tolist() == [5, 6]
    assert not isinstance(batch.batch, TaggedBatch)


def test_iterable_datasets_take_callables():
    batch = next(iter(DataLoader(tag(Stream(), place=place_of), batch_size=4)))
    assert batch.tags["place"].tolist() == [10, 11, 12, 13]
    with pytest.raises(DataError, match=r"tag `place` of an iterable dataset to be a callable.*but got list"):
        tag(Stream(), place=[1, 2])


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({}, "at least one tag, but got none"),
        ({"place": [1, 2]}, r"`place` to hold one id per sample, but got shape \(2,\) for a dataset of 5"),
        ({"place": 3}, r"got shape \(\) for a dataset of 5"),
        ({"place": ["land", "sea", "sea", "sea", "land"]}, "`place` to be numbers.*list of str.*Number the names"),
    ],
)
def test_tags_that_do_not_fit(tags, message):
    with pytest.raises(DataError, match=message):
        tag(Images(), **tags)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_tagged_things_can_be_copied_and_sent(copied):
    tagged = copied(tag(Images(), place=[3, 1, 4, 1, 5]))
    assert tagged[4].tags["place"] == 5
    assert copied(TaggedBatch([1], {"place": torch.tensor([2])})).tags["place"].tolist() == [2]
    assert copied(TagCollate(stack_images)).collate_fn is stack_images


def test_a_tagged_batch_moves_as_a_whole():
    batch = TaggedBatch([torch.zeros(2)], {"place": torch.ones(2)}).to("meta")
    assert batch.batch[0].device.type == batch.tags["place"].device.type == "meta"


def test_several_loaders_are_searched_one_level_deep():
    batch = {"a": TaggedBatch((1, 2), {"place": 3}), "b": (4, 5)}
    assert split_tags(batch) == ({"a": (1, 2), "b": (4, 5)}, {"place": 3})
    assert split_tags([TaggedBatch(1, {"x": 2}), TaggedBatch(3, {"y": 4})]) == ([1, 3], {"x": 2, "y": 4})
    with pytest.raises(BatchKeyError, match=r"`place` from two of them"):
        split_tags([TaggedBatch(1, {"place": 2}), TaggedBatch(3, {"place": 4})])
    plain = (torch.zeros(1), torch.ones(1))
    assert split_tags(plain) == (plain, {})


BATCHES = [
    (("image", "label"), 1),
    (["image", "label"], -1),
    ({"image": "image", "label": "label"}, "label"),
    (Pair("image", "label"), "label"),
    (Pair("image", "label"), 1),
    (Sample("image", "label"), "label"),
    (Plain("image", "label"), "label"),
    ({0: "image", 1: "label"}, 1),
    ({"1": "label", "0": "image"}, 1),
    (("image", {"labels": [0, Sample("image", "label")]}), "1.labels.1.label"),
]


@pytest.mark.parametrize(("batch", "key"), BATCHES, ids=lambda value: type(value).__name__)
def test_reading_and_replacing_parts_of_any_batch(batch, key):
    before = copy.deepcopy(batch)
    assert read(batch, key) == "label"
    replaced = replace(batch, key, "new")
    assert type(replaced) is type(batch)
    assert read(replaced, key) == "new"
    assert read(batch, key) == read(before, key) == "label"  # the original is as it was
    other = {1: 0, -1: 0, "label": "image"}.get(key)
    if other is not None and not isinstance(batch, dict):
        assert read(replaced, other) == "image"


def test_replacing_copies_containers_only():
    images = torch.zeros(2)
    batch = (images, {"label": torch.ones(2)})
    replaced = replace(batch, "1.label", torch.zeros(2))
    assert replaced[0] is images
    assert batch[1]["label"].tolist() == [1, 1]


def test_tags_come_first_and_callables_see_the_batch():
    batch = {"place": 1}
    assert read(batch, "place", {"place": 2}) == 2
    assert read(batch, lambda whole: whole["place"] + 1) == 2


@pytest.mark.parametrize("key", ["place", 5, "0.place", "image.place"])
def test_a_key_that_names_nothing(key):
    batch = (torch.zeros(2, 3), {"image": torch.zeros(2)})
    with pytest.raises(BatchKeyError, match=r"`group=.*` to name a part of the batch or a tag, but the batch"):
        read(batch, key, {"time": 1}, argument="group")
    with pytest.raises(BatchKeyError, match=r"part of the batch that can be replaced"):
        replace(batch, key, 0)
    with pytest.raises(BatchKeyError, match=r"but got a callable"):
        replace(batch, place_of, 0)


def test_tensor_datasets_work_unchanged():
    dataset = TensorDataset(torch.arange(4.0), torch.arange(4))
    (x, y), tags = split_tags(next(iter(DataLoader(tag(dataset, group=[0, 1, 1, -1]), batch_size=4))))
    assert x.tolist() == y.tolist() == [0, 1, 2, 3]
    assert tags["group"].tolist() == [0, 1, 1, -1]


def test_a_tagged_batch_that_user_code_opens_itself_says_what_to_do():
    batch = TaggedBatch((torch.ones(2), torch.zeros(2)), {"place": torch.zeros(2)})
    with pytest.raises(BatchKeyError, match=r"tags \['place'\].*`tagged.batch`"):
        _, _ = batch
    with pytest.raises(BatchKeyError, match=r"`tagged.batch`"):
        batch[0]


def test_a_tagged_sample_that_user_code_opens_itself_says_what_to_do():
    tagged = tag([(1.0, 0), (2.0, 1)], place=[0, 1])
    with pytest.raises(BatchKeyError, match=r"tags \['place'\]. Take `dataset\[i\].sample`"):
        _, _ = tagged[0]
    with pytest.raises(BatchKeyError, match=r"`dataset\[i\].sample`"):
        tagged[0]["image"]
    with pytest.raises(BatchKeyError, match=r"`dataset\[i\].sample`"):
        len(tagged[0])
    assert tagged[0]


def plain_collate(items):
    return torch.tensor([item[0] for item in items])


@pytest.mark.parametrize("collate_fn", [None, TagCollate(plain_collate)], ids=["default", "own"])
@pytest.mark.parametrize("workers", [0, 1])
def test_tagged_and_untagged_samples_do_not_mix(collate_fn, workers):
    data = [(1.0, 0), (2.0, 1)]
    tagged, other = tag(data, place=[0, 1]), tag(data, site=[0, 1])
    for mixed in ([tagged, data], [data, tagged], [tagged, other]):
        loader = DataLoader(ConcatDataset(mixed), batch_size=4, collate_fn=collate_fn, num_workers=workers)
        with pytest.raises(BatchKeyError, match=r"samples of a batch|If tagged and untagged samples meet"):
            next(iter(loader))


@pytest.mark.parametrize("first", ["tagged", "untagged", "other"])
def test_a_trainer_refuses_a_mixture(first):
    """Whatever the samples are: the engine's collate_fn looks before PyTorch's own can fail over them."""
    data = TensorDataset(torch.randn(2, 3), torch.tensor([0, 1]))
    tagged = tag(data, place=[0, 1])
    mixed = {"tagged": [tagged, data], "untagged": [data, tagged], "other": [tagged, tag(data, site=[0, 1])]}[first]
    trainer = make_trainer([GroupDRO("place", 2)])
    with pytest.raises(BatchKeyError, match=r"all samples of a batch to carry the same tags, but got"):
        trainer.fit(Classifier(), DataLoader(ConcatDataset(mixed), batch_size=4), DataLoader(tagged))
