"""The page on writing a method, followed in a copy of the project: a registered, documented, conformant penalty."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from _support import forked

ROOT = Path(__file__).parents[1]
CHECKS = """
import inspect, sys
import debias, debias.functional, debias.mixins, debias.cli
sys.path.insert(0, "docs")
from method_pages import page
assert {"LossRange", "LossRangePenalty", "LossRangeMixin"} <= set(debias.__all__)
assert "loss_range_penalty" in debias.functional.__all__ and "LossRangeMixin" in debias.mixins.__all__
assert inspect.signature(debias.LossRange).parameters["power"].default == 2.0
assert "    power: what the range is raised to.\\n" in debias.LossRange.__doc__
assert ":: debias.LossRange\\n" in page("LossRange")
debias.cli.main(["methods"])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with what the page says in place."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("debias", "docs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    page = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    ((path, code),) = re.findall(r"^```python\n# (debias/methods/\w+\.py)\n(.*?)^```$", page, re.M | re.S)
    ((index, line),) = re.findall(r"^```text\n# (debias/methods/__init__\.py)\n(.*?)^```$", page, re.M | re.S)
    (copy / path).write_text(code, encoding="utf-8")
    with (copy / index).open("a", encoding="utf-8") as file:
        file.write(line)
    return copy


def run(project, code):
    """Run ``code`` in a process that has imported nothing of ours yet."""
    code = (
        "import sys\nfor name in [n for n in sys.modules if n.split('.')[0] in ('debias', '_support')]:\n"
        f"    del sys.modules[name]\n{code}"
    )
    environment = os.environ | {"PYTHONPATH": str(project)}
    done = forked.run([sys.executable, "-c", code], cwd=project, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(project, *words):
    # A plugin of somebody else may have been imported before, and says so.
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    words = [*words, "-n0", "-p", "no:cacheprovider", *quiet]
    return run(project, f"import pytest, sys\nsys.exit(pytest.main({words}))")


def test_one_file_and_one_line_register_and_document_a_method(project):
    assert re.search(r"LossRange .*Make the", run(project, CHECKS))


def test_the_conformance_suite_runs_it(project):
    """Resuming, bad rows, YAML, and what a step waits for; the rest is slow."""
    chosen = "LossRange and (bitwise or bad_rows or yaml or no_host_sync or mixes_no_devices)"
    said = run_tests(project, "tests/conformance", "-q", "-k", chosen)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 8


@pytest.mark.slow
def test_it_passes_the_whole_conformance_suite(project):
    words = ["-m", "pytest", "tests/conformance", "-q", "-k", "LossRange", "-n0", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(project)}  # which its ranks import, too
    said = subprocess.check_output([sys.executable, *words], cwd=project, env=environment, text=True, timeout=280)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 40


def test_a_method_without_its_fixture_fails_alone(project):
    """An argument that the suite cannot fill stops nobody else's tests from being collected."""
    path = project / "debias" / "methods" / "needy.py"
    index = project / "debias" / "methods" / "__init__.py"
    before = index.read_text()
    path.write_text(
        "from debias import Debiaser\n\n__all__ = ['Needy']\n\n\nclass Needy(Debiaser):\n"
        "    def __init__(self, n_domains: int, unheard_of: int) -> None:\n        super().__init__()\n"
    )
    try:
        index.write_text(before + "from debias.methods.needy import *\n")
        with pytest.raises(AssertionError, match=r"(?s)Needy needs \['unheard_of'\].*1 failed, [1-9]\d\d deselected"):
            run_tests(project, "tests/conformance/test_steps.py", "-k", "Needy and changes_training")
    finally:
        index.write_text(before)
        path.unlink()
