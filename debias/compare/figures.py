"""Figures of a comparison: the worst group of each method, alone and against the average; each group; weights.

Each comes for light and for dark paper. The colours are Okabe and Ito's, told apart with every common colour vision.
"""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from debias.compare.paper import DARK, LIGHT, Paper, color, dress, heading, legend, title
from debias.compare.points import worst_group, worst_vs_average
from debias.compare.table import Comparison, Row, label
from debias.extras import needs_extra

with needs_extra("compare"):
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["DARK", "FIGURES", "LIGHT", "Paper", "by_group", "group_weights", "read_weights"]

BAR_METHODS, BAR_GROUPS = 5, 8  # more are a heatmap
NUMBERED_GROUPS = 14  # more have no numbers in their cells
COLUMNS = 4
_WEIGHT = re.compile(r"^train/(?:[^/]+/)?(?:group|domain)_weight/(?P<group>.+)$")


def by_group(comparison: Comparison, paper: Paper = LIGHT) -> Figure | None:
    """The metric of each group: bars with each seed as a dot, or a heatmap where there are many of them.

    Args:
        comparison: what to draw.
        paper: light or dark.

    Returns:
        The figure, or None without groups.
    """
    rows = [row for row in comparison.rows if row.runs]
    if not comparison.groups or not rows:
        return None
    few = len(rows) <= BAR_METHODS and len(comparison.groups) <= BAR_GROUPS
    return (_group_bars if few else _group_heatmap)(comparison, rows, paper)


def _group_bars(comparison: Comparison, rows: Sequence[Row], paper: Paper) -> Figure:
    groups, scale = comparison.groups, 100 if comparison.percent else 1
    size = min(14.0, max(6.0, 2.0 + 0.32 * len(groups) * (len(rows) + 1)))
    figure = Figure(figsize=(size, 4.4), layout="constrained", facecolor=paper.background)
    axes = figure.subplots()
    dress(axes, paper, grid="y")
    width = 0.8 / len(rows)
    colors = dict(zip((row.method for row in rows), _bar_colors(rows, paper), strict=True))
    for i, row in enumerate(rows):
        places = np.arange(len(groups)) + (i - (len(rows) - 1) / 2) * width
        means = [scale * row.by_group[name].mean for name in groups]
        axes.bar(places, means, 0.92 * width, color=colors[row.method], label=label(row.method), zorder=2)
        for run in row.runs if len(row.runs) > 1 else ():
            values = [scale * run.test.by_group.get(name, math.nan) for name in groups]
            dot: dict[str, Any] = {"color": paper.ink, "edgecolor": paper.background, "linewidth": 0.5}
            axes.scatter(places, values, s=11, zorder=3, clip_on=False, **dot)
    axes.set_xticks(range(len(groups)), [_wrap(name) for name in groups])
    axes.set_ylabel(f"test {comparison.unit}")
    if comparison.percent:
        axes.set_ylim(0, 100)
    dots = ": mean over seeds, one dot a seed" if any(len(row.runs) > 1 for row in rows) else ""
    title(axes, comparison, f"By group{dots}", paper)
    legend(figure, axes, paper, loc="outside lower center", ncols=5)
    return figure


def _bar_colors(rows: Sequence[Row], paper: Paper) -> list[str]:
    """ERM's and balanced ERM's colours are always the same."""
    others = iter(paper.colors[2:])
    fixed = {"erm": paper.colors[0], "balanced": paper.colors[1]}
    return [fixed.get(row.method) or next(others) for row in rows]


def _group_heatmap(comparison: Comparison, rows: Sequence[Row], paper: Paper) -> Figure:
    """Rows are methods; the average and the worst group stand before the groups, a little apart."""
    scale = 100 if comparison.percent else 1
    columns = ["average", "worst group", *comparison.groups]
    spreads = [[row.average, row.worst, *(row.by_group[name] for name in comparison.groups)] for row in rows]
    values = np.array([[scale * cell.mean for cell in line] for line in spreads])
    numbered = len(comparison.groups) <= NUMBERED_GROUPS
    size = (2.9 + (0.95 if numbered else 0.24) * len(columns), 1.5 + 0.34 * len(rows))
    figure = Figure(figsize=(max(6.0, size[0]), max(3.0, size[1])), layout="constrained", facecolor=paper.background)
    axes = figure.subplots()
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    edges = np.array([*(x + (0.15 if x > 1 else 0) for x in range(len(columns))), len(columns) + 0.15])
    for part in (slice(0, 2), slice(2, None)):
        x = edges[part.start : 3] if part.stop == 2 else edges[2:]
        x = np.array([0.0, 1.0, 2.0]) if part.stop == 2 else x
        mesh = axes.pcolormesh(
            x, np.arange(len(rows) + 1), values[:, part], cmap="cividis", vmin=low, vmax=max(high, low + 1e-9)
        )
        mesh.set(edgecolor=paper.background, linewidth=1)
    centres = [(0.5 + c) if c < 2 else 0.65 + c for c in range(len(columns))]
    if numbered:
        for r, line in enumerate(spreads):
            for c, cell in enumerate(line):
                if cell.n:
                    text = f"{scale * cell.mean:.1f}" if comparison.percent else f"{cell.mean:.3f}"
                    if cell.n > 1:
                        text += f" ±{scale * cell.std:.1f}" if comparison.percent else f" ±{cell.std:.2f}"
                    bright = (values[r, c] - low) / max(high - low, 1e-9) > 0.5
                    axes.text(
                        centres[c],
                        r + 0.5,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="black" if bright else "white",
                    )
    axes.invert_yaxis()
    axes.set_yticks([r + 0.5 for r in range(len(rows))], [label(row.method) for row in rows], fontsize=9)
    if numbered:
        axes.set_xticks(centres, [_wrap(name) for name in columns], fontsize=9)
    else:
        axes.set_xticks(centres, columns, fontsize=7, rotation=90)
    axes.tick_params(length=0, colors=paper.ink)
    axes.spines[:].set_visible(False)
    axes.set_facecolor(paper.background)
    spread = "mean ± deviation over seeds" if any(len(row.runs) > 1 for row in rows) and numbered else "mean over seeds"
    title(axes, comparison, f"By group, test {comparison.unit}: {spread}", paper)
    bar = figure.colorbar(axes.collections[0], ax=axes, pad=0.02, aspect=30)
    bar.ax.tick_params(colors=paper.ink, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def group_weights(comparison: Comparison, paper: Paper = LIGHT) -> Figure | None:
    """Weights of groups over optimiser steps, a panel for each method that logs them: mean over seeds, and deviation.

    Read from the CSVLogger's files below each run's folder.

    Args:
        comparison: what to draw.
        paper: light or dark.

    Returns:
        The figure, or None where no run logged weights.
    """
    panels = []
    for row in comparison.rows:
        runs = [read_weights(run.record.folder) for run in row.runs if run.record.folder is not None]
        if runs := [run for run in runs if run]:
            panels.append((row, runs))
    if not panels:
        return None
    groups = list(dict.fromkeys(name for _, runs in panels for run in runs for name in run))
    styles = {name: _group_style(g, len(groups), paper) for g, name in enumerate(groups)}
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.0, 3.4 * columns), 2.9 * lines + 0.9), layout="constrained")
    figure.set_facecolor(paper.background)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (row, runs) in zip(grid, panels, strict=False):
        dress(axes, paper)
        for name, style in styles.items():
            steps, mean, std = _over_seeds([run[name] for run in runs if name in run])
            if len(steps):
                axes.plot(steps, mean, label=name, linewidth=1.5, marker="o" if len(steps) == 1 else None, **style)
                if len(groups) <= 2 * BAR_GROUPS:
                    axes.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)
        axes.set_title(label(row.method), fontsize=10, color=paper.ink)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    figure.axes[0].set_ylabel("weight")
    band = ": mean over seeds" if any(len(runs) > 1 for _, runs in panels) else ""
    band += ", band one deviation" if band and len(groups) <= 2 * BAR_GROUPS else ""
    figure.suptitle(heading(comparison, f"Weights of groups over steps{band}"), fontsize=10, color=paper.ink)
    if len(groups) <= 2 * BAR_GROUPS:
        handles = [Line2D([], [], linewidth=1.5, **style) for style in styles.values()]
        names = figure.legend(
            handles, groups, loc="outside lower center", ncols=min(len(groups), 2 * columns), frameon=False, fontsize=9
        )
        color(names, paper)
    return figure


def read_weights(folder: Path) -> dict[str, dict[int, float]]:
    """Weights that a run logged, by group and step; of several files below ``folder`` later ones count.

    Args:
        folder: of a run, with a CSVLogger's ``metrics.csv`` at any depth.

    Returns:
        Empty where none is there, or none holds weights. A file that cannot be read is left out with a warning.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("metrics.csv"), key=lambda path: (path.stat().st_mtime, path)):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    for column, value in row.items():
                        name = _WEIGHT.match(column or "")
                        if name and value and row.get("step"):
                            step, weight = int(float(row["step"])), float(value)
                            found.setdefault(name["group"], {})[step] = weight
        except (OSError, ValueError, ArithmeticError, csv.Error) as error:
            warnings.warn(f"{path} cannot be read ({error}): the figure of weights leaves it out.", stacklevel=2)
    return found


FIGURES: dict[str, Callable[[Comparison, Paper], Figure | None]] = {
    "worst_group": worst_group,
    "worst_vs_average": worst_vs_average,
    "by_group": by_group,
    "group_weights": group_weights,
}


def _over_seeds(runs: Sequence[dict[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and deviation at the steps that all runs logged."""
    if not runs:
        return np.empty(0), np.empty(0), np.empty(0)
    steps = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[step] for step in steps] for run in runs])
    std = values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), std


def _group_style(g: int, n: int, paper: Paper) -> dict[str, Any]:
    if n > 2 * BAR_GROUPS:
        return {"color": colormaps["viridis"](g / (n - 1)), "linestyle": "-"}
    # Blue first: in this figure colours are groups, and ERM's is not one of them.
    colors = paper.colors[2:] + paper.colors[:2]
    return {"color": colors[g % len(colors)], "linestyle": ("-", "--", ":")[g // len(colors) % 3]}


def _wrap(name: str) -> str:
    return name.replace(" ", "\n") if len(name) > 8 else name
