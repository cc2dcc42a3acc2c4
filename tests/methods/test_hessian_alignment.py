"""Hessian alignment against Hessians made by double differentiation, and through a Trainer."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from _support import head_oracle as oracle
from _support.fits import Classifier, loader, make_trainer, parameters, problem, train, val_loader
from debias import (
    CORAL,
    IRM,
    MMD,
    Fishr,
    GroupDRO,
    GroupMixup,
    HessianAlignment,
    HessianAlignmentMixin,
    HessianAlignmentPenalty,
    VREx,
)
from debias.errors import BadRowsError, DebiasError, HeadNotFoundError, RowsError
from debias.functional import hessian_alignment_penalty
from debias.ops.head_statistics import HeadStatistics

EXACT = 1e-10
STATISTICS = ("hgp", "diagonal", "frobenius")


def ours(p: oracle.Problem, **options) -> torch.Tensor:
    return hessian_alignment_penalty(
        p.features, p.logits, p.targets, p.domains, p.n_domains, loss=p.loss, head_bias=p.bias is not None, alpha=0.7,
        beta=0.3, **options, **p.options,
    )  # fmt: skip


@pytest.fixture(params=[True, False], ids=["pairs", "sums"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the distances, whatever would be cheaper."""
    monkeypatch.setattr(HeadStatistics, "by_pairs", lambda self, cheaper: request.param)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("kind", oracle.LOSSES)
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("bias", "detach"), [(True, True), (False, False), (True, False)])
def test_penalty_equals_double_differentiation(kind: str, statistic: str, bias: bool, detach: bool) -> None:
    p = oracle.problem(kind, bias=bias)
    mine = ours(p, statistic=statistic, detach_target=detach)
    theirs = oracle.alignment(p, statistic, 0.7, 0.3, detach=detach)
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, p.leaves), oracle.gradients(theirs, p.leaves)) < EXACT


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("statistic", STATISTICS)
def test_scale_free_and_sum(statistic: str) -> None:
    p = oracle.problem()
    mine = ours(p, statistic=statistic, scale_free=True, reduction="sum")
    theirs = oracle.alignment(p, statistic, 0.7, 0.3, detach=True, scale_free=True, mean=False)
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, p.leaves), oracle.gradients(theirs, p.leaves)) < EXACT


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("statistic", [*STATISTICS, "hutchinson"])
def test_relative_distances_are_bounded_where_gradients_cancel(statistic: str) -> None:
    """Two domains whose gradients are nearly opposite, as late in training: their mean is no scale to divide by."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    features = torch.cat((half, half + 1e-3 * noise)).requires_grad_()
    logits, targets = features @ torch.zeros(3, 2, dtype=torch.float64), torch.arange(20) % 2
    targets[10:] = 1 - targets[10:]

    def penalty(**weights: float) -> float:
        value = hessian_alignment_penalty(
            features, logits, targets, torch.arange(20) // 10, 2, statistic=statistic, scale_free=True, n_samples=3,
            generator=torch.Generator().manual_seed(0), **weights,
        )  # fmt: skip
        return float(value.detach())

    assert 0.9 < penalty(alpha=0.0, beta=1.0) < 1 + 1e-12
    assert penalty(alpha=1.0, beta=0.0) <= 4


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("statistic", STATISTICS)
def test_relative_distances_of_vanishing_statistics_are_finite(statistic: str) -> None:
    """In single precision, where the residuals of a loss near 0 have squares that underflow, at one size or another."""
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    targets, domains = torch.arange(8) % 2, torch.arange(8) // 4
    for margin in range(2, 100, 2):
        logits = (margin * F.one_hot(targets, 2) + 0.1 * features[:, :2]).requires_grad_()
        value = hessian_alignment_penalty(
            features, logits, targets, domains, 2, statistic=statistic, scale_free=True, alpha=10.0, beta=10.0
        )
        (gradient,) = torch.autograd.grad(value, logits)
        assert 0 <= value <= 50
        assert gradient.abs().max() < 1e4


@pytest.mark.parametrize(("statistic", "power"), [("hgp", 6), ("diagonal", 4), ("frobenius", 4), (None, 2)])
def test_how_the_penalty_grows_with_the_features(statistic: str | None, power: int) -> None:
    """At fixed predictions: features times s, weights over s. A bias does not scale, so there is none."""
    p = oracle.problem(bias=False)
    options = {"statistic": statistic or "hgp", "alpha": float(statistic is not None), "beta": float(statistic is None)}

    def penalty(scale: float, scale_free: bool) -> float:
        f, w = p.features * scale, p.weight / scale
        value = hessian_alignment_penalty(
            f, f @ w.T, p.targets, p.domains, p.n_domains, head_bias=False, scale_free=scale_free, **options
        )
        return float(value.detach())

    assert penalty(3.0, False) / penalty(1.0, False) == pytest.approx(3.0**power, rel=1e-9)
    assert penalty(3.0, True) == pytest.approx(penalty(1.0, True), rel=1e-9)


def test_hutchinson_converges_to_the_diagonal_and_the_known_noise() -> None:
    """E|q_e - q|^2 = |diag H_e - diag H|^2 + (off-diagonal mass of H_e and H) / m."""
    p = oracle.problem(sizes=(6, 5, 4))
    hessians = torch.stack([oracle.hessian(p, loss) for loss in oracle.domain_losses(p)]).detach()
    mean = hessians.mean(0)

    def off(h: torch.Tensor) -> torch.Tensor:
        return h.square().sum() - h.diagonal().square().sum()

    m, repeats = 4, 3000
    exact = torch.stack([(h.diagonal() - mean.diagonal()).square().sum() for h in hessians])
    noise = torch.stack([off(h) + off(mean) for h in hessians]) / m
    expected = float((exact + noise).mean())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack(
            [
                hessian_alignment_penalty(
                    p.features, p.logits, p.targets, p.domains, p.n_domains, statistic="hutchinson", alpha=1.0,
                    beta=0.0, n_samples=m, generator=generator,
                )
                for _ in range(repeats)
            ]
        )  # fmt: skip
    error = float(draws.std()) / math.sqrt(repeats)
    assert abs(float(draws.mean()) - expected) < 4 * error
    assert noise.mean() > 20 * error  # so that the noise term would be missed


def test_hutchinson_differentiates_what_it_drew() -> None:
    """With the same vectors: its gradient equals that of z * (H z) by double differentiation."""
    p = oracle.problem(sizes=(4, 5))
    mine = hessian_alignment_penalty(
        p.features, p.logits, p.targets, p.domains, 2, statistic="hutchinson", alpha=1.0, beta=0.0, n_samples=2,
        detach_target=False, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    losses = oracle.domain_losses(p)
    hessians = [*(oracle.hessian(p, x) for x in losses), oracle.hessian(p, torch.stack(losses).mean())]
    estimates = []
    for _ in range(2):
        z = (2 * torch.randint(0, 2, (3, 4, 4), generator=generator) - 1).double()
        flat = torch.cat((z[..., :3].flatten(1), z[..., 3:].flatten(1)), 1)
        estimates.append(torch.stack([v * (h @ v) for v, h in zip(flat, hessians, strict=True)]))
    q = torch.stack(estimates).mean(0)
    theirs = (q[:2] - q[2]).square().sum() / 2
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, p.leaves), oracle.gradients(theirs, p.leaves)) < EXACT


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("statistic", STATISTICS)
def test_gradcheck(statistic: str) -> None:
    p = oracle.problem(sizes=(2, 3))

    def penalty(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = F.linear(features, weight, bias)
        return hessian_alignment_penalty(
            features, logits, p.targets, p.domains, 2, statistic=statistic, alpha=1.0, beta=1.0, detach_target=False
        )

    assert torch.autograd.gradcheck(penalty, p.leaves)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("statistic", [*STATISTICS, "hutchinson"])
@pytest.mark.parametrize("sizes", [(3, 0, 0), (1, 1, 0), (0, 0, 0)], ids=["one domain", "one sample each", "none"])
@pytest.mark.parametrize("scale_free", [False, True])
def test_finite_where_domains_are_missing(statistic: str, sizes: tuple[int, ...], scale_free: bool) -> None:
    p = oracle.problem(sizes=sizes)
    mine = ours(p, statistic=statistic, scale_free=scale_free, n_samples=3)
    grads = oracle.gradients(mine, p.leaves)
    assert mine.isfinite()
    assert all(g.isfinite().all() for g in grads)
    if statistic != "hutchinson" and sizes != (1, 1, 0):
        assert mine.abs() < 1e-20


def test_finite_where_gradients_are_zero() -> None:
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.full((4, 2), 0.5, dtype=torch.float64)  # the prediction is the target: every residual is 0
    for scale_free in (False, True):
        value = hessian_alignment_penalty(
            features,
            features @ weight,
            targets,
            torch.tensor([0, 0, 1, 1]),
            2,
            alpha=1.0,
            beta=1.0,
            scale_free=scale_free,
        )
        (grad,) = torch.autograd.grad(value, features)
        assert value == 0
        assert grad.eq(0).all()


# -- through a Trainer ---------------------------------------------------------------------------------


def fit(module: L.LightningModule, method, **options) -> L.Trainer:
    return train(module, [method], **options)


def by_hand(steps: int, statistic: str, **options) -> dict[str, torch.Tensor]:
    """Classifier trained by a plain loop on the mean loss and the oracle's penalty."""
    model = Classifier()
    optimizer = model.configure_optimizers()
    for (x, y), tags in [(b.batch, b.tags) for b in loader()][:steps]:
        features = model.backbone(x)
        head = model.head
        p = oracle.Problem("cross_entropy", features, head.weight, head.bias, y, tags["place"], 3)
        loss = F.cross_entropy(model(x), y) + oracle.alignment(p, statistic, 1.0, 1.0, detach=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_callback_is_the_paper_on_an_unmodified_module(statistic: str) -> None:
    model = Classifier()
    fit(model, HessianAlignment("place", 3, statistic=statistic, alpha=1.0, beta=1.0))
    theirs = by_hand(3, statistic)
    plain = Classifier()
    fit(plain, HessianAlignment("place", 3, penalty_weight=0.0))
    for name, value in parameters(model).items():
        assert torch.allclose(value, theirs[name], rtol=1e-11, atol=1e-13), name
        assert not torch.allclose(value, parameters(plain)[name], rtol=1e-6)


def test_autograd_derivatives_equal_closed_forms_and_take_any_head() -> None:
    results = []
    for derivatives in ("closed_form", "autograd"):
        model = Classifier()
        fit(model, HessianAlignment("place", 3, alpha=1.0, beta=1.0, derivatives=derivatives))
        results.append(parameters(model))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-11, atol=1e-13), name

    deep = Classifier()
    deep.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    fit(deep, HessianAlignment("place", 3, alpha=1.0, beta=1.0, derivatives="autograd", head="head"))
    with pytest.raises(HeadNotFoundError, match=r"linear head .* Sequential.*derivatives='autograd'"):
        fit(deep, HessianAlignment("place", 3, head="head"))


def test_mixin_and_module_equal_the_callback() -> None:
    class Model(HessianAlignmentMixin, Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.configure_hessian_alignment(n_domains=3, alpha=1.0, beta=1.0, penalty_weight=2.0, start_step=1)

        def training_step(self, batch, batch_idx):
            x, y, domains = batch
            features = self.backbone(x)
            logits = self.head(features)
            return F.cross_entropy(logits, y) + self.hessian_alignment_penalty(features, logits, y, domains)

    mine = Model()
    batches = [(*b.batch, b.tags["place"]) for b in loader()]
    make_trainer().fit(mine, DataLoader(batches, batch_size=None), val_loader(bare=True))
    theirs = Classifier()
    fit(theirs, HessianAlignment("place", 3, alpha=1.0, beta=1.0, penalty_weight=2.0, start_step=1))
    for name, value in parameters(theirs).items():
        assert torch.allclose(value, mine.state_dict()[name], rtol=1e-12), name


def test_protocol_of_irm_divides_the_loss_and_resets_the_optimiser() -> None:
    """Weight 1 for two steps, then 5 with the whole loss over 5 and Adam as new; against a plain loop."""

    class Model(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.1 * self.head.weight.square().sum()

    method = HessianAlignment(
        "place", 3, alpha=1.0, beta=1.0, penalty_weight=5.0, weight_before=1.0, start_step=2, divide_loss=True,
        reset_optimizer=True,
    )  # fmt: skip
    model = Model(optimizer="adam")
    fit(model, method, max_epochs=2)

    mine = Model(optimizer="adam")
    optimizer = mine.configure_optimizers()
    for step, batch in enumerate([*loader(), *loader()]):
        (x, y), domains = batch.batch, batch.tags["place"]
        p = oracle.Problem("cross_entropy", mine.backbone(x), mine.head.weight, mine.head.bias, y, domains, 3)
        weight = 5.0 if step >= 2 else 1.0
        loss = F.cross_entropy(mine(x), y) + 0.1 * mine.head.weight.square().sum()
        loss = (loss + weight * oracle.alignment(p, "hgp", 1.0, 1.0, detach=True)) / weight
        if step == 2:
            optimizer = mine.configure_optimizers()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in parameters(model).items():
        assert torch.allclose(value, mine.state_dict()[name], rtol=1e-9, atol=1e-12), name


def test_logs_penalty_and_weight() -> None:
    logged: list[dict] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            logged.append({k: float(v) for k, v in trainer.logged_metrics.items()})

    trainer = make_trainer([HessianAlignment("place", 3, start_step=1, ramp_steps=2, penalty_weight=4.0), Keep()])
    trainer.fit(Classifier(), loader(), val_loader())
    assert [entry.get("train/hessian_alignment_penalty_weight") for entry in logged] == [None, None, 2.0]
    assert logged[-1]["train/hessian_alignment_penalty"] > 0


def test_says_so_where_it_changes_nothing() -> None:
    class Detached(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.head(self.backbone(x).detach())
            return F.cross_entropy(logits, y)

    with pytest.warns(UserWarning, match=r"CORAL\(place\) reaches no trainable parameter.*frozen or detached") as seen:
        fit(Detached(), CORAL("place", 3), max_epochs=2)
    assert sum("reaches no trainable" in str(w.message) for w in seen) == 1


def test_logits_that_are_not_the_heads_are_refused() -> None:
    class Tempered(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x) / 2, y)

    with pytest.raises(HeadNotFoundError, match="linear layer"):
        fit(Tempered(), HessianAlignment("place", 3))
    for derivatives in ("closed_form", "autograd"):
        with pytest.raises(HeadNotFoundError, match=r"what the head Linear makes of its input.*differ"):
            fit(Tempered(), HessianAlignment("place", 3, head="head", derivatives=derivatives))


class TwoHeads(Classifier):
    """Two losses, each of a head with features of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.other_backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
            self.other_head = nn.Linear(6, 2, bias=False).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) + F.cross_entropy(self.other_head(self.other_backbone(x)), 1 - y)


@pytest.mark.parametrize("one", [True, False])
def test_two_heads_each_with_its_features(one: bool) -> None:
    """The heads share nothing, so each trains as it would alone; no step logs, so nothing but the first is checked."""
    options = {"alpha": 1.0, "beta": 1.0}
    methods = [HessianAlignment("place", 3, loss="sum", **options)]
    if not one:
        methods = [HessianAlignment("place", 3, loss=i, name=str(i), **options) for i in range(2)]
    both = TwoHeads()
    make_trainer(methods, max_epochs=2, log_every_n_steps=100).fit(both, loader(), val_loader())
    alone = Classifier()
    fit(alone, HessianAlignment("place", 3, **options), max_epochs=2)
    for name, value in parameters(alone).items():
        assert torch.allclose(value, both.state_dict()[name], rtol=1e-11, atol=1e-13), name


def test_a_head_that_one_penalty_names_and_another_finds() -> None:
    """Differentiating a head runs it again, which is no step of the user's."""
    methods = [
        HessianAlignment("place", 3, derivatives="autograd", head="head"),
        Fishr("place", 3),
        HessianAlignment("place", 3, name="again"),
    ]
    make_trainer(methods, max_epochs=2).fit(Classifier(), loader(), val_loader())


class Normalised(Classifier):
    """A head that is not a function of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("method", [HessianAlignment, Fishr])
def test_batch_norm_in_a_head_is_refused_and_left_alone(method: type) -> None:
    model = Normalised()
    with pytest.raises(HeadNotFoundError, match="Sequential with a BatchNorm1d in training mode"):
        fit(model, method("place", 3, derivatives="autograd", head="head"))
    assert model.head[1].num_batches_tracked == 1  # by the user's own step
    fit(model, method("place", 3, derivatives="autograd", head="head.2"))


@pytest.mark.parametrize("method", [HessianAlignment, Fishr])
def test_half_precision_heads_are_differentiated_in_single_precision(method: type) -> None:
    logged = {}
    for derivatives in ("closed_form", "autograd"):
        model = Classifier().bfloat16()
        batches = loader(16)
        batches.dataset.dataset.tensors = (batches.dataset.dataset.tensors[0].bfloat16(), *problem(16).tensors[1:])
        penalty = method("place", 3, derivatives=derivatives)
        trainer = make_trainer([penalty], precision="bf16-true", limit_val_batches=0)
        trainer.fit(model, batches, val_loader())
        value = trainer.callback_metrics[f"train/{method.key}_penalty"]
        assert value.dtype == torch.float32
        logged[derivatives] = float(value)
    assert logged["autograd"] == pytest.approx(logged["closed_form"], rel=0.02)


def test_the_check_of_a_head_leaves_its_spectral_norm_as_it_is() -> None:
    class Spectral(Classifier):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.head = nn.utils.parametrizations.spectral_norm(self.head)

    watched, plain = Spectral(), Spectral()
    fit(watched, HessianAlignment("place", 3, alpha=0.0, beta=1e-30, head="head"))
    train(plain, [], bare=True)
    for name, value in parameters(plain).items():
        assert torch.allclose(value, watched.state_dict()[name], rtol=1e-12), name


def test_instances_of_a_class_log_under_their_names() -> None:
    methods = [HessianAlignment("place", 3, name="a"), HessianAlignment("place", 3, name="b", statistic="diagonal")]
    trainer = make_trainer([*methods, VREx("place", 3)])
    trainer.fit(Classifier(), loader(), val_loader())
    logged = {name for name in trainer.callback_metrics if "penalty" in name}
    key = "train/hessian_alignment_penalty"
    assert logged == {f"{key}/a", f"{key}/b", "train/vrex_penalty"}
    assert trainer.callback_metrics[f"{key}/a"] != trainer.callback_metrics[f"{key}/b"]


def _drawn(rank: int) -> torch.Tensor:
    torch.manual_seed(rank)
    p = oracle.problem(sizes=(6, 5))
    rows = slice(0, 4) if rank == 0 else slice(4, None)
    return hessian_alignment_penalty(
        p.features[rows], p.logits[rows], p.targets[rows], p.domains[rows], 2, statistic="hutchinson", n_samples=2,
        alpha=1.0, beta=0.0,
    ).detach()  # fmt: skip


def test_ranks_share_the_vectors_that_the_process_draws(ranks) -> None:
    first, second = ranks.run(_drawn)
    torch.manual_seed(0)
    p = oracle.problem(sizes=(6, 5))
    whole = hessian_alignment_penalty(
        p.features, p.logits, p.targets, p.domains, 2, statistic="hutchinson", n_samples=2, alpha=1.0, beta=0.0
    )
    assert first == second
    assert torch.allclose(first, whole.detach(), rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_unreduced_losses_with_a_mask(masked: bool) -> None:
    """``reduction="none"`` and a mask: the rows of the mask are those of the domains' means."""

    class Masked(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            mask = (x[:, 1] > -0.5).double() if masked else torch.ones(len(x)).double()
            return (F.cross_entropy(self(x), y, reduction="none") * mask).sum() / mask.sum()

    model = Masked()
    fit(model, HessianAlignment("place", 3, alpha=1.0, beta=1.0))
    mine = Classifier()
    optimizer = mine.configure_optimizers()
    for batch in loader():
        (x, y), domains = batch.batch, batch.tags["place"]
        keep = (x[:, 1] > -0.5) if masked else torch.ones(len(x), dtype=torch.bool)
        x, y, domains = x[keep], y[keep], domains[keep]
        p = oracle.Problem("cross_entropy", mine.backbone(x), mine.head.weight, mine.head.bias, y, domains, 3)
        optimizer.zero_grad()
        (F.cross_entropy(mine(x), y) + oracle.alignment(p, "hgp", 1.0, 1.0, detach=True)).backward()
        optimizer.step()
    for name, value in parameters(model).items():
        assert torch.allclose(value, mine.state_dict()[name], rtol=1e-11, atol=1e-13), name


class Turned(Classifier):
    """Unreduced losses, reduced in another order than that of the logits."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y, reduction="none").view(-1).flip(0).mean()


@pytest.mark.parametrize("method", [HessianAlignment, Fishr, IRM])
def test_unreduced_losses_in_another_order_than_the_logits_are_refused(method: type) -> None:
    with pytest.raises(RowsError, match=r"of the logits \(16, 2\), row by row.*rows in another order"):
        fit(Turned(), method("place", 3))


def test_unreduced_losses_in_another_order_are_the_same_losses() -> None:
    turned, plain = Turned(), Classifier()
    for model in (turned, plain):
        fit(model, VREx("place", 3))
    for name, value in parameters(plain).items():
        assert torch.allclose(value, turned.state_dict()[name], rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_domains": 1}, "`n_domains` to be at least 2"),
        ({"statistic": "trace"}, "`statistic` to be 'hgp', 'diagonal', 'hutchinson' or 'frobenius'"),
        ({"alpha": -1.0}, "`alpha` to be a number >= 0"),
        ({"beta": float("nan")}, "`beta`"),
        ({"penalty_weight": -1.0}, "`penalty_weight` to be a number >= 0"),
        ({"weight_before": float("inf")}, "`weight_before`"),
        ({"start_step": -1}, "`start_step` to be a number of optimiser steps"),
        ({"ramp_steps": 1.5}, "`ramp_steps`"),
        ({"n_samples": 0}, "`n_samples`"),
        ({"reduction": "max"}, "`reduction`"),
        ({"derivatives": "numeric"}, "`derivatives`"),
        ({"derivatives": "autograd", "statistic": "diagonal"}, "'hgp' or 'hutchinson'"),
        ({"domain": ("a", "b")}, "`n_domains` to hold one number for each key"),
    ],
)
def test_wrong_arguments(options: dict, match: str) -> None:
    with pytest.raises(DebiasError, match=match):
        HessianAlignment(**({"domain": "place", "n_domains": 3} | options))


def test_wrong_batches_are_refused() -> None:
    poisoned = loader()
    poisoned.dataset.dataset.tensors[0][3] = torch.nan
    with pytest.raises(BadRowsError, match=r"finite losses, but 1 rows.*HessianAlignment\(place\) at optimiser step 0"):
        make_trainer([HessianAlignment("place", 3)]).fit(Classifier(), poisoned, val_loader())
    with pytest.raises(BadRowsError, match="domain ids below `n_domains=2`"):
        fit(Classifier(), HessianAlignment("place", 2))

    class Absolute(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.l1_loss(self(x), F.one_hot(y, 2).double())

    with pytest.raises(DebiasError, match=r"whose derivatives.*'l1_loss'"):
        fit(Absolute(), HessianAlignment("place", 3))
    module = HessianAlignmentPenalty(2, start_step=3)
    features = torch.randn(4, 3)
    with pytest.raises(DebiasError, match="`step`, the optimiser steps"):
        module(features, features[:, :2], torch.zeros(4).long(), torch.arange(4) % 2)


def test_mixed_samples_of_one_domain_are_samples_with_soft_labels() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(HessianAlignment):
        def penalty(self, call, domains, step):
            value = super().penalty(call, domains, step)
            n = len(domains)
            soft = (call.record.scale[:, None] * F.one_hot(call.record.targets, 2)).view(call.parts, n, 2).sum(0)
            assert call.parts == 2
            assert ((soft > 0) & (soft < 1)).any()  # labels were mixed
            head = call.head
            p = oracle.Problem("cross_entropy", call.features, head.weight, head.bias, soft, domains, 3)
            seen.append((value, oracle.alignment(p, "hgp", 1.0, 1.0, detach=True)))
            return value

    mixup = GroupMixup("place", 3, pairs="same_domain")
    make_trainer([mixup, Watched("place", 3, alpha=1.0, beta=1.0)]).fit(Classifier(), loader(32), val_loader())
    assert len(seen) == 2
    assert all(torch.allclose(mine, theirs, rtol=1e-11) for mine, theirs in seen)


@pytest.mark.parametrize("method", [VREx, IRM, Fishr, CORAL, MMD, HessianAlignment])
def test_penalties_combine_with_mixing_across_domains_and_group_dro(method: type) -> None:
    callbacks = [
        GroupMixup("place", 3, pairs="same_label"), GroupDRO("place", 3), method("place", 3, penalty_weight=0.1),
    ]  # fmt: skip
    model = Classifier()
    make_trainer(callbacks, max_epochs=2).fit(model, loader(), val_loader())
    assert all(value.isfinite().all() for value in parameters(model).values())
