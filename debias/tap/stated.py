"""Losses that no function of torch shows: the step states them itself, ``{"loss", "losses"}`` or ``{"loss", "logits",
"targets"}``, or they are registered (:mod:`debias.tap.adapters`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import SPLIT, LossNotFoundError, RowsError
from debias.ops.distributed import global_sum
from debias.tap.calls import LossCall
from debias.tap.losses import HALF, unreduced
from debias.tap.mixing import unmixable
from debias.tap.tap import LossTap

__all__ = ["check_registered", "check_stated", "stated_losses"]


def stated_losses(output: Any, tap: LossTap, *, beside: bool = False) -> tuple[LossCall, Tensor] | None:
    """The loss of a step that returns its per-sample losses, or its logits and targets; and its mean as it stands.

    Args:
        output: what the step has returned.
        tap: of the step.
        beside: the step has computed losses that can be taken apart. Then those are meant, unless the losses of the
            samples are returned, with gradients.
    """
    if not isinstance(output, Mapping):
        return None
    losses, logits, target = (output.get(name) for name in ("losses", "logits", "targets"))
    n = None if tap.tracker is None else tap.tracker.n
    if beside and not (isinstance(losses, Tensor) and losses.requires_grad and _has_rows(losses, n)):
        return None  # something of this name that the step only logs
    per_sample: Any = _loss_of
    if isinstance(losses, Tensor):
        name, per_sample = "losses", lambda *_: losses
        if tap.mixture is not None and tap.mixture.mixes:
            raise unmixable("losses", "the step returns them computed, with the labels of the samples themselves")
    elif isinstance(logits, Tensor) and isinstance(target, Tensor):
        name = "logits"
    else:
        return None
    call, elements, den = tap.stated(name, (logits, target), per_sample)
    if not _has_rows(elements, n):
        raise RowsError(
            f"Expected the returned `{name}` to have one row for each of the {'' if n is None else f'{n} '}samples, but"
            f" got shape {tuple(elements.shape)}. Return per-sample values, unreduced."
        )
    if not elements.requires_grad:
        raise LossNotFoundError(
            f"Expected the returned `{name}` to require a gradient, but they are detached. Return them as computed."
        )
    if tap.tracker is None:
        call.record.samples = lambda shape: None
    elif name == "losses":
        call.record.samples = functools.partial(tap.samples, call, of=elements)
    return call, elements.sum() / den.sum()


def _has_rows(x: Tensor, n: int | None) -> bool:
    """Whether a tensor has a row for each of ``n`` samples; for each of some where None."""
    return x.ndim > 0 and n in (None, len(x))


def _differs(a: Tensor, b: Tensor, *made_of: Any) -> Tensor:
    rounding = 2e-2 if any(x.dtype in HALF for x in (a, b, *made_of) if isinstance(x, Tensor)) else 1e-5
    return ((a - b).abs() > rounding * (1 + b.abs())).any()  # NaN is a bad row, said elsewhere


def check_stated(loss: Tensor, call: LossCall, plain: Tensor) -> None:
    """Refuse what is stated beside another loss than its mean; waits for the device.

    Of logits and targets the returned loss must be the mean cross-entropy. The mean of losses must be a part of it:
    what is put in its place is the debiased mean, so each loss must count as much as in the mean. Where the returned
    loss was computed some other way, only being equal to the mean tells.
    """
    share = None
    if call.name == "losses" and loss.requires_grad:
        (share,) = torch.autograd.grad(loss.sum(), call.record.elements[0], retain_graph=True, allow_unused=True)
    if share is None:
        differs = _differs(loss.detach(), plain.detach())
    else:
        # Relative to the mean's own shares, so that rounding is that of numbers near one.
        differs = _differs(share * share.numel(), torch.ones_like(share))
    if not global_sum(differs.float()):  # all ranks raise, or none
        return
    if call.name == "logits":
        raise LossNotFoundError(
            "Expected the returned `loss` to be the mean cross-entropy (binary where the targets are floats of the"
            " shape of the logits) of the returned `logits` and `targets`, since nothing else says what it is per"
            f" sample, but got {loss.mean().item():.6g} where that is {plain.item():.6g}. Return {{'loss': loss,"
            " 'losses': per_sample} with losses of shape (N,), or compute the loss with a torch loss function."
        )

    what = "was not computed from them" if share is None else "counts them otherwise"
    raise LossNotFoundError(
        "Expected the returned `loss` to be the mean of the returned `losses`, plus what else there is, as the mean"
        f" is what a method replaces, but got one that {what}. Put factors into the losses"
        " (`losses = 0.1 * losses; loss = losses.mean() + other`); where a mask or weights reduce them, use a torch"
        " loss function with `reduction='none'`, or `debias.register_loss`, so that the reduction is seen."
    )


def check_registered(calls: Iterable[LossCall]) -> None:
    """Refuse registered losses that return something else than the mean of what their adapters compute; waits for the
    device. All ranks pass the same ones.
    """
    for call in calls:
        if call.record.registered is None:
            continue
        returned, losses, den = call.record.registered
        precise = torch.promote_types(losses.dtype, torch.float32)
        mean = losses.detach().sum(dtype=precise) / den.sum(dtype=precise)
        if not global_sum(_differs(returned, mean, losses, call.logits).float()):
            continue
        raise LossNotFoundError(
            f"Expected the registered loss `{call.name}` to return the mean of what its `per_sample` computes, which"
            f" methods work with, but got {returned.item():.6g} where the mean is {mean.item():.6g}. Return"
            " from `per_sample` what the loss averages, with its factors and without random numbers of its own; where"
            " it divides by something else than their number, (numerators, denominators). A loss that compares whole"
            f" sets, such as a Dice loss over the batch, has no such form. {SPLIT}"
        )


def _loss_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and whether each counts: a target of -100 does not."""
    loss: Any = F.cross_entropy
    if target.is_floating_point() and target.shape == logits.shape:
        loss = F.binary_cross_entropy_with_logits
    elif target.shape != (*logits.shape[:1], *logits.shape[2:]):
        raise RowsError(
            "Expected the returned `targets` to be classes, one for each row of the returned `logits`, with the classes"
            f" along axis 1 of these, but got shapes {tuple(target.shape)} and {tuple(logits.shape)}. Return logits"
            " (N, C) or (N, C, ...), as torch's `cross_entropy` takes them: `logits.transpose(1, 2)`."
        )
    losses = unreduced(loss, {"input": logits, "target": target})
    return losses, losses.new_ones(()) if target.is_floating_point() else (target != -100).to(losses.dtype)
