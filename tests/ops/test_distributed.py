"""Sums and gathers over two ranks are those of one process, with their first and second derivatives."""

from __future__ import annotations

import time

import pytest
import torch

from _support.ranks import Ranks
from debias import GroupDROLoss
from debias.errors import DebiasError
from debias.ops.distributed import (
    as_global,
    gather,
    gather_objects,
    gathers,
    global_rank,
    global_sum,
    global_sums,
    is_distributed,
    weighted_mean,
    world_size,
)
from debias.tap.rows import RowTracker
from debias.tap.selection import reaching
from debias.tap.tap import LossTap

SIZES = [(3, 2), (5, 0), (0, 4)]


def rows(n, *, seed=0):
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_in_one_process_everything_is_the_identity():
    x = torch.ones(2, requires_grad=True)
    assert global_sum(x) is x
    assert gather(x) is x
    assert gather_objects(x) == [x]
    assert as_global(x, 2 * x) is x
    assert (is_distributed(), world_size(), global_rank()) == (False, 1, 0)


# ------------------------------------------------------------------------------------------- on two ranks, run by name


def _where(rank):
    return is_distributed(), world_size(), global_rank()


def _gradchecks(rank):
    """Both ranks perturb the same entries of the same tensor, so the function of `x` is `2 x` and its like."""
    x = rows(2).requires_grad_()
    first = torch.autograd.gradcheck(lambda x: global_sum(x**3) / 2, x)
    second = torch.autograd.gradgradcheck(lambda x: global_sum(x**3) / 2, x)
    transposed = global_sum(rows(4).T[:, ::2].requires_grad_())  # not contiguous
    return first, second, transposed


def _objective(x, total):
    """A mean enters a second statistic, and a derivative the objective: everything a penalty may do."""
    count = total(x.new_tensor(float(len(x))))
    mean = total(x.sum(0)) / count
    variance = total(((x - mean) ** 2).sum(0)) / count
    return (variance * mean.exp()).sum()


def _share(rank, sizes):
    return rows(sum(sizes)).split(list(sizes))[rank].clone().requires_grad_()


def _two_stage(rank, sizes):
    x = _share(rank, sizes)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)  # a parameter, equal on both ranks
    value = _objective(x * scale, global_sum)
    first, own = torch.autograd.grad(value, (scale, x), create_graph=True)
    # What a penalty on gradients does: the derivative of a function of the (global) gradient.
    (second,) = torch.autograd.grad((global_sum(first) / world_size()).pow(2).sum(), scale)
    return value.detach(), first.detach(), own.detach(), second


def _gathered(rank, sizes):
    x = _share(rank, sizes)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    together = gather(x * scale)
    value = torch.cdist(together, together.detach() + 1).exp().sum()
    first, own = torch.autograd.grad(value, (scale, x))
    return together.detach(), value.detach(), first, own


def _as_global(rank):
    x = torch.tensor(float(rank + 1), requires_grad=True)
    out = as_global(3 * x, torch.tensor(10.0))
    out.backward()
    return out.detach(), x.grad


def _weighted_mean(rank, sizes):
    x = _share(rank, sizes)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    losses = (x * scale).square().sum(1)
    value = weighted_mean(losses, torch.full_like(losses, 2.0), x.detach()[:, 0].exp())
    return value.detach(), *torch.autograd.grad(value, (scale, x))


def _shared(rank, sizes):
    """A function that every rank computes alike from two sums in one message."""
    x = _share(rank, sizes)
    total, squares = global_sums([x.sum(0), x.square().sum()], shared=True)
    value = (total.exp() * squares).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    refused = ""
    try:
        torch.autograd.grad(gradient.sum(), x)
    except DebiasError as error:
        refused = str(error)
    return value.detach(), gradient.detach(), refused


def _gathers(rank, sizes):
    x = _share(rank, sizes)
    rows_, column = gathers([x, x[:, 0]])
    return torch.equal(rows_, gather(x)), torch.equal(column, gather(x[:, 0]))


# -------------------------------------------------------------------------------------------------------------- tests


def test_ranks_know_themselves(ranks):
    assert ranks.run(_where) == [(True, 2, 0), (True, 2, 1)]


def test_global_sum_has_two_derivatives(ranks):
    for first, second, transposed in ranks.run(_gradchecks):
        assert first
        assert second
        assert torch.equal(transposed, 2 * rows(4).T[:, ::2])


@pytest.mark.parametrize("sizes", SIZES)
def test_two_stage_statistics_are_those_of_one_process(ranks, sizes):
    x = rows(sum(sizes)).requires_grad_()
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    value = _objective(x * scale, lambda x: x)
    first, own = torch.autograd.grad(value, (scale, x), create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), scale)
    outcomes = ranks.run(_two_stage, sizes)
    for got in outcomes:
        torch.testing.assert_close(got[0], value.detach(), rtol=1e-13, atol=0)
    # DDP averages the gradients of parameters; those of a rank's own rows are `world` times the objective's.
    torch.testing.assert_close(sum(o[1] for o in outcomes) / 2, first.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([o[2] for o in outcomes]) / 2, own.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sum(o[3] for o in outcomes) / 2, second, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", SIZES)
def test_gather_keeps_uneven_and_empty_ranks_in_order(ranks, sizes):
    x = rows(sum(sizes)).requires_grad_()
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    scaled = x * scale
    value = torch.cdist(scaled, scaled.detach() + 1).exp().sum()
    first, own = torch.autograd.grad(value, (scale, x))
    outcomes = ranks.run(_gathered, sizes)
    for together, got, *_ in outcomes:
        assert torch.equal(together, x.detach())
        torch.testing.assert_close(got, value.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(sum(o[2] for o in outcomes) / 2, first, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([o[3] for o in outcomes]) / 2, own, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_weighted_mean_is_that_of_one_process(ranks, sizes):
    x = rows(sum(sizes)).requires_grad_()
    weights = x.detach()[:, 0].exp()
    value = (weights * x.square().sum(1)).sum() / (2 * weights).sum()
    (own,) = torch.autograd.grad(value, x)
    outcomes = ranks.run(_weighted_mean, sizes)
    for got, _, _ in outcomes:
        torch.testing.assert_close(got, value.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(sum(o[1] for o in outcomes) / 2, (own * x.detach()).sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([o[2] for o in outcomes]) / 2, own, rtol=1e-12, atol=1e-14)
    none = torch.zeros(2, requires_grad=True)
    weighted_mean(none, torch.zeros(2)).backward()
    assert torch.equal(none.grad, torch.ones(2))  # of what does not count the value is 0, and nothing is divided by 0


@pytest.mark.parametrize("sizes", SIZES)
def test_shared_sums_are_differentiated_once(ranks, sizes):
    x = rows(sum(sizes)).requires_grad_()
    value = (x.sum(0).exp() * x.square().sum()).sum()
    (own,) = torch.autograd.grad(value, x)
    outcomes = ranks.run(_shared, sizes)
    for got, _, refused in outcomes:
        torch.testing.assert_close(got, value.detach(), rtol=1e-13, atol=0)
        assert "differentiated once" in refused or not refused
    assert any(refused for _, _, refused in outcomes)
    torch.testing.assert_close(torch.cat([o[1] for o in outcomes]) / 2, own, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_gathered_together(ranks, sizes):
    assert ranks.run(_gathers, sizes) == [(True, True)] * 2


def test_as_global_has_the_global_value_and_the_local_gradient(ranks):
    for value, grad in ranks.run(_as_global):
        assert value == 10
        assert grad == 3


# ------------------------------------------------------------------------------------------ the runner itself can fail


def _waits_for_nobody(rank):
    if rank == 0:
        global_sum(torch.ones(1))


def _hangs(rank):
    time.sleep(600)


def _raises_on_one(rank):
    if rank == 1:
        raise ValueError("only here")
    global_sum(torch.ones(1))


def test_a_rank_left_alone_is_an_error_and_not_a_hang(ranks):
    with pytest.raises(AssertionError, match="rank 0:"):
        ranks.run(_waits_for_nobody)
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*ValueError: only here"):
        ranks.run(_raises_on_one)


def test_a_hang_is_a_failure():
    one = Ranks(world=1)
    try:
        with pytest.raises(AssertionError, match=r"ranks \[0\] did not finish in 1 s"):
            one.run(_hangs, timeout=1)
        assert not one._processes
    finally:
        one.close()


# --------------------------------------------------------- what a step divides by stays exact, however ranks are filled

GROUP = torch.tensor([0, 0, 1, 1, 0, 1, 1])
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
LOSSES = {
    "mean": lambda loss, mask: loss.mean(),
    "masked mean": lambda loss, mask: (loss * mask).mean(),
    "own divisor": lambda loss, mask: (loss * mask).sum() / mask.sum(),
    "own count": lambda loss, mask: loss.sum() / len(loss),
    "divided elements": lambda loss, mask: (loss / len(loss)).sum(),
    "normalised weights": lambda loss, mask: (loss * (mask / mask.sum())).sum(),
    "weights of a mean of 1": lambda loss, mask: (loss * (mask / mask.mean())).mean(),
    "own number": lambda loss, mask: (loss * mask).sum() / mask.sum().item(),
    "a product": lambda loss, mask: loss @ mask / mask.sum(),
}


def _reduced(rank, name, sizes):
    """The gradient that DDP would apply, and the value of the loss."""
    begin = sum(sizes[:rank])
    part = slice(begin, begin + sizes[rank])
    weight = rows(1)[0].requires_grad_()
    criterion = GroupDROLoss(2, step_size=0.5)
    x, target, mask, group = rows(7)[part], rows(7, seed=1)[part, 0], MASK[part], GROUP[part]

    with LossTap(tracker=RowTracker((x, target, mask), len(x))) as tap:
        loss = LOSSES[name](torch.nn.functional.mse_loss(x @ weight, target, reduction="none"), mask)
    found = reaching(tap, loss)
    (call,) = found.calls
    found.multiply([call])
    value = found.replaced([call], criterion.reweigh([(call.num, call.den, call.of_rows(group))])[0])
    (grad,) = torch.autograd.grad(value, weight)
    return global_sum(grad) / world_size(), value.detach(), criterion.weights


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [(4, 3), (2, 5), (5, 2)])
def test_reductions_of_the_step_on_uneven_ranks(ranks: Ranks, name, sizes):
    expected = _reduced(0, name, (7,))
    for found in ranks.run(_reduced, name, sizes):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
