"""What the adversarial methods share on Lightning's side: strength of the reversal, optimiser, logging."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from debias.errors import BatchKeyError, DebiasError
from debias.methods.base.adversary_loss import precise
from debias.methods.base.method import KeyedMethod, LossOptions
from debias.methods.base.owned import users_optimizer
from debias.ops.fields import arguments, field_values
from debias.ops.gradient_reversal import dann_ramp
from debias.ops.precision import autocast_off
from debias.step.context import Step
from debias.step.owned import OwnedModule
from debias.tap.calls import LossCall
from debias.tap.features import Pool

__all__ = ["AdversarialDebiaser"]


@arguments(warmup_steps="[0, inf)", ramp_steps="[1, inf)", lr="(0, inf)", lr_ratio="(0, inf)")
class AdversaryTraining(LossOptions):
    """How an adversary is trained.

    Args:
        warmup_steps: optimiser steps during which the adversary learns and nothing is reversed.
        ramp_steps: length of the "dann" ramp in optimiser steps; by default what is left of training.
        lr: the adversary's learning rate; by default the user's current one (of several groups the highest) times
            ``lr_ratio``.
        lr_ratio: see ``lr``.
        optimizer: makes the adversary's optimiser from parameters and ``lr=``, e.g. ``torch.optim.SGD``; by default one
            of the user's class, with its options.
        loss: which of several losses is meant, by position or a callable of :class:`LossCall`; its features are read.
    """

    warmup_steps: int = 0
    ramp_steps: int | None = None
    features: str | None = None
    pool: Pool = None
    lr: float | None = None
    lr_ratio: float = 1.0
    optimizer: Callable[[Iterable], Optimizer] | None = None
    loss: int | Callable[[LossCall], bool] | None = None  # type: ignore[assignment]
    head: str | None = None
    seed: int = 0


class AdversarialDebiaser(AdversaryTraining, KeyedMethod):
    """A method with an adversary on the features; its module is a :class:`~debias.methods.base.AdversaryLoss`.

    A subclass has the fields of the ids, those of its adversary, and ``schedule``: ``"constant"``, or ``"dann"``: the
    strength grows from 0 by :func:`debias.functional.dann_ramp`.

    Logs:
        On logging steps ``train/<name>_adversary/loss``, ``.../accuracy`` (of the adversary, on the global batch) and
        ``.../strength``; the name is the instance's, by default the key of the ids; with the class behind
        (``.../loss/<class>``) where an adversary of another class has the same name.

    Raises:
        BadRowsError: an id is out of range, a feature is not finite, or a whole epoch had no known id.
        HeadNotFoundError: the features are not found or not ``(N, D)``.
    """

    stateful = True
    needs_features = True
    only_features = True
    schedule: Literal["constant", "dann"]

    def __post_init__(self) -> None:
        (what, _), (key, _) = self.ids, self._ids()
        if isinstance(key, tuple | list):
            raise DebiasError(
                f"Expected `{what}` of {type(self).__name__} to be one key, but got {key!r}. Tag the crossed ids, and"
                " give that tag."
            )
        super().__post_init__()
        if self.loss == "sum":
            raise DebiasError(
                "Expected `loss` to choose the one loss whose features the adversary reads, but got 'sum'. Pass its"
                " position."
            )
        make, optimizer = self.module.build, users_optimizer(self, self.optimizer)
        network = OwnedModule(make, seed=self.seed, lr=self.lr, lr_ratio=self.lr_ratio, optimizer=optimizer)
        self.owned = {"adversary": network}
        self._end: int | None = None

    def make_module(self) -> Any:
        """The adversary's loss, without the network, which is made when the width of the features is known."""
        return self.module_class(None, self._ids()[1], **field_values(self, self.module_class))

    def sample_ids(self, step: Step) -> Tensor:
        """Ids of the samples, int64 ``(N,)``."""
        ids = step.ids(*self._ids(), argument=self.ids[0])
        if ids.ndim != 1:
            raise BatchKeyError(
                f"Expected `{self.ids[0]}={self._ids()[0]!r}` to hold one id per sample, shape (N,), but got a"
                f" membership of shape {tuple(ids.shape)}."
            )
        return ids

    def strength_at(self, global_step: int) -> float:
        """The strength in one optimiser step: a function of the step alone, the same on all ranks."""
        done = global_step - self.warmup_steps
        if done < 0:
            return 0.0
        if self.schedule == "constant":
            return self.module.strength
        return self.module.strength * dann_ramp(done / (self.ramp_steps or self._end or 1))

    def targets(self, call: LossCall, step: Step, n_rows: int) -> Tensor | None:
        """What the module's losses need beside features and ids."""
        return None

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """The adversary's loss on the features that the classifier reads."""
        device = call.features.device if isinstance(call.features, Tensor) else step.module.device
        with autocast_off(device.type):
            features = precise(call.features)
            ids = call.of_features(self.sample_ids(step))
            targets = self.targets(call, step, len(features))
            network = self.owned["adversary"].create(features.shape[1], device, features.dtype)
            strength = self.strength_at(step.global_step)
            loss = self.module.objective(network, features, ids, strength=strength, targets=targets, log=step.logging)
        if strength:  # at 0 nothing is meant to be reached
            self.reach.check(self, [loss], step)
        if step.logging:
            self.module.raise_if_bad()
            values = {"loss": loss.detach(), "accuracy": self.module.accuracy, "strength": torch.tensor(strength)}
            for key, value in values.items():
                self.log_value(f"{self.name}_adversary/{key}", value, step)
        return loss

    def _log_name(self, key: str, step: Step) -> str:
        """With the class where adversaries of another have the same name, whose values would overwrite each other."""
        callbacks = step.trainer.callbacks
        several = sum(isinstance(c, AdversarialDebiaser) and c.name == self.name for c in callbacks) > 1
        return super()._log_name(key, step) + (f"/{type(self).__qualname__}" if several else "")

    def new_epoch(self, epoch: int) -> None:
        """Count labelled rows afresh."""
        self.module.start_epoch()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the length of training, where a ramp needs it."""
        if self.schedule == "dann" and self.ramp_steps is None:
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise DebiasError(
                    "Expected `ramp_steps` to be given where training has no end (`max_epochs=-1`), but got None."
                )
            self._end = max(int(steps) - self.warmup_steps, 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows, or the absence of every label, unsaid."""
        self.module.raise_if_bad()
        self.module.raise_if_unlabelled()
