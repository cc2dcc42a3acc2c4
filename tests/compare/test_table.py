"""The table: statistics against scipy and by hand, what is missing, and what each format shows."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from _support.records import GROUPS, failed, logged, made_up, record
from debias.compare.table import (
    caption,
    make_comparison,
    make_markdown,
    make_rich_table,
    paired_difference,
    runs_rows,
    setting_text,
    spread,
    table_rows,
    write_rows,
)

METHODS = ("erm", "balanced", "group_dro", "vrex")


def printed(comparison, width=120):
    console = Console(width=width, file=io.StringIO())
    console.print(make_rich_table(comparison, width))
    return console.file.getvalue()


def test_difference_to_erm_is_scipys_paired_interval():
    runs = made_up(METHODS, seeds=range(5))
    tests = {(r.method, r.seed): r.candidates["last"].test for r in runs}
    for row in make_comparison(runs, "last").rows:
        if row.method == "erm":
            assert row.worst_vs_erm is None
            assert row.average_vs_erm is None
            continue
        for difference, key in ((row.worst_vs_erm, "test/worst_group_accuracy"), (row.average_vs_erm, "test/accuracy")):
            method, erm = ([tests[name, s][key] for s in range(5)] for name in (row.method, "erm"))
            expected = ttest_rel(method, erm)
            interval = expected.confidence_interval(0.95)
            assert difference.mean == pytest.approx(np.mean(method) - np.mean(erm))
            assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
            assert difference.more_than_seed_noise is bool(expected.pvalue < 0.05)


def test_interval_by_hand():
    found = paired_difference({0: 0.5, 1: 0.7, 2: 0.9, 7: 0.1}, {2: 0.6, 1: 0.5, 0: 0.4, 9: 0.3})
    half = 4.30265 * 0.1 / math.sqrt(3)  # the t quantile of 2 degrees of freedom; differences 0.1, 0.2, 0.3
    assert (found.mean, found.n) == (pytest.approx(0.2), 3)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert found.more_than_seed_noise is False
    assert paired_difference({0: 0.6, 1: 0.7, 2: 0.8}, {0: 0.5, 1: 0.5, 2: 0.6}).more_than_seed_noise is True
    assert paired_difference({0: 0.1, 1: 0.2, 2: 0.2}, {0: 0.5, 1: 0.5, 2: 0.6}).more_than_seed_noise is True  # below


def test_one_common_seed_tells_nothing_about_seed_noise():
    found = paired_difference({0: 0.75, 1: 0.9}, {0: 0.5, 2: 0.4, 1: math.nan})
    assert (found.mean, found.n, found.more_than_seed_noise) == (0.25, 1, None)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert paired_difference({0: 0.5}, {1: 0.5}).n == 0
    same = paired_difference({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert (same.low, same.high, same.more_than_seed_noise) == (0, 0, False)


def test_spread_is_the_sample_standard_deviation():
    values = [0.1, 0.4, 0.45]
    assert spread(values).std == pytest.approx(np.std(values, ddof=1))
    assert math.isnan(spread([0.5]).std)
    assert math.isnan(spread([math.nan]).mean)


def test_rows_hold_means_over_seeds():
    runs = [record("erm", s, test=[0.5 + s / 10, 0.7, 0.8, 0.9]) for s in (0, 1, 2)]
    (row,) = make_comparison(runs, "val_average").rows
    assert row.seeds == (0, 1, 2)
    assert row.worst.mean == pytest.approx(0.6)
    assert row.worst.std == pytest.approx(0.1)
    assert row.average.mean == pytest.approx(0.75)
    assert row.gap.mean == pytest.approx(0.15)
    assert row.gap.std == pytest.approx(np.std([2.9 / 4 - 0.5, 3.0 / 4 - 0.6, 3.1 / 4 - 0.7], ddof=1))
    assert row.by_group[GROUPS[1]].mean == pytest.approx(0.7)
    assert row.seconds_per_step.mean == pytest.approx(0.011)
    assert row.peak_memory.mean == 100


def test_unmeasured_memory_and_groups_without_samples():
    runs = [record("erm", s, test=[0.5, math.nan, 0.7 + s / 10, 0.9], peak_memory=0) for s in (0, 1)]
    comparison = make_comparison(runs, "val_average")
    (row,) = comparison.rows
    assert row.worst.mean == 0.5
    assert row.by_group[GROUPS[1]].n == 0
    assert row.peak_memory.n == 0
    assert any(f"{GROUPS[1]!r} has no test sample in 2 of 2 runs" in note for note in comparison.notes)
    (line,) = table_rows(comparison)
    assert line[f"group/{GROUPS[1]}_mean"] is None
    assert line["peak_memory_mib_mean"] is None
    assert " nan" not in printed(comparison)
    assert "nan" not in write_rows(table_rows(comparison)) + write_rows(runs_rows(comparison)) + make_markdown(
        comparison
    )


def test_a_blank_is_never_left_out_of_a_mean_unsaid():
    runs = [record("erm", s) for s in range(3)]
    runs += [record("vrex", s, seconds_per_step=math.nan if s else 0.3, peak_memory=2**20 * (s < 2)) for s in range(3)]
    bare = {"test/accuracy": math.nan, "test/worst_group_accuracy": math.nan}
    runs += [record("irm", s, test=bare if s == 1 else (0.9, 0.8, 0.7, 0.6)) for s in range(2)]
    comparison = make_comparison(runs, "val_average")
    notes = [note for note in comparison.notes if "the others have none" in note]
    assert notes == [
        "vrex: ms a step of 1 of 3 runs; the others have none.",
        "vrex: MiB of 2 of 3 runs; the others have none.",
        "irm: average, worst group, gap of 1 of 2 runs; the others have none.",
    ]


def test_warnings_of_runs_stand_under_the_table():
    dead = "DomainAdversarial(domain) reaches no trainable parameter: it <b>changes</b> nothing"
    runs = [record("erm", s) for s in range(2)] + [record("dann", s, warnings=[dead]) for s in range(2)]
    runs += [record("coral", s, warnings=[dead] * s) for s in range(2)]
    runs += [record("coral", s, (0.1,) * 4, params={"lr": 1.0}, warnings=["not in the table"]) for s in range(2)]
    comparison = make_comparison(runs, "val_average")
    assert comparison.notes[:2] == (
        f"Warning of dann, 2 of 2 runs: {dead}", f"Warning of coral, 1 of 2 runs: {dead}"
    )  # fmt: skip
    assert not any("not in the table" in note for note in comparison.notes)
    said = {row["id"]: row["warnings"] for row in runs_rows(comparison)}
    assert said["erm-0"] is None
    assert json.loads(said["dann-1"]) == [dead]


def test_both_averages_are_shown_where_training_counts_are_known():
    accuracies, counts = (0.95, 0.60, 0.55, 0.92), (3498, 184, 56, 1057)
    expected = np.average(accuracies, weights=counts)
    test = logged("test", accuracies) | {"test/adjusted_accuracy": float(expected)}
    runs = [record("erm", s, test=test) for s in range(2)] + [record("vrex", s) for s in range(2)]
    comparison = make_comparison(runs, "val_average")
    erm = comparison.rows[0]
    assert (erm.average.mean, erm.adjusted.mean) == pytest.approx((np.mean(accuracies), expected))
    (line,) = [line for line in printed(comparison, 160).splitlines() if line.startswith("ERM ")]
    assert line.split()[1:5] == ["75.5", "±0.0", "92.5", "±0.0"]
    assert "adjusted" in printed(comparison, 80)
    assert "Adjusted: mean over groups by their shares of the training set." in caption(comparison)
    header, _, first, second = make_markdown(comparison).splitlines()
    assert header.startswith("| method | average | adjusted average | worst group |")
    assert first.startswith("| ERM | 75.5 ±0.0 | 92.5 ±0.0 | 55.0")
    assert second.startswith("| vrex | 75.0 ±0.0 | - | 60.0")
    assert [row["adjusted_average_mean"] for row in table_rows(comparison)] == [pytest.approx(expected), None]
    assert [row["adjusted_average"] for row in runs_rows(comparison)] == [pytest.approx(expected)] * 2 + [None] * 2
    unknown = make_comparison(runs[2:], "val_average")
    assert "djusted" not in printed(unknown, 160) + make_markdown(unknown) + caption(unknown)


def test_one_seed_has_no_deviation():
    comparison = make_comparison([record("erm", 0), record("vrex", 0, test=[0.5, 0.6, 0.7, 0.8])], "val_average")
    assert comparison.rows[1].worst_vs_erm.more_than_seed_noise is None
    assert "the noise of seeds cannot be measured" in " ".join(comparison.notes)
    text = printed(comparison)
    assert "-10.0" in text
    assert "±" not in text.replace("mean ±", "")
    assert table_rows(comparison)[0]["worst_group_std"] is None


def test_failed_runs_are_counted_and_quoted():
    runs = [record("erm", 0), record("erm", 1), record("vrex", 0), failed("vrex", 1, "RuntimeError: a [bold] word")]
    runs += [failed("irm", 0), failed("irm", 1)]
    comparison = make_comparison(runs, "val_average")
    assert {row.method: row.failed for row in comparison.rows} == {"erm": 0, "vrex": 1, "irm": 2}
    assert "Failed: vrex-1-failed: RuntimeError: a [bold] word" in comparison.notes
    assert "Failed runs: 3" in caption(comparison)
    irm = table_rows(comparison)[-1]
    assert (irm["method"], irm["seeds"], irm["average_mean"], irm["failed_runs"]) == ("irm", "", None, 2)
    assert "failed" in printed(comparison)
    errors = {row["id"]: row["error"] for row in runs_rows(comparison) if row["status"] == "failed"}
    assert errors["vrex-1-failed"] == "RuntimeError: a [bold] word"


def test_missing_baselines_are_noted():
    notes = " ".join(make_comparison([record("vrex", 0)], "val_average").notes)
    assert "no finished run of ERM" in notes
    assert "no finished run of balanced ERM" in notes
    comparison = make_comparison([record("vrex", 0), record("balanced", 0), failed("erm", 0)], "val_average")
    assert "no finished run of ERM" in " ".join(comparison.notes)
    assert "no finished run of balanced ERM" not in " ".join(comparison.notes)
    assert all(row.worst_vs_erm is None for row in comparison.rows)
    notes = " ".join(make_comparison(made_up(METHODS), "val_average").notes)
    assert "no finished run of" not in notes


def test_different_seeds_are_paired_and_noted():
    runs = made_up(("erm",), seeds=(0, 1, 2)) + made_up(("vrex",), seeds=(1, 2, 3))
    comparison = make_comparison(runs, "val_average")
    assert comparison.rows[1].worst_vs_erm.n == 2
    assert "not all methods have the same seeds" in " ".join(comparison.notes).lower()
    assert "1 2 3" in printed(comparison)


def test_versions_dates_and_devices():
    other = {"started": "2026-04-01T00:00:00+00:00", "device": "a GPU", "versions": {"torch": "2.10"}}
    notes = make_comparison([record("erm", 0), record("erm", 1, **other)], "val_average").notes
    text = " ".join(notes)
    assert "Runs of 2026-03-04 to 2026-04-01 (UTC), on a CPU; a GPU." in text
    assert "torch 2.10 and 2.9" in text
    assert "same version of torch." in text
    assert "times and memory cannot be compared" in text
    assert "abcdef012345" in text


def test_detection_metrics_by_domain():
    names = ("barn", "field")
    val, test = (
        logged(stage, (0.3, 0.5), names, "map", "domain") | {f"{stage}/worst_domain_map_50": 0.6}
        for stage in ("val", "test")
    )
    comparison = make_comparison([record("erm", 0, val, test)], "val_worst_group")
    assert (comparison.metric, comparison.groups, comparison.unit) == ("map", names, "map in %")
    assert comparison.rows[0].worst.mean == 0.3
    assert "30.0" in printed(comparison)


def test_other_metrics_stay_raw_and_lower_may_be_better():
    val, test = (logged(stage, (0.3, 0.5), ("a", "b"), "loss") for stage in ("val", "test"))
    test["test/worst_group_loss"] = 0.5
    comparison = make_comparison([record("erm", 0, val, test, direction="min")], "val_average")
    assert comparison.unit == "loss"
    assert "Lower is better" in caption(comparison)
    assert comparison.rows[0].gap.mean == pytest.approx(-0.1)
    assert "0.500" in printed(comparison)
    high = logged("test", (30.0, 50.0), ("a", "b"))
    assert not make_comparison([record("erm", 0, test=high)], "val_average").percent


def test_nothing_tested_is_noted():
    comparison = make_comparison([record("erm", 0, test={})], "val_average")
    assert comparison.metric == ""
    assert "No test logged a worst group" in " ".join(comparison.notes)
    assert "ERM" in printed(comparison)


def test_the_oracle_is_marked_everywhere():
    comparison = make_comparison(made_up(METHODS), "oracle")
    assert "ORACLE" in printed(comparison).splitlines()[0]
    assert caption(comparison).startswith("ORACLE")
    assert {row["rule"] for row in table_rows(comparison)} == {"oracle"}
    assert "ORACLE" not in printed(make_comparison(made_up(METHODS), "val_average"))


def test_chosen_settings_are_shown():
    runs = [record("erm", 0, params={"model.lr": lr}) for lr in (0.1, 0.2)]
    runs.append(record("vrex", 0, params={"a.weight": 10.0, "b.weight": 1}))
    runs.append(record("irm", 0, params={"layers": "[bold]"}))
    comparison = make_comparison(runs, "val_average")
    assert comparison.rows[0].settings == 2
    assert "lr=0.1" in printed(comparison)
    assert "layers=[bold]" in printed(comparison)
    assert json.loads(table_rows(comparison)[1]["params"]) == {"a.weight": 10.0, "b.weight": 1}
    assert setting_text({"a.weight": 10.0, "b.weight": 1}) == "a.weight=10, b.weight=1"
    assert {row["id"]: row["in_table"] for row in runs_rows(comparison)} == {
        "erm-0-model.lr=0.1": True,
        "erm-0-model.lr=0.2": False,
        "vrex-0-a.weight=10.0-b.weight=1": True,
        "irm-0-layers=[bold]": True,
    }


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("groups", [GROUPS, [f"domain {i}" for i in range(47)]], ids=["4", "47"])
def test_table_fits_the_terminal(width, groups):
    text = printed(make_comparison(made_up([*METHODS, "hessian_alignment"], groups=groups), "val_average"), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for method in ("balanced ERM", "ERM", "group_dro", "vrex", "hessian_alignment"):
        (line,) = [line for line in lines if line.startswith(f"{method} ")]
        assert line.count("[") == (method != "ERM")  # the interval is whole
    assert ("domain" in text) is False or len(groups) == 4


def test_wide_terminals_see_deviations_of_groups():
    text = printed(make_comparison(made_up(METHODS), "val_average"), 160)
    (line,) = [line for line in text.splitlines() if line.startswith("vrex")]
    assert line.count("±") == 3 + len(GROUPS)


def test_csv_gives_back_the_numbers_to_the_last_bit():
    runs = made_up(METHODS)
    comparison = make_comparison([*runs, failed("irm", 0)], "val_worst_group")
    table = list(csv.DictReader(io.StringIO(write_rows(table_rows(comparison)))))
    for line, row in zip(table, comparison.rows, strict=True):
        assert line["method"] == row.method
        if row.runs:
            assert float(line["worst_group_mean"]) == row.worst.mean
            assert float(line[f"group/{GROUPS[2]}_std"]) == row.by_group[GROUPS[2]].std
    assert table[0]["worst_group_to_erm_more_than_seed_noise"] in ("True", "False")
    lines = {line["id"]: line for line in csv.DictReader(io.StringIO(write_rows(runs_rows(comparison))))}
    for run in runs:
        test = run.candidates["val_worst_group"].test
        assert float(lines[run.id]["average"]) == test["test/accuracy"]
        assert float(lines[run.id]["worst_group"]) == test["test/worst_group_accuracy"]
        assert float(lines[run.id][f"group/{GROUPS[0]}"]) == test[f"test/accuracy_by_group/{GROUPS[0]}"]
        assert float(lines[run.id]["score"]) == run.candidates["val_worst_group"].val["val/worst_group_accuracy"]
        assert lines[run.id]["version/torch"] == "2.9"


def test_columns_are_the_documented_ones():
    comparison = make_comparison(made_up(("erm", "vrex"), groups=("a",)), "last")
    figures = ("score", "average", "adjusted_average", "worst_group", "gap", "group/a")
    spreads = (*figures, "seconds_per_step", "peak_memory_mib")
    assert list(table_rows(comparison)[0]) == [
        *("method", "params", "settings", "seeds", "rule", "metric"),
        *(f"{name}_{of}" for name in spreads for of in ("mean", "std")),
        *(
            f"{name}_to_erm_{of}"
            for name in ("worst_group", "average")
            for of in ("mean", "low", "high", "seeds", "more_than_seed_noise")
        ),
        "failed_runs",
    ]
    assert list(runs_rows(comparison)[0]) == [
        *("id", "method", "seed", "params", "held_out", "status", "error", "warnings", "in_table", "rule"),
        *("candidate", "epoch", "step", "score", "metric", "average", "adjusted_average", "worst_group", "gap"),
        *("not_finite", "group/a", "steps", "seconds"),
        *("seconds_per_step", "peak_memory_mib", "device", "started", "recipe", "recipe_hash", "git_revision"),
        *("version/python", "version/debias", "version/torch"),
    ]


def test_markdown_escapes_names_of_groups():
    text = make_markdown(make_comparison([record("erm", 0, test=logged("test", (0.5,), ("digit<5 | red",)))], "last"))
    header, rule, _ = text.splitlines()
    assert "digit&lt;5 \\| red" in header
    assert header.replace("\\|", "").count("|") == rule.count("|")


def test_several_loaders_are_groups():
    test = {
        f"test/{key}/dataloader_idx_{i}": v
        for key in ("accuracy", "worst_group_accuracy")
        for i, v in ((0, 0.5), (1, 0.9))
    }
    comparison = make_comparison([replace(record("erm", 0), candidates=record("erm", 0, test=test).candidates)], "last")
    assert comparison.groups == ("dataloader_idx_0", "dataloader_idx_1")
    assert comparison.rows[0].worst.mean == 0.5
    assert comparison.rows[0].average.mean == pytest.approx(0.7)


def test_a_run_that_diverged_is_marked():
    bad = logged("test", (0.0, 0.0, 0.0, 0.0)) | {"test/accuracy_not_finite": 40.0}
    comparison = make_comparison([record("erm", 0, test=bad), record("irm", 0)], "last")
    (note,) = [note for note in comparison.notes if note.startswith("DIVERGED")]
    assert "in erm-0 (40 samples)" in note
    assert [row["not_finite"] for row in runs_rows(comparison)] == [40, 0]
