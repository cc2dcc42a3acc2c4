"""Figures of reports, for tests that do not look at their pixels."""

import pytest


@pytest.fixture
def coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is in the figures is drawn, in a fourth less time."""
    monkeypatch.setattr("debias.compare.report.DPI", 20)
