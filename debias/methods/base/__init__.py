"""The base classes that methods are made of.

All of them are a :class:`Method`, whose arguments are fields; a :class:`OneLossMethod` works with one of a step's
losses, a :class:`NumberedMethod` keeps something of each sample. One that works with ids is a :class:`KeyedMethod`:

- a :class:`GroupDebiaser` or :class:`DomainDebiaser` reweighs the loss;
- a :class:`DomainPenalty` adds a penalty on how the losses of domains differ, a :class:`FeaturePenalty` on features, a
  :class:`LossPenalty` on the loss as a function of its logits, a :class:`HeadPenalty` on the classifier head;
- an :class:`AdversarialDebiaser` has an adversary on the features.

Others read no ids: a :class:`WorstCase` weighs the samples of a batch, a :class:`Criterion` changes the loss function,
a :class:`TwoStage` watches a plainly trained network first, a :class:`LayerAugmenter` changes what layers put out.
"""

from debias.methods.base.adversary import AdversarialDebiaser
from debias.methods.base.adversary_loss import AdversaryLoss, AdversaryOptions, make_mlp
from debias.methods.base.criterion import ClassCriterion, Criterion
from debias.methods.base.layers import LayerAugmenter
from debias.methods.base.method import InstanceOptions, KeyedMethod, LossOptions, Method, NumberedMethod, OneLossMethod
from debias.methods.base.mixins import calls, configures
from debias.methods.base.owned import users_optimizer
from debias.methods.base.penalty import DomainPenalty, FeaturePenalty, HeadPenalty, LossPenalty
from debias.methods.base.reweighing import DomainDebiaser, GroupDebiaser, ReweighingMethod
from debias.methods.base.two_stage import TwoStage
from debias.methods.base.worst_case import WorstCase

__all__ = [
    "AdversarialDebiaser",
    "AdversaryLoss",
    "AdversaryOptions",
    "ClassCriterion",
    "Criterion",
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
    "NumberedMethod",
    "OneLossMethod",
    "ReweighingMethod",
    "TwoStage",
    "WorstCase",
    "calls",
    "configures",
    "make_mlp",
    "users_optimizer",
]
