"""What the modules of all domain penalties share: the schedule, the count of bad rows, the checks of a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.groups import GroupState, group_losses
from debias.ops.precision import in_full_precision
from debias.ops.schedule import PenaltySchedule

__all__ = ["DomainPenaltyModule"]


class DomainPenaltyModule(GroupState):
    """A penalty on how domains differ, for any training loop; a subclass adds ``penalty`` and ``forward``.

    Args:
        n_domains: number of domains E, at least 2, or the numbers of crossed ids.
        penalty_weight: weight of the penalty in the end.
        weight_before: weight before ``start_step``.
        start_step: optimiser steps before the penalty has its weight.
        ramp_steps: optimiser steps within which the weight grows to it.

    Raises:
        DebiasError: fewer than two domains, a negative weight or step.
    """

    kind: ClassVar[str] = "domain"
    # Whether the module has to see every batch, also before its weight is above 0.
    always = False

    def __init__(
        self,
        n_domains: int | Sequence[int],
        penalty_weight: float,
        *,
        weight_before: float = 0.0,
        start_step: int = 0,
        ramp_steps: int = 0,
    ) -> None:
        super().__init__(n_domains)
        if self.n_groups < 2:
            raise DebiasError(
                f"Expected `n_domains` to be at least 2, but got {n_domains!r}: one domain differs from"
                " none. Number the domains 0, 1, 2, ..."
            )
        self.schedule = PenaltySchedule(penalty_weight, weight_before, start_step, ramp_steps)

    @property
    def n_domains(self) -> int:
        """Number of domains E."""
        return self.n_groups

    def weight_at(self, step: int | None) -> float:
        """The weight after ``step`` optimiser steps.

        Raises:
            DebiasError: the weight depends on the step and none was given.
        """
        if step is None:
            if self.schedule.changes:
                raise DebiasError(
                    "Expected `step`, the optimiser steps taken so far, because `start_step` or `ramp_steps` makes the"
                    " weight depend on it, but got None. Pass e.g. `step=self.global_step`."
                )
            return self.schedule.weight
        return self.schedule(step)

    def weighted(self, step: int | None, penalty: Any, *inputs: Any) -> Tensor:
        """``weight * penalty(*inputs)``, in at least float32; 0 costs nothing unless a running statistic is kept."""
        weight = self.weight_at(step)
        penalty = in_full_precision(penalty)
        if weight == 0:
            if self.always:
                with torch.no_grad():
                    penalty(*inputs)
            return inputs[0].new_zeros(())
        return weight * penalty(*inputs)

    def count_rows(self, domains: Tensor, rows: Tensor) -> None:
        """Count rows by domain, with ids out of range and rows that are not finite, over all ranks; raises on CPU.

        Args:
            domains: ids or membership, see :func:`debias.ops.groups.group_losses`.
            rows: floating-point, ``(rows, ...)``.
        """
        rows = rows.detach()
        of_rows = rows if rows.ndim == 1 else rows.flatten(1).float().sum(1)
        self.count_bad(group_losses([(of_rows, torch.ones_like(of_rows), domains)], self.n_groups)[1])
