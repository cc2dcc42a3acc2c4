"""A process that the tests fork is what a new interpreter would be, but for the imports that it has behind it."""

import os
import subprocess
import sys
import time

import pytest

from _support.forked import Forked, run

FACTS = """
import atexit, multiprocessing, os, signal, sys, threading
atexit.register(print, "at exit")
threading.Timer(0.1, print, ["a thread"]).start()
print(sys.argv, __name__, os.getcwd(), sys.path[1], sorted(os.environ.items()), os.getsid(0) == os.getpid())
print(multiprocessing.get_start_method(), signal.getsignal(signal.SIGTERM), sys.stdin.read())
print("said", file=sys.stderr)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "sys.exit('no')"])
def test_it_is_as_a_new_interpreter(tmp_path, end):
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PYTHONPATH": str(tmp_path / "first"), "OWN": "x"}
    command, options = [sys.executable, "-c", FACTS + end, "a", "b"], {"cwd": tmp_path, "env": environment}
    new = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, **options)
    forked = run(command, timeout=60, **options)
    assert forked.returncode == new.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1)
    assert forked.stdout == new.stdout
    assert forked.stderr == new.stderr
    assert new.stdout.endswith("a thread\nat exit\n")


def test_nothing_runs_in_what_forks_it():
    code = "import os, sys, threading; print(threading.active_count(), *sys.modules)"
    threads, *modules = run([sys.executable, "-c", code], timeout=60).stdout.split()
    assert threads == "1"
    assert {"torch", "lightning", "debias.methods.group_dro"} <= set(modules)


def test_an_error_is_shown_and_a_signal_is_told():
    done = run([sys.executable, "-c", "1 / 0"], timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], timeout=60).returncode == -9


def test_one_that_hangs_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.1)
    start = time.monotonic()
    process = Forked([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.communicate(timeout=0.5) == ("", None)
    assert process.returncode == -9
    assert time.monotonic() - start < 30


def test_it_can_start_others():
    code = "import sys; from _support.forked import run\n"
    code += "print(run([sys.executable, '-c', 'print(7)'], timeout=60).stdout)"
    assert run([sys.executable, "-c", code], timeout=60).stdout.strip() == "7"
