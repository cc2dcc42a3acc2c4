"""Does a model use a shortcut, which one, whom does it hurt, what to do, and what helped?

``debias.audit`` is a room with a door: calling it audits a model (:func:`debias.audit.model.audit`), and
``debias.audit.audit_predictions`` a table of predictions. What each part of the report is made of:

========================  ==========================================================================================
``groups.py``             whom does it hurt: the metric of every group and crossing, fairness measures
``shortcuts.py``          is it a shortcut: association with the label, and the lean of the predictions
``features.py``           how well a column is read from the features, and what happens when it is erased
``slices.py``             groups that nobody names
``predictivity.py``       what a network would learn, before it is trained
``findings.py``           all that in plain words; ``advice.py`` what to do about it
``paired.py``             what helped: two models on the same samples
``report.py``             tables, JSON, CSV and the page
========================  ==========================================================================================
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from debias.extras import needs_extra

__all__ = ["Report", "audit", "audit_predictions", "before_training", "compare_predictions"]

_FROM = {
    "Report": "debias.audit.report",
    "audit_predictions": "debias.audit.run",
    "before_training": "debias.audit.predictivity",
    "compare_predictions": "debias.audit.paired",
}


def _load(module: str) -> ModuleType:
    """Import a module; where a package of the extra is missing, say so in one sentence."""
    with needs_extra("audit"):
        return import_module(module)


class _Room(ModuleType):
    """This package: its name is also that of the function, and Python gives the name to the package."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Audit a model; see :func:`debias.audit.model.audit`."""
        return _load("debias.audit.model").audit(*args, **options)


sys.modules[__name__].__class__ = _Room
audit = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(_load(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
