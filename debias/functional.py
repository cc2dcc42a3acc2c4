"""The methods' maths as pure functions: tensors in, tensors out."""

from debias.methods.adv_style import adversarial_style
from debias.methods.dsu import uncertain_style
from debias.methods.edge_view import canny_edges, otsu_threshold
from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_mixup import cutmix, mixup, selective_pairs
from debias.methods.group_reweighting import inverse_frequency_weights
from debias.methods.mixstyle import mix_style

__all__ = [
    "adversarial_style",
    "canny_edges",
    "cutmix",
    "greedy_group_weights",
    "group_dro_weights",
    "inverse_frequency_weights",
    "mix_style",
    "mixup",
    "otsu_threshold",
    "selective_pairs",
    "uncertain_style",
]
