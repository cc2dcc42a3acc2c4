"""The findings of an audit in plain words, the answer first; every number with its interval and count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

__all__ = ["DASH", "findings", "number", "points", "share", "where"]

DASH = "\N{EN DASH}"  # what is not defined


def share(value: float) -> str:
    """A share in percent; a dash where it is not defined."""
    return DASH if value is None or not np.isfinite(value) else f"{round(100 * value, 1) + 0:.1f} %"


def number(value: float) -> str:
    """Any other number."""
    return DASH if value is None or not np.isfinite(value) else f"{value:,.4g}"


def points(value: float, percent: bool = True) -> str:
    """The size of a difference of shares, in points, or of other numbers."""
    return DASH if not np.isfinite(value) else f"{100 * abs(value):.1f} points" if percent else number(abs(value))


def where(row: Any) -> str:
    """The group of a row, ``place = water and sex = female``."""
    first = f"{row['column']} = {row['value']}"
    return first if not isinstance(row["and_column"], str) else f"{first} and {row['and_column']} = {row['and_value']}"


def findings(report: Any) -> list[str]:
    """Sentences of a report: overall, worst group, strongest pull, what the features hold, slices, what is missing."""
    show = share if report.percent else number
    one = report.overall
    worst = "lowest" if report.higher_is_better else "highest"
    interval = f"[{show(one['low'])}, {show(one['high'])}]"
    said = [f"{report.metric.capitalize()} is {show(one['estimate'])} {interval} on {one['count']:,} samples."]
    groups = report.tables["groups"]
    bad = groups[groups["significant"].astype(bool) & report.is_worse(groups["difference"])] if len(groups) else groups
    if len(bad):
        row = bad.iloc[0]
        said.append(
            f"It is {worst} for {where(row)}: {show(row['estimate'])} [{show(row['low'])}, {show(row['high'])}] of"
            f" {row['count']:,} samples, {points(row['difference'], report.percent)} worse than the"
            f" {show(row['rest'])} of the rest."
        )
        if len(bad) > 1:
            said.append(
                f"{len(bad)} of {int(groups['ranked'].sum())} groups are worse than the rest by more than noise."
            )
    elif len(groups) and not groups["ranked"].any():
        said.append(
            f"No group can be tested: none has {report.settings['min_count']} samples, and as many to compare with."
        )
    elif len(groups):
        said.append(
            f"No group of the {int(groups['ranked'].sum())} that are large enough is worse than the rest by more than"
            " noise."
        )
    else:
        said.append("There is no metadata to group by.")
    said += _precision(report)
    said += _pulls(report)
    slices = report.tables.get("slices", pd.DataFrame())
    if report.slices_stand_out:
        row = slices.iloc[0]
        said.append(
            f"A slice found without names: {row['count']:,} samples with {show(row['estimate'])},"
            f" {row['described_by']}."
        )
    if report.left_out:
        said.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in report.left_out.items()) + ".")
    return said


def _precision(report: Any) -> list[str]:
    """Of a detector, mAP over all images and of the worst group."""
    table = report.tables.get("map", pd.DataFrame())
    if not len(table):
        return []
    whole, groups = table.iloc[0], table.iloc[1:].dropna(subset=["map"])
    text = f"COCO's mAP is {share(whole['map'])} [{share(whole['low'])}, {share(whole['high'])}]"
    if len(groups):
        row = groups.loc[groups["map"].idxmin()]
        text += (
            f", and lowest for {row['column']} = {row['value']}: {share(row['map'])} [{share(row['low'])},"
            f" {share(row['high'])}; {row['count']:,} images]"
        )
    return [text + "."]


def _pulls(report: Any) -> list[str]:
    table = report.tables.get("shortcuts", pd.DataFrame())
    if not len(table):
        return []
    sure = table[table["significant"].astype(bool)]
    if not len(sure):
        untested = table["p_value"].isna()
        end = (
            f" {int(untested.sum())} columns could not be tested: too few samples break the association."
            if untested.any()
            else ""
        )
        return [f"No column pulls the predictions by more than noise at the same true label.{end}"]
    said = []
    for row in sure.iloc[:3].to_dict("records"):
        how = "more" if row["lean"] > 0 else "less"
        numeric = report.task == "regression"
        kind = (
            f"the prediction is {points(row['lean'], False)} {'larger' if row['lean'] > 0 else 'smaller'}"
            if numeric
            else (f"“{row['class']}” is predicted {points(row['lean'])} {how} often")
        )
        ends = number if numeric else share
        text = (
            f"The predictions follow {row['column']}: at the same true label {kind} where {row['column']} ="
            f" {row['value']} than elsewhere [{ends(row['lean_low'])}, {ends(row['lean_high'])}; {row['lean_count']:,}"
            " samples]."
        )
        if np.isfinite(row.get("gap", np.nan)) and row["gap_low"] > 0:
            text += (
                f" {report.metric.capitalize()} is {share(row['holds'])} where {row['column']} agrees with the label as"
                f" usual ({row['holds_count']:,} samples), and {share(row['breaks'])} where it does not"
                f" ({row['breaks_count']:,})."
            )
        said.append(text + _read(report, row["column"]))
    if len(sure) > 3:
        said.append(f"{len(sure) - 3} more columns pull, too: {', '.join(sure['column'].iloc[3:8])}.")
    return said


def _read(report: Any, column: str) -> str:
    """What the features hold of a column."""
    probes = report.tables.get("probes", pd.DataFrame())
    text = ""
    own = probes[probes["column"] == column] if len(probes) else probes
    if len(own):
        row = own.loc[own["accuracy"].idxmax()]
        text += (
            f" The features ({row['layer']}) tell it for {share(row['accuracy'])} [{share(row['low'])},"
            f" {share(row['high'])}; {row['count']:,} samples], {share(row['shuffled_accuracy'])} after shuffling."
        )
    erased = report.tables.get("erasure", pd.DataFrame())
    own = erased[erased["column"] == column] if len(erased) else erased
    if len(own):
        row = own.iloc[0]
        text += (
            f" Erasing it from the features changes {share(row['changed'])} of the predictions; erasing random"
            f" directions {share(row['changed_random'])}."
        )
    return text
