"""The maths of methods and monitors as pure functions: tensors in, tensors out."""

from debias.methods.adv_style import adversarial_style
from debias.methods.coral import coral_penalty
from debias.methods.domain_penalisation import domain_penalisation_weights
from debias.methods.dsu import uncertain_style
from debias.methods.edge_view import canny_edges, otsu_threshold
from debias.methods.fishr import fishr_penalty
from debias.methods.group_dro import greedy_group_weights, group_dro_weights
from debias.methods.group_mixup import cutmix, mixup, selective_pairs
from debias.methods.group_reweighting import inverse_frequency_weights
from debias.methods.hessian_alignment import hessian_alignment_penalty
from debias.methods.identity_adversarial import bce_to_ce_strength, identity_losses
from debias.methods.irm import irm_penalty
from debias.methods.just_train_twice import error_weights
from debias.methods.learning_from_failure import failure_weights, generalized_cross_entropy
from debias.methods.mixstyle import mix_style
from debias.methods.mmd import mmd_penalty
from debias.methods.vrex import vrex_penalty
from debias.methods.worst_case import chi_square_weights, cvar_weights
from debias.monitors.attribute_probe import ledoit_wolf_shrinkage, probe_attribute
from debias.ops.class_counts import (
    class_balanced_weights,
    focal_loss,
    ldam_loss,
    ldam_margins,
    logit_adjustment,
)
from debias.ops.gradient_reversal import dann_ramp, gradient_reversal
from debias.ops.group_inference import (
    cluster_weights,
    eiil_groups,
    eiil_scores,
    error_groups,
    george_groups,
    spare_groups,
    useful_groups,
)
from debias.ops.last_layer import afr_weights, balanced_subset, disagreement_scores
from debias.ops.shifts import crafted_shift, held_out_mean, sample_keys, select_setting, two_fold_score

__all__ = [
    "adversarial_style",
    "afr_weights",
    "balanced_subset",
    "bce_to_ce_strength",
    "canny_edges",
    "chi_square_weights",
    "class_balanced_weights",
    "cluster_weights",
    "coral_penalty",
    "crafted_shift",
    "cutmix",
    "cvar_weights",
    "dann_ramp",
    "disagreement_scores",
    "domain_penalisation_weights",
    "eiil_groups",
    "eiil_scores",
    "error_groups",
    "error_weights",
    "failure_weights",
    "fishr_penalty",
    "focal_loss",
    "generalized_cross_entropy",
    "george_groups",
    "gradient_reversal",
    "greedy_group_weights",
    "group_dro_weights",
    "held_out_mean",
    "hessian_alignment_penalty",
    "identity_losses",
    "inverse_frequency_weights",
    "irm_penalty",
    "ldam_loss",
    "ldam_margins",
    "ledoit_wolf_shrinkage",
    "logit_adjustment",
    "mix_style",
    "mixup",
    "mmd_penalty",
    "otsu_threshold",
    "probe_attribute",
    "sample_keys",
    "select_setting",
    "selective_pairs",
    "spare_groups",
    "two_fold_score",
    "uncertain_style",
    "useful_groups",
    "vrex_penalty",
]
