"""Fixtures shared by all tests. This folder is on the import path: helpers are `from _support import ...`."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test process for each core already; before torch is imported

if TYPE_CHECKING:
    from _support.ranks import Ranks  # imports torch, which the process that only hands out tests does without

gc.disable()  # until all is imported and collected, which makes none

if importlib.util.find_spec("kornia") is None:  # it needs Python 3.11
    collect_ignore = [
        "cli/test_gallery.py",
        "cli/test_shift_selection.py",
        "methods/test_crafted_shifts.py",
        "monitors/test_shifted_validation.py",
        "ops/test_shifts.py",
    ]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for garbage less often: after every 10,000 new objects, where a training step makes hundreds."""
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Leave torch, Lightning, thousands of tests, and what has been compiled out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["host reads along", "nothing is read"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice; the second time as on a GPU, where values may be read in few steps, as that waits for it."""
    if request.param == "nothing is read":
        from debias.ops import arguments

        monkeypatch.setattr(arguments, "on_host", lambda x: False)
    return request.param


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Ranks]:
    """Two processes of one gloo group."""
    from _support.ranks import Ranks

    two = Ranks(warning_filters=pytestconfig.getini("filterwarnings"))
    yield two
    two.close()


@pytest.fixture(scope="session")
def four_ranks(pytestconfig: pytest.Config) -> Iterator[Ranks]:
    """Four processes of one gloo group."""
    from _support.ranks import Ranks

    four = Ranks(4, warning_filters=pytestconfig.getini("filterwarnings"))
    yield four
    four.close()
