"""Rules of selection: which candidate, which setting, and that none but the oracle looks at a test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from _support.records import GROUPS, failed, logged, record
from debias.cli import RULES as CLI_RULES
from debias.compare.records import Candidate
from debias.compare.selection import RULES, available_rules, default_rule, select
from debias.compare.table import make_comparison, runs_rows
from debias.errors import DebiasError


def flat(value, stage="val"):
    """Every group has the same accuracy."""
    return logged(stage, [value] * 4)


def grid(random=None):
    """Two methods, three settings, two seeds, each run without a domain too; all figures drawn, all rules usable.

    Tests log under the names of validations, too, so that whoever looks at one cannot be told by the name.
    """
    random = random or np.random.RandomState(0)
    runs = []
    for method in ("erm", "vrex"):
        for weight in ({}, {"weight": 1}, {"weight": 2}):
            for seed in (0, 1):
                for held_out in (None, 0, 1):
                    rules = [rule.candidate for rule in RULES.values()]
                    run = record(method, seed, params=weight, held_out=held_out, rules=list(dict.fromkeys(rules)))
                    kept = {}
                    for rule in run.candidates:
                        val = logged("val", random.rand(4)) | {"val_shift/held_out_mean": random.rand()}
                        names = ("val/class/worst_group_accuracy", "val/inferred/worst_group_accuracy")
                        val |= {name: random.rand() for name in names}
                        test = {} if held_out is not None else logged("test", random.rand(4))
                        test |= logged("val", random.rand(4)) | {"val_shift/held_out_mean": random.rand()}
                        kept[rule] = Candidate(1, 1, val, test)
                    runs.append(replace(run, candidates=kept))
    return runs


def chosen(runs, rule):
    return {c.method: (c.params, c.score, [r.id for r in c.runs]) for c in select(runs, rule)}


def test_rules_of_the_command_line_are_all_rules():
    assert tuple(RULES) == CLI_RULES
    assert [name for name, rule in RULES.items() if rule.oracle] == ["oracle"]


@pytest.mark.parametrize("rule", RULES)
def test_only_the_oracle_looks_at_test_metrics(rule):
    runs = grid()
    changed = 0
    for seed in range(5):
        random = np.random.RandomState(100 + seed)
        other = [
            replace(
                run,
                candidates={
                    name: replace(c, test={key: random.rand() for key in c.test}) for name, c in run.candidates.items()
                },
            )
            for run in runs
        ]
        changed += chosen(other, rule) != chosen(runs, rule)
    assert (changed > 0) is (rule == "oracle")


@pytest.mark.parametrize("rule", [name for name in RULES if name != "last"])
def test_each_rule_chooses_the_best_mean_of_its_own_score(rule):
    runs = grid()

    def score(run):
        c = run.candidates[RULES[rule].candidate]
        if rule == "val_average":
            return c.val["val/accuracy"]
        if rule == "val_worst_group":
            return min(c.val[f"val/accuracy_by_group/{name}"] for name in GROUPS)
        if rule in ("val_worst_class", "val_worst_inferred"):
            return c.val[f"val/{rule.rpartition('_')[2]}/worst_group_accuracy"]
        if rule == "val_shift":
            return c.val["val_shift/held_out_mean"]
        if rule == "oracle":
            return min(c.test[f"test/accuracy_by_group/{name}"] for name in GROUPS)
        held = [
            r.candidates["last"].val["val/accuracy"]
            for r in runs
            if r.held_out is not None and (r.method, r.seed, r.params) == (run.method, run.seed, run.params)
        ]
        assert len(held) == 2
        return np.mean(held)

    for choice in select(runs, rule):
        means = {}
        for run in runs:
            if run.method == choice.method and run.held_out is None:
                means.setdefault(str(run.params), []).append(score(run))
        means = {key: np.mean(values) for key, values in means.items()}
        assert str(choice.params) == max(means, key=means.get)
        assert choice.score == pytest.approx(max(means.values()))
        assert choice.settings == 3
        assert [r.seed for r in choice.runs] == [0, 1]


def test_last_takes_the_recipes_own_values():
    assert all(choice.params == {} for choice in select(grid()[::-1], "last"))


def test_ties_go_to_the_recipes_own_values_then_to_the_first():
    runs = [record("erm", 0, params={"lr": lr} if lr else {}) for lr in (3, 1, None, 2)]
    assert select(runs, "val_average")[0].params == {}
    assert select([r for r in runs if r.params], "val_average")[0].params == {"lr": 3}


def test_lower_is_better_where_the_direction_says_so_but_not_for_shifts():
    def run(lr, value):
        val = {
            "val/loss": value,
            "val/worst_group_loss": value,
            "val/loss_by_group/a": value,
            "val_shift/mean": value,
        }
        return record("erm", 0, val, {}, params={"lr": lr}, direction="min")

    runs = [run(1, 0.5), run(2, 0.25), run(3, 0.75)]
    assert select(runs, "val_average")[0].params == {"lr": 2}
    assert select(runs, "val_worst_group")[0].params == {"lr": 2}
    assert select(runs, "val_shift")[0].params == {"lr": 3}


def test_a_failed_run_says_nothing_about_the_direction():
    def run(lr, value):
        return record("erm", 1, flat(value), flat(value, "test"), params={"lr": lr}, direction="min")

    runs = [failed("erm", 0), run(1, 0.5), run(2, 0.25), run(3, 0.75)]
    assert select(runs, "val_average")[0].params == {"lr": 2}
    assert make_comparison(runs, "val_average").direction == "min"


def test_settings_with_fewer_seeds_are_not_compared():
    runs = [record("erm", s, flat(0.5)) for s in (0, 1)] + [record("erm", 0, flat(0.9), params={"lr": 1})]
    runs.append(failed("erm", 1, params={"lr": 1}))
    (choice,) = select(runs, "val_average")
    assert (choice.params, choice.settings) == ({}, 1)
    assert "1 of 2 settings have fewer seeds" in choice.notes[0]


def test_where_no_setting_has_all_seeds_those_with_the_most_are_compared():
    runs = [record("erm", s, flat(0.5)) for s in (0, 1)] + [failed("erm", 2)]
    runs += [record("erm", s, flat(0.7), params={"lr": 1}) for s in (1, 2)] + [
        record("erm", 0, flat(0.9), params={"lr": 2})
    ]
    (choice,) = select(runs, "val_average")
    assert choice.params == {"lr": 1}
    assert any("no setting has all of the 3 seeds" in note for note in choice.notes)


def test_baselines_come_first_and_a_method_without_a_finished_run_stays_visible():
    runs = [record("vrex", 0), failed("irm", 0), record("erm", 0), record("balanced", 0)]
    choices = select(runs, "val_average")
    assert [c.method for c in choices] == ["balanced", "erm", "vrex", "irm"]
    assert choices[-1].runs == ()
    assert np.isnan(choices[-1].score)


def test_missing_held_out_runs_make_leave_one_domain_out_unavailable():
    runs = [record("erm", 0), record("vrex", 0)]
    with pytest.raises(DebiasError, match=r"a run without each training domain.*erm-0, vrex-0.*available: val_average"):
        select(runs, "leave_one_domain_out")
    runs += [record("erm", 0, held_out=d) for d in (0, 1)] + [record("vrex", 0, held_out=1)]
    assert "leave_one_domain_out" not in available_rules(runs)  # not for all
    runs.append(record("vrex", 0, flat(0.1), held_out=0))
    erm, vrex = select(runs, "leave_one_domain_out")
    assert erm.score == pytest.approx(0.75)  # of the default (0.9, 0.8, 0.7, 0.6)
    assert vrex.score == pytest.approx((0.75 + 0.1) / 2)


LACKING = {
    "absent": (None, "there is no run without domain 0"),
    "failed": (failed("vrex", 0, held_out=0), "vrex-0-failed failed"),
    "unmeasured": (record("vrex", 0, {}, held_out=0), "vrex-0-without0 has no validation average"),
}


@pytest.mark.parametrize(("other", "why"), LACKING.values(), ids=LACKING)
def test_a_method_that_alone_lacks_scores_is_named_and_hides_no_other(other, why):
    runs = [record("erm", 0), record("vrex", 0), record("vrex", 0, held_out=1), *([other] if other else [])]
    runs += [record("erm", 0, flat(v), held_out=d) for d, v in enumerate((0.2, 0.4))]
    runs += [record("irm", 0, flat(0.9), held_out=0), record("irm", 0, flat(0.9), held_out=1), record("irm", 0)]
    comparison = make_comparison(runs, "leave_one_domain_out")
    rows = {row.method: row for row in comparison.rows}
    assert rows["erm"].score.mean == pytest.approx(0.3)
    assert rows["irm"].worst_vs_erm.mean == 0
    assert rows["vrex"].runs == ()
    assert f"vrex: vrex-0 finished, but has no score by this rule, and is left out: {why}." in comparison.notes
    assert not any("no finished run of ERM" in note or "vrex: no run finished" in note for note in comparison.notes)
    table = {line["id"]: line for line in runs_rows(comparison)}
    assert not table["vrex-0"]["in_table"]
    assert table["vrex-0"]["score"] is None


def test_erm_without_a_score_is_no_erm_that_did_not_finish():
    runs = [record("erm", 0, {}), record("vrex", 0)]
    comparison = make_comparison(runs, "val_average")
    assert comparison.rows[1].worst_vs_erm is None
    assert any(note.startswith("erm: erm-0 finished, but has no score") for note in comparison.notes)
    assert "ERM has no score by this rule, so there is no difference to it." in comparison.notes
    assert not any("no finished run of ERM" in note for note in comparison.notes)


def test_runs_without_a_domain_are_never_reported():
    runs = [record("erm", 0, flat(0.5)), *(record("erm", 0, flat(0.9), held_out=d) for d in (0, 1))]
    (choice,) = select(runs, "val_average")
    assert [r.id for r in choice.runs] == ["erm-0"] == list(choice.scores)


def test_without_groups_the_worst_group_cannot_choose():
    val = {"val/accuracy": 0.8, "val/worst_group_accuracy": float("nan")}
    runs = [record("erm", 0, val)]
    with pytest.raises(DebiasError, match=r"Expected a validation with.*groups.*`val_worst_group`.*erm-0.*val_average"):
        select(runs, "val_worst_group")
    assert default_rule(runs) == "val_average"
    assert default_rule([record("erm", 0)]) == "val_worst_group"
    assert default_rule([record("erm", 0, {"val_shift/mean": 0.5})]) == "val_shift"
    assert default_rule([record("erm", 0, {})]) == "last"
    assert available_rules([record("erm", 0, {}, {})]) == ["last"]


def test_shift_score_prefers_families_that_were_not_trained_on_and_says_where_there_are_none():
    held, trained = {"val_shift/held_out_mean": 0.4, "val_shift/mean": 0.6}, {"val_shift/mean": 0.5}
    first, second = select([record("erm", 0, held), record("shifts", 0, trained)], "val_shift")
    assert (first.score, second.score) == (0.4, 0.5)
    assert first.notes == ()
    assert "families that it saw" in second.notes[0]
    with pytest.raises(DebiasError, match="ShiftedValidation"):
        select([record("erm", 0)], "val_shift")


def test_a_run_without_a_score_is_named_and_left_out():
    runs = [record("erm", 0, flat(0.5)), record("erm", 1, {})]
    (choice,) = select(runs, "val_average")
    assert [r.seed for r in choice.runs] == [0]
    assert "erm-1 finished, but has no score" in choice.notes[0]


def test_the_same_setting_and_seed_twice_counts_once():
    runs = [record("erm", 0, flat(0.5)), replace(record("erm", 0, flat(0.9)), id="again")]
    (choice,) = select(runs, "val_average")
    assert choice.score == 0.5
    assert "left out: again" in choice.notes[0]


def test_no_finished_run_and_an_unknown_rule_are_errors():
    with pytest.raises(DebiasError, match=r"none of 1 is. The first error: ValueError: no"):
        select([failed("erm", 0)], "last")
    with pytest.raises(DebiasError, match=r"val_average, .*but got `worst`"):
        select([record("erm", 0)], "worst")


def test_the_candidate_of_the_rule_is_the_one_that_is_reported():
    kept = {
        name: Candidate(i, i, flat(0.5) | {"val_shift/mean": 0.5}, flat(i / 10, "test"))
        for i, name in enumerate(("val_average", "val_worst_group", "val_shift", "last"), 1)
    }
    runs = [replace(record("erm", 0), candidates=kept)]
    for rule, average in (
        ("val_average", 0.1),
        ("val_worst_group", 0.2),
        ("val_shift", 0.3),
        ("oracle", 0.4),
        ("last", 0.4),
    ):
        comparison = make_comparison(runs, rule)
        assert comparison.rows[0].average.mean == pytest.approx(average)
        assert runs_rows(comparison)[0]["epoch"] == round(10 * average)
