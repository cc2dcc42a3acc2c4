"""The worst group of each method: sorted, with its interval; and against the average.

Colour and marker say what a method is told of the samples, and nothing else. Names stand beside their points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from debias.compare.paper import LIGHT, Paper, color, dress, inside, title
from debias.compare.table import CONFIDENCE, Comparison, Row, Spread, label
from debias.compare.told import TOLD, told
from debias.extras import needs_extra

with needs_extra("compare"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from scipy.stats import t as student

__all__ = ["interval", "worst_group", "worst_vs_average"]

MARKERS = {"groups": "o", "domains": "s", "nothing": "^", None: "D"}
WORDS = {
    "groups": "told groups",
    "domains": "told domains",
    "nothing": "told nothing",
    None: "not known",
}
REFERENCES = {"erm": "--", "balanced": ":"}
LINE = 0.2  # inches of a line of text


def worst_group(comparison: Comparison, paper: Paper = LIGHT) -> Figure | None:
    """The worst group of each method, the best on top: mean over seeds, its 95 % interval, and each seed.

    Args:
        comparison: what to draw.
        paper: light or dark.

    Returns:
        The figure, or None where nothing tells groups apart.
    """
    best_first = comparison.direction == "max"
    rows = sorted((row for row in comparison.rows if row.worst.n), key=lambda row: row.worst.mean, reverse=best_first)
    if not rows:
        return None
    scale = 100 if comparison.percent else 1
    figure = Figure(figsize=(7.5, 1.9 + 0.27 * len(rows)), layout="constrained", facecolor=paper.background)
    axes = figure.subplots()
    dress(axes, paper, grid="x")
    kinds = {row.method: told(row) for row in rows}
    for place, row in enumerate(rows):
        low, high = (scale * end for end in interval(row.worst))
        shade = _shade(kinds[row.method], paper)
        if comparison.percent:
            low, high = max(0.0, low), min(100.0, high)
        axes.plot([low, high], [place, place], color=shade, linewidth=2, solid_capstyle="butt", zorder=2)
        seeds = [scale * run.test.worst for run in row.runs] if row.worst.n > 1 else []
        axes.scatter(seeds, [place] * len(seeds), s=9, color=paper.ink, alpha=0.6, linewidth=0, zorder=4, clip_on=False)
        axes.scatter(
            scale * row.worst.mean, place, marker=MARKERS[kinds[row.method]], s=52, color=shade, edgecolor=paper.ink,
            linewidth=0.7, zorder=3, clip_on=False, label=label(row.method),
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [label(row.method) for row in rows])
    axes.tick_params(axis="y", length=0, pad=8)  # a mark at the edge stays off the names
    axes.margins(x=0.06)
    axes.autoscale_view(scaley=False)
    inside(axes, comparison, "x")
    axes.set_xlabel(f"worst-group test {comparison.unit}")
    lines = []
    for row in rows:
        if style := REFERENCES.get(row.method):
            line = {"color": paper.ink, "linestyle": style, "linewidth": 1.2}
            axes.axvline(scale * row.worst.mean, zorder=1, **line)  # type: ignore[arg-type]
            lines.append(Line2D([], [], label=label(row.method), **line))  # type: ignore[arg-type]
    several = any(row.worst.n > 1 for row in rows)
    end = f"\nmean over seeds, its {CONFIDENCE:.0%} interval, and each seed (small)" if several else ""
    title(axes, comparison, f"Worst group of each method{end}".replace("95%", "95 %"), paper)
    _key(figure, {kinds[row.method] for row in rows}, lines, paper)
    return figure


def worst_vs_average(comparison: Comparison, paper: Paper = LIGHT) -> Figure | None:
    """Worst-group against average test metric: mean and deviation of each method, and each seed as a small mark.

    Names stand in a column at the side, each joined with its point.

    Args:
        comparison: what to draw.
        paper: light or dark.

    Returns:
        The figure, or None where nothing tells groups apart.
    """
    rows = [row for row in comparison.rows if row.worst.n and row.average.n]
    if not rows:
        return None
    scale = 100 if comparison.percent else 1
    figure = Figure(figsize=(7.5, max(5.2, 1.8 + LINE * len(rows))), layout="constrained", facecolor=paper.background)
    axes = figure.subplots()
    dress(axes, paper)
    kinds = {row.method: told(row) for row in rows}
    for row in rows:
        shade, marker = _shade(kinds[row.method], paper), MARKERS[kinds[row.method]]
        x, y = zip(*((scale * run.test.average, scale * run.test.worst) for run in row.runs), strict=True)
        axes.scatter(x, y, marker=marker, s=14, color=shade, alpha=0.55, linewidth=0, zorder=2, clip_on=False)
        place = scale * row.average.mean, scale * row.worst.mean
        axes.errorbar(
            *place,
            xerr=_bar(place[0], scale * row.average.std, comparison),
            yerr=_bar(place[1], scale * row.worst.std, comparison),
            marker=marker, markersize=8, color=shade, markeredgecolor=paper.ink, markeredgewidth=0.7, elinewidth=1.2,
            zorder=3, clip_on=False, label=label(row.method),
        )  # fmt: skip
    axes.margins(0.12)
    axes.autoscale_view()
    inside(axes, comparison, "x")
    inside(axes, comparison, "y")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the diagonal must not widen them
    axes.axline((0, 0), slope=1, color=paper.muted, linestyle="--", linewidth=1, zorder=1)
    axes.set_xlabel(f"average test {comparison.unit}")
    axes.set_ylabel(f"worst-group test {comparison.unit}")
    several = any(row.worst.n > 1 for row in rows)
    end = ": mean and deviation over seeds; small, each seed" if several else ""
    low, high = max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])
    dashed = "\ndashed: the worst group equals the average" if low < high else ""
    title(axes, comparison, f"Worst group against average{end}{dashed}", paper)
    _name_points(axes, rows, scale, paper)
    _key(figure, set(kinds.values()), [], paper)
    return figure


def interval(spread: Spread) -> tuple[float, float]:
    """The 95 % Student-t interval of the mean over seeds; the mean itself with fewer than two of them.

    Example:
        >>> from debias.compare.table import Spread
        >>> [round(end, 2) for end in interval(Spread(10.0, 1.0, 3))]
        [7.52, 12.48]
    """
    if spread.n < 2:
        return spread.mean, spread.mean
    half = float(student.ppf((1 + CONFIDENCE) / 2, spread.n - 1)) * spread.std / math.sqrt(spread.n)
    return spread.mean - half, spread.mean + half


def _shade(kind: str | None, paper: Paper) -> str:
    return paper.muted if kind is None else paper.colors[(2, 5, 3)[TOLD.index(kind)]]


def _bar(value: float, std: float, comparison: Comparison) -> list[list[float]] | None:
    """One deviation to both sides, within [0, 100] where the metric is a percentage."""
    if math.isnan(std):
        return None
    return [[min(std, value) if comparison.percent else std], [min(std, 100 - value) if comparison.percent else std]]


def _name_points(axes: Axes, rows: Sequence[Row], scale: float, paper: Paper) -> None:
    """Names in a column right of the axes, in the order of their points from top to bottom, and a line to each."""
    bottom, top = axes.get_ylim()
    order = sorted(rows, key=lambda row: (-row.worst.mean, -row.average.mean))
    wanted = [(scale * row.worst.mean - bottom) / (top - bottom) for row in order]
    for row, height in zip(order, _apart(wanted, min(0.045, 0.85 / len(order))), strict=True):
        axes.annotate(
            label(row.method), (scale * row.average.mean, scale * row.worst.mean), (1.03, height),
            textcoords="axes fraction", va="center", fontsize=9, color=paper.ink, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4, "color": paper.muted,
                        "linewidth": 0.7},
        )  # fmt: skip


def _apart(wanted: Sequence[float], distance: float) -> list[float]:
    """Heights in [0, 1], from top to bottom, as near the wanted ones as a distance between any two allows.

    Args:
        wanted: from top to bottom.
        distance: not more than ``1 / len(wanted)``.

    Example:
        >>> [round(height, 2) for height in _apart([0.5, 0.5, 0.1], 0.1)]
        [0.55, 0.45, 0.1]
    """
    # Heights moved up by the distances above them must fall or stay: isotonic regression, by pooling.
    pools: list[tuple[float, int]] = []
    for place, height in enumerate(wanted):
        total, count = height + place * distance, 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            total, count = total + pools[-1][0], count + pools.pop()[1]
        pools.append((total, count))
    lowest = (len(wanted) - 1) * distance
    moved = [min(1.0, max(lowest, total / count)) for total, count in pools for _ in range(count)]
    return [height - place * distance for place, height in enumerate(moved)]


def _key(figure: Figure, kinds: set[str | None], lines: Sequence[Line2D], paper: Paper) -> None:
    """What colours and lines mean."""
    known = [kind for kind in (*TOLD, None) if kind in kinds]
    points = [
        Line2D(
            [], [], linestyle="", marker=MARKERS[kind], markersize=7, color=_shade(kind, paper),
            markeredgecolor=paper.ink, markeredgewidth=0.7, label=WORDS[kind],
        )
        for kind in known
        if kind is not None or len(known) > 1
    ]  # fmt: skip
    if handles := [*points, *lines]:
        color(figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9), paper)
