"""AdvStyle against loops and autograd: what it computes, that it climbs, that ranks and resumed runs agree."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from _support.fits import deviation, make_trainer, parameters, same
from _support.images import Pictures, batches, train
from _support.runs import ddp
from debias import AdvStyle, AdvStyleLayer
from debias.errors import DebiasError, UnsupportedStrategyError
from debias.functional import adversarial_style, uncertain_style

EPS = 1e-6


def spread(values):
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) + EPS) ** 0.5


def statistics(maps):
    n, channels = maps.shape[:2]
    means = [[sum(maps[i, c].flatten()) / maps[i, c].numel() for c in range(channels)] for i in range(n)]
    stds = [[spread(list(maps[i, c].flatten())) for c in range(channels)] for i in range(n)]
    return means, stds


def looped(x, noise, spreads, length=None):
    """The definition with an ordinary gradient for the spreads, a channel of a sample at a time."""
    maps = x.movedim(-1, 1).unsqueeze(-1) if x.ndim == 3 else x
    n, channels = maps.shape[:2]
    stats = statistics(maps)
    used = [[spreads[k, c] for c in range(channels)] for k in (0, 1)]
    if length is not None:
        for k in (0, 1):
            in_batch = [spread([stats[k][i][c] for i in range(n)]) for c in range(channels)]
            norm = sum(s**2 for s in in_batch) ** 0.5
            own = sum(s**2 for s in used[k]) ** 0.5
            used[k] = [s / own * norm * length for s in used[k]]
    rows = []
    for i in range(n):
        for c in range(channels):
            beta = stats[0][i][c] + noise[0, i, c] * used[0][c]
            gamma = stats[1][i][c] + noise[1, i, c] * used[1][c]
            rows.append(gamma * (maps[i, c] - stats[0][i][c]) / stats[1][i][c] + beta)
    out = torch.stack(rows).view(maps.shape)
    return out.squeeze(-1).movedim(1, -1) if x.ndim == 3 else out


def example(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    channels = shape[1] if len(shape) == 4 else shape[2]
    noise = torch.randn(2, shape[0], channels, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), noise, torch.rand(2, channels, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("length", [None, 0.7])
@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (3, 4, 2), (1, 2, 3, 3)])
def test_value_and_gradient_are_those_of_the_definition(shape, length):
    """The network's gradient is plain; that of the spreads is reversed and scaled."""
    x, noise, spreads = example(shape)
    found = adversarial_style(x, noise, spreads, strength=2.5, length=length)
    expected = looped(x, noise, spreads, length)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for_x, for_spreads = torch.autograd.grad((found * weights).sum(), (x, spreads))
    other_x, other_spreads = torch.autograd.grad((expected * weights).sum(), (x, spreads))
    torch.testing.assert_close(for_x, other_x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(for_spreads, -2.5 * other_spreads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [None, 0.7])
def test_gradcheck(length):
    x, noise, spreads = example((3, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda x: adversarial_style(x, noise, spreads.detach(), length=length), x)


def test_statistics_of_the_output_are_the_perturbed_ones():
    x, noise, spreads = example((5, 3, 4, 4))
    out = adversarial_style(x, noise, spreads, eps=0.0).detach()
    mean, std = x.detach().mean((2, 3)), x.detach().std((2, 3))
    torch.testing.assert_close(out.mean((2, 3)), mean + noise[0] * spreads[0].detach())
    torch.testing.assert_close(out.std((2, 3)), (std + noise[1] * spreads[1].detach()).abs())


def test_gradients_that_are_not_finite_are_dropped():
    x, noise, spreads = example((3, 2, 2, 2))
    adversarial_style(x, noise, spreads).mul(torch.tensor(float("inf"), dtype=torch.float64)).sum().backward()
    assert torch.isfinite(spreads.grad).all()


# ------------------------------------------------------------ the layer


def test_the_layer_starts_from_the_batch_and_keeps_its_start():
    layer = AdvStyleLayer(3).double()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer(x)
    means, stds = statistics(x)
    expected = torch.tensor([[spread([s[c] for s in stat]) for c in range(3)] for stat in (means, stds)])
    torch.testing.assert_close(layer.spreads.detach(), expected.double(), rtol=1e-6, atol=1e-6)
    twin = AdvStyleLayer(3).double()
    twin.load_state_dict(layer.state_dict())
    twin.prepare(10 * x)  # a resumed layer does not start again
    assert torch.equal(twin.spreads, layer.spreads)
    assert layer.eval()(x) is x


@pytest.mark.parametrize(("intensity", "shares"), [("learned", (1 / 3, 1 / 3)), ("direction", (1 / 2, 0.0))])
def test_branches_have_their_published_probabilities(intensity, shares):
    layer = AdvStyleLayer(2, intensity)
    found = [layer.branch((i + 0.5) / 600) for i in range(600)]
    assert found.count("adversarial") == 600 * shares[0]
    assert found.count("dsu") == 600 * shares[1]


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_no_parameter_of_the_layer_is_ever_unused(chance, monkeypatch):
    layer, x = AdvStyleLayer(3), torch.randn(4, 3, 2, 2)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(chance))
    layer(x).square().sum().backward()
    assert layer.spreads.grad is not None
    assert bool(layer.spreads.grad.any()) == (layer.branch(chance) == "adversarial")


@pytest.mark.parametrize("intensity", ["learned", "direction"])
@pytest.mark.parametrize("branch", ["adversarial", "dsu", "identity"])
def test_an_empty_first_batch_is_not_where_the_layer_starts(intensity, branch, monkeypatch):
    layer, x = AdvStyleLayer(3, intensity), torch.randn(6, 3, 4, 4)
    monkeypatch.setattr(layer, "branch", lambda chance: branch)
    layer(torch.zeros(0, 3, 4, 4, requires_grad=True)).sum().backward()
    assert not layer.initialized
    assert not layer.spreads.grad.any()
    layer(x)
    assert layer.initialized
    fresh = AdvStyleLayer(3, intensity)
    fresh.prepare(x)
    assert torch.equal(layer.spreads, fresh.spreads)


def _prepared(rank, sizes):
    layer = AdvStyleLayer(3)
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).split(sizes)[rank]
    layer.prepare(x[:0])
    started = bool(layer.initialized)
    layer.prepare(x)
    return started, layer.spreads.detach()


def test_a_rank_without_rows_starts_with_the_others(ranks):
    (early, first), (also_early, second) = ranks.run(_prepared, [6, 0])
    assert not early
    assert not also_early
    assert torch.equal(first, second)
    torch.testing.assert_close(first, _prepared(0, [6])[1])


# ------------------------------------------------------------ the callback


class Recorded(AdvStyle):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = []

    def change(self, x, path):
        out = super().change(x, path)
        layer = self.owned[path].module
        self.kept.append((path, self.random._draws[f"{path}?"][0], self.random._draws.get(path), layer.spreads.clone()))
        return out


def by_hand(model, x, y, draws, spreads, intensity):
    """The loss of one batch with the layers changed as drawn; spreads are leaves with an ordinary gradient."""
    for path in ("stem", "stage"):
        x = getattr(model, path)(x)
        chance, noise = draws[path]
        learned = intensity == "learned"
        if chance < (1 / 3 if learned else 1 / 2):
            x = looped(x, noise[0], spreads[path], None if learned else 0.8)
        elif learned and chance < 2 / 3:
            x = uncertain_style(x, noise[0])
    return F.cross_entropy(model.head(x.mean((2, 3))), y)


@pytest.mark.parametrize("intensity", ["learned", "direction"])
def test_training_is_descent_of_the_network_and_ascent_of_the_spreads(intensity):
    model, plain = Pictures(), Pictures()
    callback = Recorded(["stem", "stage"], intensity=intensity, adv_weight=3.0, mix_weight=0.8, lr=0.05)
    train(model, [callback], max_epochs=4)
    optimizer = plain.configure_optimizers()
    spreads, velocity = {}, {}
    climbed = 0
    steps = [callback.kept[i : i + 2] for i in range(0, len(callback.kept), 2)]
    for (x, y, _), kept in zip(model.seen, steps, strict=True):
        if not spreads:
            spreads = {path: value.detach().requires_grad_() for path, _, _, value in kept}
            velocity = {path: torch.zeros_like(value) for path, value in spreads.items()}
        for path, _, _, value in kept:
            torch.testing.assert_close(value, spreads[path], rtol=1e-8, atol=1e-10)
        loss = by_hand(plain, x, y, {path: draws for path, *draws, _ in kept}, spreads, intensity)
        optimizer.zero_grad()
        gradients = dict(zip(spreads, torch.autograd.grad(loss, list(spreads.values()), retain_graph=True,
                                                          allow_unused=True), strict=True))  # fmt: skip
        loss.backward()
        optimizer.step()
        for path, gradient in gradients.items():
            climbed += gradient is not None
            up = torch.zeros_like(velocity[path]) if gradient is None else 3.0 * gradient
            velocity[path] = 0.9 * velocity[path] + up  # momentum of the loss's own, not reversed, gradient
            spreads[path] = (spreads[path] + 0.05 * velocity[path]).detach().requires_grad_()
    assert climbed >= 3
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[key], value, rtol=1e-8, atol=1e-10)


def test_one_step_goes_uphill():
    """With the draws and the network held, the loss is higher after the step of the spreads."""
    torch.manual_seed(0)
    x, noise, spreads = example((6, 3, 4, 4))
    weights, y = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])

    def loss(values):
        return F.cross_entropy(adversarial_style(x, noise, values).mean((2, 3)) @ weights, y)

    before = loss(spreads)
    before.backward()
    optimizer = torch.optim.SGD([spreads], lr=1e-3)
    optimizer.step()
    assert loss(spreads) > before


def test_spreads_stay_finite_when_they_climb_fast():
    callback = AdvStyle(["stem", "stage"], p_adversarial=1.0, p_dsu=0.0, adv_weight=100.0, lr=1.0)
    model = Pictures()
    train(model, [callback], max_epochs=4)
    values = [owned.module.spreads for owned in callback.owned.values()]
    assert all(torch.isfinite(value).all() for value in values)
    assert max(float(value.detach().abs().max()) for value in values) > 1


def test_the_networks_optimiser_and_checkpoint_know_nothing_of_the_spreads(tmp_path):
    model = Pictures()
    callback = AdvStyle("stem", lr=0.1)
    save = ModelCheckpoint(tmp_path, filename="last")
    trainer = make_trainer([callback, save], enable_checkpointing=True)
    trainer.fit(model, batches())
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(list(Pictures().parameters()))
    (group,) = callback.owned["stem"].optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Pictures().state_dict())
    saved = checkpoint["callbacks"]["AdvStyle"]["owned"]["stem"]
    assert torch.equal(saved["module"]["spreads"], callback.owned["stem"].module.spreads)


@pytest.mark.parametrize("when", ["before setup", "after setup"])
def test_saved_spreads_are_taken_up(when):
    callback = AdvStyle("stem", p_adversarial=1.0, p_dsu=0.0)
    train(Pictures(), [callback])
    state = copy.deepcopy(callback.state_dict())
    other = Recorded("stem", p_adversarial=1.0, p_dsu=0.0)
    if when == "after setup":
        train(Pictures(), [other])
    other.load_state_dict(state)
    assert same(other.state_dict(), state)
    other.kept.clear()
    train(Pictures(), [other])
    assert torch.equal(other.kept[0][-1], state["owned"]["stem"]["module"]["spreads"])


def test_the_default_learning_rate_is_the_networks():
    callback = AdvStyle("stem", lr_ratio=0.5)
    train(Pictures(lr=0.02), [callback])
    assert callback.owned["stem"].optimizer.param_groups[0]["lr"] == 0.01


def test_manual_optimisation_is_refused():
    model = Pictures()
    model.automatic_optimization = False
    with pytest.raises(UnsupportedStrategyError, match="automatic optimisation for AdvStyle"):
        train(model, [AdvStyle("stem")])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"intensity": "A"}, "`intensity` to be 'learned' or 'direction', but got 'A'"),
        ({"p_adversarial": 1.5}, r"`p_adversarial` to be a number in \[0, 1\], but got 1.5"),
        ({"p_adversarial": 0.6, "p_dsu": 0.6}, "sum to at most 1, but got 0.6 and 0.6"),
        ({"adv_weight": -1}, "`adv_weight` to be a number >= 0"),
        ({"mix_weight": float("nan")}, "`mix_weight` to be a number >= 0"),
        ({"lr": -0.1}, "`lr` to be a number >= 0"),
    ],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(DebiasError, match=match):
        AdvStyle("stem", **options)


# ------------------------------------------------------------ ranks


class Common(AdvStyle):
    """Every rank takes its rows of noise that all draw alike."""

    def __init__(self, sizes, rank, **options):
        super().__init__(["stem", "stage"], lr=0.2, name="common", seed=3, **options)
        self.first, self.total = sum(sizes[:rank]), sum(sizes)

    def change(self, x, path):
        draw = self.random.draw

        def drawn(place, device, sample, *, shared=False):
            if shared:
                return draw(place, device, sample, shared=True)
            every = lambda g: torch.randn(2, self.total, x.shape[1], generator=g, dtype=torch.float64)  # noqa: E731
            return draw(place, device, every, shared=True)[:, self.first :][:, : x.shape[0]]

        self.random.draw = drawn
        try:
            return super().change(x, path)
        finally:
            del self.random.draw


def fit(rank, sizes, last, intensity, common, ddp_options):
    options = {}
    if len(sizes) > 1:
        options = {"devices": len(sizes), "strategy": ddp(**ddp_options), "use_distributed_sampler": False}
    model = Pictures()
    shared = {"sync_stats": True, "intensity": intensity}
    callback = Common(sizes, rank, **shared) if common else AdvStyle(["stem", "stage"], lr=0.2, intensity=intensity)
    make_trainer([callback], max_epochs=2, **options).fit(model, batches(sizes=sizes, last=last, rank=rank))
    return parameters(model), callback.state_dict()


@pytest.mark.parametrize("intensity", ["learned", "direction"])
def test_two_ranks_with_common_statistics_are_one_process(ranks, intensity):
    whole = fit(0, (8,), (7,), intensity, True, {})
    first, second = ranks.run(fit, (3, 5), (3, 4), intensity, True, {})
    assert same(first, second)
    assert deviation(whole, first) < 1e-12


def test_spreads_are_the_same_on_all_ranks(ranks):
    """Also where every rank draws its own noise, and none is unused."""
    first, second = ranks.run(fit, (4, 4), (4, 3), "learned", False, {})
    assert same(first, second)
    start = fit(0, (8,), (7,), "learned", False, {})
    assert not same(start[1], first[1])
