"""What the worst cases of a batch share: losses of the global batch, largest first, and rows that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.distributed import gather
from debias.ops.groups import GroupState, readable

__all__ = ["WorstCaseLoss", "check_batch", "largest_first"]


class WorstCaseLoss(GroupState):
    """The worst-case mean loss of a batch, for any training loop; a subclass adds :meth:`weights`.

    Shape:
        losses ``(N,)``, unreduced; output: scalar. In a distributed run that of the global batch.

    Raises:
        BadRowsError: a loss is not finite.
    """

    kind = "sample"

    def __post_init__(self) -> None:
        super().__init__(1)

    def weights(self, losses: Tensor, shares: Tensor) -> Tensor:
        """Weights of the global batch, ``(m,)``."""
        raise NotImplementedError

    def forward(self, losses: Tensor) -> Tensor:
        """The objective for losses ``(N,)``."""
        if losses.ndim != 1:
            raise DebiasError(
                f"Expected `losses` to have shape (N,), one loss per sample, but got {tuple(losses.shape)}. Compute"
                " them with `reduction='none'`."
            )
        return self.reweigh([(losses, torch.ones_like(losses))])[0]

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The objective for losses of the same rows, which get the same weights, those of their sum.

        Args:
            calls: numerators and denominators of each loss, ``(rows,)``; a row with denominator 0 does not count.
        """
        dtype = torch.float32 if calls[0][0].device.type == "mps" else torch.float64
        dens = [den.detach().to(dtype) for _, den in calls]
        values = [num.to(dtype) / torch.where(den == 0, 1, den) for (num, _), den in zip(calls, dens, strict=True)]
        bad = torch.stack([~value.detach().isfinite() for value in values]).any(0)
        counts = (dens[0] != 0) & ~bad
        values = [gather(torch.where(counts, value, 0)) for value in values]
        facts = gather(torch.stack([torch.where(counts, dens[0], 0), bad.to(dtype)], 1))
        self._count(facts[:, 1])
        shares = facts[:, 0] / facts[:, 0].sum().clamp_min(torch.finfo(dtype).tiny)
        weights = self.weights(torch.stack([value.detach() for value in values]).sum(0), shares)
        weights = weights.nan_to_num(0.0)  # of a batch in which nothing counts
        return [(weights * value).sum().to(num.dtype) for value, (num, _) in zip(values, calls, strict=True)]

    def _count(self, bad: Tensor) -> None:
        none, rows = bad.new_zeros(()), bad.sum()
        self.count_bad(readable(torch.stack([none, len(bad) - rows, none, rows]).double()))


def check_batch(losses: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses and shares without gradient; shares are ``1 / m`` by default."""
    if not losses.numel():
        raise DebiasError("Expected `losses` of at least one sample, but got none. Leave empty batches out.")
    losses = losses.detach()
    return losses, torch.full_like(losses, 1 / max(len(losses), 1)) if shares is None else shares.detach()


def largest_first(losses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order of descending losses, and losses and shares in it; what has no share comes last."""
    order = torch.where(shares > 0, losses, -torch.inf).argsort(descending=True, stable=True)
    b = shares[order]
    v = losses[order]
    lowest = torch.where(b > 0, v, torch.inf).amin()
    return order, torch.where(b > 0, v, lowest), b
