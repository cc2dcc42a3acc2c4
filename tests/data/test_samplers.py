"""Balance, disjointness, determinism and resumption of the samplers, down to a real fit with two processes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from _support.runs import ddp
from debias.data import EvalSampler, GroupBalancedSampler
from debias.errors import DataError, DebiasError

# torchdata 0.11 calls a function that torch 2.15 deprecates.
vital = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
GROUPS = [0] * 20 + [1] * 7 + [2] * 3 + [3] * 1 + [-1] * 5


def drawn(sampler, *, rank=0, world=1, epoch=0):
    """The indices that ``rank`` of ``world`` draws; the process group is only pretended."""
    sampler.set_epoch(epoch)
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_rank", return_value=rank),
        mock.patch("torch.distributed.get_world_size", return_value=world),
    ):
        indices = list(sampler)
        assert len(sampler) == len(indices)
    return indices


def flat(lists):
    return list(chain.from_iterable(lists))


def batches(indices, size):
    return [indices[i : i + size] for i in range(0, len(indices), size)]


@pytest.mark.parametrize(("world", "size"), [(1, 4), (1, 8), (2, 4), (3, 8)])
def test_every_batch_on_every_rank_holds_each_group_equally_often(world, size):
    sampler = GroupBalancedSampler(GROUPS, size, n_groups=4)
    for rank in range(world):
        for batch in batches(drawn(sampler, rank=rank, world=world), size):
            assert Counter(GROUPS[i] for i in batch) == dict.fromkeys(range(4), size // 4)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_remainders_rotate(sizes, size, world, epoch):
    n_groups = len(sizes)
    groups = np.repeat(np.arange(n_groups), sizes)
    sampler = GroupBalancedSampler(groups, size, num_samples=n_groups * size * world)
    per_rank = [batches(drawn(sampler, rank=r, world=world, epoch=epoch), size) for r in range(world)]
    count = lambda indices: np.bincount(groups[list(indices)], minlength=n_groups)  # noqa: E731
    for of_rank in per_rank:
        assert len(of_rank) == n_groups
        assert all(np.ptp(count(batch)) <= 1 for batch in of_rank)
        assert np.ptp(count(flat(of_rank))) == 0  # equal over G consecutive batches
    for step in zip(*per_rank, strict=True):
        assert np.ptp(count(flat(step))) <= 1  # over the global batch


def test_a_group_is_used_up_before_a_sample_of_it_comes_again():
    sampler = GroupBalancedSampler(GROUPS, 4, n_groups=4)
    stream = [i for epoch in range(8) for i in drawn(sampler, epoch=epoch)]
    for group, size in enumerate([20, 7, 3, 1]):
        of_group = [i for i in stream if GROUPS[i] == group]
        passes = [of_group[i : i + size] for i in range(0, len(of_group) - size + 1, size)]
        assert len(passes) >= 3
        assert all(sorted(p) == sorted(i for i, g in enumerate(GROUPS) if g == group) for p in passes)
        if size > 3:
            assert len({tuple(p) for p in passes}) > 1  # reshuffled


def test_two_ranks_draw_disjoint_samples_and_those_of_one_rank_with_double_batches():
    groups = [0] * 40 + [1] * 40
    sampler = GroupBalancedSampler(groups, 4, n_groups=2)
    double = GroupBalancedSampler(groups, 8, n_groups=2)
    for epoch in range(3):
        first, second = (batches(drawn(sampler, rank=r, world=2, epoch=epoch), 4) for r in range(2))
        whole = batches(drawn(double, epoch=epoch), 8)
        assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(b) for b in whole]
        assert not set(flat(first)) & set(flat(second))


def test_negative_ids_are_never_drawn_and_the_epoch_is_whole_batches():
    sampler = GroupBalancedSampler(torch.tensor(GROUPS), 8)
    assert len(drawn(sampler)) == 40  # 36 samples, 5 batches
    assert len(drawn(sampler, world=2)) == 24
    assert {GROUPS[i] for i in drawn(sampler)} == {0, 1, 2, 3}
    assert len(GroupBalancedSampler(GROUPS, 8, num_samples=9)) == 16


def test_indices_are_a_function_of_seed_epoch_and_rank():
    make = lambda seed: GroupBalancedSampler(GROUPS, 8, seed=seed)  # noqa: E731
    reference = drawn(make(0), epoch=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert drawn(make(0), epoch=1) == reference
    assert drawn(make(1), epoch=1) != reference
    assert drawn(make(0), epoch=2) != reference
    # These indices must never change: a run resumed with a later version would otherwise see other samples.
    assert drawn(GroupBalancedSampler([0, 0, 0, 0, 1, 1], 4, seed=7)) == [3, 5, 4, 1, 0, 5, 4, 2]


def test_the_order_of_groups_within_a_batch_is_random():
    sampler = GroupBalancedSampler(GROUPS, 4, n_groups=4)
    orders = {tuple(GROUPS[i] for i in batch) for batch in batches(drawn(sampler), 4)}
    assert len(orders) > 3


def test_ids_with_gaps_balance_the_groups_that_are_there():
    groups = [5, 5, 5, 2]
    assert Counter(groups[i] for i in GroupBalancedSampler(groups, 4)) == {2: 2, 5: 2}


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([], {}, r"`groups` to be one integer id per sample.*shape \(0,\)"),
        ([0.0, 1.0], {}, r"integer id per sample.*float64"),
        ([[0, 1]], {}, r"shape \(1, 2\)"),
        ([-1, -1], {}, "2 negative ids, which mean unlabelled"),
        ([0, 3], {"n_groups": 3}, r"ids below `n_groups=3`, but got 3 at position 1"),
        ([0, 3, 3], {"n_groups": 4}, "got none of group 1, 2. Leave out `n_groups`"),
    ],
)
def test_bad_groups(groups, options, message):
    with pytest.raises(DataError, match=message):
        GroupBalancedSampler(groups, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be an integer >= 1, but got 0"),
        ({"batch_size": 2.0}, "`batch_size`"),
        ({"batch_size": 2, "num_samples": -1}, "`num_samples`"),
        ({"batch_size": 2, "n_groups": 0}, "`n_groups`"),
        ({"batch_size": 2, "seed": -1}, "`seed`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DebiasError, match=message):
        GroupBalancedSampler([0, 1], **options)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_sampler_deals_each_sample_once(world):
    sampler = EvalSampler(range(8))
    shares = [drawn(sampler, rank=r, world=world) for r in range(world)]
    assert sorted(flat(shares)) == list(range(8))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@vital
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_stateful_loader_resumes_within_an_epoch(workers, epoch):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        sampler = GroupBalancedSampler(GROUPS, 4, n_groups=4)
        return stateful.StatefulDataLoader(list(range(len(GROUPS))), batch_size=4, sampler=sampler, num_workers=workers)

    first = loader()
    first.sampler.set_epoch(epoch)
    seen, state = [], None
    for number, batch in enumerate(first):
        seen.append(batch.tolist())
        if number == 3:
            state = first.state_dict()
    second = loader()  # the epoch of the state counts, not that of the new sampler
    second.load_state_dict(state)
    assert [batch.tolist() for batch in second] == seen[4:]


@vital
def test_the_state_of_a_finished_epoch_does_not_undo_set_epoch():
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        sampler = GroupBalancedSampler(GROUPS, 4, n_groups=4)
        return stateful.StatefulDataLoader(list(range(len(GROUPS))), batch_size=4, sampler=sampler)

    first = loader()
    list(first)
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    assert [i for batch in second for i in batch.tolist()] == drawn(GroupBalancedSampler(GROUPS, 4), epoch=1)


class Recorder(L.LightningModule):
    """Writes down the samples that each step of each rank sees."""

    def __init__(self, folder=None, save_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.save_at = folder, save_at
        self.train_log, self.val_log = [], []

    def training_step(self, batch, batch_idx):
        self.train_log.append([self.current_epoch, batch.tolist()])
        return self.weight.sum() * 0

    def on_train_batch_end(self, *args):
        if self.save_at is not None and self.save_at[0] == self.global_step:
            self.trainer.save_checkpoint(self.save_at[1])

    def on_fit_end(self):
        if self.folder is not None:
            (self.folder / f"{self.global_rank}.json").write_text(json.dumps([self.train_log, self.val_log]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EvaluatingRecorder(Recorder):
    def validation_step(self, batch, batch_idx):
        self.val_log.append(batch.tolist())


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**quiet, num_sanity_val_steps=0, **options)


@vital
def test_lightning_resumes_within_an_epoch_and_sets_the_epoch(tmp_path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        sampler = GroupBalancedSampler(GROUPS, 8, n_groups=4)
        return stateful.StatefulDataLoader(list(range(len(GROUPS))), batch_size=8, sampler=sampler)

    whole = Recorder()
    trainer(max_epochs=3, enable_checkpointing=False).fit(whole, loader())
    assert [batch for _, batch in whole.train_log] == [
        batch for epoch in range(3) for batch in batches(drawn(GroupBalancedSampler(GROUPS, 8), epoch=epoch), 8)
    ]
    part = Recorder(save_at=(7, tmp_path / "step.ckpt"))
    trainer(max_steps=7, enable_checkpointing=False).fit(part, loader())
    resumed = Recorder()
    trainer(max_epochs=3, enable_checkpointing=False).fit(resumed, loader(), ckpt_path=tmp_path / "step.ckpt")
    assert part.train_log + resumed.train_log == whole.train_log


GROUPS_OF_TWO = [0] * 9 + [1] * 12 + [2] * 40 + [-1]


def fit_on_a_rank(rank, folder):
    sampler = GroupBalancedSampler(GROUPS_OF_TWO, 6, n_groups=3)
    train = DataLoader(range(len(GROUPS_OF_TWO)), batch_size=6, sampler=sampler)
    val = DataLoader(range(7), batch_size=2, sampler=EvalSampler(range(7)))
    options = {"devices": 2, "strategy": ddp(), "enable_checkpointing": False}
    trainer(max_epochs=2, **options).fit(EvaluatingRecorder(folder), train, val)


def test_a_real_fit_with_two_processes(tmp_path, ranks):
    groups = GROUPS_OF_TWO
    ranks.run(fit_on_a_rank, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for steps, _ in ranks:
        assert [epoch for epoch, _ in steps] == [0] * 6 + [1] * 6
        for _, batch in steps:
            assert Counter(groups[i] for i in batch) == {0: 2, 1: 2, 2: 2}
        assert [batch for _, batch in steps[:6]] != [batch for _, batch in steps[6:]]
    for (_, first), (_, second) in zip(ranks[0][0], ranks[1][0], strict=True):
        assert not {i for i in first if groups[i] == 2} & {i for i in second if groups[i] == 2}
    assert [val for _, val in ranks] == [[[0, 2], [4, 6]] * 2, [[1, 3], [5]] * 2]
