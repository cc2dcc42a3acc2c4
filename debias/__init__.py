"""debias: debiasing methods as PyTorch Lightning callbacks, on an unmodified LightningModule.

Public names are loaded on first use (PEP 562), so ``import debias`` costs no more than ``import torch``. Those of the
methods stand in ``debias/methods/__init__.py``, the others here.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    # monitors
    "GroupMonitor": "debias.monitors.group_monitor",
    "EnvironmentMonitor": "debias.monitors.environment_monitor",
    "MultilabelF1Monitor": "debias.monitors.multilabel_f1",
    "AttributeProbe": "debias.monitors.attribute_probe",
    "SampleRecorder": "debias.monitors.sample_recorder",
    "ShiftedValidation": "debias.monitors.shifted_validation",
    "DetectionMonitor": "debias.monitors.detection_monitor",
    "BoxStability": "debias.monitors.box_stability",
    # the audit: a room that can be called
    "audit": "debias.audit",
    # the step engine, for those who write a method
    "Debiaser": "debias.step.watcher",
    "LossCall": "debias.tap.calls",
    "StepWatcher": "debias.step.watcher",
    "detection_losses": "debias.step.detection",
    "register_loss": "debias.tap.adapters",
    # what adversaries are made of
    "GradientReversal": "debias.ops.gradient_reversal",
    # data, and what belongs to it
    "EvalSampler": "debias.data.samplers",
    "GroupBalancedSampler": "debias.data.samplers",
    "tag": "debias.data.tagging",
    "untag": "debias.data.tagging",
    # for those who have trained already
    "retrain_last_layer": "debias.methods.last_layer_retraining",
}

if TYPE_CHECKING:
    from debias.audit.model import audit
    from debias.data.samplers import EvalSampler, GroupBalancedSampler
    from debias.data.tagging import tag, untag
    from debias.methods import *
    from debias.methods.last_layer_retraining import retrain_last_layer
    from debias.monitors.attribute_probe import AttributeProbe
    from debias.monitors.box_stability import BoxStability
    from debias.monitors.detection_monitor import DetectionMonitor
    from debias.monitors.environment_monitor import EnvironmentMonitor
    from debias.monitors.group_monitor import GroupMonitor
    from debias.monitors.multilabel_f1 import MultilabelF1Monitor
    from debias.monitors.sample_recorder import SampleRecorder
    from debias.monitors.shifted_validation import ShiftedValidation
    from debias.ops.gradient_reversal import GradientReversal
    from debias.step.detection import detection_losses
    from debias.step.watcher import Debiaser, StepWatcher
    from debias.tap.adapters import register_loss
    from debias.tap.calls import LossCall


def _public() -> dict[str, str]:
    """Every public name and the module that it comes from."""
    methods = vars(import_module("debias.methods"))
    classes = {name: value.__module__ for name, value in methods.items() if inspect.isclass(value)}
    return classes | _EXPORTS


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name == "__all__":
        return ["__version__", *_public()]
    # `from debias import data` asks here before it looks for the folder.
    if not name.startswith("_") and find_spec(f"debias.{name}") is None and name in (public := _public()):
        return getattr(import_module(public[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *_public()])
