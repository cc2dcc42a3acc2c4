"""Refits of the last layer against scikit-learn and against the algorithms spelled out in loops."""

import copy
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, loader, make_trainer, problem, same, tagged, val_loader
from _support.runs import ddp
from debias import LastLayerRetraining, retrain_last_layer, tag
from debias.errors import BadRowsError, BatchKeyError, DebiasError, HeadNotFoundError
from debias.functional import afr_weights, balanced_subset, disagreement_scores


def data(n=240, classes=2, seed=0):
    """Rows whose first column tells the class and whose second tells it in most samples: the shortcut."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    place = torch.where(torch.rand(n, generator=g) < 0.85, y, torch.randint(classes, (n,), generator=g))
    x = torch.randn(n, 6, generator=g, dtype=torch.float64)
    x[:, 0] += 1.5 * y
    x[:, 1] = 4 * place + 3 + 0.5 * x[:, 1]
    return x, y, place


def net(classes=2, *, bias=True, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, classes, bias=bias)).double()


def batches(*columns, size=50):
    return [tuple(c[i : i + size] for c in columns) for i in range(0, len(columns[0]), size)]


def features(model, x):
    with torch.no_grad():
        return model[1](model[0](x))


GROUP = {"group": ("target", "place"), "n_groups": (2, 2)}


def named(x, y, place):
    return [{"x": a, "target": b, "place": c} for a, b, c in batches(x, y, place)]


def test_worked_examples():
    p, y = torch.tensor([0.95, 0.9, 0.3, 0.8, 0.2]).double(), torch.tensor([0, 0, 0, 1, 1])
    plain = afr_weights(p, y, gamma=4, balance=False)
    assert plain.tolist() == pytest.approx([0.0266, 0.0325, 0.3581, 0.0485, 0.5343], abs=5e-5)
    assert afr_weights(p, y, gamma=4).tolist() == pytest.approx([0.0206, 0.0252, 0.2773, 0.0563, 0.6206], abs=5e-5)
    assert afr_weights(p, y, gamma=1e5).tolist() == pytest.approx([0, 0, 0, 0, 1])  # exp(-gamma p) is 0 in float64
    early, final = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert disagreement_scores(early, final).item() == pytest.approx(0.155619, abs=1e-6)


def test_a_balanced_subset_holds_as_many_of_each_group():
    groups = torch.tensor([0] * 9 + [1] * 4 + [3] * 20 + [-1] * 5)
    rows = balanced_subset(groups, torch.Generator().manual_seed(0))
    assert torch.bincount(groups[rows]).tolist() == [4, 4, 0, 4]
    assert len(rows.unique()) == 12
    assert not torch.equal(rows, balanced_subset(groups, torch.Generator().manual_seed(1)))


def spelled_out_dfr(x, y, groups, strengths, refits, seed):
    """Deep feature reweighting step by step, with scikit-learn and a loop over groups."""
    g = torch.Generator().manual_seed(seed)
    x = StandardScaler().fit_transform(x.numpy())

    def subset(of):
        order = torch.randperm(len(groups), generator=g).tolist()
        smallest = min(of.count(k) for k in set(of) - {-1})
        return sorted(i for k in set(of) - {-1} for i in [i for i in order if of[i] == k][:smallest])

    def fit(rows, c):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(penalty="l1", C=c, solver="liblinear", tol=1e-6, max_iter=1000, random_state=0)
            return model.fit(x[rows], y.numpy()[rows])

    order = torch.randperm(len(groups), generator=g).tolist()
    first = set()
    for k in set(groups):
        of_group = [i for i in order if groups[i] == k]
        first |= set(of_group[: math.ceil(len(of_group) / 2)])
    rows = subset([k if i in first else -1 for i, k in enumerate(groups)])
    scores = {}
    for c in strengths:
        right = fit(rows, c).predict(x) == y.numpy()
        scores[c] = min(
            np.mean([right[i] for i in range(len(x)) if groups[i] == k and i not in first]) for k in set(groups)
        )
    best = max(scores, key=scores.get)
    models = [fit(subset(groups), best) for _ in range(refits)]
    w, b = np.mean([m.coef_[0] for m in models], 0), np.mean([m.intercept_[0] for m in models])
    return best, scores, x @ w + b


def test_dfr_against_the_algorithm_in_a_loop():
    x, y, place = data()
    model = net()
    expected = spelled_out_dfr(features(model, x), y, (2 * y + place).tolist(), [1.0, 0.1, 0.01], 5, 3)
    fit = retrain_last_layer(
        model, named(x, y, place), input="x", target="target", **GROUP, strengths=[1.0, 0.1, 0.01], refits=5, seed=3
    )
    assert (fit.strength, fit.scores) == (expected[0], pytest.approx(expected[1]))
    assert len(set(fit.scores.values())) > 1
    logits = model.eval()(x).detach()
    np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected[2], rtol=1e-9, atol=1e-9)
    assert torch.equal(model[3].weight, fit.weight)
    assert fit.head == "3"


def test_dfr_repairs_the_worst_group():
    x, y, place = data(2000)
    model = net()
    retrain_last_layer(model, batches(x, y), method="plain")
    model.eval()

    def worst():
        right = (model(x).argmax(1) == y).double()
        return min(right[(y == a) & (place == b)].mean().item() for a in (0, 1) for b in (0, 1))

    before = worst()
    retrain_last_layer(model, named(x, y, place), input="x", target="target", **GROUP, strengths=[0.1])
    assert worst() > before + 0.2


def spelled_out_afr(w, b, f, y, gamma, ridge, lr, steps):
    """Gradient descent with the gradient of softmax regression written out."""
    n, classes = len(f), len(b)

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p = softmax(f @ w.T + b)[np.arange(n), y]
    raw = np.exp(-gamma * p) / np.bincount(y)[y]
    weights = raw / raw.sum()
    w0, b0 = w.copy(), b.copy()
    for _ in range(steps):
        r = weights[:, None] * (softmax(f @ w.T + b) - np.eye(classes)[y])
        gw, gb = r.T @ f + 2 * ridge * (w - w0), r.sum(0) + 2 * ridge * (b - b0)
        scale = min(1, 1 / (math.sqrt((gw**2).sum() + (gb**2).sum()) + 1e-6))
        w, b = w - lr * scale * gw, b - lr * scale * gb
    return w, b


@pytest.mark.parametrize(("classes", "ridge", "lr"), [(2, 0.0, 0.5), (3, 0.1, 0.05), (3, 0.0, 30.0)])
def test_afr_against_the_algorithm_in_a_loop(classes, ridge, lr):
    x, y, _ = data(classes=classes)
    model = net(classes)
    w, b = (p.detach().numpy().copy() for p in model[3].parameters())
    expected = spelled_out_afr(w, b, features(model, x).numpy(), y.numpy(), 5.0, ridge, lr, 40)
    retrain_last_layer(model, batches(x, y), method="afr", gamma=5.0, ridge=ridge, lr=lr, steps=40)
    np.testing.assert_allclose(model[3].weight.detach().numpy(), expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(model[3].bias.detach().numpy(), expected[1], rtol=1e-10, atol=1e-12)


def test_self_keeps_the_samples_of_most_disagreement():
    x, y, _ = data()
    model, early = net(), net(seed=2)
    a, b = (m.eval()(x).detach().softmax(1) for m in (early, model))
    scores = [
        sum(p * math.log(p / q) for p, q in zip(s, t, strict=True)) / 2
        for s, t in zip(a.tolist(), b.tolist(), strict=True)
    ]
    expected = sorted(sorted(range(len(x)), key=lambda i: -scores[i])[:30])
    w, bias = (p.detach().clone().requires_grad_() for p in model[3].parameters())
    f, few = features(model, x)[expected], y[expected]
    counts = torch.bincount(few)
    for _ in range(10):
        losses = nn.functional.cross_entropy(f @ w.T + bias, few, reduction="none")
        grads = torch.autograd.grad(
            sum(x / counts[k] / 2 for x, k in zip(losses, few.tolist(), strict=True)), (w, bias)
        )
        w, bias = ((p - 0.3 * g).detach().requires_grad_() for p, g in zip((w, bias), grads, strict=True))
    for other in (early, early.state_dict(), {"state_dict": early.state_dict()}):
        again = copy.deepcopy(model)
        fit = retrain_last_layer(again, batches(x, y), method="self", early=other, n_selected=30, lr=0.3, steps=10)
        assert fit.selected.tolist() == expected
        torch.testing.assert_close(again[3].weight, w.detach())
        torch.testing.assert_close(again[3].bias, bias.detach())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", ["plain", "balanced"])
def test_plain_and_balanced_refits_are_scikit_learns(classes, method):
    x, y, _ = data(classes=classes)
    keep = (y > 0) | (torch.arange(len(y)) % 4 == 0)
    x, y = x[keep], y[keep]
    model = net(classes)
    f = StandardScaler().fit_transform(features(model, x).numpy())
    weight = "balanced" if method == "balanced" else None
    expected = LogisticRegression(class_weight=weight, tol=1e-6, max_iter=1000).fit(f, y.numpy()).predict_proba(f)
    retrain_last_layer(model, batches(x, y), method=method)
    np.testing.assert_allclose(model.eval()(x).softmax(1).detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_groups_can_be_balanced_without_subsets():
    x, y, place = data()
    model = net()
    f = StandardScaler().fit_transform(features(model, x).numpy())
    groups = (2 * y + place).numpy()
    weights = 1 / np.bincount(groups)[groups]
    expected = LogisticRegression(tol=1e-6, max_iter=1000).fit(f, y.numpy(), weights * len(y) / weights.sum())
    retrain_last_layer(model, named(x, y, place), method="balanced", input="x", target="target", **GROUP)
    found = model.eval()(x).softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected.predict_proba(f), rtol=1e-5, atol=1e-7)


def test_one_binary_output_is_the_fit_of_two_classes():
    x, y, place = data()
    two, one = net(2), net(1)
    one[0].load_state_dict(two[0].state_dict())
    options = {"input": "x", "target": "target", **GROUP, "strengths": [0.3, 0.03], "refits": 3}
    retrain_last_layer(two, named(x, y, place), **options)
    retrain_last_layer(one, named(x, y.double(), place), **{**options, "group": ("place",), "n_groups": (2,)})
    retrain_last_layer(
        one,
        [{**b, "target": b["target"].double(), "g": 2 * b["target"] + b["place"]} for b in named(x, y, place)],
        **{**options, "group": "g", "n_groups": 4},
    )
    z = two.eval()(x)
    torch.testing.assert_close(one.eval()(x).squeeze(1), z[:, 1] - z[:, 0])


def test_every_label_is_fitted_on_its_own_samples():
    x, y, place = data()
    labels = torch.stack([y, place, (x[:, 2] > 0).long()], 1)
    labels[::7, 1] = -1
    model = net(3)
    f = StandardScaler().fit_transform(features(model, x).numpy())
    retrain_last_layer(model, batches(x, labels.double()), method="balanced")
    logits = model.eval()(x).detach().numpy()
    for k in range(3):
        known = (labels[:, k] >= 0).numpy()
        target = labels[:, k].numpy()[known]
        # Each label's weights sum to the number of samples, as they do where none is missing.
        weights = 1 / np.bincount(target)[target]
        own = LogisticRegression(tol=1e-6, max_iter=1000).fit(f[known], target, weights * len(x) / weights.sum())
        np.testing.assert_allclose(logits[:, k], own.decision_function(f), rtol=1e-4, atol=1e-5)


def test_a_head_without_bias_stays_without():
    x, y, _ = data()
    model = net(bias=False)
    retrain_last_layer(model, batches(x, y), method="plain")
    f = features(model, x)
    scaled = (f / f.std(0, correction=0)).numpy()
    own = LogisticRegression(fit_intercept=False, tol=1e-6, max_iter=1000).fit(scaled, y.numpy())
    np.testing.assert_allclose(
        model.eval()(x).softmax(1).detach().numpy(), own.predict_proba(scaled), rtol=1e-5, atol=1e-7
    )
    assert list(model.state_dict()) == ["0.weight", "0.bias", "3.weight"]


def test_the_module_is_left_as_it_was_but_for_its_head():
    x, y, _ = data()
    model = net()
    model.train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    retrain_last_layer(model, batches(x, y), method="plain")
    assert [m.training for m in model] == [False, True, True, True]
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == ["3.weight", "3.bias"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_numbered_samples_count_once_and_in_the_order_of_the_set():
    x, y, _ = data(60)
    dataset = tag(TensorDataset(x, y), index=range(60))
    shuffled = [5, 3, 5, *range(59, -1, -1), 3]
    once, twice = net(), net()
    retrain_last_layer(once, DataLoader(dataset, 20), method="plain")
    retrain_last_layer(twice, DataLoader(dataset, 20, sampler=shuffled), method="plain")
    assert same(once.state_dict(), twice.state_dict())


BAD = [
    ({"method": "dfr"}, DebiasError, "`group` and `n_groups` for `method='dfr'`"),
    ({"method": "self"}, DebiasError, "`early` for `method='self'`"),
    ({"method": "lasso"}, DebiasError, "`method` to be 'dfr', 'afr'"),
    ({"method": "plain", "strengths": [1.0, 0.1]}, DebiasError, "one number in `strengths`"),
    ({"group": 2}, DebiasError, "`n_groups`, the number of groups of `group=2`"),
    ({"group": 2, "n_groups": 3}, DebiasError, "(?s)samples of every group.*none of group 2"),
    ({"group": 2, "n_groups": 1}, BadRowsError, "group ids below `n_groups=1`"),
    ({"method": "plain", "head": "1"}, HeadNotFoundError, "plain `nn.Linear`.*got Tanh"),
    ({"method": "plain", "head": "4"}, HeadNotFoundError, "Did you mean|There are"),
    ({"method": "plain", "target": 0}, BatchKeyError, r"class ids of shape \(50,\), or labels"),
    ({"method": "plain", "gamma": -1}, DebiasError, "`gamma`"),
    ({"method": "plain", "seed": 0.5}, DebiasError, "`seed` to be an integer"),
    ({"method": "plain", "strengths": [-1.0]}, DebiasError, "`strengths` to be a number > 0, but got -1.0"),
    ({"method": "plain", "n_groups": 0}, DebiasError, "`n_groups` to be a number in"),
    ({"method": "self", "early": 3}, DebiasError, "`early` to be a module, a state dict or the path"),
    (
        {"method": "self", "early": "nowhere.ckpt"},
        DebiasError,
        "`early` to be a checkpoint.*nowhere.ckpt failed",
    ),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_input(options, error, match):
    x, y, place = data()
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        retrain_last_layer(model, batches(x, y, place), **options)
    assert same(before, model.state_dict())


def test_bad_data():
    x, y, _ = data()
    one = torch.where(torch.arange(len(y)) == 0, 1, 0)
    with pytest.raises(DebiasError, match=r"at least two held-out samples of each group.*group 1 has one"):
        retrain_last_layer(net(), batches(x, y, one), group=2, n_groups=2)
    with pytest.raises(DebiasError, match=r"(?s)each of the 3 classes.*none of class 2"):
        retrain_last_layer(net(3), batches(x, y), method="plain")
    with pytest.raises(BatchKeyError, match="one-hot classes"):
        retrain_last_layer(net(), batches(x, nn.functional.one_hot(y)), method="plain")
    with pytest.raises(BadRowsError, match="finite features"):
        retrain_last_layer(net(), batches(x / 0, y), method="plain")
    with pytest.raises(DebiasError, match="yields no batch"):
        retrain_last_layer(net(), [], method="plain")
    with pytest.raises(HeadNotFoundError, match="no layer was found"):
        retrain_last_layer(nn.Sequential(net(), nn.Softmax(1)), batches(x, y), method="plain")
    with pytest.raises(DebiasError, match="weights of the same network"):
        retrain_last_layer(net(), batches(x, y), method="self", early=net(3).state_dict())


# -- the callback ----------------------------------------------------------------------------------


def run(rank=0, sizes=(16,), method="dfr", **options):
    model = Classifier()
    options = {"group": "place", "n_groups": 3, "strengths": [0.5, 0.1], "refits": 2} if method == "dfr" else options
    callback = LastLayerRetraining(method=method, **options)
    many = {"devices": 2, "strategy": ddp(), "use_distributed_sampler": False} if len(sizes) > 1 else {}
    trainer = make_trainer([callback], **many)
    last = (0,) * len(sizes)
    held_out = tag(problem(45, seed=1), place=torch.arange(45) % 3, index=range(45))
    sampler = list(range(45))[rank :: len(sizes)]
    # Two ranks, one with a sample that the other has as well, as a padding sampler makes it.
    sampler = sampler if len(sizes) == 1 else [*sampler, 0]
    trainer.fit(model, loader(32, sizes=sizes, last=last, rank=rank), _Unpadded(held_out, sampler))
    return {"head": copy.deepcopy(model.head.state_dict()), "weight": callback.fit.weight}


class _Unpadded(DataLoader):
    def __init__(self, dataset, rows):
        from torch.utils.data import DistributedSampler

        class Rows(DistributedSampler):
            def __iter__(self):
                return iter(rows)

            def __len__(self):
                return len(rows)

        super().__init__(dataset, 8, sampler=Rows(dataset, num_replicas=1, rank=0))


@pytest.mark.parametrize("method", ["dfr", "afr"])
def test_two_ranks_refit_as_one_process(ranks, method):
    first, second = ranks.run(run, (8, 8), method)
    assert same(first, second)
    whole = run(method=method)
    for key in ("weight", "bias"):
        torch.testing.assert_close(first["head"][key], whole["head"][key], rtol=1e-9, atol=1e-12)


def test_the_callback_refits_at_the_end(tmp_path):
    class Seen(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.weight = pl_module.head.weight.detach().clone()

    seen, model = Seen(), Classifier()
    callback = LastLayerRetraining(method="afr", steps=5)
    trainer = make_trainer([seen, callback])
    trainer.fit(model, loader(bare=True), val_loader(bare=True))
    assert not torch.equal(seen.weight, model.head.weight)
    assert torch.equal(callback.fit.weight, model.head.weight)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again = Classifier()
    again.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    assert same(model.state_dict(), again.state_dict())
    assert not set(vars(model)) & {"training_step", "validation_step"}


def test_the_callback_sees_batches_as_steps_do():
    class Changed(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [2 * batch[0] + 1, batch[1]]

    def twice(dataset):
        x, y = dataset[:]
        return DataLoader(TensorDataset(2 * x + 1, y), 16)

    changed, model = Changed(), Classifier()
    make_trainer([LastLayerRetraining(method="plain")]).fit(changed, loader(bare=True), val_loader(bare=True))
    make_trainer([LastLayerRetraining(method="plain")]).fit(model, twice(problem()), twice(problem(21, seed=1)))
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(changed.parameters(), model.parameters(), strict=True))


def test_the_callback_changes_nothing_in_training():
    plain, watched = Classifier(), Classifier()
    trainer = make_trainer([])
    trainer.fit(plain, loader(bare=True), val_loader(bare=True))
    callback = LastLayerRetraining(method="plain")
    make_trainer([callback]).fit(watched, loader(), val_loader())
    assert same(plain.backbone.state_dict(), watched.backbone.state_dict())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(
    ("options", "fitted", "match"),
    [
        ({"method": "plain"}, "nothing", "a validation set to refit"),
        ({"method": "plain", "head": "backbone.3"}, "val", "plain `nn.Linear`"),
        ({"group": "place", "n_groups": 5}, "val", "(?s)every group.*none of groups 3, 4"),
        ({"group": "person", "n_groups": 5}, "few", "two held-out samples of each group.*group 4 has one"),
        ({"group": "nowhere", "n_groups": 3}, "val", "`group='nowhere'` to name a part of the batch or a tag"),
        ({"method": "balanced"}, "one class", "samples of each of the 2 classes.*none of class 1"),
        ({"method": "plain"}, "another class", "class ids below 2, the number of the head's classes, but got 2"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_start(options, fitted, match):
    x, y = problem(9, seed=1)[:]
    targets = {"one class": torch.zeros_like(y), "another class": y.clamp(min=0) + torch.tensor([1] * 9)}.get(fitted, y)
    val = {"nothing": None, "val": val_loader()}.get(fitted, DataLoader(tagged(TensorDataset(x, targets)), 4))
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DebiasError, match=match):
        make_trainer([LastLayerRetraining(**options)]).fit(model, loader(), val)
    assert same(before, model.state_dict())


class Masked(Classifier):
    """A network with two arguments."""

    def forward(self, x, mask):
        return super().forward(x * mask)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(Masked.forward(self, batch[0], batch[0] > 0), batch[1])

    validation_step = None


class OneArgument(Masked):
    def forward(self, x):
        return super().forward(x, x > 0)


@pytest.mark.parametrize(
    "input", [lambda batch: (batch[0], batch[0] > 0), lambda batch: {"x": batch[0], "mask": batch[0] > 0}]
)
def test_a_network_with_several_arguments(input):
    ends = []
    for model, key in ((Masked(), input), (OneArgument(), 0)):
        callback = LastLayerRetraining(method="afr", steps=5, input=key, on="train")
        make_trainer([callback]).fit(model, loader())
        ends.append(callback.fit.weight)
    assert torch.equal(*ends)


@pytest.mark.parametrize("input", [0, lambda batch: {"mask": batch[0]}, lambda batch: (*batch, 0)])
def test_arguments_that_a_network_has_not(input):
    with pytest.raises(BatchKeyError, match=r"what `forward\(x, mask\)` of Masked takes.*`lambda batch: \(batch,\)`"):
        make_trainer([LastLayerRetraining(method="afr", input=input, on="train")]).fit(Masked(), loader())


def test_the_held_out_set_may_be_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(val_loader(bare=True).dataset)

    callback, model = LastLayerRetraining(method="plain"), Classifier()
    make_trainer([callback]).fit(model, loader(), DataLoader(Stream(), 4))
    assert callback.fit.n_samples == 21
