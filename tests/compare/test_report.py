"""``debias report``: files that are whole or not there, what is printed, and one clear message for each error."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shlex

import pytest
from rich.console import Console

from _support.records import failed, log_weights, made_up, record, save
from debias.cli import main, make_parser
from debias.compare import report as report_module
from debias.compare.records import find_records
from debias.compare.report import print_report, write_report
from debias.compare.table import make_comparison, runs_rows, table_rows, write_rows
from debias.errors import DebiasError

pytestmark = pytest.mark.usefixtures("coarse_figures")

METHODS = ("erm", "balanced", "group_dro")
FILES = {
    "by_group-dark.png", "by_group.png", "group_weights-dark.png", "group_weights.png", "report.md", "runs.csv",
    "table.csv", "worst_group-dark.png", "worst_group.png", "worst_vs_average-dark.png", "worst_vs_average.png",
}  # fmt: skip


def content(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def runs(tmp_path):
    """Nine finished runs and a failed one, three of them with weights."""
    made = [*made_up(METHODS), failed("irm", 0, "ValueError: <b>no</b>\nat line 3")]
    folder = save(made, tmp_path / "runs")
    for run in made[6:9]:
        log_weights(folder, run)
    return folder


def test_everything_is_written(runs, tmp_path):
    records = find_records([runs])
    out = tmp_path / "out" / "deep"
    comparison, paths = write_report(records, "val_worst_group", out, "My title", folders=[runs])
    assert set(paths) == FILES == {p.name for p in out.iterdir()}
    assert all(path == out / name for name, path in paths.items())
    assert (out / "table.csv").read_text() == write_rows(table_rows(make_comparison(records, "val_worst_group")))
    assert (out / "runs.csv").read_text() == write_rows(runs_rows(comparison))
    page = (out / "report.md").read_text()
    assert page.startswith("# My title\n")
    pictures = re.findall(r'(?:srcset|src)="([^"]+)"', page)
    assert sorted(pictures) == sorted(name for name in FILES if name.endswith(".png"))
    assert "&lt;b&gt;no&lt;/b&gt; at line 3" in page
    assert comparison.rule.words in page
    for number in (f"{100 * comparison.rows[0].worst.mean:.1f}", "torch 2.9", "2026-03-04"):
        assert number in page


def test_the_command_on_the_page_rebuilds_it(runs, tmp_path, capsys):
    out = tmp_path / "out folder"
    write_report(find_records([runs]), "oracle", out, folders=[runs])
    (command,) = re.findall(r"```bash\n(debias report .*)\n```", (out / "report.md").read_text())
    before = content(out)
    (out / "table.csv").unlink()
    main(shlex.split(command)[1:])
    assert content(out) == before
    assert "ORACLE" in (out / "report.md").read_text()


def test_the_page_names_the_audit_of_the_best_method_and_links_it_once_it_is_there(runs, tmp_path):
    out = tmp_path / "out"
    comparison, _ = write_report(find_records([runs]), "val_worst_group", out, folders=[runs])
    best = max(comparison.rows, key=lambda row: row.worst.mean).method
    page = (out / "report.md").read_text()
    (command,) = re.findall(r"```bash\n(debias audit .*)\n```", page)
    options = make_parser().parse_args(shlex.split(command)[1:])
    erm, method = (path.relative_to(runs) for path in options.compare)
    assert (erm.parts[0], method.parts[0]) == ("erm-0", f"{best}-0") != ("erm-0", "erm-0")
    assert options.config == [runs / "erm-0" / "config.yaml"]
    assert "audit.html" not in page
    (options.out).mkdir()
    (options.out / "audit.html").write_text("")
    write_report(find_records([runs]), "val_worst_group", out, folders=[runs])
    assert "](audit/audit.html)" in (out / "report.md").read_text()


def test_command_line_writes_beside_the_runs_and_prints_where(runs, capsys):
    main(["report", str(runs)])
    printed = capsys.readouterr().out
    assert "val_worst_group" in printed
    assert "Failed: irm-0-failed: ValueError: <b>no</b>" in printed
    assert "no finished run of" not in printed
    for name in FILES:
        assert (runs / name).exists()
        assert (str(runs / name) in printed) is not name.endswith("-dark.png")
    again = content(runs)
    main(["report", str(runs)])  # its own files are no runs
    assert content(runs) == again


def test_options(runs, tmp_path, capsys):
    main(["report", str(runs), "--select", "val_average", "--out", str(tmp_path / "x")])
    assert "Selection `val_average`" in capsys.readouterr().out
    table = csv.DictReader(io.StringIO((tmp_path / "x" / "table.csv").read_text()))
    assert {row["rule"] for row in table} == {"val_average"}
    assert make_parser().parse_args(["report", "a", "b", "--project", "p"]).project == "p"
    with pytest.raises(SystemExit):
        make_parser().parse_args(["report", "a", "--select", "best_test"])
    assert "invalid choice: 'best_test'" in capsys.readouterr().err


def test_without_metrics_by_group_there_is_still_a_page(tmp_path):
    _, paths = write_report([record("erm", 0, val={}, test={})], "last", tmp_path)
    assert set(paths) == {"report.md", "runs.csv", "table.csv"}
    assert "<picture>" not in (tmp_path / "report.md").read_text()


def test_figures_of_an_earlier_report_go(runs, tmp_path):
    records = find_records([runs])
    write_report(records, "val_average", tmp_path / "out")
    write_report([r for r in records if r.method == "erm"], "val_average", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {name for name in FILES if "weights" not in name}


def test_what_fails_half_way_changes_nothing(runs, tmp_path, monkeypatch):
    records, out = find_records([runs]), tmp_path / "out"
    write_report(records, "val_average", out)
    before = content(out)

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report_module, "_page", broken)
    with pytest.raises(DebiasError, match=r"write the report to .*disk full.*--out"):
        write_report(records, "oracle", out)
    assert content(out) == before
    assert {p.name for p in out.iterdir()} == FILES  # and no draft is left


@pytest.mark.parametrize("moved", range(3))
def test_a_page_never_stands_beside_files_of_another_report(tmp_path, monkeypatch, moved):
    before, after = (save([record("erm", seed, {}, {})], tmp_path / f"runs{seed}") for seed in (0, 1))
    out, replace, places = tmp_path / "out", report_module.os.replace, []
    write_report(find_records([before]), "last", out)

    def killed(source, place):
        if len(places) == moved:
            raise KeyboardInterrupt
        places.append(place)
        replace(source, place)

    with monkeypatch.context() as patched:
        patched.setattr(report_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report(find_records([after]), "last", out)
    assert len(places) == moved
    assert {p.name for p in out.iterdir()} == {"runs.csv", "table.csv"}
    write_report(find_records([after]), "last", out)
    page = (out / "report.md").read_text()
    write_report(find_records([after]), "last", tmp_path / "whole")
    assert (out / "runs.csv").read_text() == (tmp_path / "whole" / "runs.csv").read_text()
    assert page == (tmp_path / "whole" / "report.md").read_text().replace(str(tmp_path / "whole"), str(out))


def test_out_that_cannot_be_a_folder_is_one_message(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(runs), "--out", str(tmp_path / "file")])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: Expected to write the report to {tmp_path / 'file'}")
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 9}', "null"])
def test_a_corrupt_result_is_one_message(runs, text, capsys):
    path = runs / "erm-1" / "result.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["report", str(runs)])
    error = capsys.readouterr().err
    assert error.startswith("error: Expected ")
    assert str(path) in error
    assert path.read_text() == text
    assert not (runs / "report.md").exists()


def test_two_recipes_are_one_message(runs, tmp_path, capsys):
    other = save([record("erm", 7, recipe="other", recipe_hash="ffff")], tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["report", str(runs), str(other)])
    error = capsys.readouterr().err
    assert "Expected runs of one recipe" in error
    assert "`other` (ffff)" in error
    assert not (runs / "report.md").exists()


def test_runs_of_two_recipes_under_the_same_names_are_no_copies(tmp_path):
    first = save([record("erm", 0)], tmp_path / "first")
    second = save([record("erm", 0, recipe="other", recipe_hash="4567")], tmp_path / "second")
    with pytest.raises(DebiasError, match="Expected runs of one recipe"):
        find_records([first, second])


def test_runs_of_a_method_that_was_configured_otherwise_are_one_message(tmp_path):
    runs = [record("erm", 0, config_hash="a"), record("erm", 1, config_hash="a"), record("erm", 2)]
    runs += [record("erm", 0, params={"lr": 1}, config_hash="b"), record("irm", 0, config_hash="c")]
    assert len(find_records([save(runs, tmp_path / "here")])) == 5
    save([record("erm", 3, config_hash="d")], tmp_path / "there")
    with pytest.raises(DebiasError, match=r"all runs of `erm` with one setting .*erm-0 and .*there.erm-3 are not"):
        find_records([tmp_path / "here", tmp_path / "there"])


def test_empty_and_missing_folders_and_unavailable_rules_are_one_message(runs, tmp_path, capsys):
    for words, message in (
        ([str(tmp_path / "none")], "there is none at"),
        ([str(tmp_path)], "there is no result.json below it"),
        ([str(runs), "--select", "val_shift"], "Rules that are available: val_average, val_worst_group, oracle, last."),
    ):
        if words == [str(tmp_path)]:
            (tmp_path / "empty").mkdir()
            words = [str(tmp_path / "empty")]
        with pytest.raises(SystemExit):
            main(["report", *words])
        assert message in capsys.readouterr().err
    assert not (runs / "report.md").exists()


def test_notes_are_printed_as_they_are(tmp_path):
    comparison, paths = write_report([record("erm", 0), failed("irm", 0, "KeyError: '[red]'")], "last", tmp_path)
    console = Console(file=io.StringIO(), width=40)
    print_report(comparison, paths, console)
    assert "KeyError: '[red]'" in console.file.getvalue()
    assert max(map(len, console.file.getvalue().split(str(tmp_path))[0].splitlines())) > 40
