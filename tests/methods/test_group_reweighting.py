"""Fixed group weights against scikit-learn's balanced weights and against a loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_sample_weight

from _support.fits import Classifier, train
from debias import GroupReweighting, GroupReweightingLoss
from debias.errors import BadRowsError, DebiasError
from debias.functional import inverse_frequency_weights

COUNTS = [50, 30, 15, 5]


def test_inverse_frequency_is_scikit_learns_balanced():
    groups = np.repeat(np.arange(4), COUNTS)
    expected = compute_sample_weight("balanced", groups)[np.cumsum(COUNTS) - 1]
    found = inverse_frequency_weights(torch.tensor(COUNTS, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.floats(0, 2))
def test_the_mean_weight_over_the_training_set_is_one(counts, power):
    counts = torch.tensor(counts, dtype=torch.float64)
    weights = inverse_frequency_weights(counts, power=power)
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-12)
    ratio = weights[0] / weights[-1]
    assert float(ratio) == pytest.approx(math.pow(float(counts[-1] / counts[0]), power), rel=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_loss_and_gradient_against_a_loop(power):
    raw = [n**-power for n in COUNTS]
    scale = sum(COUNTS) / sum(r * n for r, n in zip(raw, COUNTS, strict=True))
    losses = torch.tensor([1.0, 2.0, 0.5, 4.0, 9.0], dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 3, 3, 1, -1])
    value = GroupReweightingLoss(4, power, COUNTS)(losses, groups)
    value.backward()
    weights = [scale * raw[k] if k >= 0 else 0.0 for k in groups.tolist()]
    expected = math.fsum(w * x for w, x in zip(weights, losses.tolist(), strict=True)) / 4
    assert value.item() == pytest.approx(expected, rel=1e-13)
    assert losses.grad.tolist() == pytest.approx([w / 4 for w in weights], rel=1e-13)


def test_power_zero_is_plain_training():
    losses = torch.rand(7, dtype=torch.float64)
    value = GroupReweightingLoss(4, 0.0, COUNTS)(losses, torch.tensor([0, 1, 2, 3, 0, 0, 1]))
    assert float(value) == pytest.approx(float(losses.mean()), rel=1e-13)


def test_in_expectation_every_group_counts_the_same():
    """Over one pass of the training set the weighted loss is the mean of the group means."""
    losses = torch.rand(sum(COUNTS), dtype=torch.float64)
    groups = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    value = GroupReweightingLoss(4, 1.0, COUNTS)(losses, groups)
    expected = torch.stack([losses[groups == k].mean() for k in range(4)]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)


def test_gradcheck():
    criterion = GroupReweightingLoss(4, 1.0, COUNTS)
    losses = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: criterion(x, torch.tensor([0, 1, 1, 3, -1])), losses)


@pytest.mark.parametrize("power", [60.0, 1e6])
def test_powers_of_counts_beyond_floating_point(power):
    assert GroupReweightingLoss(2, power, [10**6] * 2).weights.tolist() == [1, 1]
    assert GroupReweightingLoss(2, power, [1, 10**6]).weights.tolist() == pytest.approx([10**6 + 1, 0])


def test_counts_resume(tmp_path):
    torch.save(GroupReweightingLoss(4, 1.0, COUNTS).state_dict(), tmp_path / "state.pt")
    second = GroupReweightingLoss(4)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.has_counts
    assert second.counts.tolist() == COUNTS


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"power": -1.0}, "`power` to be a number >= 0, but got -1.0"),
        ({"group_counts": [1, 0, 2, 3]}, "but got none of 1"),
        ({"group_counts": [1, 2]}, "`group_counts` to be 4 numbers"),
    ],
)
def test_wrong_arguments(kwargs, match):
    with pytest.raises(DebiasError, match=match):
        GroupReweightingLoss(4, **kwargs)
    with pytest.raises(DebiasError, match=match):
        GroupReweighting("place", 4, **kwargs)


def test_missing_counts_and_bad_ids():
    with pytest.raises(DebiasError, match="Expected `group_counts`, but got none"):
        GroupReweightingLoss(4)(torch.ones(1), torch.zeros(1).long())
    with pytest.raises(BadRowsError, match="`n_groups=4`, but 1 rows"):
        GroupReweightingLoss(4, 1.0, COUNTS)(torch.ones(1), torch.tensor([4]))


def test_weights_of_ones_own_are_taken_as_they_are():
    losses, groups = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([0, 1, 1])
    value = GroupReweightingLoss(2, group_weights=[0.5, 3.0])(losses, groups)
    assert float(value) == pytest.approx((0.5 * 1 + 3 * 2 + 3 * 4) / 3)
    again = GroupReweightingLoss(2, group_weights=[0.5, 3.0])
    again.load_state_dict(GroupReweightingLoss(2, group_counts=[9, 1]).state_dict())
    assert again.weights.tolist() == [0.5, 3.0]
    for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(DebiasError, match="`group_weights`"):
            GroupReweighting("place", 2, group_weights=wrong)


def test_the_callback_counts_nothing_where_weights_are_given():
    model = Classifier()
    method = GroupReweighting("place", 3, group_weights=[1.0, 0.0, 2.0])
    train(model, [method])
    assert method.module.counts.tolist() == [0, 0, 0]
