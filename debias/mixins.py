"""The methods as mixins for a LightningModule."""

from debias.methods.coral import CORALMixin
from debias.methods.domain_adversarial import DomainAdversarialMixin
from debias.methods.domain_penalisation import DomainPenalisationMixin
from debias.methods.fishr import FishrMixin
from debias.methods.group_dro import GroupDROMixin
from debias.methods.group_reweighting import GroupReweightingMixin
from debias.methods.hessian_alignment import HessianAlignmentMixin
from debias.methods.identity_adversarial import IdentityAdversarialMixin
from debias.methods.irm import IRMMixin
from debias.methods.mmd import MMDMixin
from debias.methods.vrex import VRExMixin

__all__ = [
    "CORALMixin",
    "DomainAdversarialMixin",
    "DomainPenalisationMixin",
    "FishrMixin",
    "GroupDROMixin",
    "GroupReweightingMixin",
    "HessianAlignmentMixin",
    "IRMMixin",
    "IdentityAdversarialMixin",
    "MMDMixin",
    "VRExMixin",
]
