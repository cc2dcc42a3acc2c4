"""The maths of methods and monitors as pure functions: tensors in, tensors out."""

from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_reweighting import inverse_frequency_weights
from debias.methods.identity_adversarial import bce_to_ce_strength, identity_losses
from debias.monitors.attribute_probe import ledoit_wolf_shrinkage, probe_attribute
from debias.ops.gradient_reversal import dann_ramp, gradient_reversal

__all__ = [
    "bce_to_ce_strength",
    "dann_ramp",
    "gradient_reversal",
    "greedy_group_weights",
    "group_dro_weights",
    "identity_losses",
    "inverse_frequency_weights",
    "ledoit_wolf_shrinkage",
    "probe_attribute",
]
