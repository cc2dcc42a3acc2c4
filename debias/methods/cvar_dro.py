"""CVaR DRO: the worst fraction of a batch, without groups. Levy et al., NeurIPS 2020, arXiv 2010.05893.

With losses ``v_i`` of the global batch and shares ``b_i`` (``1 / m``; of a weighted loss each sample's part of the
denominator), the loss is a maximum over weights p of the samples, and p is treated as a constant::

    max_p <p, v>                                    p_i <= b_i / alpha          the worst fraction alpha
    max_p <p, v> - temperature * KL(p | b)          under the same bounds       smoothed

Both have closed forms on the sorted losses, where the authors' code bisects the second to a tolerance of 1e-4. The
solution is that of the batch, and biased by its size: ``alpha * m`` must be much larger than one. With several ranks p
is that of the global batch; solving on each rank alone is a weaker set.

Published: digits alpha 0.02; ImageNet alpha 0.1; SubpopBench alpha 0.1, searched over 10^U(-2, 0). Costs: one sort of
the batch's losses, over ranks a gather of two doubles a row. Needs per-sample losses only; rows of one sample count one
by one, and no state is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debias.methods.base import WorstCase, calls, configures
from debias.ops.arguments import checked
from debias.ops.fields import arguments
from debias.ops.worst_case import WorstCaseLoss, check_batch, largest_first

__all__ = ["CVaRDRO", "CVaRDROMixin", "CVaRLoss", "cvar_weights"]


@checked("losses: float m, shares: float m", alpha="(0, 1]", temperature="[0, inf)")
def cvar_weights(losses: Tensor, *, alpha: float, temperature: float = 0.0, shares: Tensor | None = None) -> Tensor:
    """Weights of the worst fraction of a batch: its conditional value at risk.

    Args:
        losses: ``(m,)``, finite.
        alpha: fraction, in (0, 1].
        temperature: weight of the relative entropy that smooths the weights; 0 for none.
        shares: of the batch that each loss stands for, ``(m,)``, sum 1; ``1 / m`` by default.

    Returns:
        Weights ``(m,)``, sum 1, without gradient.

    Example:
        >>> import torch
        >>> from debias.functional import cvar_weights
        >>> cvar_weights(torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1]), alpha=0.3)
        tensor([0.0000, 0.3333, 0.0000, 0.6667, 0.0000])
    """
    losses, shares = check_batch(losses, shares)
    order, v, b = largest_first(losses, shares)
    if not temperature:
        # Equal losses share what is left for them, so that the order of samples, and of ranks, decides nothing.
        mass = torch.cat((b.new_zeros(1), b.cumsum(0)))
        above = mass[torch.searchsorted(-v, -v)]
        equal = mass[torch.searchsorted(-v, -v, right=True)] - above
        p = torch.minimum((alpha - above).clamp_min(0), equal) * torch.where(b > 0, b / equal, 0)
        return torch.zeros_like(p).scatter(0, order, p / p.sum())
    # With the j largest at the cap b / alpha, the others are b exp((v - eta) / temperature).
    capped = (b.cumsum(0) - b) / alpha
    tails = _log_tail_sums(b.log() + v / temperature)
    eta = temperature * (tails - (1 - capped).clamp_min(0).log())
    log_cap = -torch.tensor(alpha, dtype=v.dtype).log()
    fits = (v <= eta + temperature * log_cap) & (capped < 1)
    # The fewest that fit; where rounding lets none fit, all but the last sample that may be free are at the cap.
    last = (capped < 1).sum() - 1
    places = torch.arange(len(v), device=v.device)
    j = torch.where(fits, places, last).amin()
    free = b * torch.exp(((v - eta.gather(0, j.unsqueeze(0))) / temperature).clamp_max(log_cap))
    p = torch.where(places < j, b / alpha, free)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def _log_tail_sums(x: Tensor) -> Tensor:
    """``log sum_{j >= i} exp(x_j)``."""
    return x.flip(0).logcumsumexp(0).flip(0)


@arguments(kw_only=False, of=cvar_weights)
class CVaROptions:
    """Options of the worst fraction.

    Args:
        alpha: the fraction, in (0, 1]; 1 is plain training. ``alpha`` times the global batch must be much larger than
            one.
    """

    alpha: float = 0.1
    temperature: float = 0.0


@arguments
class CVaRLoss(CVaROptions, WorstCaseLoss):
    """The mean loss of the worst fraction of a batch, for any training loop.

    Example:
        >>> import torch
        >>> from debias import CVaRLoss
        >>> CVaRLoss(alpha=0.3)(torch.tensor([0.2, 1.0, 0.5, 2.0, 0.1]))
        tensor(1.6667)
    """

    def weights(self, losses: Tensor, shares: Tensor) -> Tensor:
        """See :func:`debias.functional.cvar_weights`."""
        return cvar_weights(losses, alpha=self.alpha, temperature=self.temperature, shares=shares)


@arguments
class CVaRDRO(CVaROptions, WorstCase):
    """Train on the worst fraction of each batch; needs no group labels.

    Samples that contradict a shortcut have the highest losses while the network relies on it; training on these leaves
    it nothing to gain by the shortcut.
    """

    works = "A fixed share of the samples is hard, and batches are large."
    fails = "Labels are noisy, or batches small: `alpha` times the batch must be much larger than one."
    module_class = CVaRLoss


class CVaRDROMixin:
    """The worst fraction of each batch inside a LightningModule.

    Example:
        >>> import lightning as L, torch
        >>> from debias import CVaRDROMixin
        >>> class Model(CVaRDROMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 2)
        ...         self.configure_cvar_dro(alpha=0.2)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return self.cvar_dro_loss(torch.nn.functional.cross_entropy(self.net(x), y, reduction="none"))
    """

    cvar_dro: CVaRLoss
    configure_cvar_dro = configures("cvar_dro", CVaRLoss)
    cvar_dro_loss = calls("cvar_dro", CVaRLoss.forward)
