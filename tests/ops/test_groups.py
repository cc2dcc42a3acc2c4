"""Sums by group against loops over plain numbers, computed in both ways: with the host reading along, as on a CPU, and
without, as on an accelerator."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from debias import (
    IRM,
    DomainAdversarial,
    DomainPenalisation,
    GroupDRO,
    GroupDROLoss,
    GroupMonitor,
    GroupReweighting,
    GroupReweightingLoss,
)
from debias.errors import BadRowsError, DebiasError
from debias.ops import arguments
from debias.ops import groups as ops
from debias.ops.groups import group_losses

G = 3


pytestmark = pytest.mark.usefixtures("device")


def example(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    num, den = torch.rand(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64)
    return num, den, torch.randint(-2, G, (n,), generator=g)


def by_loop(num, den, groups):
    rows = list(zip(num.tolist(), den.tolist(), groups.tolist(), strict=True))
    good = [row for row in rows if math.isfinite(row[0])]
    return (
        [math.fsum(a for a, _, k in good if k == g) for g in range(G)],
        [math.fsum(b for _, b, k in good if k == g) for g in range(G)],
    )


@pytest.mark.parametrize(("chunk", "entries"), [(2**18, 2**24), (7, 2**24), (2**18, 50), (2**18, 1)])
def test_sums_and_counts(chunk, entries, monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK", chunk)
    monkeypatch.setattr(ops, "_CHUNK_ENTRIES", entries, raising=False)
    num, den, groups = example()
    (sums,), counts = group_losses([(num, den, groups)], G)
    nums, dens = by_loop(num, den, groups)
    assert sums.num.tolist() == pytest.approx(nums, rel=1e-13)
    assert sums.den.tolist() == pytest.approx(dens, rel=1e-13)
    unlabelled, *of_groups, bad_ids, bad_losses = map(float, counts)
    assert [unlabelled, *of_groups] == [int((groups < 0).sum()), *[int((groups == g).sum()) for g in range(G)]]
    assert [bad_ids, bad_losses] == [0, 0]


class Sizes(TorchDispatchMode):
    """The largest number of elements of a floating-point tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.is_contiguous():
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("membership", [False, True])
def test_memory_is_bounded_with_many_groups(membership, monkeypatch):
    entries, n_groups, n = 10_000, 500, 3000
    monkeypatch.setattr(ops, "_CHUNK_ENTRIES", entries, raising=False)
    losses = torch.rand(n, requires_grad=True)
    ids = torch.arange(n) % n_groups
    groups = ids.unsqueeze(1) == torch.arange(n_groups) if membership else ids
    with Sizes() as sizes:
        (sums,), _ = group_losses([(losses, torch.ones(n), groups)], n_groups)
        means = sums.means
        means.sum().backward()
    assert sizes.largest <= 3 * max(entries, n)
    expected = losses.detach().double().view(-1, n_groups).sum(0)
    torch.testing.assert_close(sums.num, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(means.detach(), expected * n_groups / n, rtol=1e-13, atol=0)
    torch.testing.assert_close(losses.grad, torch.full((n,), n_groups / n))


def test_single_precision_is_summed_in_double():
    n = 3 * 2**12
    num = torch.full((n,), 0.1)
    (sums,), _ = group_losses([(num, torch.ones(n), torch.arange(n) % G)], G)
    assert sums.losses.dtype == torch.float64
    assert sums.losses.tolist() == pytest.approx([float(torch.tensor(0.1).double())] * G, rel=1e-12)


@pytest.mark.parametrize("membership", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_with_a_bad_loss_are_left_out_and_counted(value, membership):
    num, den, groups = example()
    groups[:3] = torch.tensor([0, 1, -1])
    num[:3] = value
    num.requires_grad_()
    ids = groups.unsqueeze(1) == torch.arange(G) if membership else groups
    (sums,), bad = group_losses([(num, den, ids)], G)
    nums, dens = by_loop(num, den, groups)
    assert sums.num.tolist() == pytest.approx(nums, rel=1e-13)
    assert sums.den.tolist() == pytest.approx(dens, rel=1e-13)
    assert [float(x) for x in bad[-2:]] == [0, 3]
    loss = sums.weighted(torch.ones(G, dtype=torch.float64))
    assert loss.item() == pytest.approx(sum(a / b for a, b in zip(nums, dens, strict=True)), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, num)
    assert grad.tolist() == pytest.approx([0] * 3 + [1 / dens[k] if k >= 0 else 0 for k in groups.tolist()[3:]])


@pytest.mark.parametrize("membership", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_of_no_group_is_seen_alone(value, membership):
    """Its NaN would reach the gradients all the same."""
    num = torch.tensor([1.0, 2.0, value], requires_grad=True)
    ids = torch.tensor([0, 2, -1])
    groups = ids.unsqueeze(1) == torch.arange(G) if membership else ids
    (sums,), counts = group_losses([(num, torch.ones(3), groups)], G)
    assert [float(x) for x in counts] == [0, 1, 0, 1, 0, 1]
    (grad,) = torch.autograd.grad(sums.weighted(torch.ones(G)), num)
    assert grad.tolist() == [1, 1, 0]


@pytest.mark.parametrize("membership", [False, True])
def test_only_unlabelled(membership):
    criterion = GroupDROLoss(G)
    for ids, expected in (([-1, -1], True), ([-1, 1], False), ([], False), ([-1], True)):
        ids = torch.tensor(ids, dtype=torch.long)
        criterion(torch.ones(len(ids)), ids.unsqueeze(1) == torch.arange(G) if membership else ids)
        assert criterion.only_unlabelled() is expected


def test_ids_out_of_range_are_left_out_and_counted():
    num, den, groups = example()
    groups[:4] = torch.tensor([G, G + 1, G + 2, 10**12])
    (sums,), bad = group_losses([(num, den, groups)], G)
    assert sums.num.tolist() == pytest.approx(by_loop(num, den, groups)[0], rel=1e-13)
    assert [float(x) for x in bad[-2:]] == [4, 0]


def test_bad_rows_of_several_losses_are_added_up():
    num, den, groups = example()
    num[0], groups[1] = math.nan, G
    _, bad = group_losses([(num, den, groups), (num, den, groups)], G)
    assert [float(x) for x in bad[-2:]] == [2, 2]


def test_finite_losses_whose_sum_is_not():
    num = torch.full((4,), 1e308, dtype=torch.float64)
    (sums,), bad = group_losses([(num, torch.ones(4), torch.tensor([0, 0, 1, -1]))], 2)
    assert sums.num.tolist() == [math.inf, 1e308]
    assert [float(x) for x in bad[-2:]] == [0, 0]


@pytest.mark.parametrize("membership", [False, True])
@pytest.mark.parametrize("by", [None, 7.0])
def test_weighted_value_and_two_derivatives(membership, by):
    x, den, groups = example()
    x.requires_grad_()
    weights = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)
    ids = groups.unsqueeze(1) == torch.arange(G) if membership else groups
    divisor = None if by is None else torch.tensor(by, dtype=torch.float64)

    def weighted(x):
        (sums,), _ = group_losses([(x**3, den, ids)], G)
        return sums.weighted(weights, by=divisor)

    dens = by_loop(x.detach(), den, groups)[1]
    factors = [float(w) / (d if by is None else by) for w, d in zip(weights, dens, strict=True)] + [0.0, 0.0]
    expected = math.fsum(factors[k] * v**3 for k, v in zip(groups.tolist(), x.tolist(), strict=True))
    assert weighted(x).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(weighted, x)
    assert torch.autograd.gradgradcheck(weighted, x)


@pytest.mark.parametrize("membership", [False, True])
def test_means_and_their_gradient(membership):
    """Against a membership matrix in torch's own hands; rows of no group have no gradient."""
    x, den, groups = example()
    groups[groups == 1] = 2  # a group is absent
    x.requires_grad_()
    members = groups.unsqueeze(1) == torch.arange(G)
    (sums,), _ = group_losses([(x**3, den, members if membership else groups)], G)
    theirs = (members * (x**3).unsqueeze(1)).sum(0) / (members * den.unsqueeze(1)).sum(0).clamp_min(1e-300)
    torch.testing.assert_close(sums.means, theirs, rtol=1e-13, atol=0)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    ours, torchs = (torch.autograd.grad((m.exp() * weights).sum(), x)[0] for m in (sums.means, theirs))
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-15)
    assert sums.present.tolist() == [True, False, True]


def test_two_derivatives_of_means():
    x, den, groups = example(n=8)
    x.requires_grad_()

    def spread(x):
        (sums,), _ = group_losses([(x**3, den, groups)], G)
        return sums.means.square().sum()

    assert torch.autograd.gradcheck(spread, x)
    assert torch.autograd.gradgradcheck(spread, x)


def test_absent_group_and_rows_that_do_not_count():
    """A group whose rows all have denominator 0 (ignored targets) is as good as absent."""
    num = torch.tensor([2.0, 0.0, 4.0], requires_grad=True)
    (sums,), _ = group_losses([(num, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 1, 0]))], G)
    assert sums.losses.tolist() == [3.0, 0.0, 0.0]
    loss = sums.weighted(torch.full((G,), 1 / G, dtype=torch.float64))
    assert loss.item() == pytest.approx(1.0)
    assert torch.isfinite(torch.autograd.grad(loss, num)[0]).all()


def test_no_row_counts_at_all():
    """The factors stay finite, also in single precision: with no gradient behind the rows there shall be none."""
    num = torch.zeros(2, requires_grad=True)
    (sums,), _ = group_losses([(num, torch.zeros(2), torch.tensor([0, 1]))], G)
    loss = sums.weighted(torch.ones(G, dtype=torch.float64), by=sums.den.sum())
    assert loss.item() == 0.0
    assert torch.isfinite(torch.autograd.grad(loss, num)[0]).all()


def test_state_does_not_see_bad_rows_before_they_are_said():
    """Where nothing is read in a step the rows are masked at once and said later; on the CPU nothing changes at all."""
    bad, clean = GroupDROLoss(G, step_size=1.0), GroupDROLoss(G, step_size=1.0)

    def step_and_say():
        bad(torch.tensor([1.0, math.nan, 2.0]), torch.tensor([0, 0, 1]))
        bad.raise_if_bad()

    with pytest.raises(BadRowsError, match="finite losses, but 1 rows"):
        step_and_say()
    if arguments.on_host(torch.ones(1)):
        assert bad.weights.tolist() == pytest.approx([1 / G] * G)
        return
    clean(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    assert torch.equal(bad.weights, clean.weights)
    bad.raise_if_bad()  # said once


def test_one_batch_gives_the_same_on_both_ways(monkeypatch):
    num, den, groups = example()
    found = []
    for on_host in (True, False):
        monkeypatch.setattr(arguments, "on_host", lambda x, on_host=on_host: on_host)
        (sums,), _ = group_losses([(num, den, groups)], G)
        found.append(torch.cat((sums.num, sums.den, sums.losses)))
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_batch_without_a_counted_loss_is_a_loss_of_zero(dtype):
    """Also under a weight that a smallest divisor would make infinite."""
    losses = torch.zeros(3, dtype=dtype, requires_grad=True)
    criterion = GroupReweightingLoss(2, group_counts=[1, 9])
    (value,) = criterion.reweigh([(losses, torch.zeros(3, dtype=dtype), torch.tensor([0, 1, -1]))])
    value.backward()
    assert value.dtype == dtype
    assert value.item() == 0
    assert torch.isfinite(losses.grad).all()


@pytest.mark.parametrize("make", [GroupDROLoss, lambda n: GroupReweightingLoss(n, group_counts=[7] * n)])
def test_sums_beyond_half_precision_have_a_mean_within_it(make):
    losses, groups = torch.full((600,), 500.0, dtype=torch.float16), torch.arange(600) % G
    value = make(G)(losses, groups)
    assert value.dtype == torch.float16
    assert float(value) == pytest.approx(500, rel=5e-3)


def test_numbers_of_numpy_are_numbers():
    two, tenth = np.int64(2), np.float32(0.1)
    callbacks = [
        GroupDRO("place", two, step_size=tenth, adjustment=tenth, alpha=tenth),
        GroupReweighting(("place", "y"), (two, 2), power=tenth),
        DomainPenalisation("place", two, temperature=tenth, ema=tenth),
        IRM("place", two, penalty_weight=tenth, start_step=two),
        DomainAdversarial("place", two, features="net", strength=tenth),
        GroupMonitor("place", two),
    ]
    for callback in callbacks:
        for owner in (callback, getattr(callback, "module", None)):
            found = {**vars(owner)} if owner is not None else {}
            schedule = found.pop("schedule", None)
            found |= vars(schedule) if hasattr(schedule, "start_step") else {}
            assert not [name for name, value in found.items() if isinstance(value, np.generic)], callback
    assert callbacks[0].module.step_size == pytest.approx(0.1)
    assert callbacks[1].n_groups == (2, 2)
    for wrong in (np.bool_(True), True, 2.0, np.float64(2), "2"):
        with pytest.raises(DebiasError, match="`n_groups` to be a positive integer"):
            GroupDRO("place", wrong)
    for wrong in (np.bool_(True), np.float32("nan"), "0.1"):
        with pytest.raises(DebiasError, match="`step_size` to be a number"):
            GroupDRO("place", 2, step_size=wrong)
