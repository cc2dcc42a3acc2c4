"""Intervals, tests and associations: against scipy, against counting, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mutual_info_score

from debias.audit.statistics import (
    association,
    bootstrap_interval,
    differences,
    false_discovery,
    mean_interval,
    wilson_interval,
)


def two_by_two(k, n1, m, n):
    """Whether each of n samples is a success, and whether it is a member: k of n1 members are, of m successes."""
    value, codes = np.zeros(n, bool), np.ones(n, int)
    value[:k] = value[n1 : n1 + m - k] = True
    codes[:n1] = 0
    return value, codes


def test_wilson_is_that_of_scipy():
    k, n = np.array([0, 1, 7, 20, 500]), np.array([5, 1, 20, 20, 1234])
    low, high = wilson_interval(k, n, 0.9)
    for i in range(len(k)):
        theirs = stats.binomtest(k[i], n[i]).proportion_ci(0.9, method="wilson")
        np.testing.assert_allclose((low[i], high[i]), theirs, atol=1e-12)
    assert np.isnan(wilson_interval(np.array([0]), np.array([0]))[0]).all()


def test_student_is_that_of_scipy():
    x = np.random.default_rng(0).exponential(size=12)
    low, high = mean_interval(np.array(x.mean()), np.array(x.var(ddof=1)), np.array(12))
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), theirs)


@pytest.mark.parametrize(("n1", "m", "n"), [(20, 100, 2000), (20, 194, 200), (50, 100, 10_000), (100, 150, 300)])
def test_the_p_value_is_never_below_that_of_the_hypergeometric_distribution(n1, m, n):
    exact = stats.hypergeom(n, m, n1)
    for k in range(max(0, n1 - (n - m)), min(n1, m) + 1):
        truth = min(1, 2 * min(exact.cdf(k), exact.sf(k - 1)))
        found = differences(*two_by_two(k, n1, m, n), 2).p_value[0]
        if truth < 0.3:
            assert found >= truth
        if truth > 0.01:
            assert found < 1.4 * truth


def test_strata_give_cochran_mantel_haenszel():
    random = np.random.default_rng(1)
    strata = random.integers(0, 3, 400)
    codes = (random.random(400) < 0.2 + 0.2 * strata).astype(int)
    value = random.random(400) < 0.3 + 0.1 * strata + 0.15 * codes
    found = differences(value, codes, 2, strata, 3)
    top = bottom = effect = weight = 0.0
    for s in range(3):
        a, b = value[(strata == s) & (codes == 1)], value[(strata == s) & (codes == 0)]
        h = stats.hypergeom(len(a) + len(b), a.sum() + b.sum(), len(a))
        top, bottom = top + a.sum() - h.mean(), bottom + h.var()
        w = len(a) * len(b) / (len(a) + len(b))
        effect, weight = effect + w * (a.mean() - b.mean()), weight + w
    assert found.effect[1] == pytest.approx(effect / weight, abs=1e-12)
    chi = (abs(top) - 0.5) ** 2 / bottom  # the textbook's statistic, with its correction
    assert found.p_value[1] == pytest.approx(stats.chi2.sf(chi, 1), rel=0.1)
    assert found.effect[0] == pytest.approx(-found.effect[1])


def test_real_values_are_permuted():
    random = np.random.default_rng(2)
    value = random.exponential(size=60) ** 2  # far from normal, and the members are few
    codes = (np.arange(60) < 8).astype(int)
    value[codes == 1] += 1.5
    found = differences(value, codes, 2).p_value[1]

    def difference(x, y, axis):
        return x.mean(axis) - y.mean(axis)

    done = stats.permutation_test(
        (value[codes == 1], value[codes == 0]), difference, n_resamples=20_000, vectorized=True, rng=random
    )
    assert found == pytest.approx(done.pvalue, rel=0.25)


def test_a_value_without_others_is_not_compared():
    found = differences(np.ones(6, bool), np.zeros(6, int), 2)
    assert np.isnan(found.p_value).all()
    assert np.isnan(found.effect).all()
    one = differences(np.array([True, False, True, True]), np.array([0, 0, 1, -1]), 2, np.array([0, 1, 1, 0]), 2)
    assert one.counts.tolist() == [1, 1]  # the first stratum has no other, the last sample is left out


def test_intervals_of_proportions_and_differences_cover():
    random = np.random.default_rng(3)
    hits = gaps = 0
    for _ in range(1000):
        share = random.uniform(0.02, 0.98)  # Wilson's interval covers on average: for one share up to 2 % more or less
        value = random.random(150) < np.repeat([share, share * 0.8], [50, 100])
        k = value[:50].sum()
        low, high = wilson_interval(np.array([k]), np.array([50]))
        hits += low[0] <= share <= high[0]
        found = differences(value, np.repeat([0, 1], [50, 100]), 2)
        gaps += found.low[0] <= share * 0.2 <= found.high[0]
    assert 0.935 <= hits / 1000 <= 0.97
    assert 0.935 <= gaps / 1000 <= 0.97


def test_intervals_of_differences_within_strata_cover():
    random = np.random.default_rng(4)
    hits = {"share": 0, "number": 0}
    for _ in range(500):
        strata = random.integers(0, 3, 300)
        codes = (random.random(300) < 0.2 + 0.2 * strata).astype(int)
        mean = 0.2 + 0.15 * strata + 0.2 * codes
        for what, value in (("share", random.random(300) < mean), ("number", random.exponential(mean))):
            found = differences(value, codes, 2, strata, 3)
            hits[what] += found.low[1] <= 0.2 <= found.high[1]
    assert all(0.92 <= each / 500 <= 0.98 for each in hits.values()), hits


def test_no_more_than_five_in_a_hundred_p_values_are_below_five_percent():
    random = np.random.default_rng(5)
    for value in (lambda: random.random(200) < 0.1, lambda: random.exponential(size=200) ** 2):
        p = [differences(value(), random.integers(0, 4, 200), 4).p_value[0] for _ in range(800)]
        assert np.mean(np.array(p) < 0.05) < 0.07


def test_false_discovery_is_that_of_scipy_over_ranked_rows():
    p = np.array([0.001, 0.02, np.nan, 0.5, 0.0001])
    found = false_discovery(p, np.array([True, True, True, True, False]))
    np.testing.assert_allclose(found[[0, 1, 3]], stats.false_discovery_control([0.001, 0.02, 0.5]))
    assert np.isnan(found[[2, 4]]).all()


def test_association_is_that_of_scipy_and_scikit_learn_without_their_bias():
    random = np.random.default_rng(6)
    a = random.integers(0, 4, 4000)
    b = np.where(random.random(4000) < 0.5, a % 3, random.integers(0, 3, 4000))
    table = np.bincount(a * 3 + b, minlength=12).reshape(4, 3)
    found = association(table)
    assert found.cramers_v == pytest.approx(stats.contingency.association(table, method="cramer"), abs=0.002)
    assert found.mutual_information == pytest.approx(mutual_info_score(a, b) - 6 / 8000, abs=1e-12)
    assert found.p_value < 1e-10
    assert found.cramers_v_low < found.cramers_v < found.cramers_v_high


def test_association_of_independent_columns_is_not_above_zero_on_average():
    random = np.random.default_rng(7)
    found = [association(np.bincount(random.integers(0, 12, 300), minlength=12).reshape(4, 3)) for _ in range(60)]
    assert np.mean([each.mutual_information_low == 0 for each in found]) > 0.9
    assert np.mean([each.cramers_v for each in found]) < 0.05
    assert np.isnan(association(np.array([[3, 4], [0, 0]])).cramers_v)


def test_intervals_of_associations_cover():
    random = np.random.default_rng(8)
    share = np.array([[0.4, 0.1], [0.15, 0.35]])
    expected = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    information = (share * np.log(share / expected)).sum()
    v = np.sqrt(((share - expected) ** 2 / expected).sum())
    hits = np.zeros(2)
    for _ in range(300):
        found = association(random.multinomial(400, share.ravel()).reshape(2, 2), resamples=200)
        hits += [
            found.cramers_v_low <= v <= found.cramers_v_high,
            found.mutual_information_low <= information <= found.mutual_information_high,
        ]
    assert (hits / 300 > 0.91).all(), hits


def test_bootstrap_says_nothing_where_the_statistic_is_seldom_defined():
    x = np.random.default_rng(9).normal(size=40)
    low, high = bootstrap_interval(lambda i: x[i].mean(), 40, resamples=400, confidence=0.95, seed=0)
    assert low < x.mean() < high
    assert np.isnan(bootstrap_interval(lambda i: np.nan, 40, resamples=20, confidence=0.95, seed=0)).all()
