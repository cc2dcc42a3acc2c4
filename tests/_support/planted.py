"""Predictions of a model that reads a column, as strongly as is asked for."""

from __future__ import annotations

import numpy as np
import pandas as pd


def planted(
    n: int = 2000, strength: float = 0.0, seed: int = 0, columns: int = 6, agreement: float = 0.8
) -> pd.DataFrame:
    """A table of predictions.

    Args:
        n: samples.
        strength: share of the predictions that are read from ``place``; the others are right in 85 %.
        seed: of all draws.
        columns: how many columns mean nothing, besides ``age``.
        agreement: how often ``place`` goes with the label.
    """
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n)
    place = np.where(random.random(n) < agreement, y, 1 - y)
    honest = np.where(random.random(n) < 0.85, y, 1 - y)
    table = {"target": y, "prediction": np.where(random.random(n) < strength, place, honest)}
    for i in range(columns):
        table[f"noise {i}"] = random.integers(0, 2 + i % 4, n)
    return pd.DataFrame(table | {"place": np.array(["land", "water"])[place], "age": random.normal(50, 10, n)})
