"""The methods' maths as pure functions: tensors in, tensors out."""

from debias.methods.domain_penalisation import domain_penalisation_weights
from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_reweighting import inverse_frequency_weights

__all__ = ["domain_penalisation_weights", "greedy_group_weights", "group_dro_weights", "inverse_frequency_weights"]
