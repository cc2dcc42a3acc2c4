"""The comparison in W&B: read back from the files of an offline run, it is what the CSV files say."""

from __future__ import annotations

import csv
import os
import re
import sys
from pathlib import Path

import pytest
import wandb

from _support.forked import run
from _support.offline_wandb import read_offline_runs
from _support.records import GROUPS, failed, made_up, record, save
from debias.cli import main
from debias.compare.records import find_records
from debias.compare.report import write_report
from debias.compare.wandb_summary import log_summary, summary_id
from debias.errors import DebiasError

pytestmark = pytest.mark.usefixtures("coarse_figures")

METHODS = ("erm", "balanced", "group_dro")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, no messages, and no run left over."""
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off")):
        monkeypatch.setenv(name, value)
    yield
    assert wandb.run is None


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def as_csv(rows):
    """Rows of a W&B table as a CSV reader gives them."""
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def test_offline_run_equals_the_csv_files(tmp_path):
    runs = [*made_up(METHODS), failed("irm", 0)]
    comparison, paths = write_report(runs, "val_worst_group", tmp_path)
    log_summary(comparison, paths, project="debiasing", group="digits-1", out=tmp_path)
    (run,) = read_offline_runs(tmp_path)
    assert run.finished
    assert (run.name, run.group, run.job_type, run.project) == ("comparison", "digits-1", "summary", "debiasing")
    assert run.id == summary_id("debiasing", "digits-1")
    assert run.tags == ["made_up", "val_worst_group"]
    assert run.config["rule"] == "val_worst_group"
    assert run.config["methods"] == ["balanced", "erm", "group_dro", "irm"]

    table, lines = read(tmp_path / "table.csv"), read(tmp_path / "runs.csv")
    assert as_csv(run.table("table")) == table
    assert as_csv(run.table("runs")) == lines
    assert len(lines) == 10
    for row in table[:3]:
        for name in ("worst_group", "average", "gap"):
            assert run.summary[f"{row['method']}/{name}"] == float(row[f"{name}_mean"])
    assert "irm/average" not in run.summary
    assert run.summary["rule"] == "val_worst_group"
    assert "Failed: irm-0-failed" in run.summary["notes"]

    charts = run.config["_wandb"]["visualize"]
    assert {name: re.sub("/v0", "", chart["panel_config"]["panelDefId"]) for name, chart in charts.items()} == {
        "worst_group": "wandb/bar",
        "worst_vs_average": "wandb/scatter",
        **{f"by_group/{name}": "wandb/bar" for name in GROUPS},
    }
    bars = run.table("worst_group_table")
    labels = {"balanced": "balanced ERM", "erm": "ERM", "group_dro": "group_dro"}
    assert {row["method"]: row["worst group"] for row in bars} == {
        labels[row["method"]]: pytest.approx(100 * float(row["worst_group_mean"])) for row in table[:3]
    }
    group = run.table(f"by_group/{GROUPS[1]}_table")
    assert group[2][GROUPS[1]] == pytest.approx(100 * float(table[2][f"group/{GROUPS[1]}_mean"]))
    for name in ("worst_group", "worst_vs_average", "by_group-dark"):
        picture = run.folder / "files" / run.summary[f"figure/{name}"]["path"]
        assert picture.read_bytes() == (tmp_path / f"{name}.png").read_bytes()
    assert len(run.history) == 1


def test_command_line_logs_two_comparisons_as_two_runs(tmp_path, capsys):
    first = save(made_up(METHODS, groups=["digit<5 red", "digit>=5 red"]), tmp_path / "first")
    second = save([record("erm", 0, test=[0.1] * 4, recipe="other", recipe_hash="feedbeef00")], tmp_path / "second")
    for folder in (first, second):
        main(["report", str(folder), "--project", "p"])
    (one,), (two,) = read_offline_runs(first), read_offline_runs(second)
    known = find_records([first])[0]
    assert (one.group, two.group) == (f"{known.recipe}-{known.recipe_hash[:8]}", "other-feedbeef")
    assert one.id != two.id
    assert two.summary["erm/average"] == pytest.approx(0.1)
    assert "group_dro/average" not in two.summary
    assert len(two.table("runs")) == 1
    assert as_csv(one.table("table")) == read(first / "table.csv")
    assert len(one.table("by_group/digit<5 red_table")) == 3


def test_another_team_gets_the_comparison_too_and_the_same_one_not_twice(tmp_path, capsys):
    folder = save([record("erm", 0)], tmp_path / "runs")
    main(["report", str(folder), "--project", "p"])
    assert "Logged to the W&B project p before" not in capsys.readouterr().out
    main(["report", str(folder), "--project", "p"])
    assert "Logged to the W&B project p before, and nothing has changed since." in capsys.readouterr().out
    assert len(read_offline_runs(folder)) == 1
    main(["report", str(folder), "--project", "p", "--entity", "team"])
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2


def test_ids_are_stable_and_of_project_and_group():
    assert summary_id("p", "g") == summary_id("p", "g")
    assert len({summary_id("p", "g"), summary_id("p", "h"), summary_id("q", "g")}) == 3


def test_a_run_in_progress_is_not_mixed_into(tmp_path):
    comparison, paths = write_report([record("erm", 0)], "last", tmp_path)
    with wandb.init(project="p", name="mine", dir=tmp_path) as mine:
        with pytest.raises(DebiasError, match=r"no W&B run in progress, but `mine` is.*wandb\.finish"):
            log_summary(comparison, paths, project="p", group="g", out=tmp_path)
        assert wandb.run is mine


def test_no_login_is_one_message_and_the_report_stays(tmp_path):
    folder = save([record("erm", 0)], tmp_path / "runs")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    env |= {"WANDB_BASE_URL": "http://localhost:9", "WANDB_SILENT": "true"}  # nobody is there, whatever happens
    # A process of its own: W&B reads its settings once.
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "debias", "report", str(folder), "--project", "p"]
    done = run(command, cwd=tmp_path, env=env, timeout=240)
    assert done.returncode == 1
    assert "error: Expected to log the comparison to the W&B project `p`, but W&B refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "report.md").exists()
