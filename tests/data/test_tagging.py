"""Tags beside any batch: wrapping, collating, reading and replacing."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import re
from collections import namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from _support.fits import Classifier, make_trainer
from debias import GroupDRO
from debias.data import TaggedDataset, tag, untag
from debias.errors import BatchKeyError, DataError
from debias.step.batch import read, replace
from debias.step.tagged import TagCollate, TaggedBatch, TaggedSample, split_tags

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


def test_tags_of_a_batch_are_those_of_its_samples():
    member = torch.rand(6, 3) > 0.5
    dataset = tag(list(range(6)), place=[5, 4, 3, 2, 1, 0], member=member)
    for joined in (dataset, ConcatDataset([dataset, tag(list(range(4)), place=[7] * 4, member=member[:4])])):
        numbers = [4, 0, len(joined) - 1]
        batch = torch.utils.data.default_collate([joined[i] for i in numbers])
        for name in ("place", "member", "index"):
            assert torch.equal(batch.tags[name], torch.stack([joined[i].tags[name] for i in numbers]))


@pytest.mark.parametrize("batched", [False, True])
def test_a_dataset_that_reads_a_batch_at_once_still_does(batched):
    class Table(list):
        reads = 0

        def __getitems__(self, indices):
            self.reads += 1
            return torch.tensor([self[i] for i in indices]) if batched else [self[i] for i in indices]

    table = Table(range(6))
    for data in (tag(table, place=[5, 4, 3, 2, 1, 0]), Subset(tag(table, place=[5, 4, 3, 2, 1, 0]), range(6))):
        table.reads = 0
        batches = list(DataLoader(data, batch_size=3))
        assert [batch.batch.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
        assert [batch.tags["place"].tolist() for batch in batches] == [[5, 4, 3], [2, 1, 0]]
        assert [batch.tolist() for batch in DataLoader(untag(data), batch_size=3)] == [[0, 1, 2], [3, 4, 5]]
        assert table.reads == 4


def test_a_sample_is_copied_without_the_tags_of_all_others():
    sample = tag(list(range(10_000)), place=torch.arange(10_000))[-1]
    assert dict(sample.tags) == {"place": 9_999, "index": 9_999}
    assert len(pickle.dumps(sample)) < 2_000
    assert copy.deepcopy(sample) == pickle.loads(pickle.dumps(sample)) == sample


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


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_carries_its_number_in_the_dataset(workers):
    generator = torch.Generator().manual_seed(0)
    for data in (tag(Images()), tag(Images(), place=[3, 1, 4, 1, 5]), tag(tag(Images()), place=[0] * 5)):
        loader = DataLoader(data, batch_size=2, shuffle=True, generator=generator, num_workers=workers)
        seen = {
            int(i): x[0].item() for batch in loader for i, x in zip(batch.tags["index"], batch.batch[0], strict=True)
        }
        assert seen == {i: float(i) for i in range(5)}
    part = Subset(tag(Images()), [4, 2])
    assert next(iter(DataLoader(part, batch_size=2))).tags["index"].tolist() == [4, 2]
    assert tag(part)[0].tags["index"] == 0  # the outermost tag counts
    assert tag(Images(), index=[9, 8, 7, 6, 5])[1].tags["index"] == 8
    with pytest.raises(DataError, match="at least one tag of an iterable dataset"):
        tag(Stream())


def test_a_dataset_that_grows_after_it_was_tagged_says_so():
    x = [1.0, 2.0]
    dataset = tag(x)
    assert dataset[-1].tags["index"] == 1
    x.append(3.0)
    with pytest.raises(DataError, match="keep the length that it had when it was tagged, 2, but it yields sample 2"):
        dataset[2]


def test_iterable_datasets_take_callables():
    batch = next(iter(DataLoader(tag(Stream(), place=place_of), batch_size=4)))
    assert batch.tags["place"].tolist() == [10, 11, 12, 13]
    with pytest.raises(DataError, match=r"tag `place` of an iterable dataset to be a callable.*but got list"):
        tag(Stream(), place=[1, 2])


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"place": [1, 2]}, r"`place` to hold one id per sample, but got shape \(2,\) for a dataset of 5"),
        ({"place": 3}, r"got shape \(\) for a dataset of 5"),
        ({"place": ["land", "sea", "sea", "sea", "land"]}, "`place` to be numbers.*list of str. Give each name"),
    ],
)
def test_tags_that_do_not_fit(tags, message):
    with pytest.raises(DataError, match=message):
        tag(Images(), **tags)


class Column:
    """A column of a filtered table: rows are looked up by their labels, here 8 to 12."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return {8 + i: value for i, value in enumerate(self.values)}[label]

    def __array__(self, dtype=None, copy=None):
        values = np.array(self.values, dtype)
        values.flags.writeable = False
        return values


def test_columns_of_a_table_are_taken_by_position():
    tagged = tag(Images(), place=Column([3, 1, 4, 1, 5]))
    assert tagged.tags["place"].tolist() == [3, 1, 4, 1, 5]
    assert tagged.tags["place"].dtype == torch.int64
    with pytest.raises(DataError, match=r"`place` to be numbers.*Column of str. Give each name"):
        tag(Images(), place=Column(["land", "sea", "sea", "sea", "land"]))


TRAIN, VAL = ["sea", "land", "sea", "air", "land"], ["land", "sea", "land", "land", "sea"]
NAMES = {
    "list": list,
    "tuple": tuple,
    "strings": np.array,
    "objects": lambda names: np.array(names, dtype=object),
    "bytes": lambda names: np.array(names, dtype=bytes),
    "column": Column,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_numbered_once_for_all_sets_by_the_code_that_the_error_shows(kind):
    """Here the validation set lacks the name that sorts first: numbered alone, all its ids would be others."""
    made = {f"{name}_names": NAMES[kind](names) for name, names in (("train", TRAIN), ("val", VAL))}
    with pytest.raises(DataError, match="one number that holds for all sets") as error:
        tag(Images(), place=made["train_names"])
    if kind == "column":  # a column of a table can be gone through, too
        made = {name: column.values for name, column in made.items()}
    numbering, train, val = re.findall(r"`((?:ids|tag\().*?)`", str(error.value))
    space = {"tag": tag, "train": Images(), "val": Images(), **made}
    exec(numbering, space)
    assert eval(train, space).tags["place"].tolist() == [2, 1, 2, 0, 1]
    assert eval(val, space).tags["place"].tolist() == [1, 2, 1, 1, 2]
    assert list(space["ids"]) == sorted(set(made["train_names"]))


@pytest.mark.parametrize(
    ("ids", "found"),
    [([3, 1, None, 1, 5], "list of NoneType and int"), (Column([1, "a", 2, 3, 4]), "Column of str")],
)
def test_columns_that_hold_names_beside_numbers(ids, found):
    with pytest.raises(DataError, match=rf"`place` to be numbers.*but got {found}.*A missing one is -1"):
        tag(Images(), place=ids)


def test_numbers_in_a_column_of_objects_are_numbers():
    assert tag(Images(), place=np.array([3, 1, 4, 1, 5], dtype=object)).tags["place"].tolist() == [3, 1, 4, 1, 5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_tagged_things_can_be_copied_and_sent(copied):
    tagged = copied(tag(Images(), place=[3, 1, 4, 1, 5]))
    assert tagged[4].tags["place"] == 5
    assert copied(TaggedBatch([1], {"place": torch.tensor([2])})).tags["place"].tolist() == [2]
    assert copied(TagCollate(stack_images)).collate_fn is stack_images


def test_a_tagged_batch_moves_as_a_whole():
    batch = TaggedBatch([torch.zeros(2)], {"place": torch.ones(2)}).to("meta")
    assert batch.batch[0].device.type == batch.tags["place"].device.type == "meta"


UNTAGGED = {
    "tagged": lambda: tag(Images(), place=[0, 1, 0, 1, 1]),
    "tagged twice": lambda: tag(tag(Images(), place=[0, 1, 0, 1, 1]), person=range(5)),
    "a subset": lambda: Subset(tag(Images(), place=[0, 1, 0, 1, 1]), range(5)),
    "never tagged": Images,
}


@pytest.mark.parametrize("name", UNTAGGED)
@pytest.mark.parametrize("collate_fn", [None, lambda items: len(items), TagCollate(lambda items: len(items))])
def test_untagged_data_yield_what_plain_data_do(name, collate_fn):
    def batches(data):
        return [list(x) if isinstance(x, list) else x for x in data]

    data = UNTAGGED[name]()
    own = collate_fn.collate_fn if isinstance(collate_fn, TagCollate) else collate_fn
    expected = batches(DataLoader(Images(), batch_size=2, collate_fn=own))
    loader = untag(DataLoader(data, batch_size=2, collate_fn=collate_fn))
    torch.testing.assert_close(batches(loader), expected)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 3
    torch.testing.assert_close(batches(DataLoader(untag(data), batch_size=2, collate_fn=own)), expected)


def test_untagging_leaves_the_loader_as_it_was():
    images = Images()
    assert untag(tag(images, place=[0] * 5)).classes == images.classes
    loader = DataLoader(tag(images, place=[0] * 5), num_workers=1, persistent_workers=True)
    next(iter(loader))
    assert isinstance(next(iter(untag(loader))), list)
    assert isinstance(next(iter(loader)), TaggedBatch)
    assert len(list(untag(tag(Stream(), place=place_of)))) == 4
    with pytest.raises(DataError, match=r"DataLoader, but got CombinedLoader.*untag each"):
        untag(CombinedLoader([loader]))


def test_tags_of_one_loader_are_split_off():
    plain = (torch.zeros(1), torch.ones(1))
    assert split_tags(TaggedBatch((1, 2), {"place": 3})) == ((1, 2), {"place": 3})
    assert split_tags(plain) == (plain, {})


class Row:
    """A batch of its own kind, whose parts have numbers."""

    def __init__(self, *parts):
        self.parts = parts

    def __getitem__(self, i):
        return self.parts[i]

    def __setitem__(self, i, part):
        self.parts = (*self.parts[:i], part, *self.parts[i + 1 :])


BATCHES = [
    (("image", "label"), 1),
    (Row("image", "label"), 1),
    (MappingProxyType({"image": "image", "label": "label"}), "label"),
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
    assert read(batch, key) == "label"
    replaced = replace(batch, key, "new")
    assert type(replaced) is type(batch)
    assert read(replaced, key) == "new"
    assert read(batch, key) == "label"  # the original is as it was
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
    with pytest.raises(BatchKeyError, match=r"part of the batch that can be replaced"):
        replace(range(3), 1, 0)


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
    with pytest.raises(BatchKeyError, match=r"tags \['index', 'place'\]. Take `dataset\[i\].sample`"):
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
        batches = iter(loader)
        with pytest.raises(BatchKeyError, match=r"samples of a batch|If tagged and untagged samples meet"):
            next(batches)
        if workers:  # found in a garbage collection, they would be waited for
            batches._shutdown_workers()


@pytest.mark.parametrize("first", ["tagged", "untagged", "other"])
def test_a_trainer_refuses_a_mixture(first):
    """Whatever the samples are: the engine's collate_fn looks before PyTorch's own can fail over them."""
    data = TensorDataset(torch.randn(2, 3), torch.tensor([0, 1]))
    tagged = tag(data, place=[0, 1])
    mixed = {"tagged": [tagged, data], "untagged": [data, tagged], "other": [tagged, tag(data, site=[0, 1])]}[first]
    trainer = make_trainer([GroupDRO("place", 2)])
    with pytest.raises(BatchKeyError, match=r"all samples of a batch to carry the same tags, but got"):
        trainer.fit(Classifier(), DataLoader(ConcatDataset(mixed), batch_size=4), DataLoader(tagged))


# -- the order of the samples
# ------------------------------------------------------------------------------------------------------------

LENGTHS = [2, 3, 2, 4, 3, 2, 7, 6]
g = torch.Generator().manual_seed(0)
SEQUENCES = [(torch.randn(n, 3, generator=g), i % 2) for i, n in enumerate(LENGTHS)]


def longest_first(items):
    return sorted(items, key=lambda item: -len(item[0]))


def padded(items):
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])


def lengths_of(items):
    return torch.tensor([len(x) for x, _ in items])


@dataclass
class Padded:
    x: Any
    y: Any


SORTING = {
    "padded": lambda items: padded(longest_first(items)),
    "by a random key": lambda items: padded(random.sample(items, len(items))),
    "in a dict": lambda items: {"inputs": dict(zip("xy", padded(longest_first(items)), strict=True))},
    "in a dataclass": lambda items: Padded(*padded(longest_first(items))),
    "in lists": lambda items: tuple(map(list, zip(*longest_first(items), strict=True))),
    "lengths alone": lambda items: {"lengths": lengths_of(longest_first(items))},
    "samples": longest_first,
    "packed": lambda items: pack_padded_sequence(
        padded(longest_first(items))[0], lengths_of(longest_first(items)), batch_first=True
    ),
    "in place": lambda items: items.sort(key=lambda item: -len(item[0])) or padded(items),
    "positions beside": lambda items: (torch.arange(len(items)), *padded(longest_first(items))),
    "arrays": lambda items: [a.numpy() for a in padded(longest_first(items))],
    "turned round": lambda items: padded(items[::-1]),
    "rotated": lambda items: padded(items[1:] + items[:1]),
    "interleaved halves": lambda items: padded([x for pair in zip(items[:4], items[4:], strict=True) for x in pair]),
}


@pytest.mark.parametrize("name", SORTING)
def test_a_collate_function_that_reorders_its_samples_is_refused(name):
    collate = TagCollate(SORTING[name])
    loader = DataLoader(tag(SEQUENCES, place=LENGTHS), 8, collate_fn=collate)
    for _ in range(2):  # a second epoch is no way around it
        with pytest.raises(BatchKeyError, match=r"`collate_fn` to keep the order .* sorts or shuffles.*`group=2`"):
            next(iter(loader))


def test_a_trainer_refuses_a_collate_function_that_sorts(monkeypatch):
    class Sums(Classifier):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = DataLoader(tag(SEQUENCES, place=[0, 1] * 4), 8, collate_fn=SORTING["padded"], num_workers=1)
    with pytest.raises(BatchKeyError, match=r"`collate_fn` to keep the order"):
        make_trainer([GroupDRO("place", 2)]).fit(Sums(), loader, loader)
    gc.collect()  # waits for the worker, by default five seconds


@pytest.mark.parametrize("n", range(3, 20))
def test_an_order_that_does_not_depend_on_the_samples_is_refused(n):
    samples = [TaggedSample(torch.randn(2), {"i": i}) for i in range(n)]
    orders = [[*range(n)][::-1], [*range(1, n), 0], [n - 1, *range(n - 1)], [*range(0, n, 2), *range(1, n, 2)]]
    for order in orders:
        with pytest.raises(BatchKeyError, match=r"`collate_fn` to keep the order"):
            TagCollate(lambda items, order=order: torch.stack([items[i] for i in order]))(samples)
    TagCollate(torch.stack)(samples)


def mixed_up(items):
    """Mixup, as a collate function does it; the second label is that of the partner."""
    x, y = torch.stack([x.sum(0) for x, _ in items]), torch.tensor([y for _, y in items])
    share, partner = np.random.beta(1, 1), torch.randperm(len(items))
    return share * x + (1 - share) * x[partner], y, y[partner], share


def negatives(items):
    """Another sample beside each one, which is noisy: what is paired at random tells nothing of the order."""
    x, y = padded(items)
    return x + torch.randn(len(items), 1, 1), x[torch.randperm(len(items))], torch.stack([y, y.roll(0)], 1)


def both_labels(items):
    x, y = padded(items)
    partner = torch.randperm(len(items))
    return 0.7 * x + 0.3 * x[partner], torch.stack([y % 2, y[partner] % 2], 1)


def padded_in_time(items):
    x, y = padded(items)
    return x[:, : len(items)].transpose(0, 1), y


def popped(items):
    return torch.tensor([item.pop() for item in items])


KEEPING = {
    "padded": (padded, SEQUENCES),
    "mixed up": (mixed_up, SEQUENCES),
    "negatives": (negatives, SEQUENCES),
    "both labels": (both_labels, [(torch.randn(2, 3), y) for y in range(16)]),
    "mixed up, palindrome": (mixed_up, [(torch.randn(2, 3), y) for y in (0, 1, 1, 0)]),
    "paired": (lambda items: (padded(items)[0], padded(items)[0][torch.randperm(len(items))]), SEQUENCES),
    "with positions": (lambda items: (padded(items)[1] * 0, torch.arange(len(items)), ["a", "b"] * 4), SEQUENCES),
    "with noise and positions": (lambda items: (torch.randn(len(items)), torch.arange(len(items))), SEQUENCES),
    "equal samples": (padded, [SEQUENCES[0]] * 8),
    "equal samples, as many as columns": (padded_in_time, [(torch.arange(6.0).view(2, 3), 0)] * 2),
    "palindrome, as many as columns": (padded_in_time, [SEQUENCES[0], SEQUENCES[2], SEQUENCES[0]]),
    "one": (lambda items: padded(longest_first(items)), SEQUENCES[:1]),
    "samples dropped": (lambda items: padded([item for item in items if len(item[0]) > 2]), SEQUENCES),
    "lists": (lambda items: tuple(map(list, zip(*items, strict=True))), SEQUENCES),
    "samples": (list, SEQUENCES),
    "packed": (lambda items: (pack_sequence([x for x, _ in items], enforce_sorted=False), len(items)), SEQUENCES),
    "taken apart": (popped, [[float(i)] for i in range(8)]),
    "no copies": (padded, [(torch.ones(2, 3, requires_grad=True) * i, i) for i in range(8)]),
}


@pytest.mark.parametrize("name", KEEPING)
def test_other_collate_functions_are_left_alone(name):
    collate_fn, samples = KEEPING[name]
    for seed in range(20):
        torch.manual_seed(seed)
        np.random.seed(seed)
        batch = TagCollate(collate_fn)([TaggedSample(s, {"i": i}) for i, s in enumerate(copied_or_not(samples))])
        assert batch.tags["i"].tolist() == list(range(len(samples)))


def copied_or_not(samples):
    return samples if isinstance(samples[0], tuple) else copy.deepcopy(samples)


def fails_the_second_time(items):
    if items[0][1] != 0:
        raise ValueError
    return padded(items)


def test_the_order_is_checked_once_and_without_a_trace():
    calls = []

    def noisy(items):
        calls.append(len(items))
        return torch.randn(len(items)) + random.random() + np.random.rand()

    def drawn(collate):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        batches = [collate(items) for items in ([1], [1, 2, 3], [1, 2, 3])]
        return [*batches, torch.rand(2), torch.tensor([random.random(), np.random.rand()])]

    collate = TagCollate(noisy)
    ours = drawn(lambda items: collate([TaggedSample(i, {"i": i}) for i in items]).batch)
    assert calls == [1, 3, 3, 3, 3, 3]  # the second one three times more
    assert copy.deepcopy(collate).checked
    assert not TagCollate(noisy).checked
    for a, b in zip(ours, drawn(noisy), strict=True):
        assert torch.equal(a, b)
    TagCollate(fails_the_second_time)([TaggedSample(s, {"i": 0}) for s in SEQUENCES])


def test_a_trainer_leaves_the_tags_off_a_loader_without_them():
    loader = untag(DataLoader(tag(torch.arange(4), place=[0] * 4), batch_size=2))
    items = [loader.dataset[0], loader.dataset[1]]
    assert TagCollate(loader.collate_fn)(items).tolist() == [0, 1]
    counted = TagCollate(loader.collate_fn, counts=True)(items)
    assert (counted.batch.tolist(), counted.tags, counted.n) == ([0, 1], {}, 2)
