"""The base classes that methods are made of.

A method that reads ids and reweighs is a :class:`GroupDebiaser` or a :class:`DomainDebiaser`; one that adds a penalty
on how domains differ a :class:`DomainPenalty`, on features a :class:`FeaturePenalty`, on the loss as a function of its
logits a :class:`LossPenalty`, on the classifier head a :class:`HeadPenalty`; one with an adversary an :class:`AdversarialDebiaser`; one that changes what layers put out a
:class:`LayerAugmenter`. All of them are :class:`Method`, whose arguments are fields.
"""

from debias.methods.base.adversary import AdversarialDebiaser, AdversaryLoss, AdversaryOptions, make_mlp
from debias.methods.base.layers import LayerAugmenter
from debias.methods.base.method import InstanceOptions, KeyedMethod, LossOptions, Method
from debias.methods.base.mixins import configures
from debias.methods.base.owned import users_optimizer
from debias.methods.base.penalty import DomainPenalty, FeaturePenalty, HeadPenalty, LossPenalty
from debias.methods.base.reweighing import DomainDebiaser, GroupDebiaser, ReweighingMethod

__all__ = [
    "AdversarialDebiaser",
    "AdversaryLoss",
    "AdversaryOptions",
    "DomainDebiaser",
    "DomainPenalty",
    "FeaturePenalty",
    "GroupDebiaser",
    "HeadPenalty",
    "InstanceOptions",
    "KeyedMethod",
    "LayerAugmenter",
    "LossOptions",
    "LossPenalty",
    "Method",
    "ReweighingMethod",
    "configures",
    "make_mlp",
    "users_optimizer",
]
