"""One run of a comparison: what it leaves behind, and that a killed one goes on as if nothing had been."""

import functools
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from _support.fits import Classifier, make_trainer, parameters, problem, same, val_loader
from _support.forked import Forked, run
from _support.recipes import digits, one
from _support.runs import ddp
from debias import DetectionMonitor, GroupMonitor, tag
from debias.cli import one_run
from debias.compare import keeping, meter
from debias.compare.grid import RunSpec, prepare, spec_hash
from debias.compare.held_out import hold_out
from debias.compare.predictions import Predictions
from debias.compare.records import Measures, measures, read_record, read_spec, shift_score
from debias.compare.selection import select
from debias.data import ColoredDigits
from debias.data._common import GroupDataModule
from debias.errors import DataError, DebiasError
from debias.models.classifier import Classifier as RecipeModule

ROOT = Path(__file__).parents[2]
BIG = 2**30


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


# What a run measures


def early_and_late(monkeypatch):
    """The best average is that of the last epoch, the best worst group that of the first, which is tested last."""
    count = itertools.count(1.0)

    def made_up(*_):
        value = next(count)
        return Measures("accuracy", value, -value, {})

    monkeypatch.setattr(keeping, "measures", made_up)


def test_times_are_those_of_training_whatever_is_tested_last(tmp_path, monkeypatch):
    early_and_late(monkeypatch)
    steps, original, length = [], RecipeModule.training_step, 0.02

    def slow(self, batch, batch_idx):
        begin = time.perf_counter()
        time.sleep(length)
        loss = original(self, batch, batch_idx)
        steps.append((self.trainer.current_epoch, begin, time.perf_counter()))
        return loss

    monkeypatch.setattr(RecipeModule, "training_step", slow)
    folder = one(tmp_path, "erm", epochs=3)
    begin = time.monotonic()
    assert one_run.main(folder, start=begin - 50) == 0
    took = time.monotonic() - begin
    record = read_record(folder / "result.json")
    assert [c.epoch for c in record.candidates.values()] == [3, 1, 3]
    spans = [[(a, b) for epoch, a, b in steps if epoch == e] for e in (1, 2)]  # the first epoch is left out
    outside = sum(span[-1][1] - span[0][0] for span in spans) / sum(map(len, spans))
    assert record.seconds_per_step >= length
    assert record.seconds_per_step == pytest.approx(outside, rel=0.25)
    assert record.seconds == pytest.approx(50 + took, abs=1)  # from the start of the process


def test_memory_is_that_of_training(tmp_path, monkeypatch):
    early_and_late(monkeypatch)
    peaks = iter((3, 5, 5, 99))
    monkeypatch.setattr(meter, "peak_memory", lambda _: next(peaks))
    folder = one(tmp_path, "erm", epochs=3)
    assert one_run.main(folder) == 0
    assert read_record(folder / "result.json").peak_memory == 5


@pytest.mark.parametrize("method", ["dann", "coral", "vrex"])
def test_a_run_keeps_its_warnings(tmp_path, monkeypatch, method):
    def head_alone(self):
        return torch.optim.SGD(self.network[-1].parameters(), lr=0.01)

    monkeypatch.setattr(RecipeModule, "configure_optimizers", head_alone)
    folder = one(tmp_path, method, epochs=1)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("ignore")  # as the environment may say
        assert one_run.main(folder) == 0
    told = read_record(folder / "result.json").warnings
    assert [text.partition(" ")[2].partition(":")[0] for text in told] == (
        ["reaches no trainable parameter"] if method != "vrex" else []
    )
    assert [" ".join(str(w.message).split()) for w in shown] == told  # the log has them, too


def test_warnings_go_on_with_a_run_that_was_killed(tmp_path, monkeypatch):
    def head_alone(self):
        return torch.optim.SGD(self.network[-1].parameters(), lr=0.01)

    def kill(*_):
        raise Killed

    monkeypatch.setattr(RecipeModule, "configure_optimizers", head_alone)
    folder = one(tmp_path, "coral", epochs=1)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        with monkeypatch.context() as patched:
            patched.setattr(one_run, "_test", kill)
            with pytest.raises(KeyboardInterrupt):
                one_run.main(folder)
        assert one_run.main(folder) == 0  # with no step left
    assert len(read_record(folder / "result.json").warnings) == 1


def test_the_log_has_a_line_for_each_epoch(tmp_path, capfd):
    folder = one(tmp_path, "erm")
    assert one_run.main(folder) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Epoch ")]
    val = read_record(folder / "result.json").candidates["last"].val
    assert len(lines) == 2
    assert lines[0].startswith("Epoch 1/2: step 12, train/loss ")
    assert f"val/accuracy {val['val/accuracy']:.4g}, worst group {val['val/worst_group_accuracy']:.4g}" in lines[1]
    assert lines[1].endswith(" s")


def test_the_start_of_the_process_counts():
    code = "import time; time.sleep(1)\nfrom debias.cli.one_run import _age\nprint(_age())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    done = run([sys.executable, "-c", code], env=environment, timeout=60)
    if Path("/proc/self/stat").exists():
        assert 1 <= float(done.stdout) <= time.monotonic() - begin + 0.02


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


@pytest.fixture
def every_epoch(monkeypatch):
    """The last checkpoint is written at the end of each epoch."""
    make = keeping.Keeper.__init__
    monkeypatch.setattr(keeping.Keeper, "__init__", lambda self, folder, direction: make(self, folder, direction, 0.0))


def test_what_the_last_checkpoint_names_as_best_is_there_whatever_came_after_it(tmp_path, monkeypatch, every_epoch):
    folder = one(tmp_path, "erm", epochs=3)
    better = itertools.count(0.0)  # each epoch is the best so far
    monkeypatch.setattr(keeping, "measures", lambda *_: Measures("accuracy", next(better), next(better), {}))
    end = keeping.Keeper.on_train_epoch_end

    def kill(self, trainer, *args):
        if trainer.global_step == 36:  # the third epoch is validated, and not written yet
            raise Killed
        end(self, trainer, *args)

    monkeypatch.setattr(keeping.Keeper, "on_train_epoch_end", kill)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        one_run.main(folder)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["callbacks"]["Keeper"]
    best = json.loads(state["best"])
    assert {entry["step"] for entry in best.values()} == {24}
    for entry in best.values():
        assert torch.load(folder / entry["checkpoint"], weights_only=False)["global_step"] == entry["step"]
    monkeypatch.setattr(keeping.Keeper, "on_train_epoch_end", end)
    assert one_run.main(folder) == 0
    named = {candidate.checkpoint for candidate in read_record(folder / "result.json").candidates.values()}
    assert named == {path.relative_to(folder).as_posix() for path in folder.glob("checkpoints/*")}  # and nothing else


STOPS = "trainer: {callbacks+: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {%s}}]}\n"


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_that_was_killed_in_its_test_trains_no_further(tmp_path, monkeypatch, every_epoch, stops):
    recipe = digits(3)
    if stops:  # after the first validation
        (tmp_path / "extra.yaml").write_text(STOPS % "monitor: val/accuracy, mode: max, stopping_threshold: 0.0")
        recipe = replace(recipe, extra=(tmp_path / "extra.yaml",))
    (folder,) = prepare(recipe, [RunSpec("erm-seed0", "erm", 0)], tmp_path / "out")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(one_run, "_test", kill)
        with pytest.raises(KeyboardInterrupt):
            one_run.main(folder)
    assert one_run.main(folder) == 0
    record = read_record(folder / "result.json")
    assert (record.candidates["last"].epoch, record.steps) == ((1, 12) if stops else (3, 36))
    assert record.candidates["last"].val


class Dropping(Classifier):
    """Drops units, and notes what the generators of this rank draw."""

    def __init__(self):
        super().__init__()
        self.backbone.append(torch.nn.Dropout(0.5))
        self.drawn = []

    def training_step(self, batch, batch_idx):
        self.drawn.append([random.random(), float(np.random.rand()), float(torch.rand(()))])
        return super().training_step(batch, batch_idx)


class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:  # in the second epoch
            raise Killed


def seed_by(rank):
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)


class Seeds(Callback):
    """Another seed for each rank, after Lightning has given all the same."""

    def __init__(self, seed):
        self.seed = seed

    def setup(self, trainer, pl_module, stage):
        seed_by(self.seed + trainer.global_rank)


def _drop(rank, folder, seed, *, world=2, kill=False, ckpt_path=None):
    """Three epochs in batches whose order the generators draw, too; what they drew, and how it ended."""
    folder.mkdir(exist_ok=True)
    model, keeper = Dropping(), keeping.Keeper(folder, every=0.0)
    options = {"devices": world, "strategy": ddp()} if world > 1 else {}
    trainer = make_trainer([Seeds(seed), *[Kill()] * kill, keeper], max_epochs=3, enable_checkpointing=True, **options)
    batches = DataLoader(problem(39), 16 // world, shuffle=True)
    try:
        trainer.fit(model, batches, val_loader(bare=True), ckpt_path=ckpt_path, weights_only=False)
    except (KeyboardInterrupt, SystemExit):
        assert kill
    return model.drawn, {"parameters": parameters(model), "optimizer": trainer.optimizers[0].state_dict()["state"]}


@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_of_a_run_that_was_killed_goes_on_with_its_own_generators(tmp_path, world, request):
    def run(*args, **options):
        function = functools.partial(_drop, world=world, **options)
        return [function(0, *args)] if world == 1 else request.getfixturevalue("ranks").run(function, *args)

    whole = run(tmp_path / "whole", 0)
    assert world == 1 or all(a != b for a, b in zip(whole[0][0], whole[1][0], strict=True))
    run(tmp_path / "broken", 0, kill=True)
    last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] == 3
    for (drawn, end), (all_drawn, all_end) in zip(run(tmp_path / "on", 10, ckpt_path=last), whole, strict=True):
        assert drawn == all_drawn[3:]
        assert same(end, all_end)
    if world == 2:  # on fewer ranks each has its own, too
        drawn, _ = _drop(0, tmp_path / "alone", 20, world=1, ckpt_path=last)
        assert drawn[0][:2] == whole[0][0][3][:2]  # torch's draws the order of one process's batches before


def test_ranks_beyond_those_that_saved_begin_streams_of_their_own():
    def drawn():
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    states, expected = [], []
    for rank in range(2):
        seed_by(rank)
        states.append(keeping._generators())
        expected.append(drawn())
    found = []
    for rank in [*range(6), *range(6)]:
        keeping._restore_generators(states, rank)
        found.append(drawn())
    assert found[:2] == expected
    assert found[:6] == found[6:]  # whatever state they were in
    assert all(len(set(values)) == 6 for values in zip(*found[:6], strict=True))


def test_sigterm_leaves_no_failure_behind(tmp_path):
    folder = one(tmp_path, "erm", epochs=2000)
    words = [sys.executable, "-m", "debias.cli.one_run", str(folder), spec_hash(read_spec(folder))]
    process = Forked(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (folder / "progress.json").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.1)
    assert process.poll() is None  # it is in its training
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert not (folder / "result.json").exists()


# Validations that do not end with training


@pytest.mark.parametrize("killed", [False, True])
def test_metrics_of_the_last_checkpoint_are_its_own(tmp_path, monkeypatch, killed):
    each, second = (
        prepare(digits(3, **more), [RunSpec("erm-seed0", "erm", 0)], tmp_path / name)[0]
        for name, more in (("each", {}), ("second", {"trainer.check_val_every_n_epoch": 2}))
    )

    def kill(*_):
        raise Killed

    if killed:  # after training
        with monkeypatch.context() as patched:
            patched.setattr(one_run, "_test", kill)
            with pytest.raises(KeyboardInterrupt):
                one_run.main(second)
    assert one_run.main(each) == one_run.main(second) == 0
    found, expected = (read_record(folder / "result.json").candidates for folder in (second, each))
    assert found["last"] == expected["last"]
    assert found["val_average"].epoch == 2
    assert found["val_average"].val != found["last"].val


def test_a_network_that_changes_at_the_end_is_the_last_by_every_rule(tmp_path):
    folder = one(tmp_path, "afr")
    assert one_run.main(folder) == 0
    record = read_record(folder / "result.json")
    kept = record.candidates
    assert set(kept) == {"val_average", "val_worst_group", "last"}
    assert all(candidate == kept["last"] for candidate in kept.values())
    assert kept["last"].checkpoint == "checkpoints/last.ckpt"
    # Of the network with its new head, in validation too.
    assert select([record], "val_worst_group")[0].score == kept["last"].val["val/worst_group_accuracy"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_without_a_validation_the_last_checkpoint_has_no_metrics_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(GroupDataModule, "val_dataloader", LightningDataModule.val_dataloader)
    folder = one(tmp_path, "erm", epochs=1)
    assert one_run.main(folder) == 0
    assert read_record(folder / "result.json").candidates["last"].val == {}


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


class Crossed(GroupDataModule):
    """Groups that are domains: one of them goes with its domain, and one was never there."""

    def __init__(self):
        super().__init__(batch_size=4, seed=0, balance="group", num_workers=0)

    def setup(self, stage=None):
        domain = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
        self.train_set = self.val_set = tag([(torch.zeros(1), 0)] * 8, domain=domain, group=domain)
        self._describe_groups(["a", "b", "c", *(["d"] if stage == "fit" and self.lacking else [])])


@pytest.mark.parametrize("lacking", [False, True])
def test_balanced_batches_without_the_groups_of_the_domain_alone(lacking):
    data = Crossed()
    data.lacking = lacking
    hold_out(data, 1)
    data.setup("fit")
    if lacking:
        with pytest.raises(DataError, match=r"but got none of d\. Add"):
            data.train_dataloader()
        return
    drawn = [int(data.train_set.tags["group"][i]) for i in data.train_dataloader().sampler]
    assert sorted(drawn) == [0] * (len(drawn) // 2) + [2] * (len(drawn) // 2)


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


def test_the_meter_leaves_validation_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    clock = meter.Meter()

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
        now[0] += 50  # checkpoints are written
        if epoch == 1:  # validated in the midst of it
            clock.on_train_batch_start(Trainer, None, None, 0)
        clock.on_train_epoch_end(Trainer, None)
    assert clock.seconds_per_step == pytest.approx(0.5)  # the first epoch is left out
    again = meter.Meter()
    assert math.isnan(again.seconds_per_step)
    again.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert again.seconds_per_step == clock.seconds_per_step
    again.on_train_epoch_start(Trainer, None)  # the first epoch of a process that goes on is left out, too
    now[0] += 10
    Trainer.global_step += 4
    again.on_train_epoch_end(Trainer, None)
    assert again.seconds_per_step == clock.seconds_per_step


def test_seconds_go_on_with_a_run_that_was_killed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    first = meter.Meter(start=90.0)
    now[0] = 120.0
    state = first.state_dict()
    again = meter.Meter(start=500.0)
    again.load_state_dict(state)
    assert again.seconds_before == 30.0
    now[0] = 510.0
    assert again.state_dict()["seconds"] == 40.0


def test_the_direction_is_that_of_the_monitored_metric():
    def monitor(metric=None):
        return GroupMonitor("group", 4, metric=metric)

    lowest, highest = (
        ModelCheckpoint(monitor=name, mode=mode) for name, mode in (("val/loss", "min"), ("val/x", "max"))
    )
    detection = DetectionMonitor("domain", 2)
    assert one_run._direction([monitor(), lowest], [lowest]) == "max"
    assert one_run._direction([detection, lowest], [lowest]) == "max"
    assert one_run._direction([monitor(torchmetrics.MeanAbsoluteError()), highest], [highest]) == "min"
    errors = torchmetrics.MetricCollection({"error": torchmetrics.MeanAbsoluteError()})
    assert one_run._direction([monitor(errors), highest], [highest]) == "min"
    assert one_run._direction([lowest], [lowest]) == "min"
    assert one_run._direction([highest], [highest]) == one_run._direction([], []) == "max"


class WithTest(Classifier):
    """One with a test, which is its validation."""

    test_step = Classifier.validation_step


@pytest.mark.parametrize("kind", [torchmetrics.Metric, torchmetrics.MetricCollection])
def test_predictions_of_a_monitor_with_metrics_of_its_own_are_the_logits(kind, tmp_path):
    metric = torchmetrics.classification.MulticlassAUROC(2)
    monitor = GroupMonitor("place", 3, metric=metric if kind is torchmetrics.Metric else kind([metric]))
    predictions, module = Predictions(monitor), WithTest()
    predictions.path = tmp_path / "rows.npz"
    make_trainer([monitor, predictions]).test(module, val_loader(), verbose=False)
    with np.load(predictions.path) as saved, torch.no_grad():
        x, y = problem(21, seed=1).tensors
        np.testing.assert_allclose(saved["logits_0"], module(x).numpy())
        assert saved["target_0"].tolist() == y.tolist()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says it")
def test_peak_memory_is_not_that_of_the_process_that_started_it():
    child = (
        "import types, torch\nfrom debias.compare.meter import peak_memory\n"
        "strategy = types.SimpleNamespace(root_device=torch.device('cpu'))\n"
        "print(peak_memory(types.SimpleNamespace(strategy=strategy)))"
    )
    parent = (
        f"import subprocess, sys\nheld = b'x' * {BIG}\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)"
    )
    words = [sys.executable, "-c", parent]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert 2**20 < int(done.stdout) < BIG


def test_shift_score_prefers_families_that_were_not_trained_on():
    assert shift_score({"val_shift/mean": 0.5, "val_shift/held_out_mean": 0.4}) == 0.4
    assert shift_score({"val_shift/mean": 0.5}) == 0.5
    assert math.isnan(shift_score({}))


def test_a_spec_that_cannot_be_parsed_is_a_failure(tmp_path):
    (folder,) = prepare(digits(**{"trainer.max_epoch": 3}), [RunSpec("erm-seed0", "erm", 0)], tmp_path)
    assert one_run.main(folder) == 1
    assert read_record(folder / "result.json").error == "It ended with status 2; log.txt says why."
    with pytest.raises(DebiasError, match=r"spec\.json"):
        one_run.main(tmp_path)
