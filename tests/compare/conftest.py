"""Figures of reports are drawn coarsely: all that is in them is there, and they take less time."""

import pytest


@pytest.fixture(autouse=True)
def _coarse_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("debias.compare.report.DPI", 20)
