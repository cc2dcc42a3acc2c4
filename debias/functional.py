"""The maths of methods and monitors as pure functions: tensors in, tensors out."""

import inspect

from debias.methods import *
from debias.monitors.attribute_probe import ledoit_wolf_shrinkage, probe_attribute
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

__all__ = sorted(name for name, value in vars().items() if inspect.isfunction(value))
