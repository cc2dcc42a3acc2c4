"""Inferred groups against worked examples, brute force and loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_samples

from debias.errors import DebiasError
from debias.functional import (
    cluster_weights,
    eiil_groups,
    eiil_scores,
    error_groups,
    george_groups,
    spare_groups,
    useful_groups,
)

Z = torch.tensor([2, 1.5, -1, 0.8, -2, -0.5], dtype=torch.float64)
Y = torch.tensor([1, 1, 1, 0, 0, 0])


def objective(scores, s):
    return ((scores * s).mean() ** 2 + (scores * (1 - s)).mean() ** 2) / 2


def test_eiils_worked_example_and_brute_force():
    scores = eiil_scores(Z, Y)
    assert scores.tolist() == pytest.approx([-0.2384, -0.2736, 0.7311, 0.5520, -0.2384, -0.1888], abs=5e-5)
    split = eiil_groups(Z, Y)
    assert split.tolist() == [0, 0, 1, 1, 0, 0]
    assert objective(scores, split.double()).item() == pytest.approx(0.035116, abs=5e-7)
    assert objective(scores, torch.full((6,), 0.5)).item() == pytest.approx(0.000821, abs=5e-7)
    best = max(objective(scores, torch.tensor(s, dtype=torch.float64)) for s in itertools.product((0, 1), repeat=6))
    assert objective(scores, split.double()) == best
    assert torch.equal(split, error_groups(Z, Y))


def test_eiils_scores_are_the_derivative_of_the_loss_by_a_scale():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20, 4, generator=g, dtype=torch.float64)
    y = torch.randint(4, (20,), generator=g)
    scale = torch.ones(20, 1, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(z * scale, y, reduction="sum").backward()
    torch.testing.assert_close(eiil_scores(z, y), scale.grad.squeeze(1), rtol=1e-12, atol=1e-14)
    labels = torch.randint(2, (20, 4), generator=g)
    scale = torch.ones(20, 1, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.binary_cross_entropy_with_logits(z * scale, labels.double(), reduction="sum").backward()
    torch.testing.assert_close(eiil_scores(z, labels), scale.grad.squeeze(1), rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31))
def test_no_soft_split_beats_the_sign(seed):
    """Gradient ascent on the reference's soft objective, from several starts, also inside each class."""
    g = torch.Generator().manual_seed(seed)
    z, y = 2 * torch.randn(12, 3, generator=g, dtype=torch.float64), torch.randint(3, (12,), generator=g)
    scores, split = eiil_scores(z, y), eiil_groups(z, y).double()
    for chosen in (torch.ones(12, dtype=torch.bool), *(y == c for c in range(3))):
        if chosen.any():
            own = objective(scores[chosen], split[chosen])
            s = torch.rand(10, int(chosen.sum()), generator=g, dtype=torch.float64)
            for _ in range(30):
                slope = (scores[chosen] * (2 * s - 1)).mean(1, keepdim=True)
                s = (s + slope * scores[chosen]).clamp(0, 1)
            for each in s:
                assert objective(scores[chosen], each) <= own + 1e-12


def test_two_classes_make_eiil_the_error_set():
    g = torch.Generator().manual_seed(1)
    z, y = torch.randn(200, 2, generator=g), torch.randint(2, (200,), generator=g)
    assert torch.equal(eiil_groups(z, y), error_groups(z, y))
    assert torch.equal(eiil_groups(z, y, per_class=True), 2 * y + error_groups(z, y))


def test_errors_of_binary_and_multi_label_outputs():
    assert error_groups(torch.tensor([[0.3], [-0.1]]), torch.tensor([1, 1])).tolist() == [0, 1]
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert error_groups(torch.tensor([[2.0, -1.0], [2.0, 1.0]]), labels).tolist() == [0, 1]
    with pytest.raises(DebiasError, match=r"(?s)`logits` of shape \(N, C\).*\(3, 2\) and \(2,\)"):
        error_groups(torch.zeros(3, 2), torch.tensor([0, 1]))


def blobs(sizes, centres, labels, *, spread=0.05, seed=0):
    rng = np.random.RandomState(seed)
    x = np.concatenate([c + spread * rng.randn(n, 2) for n, c in zip(sizes, np.asarray(centres), strict=True)])
    order = rng.permutation(len(x))
    blob = np.repeat(np.arange(len(sizes)), sizes)
    return torch.tensor(x[order]), torch.tensor(np.asarray(labels)[blob][order]), torch.tensor(blob[order])


def test_spare_finds_clusters_class_by_class_and_their_number():
    x, y, blob = blobs((60, 12, 40, 25, 9), [(0, 0), (3, 0), (0, 0), (3, 0), (0, 3)], [0, 0, 1, 1, 1])
    ids, scores = spare_groups(x, y)
    assert torch.equal(ids, blob)  # numbered class by class, the largest first: as they were made
    for label in (0, 1):
        each = silhouette_samples(x[y == label].numpy(), blob[y == label].numpy())
        assert scores[label].item() == pytest.approx(each.mean(), rel=1e-12)
    flipped, _ = spare_groups(x.flip(0), y.flip(0))
    assert torch.equal(flipped.flip(0), ids)  # the order of samples does not matter


def test_spare_refuses_a_class_that_is_too_small():
    x, y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    with pytest.raises(DebiasError, match=r"(?s)at least 2 different rows.*class 1 has 1 samples"):
        spare_groups(x, y, n_clusters=2)


def test_cluster_weights_against_a_loop():
    """SPARE's power of 2 turns an imbalance of 90 to 10 round."""
    groups = torch.tensor([0] * 90 + [1] * 10 + [2] * 30 + [3] * 20)
    targets = torch.tensor([0] * 100 + [1] * 50)
    for silhouettes, powers in ((None, (1, 1)), (torch.tensor([0.5, 0.95]), (2, 1))):
        weights = cluster_weights(groups, targets, silhouettes=silhouettes)
        for label, power in enumerate(powers):
            raw = [int((groups == g).sum()) ** -power for g in groups[targets == label].tolist()]
            expected = [r / sum(raw) / 2 for r in raw]
            assert weights[targets == label].tolist() == pytest.approx(expected, rel=1e-12)
    assert weights[groups == 0].sum().item() == pytest.approx(0.05)  # 0.1 of its class's half
    assert weights.sum().item() == pytest.approx(1)


def test_george_chooses_the_number_by_the_mean_over_clusters():
    x, y, blob = blobs((80, 10, 45, 20, 15), [(3, 1), (1, 3), (3, 1), (1, 3), (-3, 1)], [0, 0, 1, 1, 1])
    for options in ({"clusterer": "kmeans"}, {"clusterer": "gmm"}, {"n_components": 2, "clusterer": "kmeans"}):
        ids, scores = george_groups(x, y, max_clusters=4, **options)
        assert torch.equal(ids, blob)
        assert (scores > 0.9).all()
    with pytest.raises(DebiasError, match="'gmm' or 'kmeans'"):
        george_groups(x, y, clusterer="umap")


def test_useful_takes_the_cluster_with_the_higher_loss():
    x, y, blob = blobs((60, 12, 40, 25), [(0, 0), (3, 0), (0, 0), (3, 0)], [0, 0, 1, 1])
    losses = torch.where((blob == 0) | (blob == 3), 2.0, 0.5)
    slow = useful_groups(x, y, losses)
    assert torch.equal(slow, ((blob == 0) | (blob == 3)).long())
    assert torch.equal(useful_groups(x, y, losses, per_class=True), 2 * y + slow)


def test_a_class_that_is_absent_has_no_score():
    x, y, _ = blobs((20, 20), [(0, 0), (3, 0)], [2, 2])
    ids, scores = spare_groups(x, y, n_clusters=2)
    assert ids.unique().tolist() == [0, 1]
    assert [math.isnan(s) for s in scores.tolist()] == [True, True, False]
