"""Training steps that could be reweighed wrongly without anybody noticing: each is right, or refused."""

import collections
import gc
import math
import random
import weakref

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from debias import (
    IRM,
    CVaRDRO,
    DomainAdversarial,
    Fishr,
    FocalLoss,
    GroupBalancedSampler,
    GroupDRO,
    GroupMixup,
    GroupMonitor,
    GroupReweighting,
    HessianAlignment,
    InferGroups,
    JustTrainTwice,
    LearningFromFailure,
    VREx,
    tag,
)
from debias.errors import (
    AmbiguousLossError,
    BatchKeyError,
    DebiasError,
    LossNotFoundError,
    RowsError,
    UntappedLossError,
)

N, D, C = 6, 5, 4
STEP_SIZE = 0.5
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
g = torch.Generator().manual_seed(1)
X = torch.randn(N, D, generator=g, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 0, 1])
Z = torch.rand(N, C, generator=g, dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1])
PERM = torch.tensor([4, 2, 5, 0, 1, 3])


class Base(L.LightningModule):
    def __init__(self, step=None, lr=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(D, C).double()
        self.s = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.step, self.lr = step, lr

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(step, callback=None, epochs=1, module=None, **trainer):
    module = module or Base(step)
    callback = callback or GroupDRO("place", 2, step_size=STEP_SIZE)
    data = DataLoader(tag(TensorDataset(X, Y, Z), place=GROUPS), batch_size=N)
    L.Trainer(max_epochs=epochs, callbacks=[callback], **QUIET, **trainer).fit(module, data)
    return module, callback


def dro(num, den, groups, log_q=(0.0, 0.0)):
    """The objective from the formula; also the new logarithms of the weights."""
    losses = [num[groups == k].sum() / den[groups == k].sum() if (groups == k).any() else num.sum() * 0 for k in (0, 1)]
    log_q = [q + STEP_SIZE * loss.item() for q, loss in zip(log_q, losses, strict=True)]
    total = sum(math.exp(q) for q in log_q)
    return sum(math.exp(q) / total * loss for q, loss in zip(log_q, losses, strict=True)), log_q


def assert_step(step, objective, callback=None):
    """One step of the Trainer moves the parameters by the gradient of the objective."""
    start = Base()
    expected = torch.autograd.grad(objective(start), list(start.parameters()), allow_unused=True)
    module, _ = fit(step, callback)
    for before, after, grad in zip(start.parameters(), module.parameters(), expected, strict=True):
        moved = torch.zeros_like(before) if grad is None else grad
        torch.testing.assert_close(after.detach(), before.detach() - moved, rtol=1e-12, atol=1e-14)


def losses_of(module):
    return F.cross_entropy(module.net(X), Y, reduction="none")


ONES = torch.ones(N, dtype=torch.float64)


# -- unreduced losses that are combined ------------------------------------------------------------

HALF = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
SIGNS = torch.tensor([1.0, -1, 1, -1, 1, 1], dtype=torch.float64)


def errors_of(module):
    return F.mse_loss(module.net(X), Z, reduction="none")


COMBINED = {
    "easy ones count half": lambda ce, mse: torch.where(ce < 1.4, ce, 0.5 * ce),
    "one of two losses": lambda ce, mse: torch.where(HALF > 0, mse.mean(1), ce),
    "capped": lambda ce, mse: torch.where(ce < 1.4, ce, torch.full_like(HALF, 1.4)),
    "capped by a number": lambda ce, mse: torch.where(ce < 1.4, ce, 1.4),
    "filled with a number": lambda ce, mse: ce.masked_fill(HALF == 0, 0.7),
    "filled with a tensor": lambda ce, mse: ce.masked_fill(mask=HALF == 0, value=torch.tensor(0.7).double()),
    "signed": lambda ce, mse: ce * SIGNS,
    "added": lambda ce, mse: ce + mse.sum(1),
}


@pytest.mark.parametrize("name", COMBINED)
def test_combined_losses_count_as_often_as_they_stand(name):
    def combined(m):
        return COMBINED[name](losses_of(m), errors_of(m))

    assert_step(lambda m, batch: combined(m).mean(), lambda m: dro(combined(m), ONES, GROUPS)[0])


@pytest.mark.parametrize("masked", [
    lambda ce: torch.where(HALF > 0, ce, 0.0),
    lambda ce: torch.where(HALF > 0, ce, torch.zeros_like(ce)),
    lambda ce: ce.masked_fill(HALF == 0, 0),
    lambda ce: ce * HALF,
    lambda ce: ce * (HALF > 0),
])  # fmt: skip
def test_zeros_are_a_mask(masked):
    def step(m, batch):
        return masked(F.cross_entropy(m.net(X), Y, reduction="none")).sum() / HALF.sum()

    assert_step(step, lambda m: dro(losses_of(m) * HALF, HALF, GROUPS)[0])


def test_losses_of_different_masks_are_added():
    def combined(m):
        return losses_of(m) * HALF + F.mse_loss(m.net(X)[:, 0], Z[:, 0], reduction="none")

    assert_step(lambda m, batch: combined(m).mean(), lambda m: dro(combined(m), ONES, GROUPS)[0])


def test_losses_of_different_samples_are_not_combined():
    def step(m, batch):
        x, y, z = batch
        ce = F.cross_entropy(m.net(x[PERM]), y[PERM], reduction="none")
        return (ce + F.mse_loss(m.net(x)[:, 0], z[:, 0], reduction="none")).mean()

    with pytest.raises(RowsError, match="each with what is of the same samples"):
        fit(step)


@pytest.mark.parametrize("choice", [0, "sum"])
def test_a_guarded_loss_of_nothing_is_nothing(choice):
    """An auxiliary loss whose mask is empty in this batch."""

    def step(m, batch):
        aux = F.mse_loss(m.net(X)[:, 0], Z[:, 0], reduction="none") * torch.zeros(N)
        return F.cross_entropy(m.net(X), Y) + 0.5 * aux.sum() / torch.zeros(N).sum().clamp(min=1)

    method = GroupDRO("place", 2, step_size=STEP_SIZE, loss=choice)
    assert_step(step, lambda m: dro(losses_of(m), ONES, GROUPS)[0], method)


def test_a_learned_weight_is_refused():
    def step(m, batch):
        return F.mse_loss(m.net(X)[:, 0], Z[:, 0], weight=m.s[0] * ONES)

    with pytest.raises(UntappedLossError, match="`weight` of `mse_loss` to be constant"):
        fit(step)


def test_a_loss_that_learns_by_another_argument_is_seen():
    def step(m, batch):
        mu, var = m.net(X)[:, 0], m.net(X)[:, 1].exp()
        return F.mse_loss(mu, Z[:, 0]) + F.gaussian_nll_loss(mu.detach(), Z[:, 0], var)

    with pytest.raises(AmbiguousLossError, match="mse_loss, gaussian_nll_loss"):
        fit(step)


@pytest.mark.parametrize("method", [IRM, Fishr, HessianAlignment])
@pytest.mark.parametrize("changed", [
    lambda ce, mse: (1 - torch.exp(-ce)) ** 2 * ce,
    lambda ce, mse: ce + mse,
    lambda ce, mse: torch.where(ce < 1.4, ce, 1.4),
])  # fmt: skip
def test_penalties_on_derivatives_refuse_losses_that_are_not_the_functions_own(method, changed):
    def step(m, batch):
        x, y, z = batch
        logits = m.net(x)
        ce = F.cross_entropy(logits, y, reduction="none")
        return changed(ce, F.mse_loss(logits, z, reduction="none").mean(1)).mean()

    with pytest.raises(RowsError, match=r"what that function makes of the logits.*VREx"):
        fit(step, method("place", 2))


@pytest.mark.parametrize("method", [IRM, Fishr, HessianAlignment])
def test_penalties_on_derivatives_take_masks_and_weights(method):
    def step(m, batch):
        x, y, _ = batch
        return (F.cross_entropy(m.net(x), y, reduction="none") * HALF * 0.3).sum() / HALF.sum()

    fit(step, method("place", 2))


# -- rows that look like those of the batch --------------------------------------------------------


def test_a_reordering_that_starts_later_is_followed():
    """Targets of unknown origin: from the second step on only what matters is recorded."""
    values = []

    def step(m, batch):
        z, y = m.net(batch[0]), batch[2].argmax(1)
        if m.global_step:
            z, y = z[PERM], y[PERM]
        return F.cross_entropy(z, y)

    class Returned(Base):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            values.append(outputs["loss"].item())

    fit(step, GroupReweighting("place", 2, group_counts=[4, 2]), epochs=2, module=Returned(step, lr=0.0))
    module = Base()
    losses = F.cross_entropy(module.net(X), Z.argmax(1), reduction="none")
    expected = (losses[GROUPS == 0].mean() + losses[GROUPS == 1].mean()) / 2
    assert values[1] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rows", [N, 3])
def test_rows_from_elsewhere_have_no_group(rows):
    memory, labels = torch.randn(N, D, dtype=torch.float64), torch.randint(0, C, (N,))

    def step(m, batch):
        x, y, _ = batch
        return F.cross_entropy(m.net(torch.cat([x, memory[:rows]])), torch.cat([y, labels[:rows]]))

    with pytest.raises(RowsError, match="to be those of the batch"):
        fit(step)


def test_sorted_rows_are_nobodys():
    def step(m, batch):
        x, _, z = batch
        return F.mse_loss(m.net(x)[:, 0].sort().values, z[:, 0].sort().values)

    with pytest.raises(RowsError, match="to be those of the batch"):
        fit(step)


def test_sorting_classes_moves_no_row():
    def step(m, batch):
        return F.mse_loss(m.net(batch[0]).sort(dim=1).values, batch[2].sort(dim=1).values)

    def objective(m):
        squared = (m.net(X).sort(dim=1).values - Z.sort(dim=1).values).square().sum(1)
        return dro(squared, C * ONES, GROUPS)[0]

    assert_step(step, objective)


def test_a_triplet_is_its_anchors():
    def triplets(m, **options):
        return F.triplet_margin_loss(m.net(X), m.net(X + 1), m.net(-X), **options)

    assert_step(lambda m, batch: triplets(m), lambda m: dro(triplets(m, reduction="none"), ONES, GROUPS)[0])


def test_a_single_number_is_no_sample():
    def step(m, batch):
        x, y, z = batch
        same = y[None] == y[:, None]  # `y[None]` has one row, made of the batch
        return F.mse_loss(m.net(x)[:, 0].mean(), same.double().mean() * z.mean())

    with pytest.raises(RowsError, match="to be those of the batch"):
        fit(step)


MOVED = {
    "permuted": (lambda ls: ls[PERM].mean(), PERM),
    "sorted": (lambda ls: ls[ls.argsort(descending=True)].mean(), None),
    "flipped": (lambda ls: ls.flip(0).mean(), torch.arange(N).flip(0)),
    "rolled": (lambda ls: ls.roll(2).mean(), torch.arange(N).roll(2)),
    "one group": (lambda ls: ls[Y == 3].mean(), torch.tensor([3])),
    "sliced": (lambda ls: ls[2:5].mean(), torch.arange(2, 5)),
    "viewed": (lambda ls: ls.view(2, 3).mean(), torch.arange(N)),
    "transposed": (lambda ls: ls.view(2, 3).T.reshape(-1).mean(), torch.arange(N).view(2, 3).T.reshape(-1)),
    "unsqueezed": (lambda ls: ls.unsqueeze(0).mean(), torch.arange(N)),
    "over its axis": (lambda ls: ls.mean(0), torch.arange(N)),
    "by keyword": (lambda ls: torch.mean(input=ls), torch.arange(N)),
    "repeated": (lambda ls: ls.repeat(2).mean(), torch.arange(N).repeat(2)),
    "plus a number": (lambda ls: (ls + 1.0).mean(), torch.arange(N)),
    "where": (lambda ls: torch.where(Y > 2, 0.0, ls).sum() / (Y <= 2).sum(), (Y <= 2).nonzero().flatten()),
}


@pytest.mark.parametrize("name", MOVED)
def test_moved_unreduced_losses(name):
    reduce, index = MOVED[name]

    def objective(module):
        ls = losses_of(module)
        order = ls.argsort(descending=True) if index is None else index
        picked = ls[order] + (1.0 if name == "plus a number" else 0.0)
        return dro(picked, ONES[: len(order)].repeat(2)[: len(order)], GROUPS[order])[0]

    def step(module, batch):
        x, y, _ = batch
        return reduce(F.cross_entropy(module.net(x), y, reduction="none"))

    if name == "repeated":

        def objective(module):
            ls = losses_of(module).repeat(2)
            return dro(ls, ONES.repeat(2), GROUPS.repeat(2))[0]

    assert_step(step, objective)


@pytest.mark.parametrize("how", [lambda ls: ls.view(2, 3).mean(1).mean(), lambda ls: ls.view(2, 3).mean(0).sum() / 3])
def test_an_unreduced_loss_that_is_averaged_in_two_stages(how):
    def step(module, batch):
        x, y, _ = batch
        return how(F.cross_entropy(module.net(x), y, reduction="none"))

    assert_step(step, lambda module: dro(losses_of(module), ONES, GROUPS)[0])


def test_an_average_that_keeps_its_axis_has_its_factor_beside_another_loss():
    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        return 0.3 * F.cross_entropy(out, y, reduction="none").mean(0, keepdim=True).sum() + F.mse_loss(out, z)

    both = GroupDRO("place", 2, step_size=STEP_SIZE, loss="sum")
    assert_step(step, lambda m: dro(0.3 * losses_of(m) + errors_of(m).mean(1), ONES, GROUPS)[0], both)


def test_averages_of_targets_that_are_weighed_differently():
    """Averaged over the samples first: what the step does next weighs the targets."""
    weights = torch.arange(1.0, C + 1).double()

    def step(module, batch):
        x, _, z = batch
        return (weights * F.mse_loss(module.net(x), z, reduction="none").mean(0)).sum()

    assert_step(step, lambda m: dro((weights * errors_of(m)).sum(1), ONES, GROUPS)[0])


# Losses of the batch, and a sum of weights in another order, or of another shape.
ELSEWHERE = {
    "sorted": lambda m, x, y, z: F.cross_entropy(m.net(x[PERM]), y[PERM], reduction="sum") / z[:, 0].sum(),
    "weights of the other order": lambda m, x, y, z: F.cross_entropy(m.net(x), y, reduction="sum") / z[PERM, 0].sum(),
    "read": lambda m, x, y, z: F.cross_entropy(m.net(x[PERM]), y[PERM], reduction="none").sum() / z[:, 0].sum().item(),
    "means": lambda m, x, y, z: F.cross_entropy(m.net(x[PERM]), y[PERM], reduction="none").mean() / z[:, 0].mean(),
    "views": lambda m, x, y, z: (
        F.cross_entropy(m.net(x).repeat(2, 1), y.repeat(2), reduction="sum") / z[:, 0].repeat_interleave(2).sum()
    ),
    "classes first": lambda m, x, y, z: F.mse_loss(m.net(x).T, z.T, reduction="sum") / z.sum(),
    "of each sample": lambda m, x, y, z: (
        F.mse_loss(m.net(x).T.flatten(), z.T.flatten(), reduction="sum") / z[:, 0].sum()
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_weights_count_for_their_samples_wherever_these_lie(name):
    def objective(m):
        of_classes = name in ("classes first", "of each sample")
        weights = Z.sum(1) if name == "classes first" else Z[:, 0]
        return dro(errors_of(m).sum(1) if of_classes else losses_of(m), weights, GROUPS)[0]

    assert_step(lambda m, batch: ELSEWHERE[name](m, *batch), objective)


@pytest.mark.parametrize("step", [
    lambda m, x, y, z: F.cross_entropy(m.net(x[:4]), y[:4], reduction="sum") / z[:, 0].sum(),
    lambda m, x, y, z: F.cross_entropy(m.net(x[:4]), y[:4], reduction="none").mean() / z[:, 0].mean(),
])  # fmt: skip
def test_weights_of_samples_without_a_loss_are_refused(step):
    with pytest.raises(UntappedLossError):
        fit(lambda m, batch: step(m, *batch))


@pytest.mark.parametrize(
    "edit",
    [
        lambda ls: ls.mul_(SIGNS),
        lambda ls: ls.__setitem__(Y == 3, 0.0),
        lambda ls: ls.masked_fill_(Y == 3, 0),
    ],
)
def test_unreduced_losses_changed_in_place(edit):
    def edited(module):
        losses = F.cross_entropy(module.net(X), Y, reduction="none")
        edit(losses)
        return losses

    assert_step(lambda m, batch: edited(m).mean(), lambda m: dro(edited(m), ONES, GROUPS)[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_averages_changed_in_place(axis):
    """Averages over the samples, of which there is one for each target; the step needs them no more as they were."""
    weights = torch.arange(1.0, C + 1).double()

    def step(module, batch):
        x, _, z = batch
        averages = F.mse_loss(module.net(x), z, reduction="none").movedim(0, axis).mean(axis)
        averages *= weights
        return averages.sum()

    assert_step(step, lambda m: dro((weights * errors_of(m)).sum(1), ONES, GROUPS)[0])


@pytest.mark.parametrize("key", [(slice(None), 1), (..., 1), 1])
def test_unreduced_losses_that_are_written_elsewhere_are_refused(key):
    def step(module, batch):
        losses = torch.zeros(N, 2).double() if isinstance(key, tuple) else torch.zeros(2, N).double()
        losses[key] = F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
        return losses.mean()

    with pytest.raises(LossNotFoundError, match="cannot be followed"):
        fit(step)


@pytest.mark.parametrize("made", [lambda losses: losses, torch.exp])
def test_unreduced_losses_that_trade_places_in_place_are_refused(made):
    def step(module, batch):
        x, y, _ = batch
        losses = made(F.cross_entropy(module.net(x), y, reduction="none"))
        losses[:3] = losses[3:].clone()
        return losses.mean()

    with pytest.raises(RowsError, match="rows cannot be followed"):
        fit(step)


TARGETS = {
    "one hot": lambda y: F.one_hot(y, C).double()[PERM],
    "compared": lambda y: (y > 1).long()[PERM],
    "plus": lambda y: (y + 0)[PERM],
    "clamped": lambda y: y.clamp(max=2)[PERM],
    "where": lambda y: torch.where(y > 2, 0, y)[PERM],
    "index_select": lambda y: y.index_select(0, PERM),
}


@pytest.mark.parametrize("name", TARGETS)
def test_derived_targets_keep_their_order(name):
    make = TARGETS[name]

    def step(module, batch):
        x, y, _ = batch
        return F.cross_entropy(module.net(x[PERM]), make(y))

    def objective(module):
        losses = F.cross_entropy(module.net(X[PERM]), make(Y), reduction="none")
        return dro(losses, ONES, GROUPS[PERM])[0]

    assert_step(step, objective)


@pytest.mark.parametrize("how", ["losses", "rows", "rows of matrices"])
def test_rows_that_a_mask_of_other_samples_chooses_are_refused(how):
    def step(module, batch):
        x, y, _ = batch
        others = (y > 0)[PERM]  # as that of the partner that a sample is mixed with
        if how == "losses":
            return F.cross_entropy(module.net(x), y, reduction="none")[others].mean()
        return F.cross_entropy(module.net(x)[others] if how == "rows" else module.net(x)[others, :], y[(others,)])

    with pytest.raises(RowsError, match=r"mixes samples|cannot be followed"):
        fit(step)


def test_a_target_of_unknown_origin_in_a_reordered_batch_is_refused():
    def step(module, batch):
        x, y, _ = batch
        target = torch.from_numpy(y.numpy()[::-1].copy())
        return F.cross_entropy(module.net(x.flip(0)), target)

    with pytest.raises(RowsError, match="rows="):
        fit(step)
    reversed_rows = GroupDRO("place", 2, step_size=STEP_SIZE, rows=_reversed)
    assert_step(step, lambda m: dro(losses_of(m), ONES, GROUPS)[0], reversed_rows)


def _reversed(call, n):
    return torch.arange(n).flip(0)


def test_a_target_that_mixes_what_a_teacher_makes_is_refused():
    teacher = nn.Linear(D, C).double()

    def step(module, batch):
        with torch.no_grad():
            target = teacher(batch[0])
        return F.mse_loss(module.net(batch[0]), 0.7 * target + 0.3 * target.flip(0))

    with pytest.raises(RowsError, match="mixes samples"):
        fit(step)


def test_stated_losses_in_an_order_of_their_own():
    def step(module, batch):
        losses = F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")[PERM]
        return {"loss": losses.mean(), "losses": losses}

    assert_step(step, lambda m: dro(losses_of(m), ONES, GROUPS)[0])


def test_losses_of_single_samples_that_are_stacked():
    def step(module, batch):
        pairs = list(zip(module.net(batch[0]), batch[1], strict=True))
        return torch.stack([F.cross_entropy(z, y, reduction="none") for z, y in pairs[::-1]]).mean()

    assert_step(step, lambda m: dro(losses_of(m), ONES, GROUPS)[0])


def test_samples_along_the_second_axis_of_a_loss_that_is_divided_by_the_first():
    def step(module, batch):
        prediction, target = module.net(batch[0]).log_softmax(1), batch[2].softmax(1)
        return F.kl_div(prediction.T, target.T, reduction="batchmean")

    with pytest.raises(RowsError, match="samples along the first axis"):
        fit(step)


def test_targets_of_unknown_origin_are_followed_in_later_steps_too():
    """Time first, and made with NumPy."""
    x, y = torch.randn(N, 3, D, generator=g, dtype=torch.float64), torch.arange(3 * N).view(N, 3) % C

    def step(module, batch):
        target = torch.from_numpy(batch[1].numpy().copy())
        return F.cross_entropy(module.net(batch[0]).transpose(0, 1).reshape(-1, C), target.t().reshape(-1))

    def flat(module, batch):
        return F.cross_entropy(module.net(batch[0]).flatten(0, 1), batch[1].flatten())

    trained = []
    for how in (step, flat):
        module, data = Base(how), DataLoader(tag(TensorDataset(x, y), place=GROUPS), batch_size=N)
        dro = GroupDRO("place", 2, step_size=STEP_SIZE)
        L.Trainer(max_epochs=2, callbacks=[dro], **QUIET).fit(module, data)
        trained.append(module.net.weight)
    torch.testing.assert_close(*trained)


def test_rows_of_packed_sequences_are_not_those_of_a_mask():
    x, y = torch.randn(N, 3, D, generator=g, dtype=torch.float64), torch.arange(3 * N).view(N, 3) % C
    lengths = torch.tensor([3, 1, 2, 2, 3, 1])

    def step(module, batch):
        x, y, lengths = batch
        packed = [pack_padded_sequence(v, lengths, batch_first=True, enforce_sorted=False).data for v in (x, y)]
        assert len(x[torch.arange(3) < lengths[:, None]]) == len(packed[0])  # of as many rows, in another order
        return F.cross_entropy(module.net(packed[0]), torch.from_numpy(packed[1].numpy().copy()))

    data = DataLoader(tag(TensorDataset(x, y, lengths), place=GROUPS), batch_size=N)
    with pytest.raises(RowsError, match="to be those of the batch"):
        L.Trainer(max_epochs=1, callbacks=[GroupDRO("place", 2)], **QUIET).fit(Base(step), data)


def written_by(ls, w):
    """Weights to write into."""
    made = torch.ones_like(w)
    made[w > 0] = w.max()
    return (ls * made).mean()


def written_of(ls, w):
    """The weights of the batch, written elsewhere."""
    made = torch.zeros_like(w)
    made[:] = w
    return ls[made.argsort()[: N // 2]].mean()


def counted(w, z):
    """Weights of the classes, counted one by one."""
    weights = torch.ones(C, dtype=z.dtype)
    for c in range(C):
        weights[c] = 1 / (1 + ((C * w).long() == c).sum())
    return F.cross_entropy(z, Y, weights)


def through_a_view(ls, w):
    seen = ls[:]
    seen *= w / w.mean()
    return ls.mean()


def changed_afterwards(ls, w):
    w = w.clone()
    ls = ls / w.mean()
    w[0] = 1
    return ls.mean()


def copied(ls, w):
    ls.copy_(ls * w / w.mean())
    return ls.mean()


def _below(ls):
    return torch.where(ls < 1, ls, 0.0)


OF_THE_BATCH = {
    "written into constants": lambda ls, w, z: written_by(ls, w),
    "of what was written": lambda ls, w, z: written_of(ls, w),
    "counted into constants": lambda ls, w, z: counted(w, z),
    "shares": lambda ls, w, z: (ls * w.softmax(0)).mean(),
    "shares in a column": lambda ls, w, z: (F.mse_loss(z, Z, reduction="none") * w.softmax(0)[:, None]).mean(),
    "running sums": lambda ls, w, z: (ls * w.cumsum(0)).mean(),
    "sorted": lambda ls, w, z: (ls * w.sort().values).mean(),
    "sorted in a column": lambda ls, w, z: (F.mse_loss(z, Z, reduction="none") * w.sort().values[:, None]).mean(),
    "by keyword": lambda ls, w, z: torch.mul(ls, other=w / w.max()).mean(),
    "a threshold for what was divided by its mean": lambda ls, w, z: (
        (ls / ls.detach().mean()).masked_fill(ls / ls.detach().mean() > 1, 0).mean()
    ),
    "weights through a view": lambda ls, w, z: through_a_view(ls, w),
    "weights that are changed afterwards": lambda ls, w, z: changed_afterwards(ls, w),
    "weighed losses that are copied": lambda ls, w, z: copied(ls, w),
    "those below it": lambda ls, w, z: _below(ls * w / w.mean()).mean(),
    "a loss without a gradient": lambda ls, w, z: ls.mean() * F.mse_loss(z.detach(), Z),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_weights_that_are_made_of_the_whole_batch_are_refused(name):
    def step(module, batch):
        x, y, z = batch
        made = module.net(x)
        return OF_THE_BATCH[name](F.cross_entropy(made, y, reduction="none"), z[:, 0], made)

    with pytest.raises((UntappedLossError, RowsError), match=r"made of the whole batch|cannot be followed"):
        fit(step)


def test_a_permutation_that_comes_only_in_later_steps():
    def step(module, batch):
        x, y, _ = batch
        if module.current_epoch:
            x, y = x[PERM], y[PERM]
        return F.cross_entropy(module.net(x), y)

    module, _ = fit(step, epochs=2)
    by_hand, log_q = Base(), (0.0, 0.0)
    for _ in range(2):
        loss, log_q = dro(losses_of(by_hand), ONES, GROUPS, log_q)
        for p, grad in zip(
            by_hand.net.parameters(), torch.autograd.grad(loss, list(by_hand.net.parameters())), strict=True
        ):
            p.data -= grad
    torch.testing.assert_close(module.net.weight, by_hand.net.weight, rtol=1e-12, atol=1e-14)


def test_losses_that_change_places():
    """What is only logged changes nothing."""

    def logging(other):
        def step(module, batch):
            x, y, z = batch
            out = module.net(x)
            if module.current_epoch:
                other(out, y, z)  # only logged
            return F.cross_entropy(out, y)

        return step

    def weight(*args):
        return fit(*args, epochs=2)[0].net.weight

    plain, squares = logging(lambda *_: None), logging(lambda out, y, z: F.mse_loss(out, z))
    assert torch.equal(weight(squares), weight(plain))
    chosen = GroupDRO("place", 2, step_size=STEP_SIZE, loss=_is_cross_entropy)
    assert torch.equal(weight(squares, chosen), weight(plain))
    assert torch.equal(weight(logging(lambda out, y, z: F.cross_entropy(2 * out, y))), weight(plain))


@pytest.mark.parametrize("method", [GroupDRO, VREx])
def test_another_loss_at_the_position(method):
    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        auxiliary = F.mse_loss(out, z) if module.current_epoch else 0.0
        return auxiliary + F.cross_entropy(out, y)

    with pytest.raises(AmbiguousLossError, match=r"`loss=0` of \w+ to point to.*got `mse_loss` where `cross_entropy`"):
        fit(step, method("place", 2, loss=0), epochs=2)
    with pytest.raises(AmbiguousLossError, match="got `mse_loss` where `cross_entropy`"):
        fit(None, GroupDRO("place", 2, loss=0), epochs=2, module=manual(step))
    fit(step, method("place", 2, loss=_is_cross_entropy), epochs=2)


CHUNKS = {
    "halves": lambda m, x, y: sum(F.cross_entropy(m.net(a), b) for a, b in zip(x.split(3), y.split(3), strict=True)),
    "one by one": lambda m, x, y: torch.stack([F.cross_entropy(m.net(x[i : i + 1]), y[i : i + 1]) for i in range(N)]),
    "unreduced": lambda m, x, y: sum(
        F.cross_entropy(m.net(a), b, reduction="none").mean() for a, b in zip(x.split(3), y.split(3), strict=True)
    ),
}


@pytest.mark.parametrize("method", [GroupDRO, VREx])
@pytest.mark.parametrize("name", CHUNKS)
def test_losses_of_parts_of_a_batch(name, method):
    """Means by group of the parts do not add up to those of the batch."""

    def step(module, batch):
        return CHUNKS[name](module, batch[0], batch[1]).mean()

    with pytest.raises(
        AmbiguousLossError, match=r"of all 6 samples of the batch, but got \d of [13], .*Join the logits"
    ):
        fit(step, method("place", 2, loss="sum"))


def test_a_loss_of_some_samples_beside_one_of_all():
    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        return F.cross_entropy(out, y) + F.mse_loss(out[:3], z[:3])

    fit(step, GroupDRO("place", 2, loss="sum"))


@pytest.mark.parametrize("name", CHUNKS)
def test_losses_of_chunks_beside_one_of_all(name):
    def step(module, batch):
        x, y, z = batch
        return CHUNKS[name](module, x, y).mean() + F.mse_loss(module.net(x), z)

    with pytest.raises(AmbiguousLossError, match="to be no chunks"):
        fit(step, GroupDRO("place", 2, loss="sum"))


def test_losses_of_what_masks_choose_beside_one_of_all():
    odd = Y % 2 == 1

    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        return F.cross_entropy(out[odd], y[odd]) + F.mse_loss(out[~odd], z[~odd]) + F.mse_loss(out, z)

    def objective(m):
        ce, mse = losses_of(m), errors_of(m).mean(1)
        parts = [[ce[odd & (k == GROUPS)], mse[~odd & (k == GROUPS)], mse[k == GROUPS]] for k in (0, 1)]
        return dro(torch.stack([sum(x.mean() for x in each) for each in parts]), ONES[:2], torch.arange(2))[0]

    assert_step(step, objective, GroupDRO("place", 2, step_size=STEP_SIZE, loss="sum"))


def _is_cross_entropy(call):
    return call.name == "cross_entropy"


def test_an_auxiliary_loss_that_joins_later():
    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        auxiliary = F.mse_loss(out, z)
        loss = F.cross_entropy(out, y)
        return loss + auxiliary if module.current_epoch else loss

    with pytest.raises(AmbiguousLossError, match="got 2: mse_loss, cross_entropy"):
        fit(step, epochs=2)
    fit(step, GroupDRO("place", 2, loss="sum"), epochs=2)


def test_an_untappable_loss_that_joins_later():
    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        loss = F.cross_entropy(out, y)
        return loss + F.mse_loss(out, z, reduction="none").logsumexp(0).mean() if module.current_epoch else loss

    with pytest.raises(UntappedLossError, match=r"mse_loss\(reduction='none'\)"):
        fit(step, epochs=2)


def test_a_loss_without_a_per_sample_form_next_to_another_one():
    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        triplet = F.triplet_margin_with_distance_loss(out, z, z.flip(0))
        return F.cross_entropy(out, y) + triplet

    with pytest.raises(UntappedLossError, match="triplet_margin_with_distance_loss"):
        fit(step)


def test_learned_weights_of_several_losses_learn_from_the_debiased_ones():
    """Kendall weighting: the step is not linear in its losses alone."""

    def combine(module, a, b):
        return torch.exp(-module.s[0]) * a + module.s[0] + torch.exp(-module.s[1]) * b + module.s[1]

    def step(module, batch):
        x, y, z = batch
        out = module.net(x)
        return combine(module, F.cross_entropy(out, y), F.mse_loss(out, z))

    def objective(module):
        a, b = losses_of(module), F.mse_loss(module.net(X), Z, reduction="none").mean(1)
        means = [[x[k == GROUPS].mean() for k in (0, 1)] for x in (a, b)]
        q = [math.exp(STEP_SIZE * (p + r).item()) for p, r in zip(*means, strict=True)]
        weighted = [sum(w / sum(q) * x for w, x in zip(q, m, strict=True)) for m in means]
        return combine(module, *weighted)

    assert_step(step, objective, GroupDRO("place", 2, step_size=STEP_SIZE, loss="sum"))


@pytest.mark.parametrize("method", [GroupDRO, VREx])
@pytest.mark.parametrize("change", [lambda x: x**2, torch.sqrt, lambda x: (x - 0.7).abs() + 0.7, lambda x: x.exp()])
def test_a_loss_that_is_not_linear_in_what_is_seen_is_refused(change, method):
    """The loss of a group would be the square of its mean, and not a part of the square of all."""

    def step(module, batch):
        x, y, _ = batch
        return change(F.cross_entropy(module.net(x), y))

    with pytest.raises(UntappedLossError, match=r"linear in `cross_entropy`.*`losses='split'`"):
        fit(step, method("place", 2))


def test_a_loss_that_is_not_linear_with_a_pass_per_group():
    def step(module, batch):
        x, y, _ = batch
        return F.cross_entropy(module.net(x), y).sqrt()

    def objective(module):
        losses = [losses_of(module)[g == GROUPS].mean().sqrt() for g in (0, 1)]
        q = torch.softmax(STEP_SIZE * torch.stack(losses).detach(), 0)
        return q[0] * losses[0] + q[1] * losses[1]

    assert_step(step, objective, GroupDRO("place", 2, step_size=STEP_SIZE, losses="split"))


def test_a_step_that_differentiates_its_own_loss():
    def step(module, batch):
        x, y, _ = batch
        loss = F.cross_entropy(module.net(x), y)
        (grad,) = torch.autograd.grad(loss, module.net.bias, create_graph=True)
        return loss + grad.pow(2).sum()

    def objective(module):
        losses = losses_of(module)
        (grad,) = torch.autograd.grad(losses.mean(), module.net.bias, create_graph=True)
        return dro(losses, ONES, GROUPS)[0] + grad.pow(2).sum()

    with pytest.warns(UserWarning, match=r"adds a term to `cross_entropy`.*`loss=0`"):
        fit(step)
    assert_step(step, objective, GroupDRO("place", 2, step_size=STEP_SIZE, loss=0))


def test_a_term_on_sampled_weights_is_one_on_parameters():
    """As of Bayesian layers, which keep the divergence of the weights that they have used."""

    def step(module, batch):
        x, y, _ = batch
        weight = module.net.weight * (1 + 0.1 * torch.ones(C, D))
        return F.cross_entropy(F.linear(x, weight, module.net.bias), y) + 0.01 * weight.pow(2).sum()

    fit(step, VREx("place", 2))


@pytest.mark.parametrize("late", [False, True])
def test_a_term_on_other_rows_than_the_samples_is_no_regulariser(late):
    """Such as those of the nodes of graphs; also where it begins later, on logging steps."""
    steps = []

    def step(module, batch):
        x, y, _ = batch
        loss = F.cross_entropy(module.net(x), y)
        steps.append(module.net(torch.tensor(3 * x.tolist()).double()).pow(2).mean())
        return loss if late and len(steps) < 2 else loss + steps[-1]

    module = Base(step)
    loader = DataLoader(tag(TensorDataset(X, Y, Z), place=GROUPS), batch_size=N // 2)
    with pytest.raises(UntappedLossError, match="adds a term to `cross_entropy`"):
        L.Trainer(max_epochs=1, callbacks=[VREx("place", 2)], log_every_n_steps=1, **QUIET).fit(module, loader)


def test_a_nested_pair_of_two_samples_is_a_pair():
    class Pairs(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return X[i], (Y[i], f"path {i}")

    class Module(Base):
        def training_step(self, batch, batch_idx):
            x, (y, _) = batch
            return F.cross_entropy(self.net(x), y)

    callback = GroupDRO("place", 2, step_size=STEP_SIZE)
    module = Module()
    losses = F.cross_entropy(module.net(X[:2]), Y[:2], reduction="none").tolist()
    L.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(
        module, DataLoader(tag(Pairs(), place=torch.tensor([0, 1])), batch_size=2)
    )
    assert callback.module.by_group()["loss_by_group"].tolist() == pytest.approx(losses)


# -- manual optimisation
# -------------------------------------------------------------------------------------------------


def manual(step):
    class Module(Base):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = step(self, batch)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    return Module()


def two_losses(module, batch):
    x, y, z = batch
    out = module.net(x)
    return F.mse_loss(out, z) + F.cross_entropy(out, y)


def test_manual_optimisation_with_a_chosen_loss():
    module, _ = fit(None, GroupDRO("place", 2, step_size=STEP_SIZE, loss=_is_cross_entropy), module=manual(two_losses))
    start = Base()
    loss = F.mse_loss(start.net(X), Z) + dro(losses_of(start), ONES, GROUPS)[0]
    (grad,) = torch.autograd.grad(loss, start.net.weight)
    torch.testing.assert_close(module.net.weight.detach(), start.net.weight.detach() - grad, rtol=1e-12, atol=1e-14)


def test_manual_optimisation_refuses_a_number_of_the_batch_also_after_the_loss():
    def over_the_mean(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1]) / batch[2].abs().mean()

    def over_the_mean_of_weights(module, batch):
        weights = batch[2].abs()[:, 0]
        return (F.cross_entropy(module.net(batch[0]), batch[1], reduction="none") * weights).mean() / weights.mean()

    for step in (over_the_mean, over_the_mean_of_weights):
        with pytest.raises(
            UntappedLossError, match=r"whole batch.*automatic optimisation. There methods.*`losses='split'`"
        ):
            fit(None, GroupDRO("place", 2), module=manual(step))
    fit(None, GroupDRO("place", 2), module=manual(lambda m, b: 2 * F.cross_entropy(m.net(b[0]), b[1]) / len(b[0])))


def test_manual_optimisation_asks_which_loss_and_says_when_there_is_none():
    with pytest.raises(AmbiguousLossError, match="loss=<index>"):
        fit(None, module=manual(two_losses))
    with pytest.raises(DebiasError, match="choose one loss under manual optimisation, but got 'sum'"):
        fit(None, GroupDRO("place", 2, loss="sum"), module=manual(two_losses))
    unseen = manual(lambda m, b: F.cross_entropy(m.net(b[0]), b[1], reduction="none").logsumexp(0))
    with pytest.raises(LossNotFoundError):
        fit(None, module=unseen)


# -- outputs and counts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict, collections.OrderedDict, lambda d: collections.defaultdict(float, d)])
def test_dict_outputs_with_logits_for_other_callbacks(make):
    """A loss that was seen counts; what else is returned is nobody's loss."""

    def step(module, batch):
        x, y, _ = batch
        logits = module.net(x)
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
        return make({"loss": 0.5 * F.cross_entropy(logits, y, weight=weight), "logits": logits, "targets": y})

    def objective(module):
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
        num = F.cross_entropy(module.net(X), Y, weight=weight, reduction="none")
        return dro(0.5 * num, weight[Y], GROUPS)[0]

    assert_step(step, objective)


@pytest.mark.parametrize(
    "method", [lambda: GroupDRO("place", 2), lambda: VREx("place", 2), lambda: GroupMixup("place")]
)
def test_returned_logits_of_which_the_loss_is_not_the_cross_entropy(method):
    """Kept for a metric, they say nothing of a loss with maths of its own."""

    def step(module, batch):
        logits = module.net(batch[0])
        p = logits.softmax(1).gather(1, batch[1][:, None])
        return {"loss": ((1 - p) ** 2).mean(), "logits": logits, "targets": batch[1]}

    with pytest.raises(LossNotFoundError, match=r"(?s)mean cross-entropy.*but got 0\.\d+ where that is \d.*'losses'"):
        fit(step, method())


def test_a_returned_loss_that_ceases_to_be_the_cross_entropy_is_refused_when_logging():
    def step(module, batch):
        logits = module.net(batch[0])
        losses = -logits.log_softmax(1).gather(1, batch[1][:, None])
        return {"loss": losses.mean() * (1 + (module.current_epoch > 1)), "logits": logits, "targets": batch[1]}

    fit(step, epochs=2, log_every_n_steps=1)
    with pytest.raises(LossNotFoundError, match="mean cross-entropy"):
        fit(step, epochs=4, log_every_n_steps=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_of_the_returned_loss_is_no_difference(dtype):
    def step(module, batch):
        logits = module.net(batch[0]).to(dtype)
        losses = -logits.softmax(1).log().gather(1, batch[1][:, None])
        return {"loss": losses.mean(), "logits": logits, "targets": batch[1]}

    fit(step)


def test_returned_binary_logits_and_float_targets():
    def step(module, batch):
        logits, target = module.net(batch[0]), (batch[2] > 0.5).double()
        losses = logits.clamp(min=0) - logits * target + (1 + (-logits.abs()).exp()).log()
        return {"loss": losses.mean(), "logits": logits, "targets": target}

    def objective(module):
        losses = F.binary_cross_entropy_with_logits(module.net(X), (Z > 0.5).double(), reduction="none").mean(1)
        return dro(losses, ONES, GROUPS)[0]

    assert_step(step, objective)


def test_a_validation_step_that_calls_the_training_step_and_the_reverse():
    class Module(Base):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    class Reverse(Base):
        def training_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    data = DataLoader(tag(TensorDataset(X, Y), place=GROUPS), batch_size=4)
    for module in (Module(), Reverse()):
        callbacks = [GroupDRO("place", 2), GroupMonitor("place", 2)]
        trainer = L.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)
        trainer.fit(module, data, data)
        correct = (module.net(X).argmax(1) == Y).double().mean()
        assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(float(correct))


class Every(Dataset):
    """A wrapper of the user's own, of which debias knows nothing."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.dataset[2 * i]


def test_counts_are_those_of_what_is_trained_on():
    tagged = tag(TensorDataset(X, Y, Z), place=GROUPS)
    loaders = {
        "wrapper": DataLoader(Every(tagged), batch_size=3),
        "sampler": DataLoader(tagged, batch_size=3, sampler=SubsetRandomSampler([0, 2, 4])),
        "batch sampler": DataLoader(
            tagged, batch_sampler=BatchSampler(SubsetRandomSampler([0, 2, 4]), batch_size=3, drop_last=False)
        ),
        "share of a rank": DataLoader(
            tagged,
            batch_size=1,
            sampler=DistributedSamplerWrapper(SubsetRandomSampler([0, 2, 4]), num_replicas=2, rank=0),
        ),
        "list": DataLoader(tagged, batch_size=3, sampler=[0, 2, 4]),
        "list of batches": DataLoader(tagged, batch_sampler=[[0, 2], [4]]),
    }
    for loader in loaders.values():
        callback = GroupReweighting("place", 2)
        step = Base(lambda m, b: F.cross_entropy(m.net(b[0]), b[1]))
        L.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(step, loader)
        assert callback.module.counts.tolist() == [2, 1]


class Odd(Sampler):
    """A sampler that nobody knows, which leaves out what is even."""

    def __iter__(self):
        return iter(range(1, N, 2))

    def __len__(self):
        return N // 2


def plain_step(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 with torch 2.15
def test_a_sampler_that_may_leave_samples_out_is_said():
    tagged = tag(TensorDataset(X, Y, Z), place=GROUPS)
    trainer = L.Trainer(max_epochs=1, callbacks=[GroupReweighting("place", 2)], **QUIET)
    with pytest.warns(UserWarning, match=r"groups of the whole training set.* Odd .*pass `group_counts=\[...\]`"):
        trainer.fit(Base(plain_step), DataLoader(tagged, batch_size=3, sampler=Odd()))
    for loader in (
        DataLoader(tagged, batch_size=3, shuffle=True),
        DataLoader(tagged, batch_size=3, sampler=WeightedRandomSampler([1.0] * N, N)),
        DataLoader(tagged, batch_size=3, sampler=GroupBalancedSampler(GROUPS, 3)),
        StatefulDataLoader(tagged, batch_size=3, shuffle=True),
    ):
        callback = GroupReweighting("place", 2)
        L.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(Base(plain_step), loader)
        assert callback.module.counts.tolist() == [4, 2]


def test_a_second_fit_counts_its_own_data():
    def counts(callback, groups):
        loader = DataLoader(tag(TensorDataset(X, Y, Z), place=groups), batch_size=N)
        trainer = L.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
        trainer.fit(Base(plain_step), loader)
        return callback.module.counts.tolist()

    for make in (GroupReweighting, lambda *args, **options: GroupDRO(*args, adjustment=1.0, **options)):
        callback = make("place", 2)
        assert [counts(callback, ids) for ids in (GROUPS, 1 - GROUPS)] == [[4, 2], [2, 4]]
        callback.module.set_counts([5, 6])
        assert counts(callback, GROUPS) == [5, 6]
        given = make("place", 2, group_counts=[7, 8])
        assert [counts(given, ids) for ids in (GROUPS, 1 - GROUPS)] == [[7, 8], [7, 8]]
        saved = make("place", 2)
        counts(saved, GROUPS)
        saved.load_state_dict(saved.state_dict())
        assert counts(saved, 1 - GROUPS) == [4, 2]


class Augmented(Dataset):
    """Draws from all three generators, as augmentations do; the groups are in the batch."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        noise = torch.rand(()) + random.random() + np.random.rand()
        return X[i] + noise, Y[i], GROUPS[i]


def test_counting_draws_no_random_numbers():
    def drawn(counts):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        seen = []

        def step(module, batch):
            seen.append(batch[0])
            return plain_step(module, batch)

        callback = GroupReweighting(2, 2, group_counts=counts)
        L.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(Base(step), DataLoader(Augmented(), batch_size=3))
        return torch.cat(seen)

    assert torch.equal(drawn(None), drawn([4, 2]))


@pytest.mark.parametrize("parts", [("id", "member"), ("member", "id"), ("member", "member"), ("member",)])
def test_memberships_are_not_crossed(parts):
    tagged = tag(TensorDataset(X, Y, Z), id=GROUPS, member=F.one_hot(GROUPS, 2).bool())
    trainer = L.Trainer(max_epochs=1, callbacks=[GroupDRO(parts, (2,) * len(parts))], **QUIET)
    with pytest.raises(BatchKeyError, match=r"crossed `group=.*same shape \(N,\), but got shapes.*\(6, 2\)"):
        trainer.fit(Base(plain_step), DataLoader(tagged, batch_size=N))


def test_given_counts_are_arguments_and_not_state():
    state = GroupDRO("place", 2, adjustment=1.0, group_counts=[4, 2]).state_dict()
    given, counted = GroupDRO("place", 2, adjustment=1.0, group_counts=[1, 9]), GroupDRO("place", 2, adjustment=1.0)
    given.load_state_dict(state)
    counted.load_state_dict(state)
    assert given.module.counts.tolist() == [1, 9]
    assert counted.module.counts.tolist() == [4, 2]


@pytest.mark.parametrize(("argument", "value"), [("step_size", "0.1"), ("step_size", float("inf")), ("alpha", "x")])
def test_arguments_of_a_wrong_type(argument, value):
    with pytest.raises(DebiasError, match=f"`{argument}` to be"):
        GroupDRO("place", 2, **{argument: value})
    with pytest.raises(DebiasError, match="`loss` to be"):
        GroupDRO("place", 2, loss=True)


# -- monitors
# ------------------------------------------------------------------------------------------------------------


def watch(validation_step, *monitors):
    class Module(Base):
        pass

    Module.validation_step = validation_step
    module = Module()
    trainer = L.Trainer(callbacks=list(monitors), **QUIET)
    trainer.validate(module, DataLoader(tag(TensorDataset(X, Y), place=GROUPS), batch_size=4), verbose=False)
    return module, {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_soft_targets_are_classes():
    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self.net(batch[0]), F.one_hot(batch[1], C).double())

    module, logged = watch(validation_step, GroupMonitor("place", 2))
    assert logged["val/accuracy"] == pytest.approx(float((module.net(X).argmax(1) == Y).double().mean()))


def test_ignored_targets_are_left_out():
    def validation_step(self, batch, batch_idx):
        target = torch.where(batch[1] == 3, 255, batch[1])
        F.cross_entropy(self.net(batch[0]), target, ignore_index=255)

    module, logged = watch(validation_step, GroupMonitor("place", 2))
    kept = Y != 3
    assert logged["val/accuracy"] == pytest.approx(float((module.net(X).argmax(1) == Y)[kept].double().mean()))


def test_two_monitors_that_would_log_the_same_names():
    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(DebiasError, match="would both log `val/accuracy`"):
        watch(validation_step, GroupMonitor("place", 2), GroupMonitor(1, C))
    _, logged = watch(validation_step, GroupMonitor("place", 2), GroupMonitor(1, C, name="label"))
    assert {"val/accuracy", "val/label/accuracy"} <= set(logged)


def test_a_monitor_that_cannot_work_says_so_before_training():
    class Module(Base):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

        def validation_step(self, batch, batch_idx):
            F.cross_entropy(self.net(batch[0]), batch[1])

    data = DataLoader(tag(TensorDataset(X, Y), place=GROUPS), batch_size=4)
    with pytest.raises(DebiasError, match="`group='site'`"):
        L.Trainer(max_epochs=1, callbacks=[GroupMonitor("site", 2)], **QUIET).fit(Module(), data, data)


@pytest.mark.parametrize("loss", [None, "sum"])
def test_no_tensor_outlives_its_step(loss):
    """Without the garbage collector's help: a step's logits are gone when the next step begins."""
    logits = []

    def step(module, batch):
        assert sum(reference() is not None for reference in logits) == 0
        x, y, _ = batch
        out = module.net(x)
        logits.append(weakref.ref(out))
        return (F.cross_entropy(out, y, reduction="none") * ONES).mean()

    gc.disable()
    try:
        fit(step, GroupDRO("place", 2, loss=loss), epochs=4)
    finally:
        gc.enable()
    assert len(logits) == 4


def own_losses(module, batch):
    x, y, _ = batch
    return -module.net(x).log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


def scaled(module, batch):
    losses = own_losses(module, batch)
    return {"loss": 0.1 * losses.mean(), "losses": losses}


def masked_by_hand(module, batch):
    losses = own_losses(module, batch)
    mask = (batch[1] > 0).double()
    return {"loss": (losses * mask).sum() / mask.sum(), "losses": losses}


def made_apart(module, batch):
    return {"loss": 2 * own_losses(module, batch).mean(), "losses": own_losses(module, batch)}


@pytest.mark.parametrize(
    ("step", "match"),
    [(scaled, "counts them otherwise"), (masked_by_hand, "counts them otherwise"), (made_apart, "not computed from")],
)
def test_stated_losses_whose_mean_is_no_part_of_the_returned_loss(step, match):
    """The reweighed mean would be put in the place of something else."""
    with pytest.raises(LossNotFoundError, match=match):
        fit(step)


@pytest.mark.parametrize("method", [GroupDRO("place", 2), CVaRDRO()])
def test_a_stated_loss_that_is_reduced_already(method):
    """Also where nobody reads ids."""

    def step(module, batch):
        mean = own_losses(module, batch).mean()
        return {"loss": mean, "losses": mean}

    with pytest.raises(RowsError, match=r"one row for each of the (6 )?samples, but got shape \(\)"):
        fit(step, method)


def factor_in_the_losses(module, batch):
    losses = 0.1 * own_losses(module, batch)
    return {"loss": losses.mean() + module.net.bias.sum(), "losses": losses}


def made_twice(module, batch):
    return {"loss": own_losses(module, batch).mean(), "losses": own_losses(module, batch)}


@pytest.mark.parametrize("step", [factor_in_the_losses, made_twice])
def test_stated_losses_whose_mean_is_a_part_of_the_returned_loss(step):
    module, _ = fit(step)
    other = Base()
    losses = step(other, (X, Y, Z))["losses"]
    loss, _ = dro(losses, torch.ones(N, dtype=torch.float64), GROUPS)
    if step is factor_in_the_losses:
        loss = loss + other.net.bias.sum()
    loss.backward()
    torch.testing.assert_close(module.net.weight, other.net.weight - other.net.weight.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(module.net.bias, other.net.bias - other.net.bias.grad, rtol=1e-12, atol=1e-14)


def by_poisson(module, batch):
    return F.poisson_nll_loss(module.net(batch[0])[:, 0], batch[1].double())


def by_square(module, batch):
    return F.mse_loss(module.net(batch[0])[:, 0], batch[1].double())


OF_CLASSES = [
    FocalLoss(),
    LearningFromFailure(),
    DomainAdversarial("place", 2, conditional=True),
    JustTrainTwice(epochs=1),
    InferGroups("eiil", 1),
]


@pytest.mark.parametrize("step", [by_square, by_poisson])
@pytest.mark.parametrize("method", OF_CLASSES, ids=lambda method: type(method).__name__)
def test_methods_that_read_classes_off_a_loss_of_numbers(method, step):
    with pytest.raises(DebiasError, match=f"a classification loss for {type(method).__name__}.*`loss=<index>`"):
        fit(step, method, epochs=3)


class ByHand(Base):
    """Manual optimisation."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Base(made_twice), {}),
        (Base(lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1])), {"losses": "split"}),
        (Base(lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1])), {}),
        (ByHand(), {}),
    ],
    ids=["stated", "split", "whole", "manual"],
)
def test_the_average_loss_is_logged_however_losses_are_found(module, options):
    plain = F.cross_entropy(module.net(X), Y).item()
    fit(None, GroupDRO("place", 2, **options), module=module, log_every_n_steps=1)
    assert module.trainer.logged_metrics["train/average_loss"].item() == pytest.approx(plain, rel=1e-6)
