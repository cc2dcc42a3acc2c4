"""The audit itself: samples in, a report out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from debias import __version__
from debias.audit.advice import advise
from debias.audit.columns import PURE, encode
from debias.audit.findings import findings
from debias.audit.groups import TARGET, fairness, group_table, rates, target_column
from debias.audit.reading import join, read_table
from debias.audit.report import Report
from debias.audit.samples import Samples
from debias.audit.shortcuts import associations, conflict_table, lean_table, shortcut_table
from debias.audit.slices import slice_table
from debias.audit.statistics import mean_interval, wilson_interval
from debias.errors import DebiasError
from debias.ops.arguments import MOST, check_count, check_number, checked
from debias.ops.fields import arguments

__all__ = ["Settings", "audit_predictions", "examine"]


@arguments
class Settings:
    """How an audit is made.

    Args:
        columns: the metadata to look at; all by default.
        bins: quantile bins of a numeric column.
        max_values: rarer values of a column with more categories are one group.
        min_count: smaller groups are shown, and neither tested nor ranked.
        alpha: false-discovery rate of each table.
        confidence: of the intervals.
        resamples: of the bootstrap.
        slices: how many slices of each kind to look for; 0 for none.
        seed: of all draws.
    """

    columns: Sequence[str] | None = None
    bins: int = 4
    max_values: int = 50
    min_count: int = 20
    alpha: float = 0.05
    confidence: float = 0.95
    resamples: int = 200
    slices: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("bins", 2), ("max_values", 2), ("min_count", 1), ("resamples", 20), ("slices", 0)):
            setattr(self, name, check_count(name, getattr(self, name), least, MOST))
        check_count("seed", self.seed, 0)
        for name in ("alpha", "confidence"):
            check_number(name, getattr(self, name), "(0, 1)")


@checked(first=True)
def audit_predictions(
    frame: pd.DataFrame,
    *,
    metadata: pd.DataFrame | None = None,
    id: str | None = None,
    train: pd.DataFrame | None = None,
    title: str = "Audit",
    progress: bool = True,
    target: str = "target",
    prediction: str = "prediction",
    score: str = "score",
    scores: str | None = None,
    task: str | None = None,
    positive: str | None = None,
    **settings: Any,
) -> Report:
    """Audit a table of predictions.

    Args:
        frame: one row a sample: targets, predictions or scores (see :func:`debias.audit.reading.read_table`), and
            metadata in all other columns.
        metadata: more columns, in the same order or joined by ``id``.
        id: column that names the samples; it is not a group.
        train: metadata and ``target`` of the training samples: whether the label goes with a column is then told by
            what the model has seen.
        title: of the page.
        progress: show a bar on what takes longer than two seconds.
        target: see :func:`debias.audit.reading.read_table`.
        prediction: likewise.
        score: likewise.
        scores: likewise.
        task: likewise.
        positive: likewise.
        **settings: those of :class:`Settings`.

    Raises:
        DebiasError: the table holds something that it must not, or an argument is wrong.

    Example:
        >>> import pandas as pd
        >>> from debias.audit import audit_predictions
        >>> place, target = ["water", "land"] * 200, ["bird", "bird", "fish", "fish"] * 100
        >>> predictions = ["bird" if p == "land" else t for p, t in zip(place, target)]
        >>> report = audit_predictions(pd.DataFrame({"target": target, "prediction": predictions, "place": place}))
        >>> report.worst(1)[["column", "value", "and_column", "and_value", "count", "estimate"]].values.tolist()
        [['target', 'fish', 'place', 'land', 100, 0.0]]
    """
    if metadata is not None:
        frame = join(frame, metadata, id)
    names: Sequence[str] = ()
    if id is not None:
        if id not in frame:
            raise DebiasError(f"Expected `id` to be a column of the table, but got {id!r}.")
        names = [str(each) for each in frame[id]]
        frame = frame.drop(columns=id)
    samples = read_table(
        frame, target=target, prediction=prediction, score=score, scores=scores, task=task, positive=positive
    )
    samples.names = names
    if train is not None:
        samples.train_target = _train_target(train, samples, target)
    return examine(samples, Settings(**settings), train, title=title, progress=progress)


def _train_target(train: pd.DataFrame, samples: Samples, target: str) -> np.ndarray[Any, Any] | None:
    if samples.task == "multilabel":
        names = [f"{target}_{label}" for label in samples.classes]
        return train[names].to_numpy().astype(bool) if set(names) <= set(train) else None
    if target not in train:
        raise DebiasError(f"Expected the training table to have the column `{target}`, but it has {list(train)}.")
    if samples.task == "regression":
        return train[target].to_numpy(dtype=float)
    values = train[target]
    if pd.api.types.is_float_dtype(values) and not values.isna().any():
        values = values.astype(int)
    ids = values.astype(str).map({name: i for i, name in enumerate(samples.classes)})
    if ids.isna().any():
        raise DebiasError(
            f"Expected the training targets to be among the classes {samples.classes}, but got"
            f" {values[ids.isna()].iloc[0]!r}."
        )
    return ids.to_numpy(dtype=int)


def examine(
    samples: Samples,
    settings: Settings,
    train: pd.DataFrame | None = None,
    *,
    title: str,
    progress: bool = True,
    more: Sequence[tuple[str, Callable[[Samples, dict[str, pd.DataFrame]], pd.DataFrame]]] = (),
) -> Report:
    """Audit samples.

    Args:
        samples: what is audited.
        settings: how.
        train: metadata of the training samples.
        title: of the page.
        progress: show a bar on what takes longer than two seconds.
        more: further tables by name, made of the samples and the tables before them.
    """
    s = settings
    samples.columns, samples.left_out = encode(
        samples.metadata, train, columns=s.columns, bins=s.bins, max_values=s.max_values
    )
    _leave_out_pure(samples)
    limits: dict[str, Any] = {"min_count": s.min_count, "confidence": s.confidence}
    drawn: dict[str, Any] = {"confidence": s.confidence, "resamples": s.resamples, "seed": s.seed}
    tables: dict[str, pd.DataFrame] = {}
    found: dict[str, Any] = {"slices": s.slices, "alpha": s.alpha, "seed": s.seed}
    steps: list[tuple[str, Callable[[], pd.DataFrame]]] = [
        ("groups", lambda: group_table(samples, alpha=s.alpha, **limits)),
        ("rates", lambda: rates(samples, **drawn)),
        ("fairness", lambda: fairness(tables["rates"], tables["groups"], s.min_count)),
        ("leans", lambda: lean_table(samples, **limits)),
        ("associations", lambda: associations(samples, **drawn)),
        ("shortcuts", lambda: shortcut_table(
            samples, tables["leans"], tables["associations"], alpha=s.alpha, confidence=s.confidence
        )),
        ("conflict", lambda: conflict_table(samples, alpha=s.alpha, **limits)),
        *((name, lambda make=make: make(samples, tables)) for name, make in more),
        ("slices", lambda: slice_table(samples, **limits, **found) if s.slices else pd.DataFrame()),
    ]  # fmt: skip
    with tqdm(steps, desc="audit", delay=2, disable=not progress, leave=False) as bar:
        for name, make in bar:
            bar.set_description(f"audit: {name}", refresh=False)
            tables[name] = make()
    tables = {name: table for name, table in tables.items() if len(table) or name == "groups"}
    report = Report(
        title=title,
        task=samples.task,
        metric=samples.metric,
        percent=samples.higher_is_better,
        higher_is_better=samples.higher_is_better,
        overall=_overall(samples, s.confidence),
        classes=samples.classes,
        target_name=next((column.name for column in target_column(samples)), TARGET),
        tables=tables,
        left_out=samples.left_out,
        sizes=_sizes(samples),
        settings={k: v for k, v in asdict(s).items() if v is not None},
    )
    if samples.task == "classification" and len(samples.classes) == 2:
        report.settings["positive class"] = samples.classes[samples.positive]
    report.samples = samples
    report.settings["made"] = f"debias {__version__}, {date.today().isoformat()}"
    if "slices" in tables:
        worst = tables["slices"].iloc[0]
        report.slices_stand_out = bool(worst["significant"] and report.is_worse(worst["difference"]))
        report.examples = _examples(samples, tables["slices"])
    report.findings = findings(report)
    report.advice = advise(report)
    return report


def _examples(samples: Samples, slices: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """What the example rows of slices are called and look like."""
    rows = sorted({row for rows in slices["examples"] for row in rows})
    shown = samples.shown or (lambda row: {"picture": None, "text": None})
    return {row: {"name": samples.names[row] if len(samples.names) else f"row {row}"} | shown(row) for row in rows}


def _leave_out_pure(samples: Samples) -> None:
    """Leave out columns of which every value goes with one class only: they cannot be told from the label."""
    if samples.task != "classification":
        return
    assert samples.target is not None
    for column in list(samples.columns):
        if len(np.unique(samples.target * len(column) + column.codes)) == len(np.unique(column.codes)):
            samples.columns.remove(column)
            samples.left_out[column.name] = PURE


def _overall(samples: Samples, confidence: float) -> dict[str, Any]:
    x = samples.quality.astype(float)
    n, mean = np.array(len(x)), x.mean()
    if samples.quality.dtype == bool:
        low, high = wilson_interval(x.sum(), n, confidence)
    else:
        low, high = mean_interval(mean, np.array(x.var(ddof=1) if n > 1 else np.nan), n, confidence)
    return {"estimate": float(mean), "low": float(low), "high": float(high), "count": int(n)}


def _sizes(samples: Samples) -> dict[str, dict[str, Any]]:
    """How many groups a column makes, alone and with the label, and how small the smallest is that occurs."""
    found = {}
    for column in samples.columns:
        codes, target, side = column.codes, samples.target, "audited"
        if column.train_codes is not None and samples.train_target is not None:
            codes, target, side = column.train_codes, samples.train_target, "training"
        crossed = codes
        if samples.task == "classification":
            assert target is not None
            crossed = target * len(column) + codes
        counts = np.bincount(crossed)
        groups = len(column) * max(1, len(samples.classes))
        smallest = int(counts[counts > 0].min())
        found[column.name] = {"values": len(column), "groups": groups, "smallest": smallest, "of": side}
    return found
