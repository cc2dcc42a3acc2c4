"""Python processes that start at once: forked by a server that has imported torch, Lightning and debias before.

The server has a single thread, computes nothing and touches no device, so what it forks is what a new interpreter is
after five seconds of imports (:mod:`_support.warm`). Tests of starting itself use :mod:`subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import debias

__all__ = ["Forked", "context", "run"]

TESTS = Path(__file__).parents[1]
_ENVIRONMENT = dict(os.environ)  # before any test has changed it


def context() -> Any:
    """The ``multiprocessing`` context of the server, which starts with the first call."""
    ours = Path(debias.__file__).parents[1]  # of this process, which may have been installed
    paths = [str(TESTS), str(ours), *filter(None, [_ENVIRONMENT.get("PYTHONPATH")])]
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["_support.warm"])
    with mock.patch.dict(os.environ, _ENVIRONMENT | one | {"PYTHONPATH": os.pathsep.join(paths)}, clear=True):
        forkserver.ensure_running()
    return found


class Forked:
    """As much of :class:`subprocess.Popen` as the tests use, for ``[sys.executable, "-m", module, *words]`` and ``-c``.

    Its input is empty. The runs that a comparison starts in it are forked, too, and so are Lightning's ranks.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = True,
        start_new_session: bool = False,
    ) -> None:
        if command[0] != sys.executable or command[1] not in ("-m", "-c") or stdin != subprocess.DEVNULL:
            raise NotImplementedError(f"{command} with the input {stdin}")
        self.args, self.stdout = list(command), None
        reader, output = multiprocessing.Pipe(duplex=False) if stdout == subprocess.PIPE else (None, _end(stdout, 1))
        errors = output if stderr == subprocess.STDOUT else _end(stderr, 2)
        where = os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env)
        self._process = context().Process(target=_become, args=(self.args, *where, output, errors, start_new_session))
        self._process.start()
        for end in {output, errors}:
            end.close()
        if reader is not None:
            self.stdout = open(os.dup(reader.fileno()), "r" if text else "rb")  # noqa: SIM115
            reader.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[Any, None]:
        """What it said until it ended; after ``timeout`` seconds it is killed."""
        killer = threading.Timer(timeout, self._process.kill)
        killer.start()
        with self:
            said = self.stdout.read()
        killer.cancel()
        return said, None

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait()
        if self.stdout is not None:
            self.stdout.close()


def run(command: Sequence[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess:
    """:func:`subprocess.run` with ``capture_output=True, text=True``; after ``timeout`` seconds it is killed."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = Forked(command, stdout=output, stderr=errors, **options)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, output.read(), errors.read())


def _end(stream: Any, standard: int) -> Connection:
    """Something that multiprocessing hands to a child: None is what this process has."""
    if stream == subprocess.DEVNULL:
        return Connection(os.open(os.devnull, os.O_RDWR))
    return Connection(os.dup(standard if stream is None else stream.fileno()))


def _become(
    command: list[str], cwd: str, env: dict[str, str], output: Connection, errors: Connection, new_session: bool
) -> None:
    """Be the process that the command line would start."""
    from lightning.pytorch.strategies.launchers import subprocess_script as launcher

    from debias.compare import runner

    if new_session:
        os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    for end in {output, errors}:
        end.close()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*first, *(path for path in sys.path if path and TESTS not in (Path(path), *Path(path).parents))]
    multiprocessing.set_start_method(None, force=True)  # the platform's own, not that of this process
    # The server that forked this process still runs.
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
    runner.subprocess = launcher.subprocess = SimpleNamespace(**(vars(subprocess) | {"Popen": Forked}))
    atexit._clear()  # what imports have registered is the server's
    _, how, what, *words = command
    sys.argv = ["-c", *words]  # or, below, the module's file
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
