"""The methods as mixins for a LightningModule."""

from debias.methods.domain_adversarial import DomainAdversarialMixin
from debias.methods.group_dro import GroupDROMixin
from debias.methods.group_reweighting import GroupReweightingMixin
from debias.methods.identity_adversarial import IdentityAdversarialMixin

__all__ = ["DomainAdversarialMixin", "GroupDROMixin", "GroupReweightingMixin", "IdentityAdversarialMixin"]
