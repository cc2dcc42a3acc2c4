"""The comparison in W&B: one run with the table, native charts and the figures, beside the runs that it sums up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from debias.compare.table import Comparison, label, runs_rows, table_rows
from debias.errors import DebiasError
from debias.extras import needs_extra

with needs_extra("wandb"):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

__all__ = ["log_summary", "summary_id"]

NAME = "comparison"
JOB_TYPE = "summary"
CHART_GROUPS = 16  # more would bury the other charts; the table has them all


def summary_id(project: str, group: str) -> str:
    """Id of the summary run: the same for the same project and group, so that a rebuilt comparison replaces it."""
    return hashlib.sha256(f"{project}/{group}".encode()).hexdigest()[:16]


def log_summary(
    comparison: Comparison,
    figures: Mapping[str, Path],
    *,
    project: str,
    group: str,
    out: Path,
    entity: str | None = None,
) -> None:
    """Log a comparison as the run ``comparison`` of its group, and finish that run.

    Logged are ``table`` and ``runs`` with the content of ``table.csv`` and ``runs.csv``; charts of W&B's own,
    ``worst_group``, ``worst_vs_average`` and ``by_group/<name>``; the PNG files as ``figure/<name>``; and the summary
    values ``<method>/worst_group``, ``<method>/average``, ``<method>/gap`` and, where training counts are known,
    ``<method>/adjusted_average``, means over seeds, ``rule`` and
    ``notes``. ``WANDB_MODE=offline`` writes the same to ``out``, for ``wandb sync``.

    Args:
        comparison: what to log.
        figures: files by name, from :func:`debias.compare.report.write_report`; those that are no PNG do not count.
        project: of W&B.
        group: that the runs of the comparison are in.
        out: existing folder for W&B's own files.
        entity: user or team; W&B's default for None.

    Raises:
        DebiasError: another W&B run is in progress in this process, or W&B refuses, for instance without a login.
    """
    if wandb.run is not None:
        raise DebiasError(
            f"Expected no W&B run in progress, but `{wandb.run.name}` is, and the comparison would be mixed into it."
            " Call `wandb.finish()` first."
        )
    logger = WandbLogger(
        name=NAME,
        project=project,
        group=group,
        job_type=JOB_TYPE,
        tags=[comparison.recipe, comparison.rule.name],
        id=summary_id(project, group),
        resume="allow",
        save_dir=str(out),
        entity=entity,
    )
    try:
        run = logger.experiment
        run.config.update(
            {
                "recipe": comparison.recipe,
                "recipe_hash": comparison.recipe_hash,
                "rule": comparison.rule.name,
                "metric": comparison.metric,
                "methods": [row.method for row in comparison.rows],
            },
            allow_val_change=True,
        )
        run.log(_content(comparison, figures))
        run.summary.update(_summary(comparison))
    except wandb.errors.Error as error:
        raise DebiasError(
            f"Expected to log the comparison to the W&B project `{project}`, but W&B refused: {error}. Run `wandb"
            " login`, or set WANDB_MODE=offline and `wandb sync` later. The files of the report are complete."
        ) from error
    finally:
        wandb.finish()


def _content(comparison: Comparison, figures: Mapping[str, Path]) -> dict[str, Any]:
    """Everything that is logged, under the names that W&B shows."""
    scale = 100 if comparison.percent else 1
    rows = [row for row in comparison.rows if row.runs]
    unit = comparison.unit
    values = wandb.Table(
        columns=["method", "average", "worst group"],
        data=[[label(r.method), _scaled(r.average.mean, scale), _scaled(r.worst.mean, scale)] for r in rows],
    )
    found: dict[str, Any] = {
        "table": _table(table_rows(comparison)),
        "runs": _table(runs_rows(comparison)),
        "worst_group": wandb.plot.bar(values, "method", "worst group", title=f"worst group, test {unit}"),
        "worst_vs_average": wandb.plot.scatter(
            values, "average", "worst group", title=f"worst group against average, test {unit}"
        ),
    }
    for name in comparison.groups if len(comparison.groups) <= CHART_GROUPS else ():
        bars = wandb.Table(
            columns=["method", name], data=[[label(r.method), _scaled(r.by_group[name].mean, scale)] for r in rows]
        )
        found[f"by_group/{name}"] = wandb.plot.bar(bars, "method", name, title=f"{name}, test {unit}")
    pictures = {path.stem: path for path in figures.values() if path.suffix == ".png"}
    return found | {f"figure/{name}": wandb.Image(str(path)) for name, path in pictures.items()}


def _summary(comparison: Comparison) -> dict[str, Any]:
    values: dict[str, Any] = {"rule": comparison.rule.label, "notes": "\n".join(comparison.notes)}
    for row in comparison.rows:
        figures = {"worst_group": row.worst, "average": row.average, "adjusted_average": row.adjusted, "gap": row.gap}
        for name, spread in figures.items():
            if spread.n:
                values[f"{row.method}/{name}"] = spread.mean
    return values


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    # Mixed: a column of numbers may hold None.
    return wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True)


def _scaled(value: float, scale: float) -> float | None:
    return None if value != value else scale * value
