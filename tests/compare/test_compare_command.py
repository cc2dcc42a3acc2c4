"""``debias compare`` as a user meets it: one command to the table; interrupted, repeated, twice at once, refused."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from _support.forked import Forked
from _support.offline_wandb import read_offline_runs
from debias.cli import main
from debias.cli.recipes import recipes_folder
from debias.compare.runner import Interrupted

ROOT = Path(__file__).parents[2]
EPOCHS = ["--set", "trainer.max_epochs=2"]
GRID = ["colored_digits", "--methods", "group_dro", "--seeds", "0", "1", *EPOCHS]


def environment(home: Path) -> dict[str, str]:
    """Nobody is logged in anywhere."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    home_ = {"HOME": str(home), "NETRC": str(home / "netrc"), "COLUMNS": "160", "PYTHONPATH": str(ROOT)}
    return {**inherited, **home_, "WANDB_SILENT": "true"}


def start(*words: str, cwd: Path, kind: Any = Forked) -> Any:
    return kind(
        [sys.executable, "-m", "debias", "compare", *words],
        cwd=cwd, env=environment(cwd), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One comparison with W&B offline: ERM, balanced ERM and GroupDRO on two seeds; its folder and what it said."""
    cwd = tmp_path_factory.mktemp("compare")
    process = start(*GRID, "--out", "out", "--project", "tests", "--jobs", "2", cwd=cwd)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return cwd, said


@pytest.fixture
def copied(compared, tmp_path, monkeypatch):
    shutil.copytree(compared[0] / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    assert stop.value.code in (1, 2)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1, error
    assert "Traceback" not in error
    return error


def test_one_command_says_all(compared):
    cwd, said = compared
    for part in ("ERM", "balanced ERM", "group_dro", "val_worst_group", "wandb sync", "Nobody is logged in to W&B"):
        assert part in said
    names = {path.name for path in (cwd / "out").iterdir()}
    assert {"table.csv", "runs.csv", "report.md", "worst_vs_average.png", "worst_vs_average-dark.png"} <= names
    assert [row["method"] for row in rows(cwd / "out" / "table.csv")] == ["balanced", "erm", "group_dro"]


def test_the_table_equals_a_computation_from_saved_predictions(compared):
    out = compared[0] / "out"
    for row in rows(out / "table.csv"):
        average, worst = [], []
        for seed in (0, 1):
            run = out / "runs" / f"{row['method']}-seed{seed}"
            chosen = json.loads((run / "result.json").read_text())["candidates"]["val_worst_group"]
            with np.load(run / "predictions" / f"step{chosen['step']}.npz") as saved:
                hits = saved["logits_0"].argmax(1) == saved["target_0"]
                average.append(hits.mean())
                worst.append(min(hits[saved["group_0"] == g].mean() for g in range(4)))
        assert float(row["average_mean"]) == pytest.approx(np.mean(average), abs=1e-6)
        assert float(row["worst_group_mean"]) == pytest.approx(np.mean(worst), abs=1e-6)
        assert float(row["worst_group_std"]) == pytest.approx(np.std(worst, ddof=1), abs=1e-6)


def test_w_and_b_holds_the_same(compared):
    out = compared[0] / "out"
    runs = {run.name: run for run in read_offline_runs(out)}
    names = {f"{method}-seed{seed}" for method in ("erm", "balanced", "group_dro") for seed in (0, 1)}
    assert set(runs) == names | {"comparison"}
    assert len(read_offline_runs(out)) == len(runs)  # none twice
    assert len({run.group for run in runs.values()}) == len({run.project for run in runs.values()}) == 1
    assert len({run.id for run in runs.values()}) == len(runs)
    assert all(run.finished for run in runs.values())
    for name in names:
        method, seed = name.split("-")
        run = runs[name]
        assert run.job_type == method
        number = int(seed.removeprefix("seed"))
        assert set(run.tags) == {method, f"seed-{number}", "setting-own", "colored_digits"}
        assert run.config["seed_everything"] == run.config["compare/seed"] == number
        assert (run.config["compare/method"], run.config["compare/setting"]) == (method, "own")
        if method == "group_dro":
            assert run.config["GroupDRO/step_size"] == 0.01
        chosen = json.loads((out / "runs" / name / "result.json").read_text())["candidates"]["val_worst_group"]
        for key in ("val/worst_group_accuracy", "test/worst_group_accuracy"):
            best = (chosen["val"] | chosen["test"])[key]
            assert run.summary[f"val_worst_group/{key}"] == pytest.approx(best, abs=1e-6)
        assert sum("val/worst_group_accuracy" in row for row in run.history) == 2  # over time
    assert any("group_weight/digit 0-4 red" in key for row in runs["group_dro-seed0"].history for key in row)
    summary = runs["comparison"]
    assert summary.job_type == "summary"
    for logged, written in zip(summary.table("table"), rows(out / "table.csv"), strict=True):
        for key, value in written.items():
            if isinstance(logged[key], int | float) and not isinstance(logged[key], bool):
                assert float(value) == pytest.approx(logged[key])
            else:
                assert value == ("" if logged[key] is None else str(logged[key])) or value == str(logged[key]).lower()
    for row in rows(out / "table.csv"):
        assert summary.summary[f"{row['method']}/worst_group"] == pytest.approx(float(row["worst_group_mean"]))


def test_the_second_time_nothing_is_repeated(copied, capsys, monkeypatch):
    monkeypatch.setattr("debias.compare.runner._start", lambda *_: pytest.fail("a run was started"))
    before = fingerprint(copied)
    main(["compare", *GRID, "--out", "out", "--project", "tests"])
    assert fingerprint(copied) == before
    assert "balanced ERM" in capsys.readouterr().out


def test_report_from_two_machines(copied, tmp_path, capsys):
    for name in ("group_dro-seed1", "erm-seed1", "balanced-seed1"):
        shutil.move(copied / "runs" / name, tmp_path / "other" / "deep" / name)
    main(["report", str(copied), str(tmp_path / "other"), "--out", str(tmp_path / "joint")])
    assert (tmp_path / "joint" / "table.csv").read_text() == (copied / "table.csv").read_text()
    main(["report", str(copied), "--select", "oracle", "--out", str(tmp_path / "oracle")])
    assert "oracle" in capsys.readouterr().out
    assert "ORACLE" in (tmp_path / "oracle" / "report.md").read_text()


def test_killed_half_way_nothing_is_lost(tmp_path):
    words = ["colored_digits", "--methods", "erm", "--seeds", "0", "--set", "trainer.max_epochs=40", "--out", "out"]
    process = start(*words, cwd=tmp_path)
    first = tmp_path / "out" / "runs" / "erm-seed0" / "result.json"
    second = tmp_path / "out" / "runs" / "balanced-seed0"
    limit = time.monotonic() + 120
    while not (first.exists() and (second / "progress.json").exists()) and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the parent alone: its runs are sessions of their own
    process.communicate(timeout=30)
    assert not (second / "result.json").exists()
    before = first.read_bytes()
    again = start(*words, cwd=tmp_path)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert first.read_bytes() == before
    assert (second / "log.txt").read_text().count("`Trainer.fit` stopped") == 1  # by the process that went on
    assert [row["method"] for row in rows(tmp_path / "out" / "table.csv")] == ["balanced", "erm"]


def test_two_at_once_share_the_runs(tmp_path):
    words = ["colored_digits", "--methods", "erm", "--seeds", "0", *EPOCHS, "--out", "out"]
    both = [start(*words, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for name in ("erm-seed0", "balanced-seed0"):
        log = (tmp_path / "out" / "runs" / name / "log.txt").read_text()
        assert log.count("`Trainer.fit` stopped") == 1
    assert [row["method"] for row in rows(tmp_path / "out" / "table.csv")] == ["balanced", "erm"]
    assert not list((tmp_path / "out").glob(".report.*"))


def test_a_run_on_two_ranks_is_one_run(tmp_path):
    devices = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    words = ["colored_digits", "--methods", "group_dro", *EPOCHS, *devices, "--only", "group_dro-seed0", "--out", "out"]
    process = start(*words, "--project", "tests", cwd=tmp_path)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said + (tmp_path / "out/runs/group_dro-seed0/log.txt").read_text()
    run = tmp_path / "out" / "runs" / "group_dro-seed0"
    record = json.loads((run / "result.json").read_text())
    assert record["device"] == "2 x cpu"
    assert [(r.name, r.group.partition("-")[0]) for r in read_offline_runs(run)] == [
        ("group_dro-seed0", "colored_digits")
    ]
    chosen = record["candidates"]["val_worst_group"]
    with np.load(run / "predictions" / f"step{chosen['step']}.npz") as saved:
        hits = saved["logits_0"].argmax(1) == saved["target_0"]
        assert len(hits) == 719  # each test sample once
        assert chosen["test"]["test/accuracy"] == pytest.approx(hits.mean(), abs=1e-6)


def test_a_bare_name_is_first_of_all_ones_own_copy(tmp_path, monkeypatch):
    from debias.cli.compare import find_recipe

    monkeypatch.chdir(tmp_path)
    assert find_recipe("colored_digits").folder == recipes_folder() / "colored_digits"
    main(["recipes", "copy", "colored_digits", "."])
    assert find_recipe("colored_digits").folder.resolve() == (tmp_path / "recipes" / "colored_digits").resolve()


# What is refused, with nothing overwritten


def test_a_wrong_method(copied, capsys):
    before = fingerprint(copied)
    error = refused(capsys, "colored_digits", "--methods", "grup_dro", "--out", "out")
    assert "got `grup_dro`; the nearest is `group_dro`." in error
    assert fingerprint(copied) == before


def test_a_recipe_that_lacks_what_a_method_needs(tmp_path, capsys):
    error = refused(capsys, "digits_shift", "--methods", "vrex", "--out", str(tmp_path / "out"))
    assert "recipe `digits_shift` to have what the method `vrex` needs" in error
    assert "`data.init_args.n_domains`" in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_recipe(copied, capsys):
    before = fingerprint(copied)
    error = refused(capsys, "identity_shortcut", "--methods", "erm", "--out", "out")
    assert "holds runs of the recipe `colored_digits`, not of `identity_shortcut`" in error
    error = refused(capsys, "colored_digits", "--methods", "erm", "--set", "trainer.max_epochs=3", "--out", "out")
    assert ".yaml: trainer.max_epochs` was 2, and is 3" in error
    assert fingerprint(copied) == before


def test_a_corrupt_record(copied, capsys):
    path = copied / "runs" / "erm-seed1" / "result.json"
    path.write_text(path.read_text()[:100])
    before = fingerprint(copied)
    for words in (["compare", *GRID, "--out", "out"], ["report", "out"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert "erm-seed1/result.json" in error
        assert "Delete that file" in error
    assert fingerprint(copied) == before


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    error = refused(capsys, "colored_digits", "--methods", "erm", "--out", str(tmp_path / "file"))
    assert "Expected `out` to be a folder that can be written" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["colored_digit"], "got `colored_digit`; the nearest is `colored_digits`."),
        (
            ["colored_digits", "--seeds", "-1"],
            "Expected `seeds` to be one or more integers from 0 to 2**32 - 1, but got [-1].",
        ),
        (["colored_digits", "--set", "trainer.max_epochs"], "Expected `--set` to be KEY=VALUE"),
        (["colored_digits", "--set", "trainer.max_epochs=1", "trainer.max_epochs=2"], "each key once"),
        (["colored_digits", "--vary", "GroupDOR.step_size=1,2"], "has `GroupDOR`"),
        (
            ["colored_digits", "--set", "trainer.max_epoch=1"],
            "to be a configuration, but `trainer.max_epoch` is not a key",
        ),
        (
            ["colored_digits", "--methods", "group_dro", "--vary", "GroupDRO.stepsize=1,2"],
            "to set what `group_dro` has, but `stepsize` is not an argument of debias",
        ),
        (["colored_digits", "--methods", "erm", "--only", "erm-seed9"], "Its runs are erm-seed0, balanced-seed0"),
        (
            ["colored_digits", "--methods", "erm", "--jobs", "0"],
            "Expected `jobs` to be an integer >= 1 and <= 1000, but got 0.",
        ),
        (["digits_shift", "--methods", "erm", "--select", "leave_one_domain_out"], "`data.init_args.n_domains` to 2"),
        (["colored_digits", "--methods", "erm", "--print-wandb-sweep"], "Expected `--project` with"),
        (["colored_digits", "--project", "p", "--print-wandb"], "unrecognized arguments: --print-wandb"),
        (["colored_digits", "--select", "best"], "invalid choice: 'best'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_options(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert not list(tmp_path.glob("**/result.json"))


def test_a_missing_tensorboard_is_said_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("debias.cli.compare.find_spec", lambda name: None)
    assert "Run `pip install tensorboard`." in refused(capsys, "colored_digits", "--methods", "erm", "--tensorboard")
    assert not list(tmp_path.glob("**/log.txt"))


def test_ctrl_c_outside_of_the_runs_is_no_traceback(monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("debias.cli.compare.find_recipe", pressed)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "colored_digits"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


# Elsewhere


def test_as_many_domains_are_left_out_as_are_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "shapes_detection",
        "--methods",
        "erm",
        "--seeds",
        "0",
        "--select",
        "leave_one_domain_out",
        "--project",
        "p",
    ]
    main(["compare", *words, "--set", "data.init_args.n_domains=3", "--print-wandb-sweep"])
    assert yaml.safe_load(capsys.readouterr().out)["parameters"]["held_out"] == {"values": ["none", 0, 1, 2]}
    words += ["--set", "data.init_args.n_domains=3", "--trial", "method=erm", "seed=0", "held_out=1"]
    assert [run.id for run in trial_of(monkeypatch, *words)] == ["erm-without1-seed0"]


@pytest.mark.parametrize("alone", [[], ["--only", "erm-seed0"], ["--trial", "method=erm", "seed=0"]])
def test_an_agents_run_is_that_of_one_run_alone(tmp_path, monkeypatch, alone):
    """W&B takes the agent's id for every run that is started with it in the environment."""
    monkeypatch.chdir(tmp_path)
    names = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_SWEEP_PARAM_PATH": "p"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    seen = {}

    def run_all(*_, **__):
        seen.update({name: os.environ[name] for name in names if name in os.environ})
        raise Interrupted

    monkeypatch.setattr("debias.cli.compare.run_all", run_all)
    words = ["colored_digits", "--methods", "erm", "--seeds", "0", "--project", "p"]
    with pytest.raises(SystemExit):
        main(["compare", *words, *alone])
    assert seen == (names if alone else {})


@pytest.mark.parametrize("words", [["cluster=nowhere"], ["cluster=local", "timeout=3"], ["cluster=local", "name=7"]])
def test_what_submitit_refuses_is_one_message(tmp_path, monkeypatch, capsys, words):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "submitit.AutoExecutor.batch", lambda _: pytest.fail("accepted") if "name=7" not in words else 1
    )
    given = ["colored_digits", "--methods", "erm", "--seeds", "0", "--launcher", "submitit", "--launcher-args", *words]
    assert "Expected submitit to take the jobs with `--launcher-args`" in refused(capsys, *given)


def test_submitit_without_slurm_is_refused(tmp_path, monkeypatch, capsys):
    """It would start all runs here at once."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("submitit.AutoExecutor.submit", lambda *_: pytest.fail("started"))
    words = ["colored_digits", "--methods", "erm", "--seeds", "0", "--launcher", "submitit"]
    assert "Expected SLURM's `sbatch`" in refused(capsys, *words, "--launcher-args", "timeout_min=2")


def sweep_of(capsys, *words):
    main(["compare", *words, "--project", "p", "--print-wandb-sweep"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_sweep_draws_from_the_declared_ranges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["colored_digits", "--methods", "group_dro", "--seeds", "0", "4"]
    sweep = sweep_of(capsys, *words)
    parameters = sweep["parameters"]
    assert (sweep["method"], sweep["project"]) == ("random", "p")
    assert sweep["metric"] == {"name": "val_worst_group/val/worst_group_accuracy", "goal": "maximize"}
    assert parameters.pop("method") == {"values": ["erm", "balanced", "group_dro"]}
    assert parameters.pop("seed") == {"values": [0, 4]}
    drawn = {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}
    assert parameters.pop("GroupDRO.step_size") == drawn
    assert set(parameters) == {"model.init_args.optimizer.init_args.lr", "data.init_args.batch_size"}
    again = ["debias", "compare", *words, "--project", "p", "--trial"]
    assert sweep["command"] == ["${env}", *again, "${args_no_hyphens}"]
    assert "run_cap" not in sweep
    assert not list(tmp_path.iterdir())  # nothing was run or written


def test_draws_end_a_sweep_and_values_make_it_a_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["colored_digits", "--methods", "eiil", "spare", "--seeds", "0", "1"]
    sweep = sweep_of(capsys, *words, "--draws", "5")
    assert sweep["run_cap"] == 5 * 4 * 2
    # Both infer groups, and search another number of epochs for it.
    assert sweep["parameters"]["eiil:InferGroups.epochs"] == {"values": [1, 2, 5]}
    assert sweep["parameters"]["spare:InferGroups.epochs"] == {"values": [1, 2]}
    sweep = sweep_of(capsys, *words, "--vary", "GroupDRO.step_size=0.01,0.1")
    assert (sweep["method"], set(sweep["parameters"])) == ("grid", {"method", "seed", "GroupDRO.step_size"})


def trial_of(monkeypatch, *words):
    """What the run of a trial is, without making it."""
    seen = []

    def prepare(recipe, runs, out):
        seen.extend(runs)
        raise SystemExit

    monkeypatch.setattr("debias.cli.compare.prepare", prepare)
    with pytest.raises(SystemExit):
        main(["compare", *words])
    return seen


def test_an_agent_makes_the_run_that_it_has_drawn(tmp_path, monkeypatch, capsys):
    """Its words are those that W&B makes of the sweep's command."""
    pytest.importorskip("wandb")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    monkeypatch.chdir(tmp_path)
    words = ["waterbirds", "--methods", "group_dro", "--seeds", "0", "1"]
    sweep = sweep_of(capsys, *words)
    drawn = {"method": "group_dro", "seed": 1, "GroupDRO.step_size": 0.0123, "data.init_args.balance": None}
    drawn |= {"GroupDRO.adjustment": 2.0, "model.init_args.optimizer.init_args.lr": 1e-05}
    assert set(drawn) <= set(sweep["parameters"])
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in drawn.items()}})
    (run,) = trial_of(monkeypatch, *words, "--trial", *args["args_no_hyphens"])
    assert (run.method, run.seed) == ("group_dro", 1)
    assert run.params == {key: value for key, value in drawn.items() if key not in ("method", "seed")}
    args["args_no_hyphens"][0] = "method=erm"  # which has neither the callback nor the balance in its ranges
    (run,) = trial_of(monkeypatch, *words, "--trial", *args["args_no_hyphens"])
    assert run.params == {"model.init_args.optimizer.init_args.lr": 1e-05}


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (["method=vrex"], "Expected `trial` to set `method` to one of"),
        (["seed=7"], "Expected `trial` to set `seed` to one of"),
        (["GroupDRO.step_sise=0.1"], "got `GroupDRO.step_sise`; the nearest is `GroupDRO.step_size`"),
    ],
)
def test_a_trial_of_another_sweep_is_refused(tmp_path, monkeypatch, capsys, trial, message):
    monkeypatch.chdir(tmp_path)
    words = ["colored_digits", "--methods", "group_dro", "--seeds", "0", "--trial", *trial]
    assert message in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_one_run_of_the_grid(tmp_path):
    words = ["colored_digits", "--methods", "group_dro", *EPOCHS, "--out", "out", "--only", "group_dro-seed2"]
    process = start(*words, cwd=tmp_path, kind=subprocess.Popen)  # as a user's shell starts it, and it its run
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert [path.parent.name for path in tmp_path.glob("out/runs/*/result.json")] == ["group_dro-seed2"]
    assert not (tmp_path / "out" / "table.csv").exists()


# submitit starts local jobs and leaves them alone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_submitit_gets_every_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(
        "debias.cli.compare._command",
        lambda folder, *_: [sys.executable, "-c", f"open({str(folder / 'called')!r}, 'w').close()"],
    )
    words = ["colored_digits", "--methods", "erm", "--seeds", "0", "--out", "out"]
    main(["compare", *words, "--launcher", "submitit", "--launcher-args", "cluster=local", "timeout_min=2"])
    assert "2 jobs were submitted" in capsys.readouterr().out
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("out/runs/*/called"))) < 2 and time.monotonic() < limit:
        time.sleep(0.2)
    assert {path.parent.name for path in tmp_path.glob("out/runs/*/called")} == {"erm-seed0", "balanced-seed0"}


def test_the_recipe_of_the_documentation_runs(tmp_path):
    page = (ROOT / "docs" / "compare.md").read_text()
    for language, name in (("python", "birds.py"), ("yaml", "my_recipe/base.yaml")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(page.split(f"```{language}\n")[1].split("```")[0])
    words = ["./my_recipe", "--methods", "group_dro", "vrex", "--seeds", "0", "--out", "out", "--only"]
    both = [start(*words, name, cwd=tmp_path) for name in ("erm-seed0", "vrex-seed0")]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    worst = json.loads((tmp_path / "out/runs/erm-seed0/result.json").read_text())["candidates"]["last"]["test"]
    assert worst["test/worst_group_accuracy"] < worst["test/accuracy"] - 0.1  # the loud feature misleads


def test_every_method_takes_part_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["compare", "colored_digits", "--seeds", "0", "--project", "p", "--print-wandb-sweep"])
    said = capsys.readouterr()
    names = set(yaml.safe_load(said.out)["parameters"]["method"]["values"])
    shared = {file.stem for file in (recipes_folder() / "methods").glob("*.yaml")}
    assert names == shared - {"identity_adversarial"}
    assert "Left out identity_adversarial: its base does not set `data.init_args.n_identities`" in said.err
