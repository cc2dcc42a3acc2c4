"""Just Train Twice: train, note the errors, train again with the errors up-weighted. Liu et al., ICML 2021.

With E the training samples that the network of stage one gets wrong::

    w_i = 1 + upweight for i in E, else 1;  divided by the mean of w over the training set
    loss = sum_i w_i l_i / sum_i 1

The authors append ``upweight`` copies of each error to the training set, hence 1 + upweight; here errors are weighted
in the loss, the same objective with epochs as long as before. Their errors are those of the training pass of the last
epoch of stage one, each sample predicted before the update it takes part in (``observe="training"``); BalancingGroups
evaluates when it has ended (``"pass"``). Stage two starts from the initial weights, as theirs does.

Published: Waterbirds lr 1e-5, weight decay 1.0, stage one 60 epochs, upweight 100; CelebA lr 1e-5, weight decay 0.1,
one epoch, 50; MultiNLI 2 epochs, 4; CivilComments 2 epochs, 6. Where labels are noisy, errors are noise, and
up-weighting them hurts. Costs: stage one. Needs the numbers of samples (``tag(train)``).
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import TwoStage
from debias.ops.arguments import checked
from debias.ops.distributed import weighted_mean
from debias.ops.fields import arguments
from debias.ops.group_inference import error_groups
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = ["JustTrainTwice", "error_weights"]


@checked("wrong: any N", upweight="[0, inf)")
def error_weights(wrong: Tensor, *, upweight: float) -> Tensor:
    """``1 + upweight`` for errors, else 1, divided by their mean.

    Args:
        wrong: boolean or 0 / 1 ``(N,)``, negative for samples that were not seen, which weigh as the right ones.
        upweight: how often an error is added: it weighs ``1 + upweight``.

    Returns:
        float64 ``(N,)``, mean 1.

    Example:
        >>> import torch
        >>> from debias.functional import error_weights
        >>> error_weights(torch.tensor([0, 0, 1, 0]), upweight=4.0)
        tensor([0.5000, 0.5000, 2.5000, 0.5000], dtype=torch.float64)
    """
    raw = 1 + upweight * (wrong > 0).double()
    return raw / raw.mean()


@arguments(kw_only=False, of=error_weights, epochs="[1, inf)")
class JustTrainTwice(TwoStage):
    """Train twice in one fit, the second time with the errors of the first up-weighted; needs no group labels.

    A short plain training leans on the shortcut, so its errors are mostly samples that contradict it; as these count
    more, the second network has to do without.

    Args:
        epochs: epochs of stage one.
        observe: ``"training"``, the predictions of the last epoch of stage one, or ``"pass"``, those of its end.

    Logs:
        On logging steps of stage two ``train/error_share``, the share of errors, and ``train/average_loss``,
        unweighted.
    """

    reference = "Liu et al., ICML 2021, arXiv 2107.09044"
    works = "A shortcut is easy to learn, labels are clean, and the first training stops early."
    fails = (
        "Labels are noisy: errors are then noise, and count more. A first network without errors leaves nothing "
        "to weigh up."
    )

    epochs: int
    upweight: float = 20.0
    _: KW_ONLY
    observe: Literal["training", "pass"] = "training"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights: Tensor | None = None

    def decide(self, record: dict[str, Tensor], trainer: Any) -> Tensor:
        """1 for errors, else 0."""
        wrong = error_groups(record["logits"], record["targets"])
        if not bool(wrong.any()):
            raise DebiasError(
                f"Expected stage one to leave errors that {self.state_key} could up-weight, but all {len(wrong)}"
                " training samples are right. Shorten it, `epochs=`, or regularise more strongly."
            )
        return wrong

    def begin_stage_two(self, trainer: Any, pl_module: Any) -> None:
        """Make the weights."""
        ids: Any = self.ids
        self._weights = error_weights(ids, upweight=self.upweight)

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """Plain in stage one, where errors are noted; weighted in stage two."""
        (call,) = calls
        numbers = self.sample_ids(step)
        if self.due(step):
            self.note(call, numbers, step.counter + 1)
        if self.stage == 1:
            return [call.mean()]
        weights: Any = self._weights
        of_samples = torch.where(numbers < len(weights), weights[numbers.clamp(0, len(weights) - 1)], 1.0)
        if step.logging:
            ids: Any = self.ids
            self.log_value("error_share", (ids > 0).double().mean(), step)
            self.log_value("average_loss", call.mean().detach(), step)
        return [weighted_mean(call.num * call.of_rows(of_samples).to(call.num.dtype), call.den.detach())]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weights": None}


del JustTrainTwice.observe  # the default: a callback has a function of that name
