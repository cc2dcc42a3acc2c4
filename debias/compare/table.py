"""The table of a comparison: means and deviations over seeds, and how far each method is from ERM, seed by seed."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from debias.compare.escape import csv_cell, markdown, plain
from debias.compare.records import Measures, RunRecord, measures
from debias.compare.selection import Choice, Rule, find_rule, select
from debias.extras import needs_extra

with needs_extra("compare"):
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text
    from scipy.stats import t as student

__all__ = [
    "Comparison",
    "Difference",
    "Row",
    "Spread",
    "Used",
    "caption",
    "label",
    "make_comparison",
    "make_markdown",
    "make_rich_table",
    "paired_difference",
    "runs_rows",
    "setting_text",
    "spread",
    "table_rows",
    "write_rows",
]

BASELINE = "erm"
BALANCED = "balanced"
LABELS = {BASELINE: "ERM", BALANCED: "balanced ERM"}
MIB = 2**20
CONFIDENCE = 0.95
SHOWN_GROUPS = 8  # more of them do not fit a terminal
# Metrics between 0 and 1 that are read in percent.
PERCENT = ("accuracy", "auc", "auroc", "dice", "f1", "iou", "map", "mar", "precision", "recall", "specificity")


@dataclass(frozen=True)
class Spread:
    """Values over seeds.

    Attributes:
        mean: of the known ones; NaN without any.
        std: their sample standard deviation; NaN with fewer than two.
        n: how many are known.
    """

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A method minus ERM, paired over the seeds that both have.

    Attributes:
        mean: over these seeds.
        low: lower end of the 95 % Student-t interval with ``n - 1`` degrees of freedom; NaN with fewer than two seeds.
        high: its upper end.
        n: number of these seeds.
        more_than_seed_noise: whether the interval excludes 0; None with fewer than two seeds.
    """

    mean: float
    low: float
    high: float
    n: int
    more_than_seed_noise: bool | None


@dataclass(frozen=True)
class Used:
    """One run in a row of the table.

    Attributes:
        record: the run.
        candidate: name of the checkpoint that the rule takes.
        score: by which the rule chose.
        test: figures of that checkpoint's test.
    """

    record: RunRecord
    candidate: str
    score: float
    test: Measures

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.record.seed

    @property
    def gap(self) -> float:
        """Average minus worst group."""
        return self.test.average - self.test.worst

    @property
    def not_finite(self) -> float:
        """Test samples whose predictions are not finite."""
        return not_finite(self.record, self.candidate)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: name of its file.
        params: the setting that was chosen.
        settings: number of settings that it was chosen from.
        runs: of this setting, by seed.
        score: of the rule, over seeds.
        average: test metric over all samples.
        adjusted: mean over groups by their shares of the training set; of no run where the counts are not known.
        worst: of the worst group.
        gap: average minus worst group.
        by_group: of each group.
        seconds_per_step: of training.
        peak_memory: MiB.
        worst_vs_erm: difference of the worst group to ERM; None for ERM and where there is none.
        average_vs_erm: that of the average.
        failed: failed runs of this method, in all settings.
    """

    method: str
    params: dict[str, Any]
    settings: int
    runs: tuple[Used, ...]
    score: Spread
    average: Spread
    adjusted: Spread
    worst: Spread
    gap: Spread
    by_group: dict[str, Spread]
    seconds_per_step: Spread
    peak_memory: Spread
    worst_vs_erm: Difference | None
    average_vs_erm: Difference | None
    failed: int

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its runs."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Methods side by side, and what a reader must know of them.

    Attributes:
        recipe: name of the recipe.
        recipe_hash: of what all runs share.
        rule: by which checkpoints and settings were chosen.
        metric: name of the metric; empty where no test logged one.
        direction: ``"max"`` where higher is better, else ``"min"``.
        groups: their names.
        rows: one a method, balanced ERM and ERM first.
        records: all runs, also those that no row uses.
        notes: sentences.
    """

    recipe: str
    recipe_hash: str
    rule: Rule
    metric: str
    direction: str
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    records: tuple[RunRecord, ...]
    notes: tuple[str, ...]

    @property
    def percent(self) -> bool:
        """Whether the metric is read in percent."""
        shares = [v for row in self.rows for run in row.runs for v in (run.test.average, run.test.worst)]
        known = [v for v in shares if not math.isnan(v)]
        named = any(part in PERCENT for part in self.metric.lower().split("_"))
        return named and all(0 <= v <= 1 for v in known)

    @property
    def adjusted(self) -> bool:
        """Whether an adjusted average is known of any method."""
        return any(row.adjusted.n for row in self.rows)

    @property
    def unit(self) -> str:
        """``"accuracy in %"``, or the metric's name."""
        name = self.metric.replace("_", " ") or "metric"
        return f"{name} in %" if self.percent else name


def not_finite(record: RunRecord, candidate: str) -> float:
    """The largest number of test samples of a run whose predictions are not finite, as monitors count them."""
    test = record.candidates[candidate].test if candidate in record.candidates else {}
    return max((v for key, v in test.items() if "_not_finite" in key and not math.isnan(v)), default=0.0)


def label(method: str) -> str:
    """The name of a method as tables and figures show it.

    Example:
        >>> from debias.compare.table import label
        >>> label("balanced"), label("group_dro")
        ('balanced ERM', 'group_dro')
    """
    return LABELS.get(method, method)


def setting_text(params: dict[str, Any]) -> str:
    """A setting in words: the last part of each key and its value; the recipe's own values as such.

    Example:
        >>> from debias.compare.table import setting_text
        >>> setting_text({"trainer.callbacks.GroupDRO.step_size": 0.1})
        'step_size=0.1'
    """
    ends = [key.rpartition(".")[2] for key in params]
    names = [end if ends.count(end) == 1 else key for key, end in zip(params, ends, strict=True)]
    values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in params.values()]
    return ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True)) or "the recipe's own"


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation of the values that are not NaN.

    Example:
        >>> from debias.compare.table import spread
        >>> spread([1.0, 3.0, float("nan")])
        Spread(mean=2.0, std=1.4142135623730951, n=2)
    """
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return Spread(mean, statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def paired_difference(method: dict[int, float], erm: dict[int, float]) -> Difference:
    """Mean difference over the seeds that both have, with its 95 % Student-t interval.

    Args:
        method: value of each seed; NaN ones do not count.
        erm: those to compare with.

    Example:
        >>> from debias.compare.table import paired_difference
        >>> found = paired_difference({0: 0.5, 1: 0.75, 2: 0.7}, {0: 0.25, 1: 0.25, 3: 0.1})
        >>> found.mean, found.n, found.more_than_seed_noise
        (0.375, 2, False)
    """
    pairs = [method[seed] - erm[seed] for seed in method if seed in erm]
    found = spread(pairs)
    if found.n < 2:
        return Difference(found.mean, math.nan, math.nan, found.n, None)
    half = float(student.ppf((1 + CONFIDENCE) / 2, found.n - 1)) * found.std / math.sqrt(found.n)
    low, high = found.mean - half, found.mean + half
    return Difference(found.mean, low, high, found.n, low > 0 or high < 0)


def make_comparison(records: Sequence[RunRecord], rule: Rule | str) -> Comparison:
    """Choose checkpoints and settings by ``rule``, and sum their tests up.

    Args:
        records: runs of one recipe, failed ones included; from :func:`debias.compare.records.find_records`.
        rule: of :data:`debias.compare.selection.RULES`, or its name.

    Raises:
        DebiasError: no run finished, or the rule is unknown or not available for these runs.
    """
    rule = find_rule(rule) if isinstance(rule, str) else rule
    choices = select(records, rule)
    used = {choice.method: tuple(_use(choice, rule)) for choice in choices}
    groups = tuple(dict.fromkeys(name for runs in used.values() for run in runs for name in run.test.by_group))
    rows = tuple(_row(choice, used, records, groups) for choice in choices)
    metrics = dict.fromkeys(run.test.metric for runs in used.values() for run in runs if run.test.metric)
    return Comparison(
        recipe=records[0].recipe,
        recipe_hash=records[0].recipe_hash,
        rule=rule,
        metric=next(iter(metrics), ""),
        direction=next(r.direction for r in records if r.finished),
        groups=groups,
        rows=rows,
        records=tuple(records),
        notes=tuple(_notes(rows, choices, records, tuple(metrics))),
    )


def _use(choice: Choice, rule: Rule) -> Iterable[Used]:
    for record in choice.runs:
        test = measures(record.candidates[rule.candidate].test, "test", record.direction)
        yield Used(record, rule.candidate, choice.scores[record.id], test)


def _row(choice: Choice, used: dict[str, tuple[Used, ...]], records: Sequence[RunRecord], groups: Sequence[str]) -> Row:
    runs, erm = used[choice.method], used.get(BASELINE, ())

    def over(value: Callable[[Used], float]) -> Spread:
        return spread(map(value, runs))

    def against(value: Callable[[Used], float]) -> Difference | None:
        if choice.method == BASELINE or not erm or not runs:
            return None
        return paired_difference({r.seed: value(r) for r in runs}, {r.seed: value(r) for r in erm})

    return Row(
        method=choice.method,
        params=choice.params,
        settings=choice.settings,
        runs=runs,
        score=over(lambda r: r.score),
        average=over(lambda r: r.test.average),
        adjusted=over(lambda r: r.test.adjusted),
        worst=over(lambda r: r.test.worst),
        gap=over(lambda r: r.gap),
        by_group={name: spread(r.test.by_group.get(name, math.nan) for r in runs) for name in groups},
        seconds_per_step=over(lambda r: r.record.seconds_per_step),
        peak_memory=over(lambda r: r.record.peak_memory / MIB or math.nan),  # 0 where nothing measured it
        worst_vs_erm=against(lambda r: r.test.worst),
        average_vs_erm=against(lambda r: r.test.average),
        failed=sum(r.method == choice.method and not r.finished for r in records),
    )


def _notes(
    rows: Sequence[Row], choices: Sequence[Choice], records: Sequence[RunRecord], metrics: Sequence[str]
) -> Iterable[str]:
    yield from _warnings(rows)
    present = {row.method for row in rows if row.runs}
    finished = {record.method for record in records if record.finished and record.held_out is None}
    if BASELINE in finished - present:
        yield "ERM has no score by this rule, so there is no difference to it."
    elif BASELINE not in present:
        yield "There is no finished run of ERM, so no difference to it: add `erm` to the methods."
    if BALANCED not in finished:
        yield (
            "There is no finished run of balanced ERM, the simplest method that knows the groups: add `balanced` to the"
            " methods, or read the table without that yardstick."
        )
    for choice in choices:
        yield from choice.notes
    for record in records:
        if not record.finished:
            yield f"Failed: {record.id}: {record.error or 'no error was recorded'}"
    if not metrics:
        yield "No test logged a worst group or domain: add a GroupMonitor to the recipe, and test again."
    elif len(metrics) > 1:
        yield f"The tests logged several metrics, which cannot be compared: {', '.join(metrics)}."
    for name in dict.fromkeys(name for row in rows for name, s in row.by_group.items() if s.n < len(row.runs)):
        lacking = sum(len(row.runs) - row.by_group[name].n for row in rows)
        yield f"Group {name!r} has no test sample in {lacking} of {sum(len(r.runs) for r in rows)} runs."
    runs = [run for row in rows for run in row.runs if run.not_finite]
    if diverged := [f"{run.record.id} ({run.not_finite:.0f} samples)" for run in runs]:
        yield (
            f"DIVERGED: predictions on the test set that are not finite count as wrong, or make a metric NaN, in"
            f" {', '.join(diverged)}. A difference to such a run says nothing about a method."
        )
    yield from _blanks(rows)
    if any(row.worst_vs_erm is not None and row.worst_vs_erm.n < 2 for row in rows):
        yield "With fewer than two seeds in common with ERM, the noise of seeds cannot be measured."
    seeds = {row.seeds for row in rows if row.runs}
    if len(seeds) > 1:
        yield "Not all methods have the same seeds; differences to ERM are over those that both have."
    yield from _origin(records)


def _warnings(rows: Sequence[Row]) -> Iterable[str]:
    """What the runs in the table said themselves, with how many of them did."""
    for row in rows:
        told = [text for run in row.runs for text in run.record.warnings]
        for text in dict.fromkeys(told):
            yield f"Warning of {label(row.method)}, {told.count(text)} of {len(row.runs)} runs: {text}"


def _blanks(rows: Sequence[Row]) -> Iterable[str]:
    """Means over some of the runs only; what no run has is a blank in the table."""
    for row in rows:
        figures = {
            "average": row.average, "adjusted average": row.adjusted, "worst group": row.worst, "gap": row.gap,
            "score": row.score, "ms a step": row.seconds_per_step, "MiB": row.peak_memory,
        }  # fmt: skip
        partly: dict[int, list[str]] = {}
        for name, value in figures.items():
            if 0 < value.n < len(row.runs):
                partly.setdefault(value.n, []).append(name)
        for n, names in partly.items():
            yield f"{label(row.method)}: {', '.join(names)} of {n} of {len(row.runs)} runs; the others have none."


def _origin(records: Sequence[RunRecord]) -> Iterable[str]:
    """When, where and with what the runs were made."""
    days = sorted({record.started[:10] for record in records if record.started})
    devices = sorted({record.device for record in records if record.device})
    if days:
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        yield f"Runs of {when} (UTC){', on ' + '; '.join(devices) if devices else ''}."
    if len(devices) > 1:
        yield "The runs were made on several devices: their times and memory cannot be compared."
    versions = {name: number for record in records for name, number in record.versions.items()}
    if versions:
        numbers = {n: sorted({r.versions[n] for r in records if n in r.versions}) for n in versions}
        yield "Versions: " + ", ".join(f"{n} {' and '.join(v)}" for n, v in numbers.items()) + "."
        if mixed := [n for n, v in numbers.items() if len(v) > 1]:
            yield f"Not all runs were made with the same version of {', '.join(mixed)}."
    revisions = sorted({str(r.git["revision"])[:12] for r in records if r.git.get("revision")})
    if revisions:
        changed = any(r.git.get("changed") for r in records)
        yield f"Git: {', '.join(revisions)}{', with uncommitted changes' if changed else ''}."


def caption(comparison: Comparison) -> str:
    """How to read the table."""
    rule, failed = comparison.rule, sum(row.failed for row in comparison.rows)
    oracle = "ORACLE, chosen by test data. " if rule.oracle else ""
    better = "" if comparison.direction == "max" else " Lower is better."
    if comparison.adjusted:
        better += " Adjusted: mean over groups by their shares of the training set."
    seeds = {row.seeds for row in comparison.rows if row.runs}
    over = f"seeds {', '.join(map(str, next(iter(seeds))))}" if len(seeds) == 1 else "the seeds of each method"
    if all(len(own) == 1 for own in seeds):
        return (
            f"{oracle}Selection `{rule.name}`: {rule.words}; the same for every method. Test set, {comparison.unit}:"
            f" one seed a method, so neither deviations nor intervals.{better} Gap: average minus worst group. To ERM:"
            " difference of the worst group." + (f" Failed runs: {failed}." if failed else "")
        )
    return (
        f"{oracle}Selection `{rule.name}`: {rule.words}; the same for every method. Test set, {comparison.unit}: mean ±"
        f" sample standard deviation over {over}.{better} Gap: average minus worst group. To ERM: difference of the"
        f" worst group, paired over seeds, with its {100 * CONFIDENCE:.0f} % Student-t interval; * where that excludes"
        " 0, more than seed noise. Intervals hold for one method each and are not corrected for several comparisons."
        + (f" Failed runs: {failed}." if failed else "")
    )


def make_rich_table(comparison: Comparison, width: int = 120) -> Table:
    """A row for each method, with as much detail as fits ``width`` columns: the rest is in ``table.csv``.

    Args:
        comparison: from :func:`make_comparison`.
        width: of the terminal, in characters.
    """
    console = Console(width=10 * width, file=io.StringIO())
    table = Table()
    for detail in (4, 3, 2, 1, 0):
        table = _rich_table(comparison, detail)
        if Measurement.get(console, console.options, table).maximum <= width:
            break
    return table


def _rich_table(comparison: Comparison, detail: int) -> Table:
    """With ``detail`` 4 everything; 3 with groups in whole percent, 2 without deviations of gap and groups, 1 without
    groups, 0 without cost.
    """
    rows, groups = comparison.rows, comparison.groups if detail > 1 and len(comparison.groups) <= SHOWN_GROUPS else ()
    marked = " (ORACLE: chosen by test data)" if comparison.rule.oracle else ""
    table = Table(
        title=Text(plain(f"{comparison.recipe}: test {comparison.unit}{marked}")),
        caption=Text(plain(caption(comparison))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    tuned, failed = any(row.settings > 1 or row.params for row in rows), any(row.failed for row in rows)
    seeds = len({row.seeds for row in rows if row.runs}) > 1
    table.add_column("method", no_wrap=True)
    if tuned:
        table.add_column("setting", overflow="fold")
    adjusted = ["adjusted\naverage"] if comparison.adjusted else []
    headers = [*(["seeds"] if seeds else []), "average", *adjusted, "worst\ngroup", "gap"]
    headers += [name.replace(" ", "\n") for name in groups]
    headers += ["worst group\nto ERM"] + (["ms a\nstep", "MiB"] if detail > 0 else []) + (["failed"] if failed else [])
    for header in headers:
        table.add_column(_shown(header), justify="right", no_wrap=True)
    for row in rows:
        cells = [label(row.method)]
        if tuned:
            cells.append(setting_text(row.params).replace(", ", "\n") if row.runs else "")
        if seeds:
            cells.append(_seeds(row.seeds))
        shown = (row.average, row.adjusted, row.worst) if adjusted else (row.average, row.worst)
        cells += [_number(s, comparison.percent) for s in shown]
        cells.append(_number(row.gap, comparison.percent, deviation=detail > 2))
        whole = {"digits": 0} if detail == 3 and comparison.percent else {}
        cells += [_number(row.by_group[name], comparison.percent, deviation=detail > 2, **whole) for name in groups]
        cells.append(_difference(row.worst_vs_erm, comparison.percent))
        if detail > 0:
            cells += [_plain(1000 * row.seconds_per_step.mean, 1), _plain(row.peak_memory.mean, 0)]
        if failed:
            cells.append(str(row.failed or ""))
        table.add_row(*map(_shown, cells))
    return table


def make_markdown(comparison: Comparison) -> str:
    """The table with every column, in Markdown."""
    groups, percent = comparison.groups, comparison.percent
    if len(groups) > SHOWN_GROUPS:
        groups = ()
    adjusted = ["adjusted average"] if comparison.adjusted else []
    header = ["method", "average", *adjusted, "worst group", "gap", *groups]
    header += ["worst group to ERM", "average to ERM", "ms a step", "MiB", "seeds", "failed"]
    lines = ["| " + " | ".join(map(markdown, header)) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in comparison.rows:
        cells = [label(row.method)]
        shown = (row.average, *([row.adjusted] if adjusted else []), row.worst, row.gap)
        cells += [_number(s, percent) for s in shown]
        cells += [_number(row.by_group[name], percent) for name in groups]
        cells += [_difference(d, percent) for d in (row.worst_vs_erm, row.average_vs_erm)]
        cells += [_number(_scaled(row.seconds_per_step, 1000), False, digits=1)]
        cells += [_number(row.peak_memory, False, digits=0), _seeds(row.seeds), str(row.failed)]
        lines.append("| " + " | ".join(map(markdown, cells)) + " |")
    return "\n".join(lines) + "\n"


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """What ``table.csv`` holds: one row a method, raw numbers, None for what is not known.

    Columns, in this order: ``method``; ``params`` as JSON; ``settings``, from how many it was chosen; ``seeds``,
    separated by spaces; ``rule``; ``metric``; mean and std (``_mean``, ``_std``) of ``score``, ``average``,
    ``adjusted_average``, ``worst_group``, ``gap``, ``group/<name>``, ``seconds_per_step`` and ``peak_memory_mib``; for
    ``worst_group`` and ``average`` the difference to ERM, ``<it>_to_erm_mean``, ``_low``, ``_high``, ``_seeds`` and
    ``_more_than_seed_noise``; ``failed_runs``.
    """
    return [_table_row(comparison, row) for row in comparison.rows]


def _table_row(comparison: Comparison, row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "method": row.method,
        "params": json.dumps(row.params, default=str),
        "settings": row.settings,
        "seeds": _seeds(row.seeds),
        "rule": comparison.rule.name,
        "metric": comparison.metric,
    }
    spreads = {"score": row.score, "average": row.average, "adjusted_average": row.adjusted}
    spreads |= {"worst_group": row.worst, "gap": row.gap}
    spreads |= {f"group/{name}": row.by_group[name] for name in comparison.groups}
    spreads |= {"seconds_per_step": row.seconds_per_step, "peak_memory_mib": row.peak_memory}
    for name, value in spreads.items():
        found |= {f"{name}_mean": _known(value.mean), f"{name}_std": _known(value.std)}
    for name, difference in (("worst_group", row.worst_vs_erm), ("average", row.average_vs_erm)):
        start, d = f"{name}_to_erm", difference or Difference(math.nan, math.nan, math.nan, 0, None)
        found |= {f"{start}_mean": _known(d.mean), f"{start}_low": _known(d.low), f"{start}_high": _known(d.high)}
        found |= {f"{start}_seeds": d.n, f"{start}_more_than_seed_noise": d.more_than_seed_noise}
    return found | {"failed_runs": row.failed}


def runs_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """What ``runs.csv`` holds: one row a run and the candidate that the rule takes, None for what is not known.

    Columns, in this order: ``id``, ``method``, ``seed``, ``params`` as JSON, ``held_out``, ``status``, ``error``,
    ``warnings`` as JSON; ``in_table``, whether its setting was chosen; ``rule``; ``candidate``, ``epoch``, ``step``;
    ``score``; of the test ``metric``, ``average``, ``adjusted_average``, ``worst_group``, ``gap``, ``not_finite``
    (samples) and ``group/<name>``; ``steps``, ``seconds``, ``seconds_per_step``, ``peak_memory_mib``, ``device``,
    ``started``, ``recipe``, ``recipe_hash``, ``git_revision``, and ``version/<name>``.
    """
    used = {run.record.id: run for row in comparison.rows for run in row.runs}
    scores = {name: s for choice in select(comparison.records, comparison.rule) for name, s in choice.scores.items()}
    versions = dict.fromkeys(name for record in comparison.records for name in record.versions)
    groups = dict.fromkeys(comparison.groups)
    tests = {}
    for record in comparison.records:
        candidate = record.candidates.get(comparison.rule.candidate)
        tests[record.id] = measures(candidate.test if candidate else {}, "test", record.direction)
        groups |= dict.fromkeys(tests[record.id].by_group)
    return [_run_row(r, comparison, r.id in used, scores.get(r.id), tests[r.id], groups, versions)
            for r in comparison.records]  # fmt: skip


def _run_row(
    record: RunRecord,
    comparison: Comparison,
    used: bool,
    score: float | None,
    test: Measures,
    groups: Iterable[str],
    versions: Iterable[str],
) -> dict[str, Any]:
    candidate = record.candidates.get(comparison.rule.candidate)
    return {
        "id": record.id,
        "method": record.method,
        "seed": record.seed,
        "params": json.dumps(record.params, default=str),
        "held_out": record.held_out,
        "status": record.status,
        "error": record.error,
        "warnings": json.dumps(record.warnings) if record.warnings else None,
        "in_table": used,
        "rule": comparison.rule.name,
        "candidate": comparison.rule.candidate if candidate else None,
        "epoch": candidate.epoch if candidate else None,
        "step": candidate.step if candidate else None,
        "score": score,
        "metric": test.metric,
        "average": _known(test.average),
        "adjusted_average": _known(test.adjusted),
        "worst_group": _known(test.worst),
        "gap": _known(test.average - test.worst),
        "not_finite": not_finite(record, comparison.rule.candidate),
        **{f"group/{name}": _known(test.by_group.get(name, math.nan)) for name in groups},
        "steps": record.steps,
        "seconds": _known(record.seconds),
        "seconds_per_step": _known(record.seconds_per_step),
        "peak_memory_mib": record.peak_memory / MIB or None,
        "device": record.device,
        "started": record.started,
        "recipe": record.recipe,
        "recipe_hash": record.recipe_hash,
        "git_revision": record.git.get("revision"),
        **{f"version/{name}": record.versions.get(name) for name in versions},
    }


def write_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, with empty cells for None, and no cell that a spreadsheet would compute."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([map(csv_cell, line) for line in [list(rows[0]), *(row.values() for row in rows)]])
    return text.getvalue()


def _shown(cell: str) -> Text:
    return Text(plain(cell, lines=True))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _scaled(value: Spread, factor: float) -> Spread:
    return Spread(factor * value.mean, factor * value.std, value.n)


def _plain(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _number(value: Spread, percent: bool, *, deviation: bool = True, digits: int | None = None) -> str:
    """``72.3 ±1.2``; without a deviation where there is one seed, and a dash where there is nothing."""
    if not value.n:
        return "-"
    scale, digits = (100, 1 if digits is None else digits) if percent else (1, 3 if digits is None else digits)
    end = f" ±{scale * value.std:.{digits}f}" if deviation and value.n > 1 else ""
    return f"{scale * value.mean:.{digits}f}{end}"


def _difference(value: Difference | None, percent: bool) -> str:
    if value is None or not value.n:
        return "-"
    scale, digits = (100, 1) if percent else (1, 3)
    mean = f"{scale * value.mean:+.{digits}f}"
    if value.more_than_seed_noise is None:
        return mean
    star = "*" if value.more_than_seed_noise else " "
    return f"{mean} [{scale * value.low:+.{digits}f}, {scale * value.high:+.{digits}f}]{star}"


def _seeds(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))
