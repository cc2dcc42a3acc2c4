"""Chi-square DRO: the worst distribution near a batch, without groups. Levy et al., NeurIPS 2020, arXiv 2010.05893.

With losses ``v_i`` of the global batch and shares ``b_i`` (``1 / m``; of a weighted loss each sample's part of the
denominator), the loss is a maximum over weights p of the samples, and p is treated as a constant::

    D(p)                                sum_i b_i (p_i / b_i - 1)^2 / 2         the chi-square divergence
    max_p <p, v>                        D(p) <= radius                          a ball
    max_p <p, v> - penalty * D(p)                                               a penalty

Both have closed forms on the sorted losses, where the authors' code bisects to a tolerance of 1e-4. The solution is
that of the batch, and biased by its size. With several ranks p is that of the global batch; solving on each rank alone
is a weaker set.

Published: digits radius 1, penalty 0.05; ImageNet radius 1, penalty 0.4. Costs: one sort of the batch's losses, over
ranks a gather of two doubles a row. Needs per-sample losses only; rows of one sample count one by one, and no state is
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import WorstCase, calls, configures
from debias.ops.arguments import checked
from debias.ops.fields import arguments
from debias.ops.worst_case import WorstCaseLoss, check_batch, largest_first

__all__ = ["ChiSquareDRO", "ChiSquareDROMixin", "ChiSquareLoss", "chi_square_weights"]


@checked("losses: float m, shares: float m", radius="[0, inf)", penalty="(0, inf)")
def chi_square_weights(
    losses: Tensor, *, radius: float | None = 1.0, penalty: float | None = None, shares: Tensor | None = None
) -> Tensor:
    """Weights of the worst distribution in a chi-square ball around a batch, or under a chi-square penalty.

    Args:
        losses: ``(m,)``, finite.
        radius: of the ball; left out where a penalty is given.
        penalty: weight of the divergence, > 0, instead of a ball.
        shares: of the batch that each loss stands for, ``(m,)``, sum 1; ``1 / m`` by default.

    Returns:
        Weights ``(m,)``, sum 1, without gradient: uniform over the largest losses where these alone lie in the ball.

    Example:
        >>> import torch
        >>> from debias.functional import chi_square_weights
        >>> chi_square_weights(torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1]), radius=1.0)
        tensor([0.0000, 0.2537, 0.0146, 0.7317, 0.0000])
    """
    if radius is None and penalty is None:
        raise DebiasError("Expected `radius` or `penalty` to be a number, but got None for both. Pass one of them.")
    losses, shares = check_batch(losses, shares)
    order, v, b = largest_first(losses, shares)
    v = v - v[:1]  # from the largest one on: sums of squares then lose no digits where it matters
    ball, mass = 1 + 2 * (radius or 0), b.cumsum(0)
    first = (b * v).cumsum(0)
    following = torch.cat((v[1:], v.new_full((1,), -torch.inf)))
    if penalty is not None:
        eta = (first - penalty) / mass
        allowed = torch.ones_like(mass, dtype=torch.bool)
    else:
        spread = mass * ball - 1
        mean = first / mass
        variance = ((b * v * v).cumsum(0) / mass - mean * mean).clamp_min(0)
        eta = mean - (variance / spread.clamp_min(torch.finfo(v.dtype).tiny)).sqrt()
        allowed = spread > 0
    # The fewest of the largest losses for which the others lie below eta; all of them where rounding decides nothing.
    fits = allowed & (eta >= following)
    places = torch.arange(len(v), device=v.device)
    k = torch.where(fits, places, len(v) - 1).amin()
    p = b * (v - eta.gather(0, k.unsqueeze(0))).clamp_min(0)
    if penalty is None:
        top = b * (v == 0)
        p = torch.where(top.sum() * ball >= 1, top, p)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@arguments(kw_only=False, radius="(0, inf)", penalty="(0, inf)")
class ChiSquareOptions:
    """Options of the chi-square ball.

    Args:
        radius: of the ball, 1 by default.
        penalty: weight of the divergence instead of a ball; the loss is then ``<p, v>`` without the divergence, which
            is a constant where p is.
    """

    radius: float | None = None
    penalty: float | None = None


@arguments
class ChiSquareLoss(ChiSquareOptions, WorstCaseLoss):
    """The worst-case mean loss in a chi-square ball around a batch, for any training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius is not None and self.penalty is not None:
            raise DebiasError(
                f"Expected either `radius` or `penalty`, but got {self.radius!r} and {self.penalty!r}. Leave one of"
                " them out."
            )
        self.radius = 1.0 if self.radius is None else self.radius

    def weights(self, losses: Tensor, shares: Tensor) -> Tensor:
        """See :func:`debias.functional.chi_square_weights`."""
        return chi_square_weights(losses, radius=self.radius, penalty=self.penalty, shares=shares)


@arguments
class ChiSquareDRO(ChiSquareOptions, WorstCase):
    """Train on the worst distribution in a chi-square ball around each batch; needs no group labels.

    Samples that contradict a shortcut have high losses while the network relies on it; they count the more the higher
    these are, so that the shortcut stops paying.
    """

    works = "Hard samples are to count more without a fixed share of them, and batches are large."
    fails = "Labels are noisy, or batches small: the worst distribution is that of the batch."
    module_class = ChiSquareLoss


class ChiSquareDROMixin:
    """The worst distribution in a chi-square ball around each batch inside a LightningModule."""

    chi_square_dro: ChiSquareLoss
    configure_chi_square_dro = configures("chi_square_dro", ChiSquareLoss)
    chi_square_dro_loss = calls("chi_square_dro", ChiSquareLoss.forward)
