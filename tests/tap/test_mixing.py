"""Losses of mixed samples against loops: which labels, which groups, which shares; in every form of a loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from _support.fits import make_trainer, parameters, same
from _support.images import Pictures, batches, train
from debias import Debiaser, GroupDRO, register_loss
from debias.errors import AmbiguousLossError, DebiasError, LossNotFoundError, RowsError, UnsupportedStrategyError
from debias.methods.base.head import head_loss
from debias.ops.groups import group_losses
from debias.tap import adapters
from debias.tap.mixing import Mixture, row_sources
from debias.tap.rows import RowTracker
from debias.tap.tap import LossTap

N = 5
PARTNERS = torch.tensor([2, 1, 4, 0, 0])
SHARES = torch.tensor([0.3, 1.0, 0.6, 0.9, 0.2], dtype=torch.float64)
GROUPS = torch.tensor([0, 1, 1, 2, -1])


def generator():
    return torch.Generator().manual_seed(0)


def mixture(loss=None):
    made = Mixture(N, torch.device("cpu"), loss, "GroupMixup")
    made.mix(PARTNERS, SHARES)
    return made


def tap_of(batch, *, mixed=None, **options):
    return LossTap(tracker=RowTracker(batch, N), mixture=mixed or mixture(), **options)


def logits(*shape):
    return torch.randn(N, *shape, generator=generator(), dtype=torch.float64).requires_grad_()


def classes(*shape, high=3):
    return torch.randint(high, (N, *shape), generator=generator())


def looped(func, z, target, reduction, **options):
    """Numerators and denominators by (sample, source), one loss of one sample at a time.

    What a step reduces itself is divided by the number of elements.
    """
    found = {}
    for i in range(N):
        for source, share in ((i, SHARES[i]), (int(PARTNERS[i]), 1 - SHARES[i])):
            arguments = {k: v[source : source + 1] if k == "row_weight" else v for k, v in options.items()}
            if "row_weight" in arguments:
                arguments["weight"] = arguments.pop("row_weight")
            label = target[source : source + 1]
            total = func(z[i : i + 1], label, reduction="sum", **arguments)
            weight = options.get("weight")
            if reduction == "mean" and func is F.cross_entropy and not label.is_floating_point():
                counts = label != options.get("ignore_index", -100)
                den = (weight[label[counts]].sum() if weight is not None else counts.sum()).double()
            elif (
                reduction == "mean"
                and arguments.get("weight") is not None
                and func is not F.binary_cross_entropy_with_logits
            ):
                den = arguments["weight"].sum()
            else:
                den = torch.tensor(float(func(z[i : i + 1], label, reduction="none", **arguments).numel()))
            old = found.get((i, source), (0, 0))
            found[i, source] = (old[0] + share * total, old[1] + share * den)
    return found


LOSSES = {
    "cross_entropy": (F.cross_entropy, lambda: (logits(3), classes()), {}),
    "class weights": (
        F.cross_entropy, lambda: (logits(3), classes()), {"weight": torch.tensor([1.0, 2.5, 0.5], dtype=torch.float64)}
    ),
    "ignored": (F.cross_entropy, lambda: (logits(3), classes()), {"ignore_index": 1}),
    "pixels": (F.cross_entropy, lambda: (logits(3, 2, 4), classes(2, 4)), {"ignore_index": 2}),
    "soft targets": (F.cross_entropy, lambda: (logits(3), logits(3).detach().softmax(1).flip(0)), {}),
    "label smoothing": (F.cross_entropy, lambda: (logits(3), classes()), {"label_smoothing": 0.2}),
    "bce": (F.binary_cross_entropy_with_logits, lambda: (logits(), classes(high=2).double()), {}),
    "multi-label": (F.binary_cross_entropy_with_logits, lambda: (logits(4), classes(4, high=2).double()), {}),
    "weights of elements": (
        F.mse_loss, lambda: (logits(2), classes(2).double()),
        {"row_weight": torch.rand(N, 2, generator=generator(), dtype=torch.float64)},
    ),
    "weights of labels": (
        F.binary_cross_entropy_with_logits, lambda: (logits(2), classes(2, high=2).double()),
        {"row_weight": torch.rand(N, 2, generator=generator(), dtype=torch.float64)},
    ),
    "weights of samples": (
        F.binary_cross_entropy_with_logits, lambda: (logits(2), classes(2, high=2).double()),
        {"row_weight": torch.rand(N, 1, generator=generator(), dtype=torch.float64)},
    ),
    "mse": (F.mse_loss, lambda: (logits(2), classes(2).double()), {}),
    "huber": (F.huber_loss, lambda: (logits(), classes().double()), {"delta": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_those_of_the_definition(kind, reduction):
    func, make, options = LOSSES[kind]
    z, target = make()
    passed = {"weight" if k == "row_weight" else k: v for k, v in options.items()}
    with tap_of((z, target)) as tap:
        out = func(z, target, reduction=reduction, **passed)
        loss = out.mean() if reduction == "none" else out
    parts = looped(func, z, target, reduction, **options)
    num, den = (sum(p[k] for p in parts.values()) for k in (0, 1))
    count = func(z, target, reduction="none", **passed).numel() if reduction == "none" else 1
    expected = {"mean": num / den, "sum": num, "none": num / count}[reduction]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (call,) = tap.calls
    torch.testing.assert_close(call.num.sum() / call.den.sum(), num / den)
    assert call.parts == 2


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "huber"])
def test_penalties_read_the_losses_with_each_label(kind):
    func, make, options = LOSSES[kind]
    z, target = make()
    passed = {"weight" if k == "row_weight" else k: v for k, v in options.items()}
    with tap_of((z, target)) as tap:
        func(z, target, **passed)
    (call,) = tap.calls
    loss = head_loss(call)
    torch.testing.assert_close(loss.num(loss.logits).sum(), call.num.sum())
    torch.testing.assert_close(loss.den.sum(), call.den.sum())


def test_a_loss_that_is_divided_by_the_number_of_its_samples():
    z, target = logits(3), logits(3).detach().softmax(1)
    with tap_of((z, target)) as tap:
        out = F.kl_div(z.log_softmax(1), target, reduction="batchmean")
    own, partners = (F.kl_div(z.log_softmax(1), t, reduction="none").sum(1) for t in (target, target[PARTNERS]))
    expected = (SHARES * own + (1 - SHARES) * partners).sum() / N
    torch.testing.assert_close(out, expected)
    (call,) = tap.calls
    torch.testing.assert_close(call.num.sum() / call.den.sum(), expected)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_part_counts_in_the_group_of_its_label(kind, reduction):
    func, make, options = LOSSES[kind]
    z, target = make()
    passed = {"weight" if k == "row_weight" else k: v for k, v in options.items()}
    with tap_of((z, target)) as tap:
        out = func(z, target, reduction=reduction, **passed)
        _ = out.mean()
    (call,) = tap.calls
    (sums,), counts = group_losses([(call.num, call.den, call.of_rows(GROUPS))], 3)
    assert counts[-2:] == [0, 0]  # neither bad ids nor bad losses
    parts = looped(func, z, target, reduction, **options)
    for g in range(3):
        inside = [p for (_, source), p in parts.items() if GROUPS[source] == g]
        torch.testing.assert_close(sums.num[g], sum(p[0] for p in inside).detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sums.den[g], torch.as_tensor(sum(p[1] for p in inside)).double())


def test_targets_and_logits_belong_to_the_rows():
    z, y = logits(3), classes()
    with tap_of((z, y)) as tap:
        F.cross_entropy(z, y)
    (call,) = tap.calls
    losses = F.cross_entropy(call.of_logits(z), call.record.targets, reduction="none")
    shares = torch.cat([SHARES, 1 - SHARES])
    torch.testing.assert_close(call.num, shares * losses)
    torch.testing.assert_close(call.den, shares)
    assert call.rows.tolist() == [*range(N), *PARTNERS.tolist()]


def test_masks_after_the_loss_keep_the_parts():
    """mask, weight, slice and partial sums are followed through every part."""
    z, y = logits(3, 4), classes(4)
    mask = torch.rand(N, 4, generator=generator()) > 0.3
    with tap_of((z, y)) as tap:
        losses = F.cross_entropy(z, y, reduction="none")
        per_sample = (losses * mask).sum(1) / mask.sum(1).clamp_min(1)
        loss = 2 * (per_sample + 1.0)[1:].mean()
    (call,) = tap.calls
    own = F.cross_entropy(z, y, reduction="none")
    other = F.cross_entropy(z, y[PARTNERS], reduction="none")
    means = [(part * mask).sum(1) / mask.sum(1).clamp_min(1) + 1.0 for part in (own, other)]
    expected = [share[1:] * mean[1:] for share, mean in zip((SHARES, 1 - SHARES), means, strict=True)]
    torch.testing.assert_close(call.num, torch.cat(expected))
    torch.testing.assert_close(loss, 2 * sum(expected).mean())
    assert call.rows.tolist() == [1, 2, 3, 4, *PARTNERS[1:].tolist()]


# ------------------------------------------------------------ rows


def interleaved(x):
    return x.repeat_interleave(2, 0)


@pytest.mark.parametrize("views", [lambda x: torch.cat([x, x]), interleaved], ids=["tiled", "interleaved"])
def test_two_views(views):
    x, y = logits(3).detach(), classes()
    weights = torch.randn(3, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    with tap_of((x, y)) as tap:
        loss = F.cross_entropy(views(x) @ weights, views(y))
    (call,) = tap.calls
    z = views(x) @ weights
    own, other = (
        F.cross_entropy(z, views(y), reduction="none"),
        F.cross_entropy(z, views(y[PARTNERS]), reduction="none"),
    )
    share = views(SHARES)
    torch.testing.assert_close(loss, (share * own + (1 - share) * other).mean())
    assert call.rows.tolist() == views(torch.arange(N)).tolist() + views(PARTNERS).tolist()


@pytest.mark.parametrize("order", ["batch first", "time first"])
def test_tokens(order):
    y = classes(4)
    z = logits(4, 3)
    with tap_of((z, y)) as tap:
        moved = (z, y) if order == "batch first" else (z.transpose(0, 1), y.t())
        loss = F.cross_entropy(moved[0].reshape(-1, 3), moved[1].reshape(-1))
    own = F.cross_entropy(z.reshape(-1, 3), y.reshape(-1), reduction="none").view(N, 4)
    other = F.cross_entropy(z.reshape(-1, 3), y[PARTNERS].reshape(-1), reduction="none").view(N, 4)
    share = SHARES.unsqueeze(1)
    torch.testing.assert_close(loss, (share * own + (1 - share) * other).mean())
    assert len(tap.calls[0].rows) == 2 * N * 4


def test_rows_of_unequal_number_are_refused():
    y, z = classes(4), logits(4, 3)
    keep = torch.ones(N, 4, dtype=torch.bool)
    keep[0, 0] = False
    with tap_of((z, y)), pytest.raises(RowsError, match=r"as many rows in the loss as the others.* 19 rows for 5"):
        F.cross_entropy(z[keep], y[keep])
    keep = torch.ones(N, 4, dtype=torch.bool)
    keep[0, 0] = keep[1, :3] = keep[2, 0] = False
    with tap_of((z, y)), pytest.raises(RowsError, match=r"as many rows in the loss as the others.* 15 rows for 5"):
        F.cross_entropy(z[keep], y[keep])


def test_sources_of_rows_follow_any_order():
    index = torch.tensor([2, 0, 1, 1, 0, 2])
    rows = row_sources(torch.tensor([1, 2, 0]), index, 3, check=True)
    assert index[rows].tolist() == [0, 1, 2, 2, 1, 0]
    # the first row of a sample takes its label from the first row of its partner
    assert rows.tolist() == [1, 2, 0, 5, 3, 4]


# ------------------------------------------------------------ mixtures of mixtures


def test_mixing_twice_is_mixing_the_mixed():
    second, shares = torch.tensor([4, 0, 3, 2, 1]), torch.tensor([0.5, 0.1, 0.7, 0.4, 0.8], dtype=torch.float64)
    made = mixture()
    made.mix(second, shares)
    matrix = torch.diag(SHARES)
    matrix[torch.arange(N), PARTNERS] += 1 - SHARES
    outer = torch.diag(shares)
    outer[torch.arange(N), second] += 1 - shares
    found = torch.zeros(N, N, dtype=torch.float64)
    for part in made.parts:
        source = torch.arange(N) if part.source is None else part.source
        found.index_put_((torch.arange(N), source), part.num.double(), accumulate=True)
    torch.testing.assert_close(found, outer @ matrix)


def test_repeating_weighs_the_loss_and_not_what_it_is_divided_by():
    made = mixture()
    made.repeat(torch.tensor([0, 1, 0]), torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))
    assert made.n == 3
    own, other = made.parts
    assert own.source is None
    assert other.source.tolist() == [2, 1, 2]
    torch.testing.assert_close(own.num, SHARES[[0, 1, 0]] * torch.tensor([1, 1, 0.5], dtype=torch.float64))
    torch.testing.assert_close(own.den, SHARES[[0, 1, 0]])


# ------------------------------------------------------------ whole steps


class Halves(Debiaser):
    """Mixes every sample with the one before it."""

    def __init__(self, loss=None):
        super().__init__(loss=loss)

    def augment(self, step):
        x, y = step.batch
        partners = torch.arange(len(x)).roll(1)
        step.mixed(len(x), loss=self.loss, owner="Halves").mix(partners, torch.full((len(x),), 0.75).double())
        step.batch = (0.75 * x + 0.25 * x[partners], y)


def by_hand(self, batch):
    x, y = batch
    x = 0.75 * x + 0.25 * x.roll(1, 0)
    z = self(x)
    return 0.75 * F.cross_entropy(z, y) + 0.25 * F.cross_entropy(z, y.roll(1))


class ByHand(Pictures):
    def training_step(self, batch, batch_idx):
        return by_hand(self, batch)


def assert_as_by_hand(model, methods):
    plain = ByHand()
    train(plain, bare=True)
    train(model, methods)
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[key], value, rtol=1e-12, atol=1e-12)


def test_an_ordinary_step():
    model = Pictures()
    assert_as_by_hand(model, [Halves()])
    data = batches(bare=True).dataset.tensors[1]
    assert torch.cat([y for _, y, _ in model.seen]).tolist() == data.tolist()  # the step's own labels stay hard


class Returned(Pictures):
    def training_step(self, batch, batch_idx):
        z = self(batch[0])
        picked = z.log_softmax(1).gather(1, batch[1].unsqueeze(1))
        return {"loss": -picked.mean(), "logits": z, "targets": batch[1]}


def test_a_step_that_returns_logits_and_targets():
    assert_as_by_hand(Returned(), [Halves()])


class Registered(nn.Module):
    def forward(self, z, y):
        return -z.log_softmax(1).gather(1, y.unsqueeze(1)).mean()


def test_a_registered_loss(monkeypatch):
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    register_loss(Registered, lambda loss, z, y: F.cross_entropy(z, y, reduction="none"))

    class Own(Pictures):
        def __init__(self):
            super().__init__()
            self.criterion = Registered()

        def training_step(self, batch, batch_idx):
            return self.criterion(self(batch[0]), batch[1])

    assert_as_by_hand(Own(), [Halves()])


class TwoLosses(Pictures):
    """A loss of the labels, and one of the input alone."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self(x)
        return F.cross_entropy(z, y) + 0.3 * F.mse_loss(z, torch.zeros_like(z))


class TwoByHand(Pictures):
    def training_step(self, batch, batch_idx):
        x = batch[0]
        x = 0.75 * x + 0.25 * x.roll(1, 0)
        return by_hand(self, batch) + 0.3 * (self(x) ** 2).mean()


def test_the_loss_of_the_labels_is_chosen():
    with pytest.raises(AmbiguousLossError, match="one loss for Halves, but got 2: cross_entropy, mse_loss"):
        train(TwoLosses(), [Halves()])
    model, plain = TwoLosses(), TwoByHand()
    train(model, [Halves(loss=0)])
    train(plain, bare=True)
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[key], value, rtol=1e-12, atol=1e-12)


def test_a_step_without_a_loss_that_can_be_seen_is_refused():
    class Hidden(Pictures):
        def training_step(self, batch, batch_idx):
            return -self(batch[0]).log_softmax(1).gather(1, batch[1].unsqueeze(1)).mean()

    before = parameters(Hidden())
    model = Hidden()
    with pytest.raises(LossNotFoundError):
        train(model, [Halves()])
    assert same(before, parameters(model))


def test_losses_that_cannot_be_mixed_are_refused():
    class Ranking(Pictures):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])
            return F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0))

    with pytest.raises(DebiasError, match="labels of `triplet_margin_loss` to be mixable"):
        train(Ranking(), [Halves()])

    class Transcribed(Pictures):
        def training_step(self, batch, batch_idx):
            x, y = batch
            ones = torch.ones_like(y)
            return F.ctc_loss(self(x).log_softmax(1)[None], ones[:, None], ones, ones)

    with pytest.raises(DebiasError, match="labels of `ctc_loss` to be mixable"):
        train(Transcribed(), [Halves()])

    class Computed(Pictures):
        def training_step(self, batch, batch_idx):
            losses = -self(batch[0]).log_softmax(1)[:, 0]
            return {"loss": losses.mean(), "losses": losses}

    with pytest.raises(DebiasError, match="labels of `losses` to be mixable"):
        train(Computed(), [Halves()])
    with pytest.raises(UnsupportedStrategyError, match="`losses='whole'` together with Halves"):
        train(Pictures(), [Halves(), GroupDRO("place", 3, losses="split")])


def test_manual_optimisation():
    class Manual(Pictures):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    assert_as_by_hand(Manual(), [Halves()])


def test_reweighing_in_the_first_and_in_later_steps():
    """The first step settles the loss afterwards; both know the parts."""
    model = Pictures()
    dro = GroupDRO("place", 3, step_size=0.5)
    make_trainer([Halves(), dro]).fit(model, batches())
    plain, weights = Pictures(), torch.zeros(3, dtype=torch.float64)
    optimizer = plain.configure_optimizers()
    loader = batches()
    for tagged in loader:
        (x, y), place = tagged.batch, tagged.tags["place"]
        z = plain(0.75 * x + 0.25 * x.roll(1, 0))
        pairs = ((0.75, F.cross_entropy(z, y, reduction="none"), place),
                 (0.25, F.cross_entropy(z, y.roll(1), reduction="none"), place.roll(1)))  # fmt: skip
        means = []
        for g in range(3):
            num = sum(share * losses[groups == g].sum() for share, losses, groups in pairs)
            den = sum(share * (groups == g).sum() for share, _, groups in pairs)
            means.append(num / den if den > 0 else torch.zeros((), dtype=torch.float64))
        means = torch.stack([torch.as_tensor(m, dtype=torch.float64) for m in means])
        weights = torch.log_softmax(weights + 0.5 * means.detach(), 0)
        optimizer.zero_grad()
        (weights.exp() * means).sum().backward()
        optimizer.step()
    torch.testing.assert_close(dro.module.weights, weights.exp())
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[key], value, rtol=1e-12, atol=1e-12)
