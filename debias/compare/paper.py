"""What the figures of a comparison share: light and dark paper, titles, legends, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from debias.compare.table import Comparison
from debias.extras import needs_extra

with needs_extra("compare"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "Paper", "color", "dress", "heading", "inside", "legend", "title"]


@dataclass(frozen=True)
class Paper:
    """Colours of a figure.

    Attributes:
        end: of the file's name.
        background: behind everything.
        ink: text, axes and edges of marks.
        muted: lines that only guide the eye.
        colors: of methods and groups; ERM has the first, balanced ERM the second.
    """

    end: str
    background: str
    ink: str
    muted: str
    colors: tuple[str, ...]


LIGHT = Paper(
    "", "#ffffff", "#1f2328", "#8c959f", ("#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#4D4D4D")
)
# On black the palette's blue would vanish, and its yellow is seen.
DARK = Paper(
    "-dark",
    "#0d1117",
    "#e6edf3",
    "#6e7681",
    ("#E8743B", "#56B4E9", "#F0E442", "#1FBF91", "#E29BC4", "#E69F00", "#C9D1D9"),
)


def dress(axes: Axes, paper: Paper, grid: str = "both") -> None:
    """Set grid, spines and colours."""
    axes.set_facecolor(paper.background)
    axes.grid(axis=grid, color=paper.muted, alpha=0.25, linewidth=0.8, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(paper.muted)
    axes.tick_params(colors=paper.ink, labelsize=9)
    axes.xaxis.label.set_color(paper.ink)
    axes.yaxis.label.set_color(paper.ink)


def title(axes: Axes, comparison: Comparison, text: str, paper: Paper) -> None:
    """Write the title."""
    axes.set_title(heading(comparison, text), fontsize=10, color=paper.ink, loc="left")


def heading(comparison: Comparison, text: str) -> str:
    """The recipe before a text, and a mark where test data chose."""
    marked = "ORACLE, chosen by test data\n" if comparison.rule.oracle else ""
    return f"{marked}{comparison.recipe}. {text}"


def legend(figure: Figure, axes: Axes, paper: Paper, **place: Any) -> None:
    """A legend of the whole figure."""
    color(figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, **place), paper)


def color(legend: Any, paper: Paper) -> None:
    """Ink for the text of a legend."""
    for text in legend.get_texts():
        text.set_color(paper.ink)


def inside(axes: Axes, comparison: Comparison, axis: Literal["x", "y"]) -> None:
    """Keep an axis of percentages within [0, 100]."""
    if comparison.percent:
        low, high = getattr(axes, f"get_{axis}lim")()
        getattr(axes, f"set_{axis}lim")(max(0.0, low), min(100.0, high))
