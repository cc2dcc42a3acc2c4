"""Is it a shortcut? Whether the label goes with a column, and whether the predictions do at the same true label.

A group with more errors is not yet a shortcut: its samples may be harder. A shortcut pulls: where the background is
water, "waterbird" is said more often for waterbirds *and* for landbirds. So every prediction is compared with others of
the same true label, with and without a value of the column: the *lean* of the predictions towards a class. This is the
conflict test, for instance the sick with against the sick without a chest drain, over all true labels together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from debias.audit.columns import Column
from debias.audit.samples import Samples
from debias.audit.statistics import association, differences, false_discovery

__all__ = ["associations", "conflict_table", "lean_table", "shortcut_table", "strata_of"]

Array = np.ndarray[Any, Any]
REGRESSION_STRATA = 10  # quantile bins of a real target within which predictions are compared


def strata_of(samples: Samples) -> tuple[Array, int]:
    """The true label as strata: the class, or the quantile bin of a real target."""
    assert samples.target is not None
    if samples.task == "regression":
        bins = pd.qcut(samples.target, REGRESSION_STRATA, labels=False, duplicates="drop")
        return np.asarray(bins, int), int(bins.max()) + 1
    return samples.target, len(samples.classes)


def _outcomes(samples: Samples) -> Iterator[tuple[str, Array, Array, int]]:
    """What predictions can lean towards: a class, a label, or a larger number; each with its strata.

    Of two classes one is enough: less of one is more of the other.
    """
    z = samples.prediction
    if samples.task == "detection":
        return
    assert z is not None
    if samples.task == "multilabel":
        assert samples.target is not None
        for c, name in enumerate(samples.classes):
            yield name, z[:, c], samples.target[:, c].astype(int), 2
        return
    strata, k = strata_of(samples)
    if samples.task == "regression":
        yield "a larger number", z, strata, k
        return
    for c in [samples.positive] if len(samples.classes) == 2 else range(len(samples.classes)):
        yield samples.classes[c], z == c, strata, k


def lean_table(samples: Samples, *, min_count: int, confidence: float) -> pd.DataFrame:
    """How much more often each class is predicted for each value of each column, at the same true label.

    Returns:
        One row for each column, value and class: ``lean`` in shares (in units of the target for regression) with
        ``low`` and ``high``, ``p_value``, the ``count`` of samples of the value that could be compared, and
        ``ranked``: at least ``min_count`` of them, and of the others. The strongest of each column first.
    """
    parts = []
    for name, outcome, strata, k in _outcomes(samples):
        for column in samples.columns:
            found = differences(outcome, column.codes, len(column), strata, k, confidence=confidence)
            parts.append(
                pd.DataFrame(
                    {
                        "column": column.name,
                        "value": column.values,
                        "class": name,
                        "count": found.counts,
                        "lean": found.effect,
                        "low": found.low,
                        "high": found.high,
                        "p_value": found.p_value,
                        "ranked": np.minimum(found.counts, found.others) >= min_count,
                    }
                )
            )
    if not parts:
        return pd.DataFrame(columns=["column", "value", "class", "count", "lean", "low", "high", "p_value", "ranked"])
    table = pd.concat(parts, ignore_index=True)
    # Of two values the second is the first mirrored: the one that pulls towards the class is easier to read.
    order = np.lexsort([table["lean"] < 0, -table["lean"].abs().round(9)])
    return table.iloc[order].reset_index(drop=True)


def conflict_table(samples: Samples, *, min_count: int, alpha: float, confidence: float) -> pd.DataFrame:
    """The same true class with and without each value: how often each is recognised.

    Returns:
        One row for each column, value and true class: the share that is recognised ``with_value`` and
        ``without_value``, both counts, the ``difference`` with its interval, ``p_value`` and ``q_value``. Largest
        difference first, of those that are more than noise.
    """
    parts = []
    for name, right, members in _recognised(samples):
        for column in samples.columns:
            codes = np.where(members, column.codes, -1)
            found = differences(right, codes, len(column), confidence=confidence)
            parts.append(
                pd.DataFrame(
                    {
                        "class": name,
                        "column": column.name,
                        "value": column.values,
                        "with_value": found.rest + found.effect,
                        "with_count": found.counts,
                        "without_value": found.rest,
                        "without_count": found.others,
                        "difference": found.effect,
                        "low": found.low,
                        "high": found.high,
                        "p_value": found.p_value,
                    }
                )
            )
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    table = table[table["with_count"] > 0]
    ranked = (table["with_count"] >= min_count) & (table["without_count"] >= min_count)
    table["q_value"] = false_discovery(table["p_value"].to_numpy(), ranked.to_numpy())
    table["significant"] = table["q_value"] <= alpha
    order = np.lexsort([-table["difference"].abs(), ~table["significant"]])
    return table.iloc[order].reset_index(drop=True)


def _recognised(samples: Samples) -> Iterator[tuple[str, Array, Array]]:
    """For each class: what is recognised, and the samples that have it."""
    if samples.task == "classification":
        assert samples.target is not None
        for c, name in enumerate(samples.classes):
            yield name, samples.quality, samples.target == c
    elif samples.task == "multilabel":
        assert samples.target is not None
        assert samples.prediction is not None
        for c, name in enumerate(samples.classes):
            yield name, samples.prediction[:, c], samples.target[:, c].astype(bool)


def associations(samples: Samples, *, confidence: float, resamples: int, seed: int) -> pd.DataFrame:
    """Cramer's V and mutual information of each column with the label, in training and in what is audited.

    Returns:
        One row a column; of multi-label data that of the label with the largest V.
    """
    rows = []
    for column in samples.columns:
        row: dict[str, Any] = {"column": column.name, "values": len(column)}
        sides = {"train": (column.train_codes, samples.train_target), "test": (column.codes, samples.target)}
        for side, (codes, target) in sides.items():
            if codes is None or target is None:
                continue
            found = [
                association(table, confidence=confidence, resamples=resamples, seed=seed)
                for table in _contingencies(samples, target, codes, len(column))
            ]
            best = max(found, key=lambda each: np.nan_to_num(each.cramers_v, nan=-1))
            row |= {f"{side}_{key}": value for key, value in vars(best).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _contingencies(samples: Samples, target: Array, codes: Array, n_values: int) -> Iterator[Array]:
    """Counts of label x value; of a real target its quantile bins are the label."""
    if samples.task == "multilabel":
        labels = [each.astype(int) for each in target.T]
        k = 2
    elif samples.task == "regression":
        labels = [np.asarray(pd.qcut(target, REGRESSION_STRATA, labels=False, duplicates="drop"), int)]
        k = int(labels[0].max()) + 1
    else:
        labels, k = [target], len(samples.classes)
    for label in labels:
        yield np.bincount(label * n_values + codes, minlength=k * n_values).reshape(k, n_values)


def shortcut_table(
    samples: Samples, leans: pd.DataFrame, linked: pd.DataFrame, *, alpha: float, confidence: float
) -> pd.DataFrame:
    """One row a column: its association with the label, the strongest lean, and how right it is where both agree.

    The p-value of a column is the smallest of its leans times their number (Bonferroni), the q-value that of Benjamini
    and Hochberg over the columns. *Holds* are samples whose value goes with their label more often than by chance, in
    training where that is known, *breaks* all others; the two are compared within labels.

    Returns:
        Columns whose pull is more than noise first, the strongest on top.
    """
    rows = []
    for column in samples.columns:
        row: dict[str, Any] = {"column": column.name}
        own = leans[(leans["column"] == column.name) & leans["ranked"] & leans["p_value"].notna()]
        if len(own):
            # Of the leans that are more than noise the strongest; a wild one of few samples says little.
            sure = own[own["p_value"] * len(own) <= alpha]
            top = sure.iloc[0] if len(sure) else own.loc[own["p_value"].idxmin()]
            row |= {"value": top["value"], "class": top["class"], "lean": top["lean"], "lean_low": top["low"],
                    "lean_high": top["high"], "lean_count": top["count"],
                    "p_value": min(1.0, own["p_value"].min() * len(own))}  # fmt: skip
        else:
            row |= {"value": None, "class": None, "lean": np.nan, "lean_low": np.nan, "lean_high": np.nan,
                    "lean_count": 0, "p_value": np.nan}  # fmt: skip
        rows.append(row | _held(samples, column, confidence))
    if not rows or samples.task == "detection":  # boxes lean towards no class
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    if len(linked):
        table = table.merge(linked, on="column", how="left")
    table["q_value"] = false_discovery(table["p_value"].to_numpy(dtype=float), np.ones(len(table), bool))
    table["significant"] = table["q_value"] <= alpha
    order = np.lexsort([-table["lean"].abs().fillna(0), ~table["significant"]])
    return table.iloc[order].reset_index(drop=True)


def _held(samples: Samples, column: Column, confidence: float) -> dict[str, Any]:
    """The metric where the association of column and label holds, and where it breaks."""
    if samples.task != "classification":
        return {}
    assert samples.target is not None
    codes, target = column.codes, samples.target
    if column.train_codes is not None and samples.train_target is not None:
        codes, target = column.train_codes, samples.train_target
    (table,) = _contingencies(samples, target, codes, len(column))
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    holds = (table > expected)[samples.target, column.codes]
    found = differences(
        samples.quality, holds.astype(int), 2, samples.target, len(samples.classes), confidence=confidence
    )
    return {
        "holds": found.rest[1] + found.effect[1], "holds_count": int(holds.sum()), "breaks": found.rest[1],
        "breaks_count": int((~holds).sum()), "gap": found.effect[1], "gap_low": found.low[1], "gap_high": found.high[1],
        "gap_p_value": found.p_value[1],
    }  # fmt: skip
