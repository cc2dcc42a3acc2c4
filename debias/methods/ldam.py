"""LDAM: label-distribution-aware margins. Cao et al., NeurIPS 2019.

With N_c training samples of class c and the cosines z of a head with normalised features and weights::

    loss = CE(s (z - m_y e_y))              m_c = max_margin N_c^-1/4 / max_j N_j^-1/4

On ordinary logits these margins mean nothing: the head has to be a :class:`debias.CosineLinear`. Deferred reweighting
(DRW) leaves all class weights at 1 until a given epoch, then they are those of :class:`debias.ClassBalanced`.

Published: reweighting from epoch 160 of 200 on.

Needs the logits and classes of a cross-entropy, and the classes of the training set, which are counted once. Costs a
few kernels on the logits; no second pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.methods.base import ClassCriterion
from debias.ops.arguments import MOST, check_count, checked
from debias.ops.class_counts import class_balanced_weights
from debias.ops.fields import arguments
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["LDAM", "CosineLinear", "ldam_loss", "ldam_margins"]


@checked("class_counts: float C | int C", max_margin="(0, inf)")
def ldam_margins(class_counts: Tensor, *, max_margin: float = 0.5) -> Tensor:
    """Margins ``N_c^-1/4``, the largest of them ``max_margin``.

    Args:
        class_counts: training samples ``(C,)``; a class without any counts as one with one.
        max_margin: of the rarest class, in units of the cosine.

    Returns:
        ``(C,)``.
    """
    raw = class_counts.clamp_min(1) ** -0.25
    return raw * (max_margin / raw.max())


@checked("cosines: float N C, targets: int N < C, margins: float C", scale="(0, inf)")
def ldam_loss(cosines: Tensor, targets: Tensor, margins: Tensor, *, scale: float = 30.0) -> Tensor:
    """Cross-entropy in which the true class has to win by its margin.

    Args:
        cosines: logits of a normalised head ``(N, C)``.
        targets: class ids ``(N,)``.
        margins: ``(C,)``.
        scale: s, the inverse temperature.

    Returns:
        Losses ``(N,)``.
    """
    return F.cross_entropy(scale * (cosines - margin_at_target(targets, margins, cosines)), targets, reduction="none")


def margin_at_target(targets: Tensor, margins: Tensor, logits: Tensor) -> Tensor:
    """The margin at the true class, 0 elsewhere, in the shape of the logits ``(N, C, ...)``; without waiting."""
    classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    return (targets.unsqueeze(1) == classes) * margins.to(logits.dtype).view_as(classes)


class CosineLinear(nn.Module):
    """A classifier head whose logits are cosines: normalised features times normalised weights, as LDAM needs.

    Args:
        in_features: width of the features.
        out_features: number of classes.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_count("in_features", in_features, highest=MOST)
        check_count("out_features", out_features, highest=MOST)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines ``(N, out_features)`` of features ``(N, in_features)``."""
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


@arguments(max_margin="(0, inf)", scale="(0, inf)", reweight_epoch="[0, inf)", beta="[0, 1)")
class LDAM(ClassCriterion):
    """Ask for margins that grow as classes are rarer, optionally with deferred reweighting.

    Guessing frequent classes is a shortcut, and the few samples of a rare class are soon fitted without giving it any
    room; a wider margin makes room for it.

    The head has to give cosines (:class:`debias.CosineLinear`); at the test the largest cosine decides, as ever.

    Args:
        max_margin: margin of the rarest class.
        scale: inverse temperature s.
        reweight_epoch: from this epoch on classes are weighed too (DRW); never by default. Published: epoch 160 of 200.
        beta: of these weights, see :class:`debias.ClassBalanced`.
        check_logits: refuse logits beyond [-1, 1], of which margins would mean nothing; False for those who want it.
    """

    reference = "Cao et al., NeurIPS 2019"
    works = "Classes are rare and the head compares directions: normalised features and weights."
    fails = "Ordinary logits, on which its margins mean nothing. It balances classes, not groups inside them."

    max_margin: float = 0.5
    scale: float = 30.0
    reweight_epoch: int | None = None
    beta: float = 0.9999
    check_logits: bool = True

    def elements(self, call: LossCall, step: Step) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the scaled logits, less the margin at the true class."""
        logits, den, ids = self.logits_of(call), call.record.elements[1], self.ids(call)
        # Reading it waits for the device: on logging steps only.
        if self.check_logits and step.logging and (largest := float(logits.detach().abs().max())) > 1 + 1e-3:
            raise DebiasError(
                f"Expected logits that are cosines for {self.state_key}, but got {largest:.3g}: margins in units of the"
                " cosine mean nothing there. Make the head a `debias.CosineLinear`, or pass `check_logits=False`."
            )
        margins = ldam_margins(self.module.counts, max_margin=self.max_margin).to(logits.dtype)
        num = self.again(call, self.scale * (logits - margin_at_target(ids, margins, logits)))
        if self.reweight_epoch is not None and step.epoch >= self.reweight_epoch:
            weights = class_balanced_weights(self.module.counts, beta=self.beta).to(num.dtype)[ids]
            num, den = num * weights, den * weights
        return num, den
