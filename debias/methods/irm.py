"""IRM (v1): no domain alone should want to rescale the logits. Arjovsky et al. 2019, arXiv 1907.02893, section 3.

With ``D_e`` the derivative of domain e's mean loss with respect to a scale s on its logits, at s = 1::

    D_e = d/ds L_e(s z) = mean over e of <r_i, z_i>          r_i = d l_i / d z_i, the residual

    penalty = 1/E sum_e  D_e^2                   form="squared"   (the paper's Colored MNIST code)
              1/E sum_e  D_e(even) D_e(odd)      form="unbiased"  (the paper's appendix; DomainBed, WILDS)

so it needs no second differentiation, and any network will do. The product over a domain's samples of even and odd
position estimates the square of the expected derivative without bias; it can be negative.

Published: DomainBed weight 100 (searched 0.1 to 1e5), at weight 1 for the first 500 steps, Adam reset at the switch;
Colored MNIST weight 91257 after 190 steps, with the whole loss divided by it.

A domain absent from the batch has no part in it; nor, in the unbiased form, has one with a single sample, whose odd
half is empty. Positions are counted over the ranks in their order, so the halves are those of one process. Costs one
all-reduce of 2 E floats (4 E, and one of ranks x E). Needs logits and targets of a cross-entropy, binary cross-entropy
or squared error, and domain ids; no features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from debias.methods.base import LossPenalty, configures
from debias.ops.arguments import checked
from debias.ops.distributed import global_rank, global_sum, world_size
from debias.ops.fields import arguments
from debias.ops.head_statistics import HeadLoss, domain_mean, make_head_loss, make_members
from debias.ops.penalties import LossPenaltyModule, PenaltyOptions
from debias.ops.precision import in_full_precision

__all__ = ["IRM", "IRMMixin", "IRMPenalty", "irm_penalty"]

Form = Literal["unbiased", "squared"]


@checked("logits: float N C | float N, targets: int N < C | any ..., domains: int N < n_domains | bool N n_domains")
@in_full_precision
def irm_penalty(
    logits: Tensor,
    targets: Tensor,
    domains: Tensor,
    n_domains: int,
    *,
    form: Form = "unbiased",
    loss: str = "cross_entropy",
    **loss_options: Any,
) -> Tensor:
    """The penalty of one batch.

    Args:
        logits: ``(N, C)``, or ``(N,)`` for the binary cross-entropy and the squared error.
        targets: targets of the loss.
        domains: int64 ``(N,)``, negative where unlabelled, or boolean membership ``(N, E)``.
        n_domains: number of domains E.
        form: ``"unbiased"`` or ``"squared"``.
        loss: ``"cross_entropy"``, ``"binary_cross_entropy"`` or ``"squared_error"``.
        **loss_options: ``weight``, ``label_smoothing``, ``ignore_index``, ``pos_weight``.

    Returns:
        Scalar.

    Example:
        >>> import torch
        >>> from debias.functional import irm_penalty
        >>> logits = torch.tensor([[0.0], [2.0]])
        >>> irm_penalty(logits, torch.ones(2, 1), torch.tensor([0, 1]), 2, form="squared", loss="binary_cross_entropy")
        tensor(0.0284)
    """
    members = make_members(domains, n_domains, len(logits))
    return scale_derivative_penalty(make_head_loss(loss, logits, targets, **loss_options), members, form)


def scale_derivative_penalty(loss: HeadLoss, members: Tensor, form: Form) -> Tensor:
    """The penalty from a loss that was taken apart and the membership ``(rows, E)`` of its rows."""
    # An infinite logit with a residual of 0, such as that of a class that is masked, has no share in the loss.
    counted = (loss.residuals != 0) | loss.logits.isfinite()
    num = (torch.where(counted, loss.residuals, 0) * torch.where(counted, loss.logits, 0)).sum(1)
    members = members & (loss.den != 0).unsqueeze(1)
    parts = _halves(members) if form == "unbiased" else members.unsqueeze(0)
    sums = global_sum(torch.where(parts.unsqueeze(-1), torch.stack((num, loss.den), -1)[:, None], 0).sum(1))
    num, den = sums.unbind(-1)  # (1 or 2, E)
    present = (den != 0).all(0)
    derivatives = num / torch.where(den != 0, den, 1)
    # The second half is the first where there are no halves; `prod` would wait for the device in its backward.
    return domain_mean(derivatives[0] * derivatives[-1], present)


@torch.no_grad()
def _halves(members: Tensor) -> Tensor:
    """Samples of even and of odd position in their domain, over all ranks in their order; ``(2, rows, E)``."""
    counts = torch.zeros(world_size(), members.shape[1], dtype=torch.float64, device=members.device)
    counts[global_rank()] = members.sum(0)
    before = global_sum(counts)[: global_rank()].sum(0).long()
    odd = (members.cumsum(0) - 1 + before) % 2 == 1
    return torch.stack((members & ~odd, members & odd))


@arguments
class IRMOptions(PenaltyOptions):
    """Options of IRM, at DomainBed's values.

    Args:
        form: ``"unbiased"`` or ``"squared"``.
    """

    penalty_weight: float = 100.0
    weight_before: float = 1.0
    form: Form = "unbiased"


@arguments
class IRMPenalty(IRMOptions, LossPenaltyModule):
    """The penalty for any training loop."""

    def of(self, loss: HeadLoss, members: Tensor) -> Tensor:
        """The penalty, not yet weighted."""
        return scale_derivative_penalty(loss, members, self.form)


@arguments
class IRM(IRMOptions, LossPenalty):
    """Ask that no domain alone wants to rescale the logits.

    The formula stands at the top of :mod:`debias.methods.irm`. Logs ``train/irm_penalty`` on logging steps, before its
    weight, and the weight where it changes; with ``/name`` behind where there are several of them.

    Example:
        >>> from debias import IRM
        >>> IRM(domain="hospital", n_domains=3, form="squared").state_key
        'IRM(hospital)'
    """

    reference: ClassVar[str] = "Arjovsky et al. 2019, arXiv 1907.02893"
    key: ClassVar[str] = "irm"
    of_one_domain: ClassVar[str] = ", of which alone the penalty will be"
    module_class = IRMPenalty


class IRMMixin:
    """IRM inside a LightningModule, for those who prefer explicit code."""

    irm: IRMPenalty
    configure_irm = configures("irm", IRMPenalty)

    def irm_penalty(self, logits: Tensor, targets: Tensor, domains: Tensor) -> Tensor:
        """The weighted penalty for logits ``(N, C)``, their targets and domains ``(N,)`` at this optimiser step."""
        return self.irm(logits, targets, domains, step=self.global_step)  # type: ignore[attr-defined]
