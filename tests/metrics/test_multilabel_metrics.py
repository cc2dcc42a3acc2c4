"""F1 by label, threshold and group against scikit-learn and against comparing every probability."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _support.f1_oracle import f1
from debias.metrics import MultilabelF1


def test_counts_are_scikit_learns():
    g = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(40, 3, generator=g), (torch.rand(40, 3, generator=g) > 0.7).float()
    targets[torch.rand(40, 3, generator=g) < 0.2] = -1
    groups = torch.randint(-1, 4, (40,), generator=g)  # of some the number is in none of the three
    metric = MultilabelF1(3, n_groups=3, thresholds=9)
    for part in torch.arange(40).split(7):
        metric.update(scores[part], targets[part], groups[part])
    table = metric.compute()
    for t in range(9):
        threshold = torch.arange(1, 10)[t] / 10
        torch.testing.assert_close(table[-1, t], f1(scores, targets, threshold))
        for k in range(3):
            mine = groups == k
            torch.testing.assert_close(table[k, t], f1(scores[mine], targets[mine], threshold), equal_nan=True)


def counts_by_comparison(metric, probabilities, targets, groups):
    """Every probability with every threshold, ``(N, T, A, 3)``."""
    guessed = probabilities.unsqueeze(1) >= metric.thresholds.unsqueeze(1)
    positive, negative = (targets == 1).unsqueeze(1), (targets == 0).unsqueeze(1)
    guessed = guessed | (probabilities.isnan().unsqueeze(1) & negative)  # NaN is wrong
    found = torch.stack([guessed & positive, guessed & negative, ~guessed & positive], -1).long()
    return torch.stack([*(found[groups == g].sum(0) for g in range(metric.n_groups)), found.sum(0)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("thresholds", [1, 9, 99])
def test_counts_are_those_of_comparing_every_probability(dtype, thresholds):
    g = torch.Generator().manual_seed(thresholds)
    metric, expected = MultilabelF1(5, n_groups=3, thresholds=thresholds), 0
    for n in (50, 1, 0, 23):
        scores = torch.rand(n, 5, generator=g).to(dtype)
        on_grid = torch.randint(0, thresholds, (n, 5), generator=g)  # a probability at a threshold is a guess
        scores = torch.where(torch.rand(n, 5, generator=g) < 0.3, metric.thresholds[on_grid].to(dtype), scores)
        scores[torch.rand(n, 5, generator=g) < 0.1] = torch.nan
        scores[torch.rand(n, 5, generator=g) < 0.1] = 1
        scores[torch.rand(n, 5, generator=g) < 0.1] = 0
        targets = torch.randint(-1, 2, (n, 5), generator=g)
        groups = torch.randint(-2, 5, (n,), generator=g)  # some in none of them
        metric.update(scores, targets.float(), groups)
        expected = expected + counts_by_comparison(metric, scores, targets, groups)
        assert torch.equal(metric.counts, expected)


class Sizes(TorchDispatchMode):
    """The largest number of elements that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_memory_does_not_grow_with_samples_times_thresholds():
    metric, n = MultilabelF1(4, n_groups=2, thresholds=99), 600
    with Sizes() as sizes:
        metric.update(torch.rand(n, 4), torch.ones(n, 4), torch.zeros(n).long())
    assert sizes.largest <= max(n * 4, 3 * 3 * 4 * 100)


def test_it_is_where_it_was():
    from debias.monitors import multilabel_f1

    assert multilabel_f1.MultilabelF1 is MultilabelF1
