"""The methods as mixins for a LightningModule."""

from debias.methods.domain_penalisation import DomainPenalisationMixin
from debias.methods.group_dro import GroupDROMixin
from debias.methods.group_reweighting import GroupReweightingMixin

__all__ = ["DomainPenalisationMixin", "GroupDROMixin", "GroupReweightingMixin"]
