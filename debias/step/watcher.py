"""The two base classes of everything debias puts into ``Trainer(callbacks=[...])``.

A :class:`StepWatcher` sees steps; a :class:`Debiaser` changes training steps in up to three ways, in this order:
*augment* the batch, *reweigh* the loss, *penalise*.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from debias.errors import DebiasError, DebiasWarning
from debias.ops.arguments import check_choice, checked
from debias.ops.own_memory import own_memory
from debias.step.batch import BatchKey, key_name
from debias.step.context import Step
from debias.step.engine import StepEngine
from debias.step.guards import refuse_unsupported
from debias.step.loggers import log_best, log_hyperparameters
from debias.step.owned import OwnedModule
from debias.step.random import StepRandom
from debias.tap.calls import LossCall
from debias.tap.features import Pool, check_pool

__all__ = ["MAX_LOGGED_GROUPS", "Debiaser", "Losses", "StepWatcher"]

MAX_LOGGED_GROUPS = 100
"""The largest number of groups that are logged one by one. Lightning takes about a millisecond a value, so that more of
them would take longer than the step; of more groups the extremes are logged.
"""

Losses: TypeAlias = Literal["whole", "split", "image", "heads"]
"""How the losses of a step are taken apart; see :class:`Debiaser`."""


class StepWatcher(Callback):
    """A callback that sees the steps of an unmodified module.

    Args:
        name: tells several instances of a class apart, in checkpoints and logs; by default the batch key they read.
        allow_untested_strategy: run under a strategy that was not tested, at your own risk.
    """

    trains: ClassVar[bool] = False
    monitors: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    updates: ClassVar[bool] = True  # a state that every step changes; False of one that is counted once
    needs_features: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    shardable: ClassVar[bool] = True  # whether the model may be sharded: False where it is copied or set back
    reference: ClassVar[str] = ""
    works: ClassVar[str] = ""  # when, in a sentence or two of Markdown
    fails: ClassVar[str] = ""

    @checked()
    def __init__(self, *, name: str | None = None, allow_untested_strategy: bool = False) -> None:
        self.name = name
        self.allow_untested_strategy = allow_untested_strategy
        self.engine: StepEngine | None = None
        self.loss: Any = None
        self.head: str | None = None
        self.features: str | None = None
        self.pool: Pool = None

    @property
    def reads(self) -> tuple[str | None, str | None, str | None]:
        """Head and features that it names, and how these are pooled."""
        return self.head, self.features, self.pool

    @property
    def adds_to_loss(self) -> bool:
        """Whether it needs the loss after the step has ended."""
        return False

    @property
    def reads_predictions(self) -> bool:
        """Whether it asks what the network predicts, which its loss may have changed; monitors do."""
        return self.monitors

    @property
    def state_key(self) -> str:
        """Class and name, never hyperparameters: a run resumed with another step size finds its state."""
        return f"{type(self).__qualname__}({self.name})" if self.name else type(self).__qualname__

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine of this run; the first watcher makes it."""
        own_memory({name: value for name, value in vars(self).items() if name != "engine"})
        leader = _leader(trainer)
        engine = leader.engine
        if engine is None or engine.trainer is not trainer or engine.module is not pl_module:
            if engine is not None:
                engine.close()
            engine = leader.engine = StepEngine(trainer, pl_module)
        self.engine = engine
        try:
            refuse_unsupported(trainer, pl_module, self, stage)
        except DebiasError:
            self.teardown(trainer, pl_module, stage)
            raise
        engine.open(stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the loggers know the arguments of all methods."""
        if _leader(trainer) is self:
            log_hyperparameters(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Let W&B know the best values."""
        if _leader(trainer) is self:
            log_best(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was, also after an exception or Ctrl-C."""
        self.teardown(trainer, pl_module, "")

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Say so when a run is resumed from a checkpoint that holds no state for this method."""
        if self.stateful and self.state_key not in (checkpoint.get("callbacks") or {}):
            warnings.warn(
                f"The checkpoint holds no state of {self.state_key}: it starts afresh. Expected when a method is"
                " added to a finished run; otherwise check `name=` and the batch key.",
                DebiasWarning,
                stacklevel=2,
            )

    def _log_name(self, key: str, step: Step) -> str:
        """Where a value of this method is logged."""
        return f"train/{key}"

    def log_value(self, key: str, value: Tensor, step: Step) -> None:
        """Log one value from inside a training step; call it on logging steps only."""
        step.module.log(self._log_name(key, step), value, on_step=True, on_epoch=False, batch_size=step.n or 1)

    def begin(self, step: Step) -> None:
        """Before an evaluation step: read ids, so that the engine knows how many samples there are and follows them."""

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """See one evaluation step: the losses it computed, what the module's ``forward`` returned, what the step
        returned.
        """

    def __getstate__(self) -> dict[str, Any]:
        # Lightning puts the module's bound `log` and `log_dict` on every callback; they must not be copied along.
        kept = {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")}
        return kept | {"engine": None} | ({"_fitted": None} if "_fitted" in kept else {})


class Debiaser(StepWatcher):
    """A method: changes the training step of an unmodified module.

    A subclass overrides one or more of :meth:`augment`, :meth:`reweigh`, :meth:`penalise`, and :meth:`sample_ids`.

    Args:
        loss: which of a step's losses is meant: None if there is one; ``"sum"`` for all of them, with the same weights;
            the position of one; or a callable of :class:`LossCall` that says whether it is meant.
        rows: how the rows of the loss come from the samples where that cannot be followed: ``"tiled"``,
            ``"interleaved"``, or ``callable(call, n)`` that returns the sample of each row, int64 ``(rows,)``.
        losses: ``"whole"``; or, for losses that exist only per batch: ``"heads"`` for torchvision's detectors, whose
            losses are then taken per image from one pass; ``"split"`` or ``"image"`` to run the user's step once per
            group or once per sample, whatever it does.
        head: dotted path of the classifier head; found automatically by default.
        features: dotted path of the module whose output are the features; by default they are what the head reads.
        pool: how the output of that module becomes one row a sample, where it is not: ``"mean"`` over tokens
            ``(N, T, D)`` or maps ``(N, D, H, W)``, all alike, padding too; or ``"first"`` token, as of a ``[CLS]``.
        seed: seed of the method's own random numbers.
        name: tells several instances of a class apart.
        allow_untested_strategy: run under a strategy that was not tested, at your own risk.
    """

    trains: ClassVar[bool] = True
    classifies: bool = False  # takes the loss, its predictions and targets for those of classes
    only_features: ClassVar[bool] = False  # reads features, and a loss only to find the head that reads them

    @checked()
    def __init__(
        self,
        *,
        loss: int | str | Callable[[LossCall], bool] | None = None,
        rows: str | Callable[[LossCall, int], Tensor] | None = None,
        losses: Losses = "whole",
        head: str | None = None,
        features: str | None = None,
        pool: Pool = None,
        seed: int = 0,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name, allow_untested_strategy=allow_untested_strategy)
        if loss != "sum":
            check_loss(loss, "None, 'sum', an index >= 0 or a callable")
        if not (rows is None or rows in ("tiled", "interleaved") or callable(rows)):
            raise DebiasError(f"Expected `rows` to be 'tiled', 'interleaved' or a callable, but got {rows!r}.")
        self.loss = loss
        self.rows = rows
        self.losses: Losses = check_choice("losses", losses, get_args(Losses))
        self.head = head
        check_pool(pool, features)
        self.features = features
        self.pool = pool
        self.random = StepRandom(seed, self.state_key)
        self.module: nn.Module | None = None
        self.owned: dict[str, OwnedModule] = {}
        self._epoch: int | None = None
        self._fitted: weakref.ref[Any] | None = None  # the module that the state is about
        self._initial: dict[str, Any] = {}  # the state before the first fit
        self._left: dict[str, Any] = {}  # and after the last

    # -- what a method overrides -------------------------------------------------------------------

    def augment(self, step: Step) -> None:
        """Put a changed batch into ``step.batch``; never change the old one in place."""

    def sample_ids(self, step: Step) -> Tensor:
        """Ids of the samples this method works with, int64 ``(N,)`` or membership ``(N, G)``; read before the step."""
        raise NotImplementedError

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """Debiased mean losses, one for each call, from their ``num``, ``den`` and rows; one state update a step."""
        raise NotImplementedError

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """What is added to the returned loss, already weighted."""
        raise NotImplementedError

    def loss_factor(self, step: Step) -> float:
        """What the whole loss, penalties included, is multiplied by; a function of the step alone."""
        return 1.0

    def new_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch other than the last step's, also after a resume."""

    # -- how the engine sees it --------------------------------------------------------------------

    @property
    def reweighs(self) -> bool:
        """Whether it reweighs the loss; at most one method of a list may."""
        return type(self).reweigh is not Debiaser.reweigh

    @property
    def loss_rows(self) -> str | Callable[[LossCall, int], Tensor] | None:
        """What it states of the rows of the loss."""
        return self.rows

    @property
    def penalises(self) -> bool:
        """Whether it adds to the loss."""
        return type(self).penalise is not Debiaser.penalise

    @property
    def needs_loss(self) -> bool:
        """Whether it needs a loss that can be taken apart per sample."""
        reads = self.reweighs or self.penalises
        return reads and not (self.only_features and (self.features is not None or self.head is not None))

    @property
    def adds_to_loss(self) -> bool:
        """Whether it needs the loss after the step has ended."""
        return self.penalises or bool(self.owned)

    def start(self, step: Step) -> None:
        """Begin a micro-batch: lazy epoch update, fresh draws, augmentation."""
        if self._epoch != step.epoch:
            # Applied here and not in on_train_epoch_end, which a run resumed from a checkpoint of validation end
            # never sees.
            if self._epoch is not None:
                self.new_epoch(step.epoch)
            self._epoch = step.epoch
        self.random.start(step.counter)
        self.augment(step)

    def begin(self, step: Step) -> None:
        """After all augmentation: read what is needed from the batch, so that errors come before the step."""
        if type(self).sample_ids is not Debiaser.sample_ids:
            values = self.sample_ids(step)
            if isinstance(values, Tensor) and values.ndim:
                step.count(len(values))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine and move to the device."""
        others = [c for c in trainer.callbacks if isinstance(c, Debiaser) and c.reweighs]
        if self.reweighs and len(others) > 1:
            raise DebiasError(
                "Expected at most one method that reweighs the loss in `callbacks`, but got"
                f" {', '.join(type(c).__name__ for c in others)}. Remove all but one; penalties and augmentations"
                f" combine."
            )
        super().setup(trainer, pl_module, stage)
        if self.module is not None:
            self.module.to(trainer.strategy.root_device)
        if stage == "fit":
            self._new_fit(pl_module)
            for owned in self.owned.values():
                owned.new_fit()

    def _new_fit(self, pl_module: Any) -> None:
        """State is about one module: fitted again, that goes on; with another one, such as in a next fold, the state
        begins afresh. A checkpoint is loaded after this.
        """
        if self._fitted is not None and self._fitted() is not pl_module:
            self._start_afresh()
        self._remember()
        self._fitted = weakref.ref(pl_module)

    def _start_afresh(self) -> None:
        """Forget what is about another module, unless somebody has set the state since."""
        if self.module is not None and _same(self.module.state_dict(), self._left):
            self._epoch = None
            self.module.load_state_dict(self._initial)
            for owned in self.owned.values():
                owned.load_state_dict({})

    def _remember(self) -> None:
        """Keep the state that a new run begins with."""
        if not self._initial and self.module is not None:
            self._initial = _copied(self.module.state_dict())

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was, and know the method's own state again."""
        if self.engine is not None and self.module is not None:
            self._left = _copied(self.module.state_dict())
        super().teardown(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse optimisers the method cannot work with, now that they exist."""
        super().on_fit_start(trainer, pl_module)
        if self.engine is not None:
            self.engine.check_optimizers(self)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Owned networks step with the user's optimiser, after its gradients were unscaled."""
        for owned in self.owned.values():
            owned.step(optimizer, getattr(trainer.precision_plugin, "scaler", None))

    def state_dict(self) -> dict[str, Any]:
        """The method's buffers, the epoch of its last step and its owned networks."""
        state: dict[str, Any] = {"epoch": self._epoch}
        if self.module is not None:
            state["module"] = self.module.state_dict()
        if self.owned:
            state["owned"] = {name: owned.state_dict() for name, owned in self.owned.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; before or after setup, on any device.

        Raises:
            DebiasError: the state was saved with another number of groups.
        """
        self._remember()
        self._epoch, self._fitted = state_dict["epoch"], None
        if self.module is not None:
            try:
                self.module.load_state_dict(state_dict["module"])
            except RuntimeError as error:
                raise DebiasError(
                    f"Expected the saved state of {self.state_key} to fit, but got: {error}. Resume with the number of"
                    " groups the checkpoint was made with."
                ) from None
        for name, owned in self.owned.items():
            owned.load_state_dict(state_dict["owned"][name])


def _leader(trainer: Any) -> StepWatcher:
    """The first watcher of a run, which does what is done once."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, StepWatcher))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else copy.deepcopy(x) for name, x in state.items()}


def _same(state: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the tensors of two states are the same."""
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return state.keys() == other.keys() and all(
        x.device == other[name].device and x.equal(other[name]) for name, x in tensors.items()
    )


def check_loss(loss: Any, rule: str = "None, an index >= 0 or a callable") -> None:
    """Refuse a ``loss`` that cannot choose one of a step's losses.

    Raises:
        DebiasError: it is none of what the rule says.
    """
    if not (loss is None or callable(loss) or (type(loss) is int and loss >= 0)):
        raise DebiasError(
            f"Expected `loss` to be {rule}, but got {loss!r}. Leave it out if the step computes one loss."
        )


def default_name(name: str | None, key: tuple[BatchKey, ...] | BatchKey, argument: str) -> str:
    """The instance's name: the user's own, or the batch key's.

    Raises:
        DebiasError: the key is a callable, which has no name that a later run would share.
    """
    found = name or key_name(key)
    if found is None:
        raise DebiasError(
            f"Expected `name` to be given where `{argument}` is a callable, but got none: the state in a checkpoint is"
            " found by it. Pass e.g. `name='place'`."
        )
    return found
