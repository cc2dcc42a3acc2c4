"""Every test that asks for `method` runs for every method; a new one joins by being exported."""

from __future__ import annotations

import pytest

from _support.cases import METHODS


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    """Name of a method in `_support.cases.METHODS`."""
    return request.param
