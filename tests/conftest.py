"""Fixtures shared by all tests. This folder is on the import path: helpers are `from _support import ...`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from _support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Ranks]:
    """Two processes of one gloo group."""
    two = Ranks(warning_filters=pytestconfig.getini("filterwarnings"))
    yield two
    two.close()
