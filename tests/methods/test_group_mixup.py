"""GroupMixup: pairs that keep LISA's rules, inputs and losses against loops, other methods beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from _support.cases import METHODS
from _support.fits import make_trainer, parameters, same
from _support.images import Pictures, batches, train
from debias import Debiaser, GroupDRO, GroupMixup, GroupMixupLayer, MixStyle
from debias.errors import BatchKeyError, DebiasError
from debias.functional import cutmix, mixup, selective_pairs
from debias.ops.distributed import global_sum
from debias.ops.pairs import cutmix_box, random_partners

ids = st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)), min_size=1, max_size=12)


def drawn(pairs, labels, domains, seed, **options):
    layer = GroupMixupLayer(pairs, **options)
    return layer.draw(torch.Generator().manual_seed(seed), torch.Size([len(labels), 2]), labels, domains)


# ------------------------------------------------------------ pairs


@given(ids, st.integers(0, 50), st.sampled_from(["same_label", "same_domain"]))
def test_pairs_keep_their_rule(rows, seed, pairs):
    labels, domains = torch.tensor(rows).unbind(1)
    partners, _, _ = drawn(pairs, labels, domains, seed)
    for i, j in enumerate(partners.tolist()):
        (y, d), others = rows[i], [(k, row) for k, row in enumerate(rows) if min(row) >= 0 and min(rows[i]) >= 0]
        if pairs == "same_label":
            allowed = [k for k, (label, domain) in others if label == y and domain != d]
        else:
            allowed = [k for k, (label, domain) in others if label != y and domain == d]
        assert j in (allowed or [i])


@given(ids, st.integers(0, 50))
def test_selective_pairs_keep_one_of_the_rules(rows, seed):
    labels, domains = torch.tensor(rows).unbind(1)
    partners, _, _ = drawn("selective", labels, domains, seed)
    moved = partners != torch.arange(len(rows))
    same_label, same_domain = (x[moved] == x[partners[moved]] for x in (labels, domains))
    assert (same_label ^ same_domain).all()
    assert same_label.all() or same_domain.all()  # one rule a batch


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_rule_is_drawn_with_its_probability(p):
    labels, domains = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    by_label = sum(
        bool((labels == labels[drawn("selective", labels, domains, seed, p_same_label=p)[0]]).all())
        for seed in range(400)
    )
    assert by_label == pytest.approx(400 * p, abs=35 if 0 < p < 1 else 0)


def test_a_class_with_one_domain_stays_as_it_is():
    """Class 1 lives in domain 0 only: nobody to mix with under the first rule."""
    layer = GroupMixupLayer("same_label")
    labels, domains = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 0, 0, -1])
    x = torch.randn(5, 3)
    mixed, partners, shares = layer(x, labels, domains)
    assert partners.tolist() == [1, 0, 2, 3, 4]
    assert torch.equal(mixed[2:], x[2:])
    assert shares[2:].tolist() == [1, 1, 1]
    assert not torch.equal(mixed[:2], x[:2])


def test_pairs_by_the_definition():
    labels, domains = torch.tensor([0, 0, 1, -1]), torch.tensor([0, 1, 1, 0])
    assert selective_pairs(labels, domains, same_label=True).nonzero().tolist() == [[0, 1], [1, 0]]
    assert selective_pairs(labels, domains, same_label=False).nonzero().tolist() == [[1, 2], [2, 1]]


# ------------------------------------------------------------ inputs


def test_mixup_by_the_definition():
    x = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
    partners, shares = torch.tensor([1, 0, 3, 3]), torch.tensor([0.25, 0.5, 1.0, 0.1], dtype=torch.float64)
    rows = [shares[i] * x[i] + (1 - shares[i]) * x[int(j)] for i, j in enumerate(partners)]
    torch.testing.assert_close(mixup(x, partners, shares), torch.stack(rows))
    assert torch.autograd.gradcheck(lambda x: mixup(x, partners, shares), x)


def test_cutmix_by_the_definition():
    x = torch.arange(2 * 1 * 4 * 5.0).view(2, 1, 4, 5)
    mixed, share = cutmix(x, torch.tensor([1, 0]), (1, 3, 2, 5))
    for i in range(2):
        for row in range(4):
            for column in range(5):
                source = 1 - i if 1 <= row < 3 and 2 <= column < 5 else i
                assert mixed[i, 0, row, column] == x[source, 0, row, column]
    assert share == pytest.approx(1 - 6 / 20)
    assert torch.equal(x, torch.arange(40.0).view(2, 1, 4, 5))  # the old batch is as it was


@given(
    st.floats(0, 1),
    st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_boxes_lie_in_the_image(share, center, size):
    top, bottom, left, right = cutmix_box(share, center, size)
    assert 0 <= top <= bottom <= size[0]
    assert 0 <= left <= right <= size[1]
    assert (bottom - top) * (right - left) <= (1 - share) * size[0] * size[1] + 1e-9


def test_a_box_in_the_middle_has_the_drawn_area():
    top, bottom, left, right = cutmix_box(0.75, (0.5, 0.5), (64, 32))
    assert (bottom - top) * (right - left) == 0.25 * 64 * 32


# ------------------------------------------------------------ the callback


class Recorded(GroupMixup):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = []

    def augment(self, step):
        x, y = step.batch
        super().augment(step)
        place = step.tags.get("place")
        self.kept.append((x, y, place, *self.random._draws.get("mix", [None]), step.batch[0]))


class Mixed(Pictures):
    def __init__(self):
        super().__init__()
        self.logits, self.losses, self.accuracies = [], [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            logits = self(batch[0])
        self.logits.append(logits)
        self.losses.append(loss.detach())
        self.accuracies.append((logits.argmax(1) == batch[1]).double().mean())
        return loss


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("pairs", ["any", "same_label", "same_domain", "selective"])
def test_inputs_and_loss_are_those_of_the_recorded_draws(pairs, mix):
    model = Mixed()
    callback = Recorded("place", pairs=pairs, mix=mix, p=0.8)
    train(model, [callback], max_epochs=2)
    moved = 0
    for i, (x, y, place, draws, new) in enumerate(callback.kept):
        seen_x, seen_y, loss = model.seen[i]
        assert torch.equal(seen_y, y)  # hard labels, in their order
        assert seen_x is new
        if draws is None:
            torch.testing.assert_close(loss, F.cross_entropy(model.logits[i], y))
            assert torch.equal(new, x)
            continue
        partners, share, box = draws
        total = 0.0
        for j, partner in enumerate(partners.tolist()):
            expected, kept = x[j].clone(), share
            if box is not None:
                top, bottom, left, right = box
                expected[:, top:bottom, left:right] = x[partner][:, top:bottom, left:right]
                kept = 1 - (bottom - top) * (right - left) / 36
            elif partner != j:
                expected = share * x[j] + (1 - share) * x[partner]
            torch.testing.assert_close(new[j], expected)
            z = model.logits[i][j : j + 1]
            total += kept * F.cross_entropy(z, y[j : j + 1]) + (1 - kept) * F.cross_entropy(z, y[partner : partner + 1])
            moved += partner != j
            if partner != j and pairs == "same_label":
                assert y[j] == y[partner]
                assert place[j] != place[partner]
        torch.testing.assert_close(loss, total / len(x))
    assert moved > 10


def test_plain_mixup_needs_neither_labels_nor_domains():
    model = Pictures()
    train(model, [GroupMixup(pairs="any")], bare=True)
    assert not same(parameters(model), parameters(Pictures()))


def test_probability_zero_is_plain_training():
    plain, other = Pictures(), Pictures()
    train(plain, bare=True)
    train(other, [GroupMixup("place", p=0.0)])
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(other)[key], value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [1, 3])
def test_small_and_odd_batches(n):
    model = Pictures()
    make_trainer([GroupMixup("place", mix="cutmix")]).fit(model, batches(n, sizes=(n,), last=(0,)))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("pairs", ["any", "same_label", "same_domain", "selective"])
def test_an_empty_batch_stays_empty(pairs):
    none = torch.zeros(0, dtype=torch.long)
    mixed, partners, shares = GroupMixupLayer(pairs)(torch.zeros(0, 3), none, none)
    assert mixed.shape == (0, 3)
    assert partners.tolist() == shares.tolist() == []
    assert random_partners(torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, 0)).dtype == torch.long


def test_evaluation_is_untouched():
    layer = GroupMixupLayer("any").eval()
    x = torch.randn(4, 3)
    mixed, partners, shares = layer(x)
    assert mixed is x
    assert partners.tolist() == [0, 1, 2, 3]
    assert shares.tolist() == [1, 1, 1, 1]


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "`domain` with `pairs='selective'`, but got None"),
        ({"domain": "place", "pairs": "all"}, "`pairs` to be 'any', 'same_label', 'same_domain' or 'selective'"),
        ({"domain": "place", "mix": "manifold"}, "`mix` to be 'mixup' or 'cutmix'"),
        ({"domain": "place", "alpha": 0}, "`alpha` to be a number > 0"),
        ({"domain": "place", "alpha": float("inf")}, "`alpha` to be a number > 0, but got inf"),
        ({"domain": "place", "p": 2}, r"`p` to be a number in \[0, 1\], but got 2"),
        ({"domain": "place", "p_same_label": -1}, "`p_same_label` to be a number in"),
        ({"domain": ("place", 1)}, "`n_domains` to hold one number for each key"),
    ],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(DebiasError, match=match):
        GroupMixup(**options)


class Never(Pictures):
    def training_step(self, batch, batch_idx):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input": 1}, "`input=1` to be a tensor .* of a floating-point type, but got .* of torch.int64"),
        ({"input": "image"}, "`input='image'` to name a part of the batch"),
        ({"target": 0}, "`target=0` to hold integer ids"),
        ({"domain": "members"}, "`domain` of GroupMixup to hold one id per sample"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_the_step(options, match):
    loader = batches(members=torch.ones(23, 2, dtype=torch.bool))
    with pytest.raises(BatchKeyError, match=match):
        make_trainer([GroupMixup(**({"domain": "place"} | options))]).fit(Never(), loader)


def test_vectors_cannot_be_cut():
    data = torch.utils.data.TensorDataset(torch.rand(4, 3), torch.arange(4))
    with pytest.raises(BatchKeyError, match=r"`input=0` to be images \(N, C, H, W\)"):
        make_trainer([GroupMixup(pairs="any", mix="cutmix")]).fit(Never(), torch.utils.data.DataLoader(data))


# ------------------------------------------------------------ with other methods


class Spread(Debiaser):
    """V-REx on three places."""

    def sample_ids(self, step):
        return step.ids("place", 3)

    def penalise(self, call, step):
        members = call.of_rows(self.sample_ids(step)).unsqueeze(1) == torch.arange(3)
        num = global_sum((members * call.num.unsqueeze(1)).sum(0))
        den = global_sum((members * call.den.unsqueeze(1)).sum(0))
        losses = (num / den.clamp_min(1e-12))[den > 0]
        return 0.5 * losses.var(correction=0)


def test_penalties_see_soft_memberships():
    model, plain = Pictures(), Pictures()
    callback = Recorded("place", pairs="any")
    train(model, [callback, Spread()])
    optimizer = plain.configure_optimizers()
    for x, y, place, (partners, share, _), new in callback.kept:
        z = plain(new)
        pairs = [(j, k, s) for j, p in enumerate(partners.tolist()) for k, s in ((j, share), (p, 1 - share))]
        losses = [(place[k], s, F.cross_entropy(z[j : j + 1], y[k : k + 1])) for j, k, s in pairs]
        means = [
            sum(s * loss for g, s, loss in losses if g == group) / sum(s for g, s, _ in losses if g == group)
            for group in range(3)
            if any(g == group for g, _, _ in losses)
        ]
        loss = sum(s * loss for _, s, loss in losses) / len(x) + 0.5 * torch.stack(means).var(correction=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[key], value, rtol=1e-11, atol=1e-11)


def test_with_styles_and_group_dro():
    """Input first, then features, then the loss, whatever the order in the list."""

    def run(order):
        made = {
            "mixup": GroupMixup("place"),
            "style": MixStyle(["stem"], p=1.0),
            "dro": GroupDRO("place", 3, step_size=0.3),
        }
        model = Pictures()
        train(model, [made[name] for name in order], max_epochs=2)
        return parameters(model), made["dro"].module.log_weights.clone()

    reference = run(["mixup", "style", "dro"])
    for order in (["dro", "style", "mixup"], ["style", "mixup", "dro"]):
        assert same(reference, run(order))
    for fewer in (["mixup", "dro"], ["style", "dro"], ["mixup", "style", "dro"]):
        changed = run(fewer)
        assert same(reference, changed) == (len(fewer) == 3)


# They put a criterion of their own in the place of the loss, or keep a record of each sample.
OF_WHOLE_SAMPLES = {"ClassBalanced", "FocalLoss", "LDAM", "LearningFromFailure", "LogitAdjustment"}


@pytest.mark.parametrize("name", sorted(OF_WHOLE_SAMPLES & set(METHODS)))
def test_methods_that_need_whole_samples_refuse_mixed_ones(name):
    from _support.cases import build
    from _support.fits import Classifier
    from _support.fits import train as train_rows

    with pytest.raises(DebiasError, match="an augmentation mixes"):
        train_rows(Classifier(), [GroupMixup("place"), *build(name)])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {"GroupMixup", *OF_WHOLE_SAMPLES}])
def test_beside_every_other_method(name):
    """Every pair trains to finite numbers, and differently from the method alone."""
    from _support.cases import build
    from _support.fits import Classifier
    from _support.fits import train as train_rows

    alone, both = Classifier(), Classifier()
    train_rows(alone, build(name))
    train_rows(both, [GroupMixup("place"), *build(name)])
    assert all(torch.isfinite(p).all() for p in both.parameters())
    assert not same(parameters(alone), parameters(both))
