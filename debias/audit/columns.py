"""Metadata columns as groups: categories as they are, numbers in quantile bins, a missing value as one more value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from debias.errors import DebiasError

__all__ = ["MISSING", "OTHER", "PURE", "Column", "encode"]

MISSING = "(missing)"
OTHER = "(other)"
PURE = "every value goes with one class only: it is made of the label, or nothing breaks their association"
FEW_NUMBERS = 10  # a numeric column with no more values is taken as categories


@dataclass(frozen=True)
class Column:
    """One column in groups.

    Attributes:
        name: of the column.
        values: name of each group.
        codes: group of each audited sample, ints ``(N,)``.
        train_codes: the same of each training sample; None where the training set is not known.
    """

    name: str
    values: tuple[str, ...]
    codes: np.ndarray[Any, Any]
    train_codes: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.values)


def encode(
    frame: pd.DataFrame,
    train: pd.DataFrame | None = None,
    *,
    columns: Sequence[str] | None = None,
    bins: int = 4,
    max_values: int = 50,
) -> tuple[list[Column], dict[str, str]]:
    """Turn the columns of a table into groups.

    Args:
        frame: metadata of the audited samples, one row each.
        train: that of the training samples; a column that it lacks has no ``train_codes``.
        columns: which; all by default.
        bins: number of quantile bins of a numeric column with more than ten values.
        max_values: rarer values of a column with more categories are one group, ``(other)``.

    Returns:
        The columns, and for each that cannot be used why not.

    Raises:
        DebiasError: a column of ``columns`` is not there.
    """
    if absent := [name for name in columns or [] if name not in frame]:
        raise DebiasError(
            f"Expected `columns` to name columns of the metadata, but got {absent}. There are"
            f" {[str(name) for name in frame.columns]}."
        )
    found, left_out = [], {}
    for name in frame.columns if columns is None else columns:
        series = frame[name]
        if why := _unusable(series):
            left_out[str(name)] = why
            continue
        known = None if train is None or name not in train else train[name]
        both = series if known is None else pd.concat([series, known], ignore_index=True)
        codes, values = _groups(both, bins, max_values)
        used = np.unique(codes[: len(series)])
        if len(used) < 2:
            left_out[str(name)] = "all samples are in one group"
            continue
        train_codes = None if known is None else codes[len(series) :]
        found.append(Column(str(name), tuple(values), codes[: len(series)], train_codes))
    return found, left_out


def _unusable(series: pd.Series[Any]) -> str | None:
    n = series.nunique()
    if n == 0:
        return "all values are missing"
    if n == 1 and not series.isna().any():
        return "all samples have the same value"
    if n == len(series) and not pd.api.types.is_float_dtype(series):
        return "every sample has a value of its own: an id, not a group"
    return None


def _groups(series: pd.Series[Any], bins: int, max_values: int) -> tuple[np.ndarray[Any, Any], list[str]]:
    missing = series.isna().to_numpy()
    if _is_quantity(series):
        cut, edges = pd.qcut(series, bins, labels=False, retbins=True, duplicates="drop")
        codes = cut.fillna(-1).to_numpy(dtype=int)
        names = [f"{_short(a)} to {_short(b)}" for a, b in pairwise(edges)]
    else:
        counts = series.value_counts()
        names = [str(value) for value in counts.index]
        codes = series.map(dict(zip(counts.index, range(len(counts)), strict=True))).fillna(-1).to_numpy(dtype=int)
        if len(names) > max_values:
            codes, names = np.minimum(codes, max_values - 1), [*names[: max_values - 1], OTHER]
    if missing.any():
        codes, names = np.where(missing, len(names), codes), [*names, MISSING]
    return codes, names


def _is_quantity(series: pd.Series[Any]) -> bool:
    kinds = pd.api.types
    if kinds.is_bool_dtype(series) or not (kinds.is_numeric_dtype(series) or kinds.is_datetime64_any_dtype(series)):
        return False
    return series.nunique() > FEW_NUMBERS


def _short(edge: Any) -> str:
    return f"{edge:.4g}" if isinstance(edge, float | int | np.number) else str(edge)
