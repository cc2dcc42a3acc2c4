"""Training steps shaped like real ones: each is reweighed exactly, or refused with an error that names the way out.

The oracle computes the Group DRO objective of the step by hand, from the formula, on the same initial weights; with
SGD and learning rate 1 one step of the Trainer has to move the parameters by exactly its gradient.
"""

import copy
import dataclasses
import math
from collections import namedtuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset

from debias import CORAL, GroupDRO, GroupMonitor, register_loss, tag
from debias.errors import (
    AmbiguousLossError,
    BatchKeyError,
    DebiasError,
    LossNotFoundError,
    RowsError,
    UnsupportedStrategyError,
    UntappedLossError,
)

N, D, C = 6, 5, 4
GROUPS = torch.tensor([0, 0, 0, 0, 2, 2])  # group 1 is absent
pytestmark = pytest.mark.filterwarnings("ignore:.*hold no sample of group 1:UserWarning")
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
X2 = torch.randn(N, D, generator=g, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 0, 1])
MULTI = (torch.rand(N, C, generator=g) > 0.5).double()
TOKENS = torch.randint(0, C, (N, 3), generator=g)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]]).double()
PIXELS = torch.where(torch.rand(N, 2, 2, generator=g) < 0.3, 255, torch.randint(0, C, (N, 2, 2), generator=g))


class Samples(Dataset):
    def __init__(self, *columns, make=tuple):
        self.columns, self.make = columns, make

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.make([column[i] for column in self.columns])


class Base(L.LightningModule):
    out = C

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(D, self.out).double()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def dro(num, den, groups, n_groups=3):
    """The objective from the formula: losses by group, one exponentiated-gradient step, weighted sum."""
    losses = [
        num[groups == k].sum() / den[groups == k].sum() if (groups == k).any() else num.sum() * 0
        for k in range(n_groups)
    ]
    q = [math.exp(STEP_SIZE * loss.item()) for loss in losses]
    return sum(weight / sum(q) * loss for weight, loss in zip(q, losses, strict=True))


def fit_one_step(module, dataset, callback=None, **loader):
    callback = callback or GroupDRO("place", 3, step_size=STEP_SIZE)
    loader = {"batch_size": N, **loader}
    trainer = L.Trainer(max_steps=1, callbacks=[callback], **QUIET)
    trainer.fit(module, DataLoader(tag(dataset, place=GROUPS), **loader))
    return trainer, callback


def assert_exact(module, dataset, objective, callback=None, **loader):
    """One Trainer step equals one SGD step on the objective computed by hand."""
    before = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    fit_one_step(module, dataset, callback, **loader)
    loss = objective(lambda x: F.linear(x, before["net.weight"], before["net.bias"]))
    grads = torch.autograd.grad(loss, [before["net.weight"], before["net.bias"]])
    for name, grad in zip(("net.weight", "net.bias"), grads, strict=True):
        torch.testing.assert_close(
            dict(module.named_parameters())[name].detach(), before[name].detach() - grad, rtol=1e-12, atol=1e-14
        )


ONES = torch.ones(N, dtype=torch.float64)


class CrossEntropy(Base):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def ce(net, x=X, y=Y):
    return F.cross_entropy(net(x), y, reduction="none")


def test_cross_entropy():
    assert_exact(CrossEntropy(), Samples(X, Y), lambda net: dro(ce(net), ONES, GROUPS))


class WithoutBatchIdx(Base):
    def training_step(self, batch):
        x, y = batch
        return {"loss": nn.CrossEntropyLoss()(self.net(x), y), "extra": 1}


def test_step_without_batch_idx_that_returns_a_dict():
    assert_exact(WithoutBatchIdx(), Samples(X, Y), lambda net: dro(ce(net), ONES, GROUPS))


class InPlace(Base):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        loss *= 0.5
        loss += 0.1 * self.net.weight.pow(2).sum()
        return loss


def test_loss_changed_in_place_and_other_terms_stay():
    module = InPlace()
    weight = module.net.weight.detach().clone()
    callback = GroupDRO("place", 3, step_size=STEP_SIZE)
    w, b = weight.clone().requires_grad_(), module.net.bias.detach().clone().requires_grad_()
    loss = dro(0.5 * ce(lambda x: F.linear(x, w, b)), ONES, GROUPS) + 0.1 * w.pow(2).sum()
    loss.backward()
    fit_one_step(module, Samples(X, Y), callback)
    torch.testing.assert_close(module.net.weight.detach(), weight - w.grad, rtol=1e-12, atol=1e-14)


class MultiLabel(Base):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x), y, pos_weight=torch.full((C,), 2.0, dtype=torch.float64))


def test_multi_label():
    def objective(net):
        losses = F.binary_cross_entropy_with_logits(
            net(X), MULTI, pos_weight=2 * torch.ones(C).double(), reduction="none"
        )
        return dro(losses.mean(1), ONES, GROUPS)

    assert_exact(MultiLabel(), Samples(X, MULTI), objective)


class Pixels(Base):
    out = C * 4

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x).view(-1, C, 2, 2), y, ignore_index=255)


def test_pixels_with_ignore_index():
    def objective(net):
        losses = F.cross_entropy(net(X).view(-1, C, 2, 2), PIXELS, ignore_index=255, reduction="none")
        return dro(losses.flatten(1).sum(1), (PIXELS != 255).double().flatten(1).sum(1), GROUPS)

    assert_exact(Pixels(), Samples(X, PIXELS), objective)


class Tokens(Base):
    out = C * 3

    def training_step(self, batch, batch_idx):
        logits = self.net(batch["x"]).view(-1, 3, C)
        return F.cross_entropy(logits.view(-1, C), batch["labels"].view(-1))


def as_dict(columns):
    return dict(zip(("x", "labels"), columns, strict=True))


def token_losses(net):
    return F.cross_entropy(net(X).view(-1, C), TOKENS.view(-1), reduction="none").view(N, 3)


def test_tokens_in_a_dict_batch():
    assert_exact(
        Tokens(), Samples(X, TOKENS, make=as_dict), lambda net: dro(token_losses(net).sum(1), 3 * ONES, GROUPS)
    )


class MaskedTokens(Base):
    out = C * 3

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        losses = F.cross_entropy(self.net(x).view(-1, C), y.view(-1), reduction="none").view(-1, 3)
        return (losses * mask).sum() / mask.sum()


def test_unreduced_loss_with_a_mask_and_an_own_sum():
    def objective(net):
        return dro((token_losses(net) * MASK).sum(1), MASK.sum(1), GROUPS)

    assert_exact(MaskedTokens(), Samples(X, TOKENS, MASK), objective)


class PerSampleMeans(Base):
    out = C * 3

    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        losses = F.cross_entropy(self.net(x).view(-1, C), y.view(-1), reduction="none").view(-1, 3)
        return ((losses * mask).sum(1) / mask.sum(1)).mean()


def test_unreduced_loss_averaged_per_sample_first():
    def objective(net):
        return dro((token_losses(net) * MASK).sum(1) / MASK.sum(1), ONES, GROUPS)

    assert_exact(PerSampleMeans(), Samples(X, TOKENS, MASK), objective)


class TwoViews(Base):
    def training_step(self, batch, batch_idx):
        first, second, y = batch
        return F.cross_entropy(self.net(torch.cat([first, second])), y.repeat(2))


def test_two_views():
    def objective(net):
        losses = F.cross_entropy(net(torch.cat([X, X2])), Y.repeat(2), reduction="none")
        return dro(losses, ONES.repeat(2), GROUPS.repeat(2))

    assert_exact(TwoViews(), Samples(X, X2, Y), objective)


class TwoTargets(Base):
    def training_step(self, batch, batch_idx):
        x, y, z = batch
        out = self.net(x)
        return F.cross_entropy(out, y) + 0.5 * F.mse_loss(out, z)


def test_two_targets_ask_which():
    with pytest.raises(AmbiguousLossError, match=r"got 2: cross_entropy, mse_loss.*loss='sum'"):
        fit_one_step(TwoTargets(), Samples(X, Y, MULTI))


def two_losses(net):
    return ce(net), F.mse_loss(net(X), MULTI, reduction="none").mean(1)


def test_two_targets_with_the_same_weights():
    """One update from the sum of the group losses; both losses are weighed with the result."""

    def objective(net):
        a, b = two_losses(net)
        mean = [[x[k == GROUPS].mean() if (k == GROUPS).any() else x.sum() * 0 for k in range(3)] for x in (a, b)]
        q = [math.exp(STEP_SIZE * (p + 0.5 * r).item()) for p, r in zip(*mean, strict=True)]
        return sum(w / sum(q) * (p + 0.5 * r) for w, p, r in zip(q, *mean, strict=True))

    callback = GroupDRO("place", 3, step_size=STEP_SIZE, loss="sum")
    assert_exact(TwoTargets(), Samples(X, Y, MULTI), objective, callback)


@pytest.mark.parametrize("choice", [1, lambda call: call.name == "mse_loss"])
def test_two_targets_with_one_of_them_chosen(choice):
    def objective(net):
        a, b = two_losses(net)
        return a.mean() + dro(0.5 * b, ONES, GROUPS)

    callback = GroupDRO("place", 3, step_size=STEP_SIZE, loss=choice)
    assert_exact(TwoTargets(), Samples(X, Y, MULTI), objective, callback)


def test_a_choice_that_is_not_there():
    with pytest.raises(AmbiguousLossError, match=r"loss=5.*\(0, 'cross_entropy'\)"):
        fit_one_step(TwoTargets(), Samples(X, Y, MULTI), GroupDRO("place", 3, loss=5))


class MetricFirst(Base):
    """A loss that is only logged comes before the one that trains."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.logged = F.mse_loss(out, torch.ones_like(out))
        return F.cross_entropy(out, y)


def test_losses_that_do_not_reach_the_returned_loss_do_not_count():
    assert_exact(MetricFirst(), Samples(X, Y), lambda net: dro(ce(net), ONES, GROUPS))


def test_the_step_sees_the_plain_loss_and_returns_the_debiased_one():
    seen, returned = [], []

    class Module(MetricFirst):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            returned.append(outputs["loss"].item())

    module = Module()
    callback = GroupDRO("place", 3, step_size=STEP_SIZE)
    trainer = L.Trainer(max_epochs=3, callbacks=[callback], **QUIET)
    trainer.fit(module, DataLoader(tag(Samples(X, Y), place=GROUPS), batch_size=N))
    losses = ce(module.net).detach()
    by_group = torch.stack([losses[GROUPS == 0].mean(), torch.zeros(()).double(), losses[GROUPS == 2].mean()])
    for t in (1, 2, 3):
        q = torch.softmax(t * STEP_SIZE * by_group, 0)
        assert seen[t - 1] == losses.mean().item()
        assert returned[t - 1] == pytest.approx(float(q @ by_group), rel=1e-12)


class LossInsideModel(Base):
    class Net(nn.Linear):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = self.Net(D, C).double()

    def training_step(self, batch, batch_idx):
        return self.net(batch["x"], batch["labels"])["loss"]


def test_loss_computed_inside_the_model():
    assert_exact(LossInsideModel(), Samples(X, Y, make=as_dict), lambda net: dro(ce(net), ONES, GROUPS))


def smoothed(net):
    log_p = net(X).log_softmax(1)
    return -(0.9 * log_p[range(N), Y] + 0.1 * log_p.mean(1))


def test_label_smoothing_of_timm():
    timm_loss = pytest.importorskip("timm.loss")

    class Module(Base):
        def __init__(self):
            super().__init__()
            self.criterion = timm_loss.LabelSmoothingCrossEntropy(0.1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.criterion(self.net(x), y)

    assert_exact(Module(), Samples(X, Y), lambda net: dro(smoothed(net), ONES, GROUPS))


def test_soft_target_cross_entropy_of_timm():
    timm_loss = pytest.importorskip("timm.loss")
    soft = MULTI.softmax(1)

    class Module(Base):
        def __init__(self):
            super().__init__()
            self.criterion = timm_loss.SoftTargetCrossEntropy()

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.criterion(self.net(x), y)

    assert_exact(Module(), Samples(X, soft), lambda net: dro(-(soft * net(X).log_softmax(1)).sum(1), ONES, GROUPS))


def test_focal_loss_of_torchvision():
    """Its alpha weighs positives and negatives; its mean divides by the count."""
    ops = pytest.importorskip("torchvision.ops")

    class Module(Base):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return ops.sigmoid_focal_loss(self.net(x), y, reduction="mean")

    def objective(net):
        num = ops.sigmoid_focal_loss(net(X), MULTI, reduction="none")
        return dro(num.sum(1), C * ONES, GROUPS)

    assert_exact(Module(), Samples(X, MULTI), objective)


class LogCosh(nn.Module):
    def forward(self, prediction, target):
        return torch.log(torch.cosh(prediction - target)).mean()


class OwnMaths(Base):
    def __init__(self):
        super().__init__()
        self.criterion = LogCosh()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)


def test_own_maths_is_refused_with_the_ways_out():
    with pytest.raises(LossNotFoundError, match=r"(?s)'losses'.*register_loss.*losses='split'"):
        fit_one_step(OwnMaths(), Samples(X, MULTI))


def log_cosh_of(prediction, target):
    return torch.log(torch.cosh(prediction - target))


def log_cosh(net):
    return log_cosh_of(net(X), MULTI).mean(1)


def test_own_maths_with_a_registered_adapter(monkeypatch):
    from debias.tap import adapters

    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    register_loss(LogCosh, lambda loss, prediction, target: torch.log(torch.cosh(prediction - target)))
    assert_exact(OwnMaths(), Samples(X, MULTI), lambda net: dro(log_cosh(net), ONES, GROUPS))


class Reduced(nn.Module):
    """A loss with options, as those of MONAI."""

    def __init__(self, scale, reduction="mean"):
        super().__init__()
        self.scale, self.reduction = scale, reduction

    def forward(self, prediction, target):
        losses = self.scale * log_cosh_of(prediction, target)
        return losses if self.reduction == "none" else losses.mean()


@pytest.mark.parametrize("way", ["copy of it", "copy"])
def test_a_registered_loss_with_a_reduction_of_its_own(way, monkeypatch):
    from debias.tap import adapters

    def per_sample(loss, *args):
        each = copy.copy(loss)
        each.reduction = "none"
        return type(loss).forward(each, *args) if way == "copy of it" else each(*args)

    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    register_loss(Reduced, per_sample)
    model = OwnMaths()
    model.criterion = Reduced(3.0)
    if way == "copy":  # which runs the watched loss itself
        with pytest.raises(
            LossNotFoundError, match=r"`each = copy.copy.*return `type\(loss\).forward\(each, \*args\)`"
        ):
            fit_one_step(model, Samples(X, MULTI))
        return
    assert_exact(model, Samples(X, MULTI), lambda net: dro(3 * log_cosh(net), ONES, GROUPS))


WRONG_ADAPTERS = {
    "factor": (lambda p, t: 2 * log_cosh_of(p, t), LossNotFoundError, "return the mean of what its `per_sample`"),
    "some samples": (
        lambda p, t: log_cosh_of(p, t).mean().expand(3, 4),
        RowsError,
        r"`per_sample` returns losses of shape \(3, 4\)",
    ),
    "mean": (lambda p, t: log_cosh_of(p, t).mean(), LossNotFoundError, r"losses of shape \(N, ...\).*shape \(\)"),
    "denominators": (lambda p, t: (log_cosh_of(p, t), t[:2]), LossNotFoundError, "and their denominators, but got"),
    "no tensor": (lambda p, t: None, LossNotFoundError, "and their denominators, but got None"),
}


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(("per_sample", "error", "match"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS)
def test_a_wrong_adapter(per_sample, error, match, automatic):
    """Its losses would be trained in the place of others."""
    adapted = register_loss(lambda p, t: log_cosh_of(p, t).mean(), per_sample)

    class Module(Base):
        def training_step(self, batch, batch_idx):
            loss = adapted(self.net(batch[0]), batch[1])
            return loss if automatic else self.manual_backward(loss)

    module = Module()
    module.automatic_optimization = automatic
    with pytest.raises(error, match=f"(?s){match}"):
        fit_one_step(module, Samples(X, MULTI))


def test_a_registered_loss_that_is_changed_in_place():
    """It is compared as it was."""
    adapted = register_loss(lambda p, t: log_cosh_of(p, t).mean(), log_cosh_of)

    class Module(Base):
        def training_step(self, batch, batch_idx):
            return adapted(self.net(batch[0]), batch[1]).mul_(3)

    assert_exact(Module(), Samples(X, MULTI), lambda net: dro(3 * log_cosh(net), ONES, GROUPS))


def test_a_registered_loss_that_the_step_reduces():
    adapted = register_loss(log_cosh_of, log_cosh_of)

    class Module(Base):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.log("unreduced", adapted(self.net(batch[0]), batch[1]).max())
            return adapted(self.net(batch[0]), batch[1]).mean()

    with pytest.raises(LossNotFoundError, match=r"`log_cosh_of` to return one number.*got a tensor of shape \(6, 4\)"):
        fit_one_step(Module(), Samples(X, MULTI))


def test_a_registered_loss_beside_a_monitor():
    """Nothing says whether it is one of classes, of embeddings or of numbers."""

    def nll(z, y):
        return -z.log_softmax(1).gather(1, y[:, None]).squeeze(1)

    adapted = register_loss(lambda z, y: nll(z, y).mean(), nll)

    class Module(Base):
        def validation_step(self, batch, batch_idx):
            adapted(self.net(batch[0]), batch[1])

    module, loader = Module(), DataLoader(tag(Samples(X, Y), place=GROUPS), N)
    with pytest.raises(DebiasError, match="If it is one, pass `logits=`"):
        L.Trainer(callbacks=[GroupMonitor("place", 3)], **QUIET).validate(module, loader, verbose=False)
    trainer = L.Trainer(callbacks=[GroupMonitor("place", 3, logits="net", target=1)], **QUIET)
    (found,) = trainer.validate(module, loader, verbose=False)
    assert found["val/accuracy"] == pytest.approx(float((module.net(X).argmax(1) == Y).double().mean()))


def test_a_registered_loss_that_fails_hides_none_after_it(monkeypatch):
    from debias.tap import adapters

    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))
    register_loss(LogCosh, lambda loss, prediction, target: torch.log(torch.cosh(prediction - target)))

    class Module(OwnMaths):
        def training_step(self, batch, batch_idx):
            x, y = batch
            with pytest.raises(RuntimeError, match="size of tensor"):
                self.criterion(self.net(x), y[:, :2])
            return self.criterion(self.net(x), y)

    assert_exact(Module(), Samples(X, MULTI), lambda net: dro(log_cosh(net), ONES, GROUPS))


def test_a_registered_function():
    def loss(prediction, target):
        return torch.log(torch.cosh(prediction - target)).mean()

    adapted = register_loss(loss, lambda prediction, target: torch.log(torch.cosh(prediction - target)))
    assert adapted(X, X).item() == 0.0

    class Module(Base):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return 2 * adapted(self.net(x), y)

    assert_exact(Module(), Samples(X, MULTI), lambda net: dro(2 * log_cosh(net), ONES, GROUPS))


def test_a_registered_function_inside_a_registered_class(monkeypatch):
    """It is one loss, in training and where a monitor reads what was predicted."""
    from debias.tap import adapters

    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))

    def loss(prediction, target):
        return torch.log(torch.cosh(prediction - target)).mean()

    adapted = register_loss(loss, lambda prediction, target: torch.log(torch.cosh(prediction - target)))

    class Doubled(nn.Module):
        def forward(self, prediction, target):
            return 2 * adapted(prediction, target)

    register_loss(Doubled, lambda _, prediction, target: 2 * torch.log(torch.cosh(prediction - target)))

    class Module(OwnMaths):
        def __init__(self):
            super().__init__()
            self.criterion = Doubled()

    class Validated(Module):
        validation_step = OwnMaths.training_step

    assert_exact(Module(), Samples(X, MULTI), lambda net: dro(2 * log_cosh(net), ONES, GROUPS))
    monitor = GroupMonitor("place", 3, metric=torchmetrics.MeanAbsoluteError())
    trainer = L.Trainer(callbacks=[monitor], **QUIET)
    (found,) = trainer.validate(Validated(), DataLoader(tag(Samples(X, MULTI), place=GROUPS), N), verbose=False)
    assert found["val/mean_absolute_error"] == pytest.approx(float((Module().net(X) - MULTI).detach().abs().mean()))


class StatesLosses(Base):
    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = torch.log(torch.cosh(self.net(x) - y)).mean(1)
        return {"loss": losses.mean() + 0.1 * self.net.bias.sum(), "losses": losses}


def test_own_maths_with_returned_per_sample_losses():
    module = StatesLosses()

    def objective(net):
        bias = net(torch.zeros(1, D).double())
        return dro(log_cosh(net), ONES, GROUPS) + 0.1 * bias.sum()

    assert_exact(module, Samples(X, MULTI), objective)


class StatesLogits(Base):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = -(F.one_hot(y, C) * logits.log_softmax(1)).sum(1).mean()
        return {"loss": loss, "logits": logits, "targets": y}


def test_own_maths_with_returned_logits_and_targets():
    module = StatesLogits()
    assert_exact(module, Samples(X, Y), lambda net: dro(ce(net), ONES, GROUPS))


class HalfSeen(Base):
    """One loss can be followed, the other is reduced in a way that cannot: never a silent half."""

    def training_step(self, batch, batch_idx):
        x, y, z = batch
        out = self.net(x)
        return F.cross_entropy(out, y) + F.mse_loss(out, z, reduction="none").logsumexp(0).mean()


def test_half_a_loss_is_refused():
    with pytest.raises(UntappedLossError, match=r"mse_loss\(reduction='none'\).*next to a loss that can"):
        fit_one_step(HalfSeen(), Samples(X, Y, MULTI))


class SetLoss(Base):
    class DiceLoss(nn.Module):
        def forward(self, logits, target):
            p = logits.sigmoid()
            return 1 - 2 * (p * target).sum() / (p + target).sum()

    def __init__(self):
        super().__init__()
        self.criterion = self.DiceLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)


def test_a_loss_over_sets_is_named():
    with pytest.raises(LossNotFoundError, match="DiceLoss, which has no per-sample form"):
        fit_one_step(SetLoss(), Samples(X, MULTI))


# -- batches -----------------------------------------------------------------------------------------------------------

Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Graph:
    """A batch whose leaves have no sample axis: nodes of all graphs, and the graph of each node."""

    x: torch.Tensor
    y: torch.Tensor
    graph: torch.Tensor


def collate_graphs(samples):
    return Graph(
        torch.cat([x.expand(3, D) for x, _ in samples]), torch.stack([y for _, y in samples]),
        torch.arange(len(samples)).repeat_interleave(3),
    )  # fmt: skip


class Graphs(Base):
    def training_step(self, batch, batch_idx):
        nodes = self.net(batch.x)
        pooled = torch.zeros(len(batch.y), C, dtype=nodes.dtype).index_add(0, batch.graph, nodes) / 3
        return F.cross_entropy(pooled, batch.y)


class JoinedInTheStep(Graphs):
    def training_step(self, batch, batch_idx):
        return super().training_step(collate_graphs(batch), batch_idx)


@pytest.mark.parametrize("losses", ["whole", "split"])
@pytest.mark.parametrize(("model", "collate"), [(Graphs, collate_graphs), (JoinedInTheStep, list)])
def test_graphs_with_an_own_collate_function(model, collate, losses):
    callback = GroupDRO("place", 3, step_size=STEP_SIZE, losses=losses)
    if collate is not list and losses == "split":
        with pytest.raises(RowsError, match=r"nodes of graphs.*`DataLoader\(.*collate_fn=list.*the step joins"):
            fit_one_step(model(), Samples(X, Y), callback, collate_fn=collate)
        return
    assert_exact(model(), Samples(X, Y), lambda net: dro(ce(net), ONES, GROUPS), callback, collate_fn=collate)


@pytest.mark.parametrize("pass_on", [False, True], ids=["nodes", "messages"])
def test_features_of_graphs_are_those_of_their_pooled_nodes(pass_on):
    def trained(pool, last=None):
        class Pooled(Graphs):
            def training_step(self, batch, batch_idx):
                nodes = self.net(batch.x)
                if pass_on:
                    nodes = torch.zeros_like(nodes).index_add(0, torch.arange(len(nodes)).flip(0), nodes)
                return F.cross_entropy(self.last(self.body(pool(nodes, batch.graph))), batch.y)

        model = Pooled()
        model.body, model.last = nn.Identity(), copy.deepcopy(last or nn.Identity())
        loader = DataLoader(tag(Samples(X, Y), place=GROUPS), batch_size=N, collate_fn=collate_graphs)
        L.Trainer(max_steps=1, callbacks=[CORAL("place", 3, features="body")], **QUIET).fit(model, loader)
        return model.net.weight.detach()

    expected = trained(lambda nodes, graph: nodes.view(N, 3, C).sum(1))
    added = trained(lambda nodes, graph: nodes.new_zeros(N, C).index_add(0, graph, nodes))
    torch.testing.assert_close(added, expected)
    named = trained(lambda nodes, graph: nodes.new_zeros(N, C).index_add_(dim=0, index=graph, source=nodes))
    torch.testing.assert_close(named, expected)

    def ranked(nodes, graph):  # within each graph, as a pooling by scores does
        order = nodes[:, 0].argsort()
        index, together = graph[order].sort(stable=True)
        return nodes.new_zeros(N, C).index_add(0, index, nodes[order[together]])

    last = nn.Linear(C, C).double()
    added = trained(lambda nodes, graph: nodes.new_zeros(N, C).index_add(0, graph, nodes), last)
    torch.testing.assert_close(trained(ranked, last), added)


class ImageLists(Base):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(torch.stack([self.net(image) for image in images]), torch.stack(labels))


def test_lists_of_images():
    assert_exact(
        ImageLists(),
        Samples(X, Y),
        lambda net: dro(ce(net), ONES, GROUPS),
        collate_fn=lambda s: tuple(map(list, zip(*s, strict=True))),
    )


class NamedTuples(Base):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.x), batch.y)


def test_named_tuples():
    assert_exact(NamedTuples(), Samples(X, Y, make=lambda c: Point(*c)), lambda net: dro(ce(net), ONES, GROUPS))


def test_a_datamodule_that_inspects_the_batch_in_its_transfer_hook():
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(tag(Samples(X, Y), place=GROUPS), batch_size=N)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            assert isinstance(x, torch.Tensor)
            return x, y

    callback = GroupDRO("place", 3)
    L.Trainer(max_steps=1, callbacks=[callback], **QUIET).fit(CrossEntropy(), Data())
    assert not torch.equal(callback.module.weights, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("key", [1, "1", lambda batch: batch[1]])
def test_ids_inside_the_batch(key):
    callback = GroupDRO(key, C, step_size=STEP_SIZE, name="y")
    assert_exact(CrossEntropy(), Samples(X, Y), lambda net: dro(ce(net), ONES, Y, C), callback)


def test_crossed_ids():
    callback = GroupDRO(("place", 1), (3, C), step_size=STEP_SIZE)
    assert_exact(CrossEntropy(), Samples(X, Y), lambda net: dro(ce(net), ONES, GROUPS * C + Y, 3 * C), callback)


def test_a_key_that_is_not_there():
    with pytest.raises(
        BatchKeyError,
        match=r"(?s)`group='site'`.*the tags are \['index', 'place'\].*DataLoader\(tag\(dataset, site=ids",
    ):
        fit_one_step(CrossEntropy(), Samples(X, Y), GroupDRO("site", 3))


def test_ids_that_are_no_ids():
    with pytest.raises(BatchKeyError, match=r"integer ids of shape \(N,\).*float64"):
        fit_one_step(CrossEntropy(), Samples(X, Y), GroupDRO(0, 3))


class Crop(Base):
    def training_step(self, batch, batch_idx):
        x, _ = batch
        return F.mse_loss(self.net(x)[:4], torch.zeros(4, C, dtype=torch.float64))


def test_rows_are_never_guessed():
    class Module(Base):
        """Rows that nothing explains."""

        def training_step(self, batch, batch_idx):
            x, _ = batch
            out = self.net(x.sum(0, keepdim=True).expand(4, D) + 0)
            return F.mse_loss(out, torch.zeros(4, C, dtype=torch.float64))

    with pytest.raises(RowsError, match=r"loss has shape \(4, 4\) and the batch 6 ids"):
        fit_one_step(Module(), Samples(X, Y))


def test_a_slice_is_followed():
    def objective(net):
        return dro((net(X)[:4] ** 2).mean(1), ONES[:4], GROUPS[:4])

    assert_exact(Crop(), Samples(X, Y), objective)


def test_split_runs_the_step_once_per_group():
    class Detector(Base):
        """Only a loss per batch: the maximum over elements has no per-sample form."""

        def training_step(self, batch, batch_idx):
            x, y = batch
            return {"loss": (self.net(x) - y).abs().max()}

    def objective(net):
        per_group = torch.stack([(net(X[k == GROUPS]) - MULTI[k == GROUPS]).abs().max() for k in (0, 2)])
        counts = torch.tensor([4.0, 2.0]).double()
        return dro(per_group * counts, counts, torch.tensor([0, 2]))

    assert_exact(Detector(), Samples(X, MULTI), objective, GroupDRO("place", 3, step_size=STEP_SIZE, losses="split"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # what is tested here
def test_a_jitted_criterion_is_refused():
    class Jitted(nn.Module):
        def forward(self, x, y):
            return (x - y).pow(2).mean()

    criterion = torch.jit.trace(Jitted(), (X, X))

    class Module(Base):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return criterion(self.net(x), y)

    with pytest.raises(LossNotFoundError, match="none that requires a gradient reaches the returned loss"):
        fit_one_step(Module(), Samples(X, MULTI))


def test_a_second_loss_that_appears_later_is_not_left_out_in_silence():
    class Warmup(Base):
        def training_step(self, batch, batch_idx):
            x, y, z = batch
            out = self.net(x)
            loss = F.cross_entropy(out, y)
            return loss + F.mse_loss(out, z) if self.current_epoch else loss

    trainer = L.Trainer(max_epochs=2, callbacks=[GroupDRO("place", 3)], **QUIET)
    with pytest.raises(AmbiguousLossError, match="got 2: cross_entropy, mse_loss"):
        trainer.fit(Warmup(), DataLoader(tag(Samples(X, Y, MULTI), place=GROUPS), batch_size=N))


def test_a_tagged_batch_without_any_callback_says_what_to_do():
    trainer = L.Trainer(max_epochs=1, **QUIET)
    with pytest.raises(BatchKeyError, match=r"tags \['index', 'place'\].*GroupMonitor"):
        trainer.fit(CrossEntropy(), DataLoader(tag(Samples(X, Y), place=GROUPS), batch_size=N))


def test_split_refuses_what_it_cannot_do():
    class Manual(CrossEntropy):
        automatic_optimization = False

    with pytest.raises(UnsupportedStrategyError, match=r"losses='split'.*automatic optimisation"):
        fit_one_step(Manual(), Samples(X, Y), GroupDRO("place", 3, losses="split"))
