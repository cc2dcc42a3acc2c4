"""Runs that are killed at random go on as if nothing had been. One command, some minutes long::

    pytest -m slow -s tests/conformance/test_kills.py

``KILLS`` (100 by default) says how often training is killed, over all launchers; training in two stages, by each of two
launchers, and a comparison are killed a fifth as often. Seeds are printed; ``SEED`` sets the first.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from _support.fits import same
from _support.killed import BATCH, EPOCHS, ROWS, STARTS
from debias.cli.recipes import recipes_folder

KILLS = int(os.environ.get("KILLS", "100"))
SEED = int(os.environ.get("SEED", "0"))
METHODS = ("GroupDRO", "DomainPenalisation", "Fishr", "IdentityAdversarial", "MixStyle")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
LIMIT = 300

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def start(words, log):
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
    )


def end(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def steps(folder):
    return (folder / "steps").stat().st_size if (folder / "steps").exists() else 0


def train(folder, launcher, method, draw, kills):
    """Train to the end, killed up to ``kills`` times on the way; how often it was."""
    folder.mkdir()
    done = 0
    with (folder / "log.txt").open("ab") as log:
        while not (folder / "end.pt").exists():
            before = steps(folder)
            process = start(["-m", "_support.killed", folder, launcher, method], log)
            after, pause, limit = draw.randint(1, 15), draw.uniform(0, 0.05), time.monotonic() + LIMIT
            while process.poll() is None and time.monotonic() < limit:
                if done < kills and steps(folder) >= before + after:
                    time.sleep(pause)
                    done += process.poll() is None
                    break
                time.sleep(0.002)
            if done < kills or process.poll() is None:
                end(process)
            assert time.monotonic() < limit, (folder / "log.txt").read_text()[-3000:]
            assert process.returncode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-3000:]
    return done


def kill_at_random(folder, launcher, methods, wanted):
    """Kill runs of these methods ``wanted`` times in all; each ends as if undisturbed."""
    done, seed, undisturbed = 0, SEED, {}
    while done < wanted:
        draw = random.Random(f"{seed}/{launcher}")
        method = draw.choice(methods)
        if method not in undisturbed:
            train(folder / method, launcher, method, draw, 0)
            undisturbed[method] = torch.load(folder / method / "end.pt", weights_only=True)
            assert steps(folder / method) == EPOCHS * ROWS // BATCH // (2 if STARTS[launcher] else 1)
        run = folder / f"{method}-{seed}"
        kills = train(run, launcher, method, draw, min(draw.randint(1, 4), wanted - done))
        print(f"{launcher}, {method}, seed {seed}: killed {kills} times")
        assert same(torch.load(run / "end.pt", weights_only=True), undisturbed[method]), (launcher, method, seed)
        done, seed = done + kills, seed + 1


@pytest.mark.parametrize("launcher", STARTS)
def test_training_that_is_killed_ends_as_if_undisturbed(tmp_path, launcher):
    kill_at_random(tmp_path, launcher, METHODS, KILLS // len(STARTS))


@pytest.mark.parametrize("launcher", ["one process", "ddp"])
def test_two_stages_that_are_killed_end_as_if_undisturbed(tmp_path, launcher):
    kill_at_random(tmp_path, launcher, ["InferGroups"], KILLS // 5)


def compare(out, log):
    words = ["-m", "debias", "compare", recipes_folder() / "colored_digits", "--methods", "group_dro"]
    return start([*words, "--seeds", "0", "--set", "trainer.max_epochs=3", "--out", out], log)


def results(out):
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("runs/*/result.json")}
    return {name: (record["status"], record["candidates"], record["steps"]) for name, record in found.items()}


def test_a_comparison_that_is_killed_ends_as_if_undisturbed(tmp_path):
    with (tmp_path / "log.txt").open("ab") as log:
        assert compare(tmp_path / "whole", log).wait(LIMIT) == 0
        whole, done, seed = results(tmp_path / "whole"), 0, SEED
        assert len(whole) == 3
        while done < max(KILLS // 5, 1):
            draw, out, kills = random.Random(f"{seed}/compare"), tmp_path / f"out{seed}", 0
            process = compare(out, log)
            while True:
                limit = time.monotonic() + draw.uniform(2, 20)
                while process.poll() is None and (kills == 4 or time.monotonic() < limit):
                    time.sleep(0.01)
                if process.poll() is not None:
                    break
                runs = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _makes(pid, out)]
                which = draw.choice(("command", "run", "both"))
                for pid in runs if which != "command" else []:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if which != "run":
                    end(process)
                    process = compare(out, log)
                kills += 1
            if process.returncode:  # a run was killed, and recorded as failed
                process = compare(out, log)
                assert process.wait(LIMIT) == 0, (tmp_path / "log.txt").read_text()[-3000:]
            print(f"comparison, seed {seed}: killed {kills} times")
            assert results(out) == whole, seed
            done, seed = done + kills, seed + 1


def _makes(pid, out):
    """Whether this process makes a run of the comparison."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"debias.cli.one_run" in words and any(word.startswith(os.fsencode(out)) for word in words)
