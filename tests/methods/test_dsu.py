"""DSU against a loop over samples and channels, autograd, and one process for two ranks."""

from __future__ import annotations

import pytest
import torch

from _support.fits import deviation, make_trainer, parameters, same
from _support.images import Pictures, batches, train
from _support.runs import ddp
from debias import DSU, DSULayer
from debias.errors import DebiasError
from debias.functional import uncertain_style
from debias.ops.styles import batch_std, style

EPS = 1e-6


def spread(values):
    """Standard deviation of a list of scalars, unbiased; differentiable."""
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) + EPS) ** 0.5


def looped(x, noise, factor=1.0):
    """The definition, a channel of a sample at a time; autograd goes through everything."""
    maps = x.movedim(-1, 1).unsqueeze(-1) if x.ndim == 3 else x
    n, channels = maps.shape[:2]
    means = [[sum(maps[i, c].flatten()) / maps[i, c].numel() for c in range(channels)] for i in range(n)]
    stds = [[spread(list(maps[i, c].flatten())) for c in range(channels)] for i in range(n)]
    rows = []
    for i in range(n):
        for c in range(channels):
            beta = means[i][c] + factor * noise[0, i, c] * spread([m[c] for m in means])
            gamma = stds[i][c] + factor * noise[1, i, c] * spread([s[c] for s in stds])
            rows.append(gamma * (maps[i, c] - means[i][c]) / stds[i][c] + beta)
    out = torch.stack(rows).view(maps.shape)
    return out.squeeze(-1).movedim(1, -1) if x.ndim == 3 else out


def example(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    channels = shape[1] if len(shape) == 4 else shape[2]
    return x.requires_grad_(), torch.randn(2, shape[0], channels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (3, 4, 2), (1, 2, 3, 3), (3, 2, 1, 1)])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_value_and_gradient_are_those_of_the_definition(shape, factor):
    x, noise = example(shape)
    found, expected = uncertain_style(x, noise, factor=factor), looped(x, noise, factor)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (other,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 2, 3, 2), (3, 3, 2)])
def test_gradcheck(shape):
    x, noise = example(shape)
    assert torch.autograd.gradcheck(lambda x: uncertain_style(x, noise), x)


def test_statistics_differentiate_twice_and_under_transforms():
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: style(x), x)
    one = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    for together, alone in zip(torch.func.vmap(style)(one), zip(*map(style, one), strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=0)
    slope = torch.func.grad(lambda x: style(x)[1].sum())(x.detach())
    (expected,) = torch.autograd.grad(torch.var_mean(x, (2, 3))[0].add(1e-6).sqrt().sum(), x)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-15)


def test_statistics_of_the_output_are_the_drawn_ones():
    x, noise = example((5, 3, 4, 4))
    out = uncertain_style(x, noise, eps=0.0).detach()
    mean, std = x.detach().mean((2, 3)), x.detach().std((2, 3))
    torch.testing.assert_close(out.mean((2, 3)), mean + noise[0] * mean.std(0))
    torch.testing.assert_close(out.std((2, 3)), (std + noise[1] * std.std(0)).abs())


def test_without_noise_nothing_changes():
    x, noise = example((4, 3, 3, 2))
    torch.testing.assert_close(uncertain_style(x, 0 * noise), x)
    torch.testing.assert_close(uncertain_style(x, noise, factor=0.0), x)


class Recorded(DSU):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = []

    def change(self, x, path):
        out = super().change(x, path)
        self.kept.append((x.detach(), out.detach(), self.random._draws.get(path)))
        return out


def test_layers_are_changed_by_the_recorded_draws():
    callback = Recorded(["stem", "stage"], p=0.5)
    train(Pictures(), [callback], max_epochs=2)
    changed = 0
    for x, out, draws in callback.kept:
        if draws is None:
            assert torch.equal(out, x)
            continue
        changed += 1
        (noise,) = draws
        torch.testing.assert_close(out, looped(x, noise.double()), rtol=1e-10, atol=1e-10)
    assert 0 < changed < len(callback.kept) == 12


@pytest.mark.parametrize("n", [1, 3])
def test_small_and_odd_batches(n):
    model = Pictures()
    make_trainer([DSU(["stem"], p=1.0)]).fit(model, batches(n, sizes=(n,), last=(0,)))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 5, 3)])
def test_an_empty_batch_stays_empty(shape):
    layer = DSULayer(p=1.0)
    x = torch.zeros(shape, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape


def _spread(rank, values, shares):
    rows = values.split(shares)[rank].clone().requires_grad_()
    found = batch_std(rows, sync=True)
    (gradient,) = torch.autograd.grad(found.sum(), rows)
    return found.detach(), gradient


def test_a_rank_without_rows_knows_the_common_spread(ranks):
    values = torch.randn(5, 2, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (first, for_rows), (second, none) = ranks.run(_spread, values, [5, 0])
    torch.testing.assert_close(first, batch_std(values), rtol=1e-12, atol=0)
    assert torch.equal(first, second)
    assert torch.isfinite(for_rows).all()
    assert none.shape == (0, 2, 3, 1)


def test_no_rank_with_rows(ranks):
    for found, none in ranks.run(_spread, torch.zeros(0, 2, 3, 1), [0, 0]):
        assert torch.isfinite(found).all()
        assert none.shape == (0, 2, 3, 1)


@pytest.mark.parametrize("factor", [-1, float("inf"), float("nan"), True, "1"])
def test_factor_is_a_number(factor):
    with pytest.raises(DebiasError, match="`factor` to be a number >= 0"):
        DSU("stem", factor=factor)


# ------------------------------------------------------------ ranks


class Common(DSU):
    """Every rank takes its rows of noise that all draw alike, so that the draws are those of one process."""

    def __init__(self, sizes, rank, **options):
        super().__init__(["stem", "stage"], p=0.8, name="common", **options)
        self.first, self.total = sum(sizes[:rank]), sum(sizes)  # also of the last batch

    def change(self, x, path):
        draw = self.random.draw

        def drawn(place, device, sample, *, shared=False):
            if shared:
                return draw(place, device, sample, shared=True)
            channels = x.shape[1]
            every = lambda g: torch.randn(2, self.total, channels, generator=g, dtype=torch.float64)  # noqa: E731
            return draw(place, device, every, shared=True)[:, self.first :][:, : x.shape[0]]

        self.random.draw = drawn
        try:
            return super().change(x, path)
        finally:
            del self.random.draw


def fit(rank, sizes, last, sync):
    options = {}
    if len(sizes) > 1:
        options = {"devices": len(sizes), "strategy": ddp(), "use_distributed_sampler": False}
    model = Pictures()
    callback = Common(sizes, rank, sync_stats=sync)
    make_trainer([callback], max_epochs=2, **options).fit(model, batches(sizes=sizes, last=last, rank=rank))
    return parameters(model)


@pytest.mark.parametrize(("sizes", "last"), [((4, 4), (4, 3)), ((3, 5), (3, 4))])
def test_two_ranks_with_common_statistics_are_one_process(ranks, sizes, last):
    whole = fit(0, (8,), (7,), True)
    first, second = ranks.run(fit, sizes, last, True)
    assert same(first, second)
    assert deviation(whole, first) < 1e-12
    assert deviation(whole, ranks.run(fit, sizes, last, False)[0]) > 1e-6


def test_the_layer_changes_in_training_mode_only():
    layer, x = DSULayer(p=1.0), torch.randn(6, 3, 4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(layer(x), x)
        assert torch.isfinite(layer(x[:1])).all()
    assert layer.eval()(x) is x
    assert DSULayer(p=0.0)(x) is x
