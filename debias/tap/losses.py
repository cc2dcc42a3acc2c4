"""The losses of torch: their arguments, their values without the reduction, and what each element counts with.

Per element a loss is a numerator ``num_i`` and a denominator ``den_i``, with ``mean = sum num / sum den``: with class
weights, ``ignore_index``, spatial targets or label smoothing a mean of means per sample would be wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from debias.tap.moves import named

__all__ = [
    "COMPARING",
    "FORM",
    "HALF",
    "LOSSES",
    "NAMES",
    "NOT_PER_SAMPLE",
    "SYMMETRIC",
    "UNMIXABLE",
    "class_weights",
    "reduction_of",
    "unreduced",
]

HALF = (torch.float16, torch.bfloat16)


def reduction_of(arguments: dict[str, Any]) -> str:
    """The reduction that a loss was called with, also by the names of before ``reduction``."""
    size_average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if size_average is not None or reduce is not None:
        return legacy_get_string(size_average, reduce, emit_warning=False)
    return str(arguments.get("reduction", "mean"))


def _count(elements: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Divided by the number of elements, or by that of rows."""
    by_rows = reduction_of(arguments) == "batchmean"
    return elements.new_full((), elements.shape[0] / max(elements.numel(), 1) if by_rows else 1)


def class_weights(elements: Tensor, arguments: dict[str, Any]) -> Tensor:
    """CE and NLL with class indices divide by the weights of the targets that count."""
    target, weight = arguments["target"], arguments.get("weight")
    if target.is_floating_point():
        return elements.new_ones(())
    counts = target != arguments.get("ignore_index", -100)
    if weight is None:
        return counts.to(elements.dtype)
    # An ignored target may be no class at all, so it must not be looked up.
    return torch.where(counts, weight.detach()[torch.where(counts, target, 0)].to(elements.dtype), 0)


def _weights(elements: Tensor, arguments: dict[str, Any]) -> Tensor:
    weight = arguments.get("weight")
    return elements.new_ones(()) if weight is None else weight.detach().to(elements.dtype).expand(elements.shape)


# Denominator of each torch loss, per element of its reduction="none".
LOSSES: dict[Any, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    F.cross_entropy: class_weights,
    F.nll_loss: class_weights,
    F.mse_loss: _weights,
    F.l1_loss: _weights,
    F.smooth_l1_loss: _count,
    F.huber_loss: _count,
    F.kl_div: _count,
    F.binary_cross_entropy: _count,
    F.binary_cross_entropy_with_logits: _count,
    F.gaussian_nll_loss: _count,
    F.poisson_nll_loss: _count,
    F.soft_margin_loss: _count,
    F.hinge_embedding_loss: _count,
    F.margin_ranking_loss: _count,
    F.cosine_embedding_loss: _count,
    F.multi_margin_loss: _count,
    F.multilabel_margin_loss: _count,
    F.multilabel_soft_margin_loss: _count,
    F.triplet_margin_loss: _count,
    F.ctc_loss: _count,
}
# Losses without a per-sample form here; reaching the returned loss they are refused, never left out in silence.
NOT_PER_SAMPLE = named(
    "ctc_loss linear_cross_entropy triplet_margin_with_distance_loss kl_div hinge_embedding_loss poisson_nll_loss"
    " margin_ranking_loss cosine_embedding_loss triplet_margin_loss binary_cross_entropy_with_logits"
) - frozenset(LOSSES)
# Names of the arguments of each loss.
NAMES = {loss: tuple(inspect.signature(loss).parameters) for loss in LOSSES}
# Losses in which prediction and target may trade places.
SYMMETRIC = frozenset({F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss})

# Losses that compare inputs with each other.
COMPARING = frozenset({"triplet_margin_loss", "margin_ranking_loss", "cosine_embedding_loss"})
# Losses whose labels cannot be mixed: they have none for each sample, or lengths beside them.
UNMIXABLE = COMPARING | {"ctc_loss"}

# Arguments that are part of a loss's formula, beside logits and target.
FORM = frozenset({"weight", "pos_weight", "label_smoothing", "ignore_index"})


def unreduced(func: Any, arguments: dict[str, Any]) -> Tensor:
    """The loss per element, computed in at least float32 and outside autocast."""
    given = {
        name: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x
        for name, x in arguments.items()
        if name not in ("reduction", "size_average", "reduce")
    }
    device = next(x.device.type for x in given.values() if isinstance(x, Tensor))
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        losses: Tensor = func(**given, reduction="none")
    if func is F.ctc_loss and reduction_of(arguments) == "mean":  # a mean over samples, each over its length
        losses = losses / torch.as_tensor(arguments["target_lengths"], device=losses.device).clamp(min=1)
    return losses
