"""The methods' maths as pure functions: tensors in, tensors out."""

from debias.methods.coral import coral_penalty
from debias.methods.fishr import fishr_penalty
from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_reweighting import inverse_frequency_weights
from debias.methods.hessian_alignment import hessian_alignment_penalty
from debias.methods.irm import irm_penalty
from debias.methods.mmd import mmd_penalty
from debias.methods.vrex import vrex_penalty

__all__ = [
    "coral_penalty",
    "fishr_penalty",
    "greedy_group_weights",
    "group_dro_weights",
    "hessian_alignment_penalty",
    "inverse_frequency_weights",
    "irm_penalty",
    "mmd_penalty",
    "vrex_penalty",
]
