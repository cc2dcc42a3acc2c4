"""What an audit has found: tables, sentences, advice; written as a page, JSON and CSV."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from debias.audit.advice import Advice
from debias.audit.page import render
from debias.errors import DebiasError

__all__ = ["Report", "harmless"]


@dataclass
class Report:
    """The findings of an audit.

    Attributes:
        title: of the page.
        task: what the model does.
        metric: what is measured, in words.
        percent: whether the metric is a share.
        higher_is_better: whether a large value is good.
        overall: the metric over all samples: ``estimate``, ``low``, ``high``, ``count``.
        classes: names of the classes or labels.
        target_name: what the true class is called among the columns.
        tables: every table by name; ``groups`` is always there.
        left_out: columns that could not be used, and why.
        sizes: of each column the number of its ``values``, of ``groups`` with the label, the ``smallest`` of them and
            whether these are ``of`` the training set.
        settings: what the audit was made with.
        findings: sentences, the answer first.
        advice: what to do.
        slices_stand_out: whether the worst slice is worse than the rest by more than noise.
        samples: what was audited, for a comparison.
        examples: ``name``, ``picture`` and ``text`` of the rows that slices give as examples.
    """

    title: str
    task: str
    metric: str
    percent: bool
    higher_is_better: bool
    overall: dict[str, Any]
    classes: tuple[str, ...]
    target_name: str
    tables: dict[str, pd.DataFrame]
    left_out: dict[str, str]
    sizes: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    findings: list[str] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    slices_stand_out: bool = False
    examples: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: Any = field(default=None, repr=False)

    @property
    def frame(self) -> pd.DataFrame:
        """The metric of every group, the worst first."""
        return self.tables["groups"]

    def worst(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` worst groups that are large enough to be ranked."""
        return self.frame[self.frame["ranked"].astype(bool)].head(k)

    def is_worse(self, difference: Any) -> Any:
        """Whether a difference to the rest is a loss."""
        return difference < 0 if self.higher_is_better else difference > 0

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types; what is not defined is None."""
        plain = {
            "title": self.title, "task": self.task, "metric": self.metric, "overall": self.overall,
            "settings": self.settings, "findings": self.findings, "advice": [vars(each) for each in self.advice],
            "left_out": self.left_out,
            "tables": {name: table.to_dict("records") for name, table in self.tables.items()},
        }  # fmt: skip
        return _plain(plain)

    def to_json(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return _write(Path(path), text)

    def to_html(self, path: str | Path) -> Path:
        """Write the page: one file that needs no network."""
        return _write(Path(path), render(self))

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write ``audit.html``, ``audit.json`` and one CSV a table into a folder.

        Returns:
            The files by name.

        Raises:
            DebiasError: they cannot be written.
        """
        folder = Path(folder)
        paths = {"audit.html": self.to_html(folder / "audit.html"), "audit.json": self.to_json(folder / "audit.json")}
        for name, table in self.tables.items():
            text = harmless(table).to_csv(index=False)
            paths[f"{name}.csv"] = _write(folder / f"{name}.csv", text)
        return paths


def harmless(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a quote before every text that a spreadsheet would take for a formula."""
    safe = table.map(_quoted)
    return safe.rename(columns=_quoted)


def _quoted(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(("=", "+", "-", "@")) else cell


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _write(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DebiasError(
            f"Expected to write {path}, but that failed: {error}. Choose a folder that can be written."
        ) from error
    return path
