"""The methods' maths as pure functions: tensors in, tensors out."""

from debias.methods.dsu import uncertain_style
from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_reweighting import inverse_frequency_weights
from debias.methods.mixstyle import mix_style

__all__ = [
    "greedy_group_weights",
    "group_dro_weights",
    "inverse_frequency_weights",
    "mix_style",
    "uncertain_style",
]
