"""What methods that reweigh by group share on Lightning's side: counts of the training set, bad rows, logging."""

from __future__ import annotations

import warnings
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from debias.data.counting import count_groups, empty_groups
from debias.errors import DebiasWarning
from debias.methods.base.method import DomainKeys, KeyedMethod
from debias.ops.fields import arguments
from debias.ops.precision import autocast_off
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.step.loggers import safe_names
from debias.step.watcher import MAX_LOGGED_GROUPS, Losses
from debias.tap.calls import LossCall

__all__ = ["DomainDebiaser", "GroupDebiaser", "ReweighingMethod"]


@arguments
class ReweighingOptions:
    """What only a method takes that reweighs."""

    losses: Losses = "whole"


class ReweighingMethod(ReweighingOptions, KeyedMethod):
    """A method that reweighs the loss by ids; its module, a :class:`debias.ops.reweighing.GroupLoss`, does the maths.

    On logging steps it logs what the module's ``by_group()`` returns: a value a group, or of more than
    ``MAX_LOGGED_GROUPS`` groups the largest one, ``train/worst_group_<value>`` for a key ``<value>_by_group`` and
    ``train/max_<key>`` for another.
    """

    stateful = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._counted: Tensor | None = None  # in the last fit

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The module's losses for these calls; bad rows raise on CPU at once, elsewhere on logging steps."""
        ids = self.sample_ids(step)
        with autocast_off(calls[0].num.device.type):
            losses = self.module.reweigh([(call.num, call.den, call.of_rows(ids)) for call in calls])
        self.reach.check(self, losses, step)
        if step.logging:
            self.module.raise_if_bad()
            for key, values in self.module.by_group().items():
                if self.module.n_groups > MAX_LOGGED_GROUPS:
                    known = torch.where(values.isnan(), -torch.inf, values)  # not of groups that the batch lacks
                    self.log_value(_largest(key), known.amax(), step)
                    continue
                for name, value in zip(safe_names(self.module.group_names), values.unbind(), strict=True):
                    self.log_value(f"{key}/{name}", value, step)
            # What the step logs itself may be the reweighed loss.
            self.log_value("average_loss", torch.stack([call.mean().detach() for call in calls]).sum(), step)
        return losses

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the groups of the training set, if the method needs it and nobody gave or saved the counts; else say
        which ones have no sample, where tags tell.
        """
        if self.module.needs_counts:
            counted = self._counted is not None and torch.equal(self._counted, self.module.counts.cpu())
            if counted or not self.module.has_counts:  # of another fit, perhaps on other data
                self.module.set_counts(count_groups(trainer, *self._ids(), argument=self.ids[0]))
                self._counted = self.module.counts.cpu().clone()
            return
        empty = empty_groups(self.tagged(trainer), self.module.group_names)
        if empty and trainer.is_global_zero:
            warnings.warn(
                f"{self.state_key} was given `{self.ids[1]}={self._ids()[1]}`, but the tags of the training set"
                f" hold no sample of {empty}. If that counts too many, correct it; else these take no part.",
                DebiasWarning,
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; saved counts are not counted anew."""
        super().load_state_dict(state_dict)
        self._counted = None


class DomainDebiaser(ReweighingMethod, DomainKeys):
    """A method that reweighs the loss by domain."""

    ids = ("domain", "n_domains")
    needs = ("domain",)


@arguments
class GroupDebiaser(ReweighingMethod):
    """A method that reweighs the loss by group.

    Args:
        group: where the group ids are: a tag, an index, a name, a dotted path, a callable, or a tuple of these whose
            ids are crossed.
        n_groups: number of groups, one per key.
    """

    needs = ("group",)

    group: tuple[BatchKey, ...] | BatchKey = field(kw_only=False)
    n_groups: int | tuple[int, ...] = field(kw_only=False)


def _largest(key: str) -> str:
    """What the largest value is called: ``worst_group_loss`` of ``loss_by_group``, else ``max_...``."""
    value, by, kind = key.partition("_by_")
    return f"worst_{kind}_{value}" if by else f"max_{key}"
