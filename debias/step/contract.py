"""What the engine asks of a watcher and of a method; the base classes in :mod:`debias.step.watcher` answer it."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from debias.step.context import Step
from debias.step.random import StepRandom
from debias.tap.calls import LossCall

__all__ = ["Method", "Watcher"]


class Watcher(Protocol):
    """Sees steps."""

    trains: ClassVar[bool]
    monitors: ClassVar[bool]
    stateful: ClassVar[bool]
    needs_features: ClassVar[bool]
    shardable: ClassVar[bool]
    loss: Any
    allow_untested_strategy: bool

    @property
    def reads(self) -> tuple[str | None, str | None, str | None]:
        """Head and features that it names, and how these are pooled."""
        ...

    @property
    def adds_to_loss(self) -> bool:
        """Whether it needs the loss after the step has ended."""
        ...

    def begin(self, step: Step) -> None:
        """Read the batch, before the step."""
        ...

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """See one evaluation step."""
        ...


class Method(Watcher, Protocol):
    """Changes training steps: augments, reweighs, penalises."""

    only_features: ClassVar[bool]
    losses: Any
    random: StepRandom

    @property
    def needs_loss(self) -> bool:
        """Whether it needs a loss that can be taken apart per sample."""
        ...

    @property
    def reweighs(self) -> bool:
        """Whether it reweighs the loss."""
        ...

    @property
    def loss_rows(self) -> Any:
        """What it states of the rows of the loss."""
        ...

    @property
    def penalises(self) -> bool:
        """Whether it adds to the loss."""
        ...

    def start(self, step: Step) -> None:
        """Begin a micro-batch; augment."""
        ...

    def begin(self, step: Step) -> None:
        """Read the batch, after all augmentation."""
        ...

    def sample_ids(self, step: Step) -> Tensor:
        """Ids of the samples."""
        ...

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """Debiased mean losses."""
        ...

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """What is added to the loss."""
        ...

    def loss_factor(self, step: Step) -> float:
        """What the whole loss is multiplied by."""
        ...

    def log_value(self, key: str, value: Tensor, step: Step) -> None:
        """Log one value."""
        ...
