"""Which checkpoint of a run counts, and which setting of a method: rules applied alike to every method.

A rule names one candidate of each run, which was chosen while training, and gives runs a score. Per method, the setting
with the best mean score over seeds is reported. Scores come from validation metrics; a rule is handed nothing else.
``oracle`` alone is handed test metrics, and is marked wherever it is printed: Gulrajani and Lopez-Paz, "In Search of
Lost Domain Generalization", ICLR 2021, arXiv 2007.01434, whose rules these are, but for the worst group and the crafted
shifts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from debias.compare.records import Candidate, RunRecord, measures, shift_score, worst_of
from debias.errors import DebiasError

__all__ = ["RULES", "Choice", "Rule", "available_rules", "default_rule", "find_rule", "select", "setting_key"]

FIRST = ("balanced", "erm")  # the baselines lead every table
LISTED = 5  # runs that an error names


@dataclass(frozen=True)
class Rule:
    """How a checkpoint and a setting are chosen.

    Attributes:
        name: as on the command line.
        words: what it does, for tables and reports.
        candidate: the candidate of a run whose test metrics are reported.
        score: of one validation, from what it logged by name, and ``"max"`` or ``"min"``; NaN where there is none. Of
            the oracle: of one test.
        direction: of the score, where it is not that of the run's metric.
        held_out: whether scores come from the runs that did not see a domain, instead of the run itself.
        oracle: whether it looks at test metrics.
        needs: what must have been logged, for errors.
    """

    name: str
    words: str
    candidate: str
    score: Callable[[Mapping[str, float], str], float]
    direction: str | None = None
    held_out: bool = False
    oracle: bool = False
    needs: str = ""

    @property
    def label(self) -> str:
        """The name, marked where it looks at test data."""
        return f"{self.name} (test data were looked at)" if self.oracle else self.name


def _average(metrics: Mapping[str, float], direction: str) -> float:
    return measures(metrics, "val", direction).average


def _worst(metrics: Mapping[str, float], direction: str) -> float:
    return measures(metrics, "val", direction).worst


def _test_worst(metrics: Mapping[str, float], direction: str) -> float:
    return measures(metrics, "test", direction).worst


def _shift(metrics: Mapping[str, float], direction: str) -> float:
    return shift_score(metrics)


def _worst_class(metrics: Mapping[str, float], direction: str) -> float:
    return worst_of(metrics, "class")


def _worst_inferred(metrics: Mapping[str, float], direction: str) -> float:
    return worst_of(metrics, "inferred")


def _nothing(metrics: Mapping[str, float], direction: str) -> float:
    return 0.0


_MONITOR = "a validation with a GroupMonitor, DetectionMonitor or MultilabelF1Monitor"
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "val_average",
            "the checkpoint, and of several settings the one, with the best average on the validation set",
            "val_average",
            _average,
            needs=_MONITOR,
        ),
        Rule(
            "val_worst_group",
            "the checkpoint, and of several settings the one, with the best worst group on the validation set",
            "val_worst_group",
            _worst,
            needs=f"{_MONITOR}, and groups or domains with samples in it",
        ),
        Rule(
            "val_worst_class",
            "the checkpoint, and of several settings the one, with the best worst class on the validation set: no group"
            " labels",
            "val_worst_class",
            _worst_class,
            needs="a validation with a GroupMonitor of the classes, `name='class'`",
        ),
        Rule(
            "val_worst_inferred",
            "the checkpoint, and of several settings the one, with the best worst group on the validation set, of"
            " inferred groups (EVaLS): no group labels",
            "val_worst_inferred",
            _worst_inferred,
            needs="a validation with a GroupMonitor of inferred groups, `name='inferred'`",
        ),
        Rule(
            "leave_one_domain_out",
            "the last checkpoint; of several settings the one with the best mean over training domains of the average"
            " on that domain, of runs that were trained without it",
            "last",
            _average,
            held_out=True,
            needs="a run without each training domain, for each setting and seed",
        ),
        Rule(
            "val_shift",
            "the checkpoint, and of several settings the one, with the best mean accuracy under crafted shifts of the"
            " validation set, over the families that the run was not trained on",
            "val_shift",
            _shift,
            direction="max",
            needs="a validation with a ShiftedValidation",
        ),
        Rule(
            "oracle",
            "the last checkpoint; of several settings the one with the best worst group on the TEST set: an upper"
            " bound, not a result",
            "last",
            _test_worst,
            oracle=True,
            needs="a test with a GroupMonitor, DetectionMonitor or MultilabelF1Monitor, and groups or domains in it",
        ),
        Rule("last", "the last checkpoint; of several settings the first", "last", _nothing, needs="nothing"),
    )
}


@dataclass(frozen=True)
class Choice:
    """What a rule reports of one method.

    Attributes:
        method: its name.
        params: the chosen setting; empty where it is the recipe's own, or where no run has a score.
        score: mean of the setting's scores over seeds; NaN where no run has one.
        scores: of each run, by its id.
        runs: of the chosen setting, finished, in the order of their seeds.
        settings: number of settings that had a score.
        notes: what a reader must know of this choice.
    """

    method: str
    params: dict[str, Any]
    score: float
    scores: dict[str, float]
    runs: tuple[RunRecord, ...]
    settings: int
    notes: tuple[str, ...] = ()


def find_rule(name: str) -> Rule:
    """Look a rule up by its name.

    Raises:
        DebiasError: there is none of that name.
    """
    if name not in RULES:
        raise DebiasError(f"Expected a rule of selection, one of {', '.join(RULES)}, but got `{name}`.")
    return RULES[name]


def setting_key(params: Mapping[str, Any]) -> str:
    """A setting as text, the same for the same values in any order."""
    return json.dumps(params, sort_keys=True, default=str)


def available_rules(records: Sequence[RunRecord]) -> list[str]:
    """Names of the rules under which every method with a finished run has a score."""
    return [name for name, rule in RULES.items() if not _missing(records, rule)]


def default_rule(records: Sequence[RunRecord]) -> str:
    """``val_worst_group`` where every method has it, else the first of ``val_average``, ``val_shift``, ``last``."""
    available = available_rules(records)
    return next(name for name in ("val_worst_group", "val_average", "val_shift", "last") if name in available)


def select(records: Sequence[RunRecord], rule: Rule | str) -> list[Choice]:
    """Choose one setting of each method: balanced ERM and ERM first, then in the order of the records.

    Only settings with a score for every seed of the method are compared, or where there is none, those with the most.
    On ties the recipe's own values win, then the setting that comes first. A method whose runs have no score is there
    without runs, and its notes say why.

    Args:
        records: runs of one recipe, failed ones and those without a domain included.
        rule: a rule or its name.

    Raises:
        DebiasError: the rule is unknown, no run finished, or none has a score.

    Example:
        >>> from debias.compare.records import Candidate, RunRecord
        >>> from debias.compare.selection import select
        >>> def run(lr, value):
        ...     logged = {"val/accuracy": value, "val/worst_group_accuracy": value}
        ...     kept = {"last": Candidate(1, 1, {}, {}), "val_average": Candidate(1, 1, logged, {})}
        ...     return RunRecord(f"erm-{lr}", "digits", "", "erm", 0, "finished", {"lr": lr}, candidates=kept)
        >>> select([run(0.1, 0.7), run(0.01, 0.8)], "val_average")[0].params
        {'lr': 0.01}
    """
    rule = find_rule(rule) if isinstance(rule, str) else rule
    if not any(record.finished and record.held_out is None for record in records):
        failed = [record for record in records if not record.finished]
        why = f" The first error: {failed[0].error}" if failed else ""
        raise DebiasError(f"Expected at least one finished run, but none of {len(records)} is.{why}")
    finished = {record.method for record in records if record.finished and record.held_out is None}
    missing = _missing(records, rule)
    if finished == {record.method for record in missing}:
        others = [name for name in available_rules(records) if name != rule.name]
        raise DebiasError(
            f"Expected {rule.needs}, which the rule `{rule.name}` scores runs by, but these have none:"
            f" {_list([record.id for record in missing])}. Rules that are available: {', '.join(others)}."
        )
    methods = dict.fromkeys(record.method for record in records)
    order = [*(name for name in FIRST if name in methods), *(name for name in methods if name not in FIRST)]
    return [_choose([r for r in records if r.method == method], records, rule) for method in order]


def _choose(records: Sequence[RunRecord], everything: Sequence[RunRecord], rule: Rule) -> Choice:
    method = records[0].method
    scores = _scores(records, everything, rule)
    seeds = {record.seed for record in records}
    settings: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.held_out is None:
            settings.setdefault(setting_key(record.params), []).append(record)
    own = setting_key({})
    settings = {key: settings[key] for key in sorted(settings, key=lambda key: key != own)}  # stable: own values first
    scored = {key: [r for r in runs if r.id in scores] for key, runs in settings.items()}
    twice = [r.id for runs in scored.values() for i, r in enumerate(runs) if r.seed in {q.seed for q in runs[:i]}]
    scored = {key: _by_seed(runs) for key, runs in scored.items() if runs}
    notes = [
        f"{method}: {r.id} finished, but has no score by this rule, and is left out: {_why(r, everything, rule)}."
        for runs in settings.values()
        for r in runs
        if r.finished and r.id not in scores
    ]
    if not scored:
        return Choice(method, {}, math.nan, {}, (), 0, tuple(notes) or (f"{method}: no run finished.",))
    if twice:
        notes.append(f"{method}: same setting and seed as another run, left out: {_list(twice)}.")
    most = max(map(len, scored.values()))
    if most < len(seeds):
        notes.append(
            f"{method}: no setting has all of the {len(seeds)} seeds; those with the most, {most}, are compared."
        )
    complete = {key: runs for key, runs in scored.items() if len(runs) == most}
    if len(complete) < len(settings):
        notes.append(
            f"{method}: {len(settings) - len(complete)} of {len(settings)} settings have fewer seeds than others, and"
            " are not compared."
        )
    # A failed run does not know its direction.
    direction = rule.direction or next(r.direction for r in records if r.finished)
    means = {key: sum(scores[r.id] for r in runs) / len(runs) for key, runs in complete.items()}
    best = (max if direction == "max" else min)(means, key=means.__getitem__)
    chosen = complete[best]
    if rule.name == "val_shift" and any("val_shift/held_out_mean" not in _seen(rule, r) for r in chosen):
        notes.append(f"{method}: trained on all families of shifts, so its score is over families that it saw.")
    return Choice(method, chosen[0].params, means[best], scores, tuple(chosen), len(complete), tuple(notes))


def _seen(rule: Rule, record: RunRecord) -> Mapping[str, float]:
    """What a rule may look at of a run. Nothing else hands metrics to a rule: only the oracle gets those of a test."""
    candidate = record.candidates.get(rule.candidate, Candidate(0, 0, {}, {}))
    return candidate.test if rule.oracle else candidate.val


def _scores(records: Iterable[RunRecord], everything: Sequence[RunRecord], rule: Rule) -> dict[str, float]:
    """Scores of the finished runs that have one, by id."""
    records = [record for record in records if record.finished]
    domains = {record.held_out for record in everything if record.held_out is not None}
    without: dict[tuple[str, int, str], dict[int, float]] = {}
    if rule.held_out:
        for r in records:
            if r.held_out is not None:
                place = without.setdefault((r.method, r.seed, setting_key(r.params)), {})
                place[r.held_out] = rule.score(_seen(rule, r), r.direction)
    found = {}
    for r in records:
        if r.held_out is not None or rule.candidate not in r.candidates:
            continue
        if rule.held_out:
            by_domain = without.get((r.method, r.seed, setting_key(r.params)), {})
            score = sum(by_domain.values()) / len(domains) if domains and set(by_domain) == domains else math.nan
        else:
            score = rule.score(_seen(rule, r), r.direction)
        if not math.isnan(score):
            found[r.id] = score
    return found


def _why(run: RunRecord, everything: Sequence[RunRecord], rule: Rule) -> str:
    """Why a finished run has no score."""
    if not rule.held_out:
        return f"it lacks {rule.needs}"
    same = (run.method, run.seed, setting_key(run.params))
    without = {r.held_out: r for r in everything if (r.method, r.seed, setting_key(r.params)) == same}
    reasons = []
    for domain in sorted({r.held_out for r in everything if r.held_out is not None}):
        other = without.get(domain)
        if other is None:
            reasons.append(f"there is no run without domain {domain}")
        elif not other.finished:
            reasons.append(f"{other.id} failed")
        elif math.isnan(rule.score(_seen(rule, other), other.direction)):
            reasons.append(f"{other.id} has no validation average")
    return _list(reasons)


def _missing(records: Sequence[RunRecord], rule: Rule) -> list[RunRecord]:
    """Runs of the methods that have finished runs, but none with a score."""
    scores = _scores(records, records, rule)
    finished = [r for r in records if r.finished and r.held_out is None]
    having = {r.method for r in finished if r.id in scores}
    return [r for r in finished if r.method not in having]


def _by_seed(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """One run of each seed, the first, in the order of seeds."""
    first: dict[int, RunRecord] = {}
    for run in runs:
        first.setdefault(run.seed, run)
    return [first[seed] for seed in sorted(first)]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
