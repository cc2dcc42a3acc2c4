"""Samples of a batch of any layout."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, make_trainer, problem, val_loader
from debias import GroupDRO, tag
from debias.errors import RowsError
from debias.step.batch import repeated
from debias.step.split import take_samples

N = 4
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Batch:
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


@dataclass(slots=True)
class Slots:
    x: Any
    y: Any


class PlainSlots:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Counting:
    """Made otherwise than by its attributes."""

    def __init__(self, *parts: Any) -> None:
        self.x, self.y = parts
        self.size, self.itself = (2, 3, 5), self


class Store:
    """Graphs as torch_geometric joins them: callable, with attributes that come out of a mapping."""

    def __init__(self, x: Any, y: Any) -> None:
        self.__dict__["_store"] = UserDict(x=x, y=y)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("_store", ()):
            raise AttributeError(name)
        return self.__dict__["_store"][name]

    def __call__(self) -> None: ...


LAYOUTS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered": lambda x, y: OrderedDict(x=x, y=y),
    "own mapping": lambda x, y: UserDict(x=x, y=y),
    "read-only mapping": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "namedtuple": Pair,
    "dataclass": Batch,
    "frozen dataclass": Frozen,
    "dataclass with slots": Slots,
    "slots": PlainSlots,
    "object": Counting,
    "store": Store,
    "namespace": lambda x, y: SimpleNamespace(x=x, y=y),
    "nested": lambda x, y: {"a": [Batch(x, 1)], "b": SimpleNamespace(y=y, name="b")},
}


def parts(batch: Any) -> list[Any]:
    if isinstance(batch, dict) and "a" in batch:
        return [batch["a"][0].x, batch["b"].y]
    if isinstance(batch, tuple | list):
        return list(batch)
    return [batch["x"], batch["y"]] if hasattr(batch, "keys") else [batch.x, batch.y]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "y", [torch.arange(N), np.arange(N), list("abcd"), ("a", "b", "c", "d")], ids=["tensor", "array", "list", "tuple"]
)
def test_samples_of_any_layout(layout, y):
    x = torch.arange(2 * N).view(N, 2)
    batch = LAYOUTS[layout](x, y)
    taken = take_samples(batch, [2, 0], N)
    assert type(taken) is type(batch)
    rows, others = parts(taken)
    assert rows.tolist() == [[4, 5], [0, 1]]
    assert type(others) is type(y)
    assert list(others) == [y[2], y[0]]
    twice = parts(repeated(batch, torch.arange(N).repeat(2), N))
    assert [len(part) for part in twice] == [2 * N, 2 * N]
    assert list(twice[1][N:]) == list(y)
    assert parts(batch)[0] is x  # nothing is changed in place
    assert parts(batch)[1] is y


def test_what_is_not_of_samples_is_left_alone():
    batch = Counting(torch.arange(N), torch.ones(3, 2))
    taken = repeated(batch, torch.arange(N).repeat(2), N)
    assert taken.y is batch.y
    assert taken.size is batch.size
    assert taken.x.tolist() == [*range(N)] * 2


def test_samples_are_not_taken_from_what_cannot_be_cut():
    """Nodes of graphs, bags, tokens of all samples joined: no part may go along uncut."""
    with pytest.raises(RowsError, match=r"a row for each of its 4 samples.*shape \(3, 2\).*`losses='whole'`"):
        take_samples(Counting(torch.arange(N), torch.ones(3, 2)), [1], N)


def test_the_same_part_twice():
    part = [torch.arange(N), None]
    assert take_samples({"a": part, "b": part}, [3], N) == {
        "a": [torch.tensor([3]), None],
        "b": [torch.tensor([3]), None],
    }


def test_images_of_as_many_channels_as_there_are_images():
    """The targets beside them tell, also in a mapping and in an object."""
    images, targets = (
        [torch.full((3, 2, 2), float(i)) for i in range(3)],
        [{"boxes": torch.zeros(i, 4)} for i in range(3)],
    )
    for batch in ((images, targets), {"x": images, "y": targets}, Batch(images, targets)):
        taken = parts(take_samples(batch, [2], 3))
        assert [len(part) for part in taken] == [1, 1]
        assert taken[0][0].equal(images[2])
        assert len(parts(repeated(batch, torch.arange(3).repeat(2), 3))[0]) == 6


@pytest.mark.parametrize("batch", [SimpleNamespace(x=torch.ones(3, 2)), object(), "abcd", torch.ones(())])
def test_a_batch_that_shows_no_samples_is_refused(batch):
    with pytest.raises(RowsError, match="for each of its 4 samples, so that some"):
        take_samples(batch, [0], N)
    with pytest.raises(RowsError, match="for each of its 4 samples"):
        repeated(batch, torch.arange(N).repeat(2), N)


def test_the_step_is_run_on_each_group_of_a_dataclass():
    seen = []

    class Attributes(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append(len(batch.x))
            return super().training_step((batch.x, batch.y), batch_idx)

    def collate(samples):
        return Batch(*torch.utils.data.default_collate(samples))

    dataset = tag(TensorDataset(*problem(8).tensors), place=torch.tensor([0] * 6 + [1] * 2))
    method = GroupDRO("place", 2, losses="split")
    make_trainer([method], max_epochs=1).fit(
        Attributes(), DataLoader(dataset, batch_size=8, collate_fn=collate), val_loader()
    )
    assert seen == [8, 6, 2]  # the whole batch first
    first, second = method.module.by_group()["loss_by_group"]
    assert first != second


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_samples_of_nested_tensors_are_taken(layout):
    samples = [torch.randn(length, 2) for length in (3, 1, 2)]
    nested, labels = take_samples([torch.nested.as_nested_tensor(samples, layout=layout), torch.arange(3)], [2, 0], 3)
    assert nested.layout == layout
    assert labels.tolist() == [2, 0]
    assert [x.tolist() for x in nested.unbind()] == [samples[2].tolist(), samples[0].tolist()]
