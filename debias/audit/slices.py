"""Which groups does nobody name? Slices of samples that look alike and are wrong together.

Two ways, on the same features: clusters (k-means), and the error-aware mixture of Domino (Eyuboglu et al., ICLR 2022,
eq. 3), whose components agree in features, in labels *and* in predictions, so that errors end up together. Slices are
found on one half of the samples and measured on the other, where only features and labels say who is in: a slice
that was chosen for its errors would be worse than the rest by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from debias.audit.samples import Samples
from debias.audit.shortcuts import strata_of
from debias.audit.statistics import differences, false_discovery, mean_interval, wilson_interval

__all__ = ["error_mixture", "slice_table"]

Array = np.ndarray[Any, Any]
MOST_SAMPLES = 20_000
COMPONENTS = 32  # principal components of the features
SEEDS = 3  # fits, to say how stable a slice is
EXAMPLES = 6


def slice_table(
    samples: Samples, *, slices: int, min_count: int, alpha: float, confidence: float, seed: int
) -> pd.DataFrame:
    """Find slices and rank them by size x gap.

    Args:
        samples: what is audited; of several layers of features the last is used, without features the metadata.
        slices: how many of each kind to report; twice as many are fitted.
        min_count: smaller ones are left out.
        alpha: false-discovery rate.
        confidence: of the intervals.
        seed: of the halves and the fits.

    Returns:
        One row a slice: ``kind``, ``count`` and ``estimate`` on the half that was not searched, with ``low`` and
        ``high``, ``difference`` to the rest of the same class, ``p_value``, ``q_value``, ``significant``,
        ``described_by`` (what is most over-represented), ``stability`` (overlap, as Jaccard's index, with the best
        matching slice of other seeds) and ``examples`` (rows of the worst members).
    """
    features = _features(samples)
    if features is None:
        return pd.DataFrame()
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(samples))[:MOST_SAMPLES]
    half = len(chosen) // 2
    if half < 4 * slices:
        return pd.DataFrame()
    search, measure = chosen[:half], chosen[half:]
    x = PCA(min(COMPONENTS, features.shape[1], half), random_state=seed).fit(features[search])
    z = x.transform(features[chosen])
    z /= max(np.sqrt(z[:half].var(0).mean()), 1e-12)
    y, guess = _outcomes(samples, chosen)
    k = min(2 * slices, len(np.unique(z[:half].round(6), axis=0)))
    if k < 2:
        return pd.DataFrame()
    fits: dict[str, Callable[[int], Array]] = {
        "mixture": lambda s: _assign_mixture(z, y, guess, half, k, s),
        "clusters": lambda s: KMeans(k, n_init=1, random_state=s).fit(z[:half]).predict(z),
    }
    parts = []
    for kind, fit in fits.items():
        found = [fit(seed + i)[half:] for i in range(SEEDS)]
        parts.append(_measured(samples, measure, found, k, confidence).assign(kind=kind))
    table = pd.concat(parts, ignore_index=True)
    table = table[np.minimum(table["count"], len(measure) - table["count"]) >= min_count].copy()
    table["q_value"] = false_discovery(table["p_value"].to_numpy(), np.ones(len(table), bool))
    table["significant"] = table["q_value"] <= alpha
    worse = table["difference"] * (1 if samples.higher_is_better else -1)
    table = table.assign(weight=table["count"] / len(measure) * worse).sort_values("weight", kind="stable")
    return table.groupby("kind", sort=False).head(slices).drop(columns="weight").reset_index(drop=True)


def error_mixture(
    x: Array, labels: Array, predictions: Array, k: int, *, weight: float = 10.0, iterations: int = 50, seed: int = 0
) -> Callable[[Array, Array, Array | None], Array]:
    """Fit Domino's error-aware mixture by expectation and maximisation.

    Args:
        x: features ``(N, D)``: normal with a diagonal covariance in each component.
        labels: distribution over classes ``(N, C)``, one-hot or soft: categorical in each component.
        predictions: likewise.
        k: number of components.
        weight: of labels and predictions against the features; the paper's gamma, 10 there.
        iterations: at most.
        seed: of the start.

    Returns:
        A function of features, labels and predictions that gives the log-probability of each component, ``(N, k)``;
        without predictions, None, that of the other two.
    """
    # The start is one of features and errors alike, so that components of either kind are in reach.
    start = KMeans(k, n_init=1, random_state=seed).fit(np.hstack([x, weight * labels, weight * predictions])).labels_
    shares = np.eye(k)[start]
    floor = 1e-2 * max(float(x.var(0).mean()), 1e-12)
    parameters: tuple[Array, ...] = ()

    def log_joint(x: Array, labels: Array, predictions: Array | None) -> Array:
        size, mean, variance, of_label, of_guess = parameters
        far = (x**2) @ (1 / variance).T - 2 * x @ (mean / variance).T + (mean**2 / variance).sum(1)
        normal = -0.5 * (far + np.log(2 * np.pi * variance).sum(1))
        joint = np.log(size) + normal + weight * labels @ np.log(of_label).T
        return joint if predictions is None else joint + weight * predictions @ np.log(of_guess).T

    last = -np.inf
    for _ in range(iterations):
        count = shares.sum(0) + 1e-9
        mean = shares.T @ x / count[:, None]
        variance = np.maximum(shares.T @ x**2 / count[:, None] - mean**2, 0) + floor
        tables = [(shares.T @ each + 1e-3) / (count[:, None] + 1e-3 * each.shape[1]) for each in (labels, predictions)]
        parameters = (count / count.sum(), mean, variance, *tables)
        joint = log_joint(x, labels, predictions)
        total = logsumexp(joint, axis=1)
        shares = np.exp(joint - total[:, None])
        if total.mean() - last < 1e-5:
            break
        last = total.mean()
    return log_joint


def _assign_mixture(x: Array, labels: Array, predictions: Array, half: int, k: int, seed: int) -> Array:
    score = error_mixture(x[:half], labels[:half], predictions[:half], k, seed=seed)
    return score(x, labels, None).argmax(1)


def _features(samples: Samples) -> Array | None:
    if samples.features:
        from debias.audit.collect import HEAD

        return samples.features[HEAD if HEAD in samples.features else [*samples.features][-1]]
    if not samples.columns:
        return None
    return np.hstack([np.eye(len(column))[column.codes] for column in samples.columns])


def _outcomes(samples: Samples, chosen: Array) -> tuple[Array, Array]:
    """Labels and predictions as distributions; where there are no classes, whether the error is a large one."""
    if samples.task == "classification":
        assert samples.target is not None
        assert samples.prediction is not None
        classes = np.eye(len(samples.classes))
        return classes[samples.target[chosen]], classes[samples.prediction[chosen]]
    loss = -samples.quality[chosen].astype(float) if samples.higher_is_better else samples.quality[chosen]
    return np.ones((len(chosen), 1)), np.eye(2)[(loss > np.quantile(loss, 0.8)).astype(int)]


def _measured(samples: Samples, rows: Array, found: list[Array], k: int, confidence: float) -> pd.DataFrame:
    quality, codes = samples.quality[rows], found[0]
    strata, n_strata = None, 1
    if samples.task == "classification":  # a class that is hard is no slice: compared with others of the same class
        strata, n_strata = strata_of(samples)
        strata = strata[rows]
    gap = differences(quality, codes, k, strata, n_strata, confidence=confidence)
    counts = np.bincount(codes, minlength=k)
    value = quality.astype(float)
    table = []
    for i in np.flatnonzero(counts):
        members = codes == i
        mean = value[members].mean()
        if quality.dtype == bool:
            low, high = wilson_interval(value[members].sum(), counts[i], confidence)
        else:
            spread = np.array(value[members].var(ddof=1) if counts[i] > 1 else np.nan)
            low, high = mean_interval(mean, spread, counts[i], confidence)
        worst = np.argsort(value[members] * (1 if samples.higher_is_better else -1), kind="stable")[:EXAMPLES]
        table.append(
            {
                "kind": "",
                "count": int(counts[i]),
                "estimate": mean,
                "low": float(low),
                "high": float(high),
                "rest": gap.rest[i],
                "difference": gap.effect[i],
                "difference_low": gap.low[i],
                "difference_high": gap.high[i],
                "p_value": gap.p_value[i],
                "described_by": _described(samples, rows, members),
                "stability": np.mean([_overlap(members, other, k) for other in found[1:]]),
                "examples": rows[members][worst].tolist(),
            }
        )
    return pd.DataFrame(table)


def _overlap(members: Array, other: Array, k: int) -> float:
    both = np.bincount(other[members], minlength=k)
    return float((both / (members.sum() + np.bincount(other, minlength=k) - both)).max())


def _described(samples: Samples, rows: Array, members: Array) -> str:
    """The values that are most over-represented: of the true class, and of a column."""
    from debias.audit.groups import target_column

    said = []
    for columns in (target_column(samples), samples.columns):
        best: tuple[float, str] = (0.0, "")
        for column in columns:
            codes = column.codes[rows]
            inside = np.bincount(codes[members], minlength=len(column)) / members.sum()
            outside = np.bincount(codes[~members], minlength=len(column)) / max((~members).sum(), 1)
            i = int((inside - outside).argmax())
            if inside[i] - outside[i] > best[0]:
                best = inside[i] - outside[i], f"{column.name} = {column.values[i]} in {inside[i]:.0%}"
        if best[0] > 0.1:
            said.append(best[1])
    return " and ".join(said) or "no column describes it"
