"""Two processes of one gloo group that stay alive between tests; exceptions come back, a hang is a failure."""

from __future__ import annotations

import builtins
import os
import pickle
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from _support.forked import context

__all__ = ["Outcome", "Ranks"]

# Groups of a device mesh are never destroyed, and a thread of each looks for messages a hundred times a second: a
# process with so many threads gives way to a new one.
MANY = 40


@dataclass
class Outcome:
    """What one rank did: the result of the function, or the exception it raised; and how many threads it then has."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    threads: int = 0


class Ranks:
    """Runs a function on every rank of a fresh process group, in long-lived processes.

    Args:
        world: number of processes.
        timeout: seconds after which a task that has not finished counts as hanging.
        warning_filters: pytest's ``filterwarnings``, which hold in the processes too.
    """

    def __init__(self, world: int = 2, timeout: float = 60.0, warning_filters: Sequence[str] = ()) -> None:
        self.world = world
        self.timeout = timeout
        self.warning_filters = list(warning_filters)
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """``function(rank, *args)`` on every rank; the results in rank order. The function is importable by name.

        Raises:
            AssertionError: a rank raised (with its traceback) or did not finish in time.
        """
        outcomes = self.outcomes(function, *args, timeout=timeout)
        traces = [
            f"rank {rank}:\n{outcome.trace}" for rank, outcome in enumerate(outcomes) if outcome.error is not None
        ]
        if traces:
            raise AssertionError("\n".join(traces))
        return [outcome.value for outcome in outcomes]

    def raises(
        self,
        error: type[BaseException],
        match: str,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
    ) -> list[BaseException]:
        """Assert that every rank raises ``error`` with a message that matches, and none waits for another."""
        outcomes = self.outcomes(function, *args, timeout=timeout)
        for rank, outcome in enumerate(outcomes):
            assert isinstance(outcome.error, error), f"rank {rank}: {outcome.value!r}\n{outcome.trace}"
            assert re.search(match, str(outcome.error)), f"rank {rank}: {outcome.error}"
        return [outcome.error for outcome in outcomes]  # type: ignore[misc]

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Outcome]:
        """What every rank did.

        Raises:
            AssertionError: a rank did not finish in time; the processes are ended and the next task gets new ones.
        """
        if not self._processes:
            self._start()
        limit = self.timeout if timeout is None else timeout
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((function, args, f"{folder}/store", limit)))
            deadline = time.monotonic() + limit
            outcomes: list[Outcome | None] = []
            for pipe in self._pipes:
                try:
                    ready = pipe.poll(max(0.0, deadline - time.monotonic()))
                    outcomes.append(pickle.loads(pipe.recv_bytes()) if ready else None)
                except (EOFError, OSError) as error:
                    outcomes.append(Outcome(error=error, trace="the process died"))
                    deadline = min(deadline, time.monotonic() + 5)
        if None in outcomes:
            self.close()
            others = "\n".join(o.trace for o in outcomes if o is not None)
            hung = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
            raise AssertionError(f"ranks {hung} did not finish in {limit} s. The others:\n{others or 'raised nothing'}")
        if any(o.trace == "the process died" or o.threads > MANY for o in outcomes if o is not None):
            self.close()
        return outcomes  # type: ignore[return-value]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        server = context()
        for rank in range(self.world):
            here, there = server.Pipe()
            process = server.Process(target=_serve, args=(rank, self.world, there, self.warning_filters), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        for pipe in self._pipes:  # the imports of the server are no part of a task's time
            assert pipe.poll(120), "the processes did not start"
            pipe.recv_bytes()


def _serve(rank: int, world: int, pipe: Any, warning_filters: list[str]) -> None:
    torch.set_num_threads(1)
    # As if a launcher had started this process, so that Lightning joins the group that is there.
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for line in warning_filters:
        action, message, category, module = [*line.split(":"), "", "", ""][:4]
        warnings.filterwarnings(action, message, getattr(builtins, category or "Warning"), re.escape(module))
    pipe.send_bytes(b"ready")
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send_bytes(_dumped(_run(rank, world, task)))


def _run(rank: int, world: int, task: bytes) -> Outcome:
    try:
        function, args, store, limit = pickle.loads(task)
        # A new group for every task: what a failed one left behind cannot reach the next.
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=limit)
        )
        return Outcome(function(rank, *args))
    except BaseException as error:
        return Outcome(error=error, trace=traceback.format_exc())
    finally:
        if dist.is_initialized():
            # Before torch 2.8 gloo's destructor waits, holding the GIL, for threads that may need it to let go of a
            # tensor (pytorch#154976).
            time.sleep(0.01)
            dist.destroy_process_group()


def _dumped(outcome: Outcome) -> bytes:
    if os.path.isdir("/proc/self/task"):
        outcome.threads = len(os.listdir("/proc/self/task"))
    try:
        return pickle.dumps(outcome)
    except Exception as error:
        return pickle.dumps(
            Outcome(None, RuntimeError(str(outcome.error or error)), outcome.trace or repr(error), outcome.threads)
        )
