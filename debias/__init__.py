"""debias: debiasing methods as PyTorch Lightning callbacks, on an unmodified LightningModule.

Public names are loaded on first use (PEP 562), so ``import debias`` costs no more than ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    # methods
    # -- reweighing
    "GroupDRO": "debias.methods.group_dro",
    "GroupDROLoss": "debias.methods.group_dro",
    "GroupDROMixin": "debias.methods.group_dro",
    "DomainPenalisation": "debias.methods.domain_penalisation",
    "DomainPenalisationLoss": "debias.methods.domain_penalisation",
    "DomainPenalisationMixin": "debias.methods.domain_penalisation",
    "GroupReweighting": "debias.methods.group_reweighting",
    "GroupReweightingLoss": "debias.methods.group_reweighting",
    "GroupReweightingMixin": "debias.methods.group_reweighting",
    # -- reweighing without group labels
    "CVaRDRO": "debias.methods.worst_case",
    "CVaRLoss": "debias.methods.worst_case",
    "ChiSquareDRO": "debias.methods.worst_case",
    "ChiSquareLoss": "debias.methods.worst_case",
    "InferGroups": "debias.methods.infer_groups",
    "JustTrainTwice": "debias.methods.just_train_twice",
    "LearningFromFailure": "debias.methods.learning_from_failure",
    "LogitAdjustment": "debias.methods.class_imbalance",
    "ClassBalanced": "debias.methods.class_imbalance",
    "LDAM": "debias.methods.class_imbalance",
    "FocalLoss": "debias.methods.class_imbalance",
    "CosineLinear": "debias.methods.class_imbalance",
    # -- penalties
    "HessianAlignment": "debias.methods.hessian_alignment",
    "HessianAlignmentPenalty": "debias.methods.hessian_alignment",
    "HessianAlignmentMixin": "debias.methods.hessian_alignment",
    "Fishr": "debias.methods.fishr",
    "FishrPenalty": "debias.methods.fishr",
    "FishrMixin": "debias.methods.fishr",
    "IRM": "debias.methods.irm",
    "IRMPenalty": "debias.methods.irm",
    "IRMMixin": "debias.methods.irm",
    "VREx": "debias.methods.vrex",
    "VRExPenalty": "debias.methods.vrex",
    "VRExMixin": "debias.methods.vrex",
    "CORAL": "debias.methods.coral",
    "CORALPenalty": "debias.methods.coral",
    "CORALMixin": "debias.methods.coral",
    "MMD": "debias.methods.mmd",
    "MMDPenalty": "debias.methods.mmd",
    "MMDMixin": "debias.methods.mmd",
    # -- adversaries
    "IdentityAdversarial": "debias.methods.identity_adversarial",
    "IdentityAdversarialLoss": "debias.methods.identity_adversarial",
    "IdentityAdversarialMixin": "debias.methods.identity_adversarial",
    "DomainAdversarial": "debias.methods.domain_adversarial",
    "DomainAdversarialLoss": "debias.methods.domain_adversarial",
    "DomainAdversarialMixin": "debias.methods.domain_adversarial",
    "GradientReversal": "debias.ops.gradient_reversal",
    # -- augmentation
    "MixStyle": "debias.methods.mixstyle",
    "MixStyleLayer": "debias.methods.mixstyle",
    "DSU": "debias.methods.dsu",
    "DSULayer": "debias.methods.dsu",
    "AdvStyle": "debias.methods.adv_style",
    "AdvStyleLayer": "debias.methods.adv_style",
    "GroupMixup": "debias.methods.group_mixup",
    "GroupMixupLayer": "debias.methods.group_mixup",
    "EdgeView": "debias.methods.edge_view",
    "EdgeViewLayer": "debias.methods.edge_view",
    "CraftedShifts": "debias.methods.crafted_shifts",
    # -- last layer
    "LastLayerFit": "debias.methods.last_layer_retraining",
    "LastLayerRetraining": "debias.methods.last_layer_retraining",
    "retrain_last_layer": "debias.methods.last_layer_retraining",
    # monitors
    "GroupMonitor": "debias.monitors.group_monitor",
    "MultilabelF1Monitor": "debias.monitors.multilabel_f1",
    "AttributeProbe": "debias.monitors.attribute_probe",
    "SampleRecorder": "debias.monitors.sample_recorder",
    "ShiftedValidation": "debias.monitors.shifted_validation",
    "DetectionMonitor": "debias.monitors.detection_monitor",
    "BoxStability": "debias.monitors.box_stability",
    # the step engine, for those who write a method
    "Debiaser": "debias.step.watcher",
    "LossCall": "debias.step.tap",
    "StepWatcher": "debias.step.watcher",
    "detection_losses": "debias.step.detection",
    "register_loss": "debias.step.adapters",
    # data, and what belongs to it
    "EvalSampler": "debias.data.samplers",
    "GroupBalancedSampler": "debias.data.samplers",
    "tag": "debias.data.tagging",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from debias.data.samplers import EvalSampler, GroupBalancedSampler
    from debias.data.tagging import tag
    from debias.methods.adv_style import AdvStyle, AdvStyleLayer
    from debias.methods.class_imbalance import LDAM, ClassBalanced, CosineLinear, FocalLoss, LogitAdjustment
    from debias.methods.coral import CORAL, CORALMixin, CORALPenalty
    from debias.methods.crafted_shifts import CraftedShifts
    from debias.methods.domain_adversarial import DomainAdversarial, DomainAdversarialLoss, DomainAdversarialMixin
    from debias.methods.domain_penalisation import (
        DomainPenalisation,
        DomainPenalisationLoss,
        DomainPenalisationMixin,
    )
    from debias.methods.dsu import DSU, DSULayer
    from debias.methods.edge_view import EdgeView, EdgeViewLayer
    from debias.methods.fishr import Fishr, FishrMixin, FishrPenalty
    from debias.methods.group_dro import GroupDRO, GroupDROLoss, GroupDROMixin
    from debias.methods.group_mixup import GroupMixup, GroupMixupLayer
    from debias.methods.group_reweighting import GroupReweighting, GroupReweightingLoss, GroupReweightingMixin
    from debias.methods.hessian_alignment import HessianAlignment, HessianAlignmentMixin, HessianAlignmentPenalty
    from debias.methods.identity_adversarial import (
        IdentityAdversarial,
        IdentityAdversarialLoss,
        IdentityAdversarialMixin,
    )
    from debias.methods.infer_groups import InferGroups
    from debias.methods.irm import IRM, IRMMixin, IRMPenalty
    from debias.methods.just_train_twice import JustTrainTwice
    from debias.methods.last_layer_retraining import LastLayerFit, LastLayerRetraining, retrain_last_layer
    from debias.methods.learning_from_failure import LearningFromFailure
    from debias.methods.mixstyle import MixStyle, MixStyleLayer
    from debias.methods.mmd import MMD, MMDMixin, MMDPenalty
    from debias.methods.vrex import VREx, VRExMixin, VRExPenalty
    from debias.methods.worst_case import ChiSquareDRO, ChiSquareLoss, CVaRDRO, CVaRLoss
    from debias.monitors.attribute_probe import AttributeProbe
    from debias.monitors.box_stability import BoxStability
    from debias.monitors.detection_monitor import DetectionMonitor
    from debias.monitors.group_monitor import GroupMonitor
    from debias.monitors.multilabel_f1 import MultilabelF1Monitor
    from debias.monitors.sample_recorder import SampleRecorder
    from debias.monitors.shifted_validation import ShiftedValidation
    from debias.ops.gradient_reversal import GradientReversal
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
