"""How well a column is read from the features, and what the model does when it is erased from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from debias.audit.columns import Column
from debias.audit.samples import Samples
from debias.audit.shortcuts import strata_of
from debias.audit.statistics import differences, wilson_interval
from debias.monitors.attribute_probe import probe_attribute

__all__ = ["Eraser", "erasure_table", "probe_table"]

Array = np.ndarray[Any, Any]
MOST_SAMPLES = 10_000  # more are not looked at: a probe of so many is sure to a percent
RANDOM_DRAWS = 3


def probe_table(samples: Samples, *, confidence: float, seed: int) -> pd.DataFrame:
    """Accuracy of a linear probe for each column and layer, with the shuffled baseline; see ``AttributeProbe``.

    Returns:
        One row for each column and layer: ``accuracy`` with ``low`` and ``high`` on ``count`` held-out samples,
        ``balanced_accuracy``, ``chance`` (the most frequent value), and both accuracies after shuffling.
    """
    chosen = _some(len(samples), seed)
    numbers = torch.from_numpy(chosen)  # on several ranks, which all hold all samples, each counts once
    rows = []
    for layer, features in samples.features.items():
        x = torch.from_numpy(np.ascontiguousarray(features[chosen]))
        for column in samples.columns:
            codes = column.codes[chosen]
            found = probe_attribute(x, torch.from_numpy(codes), len(column), numbers=numbers, seed=seed)
            scores = {name: float(value) for name, value in found.items()}
            each = np.bincount(codes)
            each = each[each > 1]
            scored = int((each - np.maximum(1, each // 2)).sum())
            low, high = wilson_interval(np.array(scores["accuracy"] * scored), np.array(scored), confidence)
            ends = {"low": float(low), "high": float(high), "count": scored}
            row: dict[str, Any] = {"column": column.name, "layer": layer}
            rows.append(row | scores | ends)
    return pd.DataFrame(rows)


class Eraser:
    """Erases concepts from features: no linear classifier of an erased one does better than a constant.

    LEACE (Belrose et al., LEACE: Perfect linear concept erasure in closed form, NeurIPS 2023, theorem 4.2), which
    changes the features least in the mean square.

    Args:
        features: ``(N, D)``.
    """

    def __init__(self, features: Array) -> None:
        self.features = features
        x = features.astype(np.float64)
        x = x - x.mean(0)
        variances, vectors = np.linalg.eigh(x.T @ x / len(x))
        kept = variances > max(variances[-1], 0) * len(variances) * np.finfo(np.float64).eps
        root = np.sqrt(variances[kept])
        self._white = x @ (vectors[:, kept] / root)
        self._back = (vectors[:, kept] * root).T

    def erase(self, concept: Array) -> Array:
        """The features without a concept, float64 ``(N, D)``.

        Args:
            concept: numbers ``(N, k)``, such as one column for each value.
        """
        # Whitened, the concept spans a few directions: they are taken out there, and the rest is put back.
        z = concept - concept.mean(0)
        directions, strength, _ = np.linalg.svd(self._white.T @ z / len(z), full_matrices=False)
        directions = directions[:, strength > max(strength.max(initial=0) * 1e-9, 1e-300)]
        return self.features - (self._white @ directions) @ (directions.T @ self._back)


def erasure_table(samples: Samples, head: Callable[[Array], Array], layer: str, *, seed: int) -> pd.DataFrame:
    """What changes when each column is erased from the input of the head.

    Args:
        samples: of a classifier, with the features of ``layer``.
        head: makes logits ``(N, classes)``, or ``(N, 1)``, of features ``(N, D)``.
        layer: name of the features that the head reads.
        seed: of the samples, and of the random concepts: the same values, shuffled.

    Returns:
        One row a column: share of predictions ``changed``, accuracy ``before`` and ``after``, and the ``lean`` of the
        column before and after, each also for random directions of the same number (mean of three draws).
    """
    assert samples.target is not None
    chosen = _some(len(samples), seed)
    random = np.random.default_rng(seed)
    features, target = samples.features[layer][chosen], samples.target[chosen]
    before, eraser = _classes(head(features)), Eraser(features)
    strata, k = strata_of(samples)
    rows = []
    for column in samples.columns:
        codes = column.codes[chosen]
        value, c, lean = _strongest(before, codes, column, strata[chosen], k, samples)
        if value is None:
            continue
        one_hot = np.eye(len(column))[codes]
        after = _classes(head(eraser.erase(one_hot)))
        drawn = [_classes(head(eraser.erase(one_hot[random.permutation(len(codes))]))) for _ in range(RANDOM_DRAWS)]

        def leans(z: Array, value: int = value, c: int = c, codes: Array = codes, column: Column = column) -> float:
            return float(differences(z == c, codes, len(column), strata[chosen], k).effect[value])

        rows.append(
            {
                "column": column.name,
                "value": column.values[value],
                "class": samples.classes[c],
                "count": len(codes),
                "changed": (after != before).mean(),
                "changed_random": np.mean([(z != before).mean() for z in drawn]),
                "before": (before == target).mean(),
                "after": (after == target).mean(),
                "after_random": np.mean([(z == target).mean() for z in drawn]),
                "lean_before": lean,
                "lean_after": leans(after),
                "lean_random": np.mean([leans(z) for z in drawn]),
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values("lean_before", key=np.abs, ascending=False, kind="stable") if len(table) else table


def _strongest(
    z: Array, codes: Array, column: Column, strata: Array, k: int, samples: Samples
) -> tuple[int | None, int, float]:
    """Value and class with the largest lean, and that lean."""
    best: tuple[int | None, int, float] = (None, 0, 0.0)
    for c in [samples.positive] if len(samples.classes) == 2 else range(len(samples.classes)):
        effect = differences(z == c, codes, len(column), strata, k).effect
        if np.isfinite(effect).any():
            value = int(np.nanargmax(effect))
            if best[0] is None or effect[value] > best[2]:
                best = value, c, float(effect[value])
    return best


def _classes(logits: Array) -> Array:
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(1)


def _some(n: int, seed: int) -> Array:
    if n <= MOST_SAMPLES:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, MOST_SAMPLES, replace=False))
