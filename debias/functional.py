"""The methods' maths as pure functions: tensors in, tensors out."""

from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_reweighting import inverse_frequency_weights
from debias.ops.shifts import crafted_shift, held_out_mean, sample_keys, select_setting, two_fold_score

__all__ = [
    "crafted_shift",
    "greedy_group_weights",
    "group_dro_weights",
    "held_out_mean",
    "inverse_frequency_weights",
    "sample_keys",
    "select_setting",
    "two_fold_score",
]
