"""The base classes of methods whose arguments are fields; what all methods share that read ids stands here once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.data.counting import tag_counts
from debias.errors import BatchKeyError, DebiasError, DebiasWarning
from debias.ops.fields import arguments, field_values
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.step.ids import check_keys, names_in_data, plain_key, plain_n_groups
from debias.step.reach import Reach
from debias.step.samples import check_length, sample_numbers
from debias.step.watcher import Debiaser, default_name
from debias.tap.calls import LossCall

__all__ = [
    "InstanceOptions",
    "KeyedMethod",
    "LossOptions",
    "Method",
    "NumberedMethod",
    "OneLossMethod",
    "OneLossOptions",
]

# The arguments of a Debiaser, of which a method takes as many as make sense for it.
_DEBIASER = tuple(inspect.signature(Debiaser).parameters)


@arguments
class InstanceOptions:
    """What every method takes."""

    name: str | None = None
    allow_untested_strategy: bool = False


@arguments
class LossOptions(InstanceOptions):
    """What a method takes that changes the loss."""

    loss: int | str | Callable[[LossCall], bool] | None = None
    rows: str | Callable[[LossCall, int], Tensor] | None = None


@arguments
class OneLossOptions(InstanceOptions):
    """What a method takes that changes one of a step's losses.

    Args:
        loss: which of a step's losses is meant: None if there is one; the position of one; or a callable of
            :class:`LossCall` that says whether it is meant.
    """

    loss: int | Callable[[LossCall], bool] | None = None
    rows: str | Callable[[LossCall, int], Tensor] | None = None


class Method(InstanceOptions, Debiaser):
    """A method whose arguments are its fields; see :func:`debias.ops.fields.arguments`.

    Fields that :class:`debias.Debiaser` knows (``loss``, ``rows``, ``losses``, ``head``, ``features``, ``seed``) are
    handed to it. Where there is a ``module_class``, the module is made of the arguments that both classes inherit.
    """

    module_class: ClassVar[Any] = None
    module: Any

    def __post_init__(self) -> None:
        given = vars(self)
        Debiaser.__init__(self, **{name: given[name] for name in _DEBIASER if name in given})
        if self.module_class is not None:
            self.module = self.make_module()
            known = vars(self.module)  # as checked there
            given.update({name: known[name] for name in field_values(self, self.module_class) if name in known})

    def make_module(self) -> Any:
        """The module that does the maths."""
        return self.module_class(**field_values(self, self.module_class))


class OneLossMethod(OneLossOptions, Method):
    """A method that works with one of a step's losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "sum":
            raise DebiasError("Expected `loss` to choose one loss, but got 'sum'. Pass its position.")


class NumberedMethod(OneLossMethod):
    """A method that keeps something of each training sample, by its number; its module is a
    :class:`debias.ops.samples.SampleTable`.
    """

    stateful = True
    shardable = False
    needs: ClassVar[tuple[str, ...]] = ("index",)

    def sample_ids(self, step: Step) -> Tensor:
        """Numbers of the samples."""
        return sample_numbers(step, self.state_key)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a training set that was loaded anew with another length."""
        check_length(trainer, self.module.size, self.state_key)


@arguments
class DomainKeys:
    """Which domains there are.

    Args:
        domain: where the domain ids are: a tag, an index, a name, a dotted path, a callable, or a tuple of these whose
            ids are crossed.
        n_domains: number of domains, one per key.
    """

    domain: tuple[BatchKey, ...] | BatchKey = field(kw_only=False)
    n_domains: int | tuple[int, ...] = field(kw_only=False)


class KeyedMethod(LossOptions, Method):
    """A method that works with ids of the samples; its module is a :class:`debias.ops.groups.GroupState`.

    A subclass has a field for the key of the ids and one for their number, and says what these are called.
    """

    ids: ClassVar[tuple[str, str]] = ("group", "n_groups")
    # What becomes of an epoch without any labelled sample.
    unlabelled: ClassVar[str] = "so the loss had no gradient"

    def __post_init__(self) -> None:
        what, number = self.ids
        key, count = self._ids()
        self.name = default_name(self.name, key, what)
        check_keys(key, count, what)
        vars(self).update({what: plain_key(key), number: plain_n_groups(count)})
        super().__post_init__()
        self.reach = Reach()
        self._said_unlabelled = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine and learn the names of the ids; what was said in another fit is said again."""
        super().setup(trainer, pl_module, stage)
        key, count = self._ids()
        self.module.group_names = names_in_data(trainer, key, self.module.group_names, count)
        if stage == "fit":
            self.reach.start()

    def _ids(self) -> tuple[Any, Any]:
        """The key of the ids, and their number."""
        what, number = self.ids
        return getattr(self, what), getattr(self, number)

    def make_module(self) -> Any:
        """The module that does the maths, for that many ids."""
        return self.module_class(self._ids()[1], **field_values(self, self.module_class))

    def sample_ids(self, step: Step) -> Tensor:
        """Ids ``(N,)`` or membership ``(N, G)``."""
        (what, number), (key, count) = self.ids, self._ids()
        ids = step.ids(key, count, argument=what)
        if ids.dtype == torch.bool and ids.shape[1] != self.module.n_groups:
            raise BatchKeyError(
                f"Expected the membership `{what}={key!r}` to have shape (N, {self.module.n_groups}), but got"
                f" {tuple(ids.shape)}. Correct `{number}`."
            )
        return ids

    def tagged(self, trainer: Any) -> Tensor | None:
        """Training samples by id, if tags tell."""
        return tag_counts(trainer, trainer.train_dataloader, *self._ids())

    def raise_if_bad(self, trainer: Any) -> None:
        """Raise if a row since the last call had a wrong id or was not finite; waits for the device."""
        self.module.raise_if_bad()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid, nor the first one with unlabelled rows alone."""
        self.raise_if_bad(trainer)
        if self.module.only_unlabelled() and not self._said_unlabelled:
            self._said_unlabelled = True
            if trainer.is_global_zero:
                warnings.warn(
                    f"{self.state_key} has seen no labelled sample in this epoch: all ids of"
                    f" `{self.ids[0]}={self._ids()[0]!r}` were negative, {self.unlabelled}. Check the ids; -1 stands"
                    " for unlabelled.",
                    DebiasWarning,
                    stacklevel=2,
                )
