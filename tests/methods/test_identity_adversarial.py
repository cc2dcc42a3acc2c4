"""Identity-adversarial training against an explicit two-loss computation that knows no reversal."""

from __future__ import annotations

import copy
import functools
import json
import math
from unittest import mock

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, deviation, loader, make_trainer, parameters, problem, same, val_loader
from _support.runs import fit
from debias import (
    Debiaser,
    DomainAdversarial,
    GradientReversal,
    IdentityAdversarial,
    IdentityAdversarialLoss,
    IdentityAdversarialMixin,
    tag,
)
from debias.errors import BadRowsError, BatchKeyError, DebiasError, DebiasWarning, HeadNotFoundError, RowsError
from debias.functional import bce_to_ce_strength, dann_ramp, gradient_reversal, identity_losses
from debias.ops import arguments

PERSONS = torch.arange(39) * 7 % 6 - 1  # -1 .. 4


def method(**options):
    return IdentityAdversarial("person", 5, **({"strength": 0.7, "lr_ratio": 3.0} | options))


def fitted(callbacks, model=None, *, persons=PERSONS, **options):
    model = Classifier() if model is None else model
    trainer = make_trainer(callbacks, **({"max_epochs": 2} | options))
    bare = not any(isinstance(callback, Debiaser) for callback in callbacks)
    trainer.fit(model, loader(person=persons, bare=bare), val_loader(bare=bare))
    return parameters(model), trainer


def fresh_head():
    """The head's initial weights, which depend on the method's seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(6, 5).double()


# -------------------------------------------------------------------------------------------------- the formula


def by_definition(logits, identities, kind):
    """Per sample, from the definition of each loss."""
    out = []
    for z, s in zip(logits, identities.tolist(), strict=True):
        if kind == "ce":
            out.append(-(z[s] - z.exp().sum().log()))
        else:
            terms = [-torch.log(torch.sigmoid(z[k] if k == s else -z[k])) for k in range(len(z))]
            out.append(torch.stack(terms).sum() / len(z))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_losses_are_their_definition(kind):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    identities = torch.tensor([0, 3, 1, 1, 2, 0])
    torch.testing.assert_close(
        identity_losses(logits, identities, identity_loss=kind),
        by_definition(logits, identities, kind),
        rtol=1e-12,
        atol=0,
    )
    assert torch.autograd.gradcheck(lambda z: identity_losses(z, identities, identity_loss=kind), logits)


@pytest.mark.parametrize("n", [27, 41, 140])
def test_the_two_losses_pull_with_different_strength(n):
    """At the base rate cross-entropy pulls exactly n times as hard; before anything is learnt 2 sqrt(n - 1) times."""

    def pull(logit, kind):
        z = torch.full((1, n), logit, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(identity_losses(z, torch.tensor([3]), identity_loss=kind).sum(), z)
        return gradient

    base = math.log(1 / n / (1 - 1 / n))
    ratio = bce_to_ce_strength(1.0, n)
    torch.testing.assert_close(ratio * pull(base, "ce"), pull(base, "bce"), rtol=1e-12, atol=0)
    at_start = float(pull(0.0, "ce").norm() / pull(0.0, "bce").norm())
    assert at_start == pytest.approx(2 * math.sqrt(n - 1), rel=1e-12)


def test_reversal_turns_the_gradient_and_nothing_else():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for reverse in (lambda x: gradient_reversal(x, 0.3), GradientReversal(0.3)):
        out = reverse(x)
        assert torch.equal(out, x)
        (reversed_,) = torch.autograd.grad((out**3).sum(), x)
        (plain,) = torch.autograd.grad((x**3).sum(), x)
        torch.testing.assert_close(reversed_, -0.3 * plain, rtol=1e-15, atol=0)
    assert not gradient_reversal(x, 0.0).requires_grad
    assert "0.3" in repr(GradientReversal(0.3))


def test_ramp():
    assert [dann_ramp(p) for p in (0, 1, 2)] == pytest.approx([0, math.tanh(5), math.tanh(5)])
    assert dann_ramp(0.3, gamma=4) == pytest.approx(math.tanh(0.6))


@pytest.mark.parametrize("kind", ["bce", "ce"])
@pytest.mark.parametrize("adversary", ["linear", "mlp"])
def test_module_gradients_are_those_of_two_losses(kind, adversary):
    """Features get minus strength times the gradient, the head its own; unknown identities are left out."""
    torch.manual_seed(0)
    criterion = IdentityAdversarialLoss(8, 5, 0.7, identity_loss=kind, adversary=adversary).double()
    features = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    identities = torch.tensor([0, 4, -1, 2, 2, -5])
    loss = criterion(features, identities)
    got = torch.autograd.grad(loss, [features, *criterion.parameters()])
    known = identities >= 0
    plain = by_definition(criterion.network(features[known]), identities[known], kind).mean()
    expected = torch.autograd.grad(plain, [features, *criterion.parameters()])
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[0], -0.7 * expected[0], rtol=1e-10, atol=1e-14)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_no_known_identity_is_a_loss_of_zero_that_reaches_every_parameter():
    criterion = IdentityAdversarialLoss(8, 5)
    loss = criterion(torch.randn(3, 8, requires_grad=True), torch.full((3,), -1))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in criterion.parameters())


def test_only_rows_without_a_number_are_left_out_and_counted():
    """A NaN in one row reaches neither the head's gradient nor the other rows'."""
    criterion = IdentityAdversarialLoss(8, 5)
    features = torch.randn(4, 8)
    features[1, 3] = torch.nan
    features.requires_grad_()
    with mock.patch.object(arguments, "on_host", return_value=False):  # as on a device, where reading would wait
        criterion(features, torch.tensor([0, 1, 2, 9])).backward()
    assert all(torch.isfinite(p.grad).all() for p in criterion.parameters())
    assert torch.isfinite(features.grad).all()
    assert features.grad[[0, 2]].abs().sum(1).gt(0).all()
    assert not features.grad[[1, 3]].any()
    assert criterion.row_counts[-2:].tolist() == [1, 1]
    with pytest.raises(BadRowsError, match="identity ids below `n_identities=5`, but 1 rows"):
        criterion.raise_if_bad()


# -------------------------------------------------------------------------------------------------- in a Trainer


def explicit(
    *, kind="bce", strength=0.7, lr_ratio=3.0, accumulate=1, clip=None, epochs=2, scaler=None, optimizer=torch.optim.SGD
):
    """The same training as a plain loop: the task's loss, the head's loss on detached features, and minus strength
    times the loss of a frozen copy of the head on the features. No reversal, no debias."""
    half = scaler is not None
    model = Classifier()
    head = fresh_head()
    if half:
        model, head = model.float(), head.float()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    joint = optimizer(
        [{"params": model.parameters(), "lr": 0.1}, {"params": head.parameters(), "lr": 0.1 * lr_ratio}], **options
    )
    losses, skipped = [], []
    for _ in range(epochs):
        for i in range(3):
            rows = slice(16 * i, 16 * (i + 1))
            x, y = (part[rows] for part in problem(39, dtype=torch.float32 if half else torch.float64).tensors)
            person = PERSONS[rows]
            known = person >= 0
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                features = model.backbone(x)
                task = F.cross_entropy(model.head(features), y)
            features = features.float() if half else features
            own = by_definition(head(features.detach()[known]), person[known], kind).mean()
            frozen = {name: p.detach() for name, p in head.named_parameters()}
            against = by_definition(
                torch.func.functional_call(head, frozen, (features[known],)), person[known], kind
            ).mean()
            total = (task + own - strength * against) / accumulate
            (total if scaler is None else scaler.scale(total)).backward()
            losses.append(own.item())
            if (i + 1) % accumulate and i < 2:
                continue
            if scaler is not None:
                scaler.unscale_(joint)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler is None:
                joint.step()
            else:
                before = parameters(head)
                scaler.step(joint)
                scaler.update()
                skipped.append(same(before, parameters(head)))
            joint.zero_grad()
    return {"model": parameters(model), "head": parameters(head), "losses": losses, "skipped": skipped}


def adversary_of(callback):
    return callback.owned["adversary"].module


@pytest.mark.parametrize("kind", ["bce", "ce"])
@pytest.mark.parametrize(
    ("trainer", "oracle"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
    ],
    ids=["plain", "accumulation", "clipping"],
)
def test_training_is_the_explicit_two_loss_loop(kind, trainer, oracle):
    callback = method(identity_loss=kind)
    after, _ = fitted([callback], **trainer)
    expected = explicit(kind=kind, **oracle)
    assert deviation(expected["model"], after) < 1e-10
    assert deviation(expected["head"], parameters(adversary_of(callback))) < 1e-10
    assert deviation(explicit(kind=kind, **(oracle | {"strength": 0.6}))["model"], after) > 1e-6


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)


def test_half_precision_with_a_scaler_that_skips_steps():
    """The network's gradients overflow in half precision, the head's do not: both skip, as one optimiser would."""
    callback = method()
    model = Classifier().float()
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    data = tag(problem(39, dtype=torch.float32), person=PERSONS)
    trainer = make_trainer([callback], max_epochs=3, plugins=[plugin])
    trainer.fit(model, DataLoader(data, batch_size=16), DataLoader(data, batch_size=16))
    expected = explicit(epochs=3, scaler=scaler())
    assert 0 < sum(expected["skipped"]) < 9
    assert deviation(expected["model"], parameters(model)) < 1e-5
    assert deviation(expected["head"], parameters(adversary_of(callback))) < 1e-5


def test_the_head_gets_an_optimiser_like_the_users():
    class Decayed(Classifier):
        def configure_optimizers(self):
            groups = [{"params": self.backbone.parameters(), "lr": 0.01}, {"params": self.head.parameters()}]
            return torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), weight_decay=0.3)

    callback = method(lr_ratio=2.0)
    _, trainer = fitted([callback], Decayed())
    owned = callback.owned["adversary"].optimizer
    assert type(owned) is torch.optim.AdamW
    (group,) = owned.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.9), 0.3, 0.1)  # the fastest group's rate
    assert len(trainer.optimizers[0].param_groups) == 2

    mine = method(lr=0.02, optimizer=functools.partial(torch.optim.RMSprop, momentum=0.4))
    fitted([mine], Decayed())
    (group,) = mine.owned["adversary"].optimizer.param_groups
    assert (type(mine.owned["adversary"].optimizer), group["momentum"], group["lr"]) == (torch.optim.RMSprop, 0.4, 0.02)


def test_an_optimiser_that_cannot_be_made_again():
    class Own(torch.optim.SGD):
        def __init__(self, parameters, secret):
            super().__init__(parameters, lr=0.1)

    class Model(Classifier):
        def configure_optimizers(self):
            return Own(self.parameters(), secret=1)

    with pytest.raises(DebiasError, match=r"made a second time from its `defaults`, but got Own.*optimizer="):
        fitted([method()], Model())


SCHEDULERS = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda step: 0.9**step]),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_without_it_and_the_head_follows(name):
    rates = {}

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.setdefault(bool(trainer.callbacks[0] is not self), []).append(used[0])

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            used[0] = optimizer.param_groups[0]["lr"]

    class Model(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}]

    used, followed = [None], []
    callback = method()
    step = callback.owned["adversary"].step

    def stepped(optimizer, scaler):
        step(optimizer, scaler)
        followed.append((callback.owned["adversary"].optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]))

    callback.owned["adversary"].step = stepped
    fitted([callback, Rates()], Model())
    fitted([Rates()], Model())
    assert rates[True] == rates[False]
    assert [ours for ours, _ in followed] == pytest.approx([3 * users for _, users in followed])
    assert len({ours for ours, _ in followed}) > 2


def test_an_optimiser_of_a_part_of_the_parameters():
    """Only what the user optimises moves; the head of the module never sees the adversary."""

    class HeadOnly(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    callback = method()
    with pytest.warns(DebiasWarning, match="reaches no trainable parameter"):
        after, trainer = fitted([callback], HeadOnly())
    plain, _ = fitted([], HeadOnly())
    assert same(after, plain)
    assert sum(len(g["params"]) for g in trainer.optimizers[0].param_groups) == 2
    fresh = fresh_head()
    assert not same(parameters(fresh), parameters(adversary_of(callback)))


def test_a_frozen_backbone():
    model = Classifier()
    model.backbone.requires_grad_(False)
    with pytest.warns(DebiasWarning, match="reaches no trainable parameter"):
        after, _ = fitted([method()], model)
    plain = parameters(Classifier())
    assert same(*({k: v for k, v in run.items() if "backbone" in k} for run in (after, plain)))
    assert not same(after, plain)


def test_strength_zero_trains_as_without_it_while_the_head_learns():
    callback = method(strength=0.0)
    after, _ = fitted([callback])
    plain, _ = fitted([])
    assert same(after, plain)
    fresh = fresh_head()
    assert not same(parameters(fresh), parameters(adversary_of(callback)))


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"warmup_steps": 2}, {"schedule": "dann"}, {}])
def test_uneven_ranks_with_unlabelled_rows_are_one_process(ranks, options):
    """One rank holds no known identity in the second batch, nobody in the third; nothing is left unused."""
    persons = PERSONS.clone()
    persons[16:21] = -1
    persons[32:] = -1
    runs = ranks.run(_fit, (5, 11), (2, 5), options, persons)
    whole = fit(0, "IdentityAdversarial", method=options, tags={"person": persons})
    assert same(*runs)
    assert deviation(whole, runs[0]) < 1e-12


def _fit(rank, sizes, last, options, persons):
    return fit(rank, "IdentityAdversarial", sizes, last, method=options, tags={"person": persons})


def test_an_adversary_of_the_users_own_is_the_same_on_all_ranks(ranks):
    """Without seed_everything every rank makes another one."""
    first, second = ranks.run(_fit_own)
    assert same(first, second)


def _fit_own(rank):
    torch.manual_seed(rank)
    return fit(rank, "IdentityAdversarial", (5, 11), (2, 5), method={"adversary": nn.Linear(6, 5)})


def test_bad_identities_raise_on_all_ranks_together(ranks):
    persons = PERSONS.clone()
    persons[20] = 5  # on rank 0 alone
    ranks.raises(BadRowsError, "below `n_identities=5`, but 1 rows", _fit, (5, 11), (2, 5), {}, persons)


def test_schedule():
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.logged_metrics["train/person_adversary/strength"]))

    fitted([method(schedule="dann", warmup_steps=2), Look()])
    assert seen == pytest.approx([0, 0, *(0.7 * math.tanh(5 * i / 4) for i in range(4))], abs=1e-6)
    seen.clear()
    fitted([method(schedule="dann", ramp_steps=2), Look()])
    assert seen == pytest.approx([0, 0.7 * math.tanh(2.5), *[0.7 * math.tanh(5)] * 4], abs=1e-6)
    seen.clear()
    fitted([method(warmup_steps=5), Look()])
    assert seen == pytest.approx([0] * 5 + [0.7], abs=1e-6)
    endless = make_trainer([method(schedule="dann")], max_epochs=-1)
    with pytest.raises(DebiasError, match="`ramp_steps` to be given where training has no end"):
        endless.fit(Classifier(), loader(), val_loader())


def test_what_is_logged():
    callback = method()
    _, trainer = fitted([callback], max_epochs=1, limit_train_batches=1)
    features = Classifier().backbone(problem(39).tensors[0][:16])
    head = fresh_head()
    known = PERSONS[:16] >= 0
    logits = head(features)[known]
    logged = trainer.logged_metrics
    assert float(logged["train/person_adversary/loss"]) == pytest.approx(explicit(epochs=1)["losses"][0], rel=1e-6)
    right = (logits.argmax(1) == PERSONS[:16][known]).double().mean()
    assert float(logged["train/person_adversary/accuracy"]) == pytest.approx(float(right))


def test_adversaries_of_one_name_log_under_names_of_their_own():
    both = [method(), DomainAdversarial("person", 5, schedule="constant", strength=0.3)]
    _, trainer = fitted(both, max_epochs=1, limit_train_batches=1)
    logged = {k: float(v) for k, v in trainer.logged_metrics.items() if "adversary" in k}
    names = [f"train/person_adversary/{k}" for k in ("loss", "accuracy", "strength")]
    assert list(logged) == [f"{name}/{type(callback).__name__}" for callback in both for name in names]
    assert [logged[f"{names[2]}/{type(callback).__name__}"] for callback in both] == pytest.approx([0.7, 0.3])

    named = [method(), DomainAdversarial("person", 5, name="place")]
    _, trainer = fitted(named, max_epochs=1, limit_train_batches=1)
    assert {"train/person_adversary/loss", "train/place_adversary/loss"} <= set(trainer.logged_metrics)


# -------------------------------------------------------------------------------------------------- many modules


class MultiLabel(Classifier):
    """Three labels, one of them missing in places, and a masked loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        labels = torch.stack([y, 1 - y, y], 1).double()
        mask = torch.ones_like(labels)
        losses = F.binary_cross_entropy_with_logits(self(x), labels, reduction="none")
        return (losses * mask).sum() / mask.sum()


class Regression(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 1).double()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).squeeze(-1), batch[1].double())

    def validation_step(self, batch, batch_idx):
        pass


class Stated(Classifier):
    """Returns logits and targets, and a loss with maths of its own."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = -(logits.log_softmax(1).gather(1, batch[1][:, None])).mean()
        return {"loss": loss, "logits": logits, "targets": batch[1]}


@pytest.mark.parametrize("module", [MultiLabel, Regression, Stated])
def test_first_gradient_is_the_explicit_one(module):
    """One SGD step: the backbone moves by the task's gradient minus strength times that of the identity loss."""
    model = module()
    reference = copy.deepcopy(model)
    callback = method()
    fitted([callback], model, max_epochs=1, limit_train_batches=1)
    x, y = (part[:16] for part in problem(39).tensors)
    known, person = PERSONS[:16] >= 0, PERSONS[:16]
    head = fresh_head()
    out = reference.training_step((x, y), 0)
    task = out["loss"] if isinstance(out, dict) else out
    ours = by_definition(head(reference.backbone(x)[known]), person[known], "bce").mean()
    weights = list(reference.backbone.parameters())
    for p, a, b in zip(
        model.backbone.parameters(), torch.autograd.grad(task, weights), torch.autograd.grad(ours, weights), strict=True
    ):
        before = weights.pop(0)
        torch.testing.assert_close(p, before - 0.1 * (a - 0.7 * b), rtol=1e-12, atol=1e-14)


class TwoViews(Classifier):
    """Both views of a sample go through the network, one after the other."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = torch.randperm(2 * len(x), generator=torch.Generator().manual_seed(batch_idx))
        return F.cross_entropy(self(torch.cat([x, -x])[order]), torch.cat([y, y])[order])


def test_rows_of_the_features_are_followed_to_their_samples():
    model, callback = TwoViews(), method()
    fitted([callback], model, max_epochs=1, limit_train_batches=1)
    x = problem(39).tensors[0][:16]
    reference = Classifier()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    features = reference.backbone(torch.cat([x, -x])[order])
    person = torch.cat([PERSONS[:16]] * 2)[order]
    head = fresh_head()
    ours = by_definition(head(features[person >= 0]), person[person >= 0], "bce").mean()
    (gradient,) = torch.autograd.grad(ours, head.weight)
    torch.testing.assert_close(adversary_of(callback).weight, head.weight - 0.3 * gradient, rtol=1e-12, atol=1e-14)


class Turned(Classifier):
    """The samples change places between the features and the loss, whose mean is the same."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.backbone(x)
        return F.cross_entropy(self.head(features.flip(0)), y.flip(0))


@pytest.mark.parametrize("features", [None, "backbone"])
def test_samples_that_change_places_behind_the_features(features):
    runs = []
    for model in (Turned(), Classifier()):
        callback = method(features=features)
        fitted([callback], model, max_epochs=1)
        runs.append([parameters(model), parameters(adversary_of(callback))])
    assert deviation(*runs) < 1e-12


class Deep(Classifier):
    """Its features of interest are not what the head reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.neck = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_named_features(compiled):
    torch._dynamo.reset()
    model, callback = Deep(), method(features="neck.0")
    if compiled:
        model.neck.compile(backend="aot_eager")
    fitted([callback], model, max_epochs=1)
    assert adversary_of(callback).in_features == 5
    found = method()
    fitted([found], Deep(), max_epochs=1)
    assert adversary_of(found).in_features == 6
    assert not model.neck[0]._forward_hooks
    again = Deep()
    fitted([method(features="neck.0")], again, max_epochs=1)
    assert deviation(parameters(again), {k.replace("_orig_mod.", ""): v for k, v in parameters(model).items()}) < 1e-12
    torch._dynamo.reset()


def test_two_methods_with_features_of_different_places():
    first, second = method(features="neck.0", name="a"), method(features="backbone", name="b")
    fitted([first, second], Deep(), max_epochs=1)
    assert (adversary_of(first).in_features, adversary_of(second).in_features) == (5, 6)


def test_two_methods_with_the_same_features():
    first, second = method(name="a"), method(name="b", lr_ratio=1.0)
    fitted([first, second])
    alone = method(strength=0.0)
    both = [method(strength=0.0, name="a"), method(strength=0.0, name="b")]
    fitted(both)
    fitted([alone])
    assert not same(parameters(adversary_of(first)), parameters(adversary_of(second)))
    assert all(same(parameters(adversary_of(one)), parameters(adversary_of(alone))) for one in both)


OWN = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 5)).double()


def make_own(width):
    return nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 5))


@pytest.mark.parametrize(("adversary", "hidden"), [("mlp", 3), (OWN, 3), (make_own, 4)])
def test_adversaries(adversary, hidden):
    callback = method(adversary=adversary)
    before = parameters(OWN)
    fitted([callback])
    network = adversary_of(callback)
    assert network[0].out_features == hidden
    assert network[-1].out_features == 5
    assert network is not OWN
    assert same(before, parameters(OWN))  # a copy was trained
    if adversary is OWN:
        assert not same(before, parameters(network))


def test_yaml_names_the_optimiser(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["program"])
    options = {"identity": "person", "n_identities": 5, "optimizer": {"class_path": "torch.optim.Adagrad"}}
    entry = {"class_path": "debias.IdentityAdversarial", "init_args": options | {"schedule": "dann", "lr": 0.3}}
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "callbacks": [entry]}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"trainer": trainer}))
    cli = LightningCLI(
        Classifier, run=False, args=["--config", str(path)], save_config_callback=None, seed_everything_default=False
    )
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, IdentityAdversarial)]
    fitted([callback])
    owned = callback.owned["adversary"].optimizer
    assert (type(owned), owned.param_groups[0]["lr"]) == (torch.optim.Adagrad, 0.3)


def test_mixin_is_the_callback_with_a_head_in_the_module():
    class Mixed(IdentityAdversarialMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.configure_identity_adversarial(6, 5, strength=0.7)
            self.identity_adversarial.network.load_state_dict(fresh_head().state_dict())
            self.double()

        def training_step(self, batch, batch_idx):
            x, y, person = batch
            features = self.backbone(x)
            return F.cross_entropy(self.head(features), y) + self.identity_adversarial_loss(features, person)

    model = Mixed()
    x, y = problem(39).tensors
    make_trainer(max_epochs=2).fit(
        model, DataLoader(TensorDataset(x, y, PERSONS), batch_size=16), val_loader(bare=True)
    )
    expected = explicit(lr_ratio=1.0)
    got = parameters(model)
    assert deviation(expected["model"], {k: v for k, v in got.items() if "adversarial" not in k}) < 1e-10
    assert deviation(expected["head"], parameters(model.identity_adversarial.network)) < 1e-10


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_mixin_in_half_precision(precision):
    class Mixed(IdentityAdversarialMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.configure_identity_adversarial(6, 5)
            self.identity_adversarial.network.load_state_dict(fresh_head().state_dict())

        def training_step(self, batch, batch_idx):
            x, y, person = batch
            features = self.backbone(x)
            return F.cross_entropy(self.head(features), y) + self.identity_adversarial_loss(features, person)

    model = Mixed()
    before = parameters(model)
    x, y = problem(32, dtype=torch.float32).tensors
    make_trainer(precision=precision, limit_val_batches=0).fit(
        model, DataLoader(TensorDataset(x, y, PERSONS[:32]), batch_size=16), val_loader(bare=True)
    )
    for name, value in model.named_parameters():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name].to(value.dtype)), name


# -------------------------------------------------------------------------------------------------- bad input


def test_identities_beyond_the_number():
    persons = PERSONS.clone()
    persons[18] = 7
    with pytest.raises(BadRowsError, match=r"identity ids below `n_identities=5`, but 1 rows.*raise `n_identities`"):
        fitted([method()], persons=persons)


def test_no_identity_in_a_whole_epoch():
    with pytest.raises(BadRowsError, match=r"known identity \(an id >= 0\), but a whole epoch had none"):
        fitted([method()], persons=torch.full((39,), -1))
    only = torch.full((39,), -1)
    only[38] = 2
    fitted([method()], persons=only)


class Spatial(Classifier):
    def forward(self, x):
        return self.head(self.backbone(x)[:, None]).squeeze(1)


@pytest.mark.parametrize(
    ("options", "module", "error", "match"),
    [
        ({"features": "bakbone"}, Classifier, HeadNotFoundError, r"`features`.*'bakbone'. Did you mean 'backbone'"),
        ({"head": "haed"}, Classifier, HeadNotFoundError, r"`head`.*'haed'. Did you mean 'head'"),
        ({}, Spatial, HeadNotFoundError, r"features to have shape \(N, D\).*\(16, 1, 6\).*features='dotted.path'"),
        ({"adversary": nn.Linear(6, 4).double()}, Classifier, DebiasError, r"logits of shape \(16, 5\).*\(16, 4\)"),
    ],
)
def test_what_is_found_at_the_first_step(options, module, error, match):
    with pytest.raises(error, match=match):
        fitted([method(**options)], module())


class Twice(Classifier):
    def forward(self, x):
        return torch.cat([self.head(self.backbone(x)), self.head(self.backbone(x))])[: len(x)]


def test_features_of_two_runs_are_joined():
    """Here both runs are of the same samples, so that the mean over samples is the same."""
    once, twice = (fitted([method(features="backbone")], model)[0] for model in (Classifier(), Twice()))
    assert deviation(once, twice) < 1e-12


class Summed(Classifier):
    """Features of pairs of samples."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.pairs = self.neck(x.view(-1, 8))
        return F.cross_entropy(self(x), y) + 0 * self.pairs.sum()

    def __init__(self):
        super().__init__()
        self.neck = nn.Linear(8, 3).double()


def test_features_with_other_rows_than_the_batch():
    with pytest.raises(RowsError, match=r"followed to the 16 samples, but got shape \(8, 3\).*features='dotted.path'"):
        fitted([method(features="neck")], Summed(), limit_train_batches=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": -1.0}, "`strength` to be a number >= 0, but got -1.0"),
        ({"strength": float("nan")}, "`strength`"),
        ({"n_identities": 0}, "`n_identities` to be an integer >= 1, but got 0"),
        ({"identity_loss": "mse"}, "`identity_loss` to be 'bce' or 'ce', but got 'mse'"),
        ({"adversary": "deep"}, "`adversary` to be 'linear', 'mlp'"),
        ({"schedule": "cosine"}, "`schedule` to be 'constant' or 'dann'"),
        ({"warmup_steps": -1}, "`warmup_steps` to be an integer >= 0"),
        ({"ramp_steps": 0}, "`ramp_steps` to be an integer >= 1"),
        ({"lr_ratio": 0.0}, "`lr_ratio` to be a number > 0"),
        ({"lr": 0}, "`lr` to be a number > 0"),
        ({"lr": "x"}, "`lr` to be a number > 0, but got 'x'"),
        ({"lr": True}, "`lr` to be a number > 0, but got True"),
        ({"lr": float("inf")}, "`lr` to be a number > 0, but got inf"),
        ({"lr_ratio": float("nan")}, "`lr_ratio` to be a number > 0, but got nan"),
        ({"loss": "sum"}, "`loss` to choose the one loss"),
        ({"identity": lambda batch: batch[1]}, "`name` to be given where `identity` is a callable"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(DebiasError, match=match):
        IdentityAdversarial(**({"identity": "person", "n_identities": 5} | options))


def test_wrong_ids():
    with pytest.raises(BatchKeyError, match=r"`identity='person'` to hold one id per sample"):
        fitted([method()], persons=torch.ones(39, 5, dtype=torch.bool))
    criterion = IdentityAdversarialLoss(8, 5)
    with pytest.raises(DebiasError, match=r"integer ids of shape \(N,\)"):
        criterion(torch.randn(3, 8), torch.rand(3))
    with pytest.raises(DebiasError, match="`in_features` to be given"):
        IdentityAdversarialLoss(None, 5)(torch.randn(3, 8), torch.zeros(3).long())


def test_another_number_of_identities_is_refused_on_resume():
    callback = method()
    fitted([callback])
    other = IdentityAdversarial("person", 6)
    other.load_state_dict(callback.state_dict())
    with pytest.raises(DebiasError, match="saved network to fit the one of this run"):
        fitted([other])
