"""Metrics by group, with states of a fixed size: right when a batch, or a rank, lacks a group."""

from __future__ import annotations

from debias.metrics.detection import DetectionAccuracy, GroupMeanAveragePrecision, detection_accuracy
from debias.metrics.group import (
    GroupAccuracy,
    GroupedMetric,
    adjusted_average,
    group_difference,
    group_ratio,
    group_sums,
    worst_group,
)
from debias.metrics.multilabel import MultilabelF1

__all__ = [
    "DetectionAccuracy",
    "GroupMeanAveragePrecision",
    "detection_accuracy",
    "GroupAccuracy",
    "GroupedMetric",
    "MultilabelF1",
    "adjusted_average",
    "group_difference",
    "group_ratio",
    "group_sums",
    "worst_group",
]
