"""The probe against scikit-learn, on one process and two, and as a monitor against the function it calls."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, TensorDataset

from _support.fits import Classifier, loader, make_trainer, parameters, same, val_loader
from _support.runs import ddp
from debias import AttributeProbe, EvalSampler, GroupMonitor, IdentityAdversarial, tag
from debias.errors import BadRowsError, BatchKeyError, DebiasError, DebiasWarning, HeadNotFoundError, RowsError
from debias.functional import ledoit_wolf_shrinkage, probe_attribute
from debias.monitors.attribute_probe import _numbers

S = 5


def samples(n=200, *, signal=1.0, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, S, (n,), generator=g)
    centres = torch.randn(S, width, generator=g, dtype=torch.float64)
    return signal * centres[labels] + torch.randn(n, width, generator=g, dtype=torch.float64), labels


def halves(labels, fraction=0.5, seed=0):
    """The probe's parts, found from outside: samples that a probe of one-hot features is scored on."""
    from debias.monitors.attribute_probe import _stratified

    return _stratified(labels, S, fraction, torch.Generator().manual_seed(seed))


def units(width=6, seed=3):
    """Factors of very unlike features."""
    return 10 ** (4 * torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 3)


def within(x, y):
    return x - torch.stack([x[y == k].mean(0) for k in range(S)])[y]


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_it_is_scikit_learns_discriminant(shrinkage, fraction):
    discriminant = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
    metrics = pytest.importorskip("sklearn.metrics")
    x, y = samples()
    fit = halves(y, fraction)
    scaled = x / within(x[fit], y[fit]).square().mean(0).sqrt()  # theirs shrinks a number as features come
    oracle = discriminant(solver="lsqr", shrinkage=shrinkage).fit(scaled[fit], y[fit])
    predicted = oracle.predict(scaled[~fit])
    found = probe_attribute(x * units(), y, S, shrinkage=shrinkage, fit_fraction=fraction)
    assert float(found["accuracy"]) == pytest.approx(metrics.accuracy_score(y[~fit], predicted), abs=1e-12)
    assert float(found["balanced_accuracy"]) == pytest.approx(
        metrics.balanced_accuracy_score(y[~fit], predicted), abs=1e-12
    )
    assert float(found["chance"]) == pytest.approx(np.bincount(y[~fit]).max() / (~fit).sum().item(), abs=1e-12)
    assert 0.3 < float(found["accuracy"]) < 1


@pytest.mark.parametrize(("n", "width"), [(200, 6), (80, 60), (120, 150)])
def test_shrinkage_is_ledoit_and_wolfs(n, width):
    covariance = pytest.importorskip("sklearn.covariance")
    x, y = samples(n, width=width, signal=2 / width**0.5)
    centred = within(x, y)
    ours = ledoit_wolf_shrinkage(centred.T @ centred, centred.square().sum(1).square().sum(), torch.tensor(float(n)))
    theirs = covariance.ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True)
    assert float(ours) == pytest.approx(theirs, rel=1e-9)
    discriminant = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
    fit = halves(y)
    scaled = x / within(x[fit], y[fit]).square().mean(0).sqrt()
    share = covariance.ledoit_wolf_shrinkage(within(scaled[fit], y[fit]).numpy(), assume_centered=True)
    expected = discriminant(solver="lsqr", shrinkage=share).fit(scaled[fit], y[fit]).score(scaled[~fit], y[~fit])
    assert 1.2 / S < expected < 1
    assert float(probe_attribute(x * units(width), y, S)["accuracy"]) == pytest.approx(expected, abs=1e-12)


def hidden(n=2000, width=64):
    """Features of which the first ``S`` tell the value, the others correlated noise."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % S
    noise = torch.randn(n, width, generator=g, dtype=torch.float64)
    noise[:, S:] @= torch.randn(width - S, width - S, generator=g, dtype=torch.float64) / 3
    return noise + 3 * F.one_hot(labels, width), labels


@pytest.mark.parametrize("shrinkage", [None, 0.3])
@pytest.mark.parametrize("quiet", [0.3, 0.1, 1e-6])
def test_features_that_are_turned_down_are_read_as_well(quiet, shrinkage):
    discriminant = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
    x, y = hidden()
    loud = probe_attribute(x, y, S, shrinkage=shrinkage)
    x[:, :S] *= quiet
    assert probe_attribute(x, y, S, shrinkage=shrinkage) == loud
    assert float(loud["accuracy"]) > 0.9
    if shrinkage is None:  # theirs standardises, too, but shrinks each value's covariance on its own
        fit = halves(y)
        theirs = discriminant(solver="lsqr", shrinkage="auto").fit(x[fit], y[fit]).score(x[~fit], y[~fit])
        assert float(loud["accuracy"]) == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize(("n", "width"), [(200, 6), (60, 90)])
def test_units_change_nothing(n, width):
    x, y = samples(n, width=width, signal=1.5 / width**0.5)
    whole = probe_attribute(x, y, S)
    assert probe_attribute(x * units(width), y, S) == whole
    assert probe_attribute(x * units(width) + 1e3 * units(width, 4), y, S) == whole
    assert 1 / S < float(whole["accuracy"]) < 1


@pytest.mark.parametrize("seed", range(5))
def test_constant_features_change_nothing(seed):
    x, y = samples(500, width=90, signal=0.1, seed=seed)
    constant = torch.cat([torch.zeros(20), units(60, seed)]).expand(500, -1)  # of some the mean is rounded
    assert probe_attribute(torch.cat([x, constant], 1), y, S) == probe_attribute(x, y, S)


@pytest.mark.parametrize("unit", [1e-6, 0.1, 1e6])
def test_a_feature_that_is_constant_within_values_is_read(unit):
    x, y = samples(200, width=40, signal=0.0)
    first = (y == 0).double().unsqueeze(1) * unit + unit / 3
    told = probe_attribute(torch.cat([x, first], 1), y == 0, 2)
    assert float(told["accuracy"]) == 1
    more = probe_attribute(torch.cat([x + 6 * F.one_hot(y, 40), first], 1), y, S)  # and hides no other feature
    assert float(more["accuracy"]) > 0.95
    assert probe_attribute(first.expand(-1, 3), y == 0, 2)["accuracy"] == 1


def test_it_finds_about_what_a_logistic_regression_finds():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = samples(1000)
    fit = halves(y)
    theirs = linear.LogisticRegression(max_iter=1000).fit(x[fit], y[fit]).score(x[~fit], y[~fit])
    assert float(probe_attribute(x, y, S)["accuracy"]) == pytest.approx(theirs, abs=0.03)


def test_where_nothing_is_nothing_is_found():
    x, y = samples(2000, signal=0.0)
    found = probe_attribute(x, y, S)
    assert float(found["accuracy"]) == pytest.approx(1 / S, abs=0.04)
    x, y = samples(2000, signal=3.0)
    found = probe_attribute(x, y, S)
    assert float(found["accuracy"]) > 0.95
    assert float(found["shuffled_accuracy"]) == pytest.approx(1 / S, abs=0.04)
    assert float(found["shuffled_balanced_accuracy"]) == pytest.approx(1 / S, abs=0.04)


def test_parts_are_shares_of_each_value():
    labels = torch.tensor([0] * 7 + [1] * 1 + [2] * 2 + [4] * 10)
    fit = halves(labels, 0.3)
    assert [int(fit[labels == k].sum()) for k in range(S)] == [2, 1, 1, 0, 3]
    assert not torch.equal(halves(labels, seed=1), halves(labels))


def test_order_and_unknown_samples_change_nothing():
    x, y = samples()
    whole = probe_attribute(x, y, S, numbers=torch.arange(200))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert probe_attribute(x[order], y[order], S, numbers=order) == whole
    doubled = torch.cat([order, order[:17]])  # as a padding sampler does
    assert probe_attribute(x[doubled], y[doubled], S, numbers=doubled) == whole
    more, ids = torch.cat([x, x + 1]), torch.cat([y, torch.full((200,), -1)])
    assert probe_attribute(more, ids, S, numbers=torch.arange(400)) == whole


def test_edges():
    x = torch.randn(4, 3)
    for labels in (torch.full((4,), -1), torch.arange(4), torch.zeros(0).long()):
        found = probe_attribute(x[: len(labels)], labels, S)
        assert all(torch.isnan(value) for key, value in found.items() if not key.startswith("shuffled"))
    same_value = probe_attribute(torch.ones(6, 3), torch.arange(6) % 2, S)  # constant features
    assert float(same_value["accuracy"]) == 0.5
    one = probe_attribute(torch.randn(6, 3), torch.zeros(6).long(), S)
    assert float(one["accuracy"]) == float(one["chance"]) == 1.0


def test_what_is_refused():
    x, y = samples()
    with pytest.raises(BadRowsError, match=r"below `n_values=3`, but [0-9]+ samples"):
        probe_attribute(x, y, 3)
    x[3, 2] = torch.nan
    with pytest.raises(BadRowsError, match="finite features, but 1 samples"):
        probe_attribute(x, y, S)


# -------------------------------------------------------------------------------------------------- units


def clips(people=5, of_each=8, frames=12, *, person=0.0, width=24, seed=0):
    """Frames that are their clip's image with a little noise; ``person`` is how far people are apart."""
    g = torch.Generator().manual_seed(seed)
    clip = torch.arange(people * of_each).repeat_interleave(frames)
    who = clip // of_each
    image = torch.randn(people * of_each, width, generator=g, dtype=torch.float64)
    shift = person * torch.randn(people, width, generator=g, dtype=torch.float64)
    noise = 0.1 * torch.randn(len(clip), width, generator=g, dtype=torch.float64)
    return image[clip] + shift[who] + noise, who, clip


def test_frames_of_a_clip_tell_the_clip_and_not_the_person():
    x, who, clip = clips(width=40)  # nothing tells the person
    alone, together = (probe_attribute(x, who, S, units=of) for of in (None, clip))
    assert float(alone["accuracy"]) > 0.95
    assert float(together["accuracy"]) < 2 / S
    x, who, clip = clips(person=2.0)
    assert float(probe_attribute(x, who, S, units=clip)["accuracy"]) > 0.9
    found = probe_attribute(x, who, S, units=clip)
    assert float(found["shuffled_accuracy"]) < 0.45


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_all_samples_of_a_unit_are_in_one_part(fraction, monkeypatch):
    from debias.monitors import attribute_probe

    calls = []
    fit = attribute_probe._fit_and_score
    monkeypatch.setattr(attribute_probe, "_fit_and_score", lambda x, *rest: calls.append(rest) or fit(x, *rest))
    g = torch.Generator().manual_seed(3)
    unit = torch.randint(0, 40, (300,), generator=g)
    who = torch.where(torch.rand(300, generator=g) < 0.9, unit % S, 0)  # a few units hold several values
    probe_attribute(torch.randn(300, 4, generator=g), who, S, units=7 * unit + 2, fit_fraction=fraction)
    (labels, fits, *_), (shuffled, again, *_) = calls
    assert torch.equal(fits, again)
    assert torch.equal(labels, who)
    main = torch.stack([torch.bincount(who[unit == u], minlength=S).argmax() for u in range(40)])
    for u in range(40):
        assert len(fits[unit == u].unique()) == 1
    for value in range(S):
        of_value = (main == value).nonzero().flatten()
        fitted = sum(bool(fits[unit == u][0]) for u in of_value.tolist())
        assert fitted == max(int(fraction * len(of_value)), 1)
    assert sorted(shuffled.tolist()) == sorted(who.tolist())
    assert not torch.equal(shuffled, who)


def test_the_shuffled_values_of_a_unit_are_of_one_other():
    from debias.monitors.attribute_probe import _shuffled

    _, who, clip = clips()

    shuffled = _shuffled(who, clip, torch.Generator().manual_seed(0)).view(-1, 12)
    assert torch.equal(shuffled, shuffled[:, :1].expand(-1, 12))
    assert sorted(shuffled[:, 0].tolist()) == sorted(who[::12].tolist())
    assert not torch.equal(shuffled[:, 0], who[::12])


def test_every_sample_a_unit_is_the_default_and_unknown_ones_are_left_out():
    x, who, clip = clips(person=0.3)
    assert probe_attribute(x, who, S, units=torch.arange(len(x)) + 5) == probe_attribute(x, who, S)
    more, people = torch.cat([x, x + 1]), torch.cat([who, who])
    unknown = torch.cat([clip, torch.full_like(clip, -1)])
    assert probe_attribute(more, people, S, units=unknown) == probe_attribute(x, who, S, units=clip)
    one = probe_attribute(x, who, S, units=who)  # a value with one unit is not scored
    assert all(torch.isnan(one[key]) for key in ("accuracy", "balanced_accuracy", "chance"))


def test_the_monitor_with_units():
    x, who, clip = clips(people=4, of_each=3, frames=5, width=4)
    data = tag(TensorDataset(x, who % 2), person=who, clip=clip)
    logged = validate([AttributeProbe("person", S, unit="clip")], dataset=data)
    with torch.no_grad():
        features = Classifier().backbone(x).float()
    expected = probe_attribute(features, who, S, units=clip, numbers=torch.arange(len(x)))
    assert logged == pytest.approx({f"val/person_probe/{k}": float(v) for k, v in expected.items()}, rel=1e-6)
    assert logged != validate([AttributeProbe("person", S)], dataset=data)
    with pytest.raises(BatchKeyError, match=r"`unit='film'`.*tag\(dataset, film=ids\)"):
        validate([AttributeProbe("person", S, unit="film")], dataset=data)
    probe = AttributeProbe("person", S, unit="person")
    with pytest.warns(DebiasWarning, match=r"could score nothing: no value of `attribute='person'`.*`unit='person'`"):
        validate([probe], dataset=data)
    assert np.isnan(validate([probe], dataset=data)["val/person_probe/accuracy"])  # said once


# -------------------------------------------------------------------------------------------------- on two ranks


def test_two_ranks_are_one_process(ranks):
    runs = ranks.run(_share, 61)
    x, y = samples(61)
    whole = probe_attribute(x, y, S, numbers=torch.arange(61))
    assert runs[0] == runs[1]
    assert {k: float(v) for k, v in runs[0].items()} == pytest.approx({k: float(v) for k, v in whole.items()}, abs=0)
    assert ranks.run(_share, 61, True)[0] == runs[0]  # one rank holds nothing
    of_units = ranks.run(_share, 61, False, S, False, True)
    grouped = probe_attribute(x, y, S, numbers=torch.arange(61), units=torch.arange(61) // 2)
    assert of_units[0] == of_units[1] == grouped
    assert grouped != whole
    scaled = ranks.run(_share, 61, False, S, True)
    assert scaled[0] == scaled[1] == runs[0]
    ranks.raises(BadRowsError, "below `n_values=4`", _share, 61, False, 4)


def _share(rank, n, all_on_one=False, n_values=S, scaled=False, in_units=False):
    x, y = samples(n)
    x = torch.cat([x * units(), torch.full((n, 9), 0.1)], 1) if scaled else x
    mine = torch.arange(n)[: n * (rank == 0)] if all_on_one else torch.arange(n)[rank::2]
    return probe_attribute(x[mine], y[mine], n_values, numbers=mine, units=mine // 2 if in_units else None)


def persons(n, seed=2):
    return torch.randint(0, S, (n,), generator=torch.Generator().manual_seed(seed))


def probed(n=41, **changed):
    g = torch.Generator().manual_seed(1)
    ids = persons(n)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64) + 2 * F.one_hot(ids, S)[:, :4]
    return tag(TensorDataset(x, torch.arange(n) % 2), **({"person": ids, "place": ids % 3} | changed))


def validate(callbacks, model=None, dataset=None, **options):
    dataset = probed() if dataset is None else dataset
    trainer = make_trainer(callbacks, **options)
    sampler = EvalSampler(dataset)
    trainer.validate(
        Classifier() if model is None else model, DataLoader(dataset, batch_size=8, sampler=sampler), verbose=False
    )
    return {k: float(v) for k, v in trainer.callback_metrics.items() if "probe" in k}


def _validate(rank, n):
    return validate(
        [AttributeProbe("person", S)],
        dataset=probed(n),
        devices=2,
        strategy=ddp(),
        use_distributed_sampler=False,
    )


def test_the_monitor_on_two_ranks(ranks):
    n = 41
    runs = ranks.run(_validate, n)
    expected = validate([AttributeProbe("person", S)], dataset=probed(n))
    assert runs[0] == pytest.approx(expected, nan_ok=True, abs=0)
    assert runs[1] == pytest.approx(expected, nan_ok=True, abs=0)


def shared(sampler):
    """As Lightning shares a user's sampler out among ranks."""
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=1, shuffle=False)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SequentialSampler, list(range(11))),
        (EvalSampler, list(range(11))),
        (lambda data: DistributedSampler(data, num_replicas=2, rank=1, shuffle=False), [1, 3, 5, 7, 9, 0]),
        (lambda data: shared(SequentialSampler(data)), [1, 3, 5, 7, 9, 0]),
        (lambda data: shared(RandomSampler(data)), None),
        (RandomSampler, None),
    ],
)
def test_samples_are_numbered_where_their_order_is_fixed(sampler, expected):
    data = probed(11)
    batches, state = DataLoader(data, batch_size=4, sampler=sampler(data)), torch.get_rng_state()
    numbers = _numbers(batches, 11 if expected is None else len(expected), torch.device("cpu"))
    assert (None if numbers is None else numbers.tolist()) == expected
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn that training would miss


# -------------------------------------------------------------------------------------------------- as a monitor


class ForwardOnly(Classifier):
    """No loss in validation."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Deep(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.neck = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)))


@pytest.mark.parametrize(
    ("module", "options", "features"),
    [
        (Classifier, {}, lambda m, x: m.backbone(x)),
        (ForwardOnly, {}, lambda m, x: m.backbone(x)),
        (Deep, {"features": "neck.0"}, lambda m, x: m.neck[0](m.backbone(x))),
        (Deep, {"head": "neck.2"}, lambda m, x: m.neck[:2](m.backbone(x))),
        (ForwardOnly, {"features": "backbone", "fit_fraction": 0.7, "shrinkage": 0.3, "seed": 4}, None),
    ],
)
def test_logged_values_are_the_functions(module, options, features):
    model = module()
    logged = validate([AttributeProbe("person", S, **options)], model)
    x, y = probed().tensors[0], persons(41)
    with torch.no_grad():
        f = (model.backbone(x) if features is None else features(model, x)).float()
    kept = {k: v for k, v in options.items() if k in ("fit_fraction", "shrinkage", "seed")}
    expected = probe_attribute(f, y, S, numbers=torch.arange(41), **kept)
    assert logged == pytest.approx({f"val/person_probe/{k}": float(v) for k, v in expected.items()}, rel=1e-6)
    assert logged["val/person_probe/accuracy"] > logged["val/person_probe/shuffled_accuracy"]
    assert not [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_training_is_unchanged_and_every_nth_epoch_is_probed():
    seen = []

    class Look(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if "probe" in k})
            trainer.callback_metrics.clear()

    def run(extra):
        model = Classifier()
        trainer = make_trainer([IdentityAdversarial("person", 5), *extra], max_epochs=4, num_sanity_val_steps=1)
        trainer.fit(model, loader(), val_loader())
        return parameters(model)

    with_probe = run([AttributeProbe("person", S, every_n_epochs=2), Look()])
    assert [bool(values) for values in seen] == [False, False, True, False, True]
    assert same(with_probe, run([]))


def test_several_loaders_and_testing():
    class Tests(Classifier):
        def test_step(self, batch, batch_idx, dataloader_idx):
            F.cross_entropy(self(batch[0]), batch[1])

    trainer = make_trainer([AttributeProbe("person", S), AttributeProbe("place", 3), GroupMonitor("place", 3)])
    loaders = [DataLoader(probed(), batch_size=8), DataLoader(probed(31), batch_size=8)]
    trainer.test(Tests(), loaders, verbose=False)
    for i, n in enumerate((41, 31)):
        alone = validate([AttributeProbe("person", S)], dataset=probed(n))
        for key in ("accuracy", "shuffled_accuracy", "chance"):
            assert float(trainer.callback_metrics[f"test/person_probe/{key}/dataloader_idx_{i}"]) == pytest.approx(
                alone[f"val/person_probe/{key}"], rel=1e-6
            )
    assert "test/place_probe/accuracy/dataloader_idx_1" in trainer.callback_metrics


class TwoLosses(Classifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.other = nn.Linear(4, 2).double()

    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self.other(batch[0]), batch[1])
        F.cross_entropy(self(batch[0]), batch[1])


def test_which_loss():
    assert validate([AttributeProbe("person", S, loss=1)], TwoLosses()) == validate([AttributeProbe("person", S)])
    assert validate([AttributeProbe("person", S, loss=0)], TwoLosses()) != validate([AttributeProbe("person", S)])
    with pytest.raises(DebiasError, match="one loss for AttributeProbe, but got 2"):
        validate([AttributeProbe("person", S)], TwoLosses())


class Spatial(Classifier):
    def forward(self, x):
        return self.head(self.backbone(x)[:, None]).squeeze(1)


class Pairs(Classifier):
    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self(batch[0][:4]), batch[1][:4])


class TwoViews(Classifier):
    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self(torch.cat([batch[0], -batch[0]])), batch[1].repeat(2))


class Sorted(Classifier):
    def validation_step(self, batch, batch_idx):
        order = batch[0][:, 0].argsort()
        F.cross_entropy(self(batch[0][order]), batch[1][order])


class SortedForward(Classifier):
    def validation_step(self, batch, batch_idx):
        self(batch[0][batch[0][:, 0].argsort()])


class NoHead(Classifier):
    def validation_step(self, batch, batch_idx):
        F.cross_entropy(self(batch[0]) / 2, batch[1])


@pytest.mark.parametrize(
    ("module", "options", "error", "match"),
    [
        (Spatial, {}, HeadNotFoundError, r"features to have shape \(N, D\).*\(8, 1, 6\)"),
        (Pairs, {}, RowsError, "each of 8 samples, but got 4"),
        (TwoViews, {}, RowsError, r"each of the 8 samples for AttributeProbe, but got 16.*`features=.*, pool='mean'`"),
        (Sorted, {}, RowsError, "in the order of the batch for AttributeProbe"),
        (SortedForward, {}, RowsError, "in the order of the batch for AttributeProbe"),
        (NoHead, {}, HeadNotFoundError, r"head='dotted\.path'"),
        (Classifier, {"features": "bakbone"}, HeadNotFoundError, "Did you mean 'backbone'"),
        (Classifier, {"attribute": "site"}, BatchKeyError, r"`attribute='site'`.*tag\(dataset, site=ids\)"),
        (Classifier, {"attribute": "many"}, BatchKeyError, "one id per sample"),
        (Classifier, {"n_values": 3}, BadRowsError, "below `n_values=3`"),
    ],
)
def test_what_is_found_while_validating(module, options, error, match):
    options = {"attribute": "person", "n_values": S} | options
    with pytest.raises(error, match=match):
        validate([AttributeProbe(**options)], module(), probed(many=torch.ones(41, 3, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_values": 0}, "`n_values` to be an integer >= 1"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be an integer >= 1"),
        ({"fit_fraction": 1.0}, r"`fit_fraction` to be a number in \(0, 1\)"),
        ({"shrinkage": 2.0}, r"`shrinkage` to be a number in \[0, 1\]"),
        ({"loss": "sum"}, "`loss` to be None, an index >= 0 or a callable, but got 'sum'"),
        ({"attribute": len}, "`name` to be given"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(DebiasError, match=match):
        AttributeProbe(**({"attribute": "person", "n_values": S} | options))


def test_two_probes_of_one_name():
    with pytest.raises(DebiasError, match="would both log `val/person_probe/accuracy`"):
        validate([AttributeProbe("person", S), AttributeProbe("person", S, features="backbone")])
