"""DANN and CDANN against losses that are spelt out sample by sample, and against DomainBed's published formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, deviation, loader, make_trainer, parameters, problem, same, val_loader
from _support.flat import EdgeView
from _support.runs import fit
from debias import DomainAdversarial, DomainAdversarialLoss, DomainAdversarialMixin
from debias.errors import BadRowsError, DebiasError, RowsError

E, C, D = 3, 4, 5
G = torch.Generator().manual_seed(0)
FEATURES = torch.randn(12, D, dtype=torch.float64, generator=G)
DOMAINS = torch.tensor([0, 1, 2, 0, 0, 1, -1, 2, 2, 0, 1, -1])
CLASSES = torch.tensor([0, 0, 0, 1, 1, 3, 1, 3, 0, 0, 1, 0])  # class 2 is absent


def by_definition(network, features, domains, classes, *, gradient_penalty, conditional):
    """The objective as a loop over samples: per class where conditional, with each sample's own input gradient."""
    known = [i for i in range(len(features)) if domains[i] >= 0]
    present = sorted({int(classes[i]) for i in known})
    total = torch.zeros((), dtype=torch.float64)
    for i in known:
        x = features[i : i + 1]
        logits = network(x, classes[i : i + 1]) if conditional else network(x)
        loss = logits.logsumexp(1).sum() - logits[0, domains[i]]
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        size = sum(int(classes[j]) == int(classes[i]) for j in known)
        total = total + (loss / (size * len(present)) if conditional else loss / len(known))
        total = total + gradient_penalty * (gradient**2).sum() / len(known)
    return total


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("gradient_penalty", [0.0, 0.3])
def test_gradients_are_those_of_the_definition(conditional, gradient_penalty):
    torch.manual_seed(0)
    criterion = DomainAdversarialLoss(
        D,
        E,
        0.7,
        n_classes=C if conditional else None,
        gradient_penalty=gradient_penalty,
        discriminator=nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, E)),
    ).double()
    features = FEATURES.clone().requires_grad_()
    loss = criterion(features, DOMAINS, CLASSES)
    weights = [features, *criterion.parameters()]
    got = torch.autograd.grad(loss, weights)
    plain = by_definition(
        criterion.network, features, DOMAINS, CLASSES, gradient_penalty=gradient_penalty, conditional=conditional
    )
    expected = torch.autograd.grad(plain, weights)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[0], -0.7 * expected[0], rtol=1e-10, atol=1e-14)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_conditional_weights_are_domainbeds():
    """Where every class occurs, the class weights are those of DomainBed's CDANN."""
    classes = torch.arange(12) % C
    domains = torch.arange(12) % 5 % E
    criterion = DomainAdversarialLoss(D, E, n_classes=C).double()
    logits = criterion.network(FEATURES, classes)
    y_counts = F.one_hot(classes).sum(0)
    weights = 1.0 / (y_counts[classes] * y_counts.shape[0]).double()
    published = (weights * F.cross_entropy(logits, domains, reduction="none")).sum()
    torch.testing.assert_close(criterion(FEATURES, domains, classes), published, rtol=1e-12, atol=0)


def test_no_gradient_penalty_costs_nothing(monkeypatch):
    """Without a weight nothing is differentiated in the step; with one it is."""
    calls = []
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or plain(*a, **k))
    for penalty in (0.0, 0.1):
        DomainAdversarialLoss(D, E, gradient_penalty=penalty).double()(FEATURES, DOMAINS)
        assert len(calls) == (penalty > 0)


def test_a_penalty_on_frozen_features():
    criterion = DomainAdversarialLoss(D, E, 0.0, gradient_penalty=0.1).double()
    criterion(FEATURES, DOMAINS).backward()
    assert all(p.grad.abs().sum() > 0 for p in criterion.network[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"n_classes": C, "gradient_penalty": 0.2}])
def test_a_network_in_half_precision(dtype, options):
    torch.manual_seed(0)
    criterion = DomainAdversarialLoss(D, E, 0.7, **options).to(dtype)
    features = FEATURES.to(dtype).requires_grad_()
    loss = criterion(features, DOMAINS, CLASSES)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.dtype for p in criterion.parameters()} == {dtype}
    precise = DomainAdversarialLoss(D, E, 0.7, **options)
    precise.load_state_dict(criterion.state_dict())
    other = features.detach().float().requires_grad_()
    expected = precise(other, DOMAINS, CLASSES)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    torch.testing.assert_close(features.grad.float(), other.grad, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("n_classes", [None, C])
def test_no_gradient_penalty_where_gradients_are_disabled(disabled, n_classes):
    criterion = DomainAdversarialLoss(D, E, n_classes=n_classes, gradient_penalty=0.1).double()
    with disabled():
        found = criterion(FEATURES.clone(), DOMAINS, CLASSES)
    criterion.gradient_penalty = 0.0
    torch.testing.assert_close(found, criterion(FEATURES, DOMAINS, CLASSES).detach(), rtol=1e-12, atol=0)


def test_classes_that_the_loss_ignores_are_left_out():
    criterion = DomainAdversarialLoss(D, E, n_classes=C).double()
    ignored = torch.where(CLASSES == 0, -100, CLASSES)
    kept = CLASSES != 0
    torch.testing.assert_close(
        criterion(FEATURES, DOMAINS, ignored), criterion(FEATURES[kept], DOMAINS[kept], CLASSES[kept])
    )


@pytest.mark.parametrize("gradient_penalty", [0.0, 0.3])
def test_ignored_classes_have_no_part_in_penalty_and_accuracy(gradient_penalty):
    torch.manual_seed(0)
    criterion = DomainAdversarialLoss(D, E, n_classes=C, gradient_penalty=gradient_penalty).double()
    ignored = torch.where(CLASSES == 0, -100, CLASSES)
    kept = (CLASSES != 0) & (DOMAINS >= 0)

    def found(rows, classes):
        features = FEATURES[rows].clone().requires_grad_()
        loss = criterion.objective(criterion.network, features, DOMAINS[rows], targets=classes[rows], log=True)
        (gradient,) = torch.autograd.grad(loss, features)
        return loss.detach(), gradient.abs().sum(), criterion.accuracy

    everywhere = torch.ones(12, dtype=torch.bool)
    torch.testing.assert_close(found(everywhere, ignored), found(kept, CLASSES), rtol=1e-12, atol=0)
    right = criterion.network(FEATURES[kept], CLASSES[kept]).argmax(1) == DOMAINS[kept]
    assert float(criterion.accuracy) == pytest.approx(float(right.double().mean()))
    assert [float(x) for x in found(everywhere, torch.full_like(CLASSES, -100))] == [0, 0, 0]


@pytest.mark.parametrize("options", [{"conditional": True}, {"conditional": True, "gradient_penalty": 0.2}])
def test_uneven_ranks_are_one_process(ranks, options):
    """The labels of each rank are others, so classes are averaged over the global batch."""
    runs = ranks.run(_fit, (5, 11), (2, 5), options)
    assert same(*runs)
    assert deviation(fit(0, "DomainAdversarial", method=options), runs[0]) < 1e-12


def _fit(rank, sizes, last, options):
    return fit(rank, "DomainAdversarial", sizes, last, method=options)


def fitted(callback, model=None, **options):
    model = Classifier() if model is None else model
    trainer = make_trainer([callback], **({"max_epochs": 2} | options))
    trainer.fit(model, loader(), val_loader())
    return trainer


def test_the_ramp_is_the_default():
    trainer = fitted(DomainAdversarial("place", 3, strength=0.5))
    logged = trainer.logged_metrics
    assert float(logged["train/place_adversary/strength"]) == pytest.approx(0.5 * math.tanh(5 * 5 / 6))
    assert 0 <= float(logged["train/place_adversary/accuracy"]) <= 1


class OneLogit(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 1).double()

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1].double()[:, None])


class SoftTargets(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), F.one_hot(batch[1], 2).double())


@pytest.mark.parametrize("module", [Classifier, OneLogit, SoftTargets])
def test_classes_are_read_from_the_loss(module):
    runs = []
    for options in ({}, {"target": 1, "n_classes": 2}):
        callback, model = DomainAdversarial("place", 3, conditional=True, **options), module()
        fitted(callback, model, max_epochs=1, limit_val_batches=0)
        runs.append(parameters(model))
        assert callback.owned["adversary"].module.embedding.num_embeddings == 2
    assert same(*runs)


class FourClasses(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 4).double()


@pytest.mark.parametrize("when", ["before", "in the fit", "after another"])
def test_the_number_of_classes_is_that_of_the_fit(when, tmp_path):
    callback = DomainAdversarial("place", 3, conditional=True)
    model = Classifier()
    fitted(callback, model)
    model.head = FourClasses().head
    with pytest.raises(DebiasError, match=r"2 classes, which .* but got 4\. Make a new instance"):
        fitted(callback, model)
    fitted(callback, FourClasses())  # another module begins with an adversary of its own
    assert callback.module.n_classes == 4

    four = DomainAdversarial("place", 3, conditional=True)
    trainer = fitted(four, FourClasses(), limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    other = DomainAdversarial("place", 3, conditional=True)
    if when == "after another":
        fitted(other)
    if when == "before":
        other.load_state_dict(four.state_dict())
        fitted(other, FourClasses())
    else:
        trainer = make_trainer([other], max_epochs=3)
        trainer.fit(FourClasses(), loader(), val_loader(), ckpt_path=tmp_path / "four.ckpt")
    assert other.module.n_classes == other.owned["adversary"].module.embedding.num_embeddings == 4


class Turned(Classifier):
    """The samples change places between the features and the loss, whose mean is the same."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.backbone(x)
        return F.cross_entropy(self.head(features.flip(0)), y.flip(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"features": "backbone"},
        {"conditional": True},
        {"conditional": True, "features": "backbone", "target": 1},
    ],
)
def test_samples_that_change_places_behind_the_features(options):
    runs = []
    for model in (Turned(), Classifier()):
        fitted(DomainAdversarial("place", 3, **options), model)
        runs.append(parameters(model))
    assert deviation(*runs) < 1e-10


def test_classes_of_a_batch_that_an_augmenter_has_doubled():
    runs = []
    for options in ({}, {"features": "backbone"}):
        model = Classifier()
        make_trainer([EdgeView(), DomainAdversarial("place", 3, conditional=True, **options)]).fit(
            model, loader(), val_loader()
        )
        runs.append(parameters(model))
    assert same(*runs)


def test_classes_of_other_rows_than_the_features():
    with pytest.raises(RowsError, match=r"`target` to be given with `conditional=True`.*`target='label'`"):
        fitted(DomainAdversarial("place", 3, conditional=True, features="backbone"), Turned())


class Regression(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 2).double())


class SeveralLabels(Classifier):
    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), F.one_hot(batch[1], 2).double())


def test_conditional_without_classes():
    with pytest.raises(DebiasError, match=r"one class for each of the 16 rows.*\(16, 2\).*target='label'"):
        fitted(DomainAdversarial("place", 3, conditional=True), SeveralLabels())
    fitted(DomainAdversarial("place", 3, conditional=True, target=1, n_classes=2), Regression())
    with pytest.raises(DebiasError, match="`targets` with `n_classes`, but got None"):
        DomainAdversarialLoss(D, E, n_classes=2)(FEATURES.float(), DOMAINS)


def test_no_domain_in_a_whole_epoch():
    with pytest.raises(BadRowsError, match=r"known domain \(an id >= 0\), but a whole epoch had none"):
        make_trainer([DomainAdversarial("place", 3)]).fit(
            Classifier(), loader(place=torch.full((39,), -1)), val_loader()
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_domains": 0}, "`n_domains` to be an integer >= 1"),
        ({"discriminator": "big"}, "`discriminator` to be 'mlp', 'linear'"),
        ({"gradient_penalty": -0.1}, "`gradient_penalty` to be a number >= 0"),
        ({"gradient_penalty": True}, "`gradient_penalty` to be a number >= 0, but got True"),
        ({"gradient_penalty": "x"}, "`gradient_penalty` to be a number >= 0, but got 'x'"),
        ({"conditional": True, "n_classes": 0}, "`n_classes` to be an integer >= 1"),
        ({"strength": True}, "`strength`"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(DebiasError, match=match):
        DomainAdversarial(**({"domain": "place", "n_domains": 3} | options))


def test_numbers_of_numpy_are_numbers():
    criterion = DomainAdversarialLoss(D, E, np.float32(0.5), gradient_penalty=np.float32(0.25))
    assert [(type(x), x) for x in (criterion.strength, criterion.gradient_penalty)] == [(float, 0.5), (float, 0.25)]


def test_mixin_is_the_callback_with_a_discriminator_in_the_module():
    def start():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(6, 3).double()

    class Mixed(DomainAdversarialMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.configure_domain_adversarial(6, 3, strength=0.7, discriminator=start())
            self.double()

        def training_step(self, batch, batch_idx):
            x, y, place = batch
            features = self.backbone(x)
            return F.cross_entropy(self.head(features), y) + self.domain_adversarial_loss(features, place)

    x, y = problem(39).tensors
    mixed, plain = Mixed(), Classifier()
    places = loader().dataset.tags["place"]
    make_trainer().fit(mixed, DataLoader(TensorDataset(x, y, places), batch_size=16), val_loader(bare=True))
    callback = DomainAdversarial("place", 3, strength=0.7, schedule="constant", discriminator=start())
    fitted(callback, plain, max_epochs=1)
    state = parameters(mixed)
    assert deviation(parameters(plain), {k: v for k, v in state.items() if "adversarial" not in k}) < 1e-12
    assert (
        deviation(parameters(callback.owned["adversary"].module), parameters(mixed.domain_adversarial.network)) < 1e-12
    )
