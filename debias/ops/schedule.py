"""When a penalty begins and how its weight grows: one schedule for all penalties."""

from __future__ import annotations

from dataclasses import dataclass

from debias.ops.arguments import check_count, check_number

__all__ = ["PenaltySchedule"]


@dataclass(frozen=True)
class PenaltySchedule:
    """Weight of a penalty as a function of the optimiser steps taken.

    ``weight_before`` until ``start_step``, then linearly to ``weight`` within ``ramp_steps``, then ``weight``. The
    steps are the Trainer's ``global_step``, which is the same on every rank and comes back on resume, so nothing has to
    be saved.

    Args:
        weight: the weight in the end, >= 0.
        weight_before: the weight before ``start_step``, >= 0.
        start_step: optimiser steps before the change; 0 for none.
        ramp_steps: optimiser steps the change takes; 0 for a jump.

    Raises:
        DebiasError: an argument is negative or no number.
    """

    weight: float
    weight_before: float = 0.0
    start_step: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, int | float] = {
            "weight": check_number("penalty_weight", self.weight),
            "weight_before": check_number("weight_before", self.weight_before),
        }
        for name in ("start_step", "ramp_steps"):
            plain[name] = check_count(name, getattr(self, name), 0, what="a number of optimiser steps")
        vars(self).update(plain)  # past the frozen __setattr__

    @property
    def changes(self) -> bool:
        """Whether the weight depends on the step."""
        return bool(self.start_step or self.ramp_steps)

    def __call__(self, step: int) -> float:
        """The weight for a step taken after ``step`` others."""
        if step < self.start_step:
            return self.weight_before
        if step >= self.start_step + self.ramp_steps:
            return self.weight
        done = (step - self.start_step) / self.ramp_steps
        return self.weight_before + done * (self.weight - self.weight_before)
