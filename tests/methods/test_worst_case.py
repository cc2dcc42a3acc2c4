"""CVaR and chi-square DRO: worked examples, bisection as the authors do it, and a linear program's optimum."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from _support.fits import Classifier, deviation, loader, make_trainer, parameters, problem, train, val_loader
from debias import ChiSquareDRO, ChiSquareDROMixin, CVaRDRO, CVaRDROMixin, CVaRLoss
from debias.errors import BadRowsError, DebiasError
from debias.functional import chi_square_weights, cvar_weights

V = torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1], dtype=torch.float64)
LOSSES = st.lists(st.floats(0, 20), min_size=1, max_size=12)


def near(values, digits=1e-6):
    return pytest.approx(values, abs=digits)


def test_worked_examples():
    p = cvar_weights(V, alpha=0.3)
    assert p.tolist() == near([0, 1 / 3, 0, 2 / 3, 0])
    assert (p @ V).item() == near(1.66667, 1e-5)
    assert cvar_weights(V, alpha=0.5, temperature=0.2).tolist() == near([0.03285, 0.4, 0.147225, 0.4, 0.019925])
    p = chi_square_weights(V, radius=0.1)
    assert (p @ V).item() == near(1.070612)
    assert (p @ V).item() == near((V.mean() + math.sqrt(0.2) * V.std(correction=0)).item(), 1e-12)
    p = chi_square_weights(V, radius=1.0)
    assert p.tolist() == near([0, 0.253651, 0.014606, 0.731743, 0])
    assert (p @ V).item() == near(1.724440)
    p = chi_square_weights(V, penalty=0.5)
    assert p.tolist() == near([0, 0.266667, 0.066667, 0.666667, 0])
    assert (p @ V - 0.25 * ((5 * p - 1) ** 2).mean()).item() == near(1.233333)


def bisect(f, low, high):
    """A zero of a decreasing function."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2


def oracle_kl(v, b, alpha, temperature):
    def p(eta):
        return [x * min(math.exp(min((a - eta) / temperature, 700)), 1 / alpha) for a, x in zip(v, b, strict=True)]

    spread = 800 * temperature + max(v) - min(v) + 1
    return p(bisect(lambda eta: sum(p(eta)) - 1, min(v) - spread, max(v) + spread))


def oracle_ball(v, b, radius):
    top = max(v)
    mass = sum(x for a, x in zip(v, b, strict=True) if a == top)
    if mass * (1 + 2 * radius) >= 1:
        return [x / mass if a == top else 0.0 for a, x in zip(v, b, strict=True)]

    def divergence(eta):
        raw = [x * max(a - eta, 0) for a, x in zip(v, b, strict=True)]
        total = sum(raw)
        return sum((r / total) ** 2 / x for r, x in zip(raw, b, strict=True) if x) - (1 + 2 * radius)

    eta = bisect(lambda eta: -divergence(eta), min(v) - (top - min(v)) * 1e4, top - (top - min(v)) * 1e-12)
    raw = [x * max(a - eta, 0) for a, x in zip(v, b, strict=True)]
    return [r / sum(raw) for r in raw]


def oracle_penalty(v, b, penalty):
    def p(eta):
        return [x * max(a - eta, 0) / penalty for a, x in zip(v, b, strict=True)]

    return p(bisect(lambda eta: sum(p(eta)) - 1, min(v) - penalty - 1, max(v)))


def shared(v, seed):
    b = torch.rand(len(v), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    return b / b.sum()


@settings(deadline=None, max_examples=100)
@given(LOSSES, st.floats(0.02, 1), st.floats(0.05, 2), st.integers(0, 999))
def test_against_bisection(values, alpha, strength, seed):
    v = torch.tensor(values, dtype=torch.float64)
    for b in (torch.full_like(v, 1 / len(v)), shared(v, seed)):
        args = v.tolist(), b.tolist()
        found = {
            "kl": (cvar_weights(v, alpha=alpha, temperature=strength, shares=b), oracle_kl(*args, alpha, strength)),
            "ball": (chi_square_weights(v, radius=strength, shares=b), oracle_ball(*args, strength)),
            "penalty": (chi_square_weights(v, penalty=strength, shares=b), oracle_penalty(*args, strength)),
        }
        for name, (p, expected) in found.items():
            assert p.sum().item() == pytest.approx(1, rel=1e-12), name
            value = sum(x * y for x, y in zip(expected, v.tolist(), strict=True))
            # Losses that differ by rounding alone leave the weights between them open, not the value.
            assert (p @ v).item() == pytest.approx(value, rel=1e-7, abs=1e-9), name
            if min((abs(x - y) for x in values for y in values if x != y), default=1) > 1e-3:
                assert p.tolist() == pytest.approx(expected, abs=1e-6), name


@settings(deadline=None, max_examples=100)
@given(LOSSES, st.floats(0.02, 1))
def test_cvar_is_the_best_vertex(values, alpha):
    """The optimum of a linear program, found greedily in a loop."""
    v, left, expected = sorted(values, reverse=True), 1.0, 0.0
    for x in v:
        part = min(left, 1 / (alpha * len(v)))
        expected, left = expected + part * x, left - part
    found = cvar_weights(torch.tensor(values, dtype=torch.float64), alpha=alpha)
    assert (found @ torch.tensor(values, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_ends_of_every_set():
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(cvar_weights(V, alpha=1.0), uniform)
    torch.testing.assert_close(cvar_weights(V, alpha=1.0, temperature=0.3), uniform)
    torch.testing.assert_close(chi_square_weights(V, penalty=1e9), uniform, atol=1e-8, rtol=0)
    torch.testing.assert_close(chi_square_weights(V, radius=1e-18), uniform, atol=1e-7, rtol=0)
    worst = torch.tensor([0.0, 0, 0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(cvar_weights(V, alpha=0.01), worst)
    torch.testing.assert_close(chi_square_weights(V, radius=2.0), worst)
    torch.testing.assert_close(chi_square_weights(V, penalty=1e-9), worst)


@pytest.mark.parametrize("n", [1, 4])
def test_equal_losses_are_plain_training(n):
    for value in (0.0, 3.0):
        v = torch.full((n,), value)
        for p in (
            cvar_weights(v, alpha=0.5),
            cvar_weights(v, alpha=0.5, temperature=0.1),
            chi_square_weights(v, radius=1.0),
            chi_square_weights(v, penalty=0.5),
        ):
            torch.testing.assert_close(p, torch.full((n,), 1 / n))


def test_what_has_no_share_has_no_weight_whatever_its_loss():
    b = torch.tensor([0.25, 0.25, 0, 0.25, 0.25], dtype=torch.float64)
    v = torch.tensor([0.2, 1.0, 99.0, 2.0, 0.1], dtype=torch.float64)
    kept = [0, 1, 3, 4]
    for weights in (
        lambda v, b: cvar_weights(v, alpha=0.3, shares=b),
        lambda v, b: cvar_weights(v, alpha=0.5, temperature=0.2, shares=b),
        lambda v, b: chi_square_weights(v, radius=1.0, shares=b),
        lambda v, b: chi_square_weights(v, penalty=0.5, shares=b),
    ):
        p = weights(v, b)
        assert p[2] == 0
        torch.testing.assert_close(p[kept], weights(v[kept], b[kept]))


# -- modules and callbacks -------------------------------------------------------------------------


class Weighed(Classifier):
    """Class weights and an ignored class: shares of the batch differ."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        y = torch.where(torch.arange(len(y)) == 1, -1, y)
        weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
        return F.cross_entropy(self(x), y, weight=weight, ignore_index=-1)


METHODS = {
    "cvar": (lambda: CVaRDRO(0.3), lambda v, b: cvar_weights(v, alpha=0.3, shares=b)),
    "smoothed": (
        lambda: CVaRDRO(0.3, temperature=0.2),
        lambda v, b: cvar_weights(v, alpha=0.3, temperature=0.2, shares=b),
    ),
    "ball": (lambda: ChiSquareDRO(0.5), lambda v, b: chi_square_weights(v, radius=0.5, shares=b)),
    "penalty": (lambda: ChiSquareDRO(penalty=0.3), lambda v, b: chi_square_weights(v, penalty=0.3, shares=b)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_callback_against_a_loop(name):
    make, weights = METHODS[name]
    own, watched, data = Classifier(), Weighed(), problem()
    optimizer = own.configure_optimizers()
    for _ in range(3):
        for start in range(0, 39, 16):
            x, y = data[list(range(start, min(start + 16, 39)))]
            losses = F.cross_entropy(own(x), y, reduction="none")
            b = torch.where(y == 1, 3.0, 1.0).double()
            b[1] = 0
            optimizer.zero_grad()
            (weights(losses.detach(), b / b.sum()) * losses).sum().backward()
            optimizer.step()
    train(watched, [make()], max_epochs=3)
    assert deviation(parameters(own), parameters(watched)) < 1e-12


class Worst(CVaRDROMixin, Classifier):
    def __init__(self):
        super().__init__()
        self.configure_cvar_dro(alpha=0.3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.cvar_dro_loss(F.cross_entropy(self(x), y, reduction="none"))


class Ball(ChiSquareDROMixin, Classifier):
    def __init__(self):
        super().__init__()
        self.configure_chi_square_dro(radius=0.5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.chi_square_dro_loss(F.cross_entropy(self(x), y, reduction="none"))


@pytest.mark.parametrize(("mixed", "callback"), [(Worst, lambda: CVaRDRO(0.3)), (Ball, lambda: ChiSquareDRO(0.5))])
def test_a_mixin_is_the_callback(mixed, callback):
    explicit, watched, untouched = mixed(), Classifier(), Classifier()
    make_trainer([], max_epochs=3).fit(explicit, loader(bare=True), val_loader(bare=True))
    for model, callbacks in ((watched, [callback()]), (untouched, [])):
        make_trainer(callbacks, max_epochs=3).fit(model, loader(bare=True), val_loader(bare=True))
    own = {name: value for name, value in parameters(explicit).items() if name in parameters(watched)}
    assert deviation(own, parameters(watched)) < 1e-13
    assert deviation(own, parameters(untouched)) > 1e-3


def test_losses_that_are_not_finite_raise_before_anything_has_changed():
    with pytest.raises(BadRowsError, match="finite losses, but 1 rows"):
        CVaRLoss(0.5)(torch.tensor([1.0, float("nan")]))


def test_bad_arguments():
    for make, match in (
        (lambda: CVaRDRO(0.0), "`alpha`"),
        (lambda: CVaRDRO(0.5, temperature=-1), "`temperature`"),
        (lambda: ChiSquareDRO(1.0, penalty=1.0), "either `radius` or `penalty`"),
        (lambda: ChiSquareDRO(0.0), "`radius`"),
        (lambda: chi_square_weights(V, radius=None), "`radius` or `penalty` to be a number"),
        (lambda: cvar_weights(V[:0], alpha=0.5), "`losses` of at least one sample"),
        (lambda: CVaRLoss(0.5)(torch.zeros(2, 2)), r"shape \(N,\)"),
    ):
        with pytest.raises(DebiasError, match=match):
            make()
