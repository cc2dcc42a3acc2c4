"""The page of an audit: one HTML file without network; everything that comes from data is escaped."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from debias.audit.findings import DASH, number, share, where

__all__ = ["render"]

SHOWN = 25  # rows of a table on the page; all are in its CSV


def render(report: Any) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    show = share if report.percent else number
    environment.filters |= {"share": share, "number": number, "show": show, "signed": _signed, "p": _p, "group": where}
    # A table that this audit lacks is an empty one.
    tables = defaultdict(list, {name: table.head(SHOWN).to_dict("records") for name, table in report.tables.items()})
    return environment.get_template("page.html.jinja").render(
        report=report,
        tables=tables,
        sizes={name: len(table) for name, table in report.tables.items()},
        groups=_ranges(report.frame[report.frame["ranked"].astype(bool)].head(SHOWN), "low", "high", "estimate"),
        overall=_place(report),
        leans=_ranges(report.tables.get("shortcuts", pd.DataFrame()).head(SHOWN), "lean_low", "lean_high", "lean"),
    )


def _place(report: Any) -> float | None:
    """Where the overall metric lies on the scale of the groups' intervals, in percent of its width."""
    table = report.frame[report.frame["ranked"].astype(bool)].head(SHOWN)
    if not len(table):
        return None
    low, high = _scale(table, "low", "high")
    return float(np.clip(100 * (report.overall["estimate"] - low) / (high - low), 0, 100))


def _scale(table: pd.DataFrame, low: str, high: str) -> tuple[float, float]:
    ends = float(table[low].min()), float(table[high].max())
    return ends if np.isfinite(ends).all() and ends[1] > ends[0] else (0.0, 1.0)


def _ranges(table: pd.DataFrame, low: str, high: str, estimate: str) -> list[dict[str, Any]]:
    """Rows with the place of their interval, in percent of the width that all need."""
    if not len(table):
        return []
    start, end = _scale(table, low, high)
    if estimate == "lean":
        start, end = min(start, 0.0), max(end, 0.0)
    rows = table.to_dict("records")
    for row in rows:
        left, right, dot = (np.clip(100 * (row[key] - start) / (end - start), 0, 100) for key in (low, high, estimate))
        known = np.isfinite([left, right, dot]).all()
        row["range"] = {"left": f"{left:.1f}", "width": f"{right - left:.1f}", "dot": f"{dot:.1f}"} if known else None
        row["zero"] = f"{100 * (0 - start) / (end - start):.1f}"
    return rows


def _signed(value: float, percent: bool = True) -> str:
    if value is None or not np.isfinite(value):
        return DASH
    return f"{100 * value:+.1f}" if percent else f"{value:+.4g}"


def _p(value: float) -> str:
    if value is None or not np.isfinite(value):
        return DASH
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
