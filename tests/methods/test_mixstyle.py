"""MixStyle against a loop over samples and channels; partners; ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from _support.fits import deviation, make_trainer, parameters, same
from _support.images import Pictures, batches, train
from _support.runs import ddp
from debias import MixStyle, MixStyleLayer
from debias.errors import BatchKeyError, DebiasError, RowsError
from debias.functional import mix_style
from debias.ops.pairs import beta_shares, other_domains, random_partners

EPS = 1e-6


def looped(x, partners, shares):
    """The definition, a number at a time; statistics as plain numbers, so that no gradient flows through them."""
    channels_last = x.ndim == 3
    maps = x.movedim(-1, 1).unsqueeze(-1) if channels_last else x
    out = []
    for i in range(len(maps)):
        for c in range(maps.shape[1]):
            own, other = maps[i, c].flatten().tolist(), maps[int(partners[i]), c].flatten().tolist()
            stats = []
            for values in (own, other):
                mean = sum(values) / len(values)
                squares = sum((v - mean) ** 2 for v in values)
                stats.append((mean, (squares / max(len(values) - 1, 1) + EPS) ** 0.5))
            share = float(shares[i])
            mean = share * stats[0][0] + (1 - share) * stats[1][0]
            std = share * stats[0][1] + (1 - share) * stats[1][1]
            out.append((maps[i, c] - stats[0][0]) / stats[0][1] * std + mean)
    result = torch.stack(out).view(maps.shape)
    return result.squeeze(-1).movedim(1, -1) if channels_last else result


def example(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    partners = torch.randperm(shape[0], generator=generator)
    return x.requires_grad_(), partners, torch.rand(shape[0], generator=generator, dtype=torch.float64)


SHAPES = [(5, 3, 4, 2), (4, 6, 3), (1, 2, 3, 3), (3, 2, 1, 1), (7, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_the_definition(shape):
    x, partners, shares = example(shape)
    found, expected = mix_style(x, partners, shares), looped(x, partners, shares)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (other,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (4, 6, 3)])
def test_statistics_of_the_output_are_the_mixed_ones(shape):
    x, partners, shares = example(shape)
    dims = (2, 3) if len(shape) == 4 else (1,)
    out = mix_style(x, partners, shares, eps=0.0).detach()
    share = shares.view(-1, *[1] * (len(dims)))
    for statistic in (torch.mean, torch.std):
        before = statistic(x.detach(), dims)
        kept = share.view(-1, 1)
        torch.testing.assert_close(statistic(out, dims), kept * before + (1 - kept) * before[partners])


def test_half_precision_is_computed_in_float32():
    x, partners, shares = example((4, 3, 5, 5))
    half = mix_style(x.detach().bfloat16(), partners, shares)
    assert half.dtype == torch.bfloat16
    exact = mix_style(x.detach().bfloat16().double(), partners, shares)
    torch.testing.assert_close(half, exact.bfloat16(), rtol=2e-2, atol=2e-2)


def test_a_share_of_one_keeps_the_style():
    x, partners, _ = example((5, 3, 4, 2))
    torch.testing.assert_close(mix_style(x, partners, torch.ones(5)), x)


# ------------------------------------------------------------ partners


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.integers(0, 10))
def test_partners_come_from_another_known_domain(domains, seed):
    ids = torch.tensor(domains)
    scores = torch.rand(len(ids), len(ids), generator=torch.Generator().manual_seed(seed))
    partners = random_partners(other_domains(ids), scores).tolist()
    for i, j in enumerate(partners):
        others = {d for d in domains if d >= 0 and d != domains[i]}
        if domains[i] < 0 or not others:
            assert j == i
        else:
            assert domains[j] in others


def test_every_partner_is_equally_likely():
    ids = torch.tensor([0, 1, 1, 1, 0, -1])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [random_partners(other_domains(ids), torch.rand(6, 6, generator=generator)) for _ in range(6000)]
    )
    counts = torch.bincount(drawn[:, 0], minlength=6)
    assert counts[[0, 4, 5]].tolist() == [0, 0, 0]
    assert ((counts[1:4] - 2000).abs() < 200).all()


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_shares_follow_the_beta_distribution(alpha):
    shares = beta_shares(torch.Generator().manual_seed(4), alpha, 20000, torch.device("cpu"))
    assert shares.dtype == torch.float64
    assert abs(float(shares.mean()) - 0.5) < 0.01
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)  # of Beta(alpha, alpha)


# ------------------------------------------------------------ the callback


class Recorded(MixStyle):
    """Keeps what went into a layer's change and what was drawn."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = []

    def change(self, x, path):
        out = super().change(x, path)
        self.kept.append((x, out, self.random._draws.get(path), self.step.ids(self.domain, 1) if self.domain else None))
        return out


@pytest.mark.parametrize("domain", [None, "place"])
def test_layers_are_changed_by_the_recorded_draws(domain):
    callback = Recorded(["stem", "stage"], p=0.7, domain=domain)
    train(Pictures(), [callback], max_epochs=2)
    changed = 0
    for x, out, draws, ids in callback.kept:
        if draws is None:
            assert out is x
            continue
        changed += 1
        ((partners, shares),) = draws
        torch.testing.assert_close(out, looped(x, partners, shares), rtol=1e-12, atol=1e-12)
        if ids is not None:
            moved = partners != torch.arange(len(ids))
            assert (ids[moved] != ids[partners[moved]]).all()
            assert (ids[partners] >= 0)[moved].all()
            assert moved.any()
    assert 0 < changed < len(callback.kept) == 12


def test_unknown_domains_raise_before_the_step():
    class Never(Pictures):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(BatchKeyError, match="domain='nowhere'"):
        train(Never(), [MixStyle("stem", p=1.0, domain="nowhere")])


class TwoViews(Pictures):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((torch.cat([x, x.flip(-1)]), torch.cat([y, y])), batch_idx)


def test_two_views_with_domains():
    with pytest.raises(RowsError, match="one row for each of the 8 samples, but got 16"):
        train(TwoViews(), [MixStyle("stem", p=1.0, domain="place")])
    train(TwoViews(), [MixStyle("stem", p=1.0, domain="place", rows="tiled")])
    train(TwoViews(), [MixStyle("stem", p=1.0)])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_and_odd_batches(n):
    model = Pictures()
    make_trainer([MixStyle(["stem"], p=1.0, domain="place")]).fit(model, batches(n, sizes=(n,), last=(0,)))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_probability_zero_is_plain_training():
    plain, other = Pictures(), Pictures()
    train(plain, bare=True)
    train(other, [MixStyle(["stem"], p=0.0)])
    assert same(parameters(plain), parameters(other))


@pytest.mark.parametrize("alpha", [0, -1.0, True, "0.1", float("inf"), float("nan")])
def test_alpha_is_positive(alpha):
    with pytest.raises(DebiasError, match="`alpha` to be a number > 0"):
        MixStyle("stem", alpha=alpha)
    with pytest.raises(DebiasError, match="`alpha` to be a number > 0"):
        MixStyleLayer(alpha=alpha)


def test_domains_have_one_key():
    with pytest.raises(DebiasError, match="`domain` of MixStyle to be one key"):
        MixStyle("stem", domain=("place", "person"))


# ------------------------------------------------------------ ranks


def fit(rank, sizes, last, domain, sync):
    options = {}
    if len(sizes) > 1:
        options = {"devices": len(sizes), "strategy": ddp(), "use_distributed_sampler": False}
    model = Pictures()
    callback = MixStyle(["stem", "stage"], p=0.8, domain=domain, sync_stats=sync)
    make_trainer([callback], max_epochs=2, **options).fit(model, batches(sizes=sizes, last=last, rank=rank))
    return parameters(model)


class Shared(MixStyle):
    """One process that draws what the ranks draw together."""

    def _draw(self, path, device, n, domains, *, shared):
        return super()._draw(path, device, n, domains, shared=True)


def shared(domain):
    model = Pictures()
    callback = Shared(["stem", "stage"], p=0.8, domain=domain)
    callback.random.name = "MixStyle"
    make_trainer([callback], max_epochs=2).fit(model, batches())
    return parameters(model)


@pytest.mark.parametrize("domain", [None, "place"])
@pytest.mark.parametrize(("sizes", "last"), [((4, 4), (4, 3)), ((3, 5), (2, 5))])
def test_two_ranks_with_common_statistics_are_one_process(ranks, domain, sizes, last):
    first, second = ranks.run(fit, sizes, last, domain, True)
    assert same(first, second)
    assert deviation(shared(domain), first) < 1e-12


def test_without_common_statistics_ranks_mix_among_themselves(ranks):
    first, second = ranks.run(fit, (4, 4), (4, 3), None, False)
    assert same(first, second)
    assert deviation(shared(None), first) > 1e-6


# ------------------------------------------------------------ the layer


def test_the_layer_mixes_in_training_mode_only():
    layer, x = MixStyleLayer(p=1.0), torch.randn(6, 3, 4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(layer(x), x)
        assert not torch.equal(layer(x, torch.tensor([0, 1, 0, 1, 0, 1])), x)
        assert torch.equal(layer(x, torch.zeros(6, dtype=torch.long)).round(decimals=4), x.round(decimals=4))
        assert layer(x[:1]) is not None
    assert layer.eval()(x) is x
    assert MixStyleLayer(p=0.0)(x) is x
