"""debias: debiasing methods as PyTorch Lightning callbacks, on an unmodified LightningModule.

Public names are loaded on first use (PEP 562), so ``import debias`` costs no more than ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    # methods
    "DomainPenalisation": "debias.methods.domain_penalisation",
    "DomainPenalisationLoss": "debias.methods.domain_penalisation",
    "DomainPenalisationMixin": "debias.methods.domain_penalisation",
    "GroupDRO": "debias.methods.group_dro",
    "GroupDROLoss": "debias.methods.group_dro",
    "GroupDROMixin": "debias.methods.group_dro",
    "GroupReweighting": "debias.methods.group_reweighting",
    "GroupReweightingLoss": "debias.methods.group_reweighting",
    "GroupReweightingMixin": "debias.methods.group_reweighting",
    # monitors
    "BoxStability": "debias.monitors.box_stability",
    "DetectionMonitor": "debias.monitors.detection_monitor",
    "GroupMonitor": "debias.monitors.group_monitor",
    # the step engine, for those who write a method
    "Debiaser": "debias.step.watcher",
    "LossCall": "debias.step.tap",
    "StepWatcher": "debias.step.watcher",
    "detection_losses": "debias.step.detection",
    "register_loss": "debias.step.adapters",
    # data
    "EvalSampler": "debias.data.samplers",
    "GroupBalancedSampler": "debias.data.samplers",
    "tag": "debias.data.tagging",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from debias.data.samplers import EvalSampler, GroupBalancedSampler
    from debias.data.tagging import tag
    from debias.methods.domain_penalisation import (
        DomainPenalisation,
        DomainPenalisationLoss,
        DomainPenalisationMixin,
    )
    from debias.methods.group_dro import GroupDRO, GroupDROLoss, GroupDROMixin
    from debias.methods.group_reweighting import GroupReweighting, GroupReweightingLoss, GroupReweightingMixin
    from debias.monitors.box_stability import BoxStability
    from debias.monitors.detection_monitor import DetectionMonitor
    from debias.monitors.group_monitor import GroupMonitor
    from debias.step.adapters import register_loss
    from debias.step.detection import detection_losses
    from debias.step.tap import LossCall
    from debias.step.watcher import Debiaser, StepWatcher


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
