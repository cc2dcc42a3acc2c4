"""One run of a comparison: what it leaves behind, and that a killed one goes on as if nothing had been."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from _support.recipes import digits, one
from debias import tag
from debias.cli import one_run
from debias.compare import keeping
from debias.compare.grid import RunSpec, prepare
from debias.compare.held_out import hold_out
from debias.compare.records import measures, read_record
from debias.data import ColoredDigits
from debias.errors import DataError, DebiasError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = one(tmp_path_factory.mktemp("one"), "group_dro")
    assert one_run.main(folder) == 0
    return folder


def accuracy(path: Path) -> tuple[float, np.ndarray]:
    """Overall and by group, from the saved rows alone."""
    with np.load(path) as saved:
        hits = saved["logits_0"].argmax(1) == saved["target_0"]
        groups = saved["group_0"]
    return hits.mean(), np.array([hits[groups == g].mean() for g in range(4)])


def test_the_record_equals_a_computation_from_the_saved_predictions(finished):
    record = read_record(finished / "result.json")
    assert record.status == "finished"
    assert set(record.candidates) == {"val_average", "val_worst_group", "last"}
    for candidate in record.candidates.values():
        average, by_group = accuracy(finished / "predictions" / f"step{candidate.step}.npz")
        found = measures(candidate.test, "test")
        assert found.average == pytest.approx(average, abs=1e-6)
        assert list(found.by_group.values()) == pytest.approx(by_group.tolist(), abs=1e-6)
        assert found.worst == pytest.approx(by_group.min(), abs=1e-6)
        assert (finished / candidate.checkpoint).exists()


def test_candidates_are_the_best_epochs_by_their_rule(finished):
    record = read_record(finished / "result.json")
    import csv

    with next(finished.glob("csv/*/metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/accuracy")]
    assert len(rows) == 2
    for rule, column in (("val_average", "val/accuracy"), ("val_worst_group", "val/worst_group_accuracy")):
        values = [float(row[column]) for row in rows]
        assert record.candidates[rule].epoch == 1 + int(np.argmax(values))
        assert record.candidates[rule].val[column] == pytest.approx(max(values), abs=1e-6)
    assert record.candidates["last"].epoch == 2
    assert record.candidates["last"].step == record.steps == 24


def test_what_it_ran_on_is_written_down(finished):
    record = read_record(finished / "result.json")
    assert record.versions["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "debias", "lightning"} <= set(record.versions)
    assert record.device == ("cpu" if not torch.cuda.is_available() else record.device)
    assert 0 < record.seconds_per_step < record.seconds
    assert record.peak_memory > 1e6
    config = (finished / "config.yaml").read_text()
    assert "debias.GroupDRO" in config
    assert "${" not in config
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.getcwd(), capture_output=True, text=True)
        assert record.git.get("revision", "") == head.stdout.strip()


def test_a_finished_run_is_not_made_again(finished, monkeypatch):
    monkeypatch.setattr(one_run, "make_run", lambda *_: pytest.fail("made again"))
    before = (finished / "result.json").read_bytes()
    assert one_run.main(finished) == 0
    assert (finished / "result.json").read_bytes() == before


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    from filelock import FileLock

    folder = one(tmp_path, "erm")
    with FileLock(folder / ".lock"):
        assert one_run.main(folder) == 75
    assert not (folder / "result.json").exists()


def test_a_failure_is_recorded_with_its_error(tmp_path, capsys):
    folder = one(tmp_path, "mixstyle")  # an MLP has no layers to change
    assert one_run.main(folder) == 1
    record = read_record(folder / "result.json")
    assert record.status == "failed"
    assert record.error.startswith("DebiasError: Expected `layers` to be given")
    assert "Traceback" in capsys.readouterr().err


# Going on


class Killed(KeyboardInterrupt):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", ["erm", "group_dro", "domain_penalisation", "group_mixup"])
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, monkeypatch, method):
    make = keeping.Keeper.__init__
    monkeypatch.setattr(keeping.Keeper, "__init__", lambda self, folder, direction: make(self, folder, direction, 0.0))
    whole, broken = (one(tmp_path / name, method, epochs=3) for name in ("whole", "broken"))
    assert one_run.main(whole) == 0

    def kill(self, trainer, *_):
        if trainer.global_step == 30:  # in the third epoch
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(keeping.Keeper, "on_train_batch_end", kill)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            one_run.main(broken)
    assert not (broken / "result.json").exists()  # no failure
    assert torch.load(broken / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 24
    torch.rand(7)  # another state of the generators than where it stopped
    assert one_run.main(broken) == 0
    a, b = (read_record(folder / "result.json") for folder in (whole, broken))
    assert a.candidates == b.candidates
    for path in sorted(whole.glob("predictions/*.npz")):
        with np.load(path) as x, np.load(broken / "predictions" / path.name) as y:
            assert all((x[name] == y[name]).all() for name in x.files)
    assert len(list(broken.glob("csv/*/metrics.csv"))) == 2  # what was logged before is still there


def test_sigterm_leaves_no_failure_behind(tmp_path):
    folder = one(tmp_path, "erm", epochs=2000)
    words = [sys.executable, "-m", "debias.cli.one_run", str(folder)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (folder / "progress.json").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert not (folder / "result.json").exists()


# Leaving a domain out


def test_a_held_out_domain_is_validated_on_and_never_trained_on(tmp_path):
    folder = one(tmp_path, "erm", held_out=1)
    assert one_run.main(folder) == 0
    record = read_record(folder / "result.json")
    assert record.held_out == 1
    assert all(candidate.test == {} for candidate in record.candidates.values())
    assert not (folder / "predictions").exists()
    data = ColoredDigits(seed=0)
    data.setup()
    size = int((data.val_set.tags["domain"] == 1).sum())
    value = measures(record.candidates["last"].val, "val").average * size
    assert value == pytest.approx(round(value), abs=1e-3)  # a share of that domain's samples


def test_hold_out_splits_by_the_tag():
    data, whole = ColoredDigits(seed=0, balance="group"), ColoredDigits(seed=0)
    whole.setup()
    hold_out(data, 0)
    data.setup("fit")
    assert set(data.train_set.tags["domain"].tolist()) == {1}
    assert set(data.val_set.tags["domain"].tolist()) == {0}
    kept = whole.train_set.tags["domain"] == 1
    assert data.group_counts.tolist() == torch.bincount(whole.train_set.tags["group"][kept], minlength=4).tolist()
    x, y = data.train_set[3].sample
    row = int(kept.nonzero()[3])
    assert torch.equal(x, whole.train_set[row].sample[0])
    assert torch.equal(y, whole.train_set[row].sample[1])
    assert sum(len(batch.batch[1]) if hasattr(batch, "batch") else 1 for batch in data.train_dataloader())


def test_hold_out_needs_a_tag():
    class Plain:
        train_set = val_set = ()

        def setup(self, stage=None):
            pass

    plain = Plain()
    hold_out(plain, 0)
    with pytest.raises(DataError, match=r"`Plain.train_set` to be a dataset with the tag `domain`"):
        plain.setup("fit")
    plain.train_set = plain.val_set = tag([(torch.zeros(2), 0)] * 3, domain=[0, 0, 0])
    with pytest.raises(DataError, match=r"`train_set` to have samples beside domain 0"):
        plain.setup("fit")


# The parts


def test_the_clock_leaves_validation_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(keeping.time, "perf_counter", lambda: now[0])
    clock = keeping.StepClock()

    class Trainer:
        global_step = 0

        class strategy:
            root_device = torch.device("cpu")

    for epoch in range(3):
        clock.on_train_epoch_start(Trainer, None)
        now[0] += 10 if epoch == 0 else 2
        Trainer.global_step += 4
        clock.on_validation_start(Trainer, None)
        now[0] += 100
        clock.on_validation_end(Trainer, None)
        clock.on_train_epoch_end(Trainer, None)
    assert clock.seconds_per_step == pytest.approx(0.5)  # the first epoch is left out
    again = keeping.StepClock()
    assert math.isnan(again.seconds_per_step)
    again.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert again.seconds_per_step == clock.seconds_per_step


def test_shift_score_prefers_families_that_were_not_trained_on():
    assert keeping.shift_score({"val_shift/mean": 0.5, "val_shift/held_out_mean": 0.4}) == 0.4
    assert keeping.shift_score({"val_shift/mean": 0.5}) == 0.5
    assert math.isnan(keeping.shift_score({}))


def test_a_spec_that_cannot_be_parsed_is_a_failure(tmp_path):
    (folder,) = prepare(digits(**{"trainer.max_epoch": 3}), [RunSpec("erm-seed0", "erm", 0)], tmp_path)
    assert one_run.main(folder) == 1
    assert read_record(folder / "result.json").error == "It ended with status 2; log.txt says why."
    with pytest.raises(DebiasError, match=r"spec\.json"):
        one_run.main(tmp_path)
