"""Intervals, tests and associations for many groups at once: arrays in, arrays out.

Every comparison of an audit is one question: is the mean of a value different for some members than for the others,
within strata? Which tests it is depends on the value and the strata, not on the code: a right-or-wrong value without
strata gives the hypergeometric test of a 2 x 2 table, with strata that of Cochran, Mantel and Haenszel, and a real
value the permutation test of a difference of means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

__all__ = [
    "Association",
    "Differences",
    "association",
    "bootstrap_interval",
    "differences",
    "false_discovery",
    "mean_interval",
    "wilson_interval",
]

Array = np.ndarray[Any, Any]


def wilson_interval(successes: Array, counts: Array, confidence: float = 0.95) -> tuple[Array, Array]:
    """Wilson's interval of proportions; that of ``scipy.stats.binomtest``, for whole arrays.

    Args:
        successes: number of successes, ``(G,)``.
        counts: number of trials, ``(G,)``.
        confidence: of the interval.

    Returns:
        Lower and upper ends, ``(G,)``; NaN without a trial.
    """
    z = stats.norm.ppf((1 + confidence) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = successes / counts
        centre = (share + z**2 / (2 * counts)) / (1 + z**2 / counts)
        half = z / (1 + z**2 / counts) * np.sqrt(share * (1 - share) / counts + z**2 / (4 * counts**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def mean_interval(mean: Array, variance: Array, counts: Array, confidence: float = 0.95) -> tuple[Array, Array]:
    """Student's interval of means, from sample variances; NaN with fewer than two samples."""
    with np.errstate(divide="ignore", invalid="ignore"):
        half = stats.t.ppf((1 + confidence) / 2, np.where(counts > 1, counts - 1, np.nan)) * np.sqrt(variance / counts)
    return mean - half, mean + half


def false_discovery(p_values: Array, ranked: Array) -> Array:
    """Benjamini and Hochberg's adjusted p-values of the ranked rows; NaN for the others."""
    adjusted = np.full(len(p_values), np.nan)
    known = ranked & np.isfinite(p_values)
    if known.any():
        adjusted[known] = stats.false_discovery_control(p_values[known], method="bh")
    return adjusted


@dataclass(frozen=True)
class Differences:
    """Members of each value against the others, ``(V,)`` each.

    Attributes:
        counts: members in strata that have both members and others.
        others: the others there.
        effect: mean of the members minus mean of the others, within strata, weighted as Mantel and Haenszel do.
        low: lower end of its interval.
        high: its upper end.
        p_value: two-sided; NaN where the samples cannot tell.
        rest: mean of the others, over the same strata.
    """

    counts: Array
    others: Array
    effect: Array
    low: Array
    high: Array
    p_value: Array
    rest: Array


def differences(
    value: Array,
    codes: Array,
    n_values: int,
    strata: Array | None = None,
    n_strata: int = 1,
    *,
    confidence: float = 0.95,
) -> Differences:
    """Compare the members of each value with all others, within strata.

    The p-value is that of the permutation test within strata: its statistic has an exact mean, variance and third
    moment, and its tail is read from the Pearson III distribution with these (Mielke and Berry, Permutation Methods,
    2007). For 0 or 1 the variance is that of Cochran, Mantel and Haenszel, with their continuity correction; the third
    moment is what keeps the tails right where few successes, or few failures, are to be expected.

    The interval is normal, with variances within members and within others; for 0 or 1 with one success and one
    failure added to each (Agresti and Caffo, 2000), without strata it is Newcombe's.

    Args:
        value: what is compared, ``(N,)``; boolean, or real numbers.
        codes: the value of each sample, ints ``(N,)`` below ``n_values``; negative = left out.
        n_values: number of values.
        strata: ints ``(N,)`` below ``n_strata``.
        n_strata: number of strata.
        confidence: of the intervals.
    """
    binary = value.dtype == bool
    kept = codes >= 0
    x, codes = value[kept].astype(float), codes[kept]
    strata = np.zeros(len(x), int) if strata is None else strata[kept]
    place, shape = strata * n_values + codes, (n_strata, n_values)
    size = n_strata * n_values
    centre = np.bincount(strata, x, n_strata) / np.maximum(np.bincount(strata, minlength=n_strata), 1)
    centred = x - centre[strata]  # moments are sums of small numbers then
    n1 = np.bincount(place, minlength=size).reshape(shape).astype(float)
    s1 = np.bincount(place, centred, size).reshape(shape)
    q1 = np.bincount(place, centred**2, size).reshape(shape)
    n = n1.sum(1, keepdims=True)
    second = q1.sum(1, keepdims=True)
    third = np.bincount(strata, centred**3, n_strata)[:, None]
    n0, s0, q0 = n - n1, -s1, second - q1
    both = (n1 > 0) & (n0 > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(both, n1 * n0 / n, 0)
        gap = np.where(both, s1 / n1 - s0 / n0, 0)
        total = weight.sum(0)
        effect = (weight * gap).sum(0) / total
        rest = (weight * np.where(both, s0 / n0 + centre[:, None], 0)).sum(0) / total
        statistic = (weight * gap).sum(0)
        variance = np.where(both, n1 * n0 / n / (n - 1) * second, 0).sum(0)
        skew = np.where(both & (n > 2), n1 * n0 * (n0 - n1) / n / (n - 1) / (n - 2) * third, 0).sum(0) / variance**1.5
        p_value = _tails(statistic, np.sqrt(variance), skew, 0.5 if binary else 0.0)
        inner = _within(n1, s1, q1, centre, binary) + _within(n0, s0, q0, centre, binary)
        deviation = np.sqrt((weight**2 * np.where(both, inner, 0)).sum(0)) / total
    z = stats.norm.ppf((1 + confidence) / 2)
    low, high = effect - z * deviation, effect + z * deviation
    if binary and n_strata == 1:
        low, high = _newcombe(n1[0], s1[0] + n1[0] * centre[0], n0[0], s0[0] + n0[0] * centre[0], confidence)
    if binary:
        low, high = np.maximum(low, -1), np.minimum(high, 1)
    counts, others = (np.where(both, each, 0).sum(0).astype(int) for each in (n1, n0))
    return Differences(counts, others, effect, low, high, np.where(counts > 0, p_value, np.nan), rest)


def _tails(statistic: Array, deviation: Array, skew: Array, correction: float) -> Array:
    """Two-sided p-value from the Pearson III distribution: twice the smaller tail."""
    known = np.isfinite(statistic) & (deviation > 0)
    z = np.where(known, statistic / np.where(known, deviation, 1), 0)
    step = np.where(known, correction / np.where(known, deviation, 1), 0)
    skew = np.where(known, skew, 0)
    upper, lower = stats.pearson3.sf(z - step, skew), stats.pearson3.cdf(z + step, skew)
    return np.where(np.isfinite(statistic), np.minimum(1, 2 * np.minimum(upper, lower)), np.nan)


def _within(n: Array, s: Array, q: Array, centre: Array, binary: bool) -> Array:
    """Squared standard error of the mean of each cell, from counts and sums around the centre of its stratum."""
    if binary:
        share = (s + n * centre[:, None] + 1) / (n + 2)
        return share * (1 - share) / (n + 2)
    spread = (q - s**2 / n) / (n - 1)
    # A single sample says nothing about the spread: that of the other members of the same value stands in.
    pooled = np.nansum(np.where(n > 1, q - s**2 / n, 0), 0) / np.maximum((np.maximum(n, 1) - 1).sum(0), 1)
    return np.where(n > 1, spread, pooled) / n


def _newcombe(n1: Array, k1: Array, n0: Array, k0: Array, confidence: float) -> tuple[Array, Array]:
    """Newcombe's interval of a difference of proportions (Statistics in Medicine 1998, method 10)."""
    (l1, u1), (l0, u0) = wilson_interval(k1, n1, confidence), wilson_interval(k0, n0, confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        p1, p0 = k1 / n1, k0 / n0
        low = p1 - p0 - np.sqrt(np.maximum((p1 - l1) ** 2 + (u0 - p0) ** 2, 0))
        high = p1 - p0 + np.sqrt(np.maximum((u1 - p1) ** 2 + (p0 - l0) ** 2, 0))
    return low, high


def bootstrap_interval(
    statistic: Callable[[Array], float], n: int, *, resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap of a statistic of samples.

    Args:
        statistic: takes the indices of a resample, ``(n,)``, and returns a number; NaN where it is not defined.
        n: number of samples.
        resamples: how many.
        confidence: of the interval.
        seed: of the draws.

    Returns:
        Lower and upper end; NaN where fewer than nine in ten resamples define the statistic.
    """
    random = np.random.default_rng(seed)
    found = np.array([statistic(random.integers(0, n, n)) for _ in range(resamples)])
    found = found[np.isfinite(found)]
    if len(found) < 0.9 * resamples or not len(found):
        return np.nan, np.nan
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Association:
    """How strongly two categorical columns go together.

    Attributes:
        cramers_v: Cramer's V without its bias (Bergsma, Journal of the Korean Statistical Society 2013), in [0, 1].
        cramers_v_low: lower end of its interval, with ``cramers_v_high`` the upper.
        mutual_information: in nats, without its bias of ``(r - 1)(c - 1) / 2n``.
        mutual_information_low: lower end of its interval, with ``mutual_information_high`` the upper.
        p_value: of the chi-squared test of independence.
    """

    cramers_v: float
    cramers_v_low: float
    cramers_v_high: float
    mutual_information: float
    mutual_information_low: float
    mutual_information_high: float
    p_value: float


def association(
    table: Array, *, resamples: int = 500, confidence: float = 0.95, seed: int = 0, cells: int = 2_000_000
) -> Association:
    """Association in a contingency table, with basic bootstrap intervals.

    Args:
        table: counts, ``(r, c)``; empty rows and columns are dropped.
        resamples: of the bootstrap.
        confidence: of the intervals.
        seed: of the draws.
        cells: of all resamples at the same time, a limit of memory.

    Returns:
        All NaN where fewer than two rows or columns are left.
    """
    table = table[table.sum(1) > 0][:, table.sum(0) > 0].astype(float)
    if min(table.shape) < 2:
        return Association(*[np.nan] * 7)
    n = int(table.sum())
    v, information = (float(each[0]) for each in _association(table[None]))
    random = np.random.default_rng(seed)
    chunk = max(1, cells // table.size)
    parts = [
        _association(random.multinomial(n, table.ravel() / n, min(chunk, resamples - i)).reshape(-1, *table.shape))
        for i in range(0, resamples, chunk)
    ]
    tails = [(1 + confidence) / 2, (1 - confidence) / 2]
    drawn = [
        2 * now - np.quantile(np.concatenate(each), tails)
        for now, each in zip((v, information), zip(*parts, strict=True), strict=True)
    ]
    (v_low, v_high), (i_low, i_high) = (np.maximum(each, 0) for each in drawn)
    p_value = float(stats.chi2_contingency(table, correction=False).pvalue)
    return Association(v, float(v_low), float(min(v_high, 1)), information, float(i_low), float(i_high), p_value)


def _association(tables: Array) -> tuple[Array, Array]:
    """Cramer's V and mutual information of tables ``(B, r, c)``, both without their bias."""
    n = tables.sum((1, 2), keepdims=True)
    expected = tables.sum(2, keepdims=True) * tables.sum(1, keepdims=True) / n
    r, c = tables.shape[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        square = np.where(expected > 0, (tables - expected) ** 2 / expected, 0).sum((1, 2)) / n[:, 0, 0]
        information = np.where(tables > 0, tables * np.log(tables / expected), 0).sum((1, 2)) / n[:, 0, 0]
    n = n[:, 0, 0]
    phi = np.maximum(square - (r - 1) * (c - 1) / (n - 1), 0)
    rows, columns = r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)
    v = np.sqrt(phi / np.maximum(np.minimum(rows, columns) - 1, 1e-12))
    return np.minimum(v, 1), np.maximum(information - (r - 1) * (c - 1) / (2 * n), 0)
