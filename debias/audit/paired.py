"""What helped? Two models on the same samples, compared sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from debias.audit.report import Report
from debias.audit.run import audit_predictions
from debias.audit.statistics import bootstrap_interval, false_discovery
from debias.errors import DebiasError
from debias.ops.arguments import checked

__all__ = ["compare_predictions", "compared", "paired_table"]

Array = np.ndarray[Any, Any]


@checked(first=True)
def compare_predictions(before: pd.DataFrame, after: pd.DataFrame, **options: Any) -> Report:
    """Audit two tables of predictions of the same samples; the report is that of ``after``, with what has changed.

    Args:
        before: see :func:`debias.audit.audit_predictions`.
        after: the same samples in the same order, or joined by ``id``.
        **options: see there.

    Raises:
        DebiasError: the tables are not of the same samples.

    Example:
        >>> import pandas as pd
        >>> from debias.audit import compare_predictions
        >>> frame = pd.DataFrame({"target": [0, 1] * 50, "prediction": [0, 0] * 50, "place": ["a", "a", "b", "b"] * 25})
        >>> report = compare_predictions(frame, frame.assign(prediction=frame["target"]))
        >>> report.findings[0]
        'Before, accuracy was 50.0 %, now it is 100.0 %: better (50 of 100 samples are better, 0 worse).'
    """
    key = options.get("id")
    if key is not None:
        for name, table in (("before", before), ("after", after)):
            if key not in table:
                raise DebiasError(f"Expected `id={key!r}` to be a column of `{name}`, but it has {list(table)}.")
        if set(before[key]) != set(after[key]) or len(before) != len(after):
            alone = len(set(before[key]) ^ set(after[key]))
            raise DebiasError(
                f"Expected both tables to hold the same ids, but {alone} are in one of them alone. Audit the samples"
                " that both have."
            )
        before = before.set_index(key).loc[after[key]].reset_index()
    first = audit_predictions(before, **options)
    return compared(first, audit_predictions(after, **options))


def compared(before: Report, after: Report) -> Report:
    """The report ``after``, with the tables ``changes`` and ``pulls`` and sentences on what has changed.

    Raises:
        DebiasError: the reports are not of the same samples.
    """
    one, two = before.samples, after.samples
    same = len(one) == len(two) and one.task == two.task and one.classes == two.classes
    if not same or (one.target is not None and not np.array_equal(one.target, two.target)):
        raise DebiasError(
            "Expected both to be predictions of the same samples in the same order, but their targets differ. Give a"
            " column that names the samples: `id=`."
        )
    settings = after.settings
    changes = paired_table(
        one.quality, two, min_count=settings["min_count"], alpha=settings["alpha"],
        confidence=settings["confidence"], resamples=settings["resamples"], seed=settings["seed"],
    )  # fmt: skip
    after.tables = {"changes": changes} | after.tables
    pulls = [each.tables.get("shortcuts", pd.DataFrame()) for each in (before, after)]
    if all(len(each) for each in pulls):
        old, new = (each.set_index("column")[["value", "class", "lean", "lean_low", "lean_high"]] for each in pulls)
        after.tables["pulls"] = old.add_suffix("_before").join(new.add_suffix("_after")).reset_index()
    after.findings = [*_said(after, changes), *after.findings]
    return after


def paired_table(
    before: Array, samples: Any, *, min_count: int, alpha: float, confidence: float, resamples: int, seed: int
) -> pd.DataFrame:
    """The metric before and after, over all samples and in each group of one column or of a column and the true class.

    Right or wrong is compared by McNemar's exact test, and its interval is the paired bootstrap; other metrics by
    Wilcoxon's signed-rank test.

    Args:
        before: quality of each sample before, ``(N,)``.
        samples: those of after.
        min_count: smaller groups are left out.
        alpha: false-discovery rate.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of its draws.

    Returns:
        All samples first, then the groups that have changed most; ``better`` and ``worse`` count the samples.
    """
    from debias.audit.groups import _groupings, target_column

    own = target_column(samples)
    rows = [_paired(before, samples.quality, np.arange(len(before)), "all", "", confidence, resamples, seed)]
    names = {column.name for column in own}
    for which, codes, labels in _groupings([*own, *samples.columns]):
        if len(which) > 1 and which[0] not in names:
            continue
        for i, label in enumerate(labels):
            members = np.flatnonzero(codes == i)
            if len(members) >= min_count:
                said = " and ".join(f"{name} = {value}" for name, value in zip(which, label, strict=True))
                rows.append(
                    _paired(before, samples.quality, members, said, " x ".join(which), confidence, resamples, seed)
                )
    table = pd.DataFrame(rows)
    table["q_value"] = false_discovery(table["p_value"].to_numpy(), np.ones(len(table), bool))
    table["significant"] = table["q_value"] <= alpha
    order = np.lexsort([-table["change"].abs(), ~table["significant"], table["group"] != "all"])
    return table.iloc[order].reset_index(drop=True)


def _paired(
    before: Array, after: Array, members: Array, group: str, columns: str, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    old, new = before[members].astype(float), after[members].astype(float)
    change = new - old
    up, down = int((change > 0).sum()), int((change < 0).sum())
    if not up + down:
        p_value = 1.0
    elif before.dtype == bool:
        p_value = float(stats.binomtest(up, up + down).pvalue)
    else:
        p_value = float(stats.wilcoxon(change[change != 0]).pvalue)
    low, high = bootstrap_interval(
        lambda i: float(change[i].mean()), len(change), resamples=resamples, confidence=confidence, seed=seed
    )
    return {
        "group": group, "columns": columns, "count": len(members), "before": old.mean(), "after": new.mean(),
        "change": change.mean(), "low": low, "high": high, "better": up, "worse": down, "p_value": p_value,
    }  # fmt: skip


def _said(report: Report, changes: pd.DataFrame) -> list[str]:
    from debias.audit.findings import number, share

    show = share if report.percent else number
    unit = " points" if report.percent else ""

    def signed(change: float) -> str:
        return f"{100 * change:+.1f}" if report.percent else ("+" if change > 0 else "") + number(change)

    sign = 1 if report.higher_is_better else -1
    row = changes.iloc[0]
    kind = "no change beyond noise" if not row["significant"] else "better" if sign * row["change"] > 0 else "worse"
    said = [
        f"Before, {report.metric} was {show(row['before'])}, now it is {show(row['after'])}: {kind}"
        f" ({row['better'] if sign > 0 else row['worse']:,} of {row['count']:,} samples are better,"
        f" {row['worse'] if sign > 0 else row['better']:,} worse)."
    ]
    groups = changes.iloc[1:]
    for word, part in (
        ("helped", groups[groups["significant"] & (sign * groups["change"] > 0)]),
        ("hurt", groups[groups["significant"] & (sign * groups["change"] < 0)]),
    ):
        if len(part):
            top = part.iloc[0]
            said.append(
                f"Most {word}: {top['group']}, from {show(top['before'])} to {show(top['after'])}"
                f" ({top['count']:,} samples, {signed(top['change'])}{unit}"
                f" [{signed(top['low'])}, {signed(top['high'])}])."
            )
    pulls = report.tables.get("pulls", pd.DataFrame())
    if len(pulls):
        top = pulls.loc[pulls["lean_before"].abs().fillna(0).idxmax()]
        ends = number if report.task == "regression" else share
        said.append(f"The pull of {top['column']} was {ends(top['lean_before'])} and is {ends(top['lean_after'])}.")
    return said
