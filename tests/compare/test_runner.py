"""Runs as processes: failures, crashes, locks, interruption; nothing finished is made again."""

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from _support.forked import Forked
from debias.compare import runner
from debias.compare.records import RunRecord, read_record, write_json
from debias.compare.runner import LOCK, Interrupted, run_all
from debias.errors import DebiasError

# Stands for a run: says that it was called, then does what the name of its folder says.
FAKE = textwrap.dedent(
    """
    import json, os, signal, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    spec = json.loads((folder / "spec.json").read_text())
    with (folder / "calls").open("a") as file: file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "") + "\\n")
    if "stubborn" in folder.name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "ready").touch()
        time.sleep(60)
    if "ranks" in folder.name:
        import subprocess
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "another rank"])
        os.kill(os.getpid(), signal.SIGKILL)
    if "crash" in folder.name: os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in folder.name: time.sleep(60)
    if "brief" in folder.name: time.sleep(0.8)
    record = {k: spec[k] for k in ("id", "recipe", "recipe_hash", "method", "seed")} | {"format": 1, "candidates": {}}
    failed = "fail" in folder.name and not (folder / "mended").exists()
    if failed:
        record |= {"status": "failed", "error": "ValueError: no"}
    else:
        record |= {"status": "finished", "candidates": {"last": {"epoch": 1, "step": 1, "val": {}, "test": {}}}}
    (folder / "result.json").write_text(json.dumps(record))
    if "teardown" in folder.name: os.kill(os.getpid(), signal.SIGSEGV)
    sys.exit(failed)
    """
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PAUSE", 0.02)
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def folders(*names: str) -> list[Path]:
        found = []
        for name in names:
            folder = tmp_path / "runs" / name
            folder.mkdir(parents=True, exist_ok=True)
            spec = {"id": name, "recipe": "toy", "recipe_hash": "0", "method": "erm", "seed": 0, "configs": []}
            write_json(folder / "spec.json", spec | {"params": {}, "held_out": None})
            found.append(folder)
        return found

    def command(folder: Path) -> list[str]:
        return [sys.executable, str(script), str(folder)]

    return folders, command


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_a_failure_is_recorded_and_does_not_stop_the_rest(make):
    folders, command = make
    runs = folders("a", "fail", "crash", "b")
    records = run_all(runs, command)
    assert [record.status for record in records] == ["finished", "failed", "failed", "finished"]
    assert records[1].error == "ValueError: no"
    assert "SIGKILL" in records[2].error
    (runs[1] / "mended").touch()
    again = run_all(runs, command)
    assert [record.status for record in again] == ["finished", "finished", "failed", "finished"]
    assert [calls(folder) for folder in runs] == [1, 2, 2, 1]  # what finished is not repeated


def test_where_no_bar_can_be_lines_say_what_runs(make, monkeypatch):
    folders, command = make
    monkeypatch.setattr(runner, "EVERY", 0.2)
    file = io.StringIO()
    runs = folders("brief", "fail")

    def begun(folder):
        write_json(folder / "progress.json", {"step": 3, "steps": 12})
        return command(folder)

    with Progress(console=Console(file=file, width=80), transient=True) as progress:
        run_all(runs, begun, progress=progress)
    lines = [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
    assert lines[0] == "0/2: brief started"
    between = r"0/2, \d+ s left: brief 25 %"
    assert re.fullmatch(between, lines[1])
    assert all(re.fullmatch(between, line) for line in lines[2:-3])
    assert [re.sub(r"\d+ s left", "s left", line) for line in lines[-3:]] == [
        "1/2, s left: brief finished in nan s",
        "1/2, s left: fail started",
        "2/2: fail failed: ValueError: no",
    ]


def test_a_killed_process_leaves_no_other_ranks_behind(make):
    folders, command = make
    (record,) = run_all(folders("ranks"), command)
    assert "SIGKILL" in record.error
    limit = time.monotonic() + 10
    while any("another rank" in line for line in _processes()) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any("another rank" in line for line in _processes())


def test_a_crash_after_the_result_is_no_failure(make):
    folders, command = make
    (record,) = run_all(folders("teardown"), command)
    assert record.finished


def test_a_folder_that_cannot_be_written_is_one_message(make):
    folders, command = make
    (run,) = folders("a")
    (run / "log.txt").mkdir()
    with pytest.raises(DebiasError, match=r"Expected `out` to be a folder that can be written.*`--out`"):
        run_all([run], command)


def test_jobs_run_at_the_same_time_on_devices_in_turn(make, monkeypatch):
    folders, command = make
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    runs = folders("brief1", "brief2")
    start = time.monotonic()
    run_all(runs, command, jobs=2)
    both = time.monotonic() - start
    assert sorted((folder / "calls").read_text().strip() for folder in runs) == ["4", "7"]
    start = time.monotonic()
    run_all(folders("brief3"), command, jobs=2)
    assert both < 1.8 * (time.monotonic() - start)


def test_a_run_that_another_process_makes_is_waited_for(make, tmp_path):
    folders, _ = make
    (run,) = folders("elsewhere")
    (tmp_path / "locked.py").write_text(
        "import sys\nfrom filelock import FileLock, Timeout\nopen(sys.argv[1] + '/started', 'a').write('.')\n"
        f"try:\n    lock = FileLock(sys.argv[1] + '/{LOCK}', blocking=False); lock.acquire()\n"
        f"except Timeout:\n    sys.exit(75)\nexec(open({str(tmp_path / 'fake.py')!r}).read())\n"
    )
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys, time\nfrom filelock import FileLock\n"
            f"with FileLock({str(run / LOCK)!r}):\n    print('held', flush=True); time.sleep(1.5)",
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"held"
    start = time.monotonic()
    (record,) = run_all([run], lambda folder: [sys.executable, str(tmp_path / "locked.py"), str(folder)])
    holder.wait(20)
    holder.stdout.close()
    assert record.finished
    assert time.monotonic() - start > 1
    assert calls(run) == 1
    assert (run / "started").read_text() == ".."  # not a process every other second


def test_what_another_process_finished_is_not_started(make):
    folders, command = make
    (run,) = folders("elsewhere")

    def busy(folder: Path) -> list[str]:  # and when it is looked at again, the other one is done
        return [sys.executable, "-c", f"import os\nos.system({' '.join(command(folder))!r})\nraise SystemExit(75)"]

    (record,) = run_all([run], busy)
    assert record.finished
    assert calls(run) == 1


def test_ctrl_c_twice_ends_a_process_that_does_not_listen(make, tmp_path):
    folders, _ = make
    (run,) = folders("stubborn")
    driver = (
        "import sys\nfrom pathlib import Path\nfrom debias.compare import runner\n"
        "from debias.compare.runner import Interrupted, run_all\nrunner.GRACE = 60\n"
        f"try:\n    run_all([Path({str(run)!r})], lambda f: [sys.executable, {str(tmp_path / 'fake.py')!r}, str(f)])\n"
        "except Interrupted:\n    sys.exit(130)\n"
    )
    process = in_a_terminal(driver)
    limit = time.monotonic() + 60
    while not (run / "ready").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not any("stubborn" in line for line in _processes())


def test_ctrl_c_ends_the_processes_and_records_no_failure(make, tmp_path):
    folders, _ = make
    runs = folders("a", "slow")
    driver = (
        "import sys\nfrom pathlib import Path\nfrom debias.compare.runner import Interrupted, run_all\n"
        f"try:\n    run_all([Path(p) for p in {[str(r) for r in runs]!r}],"
        f" lambda f: [sys.executable, {str(tmp_path / 'fake.py')!r}, str(f)])\n"
        "except Interrupted:\n    sys.exit(130)\n"
    )
    process = in_a_terminal(driver)
    limit = time.monotonic() + 60
    while not (runs[1] / "calls").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert read_record(runs[0] / "result.json").finished
    assert not (runs[1] / "result.json").exists()
    with FileLock(runs[1] / LOCK, timeout=1):
        pass
    assert not any("slow" in line for line in _processes())


def in_a_terminal(script: str) -> Forked:
    """Start a script that Ctrl-C reaches: what runs in the background, as tests may, ignores it and hands that on."""
    listen = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    started = "import subprocess\nfrom debias.compare import runner\nrunner.subprocess = subprocess\n"
    return Forked([sys.executable, "-c", listen + started + script])


def _processes() -> list[str]:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_damaged_record_stops_before_anything_runs(make):
    folders, command = make
    runs = folders("a", "b")
    (runs[1] / "result.json").write_text('{"format": 1, "stat')
    with pytest.raises(DebiasError, match=r"b/result.json to be a run's result .* Delete that file"):
        run_all(runs, command)
    assert not (runs[0] / "calls").exists()
    assert (runs[1] / "result.json").read_text() == '{"format": 1, "stat'
    with pytest.raises(DebiasError, match="`jobs` to be at least 1, but got 0"):
        run_all(runs, command, jobs=0)


def test_interrupted_is_an_exception_of_its_own():
    assert not issubclass(Interrupted, DebiasError)
    assert RunRecord("a", "r", "h", "erm", 0, "failed").finished is False
    assert os.path.basename(LOCK).startswith(".")
