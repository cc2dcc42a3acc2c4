"""Whom does it hurt? The metric of every group and every crossing of two columns, and the named fairness measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from debias.audit.columns import Column
from debias.audit.samples import Samples
from debias.audit.statistics import (
    differences,
    false_discovery,
    mean_interval,
    wilson_interval,
)

__all__ = ["TARGET", "fairness", "group_table", "rates", "target_column"]

Array = np.ndarray[Any, Any]
TARGET = "target"
FINEST = 1000  # runs of equal scores that are drawn apart
MANY_CLASSES = 20  # rates are given for each class of no more


def target_column(samples: Samples) -> list[Column]:
    """The true class as a column to group and to cross by; none where there is no class."""
    if samples.task != "classification":
        return []
    assert samples.target is not None
    taken = {column.name for column in samples.columns}
    return [Column(TARGET if TARGET not in taken else "true class", samples.classes, samples.target)]


def group_table(samples: Samples, *, min_count: int, alpha: float, confidence: float) -> pd.DataFrame:
    """The metric of each group: of one column, of the true class, and of every crossing of two.

    Args:
        samples: what is audited.
        min_count: smaller groups are shown, and not tested or ranked.
        alpha: false-discovery rate over the table.
        confidence: of the intervals.

    Returns:
        One row a group, the worst first: those that differ from the rest by more than noise, by how much they are
        worse; then all others. ``estimate`` with ``low`` and ``high``, ``count``, ``rest`` (all other samples),
        ``difference`` with its interval, ``p_value``, ``q_value`` (Benjamini and Hochberg), ``ranked``,
        ``significant``.
    """
    parts = []
    for names, codes, labels in _groupings([*target_column(samples), *samples.columns]):
        part = _rows(samples.quality, codes, len(labels), confidence)
        part.insert(0, "column", names[0])
        part.insert(1, "value", [label[0] for label in labels])
        part.insert(2, "and_column", names[1] if len(names) > 1 else None)
        part.insert(3, "and_value", [label[1] if len(names) > 1 else None for label in labels])
        parts.append(part[part["count"] > 0])
    if not parts:
        return pd.DataFrame(columns=[*_KEYS, *_VALUES])
    table = pd.concat([part.astype({"and_column": object, "and_value": object}) for part in parts], ignore_index=True)
    table["ranked"] = (table["count"] >= min_count) & (len(samples) - table["count"] >= min_count)
    table["q_value"] = false_discovery(table["p_value"].to_numpy(), table["ranked"].to_numpy())
    table["significant"] = table["q_value"] <= alpha
    worse = table["difference"] * (1 if samples.higher_is_better else -1)
    order = np.lexsort([worse, ~(table["significant"] & (worse < 0)), ~table["ranked"]])
    return table.iloc[order].reset_index(drop=True)


_KEYS = ("column", "value", "and_column", "and_value")
_VALUES = (
    "count", "estimate", "low", "high", "rest", "difference", "difference_low", "difference_high", "p_value", "ranked",
    "q_value", "significant",
)  # fmt: skip


def _groupings(columns: Sequence[Column]) -> Iterator[tuple[tuple[str, ...], Array, list[tuple[str, ...]]]]:
    for column in columns:
        yield (column.name,), column.codes, [(value,) for value in column.values]
    for first, second in combinations(columns, 2):
        crossed = first.codes * len(second) + second.codes
        counts = np.bincount(crossed, minlength=len(first) * len(second)).reshape(len(first), len(second))
        # A crossing that holds all samples of one of its two groups is that group over again.
        new = (counts > 0) & (counts < counts.sum(0)) & (counts < counts.sum(1)[:, None])
        places = np.flatnonzero(new.ravel())
        number = np.full(counts.size, len(places))
        number[places] = np.arange(len(places))
        labels: list[tuple[str, ...]] = [
            (first.values[i // len(second)], second.values[i % len(second)]) for i in places
        ]
        if labels:  # what is left counts to the rest of every group, and is no group itself
            yield (first.name, second.name), number[crossed], labels


def _rows(quality: Array, codes: Array, n_values: int, confidence: float) -> pd.DataFrame:
    size = max(n_values, int(codes.max()) + 1)
    found = differences(quality, codes, size, confidence=confidence)
    x = quality.astype(float)
    counts = np.bincount(codes, minlength=size)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.bincount(codes, x, size) / counts
        if quality.dtype == bool:
            low, high = wilson_interval(mean * counts, counts, confidence)
        else:
            variance = np.bincount(codes, (x - mean[codes]) ** 2, size) / (counts - 1)
            low, high = mean_interval(mean, variance, counts, confidence)
    table = {
        "count": counts, "estimate": mean, "low": low, "high": high, "rest": found.rest, "difference": found.effect,
        "difference_low": found.low, "difference_high": found.high, "p_value": found.p_value,
    }  # fmt: skip
    return pd.DataFrame(table).iloc[:n_values].reset_index(drop=True)


def rates(samples: Samples, *, confidence: float, resamples: int, seed: int) -> pd.DataFrame:
    """Selection rate, true and false positive rate and AUROC of each class in each group.

    Of two classes only the positive one is given, as the other's are 1 minus these. What is not defined is NaN: the
    true positive rate of a group without positives, the AUROC of a group with one class.

    Returns:
        One row for each group of one column and each class; each rate with ``_low`` and ``_high``.
    """
    rows = []
    for name, guess, true, score in _classes(samples):
        for column in [*samples.columns, Column("", ("all",), np.zeros(len(samples), int))]:
            k = len(column)
            counts, positives, chosen, hits = (
                np.bincount(column.codes, each, k) for each in (np.ones(len(true)), true, guess, true & guess)
            )
            part: dict[str, Any] = {
                "column": column.name,
                "value": column.values,
                "class": name,
                "count": counts.astype(int),
                "positives": positives.astype(int),
            }
            for rate, top, below in (
                ("selection_rate", chosen, counts),
                ("tpr", hits, positives),
                ("fpr", chosen - hits, counts - positives),
            ):
                with np.errstate(divide="ignore", invalid="ignore"):
                    part[rate] = top / below
                part[f"{rate}_low"], part[f"{rate}_high"] = wilson_interval(top, below, confidence)
            if score is not None:
                members = [np.flatnonzero(column.codes == i) for i in range(k)]
                found = np.array([_auroc(score[m], true[m], resamples, confidence, seed) for m in members])
                part["auroc"], part["auroc_low"], part["auroc_high"] = found.T
            rows.append(pd.DataFrame(part)[counts > 0])
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def _classes(samples: Samples) -> Iterator[tuple[str, Array, Array, Array | None]]:
    """Name, whether it is predicted, whether it is true, and score of each class or label that is looked at."""
    y, z, scores = samples.target, samples.prediction, samples.scores
    if samples.task == "classification":
        assert y is not None
        assert z is not None
        chosen = [samples.positive] if len(samples.classes) == 2 else range(len(samples.classes))
        for c in list(chosen)[:MANY_CLASSES]:
            yield samples.classes[c], z == c, y == c, None if scores is None else scores[:, c]
    elif samples.task == "multilabel":
        assert y is not None
        assert z is not None
        for c, name in list(enumerate(samples.classes))[:MANY_CLASSES]:
            yield name, z[:, c], y[:, c], None if scores is None else scores[:, c]


def _auroc(score: Array, true: Array, resamples: int, confidence: float, seed: int) -> tuple[float, float, float]:
    """AUROC with its percentile bootstrap interval; NaN with one class.

    A resample of samples is a multinomial draw of their counts in each run of equal scores. Of more than
    ``FINEST`` runs neighbours are counted together for the draws, which moves their spread, not the estimate, in the
    fourth digit.
    """
    if not true.any() or true.all():
        return np.nan, np.nan, np.nan
    order = np.argsort(score, kind="stable")
    run = np.cumsum(np.append(True, np.diff(score[order]) > 0)) - 1
    estimate = float(_area(np.bincount(2 * run + true[order], minlength=2 * run[-1] + 2).reshape(1, -1, 2))[0])
    coarse = run if run[-1] < FINEST else np.arange(len(run)) * FINEST // len(run)
    cells = np.bincount(2 * coarse + true[order], minlength=2 * coarse[-1] + 2)
    drawn = np.random.default_rng(seed).multinomial(len(true), cells / len(true), resamples)
    known = _area(drawn.reshape(resamples, -1, 2))
    known = known[np.isfinite(known)]
    if len(known) < 0.9 * resamples:  # too few samples of one class to say how sure the number is
        return estimate, np.nan, np.nan
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return estimate, float(low), float(high)


def _area(counts: Array) -> Array:
    """Area under the ROC curve from counts of negatives and positives in order of the score, ``(B, runs, 2)``."""
    negative, positive = counts[..., 0].astype(float), counts[..., 1].astype(float)
    below = np.cumsum(negative, 1) - negative / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def fairness(table: pd.DataFrame, groups: pd.DataFrame, min_count: int) -> pd.DataFrame:
    """The named measures of each column and class, over groups of at least ``min_count`` samples.

    Demographic parity compares selection rates, equalised odds the true and the false positive rates, whichever differs
    more: differences are largest minus smallest, ratios smallest over largest. A rate that is not defined in a group
    makes no measure 0 or 1: the groups that define it are compared, and with fewer than two the measure is NaN.

    Args:
        table: from :func:`rates`.
        groups: from :func:`group_table`, for the metric of the worst group.
        min_count: smaller groups take no part.
    """
    rows = []
    if table.empty:
        return pd.DataFrame()
    used = table[(table["count"] >= min_count) & (table["column"] != "")]
    alone = groups[groups["and_column"].isna() & (groups["count"] >= min_count)]
    for (column, name), part in used.groupby(["column", "class"], sort=False):
        selection, tpr, fpr = (part[rate].dropna() for rate in ("selection_rate", "tpr", "fpr"))
        row = {
            "column": column, "class": name, "groups": len(part), "smallest_group": int(part["count"].min()),
            "demographic_parity_difference": _spread(selection), "demographic_parity_ratio": _ratio(selection),
            "equalized_odds_difference": _worst(max, _spread(tpr), _spread(fpr)),
            "equalized_odds_ratio": _worst(min, _ratio(tpr), _ratio(fpr)),
            "tpr_difference": _spread(tpr), "fpr_difference": _spread(fpr),
        }  # fmt: skip
        if "auroc" in part:
            row["auroc_difference"] = _spread(part["auroc"].dropna())
        metric = alone[alone["column"] == column]["estimate"]
        rows.append(row | {"metric_difference": _spread(metric), "metric_ratio": _ratio(metric)})
    return pd.DataFrame(rows)


def _spread(values: pd.Series[Any]) -> float:
    return float(values.max() - values.min()) if len(values) > 1 else np.nan


def _ratio(values: pd.Series[Any]) -> float:
    return float(values.min() / values.max()) if len(values) > 1 and values.max() > 0 else np.nan


def _worst(choose: Any, *values: float) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(choose(known)) if known else np.nan
