"""What methods that reweigh by group share on Lightning's side: ids, counts of the training set, bad rows, logging."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.data.counting import count_groups, empty_groups, tag_counts
from debias.errors import BatchKeyError, DebiasWarning
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.step.ids import check_keys, plain_key, plain_n_groups
from debias.step.reach import Reach
from debias.step.watcher import MAX_LOGGED_GROUPS, Debiaser, default_name
from debias.tap.calls import LossCall

__all__ = ["GroupDebiaser"]


class GroupDebiaser(Debiaser):
    """A method that reweighs the loss by group; its module does the maths.

    Args:
        group: where the group ids are: a BatchKey, or a tuple of them whose ids are crossed.
        n_groups: number of groups, one per key.
        **options: see :class:`Debiaser`.

    On logging steps it logs what the module's ``by_group()`` returns: a value a group, or of more than
    ``MAX_LOGGED_GROUPS`` groups the largest one, ``train/worst_group_<value>`` for a key ``<value>_by_group`` and
    ``train/max_<key>`` for another.

    A subclass whose groups go by another name, such as domains, says so in ``needs``: messages then speak of ``domain``
    and ``n_domains``.
    """

    needs: ClassVar[tuple[str, ...]] = ("group",)
    stateful: ClassVar[bool] = True
    module: Any

    def __init__(
        self, group: tuple[BatchKey, ...] | BatchKey, n_groups: int | Sequence[int], *, name: str | None, **options: Any
    ) -> None:
        super().__init__(name=default_name(name, group, self.needs[0]), **options)
        check_keys(group, n_groups, self.needs[0])
        self.group = plain_key(group)
        self.n_groups = plain_n_groups(n_groups)
        self.reach = Reach()
        self._said_unlabelled = False
        self._counted: Tensor | None = None  # in the last fit

    def sample_ids(self, step: Step) -> Tensor:
        """Group ids ``(N,)`` or membership ``(N, G)``."""
        ids = step.ids(self.group, self.n_groups, argument=self.needs[0])
        if ids.dtype == torch.bool and ids.shape[1] != self.module.n_groups:
            raise BatchKeyError(
                f"Expected the membership `{self.needs[0]}={self.group!r}` to have shape (N, {self.module.n_groups}),"
                f" but got {tuple(ids.shape)}. Correct `n_{self.needs[0]}s`."
            )
        return ids

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The module's losses for these calls; bad rows raise on CPU at once, elsewhere on logging steps."""
        ids = self.sample_ids(step)
        device = str(calls[0].num.device.type)
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            losses = self.module.reweigh([(call.num, call.den, call.of_rows(ids)) for call in calls])
        self.reach.check(self, losses, step)
        if step.logging:
            self.module.raise_if_bad()
            for key, values in self.module.by_group().items():
                if self.module.n_groups > MAX_LOGGED_GROUPS:
                    known = torch.where(values.isnan(), -torch.inf, values)  # not of groups that the batch lacks
                    self.log_value(_largest(key), known.amax(), step)
                    continue
                for name, value in zip(self.module.group_names, values.unbind(), strict=True):
                    self.log_value(f"{key}/{name}", value, step)
            # What the step logs itself may be the reweighed loss.
            self.log_value("average_loss", torch.stack([call.mean().detach() for call in calls]).sum(), step)
        return losses

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the groups of the training set, if the method needs it and nobody gave or saved the counts; else say
        which ones have no sample, where tags tell.
        """
        self.reach.start()
        if self.module.needs_counts:
            counted = self._counted is not None and torch.equal(self._counted, self.module.counts.cpu())
            if counted or not self.module.has_counts:  # of another fit, perhaps on other data
                self.module.set_counts(count_groups(trainer, self.group, self.n_groups, argument=self.needs[0]))
                self._counted = self.module.counts.cpu().clone()
            return
        counts = tag_counts(trainer, trainer.train_dataloader, self.group, self.n_groups)
        empty = empty_groups(counts, self.module.group_names)
        if empty and trainer.is_global_zero:
            warnings.warn(
                f"{self.state_key} was given `n_{self.needs[0]}s={self.n_groups}`, but the tags of the training set"
                f" hold no sample of {empty}. If that counts too many, correct it; else these take no part.",
                DebiasWarning,
                stacklevel=2,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; saved counts are not counted anew."""
        super().load_state_dict(state_dict)
        self._counted = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid, nor the first one with unlabelled rows alone."""
        self.module.raise_if_bad()
        if self.module.only_unlabelled() and not self._said_unlabelled:
            self._said_unlabelled = True
            if trainer.is_global_zero:
                warnings.warn(
                    f"{self.state_key} has seen no labelled sample in this epoch: all ids of"
                    f" `{self.needs[0]}={self.group!r}` were negative, so the loss had no gradient. Check the ids; -1"
                    " stands for unlabelled.",
                    DebiasWarning,
                    stacklevel=2,
                )


def _largest(key: str) -> str:
    """What the largest value is called: ``worst_group_loss`` of ``loss_by_group``, else ``max_...``."""
    value, by, kind = key.partition("_by_")
    return f"worst_{kind}_{value}" if by else f"max_{key}"
