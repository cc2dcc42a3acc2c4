"""What ranks and loaders have to agree on: one error on all ranks, and no rank that waits for another without end."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from _support.runs import ddp
from debias import CORAL, AttributeProbe, GroupDRO, GroupMonitor, tag
from debias.errors import BatchKeyError, DebiasError, HeadNotFoundError, RowsError
from debias.functional import probe_attribute
from step.test_loaders import PLACES, QUIET, SOURCE, TARGET, Model, fit, joined, loaders, one, two_passes

TWO: Any = {"devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
METHODS = {"GroupDRO": lambda: GroupDRO("place", 3), "CORAL": lambda: CORAL("place", 3, features="body")}


class Stream(IterableDataset):
    """Nobody knows its length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        yield from (tag(SOURCE, place=PLACES[0])[i] for i in range(self.n))


# -- ranks -----------------------------------------------------------------------------------------


def ending(rank: int, kind: str, name: str | None, n: tuple[int, int]) -> Tensor:
    """Rank 0 has more batches of two than rank 1."""
    data: Any = Subset(tag(SOURCE, place=PLACES[0]), range(n[rank])) if kind == "sized" else Stream(n[rank])
    method = GroupMonitor("place", 3) if name is None else METHODS[name]()
    return fit(one, DataLoader(data, batch_size=2), method, strategy=ddp(), **TWO)["head.bias"]


@pytest.mark.parametrize("name", [*METHODS, None])
@pytest.mark.parametrize(("kind", "message"), [("sized", r"has \[6, 4\]"), ("stream", r"1 of 2 ranks ends with this")])
def test_data_that_ends_earlier_on_one_rank_is_refused_on_all(ranks, kind, message, name):
    ranks.raises(DebiasError, "equally many training batches.*" + message, ending, kind, name, (12, 8))


def test_streams_that_end_together_train(ranks):
    first, second = ranks.run(ending, "stream", "GroupDRO", (8, 8))
    assert torch.equal(first, second)


def limited(rank: int) -> Tensor:
    """What ends the epoch is a limit that all ranks reach, be one at its last batch or not."""
    data = DataLoader(Stream((6, 12)[rank]), batch_size=2)
    return fit(one, data, METHODS["GroupDRO"](), strategy=ddp(), limit_train_batches=3, **TWO)["head.bias"]


def test_a_limit_that_all_ranks_reach_ends_streams_together(ranks):
    first, second = ranks.run(limited)
    assert torch.equal(first, second)


def of_one_rank(rank: int, case: str) -> None:
    """What rank 1 is given is wrong."""
    wrong, given = rank == 1, loaders("both")
    method: Any = METHODS["GroupDRO"]()
    if case == "a tag on one loader only":
        given = loaders("source" if wrong else "both")
    elif case == "no tag at all":
        given = loaders("none" if wrong else "both")
    elif case == "ids of another shape":
        places = PLACES[0].double() if wrong else PLACES[0]
        given = [DataLoader(tag(SOURCE, place=places), batch_size=4), given[1]]
    elif case == "other ids of the same samples":
        other = (PLACES[0] + 1) % 3 if wrong else PLACES[0]
        given = [given[0], DataLoader(tag(SOURCE, place=other), batch_size=4)]
    fit(joined, given, method, strategy=ddp(), **TWO)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a tag on one loader only", r"of the loader '1' to carry the same tags.*index, place; none"),
        ("no tag at all", r"to name a tag of a loader"),
        ("ids of another shape", r"integer"),
        ("other ids of the same samples", r"one id of each sample.*tag `place` of sample 0 of TensorDataset is 0"),
    ],
)
def test_what_one_rank_refuses_all_refuse(ranks, case, message):
    first, _ = ranks.raises(BatchKeyError, message, of_one_rank, case)
    assert "(Seen by rank 1, not by this one.)" in str(first) or case == "a tag on one loader only"


# -- one sample, one id ----------------------------------------------------------------------------

AGAIN = {
    "the same dataset": lambda ids: tag(SOURCE, place=ids),
    "a part of it": lambda ids: Subset(tag(SOURCE, place=ids), [7, 5, 4, 3]),
    "tagged parts, joined": lambda ids: ConcatDataset(
        [tag(Subset(SOURCE, [5, 3]), place=ids[[5, 3]]), tag(TARGET, place=PLACES[1])]
    ),
}


@pytest.mark.parametrize("name", AGAIN)
def test_one_sample_with_different_ids_in_two_loaders_is_refused(name):
    """Here sample 3, which has the id 1; two loaders with the same ids, or none, train."""

    def given(ids: Tensor) -> list[DataLoader]:
        return [DataLoader(tag(SOURCE, place=PLACES[0]), batch_size=4), DataLoader(AGAIN[name](ids), batch_size=2)]

    wrong, unlabelled = PLACES[0].clone(), PLACES[0].clone()
    wrong[3], unlabelled[3] = 2, -1
    for fine in (PLACES[0], unlabelled):
        fit(joined, given(fine), METHODS["GroupDRO"]())
    with pytest.raises(BatchKeyError, match=r"`place` of sample 3 of TensorDataset is 1 in loader 0 and 2 in loader 1"):
        fit(joined, given(wrong), METHODS["GroupDRO"]())
    fit(joined, given(wrong), CORAL("loader", 2))  # nobody reads the tag


def test_one_sample_with_different_memberships_is_refused():
    member = F.one_hot(PLACES[0], 3).bool()
    given = [DataLoader(tag(SOURCE, place=ids), batch_size=4) for ids in (member, member.roll(1, 1))]
    with pytest.raises(BatchKeyError, match=r"is \[True, False, False\] in loader 0 and \[False, True, False\]"):
        fit(joined, given, METHODS["GroupDRO"]())


# -- evaluation of several loaders -----------------------------------------------------------------


class Evaluated(Model):
    """Two passes, of which the target's makes no loss."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, dict):
            self.step(self, list(batch.values()))
        elif dataloader_idx:
            self.body(batch[0])
        else:
            one(self, batch)


def validated(given: Any, monitor: Any, step: Any = two_passes) -> dict[str, Tensor]:
    trainer = L.Trainer(callbacks=[monitor], **QUIET)
    trainer.validate(Evaluated(step), given, verbose=False)
    return dict(trainer.callback_metrics)


@pytest.mark.parametrize("features", ["body", "body.0"])
@pytest.mark.parametrize("how", ["one after the other", "together", "the target alone"])
def test_a_probe_reads_unlabelled_targets_in_two_passes(how, features):
    """The target has no labels and no loss."""
    target, places = TensorDataset(torch.randn(30, 4).double()), torch.arange(30) % 3
    data = {
        "source": tag(SOURCE, place=PLACES[0]) if how != "the target alone" else SOURCE,
        "target": tag(target, place=places),
    }
    given = [DataLoader(x, batch_size=size) for x, size in zip(data.values(), (2, 5), strict=True)]
    step = lambda model, batch: (one(model, batch[0]), model.body(batch[1][0]))  # noqa: E731
    together = how != "one after the other"
    evaluated: Any = CombinedLoader(dict(zip(data, given, strict=True)), "min_size") if together else given
    found = validated(evaluated, AttributeProbe("place", 3, features=features), step)
    body = Model(one).get_submodule(features)
    x = {name: body(dataset.tensors[0]) for name, dataset in zip(data, (SOURCE, target), strict=True)}
    if how == "together":  # batches of two of the source, then five of the target
        x = torch.cat([torch.cat((x["source"][2 * i : 2 * i + 2], x["target"][5 * i : 5 * i + 5])) for i in range(6)])
        places = torch.cat([torch.cat((PLACES[0][2 * i : 2 * i + 2], places[5 * i : 5 * i + 5])) for i in range(6)])
    else:
        x = x["target"]
    expected = probe_attribute(x.detach().float(), places, 3)
    suffix = "" if together else "/dataloader_idx_1"
    assert found[f"val/place_probe/accuracy{suffix}"] == expected["accuracy"].float()
    assert len(found) == (10 if how == "one after the other" else 5)


def test_features_of_another_loader_are_not_borrowed():
    """The target has ids and the source has none, and both give equally many samples."""
    given = {
        "source": DataLoader(SOURCE, batch_size=2),
        "target": DataLoader(tag(TARGET, place=PLACES[1]), batch_size=2),
    }
    evaluated = CombinedLoader(given, "min_size")
    with pytest.raises(HeadNotFoundError, match=r"where a batch is of several loaders.*`features='dotted.path'`"):
        validated(evaluated, AttributeProbe("place", 3))
    with pytest.raises(RowsError, match="rows are of a loader without"):
        validated(evaluated, GroupMonitor("place", 3, target="source.1"))
    with pytest.raises(RowsError, match="on none of 'target'"):
        validated(evaluated, AttributeProbe("place", 3, features="body"), lambda model, batch: one(model, batch[0]))
