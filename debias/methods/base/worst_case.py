"""What methods share that train on the worst case of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debias.errors import BadRowsError
from debias.methods.base.method import LossOptions, Method
from debias.ops.precision import autocast_off
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["WorstCase"]


class WorstCase(LossOptions, Method):
    """A method that weighs the samples of a batch; its module is a :class:`debias.ops.worst_case.WorstCaseLoss`.

    Logs:
        On logging steps ``train/average_loss``, unweighted.
    """

    reference = "Levy et al., NeurIPS 2020, arXiv 2010.05893"
    module: Any

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The worst case over the rows of the global batch."""
        if len({len(call.num) for call in calls}) > 1:
            raise BadRowsError(
                f"Expected losses of the same samples for {self.state_key} with `loss='sum'`, but got"
                f" {[len(call.num) for call in calls]} rows. Choose one of them."
            )
        device = str(calls[0].num.device.type)
        with autocast_off(device):
            losses = self.module.reweigh([(call.num, call.den) for call in calls])
        if step.logging:
            self.module.raise_if_bad()
            # What the step logs itself may be the reweighed loss.
            self.log_value("average_loss", torch.stack([call.mean().detach() for call in calls]).sum(), step)
        return losses

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid."""
        self.module.raise_if_bad()
