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

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from typing import Any

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import GroupDebiaser, calls, configures
from debias.ops.arguments import checked
from debias.ops.fields import arguments
from debias.ops.reweighing import GroupLoss

__all__ = ["GroupReweighting", "GroupReweightingLoss", "GroupReweightingMixin", "inverse_frequency_weights"]


@checked("group_counts: any G", power="[0, inf)")
def inverse_frequency_weights(group_counts: Tensor, *, power: float = 1.0) -> Tensor:
    """Weights by group whose mean over the training set is 1.

    Args:
        group_counts: training samples per group, ``(G,)``, all positive.
        power: 1 for inverse frequency, 0.5 for its square root, 0 for none.

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


@arguments(kw_only=False, of=inverse_frequency_weights, group_weights="[0, inf)")
class GroupReweightingOptions:
    """Options of fixed group weights.

    Args:
        group_counts: training samples per group, ``(G,)``; the callback counts them in the training set if not given.
        group_weights: weights of your own instead, ``(G,)``, at least 0, taken as they are.
        group_names: one name per group, for logs and messages.
    """

    power: float = 1.0
    group_counts: Sequence[int] | None = None
    _: KW_ONLY
    group_weights: Sequence[float] | None = None
    group_names: Sequence[str] | None = None


@arguments
class GroupReweightingLoss(GroupReweightingOptions, GroupLoss):
    """ERM with fixed group weights, for any training loop.

    Shape:
        losses ``(N,)``; groups ``(N,)`` int64 (negative = left out) or boolean ``(N, G)``; output: scalar.

    Raises:
        DebiasError: an argument is out of range, or a group has no training sample.
        BadRowsError: an id is out of range or a loss is not finite.
    """

    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.register_buffer("weights", torch.zeros(len(self.counts), dtype=torch.float64), persistent=False)
        if self.group_counts is not None:
            self.set_counts(self.group_counts)
        if self.group_weights is not None:
            if len(self.group_weights) != len(self.counts) or not any(self.group_weights):
                raise DebiasError(
                    f"Expected `group_weights` to be {len(self.counts)} numbers >= 0, one per group and not all 0, but"
                    f" got {self.group_weights}."
                )
            self.weights.copy_(torch.tensor(self.group_weights, dtype=torch.float64))

    @property
    def needs_counts(self) -> bool:
        """Whether the training samples per group have to be known."""
        return self.group_weights is None

    def set_counts(self, counts: Any) -> None:
        """Set the training samples per group, and with them the weights."""
        super().set_counts(counts)
        if self.needs_counts:
            self.weights.copy_(inverse_frequency_weights(self.counts, power=self.power))

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """The weighted mean of several losses of one batch, from numerators, denominators and groups of the rows."""
        if self.needs_counts and not self.has_counts:
            raise DebiasError(
                "Expected `group_counts`, but got none. Pass the number of training samples of each group (the callback"
                " counts them itself)."
            )
        return [s.weighted(self.weights, by=s.den.sum()) for s in self.sums(calls)]

    def by_group(self) -> dict[str, Tensor]:
        """What is worth logging."""
        return {"group_weight": self.weights}


@arguments
class GroupReweighting(GroupReweightingOptions, GroupDebiaser):
    """Weigh every group by its inverse frequency: fixed, the baseline.

    A shortcut pays because the groups that contradict it are rare; where all groups count the same, it pays less.

    Logs:
        On logging steps ``train/group_weight/<name>``, of more than 100 groups ``train/max_group_weight``, the largest
        one, instead; and ``train/average_loss``, unweighted.
    """

    reference = "inverse-frequency weighting; e.g. Yang et al., ICML 2023 (ReWeight, SqrtReWeight)"
    works = "Groups are known and each has enough samples. It is the baseline that other methods should beat."
    fails = (
        "A large network without regularisation fits all samples, and fixed weights then change little. A group "
        "of a few samples gets a large weight."
    )
    updates = False
    module_class = GroupReweightingLoss


class GroupReweightingMixin:
    """ERM with fixed group weights inside a LightningModule."""

    group_reweighting: GroupReweightingLoss
    configure_group_reweighting = configures("group_reweighting", GroupReweightingLoss)
    group_reweighting_loss = calls("group_reweighting", GroupReweightingLoss.forward)
