"""What is audited: for each sample the target, the prediction, how good it is, and metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from debias.audit.columns import Column

__all__ = ["TASKS", "Samples"]

TASKS = ("classification", "multilabel", "regression")
Array = np.ndarray[Any, Any]


@dataclass
class Samples:
    """The audited samples.

    Attributes:
        task: one of ``TASKS``, or ``"detection"``.
        target: class ids ``(N,)``; 0 or 1 ``(N, labels)``; or real numbers ``(N,)``. Of a detector there is none.
        prediction: likewise.
        classes: names of the classes or labels; empty for regression and detection.
        scores: the larger, the more this class or label: ``(N, classes)``; None where they are not known.
        metric: what ``quality`` is, in words.
        quality: how good each prediction is, boolean or real ``(N,)``.
        higher_is_better: whether a large quality is good.
        positive: the class that counts as positive, of two.
        metadata: one row a sample.
        columns: the metadata in groups.
        left_out: columns that could not be used, and why.
        train_target: target of the training samples, like ``target``; None where it is not known.
        features: by layer, ``(N, D)``.
        names: what a sample is called on the page, such as an id or a file.
        shown: what the page shows of a sample, ``picture`` (an address that holds it) and ``text``; None where unknown.
    """

    task: str
    target: Array | None
    prediction: Array | None
    classes: tuple[str, ...]
    scores: Array | None
    metric: str
    quality: Array
    higher_is_better: bool
    metadata: pd.DataFrame
    positive: int = 1
    columns: list[Column] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    train_target: Array | None = None
    features: dict[str, Array] = field(default_factory=dict)
    names: Sequence[str] = ()
    shown: Callable[[int], dict[str, str | None]] | None = None

    def __len__(self) -> int:
        return len(self.quality)
