"""The maths of methods and monitors as pure functions: tensors in, tensors out."""

import inspect

from debias.methods import *
from debias.monitors.attribute_probe import ledoit_wolf_shrinkage, probe_attribute
from debias.ops.shifts import crafted_shift, held_out_mean, sample_keys, select_setting, two_fold_score

__all__ = sorted(name for name, value in vars().items() if inspect.isfunction(value))
