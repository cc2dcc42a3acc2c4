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

from typing import Any, Literal

import torch
from torch import Tensor

from debias.methods.base import LossPenalty, calls, configures
from debias.ops.arguments import checked
from debias.ops.domains import check_domains, domain_shares, halves
from debias.ops.fields import arguments
from debias.ops.groups import GroupSums, group_losses
from debias.ops.head_losses import HeadLoss, make_head_loss
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
    """The penalty of one batch; rows with a logit or a loss that is not finite have no part in it.

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
    check_domains(domains, n_domains, len(logits))
    head = make_head_loss(loss, logits, targets, **loss_options)
    return derivative_product(scale_derivatives(head, domains, n_domains, form)[0], form)


def scale_derivatives(
    loss: HeadLoss, domains: Tensor, n_domains: int, form: Form
) -> tuple[GroupSums, Tensor | list[float]]:
    """Sums of the samples' scale derivatives by domain, in the unbiased form by its halves in turn, and the numbers of
    rows by place: see :func:`debias.ops.groups.group_losses`.
    """
    # The logit -inf of a class that is masked has no share in the loss where its residual is 0.
    masked = (loss.logits == -torch.inf) & (loss.residuals == 0)
    rows = (loss.residuals * loss.logits.masked_fill(masked, 0)).sum(1)
    groups, n_groups = domains, n_domains
    if form == "unbiased":
        groups, n_groups = halves(domains, n_domains, loss.den != 0), 2 * n_domains
    (sums,), counts = group_losses([(rows, loss.den, groups)], n_groups)
    return sums, counts


def derivative_product(sums: GroupSums, form: Form) -> Tensor:
    """The penalty from the sums that :func:`scale_derivatives` makes."""
    derivatives, present = sums.means, sums.present
    if form == "squared":
        product = derivatives.square()
    else:  # torch's `prod` would wait for the device in its backward
        even, odd = derivatives.view(-1, 2).unbind(1)
        product, present = even * odd, present.view(-1, 2).all(1)
    return product.dot(domain_shares(present, product.dtype)).to(sums.rows.dtype)


@arguments(of=irm_penalty)
class IRMOptions(PenaltyOptions):
    """Options of IRM, at DomainBed's values."""

    penalty_weight: float = 100.0
    weight_before: float = 1.0
    form: Form = "unbiased"


@arguments
class IRMPenalty(IRMOptions, LossPenaltyModule):
    """The penalty for any training loop."""

    def of(self, loss: HeadLoss, domains: Tensor) -> Tensor:  # type: ignore[override]
        """The penalty, not yet weighted."""
        return derivative_product(scale_derivatives(loss, domains, self.n_groups, self.form)[0], self.form)


@arguments
class IRM(IRMOptions, LossPenalty):
    """Ask that no domain alone wants to rescale the logits.

    A shortcut deserves more trust in one domain than in another, so that each domain would scale its logits
    differently; what all of them trust alike remains.

    Example:
        >>> from debias import IRM
        >>> IRM(domain="hospital", n_domains=3, form="squared").state_key
        'IRM(hospital)'
    """

    reference = "Arjovsky et al. 2019, arXiv 1907.02893"
    works = "Domains differ in how much the shortcut pays, and the penalty starts after some training."
    fails = "The shortcut pays alike in every domain; large networks make the penalty small without giving it up."
    key = "irm"
    of_one_domain = ", of which alone the penalty will be"
    module_class = IRMPenalty


class IRMMixin:
    """IRM inside a LightningModule, for those who prefer explicit code."""

    irm: IRMPenalty
    configure_irm = configures("irm", IRMPenalty)
    irm_penalty = calls("irm", IRMPenalty.forward)
