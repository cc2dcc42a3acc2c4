"""Make the runs of a comparison, each in a process of its own, some at a time, with a progress display."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from debias.compare.escape import plain
from debias.compare.grid import LOCK
from debias.compare.records import PROGRESS, RECORD, RunRecord, read_record, read_spec
from debias.errors import DebiasError

__all__ = ["BUSY", "LOCK", "Interrupted", "duration", "run_all"]

BUSY = 75  # EX_TEMPFAIL: another process makes this run
PAUSE = 0.2
EVERY = 60.0  # seconds between two lines that say how far runs are, where no bar can
GRACE = 10.0  # seconds that a process has to end


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C, or the request to end: the runs in progress were ended, the finished ones are there."""


@dataclass
class _Process:
    folder: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int


def run_all(
    folders: Sequence[Path],
    command: Callable[[Path], Sequence[str]],
    *,
    jobs: int = 1,
    progress: Any = None,
) -> list[RunRecord]:
    """Make every run that is not finished.

    A run that another process makes is waited for; one that failed before is tried again; one that fails is recorded,
    and the rest goes on.

    Args:
        folders: of the runs.
        command: the command line that makes the run of a folder.
        jobs: runs at the same time. With several devices each gets one of them in turn, and on a CPU its share of the
            cores.
        progress: a rich ``Progress`` to show them in, or None.

    Returns:
        A record for each folder, in their order.

    Raises:
        DebiasError: ``jobs`` below 1, or a damaged record, before anything is run.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if jobs < 1:
        raise DebiasError(f"Expected `jobs` to be at least 1, but got {jobs}.")
    waiting = deque(folder for folder in folders if not _finished(folder))
    total = len(folders)
    display = _Display(progress, total, total - len(waiting))
    running: list[_Process] = []
    later: dict[Path, float] = {}  # made by another process; when to look again
    try:
        with _ends_on_sigterm():
            while waiting or running or later:
                for folder, when in list(later.items()):
                    if time.monotonic() < when:
                        continue
                    if _is_locked(folder):
                        later[folder] = time.monotonic() + 2
                        continue
                    del later[folder]
                    if _finished(folder):
                        display.done(read_record(folder / RECORD))
                    else:
                        waiting.append(folder)
                while waiting and len(running) < jobs:
                    slot = min(set(range(jobs)) - {p.slot for p in running})
                    running.append(_start(waiting.popleft(), command, slot, jobs))
                    display.started(running[-1].folder)
                for one in list(running):
                    status = one.process.poll()
                    if status is None:
                        continue
                    running.remove(one)
                    one.log.close()
                    if status < 0:  # killed: its other ranks would wait for it, and hold their devices
                        with suppress(ProcessLookupError):
                            os.killpg(one.process.pid, signal.SIGKILL)
                    if status == BUSY:
                        later[one.folder] = time.monotonic() + 2
                    else:
                        _record_crash(one.folder, status)
                        display.done(read_record(one.folder / RECORD))
                display.show([p.folder for p in running], len(later))
                time.sleep(PAUSE)
    except KeyboardInterrupt as error:
        raise Interrupted from error
    finally:
        _end(running)
        display.close()
    return [read_record(folder / RECORD) for folder in folders]


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> from debias.compare.runner import duration
        >>> duration(42.4), duration(200), duration(7300)
        ('42 s', '3 min', '2 h 2 min')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _finished(folder: Path) -> bool:
    return (folder / RECORD).exists() and read_record(folder / RECORD).finished


def _is_locked(folder: Path) -> bool:
    """Whether a process makes this run; asked here, as a process that finds out takes seconds to start."""
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def _start(folder: Path, command: Callable[[Path], Sequence[str]], slot: int, jobs: int) -> _Process:
    try:
        log = (folder / "log.txt").open("ab")
    except OSError as error:
        raise DebiasError(
            f"Expected `out` to be a folder that can be written, but the run {folder} cannot be ({error}). Name another"
            " with `--out`."
        ) from error
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
        devices = _devices()
        if len(devices) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    with suppress(OSError):
        (folder / PROGRESS).unlink()
    # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
    process = subprocess.Popen(
        list(command(folder)),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return _Process(folder, process, log, slot)


def _devices() -> list[str]:
    """The CUDA devices that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _record_crash(folder: Path, status: int) -> None:
    """Leave a record where the process could not: it was killed, say by the system for want of memory."""
    # What crashes after its work, in the teardown of a driver or a logger, has finished.
    if (folder / RECORD).exists() and (status in (0, 1) or _finished(folder)):
        return
    spec = read_spec(folder)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    keys = ("id", "recipe", "recipe_hash", "method", "seed", "params", "held_out")
    error = f"The process ended with {how}; {folder / 'log.txt'} may say why."
    record = RunRecord(**{key: spec[key] for key in keys}, status="failed", error=error)
    record.save(folder)


def _end(running: Sequence[_Process]) -> None:
    """Ask the processes to end; after :data:`GRACE`, or when asked to hurry, do not ask."""
    for one in running:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGTERM)
    limit = time.monotonic() + GRACE
    for one in running:
        try:
            one.process.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:  # pressed again: now
            limit = time.monotonic()
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        one.log.close()


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    def handle(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Display:
    """One bar for the whole, and what runs right now; where that is no terminal, a line when something happens."""

    def __init__(self, progress: Any, total: int, finished: int) -> None:
        self.progress, self.finished, self.total = progress, finished, total
        self.plain = progress is not None and not progress.console.is_terminal
        self.said = self.begun = time.monotonic()
        self.found = float(finished)  # before this command
        self.work = float(finished)  # runs that are done, and shares of those in progress
        self.task = None if progress is None else progress.add_task("", total=total, completed=finished)

    def done(self, record: RunRecord) -> None:
        self.finished += 1
        if self.progress is None:
            return
        if not record.finished:
            self._print(f"{record.id} failed: {record.error}")
        elif self.plain:
            self._print(f"{record.id} finished in {record.seconds:.0f} s")

    def started(self, folder: Path) -> None:
        if self.plain:
            self._print(f"{folder.name} started")

    def _print(self, text: str) -> None:
        self.said = time.monotonic()
        where = f"{self.finished}/{self.total}{self._left()}: " if self.plain else ""
        self.progress.console.print(plain(where + text), highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        """How long it will take at the pace of this command, once there is one."""
        self.work = max(self.work, self.finished)
        done, missing = self.work - self.found, self.total - self.work
        if done <= 0 or missing <= 0:
            return ""
        return f", {duration((time.monotonic() - self.begun) * missing / done)} left"

    def show(self, folders: Sequence[Path], elsewhere: int) -> None:
        if self.progress is None:
            return
        shares = {folder.name: _share(folder) for folder in folders}
        self.work = self.finished + sum(shares.values())
        words = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        if elsewhere:
            words = ", ".join(filter(None, [words, f"{elsewhere} run elsewhere"]))
        self.progress.update(self.task, completed=self.work, description=plain(words))
        if self.plain and words and time.monotonic() - self.said > EVERY:
            self._print(words)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=self.finished, description="")


def _share(folder: Path) -> float:
    try:
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return min(content["step"] / content["steps"], 1.0)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0.0
