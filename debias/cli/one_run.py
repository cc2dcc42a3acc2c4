"""One run of a comparison, in a process of its own: ``python -m debias.cli.one_run FOLDER HASH [LOGGING]``.

The folder says all: what to train, and afterwards what came out. The hash is that of what was checked against the files
that the command line names: only that is trained. A folder is run by one process at a time; the lock is the operating
system's, so a killed process leaves none behind.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from debias import __version__
from debias.compare.grid import LOCK, setting_id, spec_hash
from debias.compare.records import RECORD, SPEC, Candidate, RunRecord, configs_hash, read_record, read_spec
from debias.compare.runner import BUSY
from debias.errors import DebiasError, DebiasWarning

__all__ = ["main", "make_run"]

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # set by what starts several processes for one run
WIDTH = 300  # of an error in a record
IMPORTED = time.monotonic()

PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "scikit-learn", "timm", "torchvision")


def main(
    folder: Path, logging: dict[str, Any] | None = None, start: float | None = None, *, checked: str | None = None
) -> int:
    """Make the run of ``folder`` unless it is finished, and leave a record, also of a failure.

    Args:
        folder: of the run, as :func:`debias.compare.grid.prepare` made it.
        checked: :func:`debias.compare.grid.spec_hash` of the spec that was checked; None trusts the folder.
        logging: where to log beside the CSV: ``loggers``, a list of ``"tensorboard"`` and ``"wandb"``, and for W&B
            ``project``, ``group``, ``entity`` and ``ids``, the run's id with ``{}`` for its name.
        start: when this process began, as ``time.monotonic`` counts; now, by default.

    Returns:
        The exit status: 0 finished, 1 failed, :data:`debias.compare.runner.BUSY` made by another process right now.
    """
    start = time.monotonic() if start is None else start
    spec = read_spec(folder)
    if checked is not None and spec_hash(spec) != checked:
        raise DebiasError(
            f"Expected {folder / SPEC} to be what `debias compare` checked before it began, but it has changed since."
            f" Nothing was run. Delete {folder}, and the same command makes the run again."
        )
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        make_run(folder, spec, logging or {}, start, [])  # on behalf of the process of rank 0, which holds the lock
        return 0
    try:
        with FileLock(folder / LOCK, blocking=False):
            return _locked(folder, spec, logging or {}, start)
    except Timeout:
        return BUSY


def _locked(folder: Path, spec: dict[str, Any], logging: dict[str, Any], start: float) -> int:
    if (folder / RECORD).exists() and read_record(folder / RECORD).finished:
        return 0
    keys = ("id", "recipe", "recipe_hash", "method", "seed", "params", "held_out")
    record = RunRecord(
        **{key: spec[key] for key in keys},
        status="failed",
        config_hash=configs_hash(spec),
        versions=_versions(),
        git=_git(),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    told: list[str] = []
    try:
        with _noted(told):
            found = make_run(folder, spec, logging, start, told)
    except BaseException as error:
        traceback.print_exc()
        if _interrupted(error):
            raise  # no failure: it goes on from its last checkpoint next time
        failed = replace(record, error=_last_line(error), seconds=time.monotonic() - start, warnings=told)
        failed.save(folder)
        return 1
    replace(record, status="finished", warnings=told, **found).save(folder)
    return 0


@contextmanager
def _noted(told: list[str]) -> Iterator[None]:
    """Keep the text of each warning of debias, and show it as before."""
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
        text = " ".join(str(message).split())
        if issubclass(category, DebiasWarning) and text not in told:
            told.append(text)
        show(message, category, *rest, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("default", DebiasWarning)  # whatever the environment says
        warnings.showwarning = note
        yield


def make_run(
    folder: Path, spec: dict[str, Any], logging: dict[str, Any], start: float, warned: list[str]
) -> dict[str, Any]:
    """Train, then test every checkpoint that a selection rule may choose.

    Args:
        folder: of the run.
        spec: what it is to do, from :func:`debias.compare.records.read_spec`.
        logging: as for :func:`main`.
        start: as for :func:`main`.
        warned: texts of warnings until now, to which those of a run that was killed are added.

    Returns:
        The fields of :class:`RunRecord` that training fills.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    from debias.cli.training import DebiasCLI
    from debias.compare.held_out import hold_out
    from debias.compare.keeping import Keeper, begin_again, check_checkpoint, validation_metrics
    from debias.compare.meter import EpochLines, Labels, Meter
    from debias.compare.predictions import Predictions
    from debias.monitors.group_monitor import GroupMonitor

    cli = DebiasCLI("fit", _words(folder, spec, logging))
    trainer: Any = cli.trainer
    model, data = cli.model, cli.datamodule
    chosen_by = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]
    direction = _direction(trainer.callbacks, chosen_by)
    keeper, meter = Keeper(folder, direction), Meter(start, warned)
    predictions = next((Predictions(c) for c in trainer.callbacks if isinstance(c, GroupMonitor)), None)
    # The rules of the comparison keep checkpoints instead of the recipe's own rule.
    others = [c for c in trainer.callbacks if c not in chosen_by]
    own = [Labels(_labels(spec)), meter, EpochLines(direction), keeper]
    trainer.callbacks = [*others, *([predictions] if predictions else []), *own]
    if spec.get("held_out") is not None:
        hold_out(data, spec["held_out"])
    if trainer.is_global_zero:
        (folder / "config.yaml").write_text(cli.parser.dump(cli.config, skip_none=False), encoding="utf-8")
    resume = keeper.last if keeper.last.exists() else None
    if resume is not None:
        check_checkpoint(resume, begin_again(keeper.last))
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)

    # Before any test: each puts the callbacks into the state of the checkpoint that it tests.
    candidates, seconds_before = keeper.candidates(), meter.seconds_before
    measured = {"seconds_per_step": meter.seconds_per_step, "peak_memory": meter.peak_memory}
    if keeper.validated != candidates["last"].step and trainer.enable_validation:
        # Training ended between two validations, and what the one before logged is not of the last checkpoint.
        trainer.validate(model, datamodule=data, ckpt_path=str(keeper.last), verbose=False, weights_only=True)
        candidates["last"] = replace(candidates["last"], val=validation_metrics(trainer))
        # All there is by any rule, where a method has changed the network when training had ended.
        candidates = dict.fromkeys(keeper.scores(candidates["last"].val), candidates["last"]) | candidates
    if spec.get("held_out") is None:
        candidates = _test(trainer, model, data, candidates, predictions, folder)
    return {
        "direction": direction, "candidates": candidates, "steps": candidates["last"].step, **measured,
        "seconds": seconds_before + time.monotonic() - start, "device": _device(trainer),
    }  # fmt: skip


def _direction(callbacks: list[Any], chosen_by: list[Any]) -> str:
    """Of the metric that the rules read, which the first monitor logs.

    A recipe that keeps the checkpoint of the lowest loss says nothing about it, unless nothing else does.
    """
    from debias.monitors.detection_monitor import DetectionMonitor
    from debias.monitors.group_monitor import GroupMonitor
    from debias.monitors.multilabel_f1 import MultilabelF1Monitor

    for monitor in callbacks:
        if isinstance(monitor, DetectionMonitor | MultilabelF1Monitor):
            return "max"
        if isinstance(monitor, GroupMonitor):
            return "max" if monitor.higher_is_better else "min"
    return "min" if any(c.monitor and c.mode == "min" for c in chosen_by) else "max"


def _words(folder: Path, spec: dict[str, Any], logging: dict[str, Any]) -> list[str]:
    """The run as a command line; what belongs to this machine is not in the configs."""
    from debias.cli.training import config_words

    words = config_words(spec["configs"])
    words += ["--seed_everything", str(spec["seed"]), "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    return [*words, "--trainer.logger", json.dumps(_loggers(folder, spec, logging))]


def _loggers(folder: Path, spec: dict[str, Any], logging: dict[str, Any]) -> list[dict[str, Any]]:
    """CSV always: the figures read it. A run that goes on writes a further file; Lightning would delete the first."""
    place = {"save_dir": str(folder), "version": ""}
    csv = {"save_dir": str(folder), "name": "csv", "version": len(list(folder.glob("csv/*")))}
    loggers: list[dict[str, Any]] = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv}]
    if "tensorboard" in logging.get("loggers", ()):
        entry = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
        loggers.append(entry | {"init_args": {**place, "name": "tensorboard"}})
    if "wandb" in logging.get("loggers", ()):
        group, project = logging["group"], logging["project"]
        names: dict[str, Any] = {
            "project": project, "group": group, "job_type": spec["method"], "name": spec["id"],
            "tags": _tags(spec), "save_dir": str(folder),
        }  # fmt: skip
        if logging.get("entity"):
            names["entity"] = logging["entity"]
        if "WANDB_SWEEP_ID" not in os.environ:  # there the agent names the run
            # A run that was killed and goes on is the same run.
            names |= {"id": logging["ids"].format(spec["id"]), "resume": "allow"}
        loggers.append({"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": names})
    return loggers


def _labels(spec: dict[str, Any]) -> dict[str, Any]:
    """What runs are filtered and grouped by, as hyper-parameters: flat, beside those of the method."""
    keys = ("recipe", "method", "seed", "held_out")
    labels = {f"compare/{key}": spec.get(key) for key in keys} | {"compare/setting": _setting(spec)}
    return labels | {key.replace(".", "/"): value for key, value in spec["params"].items()}


def _tags(spec: dict[str, Any]) -> list[str]:
    held_out = [] if spec.get("held_out") is None else [f"without-{spec['held_out']}"]
    tags = [spec["method"], f"seed-{spec['seed']}", f"setting-{_setting(spec)}", *held_out, spec["recipe"]]
    return [tag[:64] for tag in tags]  # W&B refuses longer ones


def _setting(spec: dict[str, Any]) -> str:
    """As the name of the run has it."""
    return setting_id(spec["params"]) or "own"


def _test(
    trainer: Any, model: Any, data: Any, candidates: dict[str, Candidate], predictions: Any, folder: Path
) -> dict[str, Candidate]:
    """Test each checkpoint; several rules that chose the same one share its test."""
    from debias.compare.keeping import begin_again, check_checkpoint

    loggers, trainer.loggers = trainer.loggers, []  # under names of their own, or the last rule's would overwrite all
    tested: dict[int, dict[str, float]] = {}
    found = {}
    for rule, candidate in candidates.items():
        if candidate.step not in tested:
            if predictions is not None:
                predictions.path = folder / "predictions" / f"step{candidate.step}.npz"
            checkpoint = folder / candidate.checkpoint
            check_checkpoint(checkpoint, begin_again(folder / "checkpoints"))
            trainer.test(model, datamodule=data, ckpt_path=checkpoint, verbose=False, weights_only=True)
            # Not what `test` returns, which of several loaders repeats the last one's values.
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            tested[candidate.step] = {key: value for key, value in metrics.items() if key.startswith("test")}
        found[rule] = replace(candidate, test=tested[candidate.step])
        for logger in loggers:
            measured = candidate.val | tested[candidate.step]
            logger.log_metrics({f"{rule}/{key}": value for key, value in measured.items()})
    for logger in loggers:
        logger.finalize("success")
    return found


def _device(trainer: Any) -> str:
    import torch

    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "debias": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git() -> dict[str, Any]:
    """Revision of the folder that the command is run in, if it is a repository."""
    try:
        revision = _output("git", "rev-parse", "HEAD")
        changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"revision": revision, "changed": bool(changed)}


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _age() -> float:
    """Seconds since this process began; where the system does not say it, since the clock below was read."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        # Behind the name, which may hold anything: the start is the 22nd field of all, in ticks since the system's.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if int(fields[19]):  # some sandboxes say 0
            return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - IMPORTED


def _end(*_: Any) -> None:
    raise KeyboardInterrupt


def _interrupted(error: BaseException | None) -> bool:
    """Lightning turns Ctrl-C into an exit."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _last_line(error: BaseException) -> str:
    """What a table has room for: an error of debias where there is one; the traceback is in the log."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    told = next((e for e in chain if isinstance(e, DebiasError)), error)
    if isinstance(told, SystemExit):
        return f"It ended with status {told.code}; log.txt says why."
    text = " ".join(str(told).split())
    return f"{type(told).__name__}: {text if len(text) <= WIDTH else text[:WIDTH] + ' ...'}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # Lightning's own handler calls it, too
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.exit(main(Path(sys.argv[1]), options, time.monotonic() - _age(), checked=sys.argv[2]))
