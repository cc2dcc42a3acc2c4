"""ERM with fixed weights per group, inverse to (a power of) the group's frequency: the baseline everyone asks for.

With N_g training samples of group g out of N, and power p::

    w_g proportional to N_g^-p,  scaled so that the training set's mean weight is 1
    loss = sum_i w_g(i) l_i / sum_i 1

``power=1`` makes every group count the same in expectation (``w_g = N / (G N_g)``, scikit-learn's "balanced"),
``power=0.5`` is the square-root form (SqrtReWeight), ``power=0`` is ERM. SubpopBench (Yang et al., ICML 2023) scales
the weights to sum to G instead, a constant factor of the loss. The weights are fixed, so there is nothing to tune and
nothing adapts: for the same risk, drawing balanced batches (``GroupBalancedSampler``) has lower gradient variance.

A group absent from a batch has no part in it. Costs: one all-reduce of 3G + 9 doubles a step. Needs per-sample losses
and group ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.arguments import check_number, checked
from debias.ops.groups import GroupState, check_counts, group_losses
from debias.step.batch import BatchKey
from debias.step.grouped import GroupDebiaser
from debias.step.tap import LossCall
from debias.step.watcher import Losses

__all__ = ["GroupReweighting", "GroupReweightingLoss", "GroupReweightingMixin", "inverse_frequency_weights"]


@checked("group_counts: any G", power="[0, inf)")
def inverse_frequency_weights(group_counts: Tensor, *, power: float = 1.0) -> Tensor:
    """Weights by group whose mean over the training set is 1.

    Args:
        group_counts: training samples per group, ``(G,)``, all positive.
        power: 1 for inverse frequency, 0.5 for its square root.

    Returns:
        Weights ``(G,)``, in the dtype of the counts.

    Example:
        >>> import torch
        >>> from debias.functional import inverse_frequency_weights
        >>> inverse_frequency_weights(torch.tensor([90.0, 10.0]))
        tensor([0.5556, 5.0000])
    """
    raw = torch.softmax(-power * group_counts.log(), dim=0)  # N_g^-p over their sum, which itself may underflow
    return raw * group_counts.sum() / (raw * group_counts).sum()


class GroupReweightingLoss(GroupState):
    """ERM with fixed group weights, for any training loop.

    Args:
        n_groups: number of groups G, or the numbers of crossed ids.
        power: 1 for inverse frequency, 0.5 for its square root, 0 for none.
        group_counts: training samples per group, ``(G,)``.
        group_names: one name per group.

    Shape:
        losses ``(N,)``; groups ``(N,)`` int64 (negative = left out) or boolean ``(N, G)``; output: scalar.

    Raises:
        DebiasError: an argument is out of range, or a group has no training sample.
        BadRowsError: an id is out of range or a loss is not finite.
    """

    counts: Tensor
    weights: Tensor
    needs_counts = True

    @checked()
    def __init__(
        self,
        n_groups: int | Sequence[int],
        power: float = 1.0,
        group_counts: Sequence[int] | None = None,
        *,
        group_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(n_groups, group_names)
        self.power = check_number("power", power)
        self.has_counts = False
        self.given_counts = group_counts
        self.register_buffer("counts", torch.zeros(self.n_groups, dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(self.n_groups, dtype=torch.float64), persistent=False)
        if group_counts is not None:
            self.set_counts(group_counts)

    def set_counts(self, group_counts: Any) -> None:
        """Set the training samples per group."""
        self.counts.copy_(check_counts(group_counts, self.group_names))
        self.weights.copy_(inverse_frequency_weights(self.counts, power=self.power))
        self.has_counts = True

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        """The weighted mean loss of one batch."""
        self.check_shapes(losses, groups)
        return self.reweigh([(losses, torch.ones_like(losses), groups)])[0]

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """The weighted mean of several losses of one batch, from numerators, denominators and groups of the rows."""
        if not self.has_counts:
            raise DebiasError(
                "Expected `group_counts`, but got none. Pass the number of training samples of each group (the callback"
                " counts them itself)."
            )
        sums, bad = group_losses(calls, self.n_groups)
        self.count_bad(bad)
        return [s.weighted(self.weights, by=s.den.sum()) for s in sums]

    def by_group(self) -> dict[str, Tensor]:
        """What is worth logging."""
        return {"group_weight": self.weights}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.given_counts is not None:  # an argument, not state: a resumed run keeps its own
            self.set_counts(self.given_counts)
        self.has_counts = bool(self.counts.sum() > 0)
        if self.has_counts:
            self.weights.copy_(inverse_frequency_weights(self.counts, power=self.power))


class GroupReweighting(GroupDebiaser):
    """Weigh every group by its inverse frequency: fixed, the baseline.

    Args:
        group: where the group ids are; see :class:`debias.GroupDRO`.
        n_groups: number of groups, one per key.
        power: 1 for inverse frequency, 0.5 for its square root.
        group_counts: training samples per group; counted from the training set if not given.
        group_names: one name per group, for logs.
        loss, rows, losses, name, allow_untested_strategy: see :class:`debias.Debiaser`.

    Logs ``train/group_weight/<name>`` on logging steps, of more than 100 groups ``train/max_group_weight``, the largest
    one, instead; and ``train/average_loss``, unweighted.
    """

    reference: ClassVar[str] = "inverse-frequency weighting; e.g. Yang et al., ICML 2023 (ReWeight, SqrtReWeight)"

    @checked()
    def __init__(
        self,
        group: tuple[BatchKey, ...] | BatchKey,
        n_groups: int | tuple[int, ...],
        *,
        power: float = 1.0,
        group_counts: list[int] | None = None,
        group_names: list[str] | None = None,
        loss: int | str | Callable[[LossCall], bool] | None = None,
        rows: str | Callable[[LossCall, int], Tensor] | None = None,
        losses: Losses = "whole",
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(
            group,
            n_groups,
            name=name,
            loss=loss,
            rows=rows,
            losses=losses,
            allow_untested_strategy=allow_untested_strategy,
        )
        self.module = GroupReweightingLoss(n_groups, power, group_counts, group_names=group_names)


class GroupReweightingMixin:
    """ERM with fixed group weights inside a LightningModule."""

    group_reweighting: GroupReweightingLoss

    def configure_group_reweighting(self, n_groups: int | Sequence[int], **options: Any) -> None:
        """Make the objective; takes the arguments of :class:`GroupReweightingLoss`."""
        self.group_reweighting = GroupReweightingLoss(n_groups, **options)

    def group_reweighting_loss(self, losses: Tensor, groups: Tensor) -> Tensor:
        """The objective for losses ``(N,)`` and groups ``(N,)`` or ``(N, G)``."""
        return self.group_reweighting(losses, groups)
