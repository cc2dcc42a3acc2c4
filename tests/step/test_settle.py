"""Losses that only some ranks compute: what a method means is reduced over ranks, all else stays as DDP treats it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from _support.fits import Classifier, Manual, deviation, loader, make_trainer, parameters, same, val_loader
from _support.runs import ddp
from debias import GroupDRO, GroupMixup, MixStyle, VREx
from debias.errors import AmbiguousLossError, UntappedLossError
from debias.ops.distributed import alike

SIZES, LAST = (5, 11), (2, 5)
LATER = 10  # no step logs before
METHODS = {
    "none": lambda: [],
    "index": lambda: [GroupDRO("place", 3, step_size=0.5, loss=0)],
    "callable": lambda: [GroupDRO("place", 3, step_size=0.5, loss=lambda call: call.name == "cross_entropy")],
    "sum": lambda: [GroupDRO("place", 3, step_size=0.5, loss="sum")],
    "only": lambda: [GroupDRO("place", 3, step_size=0.5)],
    "penalty of an index": lambda: [VREx("place", 3, loss=0)],
    "penalty of a sum": lambda: [VREx("place", 3, loss="sum")],
    "penalty": lambda: [VREx("place", 3)],
    "index and penalty": lambda: [GroupDRO("place", 3, step_size=0.5, loss=0), VREx("place", 3, loss=1)],
    "mixed": lambda: [GroupMixup("place", loss=0, seed=1)],
    "augmented": lambda: [MixStyle(["backbone.1"], p=0.0)],
}


def squares(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(z.sum(1), x.sum(1))


def by_hand(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same, unseen."""
    return (z.sum(1) - x.sum(1)).pow(2).mean()


class Steps(Classifier):
    """Computes a second loss as it is told, and keeps what it receives for it."""

    def __init__(self, kind: str, first: int = 0) -> None:
        super().__init__()
        self.kind, self.first = kind, first
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        z, rank = self(x), self.global_rank
        if self.kind == "flooded":
            return (F.cross_entropy(z, y) - 0.68).abs() + 0.68
        if self.kind == "root":
            return F.cross_entropy(z, y).sqrt()
        if self.kind == "logged at first" and rank == 0 and batch_idx < self.first:
            squares(z, x)
        if batch_idx < self.first:
            loss = F.cross_entropy(z, y)
            if self.kind == "logged behind" and rank == 0:
                squares(z, x)
            return loss
        if self.kind == "alone" and rank:
            return F.mse_loss(z, F.one_hot(y, 2).double())
        if self.kind == "logged" and rank == 0:
            squares(z, x)
        loss = F.cross_entropy(z, y)
        if self.kind in ("both", "by hand") or (self.kind in ("some", "some by hand") and rank == 0):
            return loss + (squares if self.kind in ("both", "some") else by_hand)(z, x)
        if self.kind == "other":
            second = squares(z, x) if rank == 0 else 100 * F.l1_loss(z.sum(1), x.sum(1))
            own = by_hand(z, x) if rank == 0 else 100 * (z.sum(1) - x.sum(1)).abs().mean()
            self.seen.append((float(second.detach()), float(own.detach())))
            return loss + second
        return loss


def _fit(
    rank: int, method: str, kind: str, first: int = 0, sizes: Any = SIZES, last: Any = LAST, **options: Any
) -> Any:
    module, options = Steps(kind, first), {"log_every_n_steps": LATER} | options
    if len(sizes) > 1:
        options |= {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False}
    make_trainer(METHODS[method](), **options).fit(
        module, loader(sizes=sizes, last=last, rank=rank, bare=method == "none"), val_loader(bare=method == "none")
    )
    return parameters(module), module.seen


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("method", ["index", "callable", "penalty of an index", "mixed"])
def test_a_loss_that_no_method_means_may_be_computed_on_one_rank(ranks, method, first):
    """It counts as a term that nobody sees."""
    (found, _), (also, _) = ranks.run(_fit, method, "some", first)
    assert same(found, also)
    assert deviation(ranks.run(_fit, method, "some by hand", first)[0][0], found) < 1e-12


@pytest.mark.parametrize("method", ["index", "penalty of an index"])
def test_what_is_meant_stays_exact_beside_another_loss(ranks, method):
    """Ranks of the same size average the other one exactly, too."""
    found = ranks.run(_fit, method, "both", 0, (8, 8), (3, 4))[0][0]
    hand = ranks.run(_fit, method, "by hand", 0, (8, 8), (3, 4))[0][0]
    assert deviation(hand, found) < 1e-12
    # The last batch is not of the same size.
    even = ranks.run(_even, method, "both")[0][0]
    assert deviation(_even(0, method, "both", 0, (16,), (7,))[0], even) < 1e-12


def _even(rank: int, method: str, kind: str, first: int = 0, sizes: Any = (8, 8), last: Any = (3, 4)) -> Any:
    return _fit(rank, method, kind, first, sizes, last, limit_train_batches=2)


@pytest.mark.parametrize("method", ["index", "callable"])
def test_other_losses_at_the_same_place_are_not_mixed_up(ranks, method):
    for _, seen in ranks.run(_fit, method, "other"):
        assert len(seen) == 3
        for handed, own in seen:
            assert handed == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize("method", ["index and penalty", "only"])
def test_exact_beside_losses_that_several_methods_mean(ranks, method):
    """Uneven ranks are one process where every loss is meant."""
    kind = "both" if method != "only" else "plain"
    found = ranks.run(_fit, method, kind)[0][0]
    assert deviation(_fit(0, method, kind, 0, (16,), (7,))[0], found) < 1e-12


@pytest.mark.parametrize("kind", ["both", "some", "other", "plain", "logged"])
@pytest.mark.parametrize("first", [0, 1])
def test_augmentation_alone_trains_whatever_ranks_compute(ranks, kind, first):
    """As plain DDP does, to rounding: the first two batches are even."""
    found = ranks.run(_even, "augmented", kind, first)
    plain = ranks.run(_even, "none", kind, first)
    assert same(found[0][0], found[1][0])
    assert deviation(plain[0][0], found[0][0]) < 1e-12


def test_augmentation_alone_reduces_the_only_loss(ranks):
    found = ranks.run(_fit, "augmented", "plain")[0][0]
    assert deviation(_fit(0, "none", "plain", 0, (16,), (7,))[0], found) < 1e-12


class ManualSteps(Manual, Steps):
    pass


def _manual(rank: int, method: str, kind: str) -> Any:
    options = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False}
    module = ManualSteps(kind=kind)
    make_trainer(METHODS[method](), **options).fit(module, loader(sizes=SIZES, last=LAST, rank=rank), val_loader())
    return parameters(module)


@pytest.mark.parametrize("method", ["index", "mixed", "augmented"])
def test_manual_optimisation(ranks, method):
    found, also = ranks.run(_manual, method, "some")
    assert same(found, also)
    assert deviation(ranks.run(_manual, method, "some by hand")[0], found) < 1e-12


SOME = r"`cross_entropy`, `mse_loss` on rank 0 and `cross_entropy` on rank 1.*with a mask where samples.*`loss=<index>`"
ALONE = r"`cross_entropy` on rank 0 and `mse_loss` on rank 1"
REFUSED = [
    ("sum", "some", SOME),
    ("only", "some", SOME),
    ("penalty of a sum", "some", SOME),
    ("penalty", "some", SOME),
    ("index and penalty", "some", SOME),
    ("index", "alone", ALONE),
    ("callable", "alone", "`cross_entropy` on rank 0 and none on rank 1"),
    ("only", "alone", ALONE),
    ("penalty of an index", "alone", ALONE),
    ("penalty", "alone", ALONE),
    ("mixed", "alone", ALONE),
    ("sum", "other", "`cross_entropy`, `mse_loss`.* on rank 0"),
]


@pytest.mark.parametrize(("method", "kind", "match"), REFUSED, ids=[f"{m}, {k}" for m, k, _ in REFUSED])
def test_other_losses_that_a_method_means_are_refused_on_all_ranks(ranks, method, kind, match):
    ranks.raises(AmbiguousLossError, f"all ranks to compute the same losses where.*{match}", _fit, method, kind)


@pytest.mark.parametrize(("method", "kind", "first"), [("sum", "some", 1), ("penalty of a sum", "some", 1)])
def test_they_are_refused_on_a_logging_step_too(ranks, method, kind, first):
    ranks.raises(AmbiguousLossError, SOME, _logging, method, kind, first)


def _logging(rank: int, *args: Any) -> Any:
    return _fit(rank, *args, log_every_n_steps=2)


@pytest.mark.parametrize("kind", ["logged", "logged at first", "logged behind"])
@pytest.mark.parametrize("method", ["only", "penalty", "augmented"])
def test_a_loss_that_is_merely_logged_on_one_rank_moves_nothing(ranks, method, kind):
    """It stands before the one that is meant, from the second step on or in the first step only."""
    found = ranks.run(_fit, method, kind, 1)[0][0]
    assert deviation(ranks.run(_fit, method, "plain", 1)[0][0], found) < 1e-12


@pytest.mark.parametrize("kind", ["flooded", "root"])
@pytest.mark.parametrize("method", ["only", "callable", "sum", "penalty"])
def test_steps_that_are_not_linear_in_the_loss(ranks, method, kind):
    """All ranks refuse them: the loss of a group is no part of what the step makes of the loss of all."""
    ranks.raises(UntappedLossError, "returned loss to be linear in `cross_entropy`", _fit, method, kind)


@pytest.mark.parametrize("kind", ["flooded", "root"])
def test_augmentation_alone_leaves_them_to_ddp(ranks, kind):
    found, plain = ranks.run(_fit, "augmented", kind), ranks.run(_fit, "none", kind)
    assert deviation(plain[0][0], found[0][0]) < 1e-12


class Empty(Classifier):
    """On the second rank nothing counts."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        some = torch.arange(len(x)) < (5 if self.trainer.world_size == 1 or self.global_rank == 0 else 0)
        return F.cross_entropy(self(x), torch.where(some, y, -100))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.returned = outputs["loss"].detach()


def _empty(rank: int, method: str, sizes: Any) -> Any:
    module, options = Empty(), {"limit_train_batches": 1}
    if len(sizes) > 1:
        options |= {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False}
    last = (7,) if len(sizes) == 1 else LAST
    make_trainer(METHODS[method](), **options).fit(module, loader(sizes=sizes, last=last, rank=rank), val_loader())
    return parameters(module) | {"loss": module.returned}


@pytest.mark.parametrize("method", ["only", "sum", "penalty"])
def test_a_rank_where_nothing_counts(ranks, method):
    first, second = ranks.run(_empty, method, SIZES)
    assert same(first, second)
    assert deviation(_empty(0, method, (16,)), first) < 1e-12


def _reductions(rank: int, method: str, kind: str) -> list[int]:
    """All-reduces of debias in each of three steps, of which none logs."""
    counts = [0]
    plain = torch.distributed.all_reduce

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return plain(x, *args, **kwargs)

    class Counting(Steps):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            counts.append(0)
            return super().training_step(batch, batch_idx)

        def on_train_end(self) -> None:
            counts.append(0)

    module = Counting(kind)
    options = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False, "limit_val_batches": 0}
    with mock.patch.object(torch.distributed, "all_reduce", counted):
        make_trainer(METHODS[method](), log_every_n_steps=LATER, **options).fit(
            module, loader(sizes=SIZES, last=LAST, rank=rank), val_loader()
        )
    return counts[2:4]


@pytest.mark.parametrize(
    ("method", "kind", "count"),
    [
        ("only", "plain", 1),
        ("index", "both", 1),
        ("sum", "both", 1),
        ("augmented", "plain", 1),
        ("augmented", "both", 0),
    ],
)
def test_ordinary_steps_reduce_no_more_than_before(ranks, method, kind, count):
    first, second = ranks.run(_reductions, method, kind)
    assert first == second == [count, count]


def _alike(rank: int) -> list[bool]:
    cpu = torch.device("cpu")
    return [alike("a", cpu), alike("ab"[rank], cpu), alike("", cpu), alike("" if rank else "0", cpu)]


def test_alike(ranks):
    assert ranks.run(_alike) == [[True, False, True, False]] * 2
    assert alike("a", torch.device("cpu"))
