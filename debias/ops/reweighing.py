"""What the modules of reweighing methods share: counts of the training set, bad rows, the checks of a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.ops.fields import arguments
from debias.ops.groups import GroupState, GroupSums, check_counts, group_losses

__all__ = ["DomainLoss", "GroupLoss", "ReweighingModule"]


class ReweighingModule(GroupState):
    """An objective that weighs groups, for any training loop; a subclass adds ``reweigh`` and ``by_group``.

    It has the fields ``n_<kind>s``, and ``<kind>_counts`` and ``<kind>_names`` if these are arguments of the method.
    """

    counts: Tensor

    def __post_init__(self) -> None:
        given = vars(self)
        self.given_counts = given.get(f"{self.kind}_counts")
        self.has_counts = False
        super().__init__(given[f"n_{self.kind}s"], given.get(f"{self.kind}_names"))
        vars(self)[f"n_{self.kind}s"] = len(self.group_names)
        self.register_buffer("counts", torch.zeros(len(self.group_names), dtype=torch.float64))

    @property
    def needs_counts(self) -> bool:
        """Whether the training samples per group have to be known."""
        return False

    def set_counts(self, counts: Any) -> None:
        """Set the training samples per group.

        Raises:
            DebiasError: the number of counts is wrong, one is negative, or a group has no sample.
        """
        self.counts.copy_(check_counts(counts, self.group_names, self.kind))
        self.has_counts = True

    def forward(self, losses: Tensor, groups: Tensor) -> Tensor:
        """The objective for losses ``(N,)`` and groups ``(N,)`` or ``(N, G)``; in training mode state is updated."""
        self.check_shapes(losses, groups)
        return self.reweigh([(losses, torch.ones_like(losses), groups)])[0]

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """The objective for several losses of one batch, with one update of the state.

        Args:
            calls: for each loss numerators ``(rows,)``, denominators ``(rows,)`` and groups of the rows.
        """
        raise NotImplementedError

    def by_group(self) -> dict[str, Tensor]:
        """What is worth logging, ``(G,)`` each."""
        raise NotImplementedError

    def sums(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[GroupSums]:
        """Sums of each loss by group, over the global batch; on CPU bad rows raise, before anything has changed."""
        sums, rows = group_losses(calls, len(self.group_names))
        self.count_bad(rows)
        return sums

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.has_counts = bool(self.counts.sum() > 0)
        if self.given_counts is not None:  # an argument, not state: a resumed run keeps its own
            self.set_counts(self.given_counts)
        elif self.has_counts:
            self.set_counts(self.counts)


@arguments
class GroupLoss(ReweighingModule):
    """An objective that weighs groups.

    Args:
        n_groups: number of groups G, or the numbers of crossed ids.
    """

    n_groups: int | Sequence[int] = field(kw_only=False)  # type: ignore[assignment]


@arguments
class DomainLoss(ReweighingModule):
    """An objective that weighs domains.

    Args:
        n_domains: number of domains D, or the numbers of crossed ids.
    """

    kind: ClassVar[str] = "domain"

    n_domains: int | Sequence[int] = field(kw_only=False)
