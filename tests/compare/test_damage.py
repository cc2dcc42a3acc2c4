"""Files that were damaged, places that cannot be written: one message that says what to do, and never another table."""

import errno
import json
import os
import random
import shutil

import pytest
import torch
import yaml

from _support.recipes import one
from _support.records import log_weights, made_up, save
from debias.cli import main, one_run
from debias.cli.recipes import recipes_folder
from debias.compare.figures import read_weights
from debias.compare.keeping import Keeper, check_checkpoint
from debias.compare.records import RunRecord, find_records, read_record, read_spec, write_json
from debias.compare.table import make_comparison, runs_rows, table_rows, write_rows
from debias.errors import DebiasError

pytestmark = pytest.mark.usefixtures("coarse_figures")

DAMAGES = 500
VALUES = (
    None, True, False, -1, 0, 1, 2**70, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", [], [1], {}, {"a": 1},
)  # fmt: skip


def places(content, path=()):
    """Every place in nested JSON."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def damage(text: str, draw: random.Random) -> str:
    """One field is deleted, added or replaced, or some characters are."""
    kind = draw.choice(("delete", "replace", "replace", "add", "cut", "flip", "insert"))
    i = draw.randrange(len(text))
    if kind == "cut":
        return text[:i]
    if kind == "flip":
        return text[:i] + chr(draw.randrange(32, 127)) + text[i + 1 :]
    if kind == "insert":
        return text[:i] + draw.choice(("{", "}", ",", '"', "9", "\0", "é", "-", "[" * 5000)) + text[i:]
    content = json.loads(text)
    *path, last = draw.choice(list(places(content)))
    part = content
    for key in path:
        part = part[key]
    if kind == "delete":
        del part[last]
    elif kind == "add" and isinstance(part, dict):
        part["something"] = draw.choice(VALUES)
    else:
        part[last] = draw.choice(VALUES)
    return json.dumps(content)


def spec_of(run: RunRecord) -> dict:
    keys = ("id", "recipe", "recipe_hash", "method", "seed", "params", "held_out")
    return {key: getattr(run, key) for key in keys} | {"configs": []}


def test_no_damage_of_a_record_ends_in_a_traceback_or_in_another_table(tmp_path):
    runs = made_up(("erm", "irm"), seeds=(0, 1))
    out = save(runs, tmp_path / "out")
    for run in runs:
        write_json(out / run.id / "spec.json", spec_of(run))

    def table():
        comparison = make_comparison(find_records([out]), "val_worst_group")
        return write_rows(table_rows(comparison)) + write_rows(runs_rows(comparison))

    whole, refused, draw = table(), 0, random.Random(0)
    files = [out / run.id / name for run in runs for name in ("result.json", "result.json", "spec.json")]
    for _ in range(DAMAGES):
        path = draw.choice(files)
        text = path.read_text(encoding="utf-8")
        path.write_text(damage(text, draw), encoding="utf-8")
        try:
            assert table() == whole
        except DebiasError as error:
            told = str(error)
            refused += str(path.parent) in told
        path.write_text(text, encoding="utf-8")
    assert refused > 0.8 * DAMAGES
    shutil.copy(out / runs[0].id / "result.json", out / runs[1].id)
    with pytest.raises(DebiasError, match=r"to be the result of the run that .* describes, but its `id` is"):
        table()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", True, r"`seed` is to be an integer >= 0, but is True"),
        ("seed", 2**70, r"`seed` is to be an integer"),
        ("status", "done", r"`status` is to be `finished` or `failed`"),
        ("seconds", -1, r"`seconds` is to be a number >= 0, or NaN"),
        ("started", "yesterday", r"`started` is to be a time"),
        ("something", 1, r"`something` is not known"),
        ("accuracy", -1.0, r"`candidates.last.test` is to be numbers by name, shares from 0 to 1"),
        ("accuracy", True, r"`candidates.last.test`"),
        ("checkpoint", "../x.ckpt", r"`candidates.last.checkpoint` is to be a file in `checkpoints/`"),
    ],
)
def test_a_record_is_checked_field_by_field_also_without_a_checksum(tmp_path, key, value, message):
    (run,) = made_up(("erm",), seeds=(0,))
    path = save([run], tmp_path) / run.id / "result.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    if key == "accuracy":
        content["candidates"]["last"]["test"]["test/accuracy"] = value
    elif key == "checkpoint":
        content["candidates"]["last"][key] = value
    else:
        content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DebiasError, match=message):
        read_record(path)


# Checkpoints and logs


def test_a_truncated_or_changed_checkpoint_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.arange(1000.0)}}, path)
    check_checkpoint(path, "")
    whole, draw = path.read_bytes(), random.Random(0)
    middle = whole.index(torch.arange(1000.0).numpy().tobytes())
    broken = [whole[: draw.randrange(len(whole) - 1)] for _ in range(20)]
    broken += [whole[:middle] + b"\x01" + whole[middle + 1 :], b""]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(DebiasError, match=r"Expected .*last\.ckpt to be a checkpoint .* Delete it\."):
            check_checkpoint(path, "Delete it.")


def test_one_bad_log_does_not_end_a_report(tmp_path):
    runs = made_up(("erm",), seeds=(0,))
    out = save(runs, tmp_path)
    log_weights(out, runs[0])
    good = read_weights(out / runs[0].id)
    for i, content in enumerate(
        (b"step,train/group_weight/a\nx,y\n", b"\xff\xfe", b"step,train/group_weight/a\ninf,1\n")
    ):
        bad = out / runs[0].id / f"bad{i}" / "metrics.csv"
        bad.parent.mkdir()
        bad.write_bytes(content)
    with pytest.warns(UserWarning, match=r"bad\d.metrics\.csv cannot be read .* the figure of weights leaves it out"):
        assert read_weights(out / runs[0].id) == good


# Full disks and places that cannot be written


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_message_and_leaves_no_draft(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(DebiasError, match=r"a place that can be written.*No space left.*same command again"):
            write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []

    class Trainer:
        global_step, is_global_zero = 3, True

        def save_checkpoint(self, path, weights_only):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"half")
            full()

    with pytest.raises(DebiasError, match=r"last\.ckpt to be a place that can be written.*No space left"):
        Keeper(tmp_path)._save(Trainer(), Keeper(tmp_path).last)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_whose_disk_is_full_is_a_failure_and_goes_on_later(tmp_path, monkeypatch):
    folder = one(tmp_path, "erm")
    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "_save", full)
        assert one_run.main(folder) == 1
    assert "No space left" in read_record(folder / "result.json").error
    assert {p.name for p in folder.iterdir()} <= {
        ".lock",
        "spec.json",
        "result.json",
        "config.yaml",
        "csv",
        "progress.json",
    }
    assert one_run.main(folder) == 0
    assert read_record(folder / "result.json").finished


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("recipes copy colored_digits {file}", "a place that can be written"),
        ("recipes copy colored_digits /proc/nowhere", "a place that can be written"),
        ("demo --out {file}/x", "a place that can be written"),
        ("gallery --out {file}/x.png", "a place that can be written"),
        ("shift-selection --out {file}/x", "a place that can be written"),
        ("compare colored_digits --methods erm --out {file}/x", "a folder that can be written"),
        ("report {out} --out {file}/x", "that failed"),
        ("compare colored_digits --methods erm --set a=[1", "`--set` to have YAML values, but got `a=[1`"),
        ("compare colored_digits --methods erm --set a={{", "`--set` to have YAML values"),
        ("compare colored_digits --methods erm --vary a=]", "`--vary` to have YAML values"),
        ("compare colored_digits --methods erm --seeds 99999999999999999999", "integers from 0 to 2**32 - 1"),
        ("compare colored_digits --methods erm --draw-seed -1 --draws 2", "`draw_seed` to be"),
        ("compare colored_digits --methods erm --draws 999999999", "`draws` to be"),
        ("compare colored_digits --methods erm --jobs 0", "`jobs` to be"),
        ("compare {out}/empty --methods erm", "to name a model, `model: {class_path: ...}`, but it has none"),
        ("compare {out}/wide --methods erm --draws 2", "to be two integers"),
        ("fit --config {fit} --trainer.logger false --ckpt_path {file}", "to be a checkpoint of tensors"),
        (
            "fit --config {fit} --trainer.logger false --ckpt_path {out}/none.ckpt",
            "to name a checkpoint, but there is none",
        ),
    ],
)
def test_a_command_line_that_cannot_be_is_one_message_before_anything_runs(tmp_path, capsys, words, message):
    out = save(made_up(("erm",), seeds=(0,)), tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    fit, base = tmp_path / "fit.yaml", (recipes_folder() / "colored_digits" / "base.yaml").read_text()
    fit.write_text(base)
    wide = yaml.safe_load(base) | {"search": {"a.b": {"integers": [0, 10**30]}}}
    for name, text in (("empty", ""), ("wide", yaml.safe_dump(wide))):
        (out / name).mkdir()
        (out / name / "base.yaml").write_text(text)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main([word.format(file=tmp_path / "file", out=out, fit=fit) for word in words.split()])
    assert stop.value.code in (1, 2)
    printed = capsys.readouterr().err
    assert message in printed.replace("\n", " ")
    assert "Traceback" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}.keys() - before.keys() == set()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_spec_that_cannot_be_read_names_the_folder(tmp_path):
    (tmp_path / "spec.json").write_text("[" * 100_000)
    with pytest.raises(DebiasError, match="to say what the run does, but it cannot be read"):
        read_spec(tmp_path)
