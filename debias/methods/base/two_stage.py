"""Training in two stages in one fit: watch a plainly trained network, decide something by sample, and begin anew.

In stage one the module trains as it would without debias. Then module, optimisers and schedulers go back to where they
stood when training started, and so do the callbacks of debias, ``ModelCheckpoint`` and ``EarlyStopping``; another
callback that keeps something of the networks it saw says how to forget it in a method ``forget_stage()``. Stage two
begins; epochs and steps count on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from debias.errors import DebiasError, UnsupportedStrategyError
from debias.methods.base.held_out import Evaluating
from debias.methods.base.method import NumberedMethod
from debias.ops.distributed import global_rank, is_distributed, world_size
from debias.ops.samples import SampleTable
from debias.step.context import Step
from debias.step.guards import takes_index
from debias.step.proxy import attach, detach, watch_outputs
from debias.step.random import undisturbed
from debias.step.samples import check_length, predictions, refuse_regression, sample_losses, train_set
from debias.step.tagged import split_tags
from debias.tap.calls import LossCall
from debias.tap.head import HeadFinder, check_features, submodule
from debias.tap.predictions import Evaluated
from debias.tap.rows import RowTracker
from debias.tap.selection import select_calls
from debias.tap.tap import LossTap

__all__ = ["TwoStage", "nothing"]

# What they would do to stage two: they keep weights of stage one, or do in stage one what cannot go back to the start.
_IN_THE_WAY = {
    "StochasticWeightAveraging": "average weights of stage one into those of stage two",
    "WeightAveraging": "average weights of stage one into those of stage two",
    "BaseFinetuning": "unfreeze layers in stage one that stage two, which counts epochs on, begins with frozen",
    "ModelPruning": "prune a network in stage one that stage two begins with whole",
}
# By name: Lightning's come from either of its packages.
_RESET = {"StepWatcher", "ModelCheckpoint", "EarlyStopping"}


class TwoStage(NumberedMethod):
    """A method whose first epochs are a network to be watched.

    A subclass has the fields ``epochs`` and ``observe``, and says in :meth:`decide` what follows from the record of
    stage one.
    """

    records_features: ClassVar[bool] = False
    classifies = True
    epochs: int
    module: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.observe_by = vars(self).pop("observe")  # the callback has a function of that name
        self.stage = 1
        self.ids: Tensor | None = None  # by sample, int64 (N,), once stage two has begun
        self._start: dict[str, Any] | None = None
        self._stale: dict[str, list[str]] = {}
        self._stash: dict[str, Any] | None = None
        self._min_epochs: Any = None

    # -- what a method overrides -------------------------------------------------------------------

    def decide(self, record: dict[str, Tensor], trainer: Any) -> Tensor:
        """Ids of the samples that were seen, int64, from what was recorded of them, on the CPU.

        Args:
            record: ``logits``, ``targets``, ``loss`` and where asked for ``features``, a row each sample.
            trainer: the Trainer.
        """
        raise NotImplementedError

    def begin_stage_two(self, trainer: Any, pl_module: Any) -> None:
        """After the switch, or when a run is resumed in stage two."""

    # -- setting up --------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine; refuse what cannot go back to the start."""
        if stage == "fit":
            others = [c for c in trainer.callbacks if isinstance(c, TwoStage)]
            if len(others) > 1:
                raise DebiasError(
                    f"Expected one method in two stages, but got {' and '.join(c.state_key for c in others)}: each"
                    " would take the other's second stage for its first. Remove one of them."
                )
            for callback in trainer.callbacks:
                if found := _IN_THE_WAY.keys() & {kind.__name__ for kind in type(callback).__mro__}:
                    raise UnsupportedStrategyError(
                        f"Expected no {(kind := found.pop())} beside {self.state_key}: it would {_IN_THE_WAY[kind]}."
                        " Remove it, or infer groups in a run of its own."
                    )
            if self.observe_by == "pass" and not pl_module.automatic_optimization:
                way = " or pass `observe='training'`" if self.reweighs else ""
                raise UnsupportedStrategyError(
                    f"Expected automatic optimisation for `observe='pass'` of {self.state_key}, but"
                    " `automatic_optimization` is False: the training step, which is run to look at its losses, would"
                    f" train. Use automatic optimisation{way}."
                )
        super().setup(trainer, pl_module, stage)

    def _start_afresh(self) -> None:
        """Stage and ids are about one module: another one begins with stage one."""
        self.stage, self.ids = 1, None
        self.module = self._start = self._stash = self._epoch = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the table, and keep the state that stage two starts from."""
        size = len(train_set(trainer, self.state_key))
        if self.stage == 1:
            self._check_epochs(trainer)
        if self._stash is not None:
            saved = len(self._stash["module"]["stamps"]) - 1
        else:
            saved = size if self.module is None else self.module.size
        check_length(trainer, saved, self.state_key)
        resumed, fresh = self._stash is not None, self.module is None or self.stage == 1
        if resumed or fresh:  # a fit that was broken off in stage one, and is not resumed, begins anew
            self.module = SampleTable(size)
        if self._stash is not None:
            self.module.load_state_dict(self._stash["module"])
            self._stash = None
        self.module.to(pl_module.device)
        if self.ids is not None:
            self.ids = self.ids.to(pl_module.device)
        if self.stage == 2:
            self.begin_stage_two(trainer, pl_module)
            return
        if self._start is None or not resumed:
            self._start = self._look(trainer, pl_module)
        # A stage-one network that no longer improves must not end the run.
        self._min_epochs = trainer.fit_loop.min_epochs
        trainer.fit_loop.min_epochs = max(self._min_epochs or 0, self.epochs + 1)

    def _check_epochs(self, trainer: Any) -> None:
        last, steps = trainer.max_epochs, trainer.max_steps
        if last is not None and last != -1 and self.epochs >= last:
            raise DebiasError(
                f"Expected `epochs` of {self.state_key} to be fewer than the Trainer's, `max_epochs={last}`, since"
                f" stage two follows, but got {self.epochs}. Train longer, or shorten stage one."
            )
        batches = trainer.num_training_batches
        if steps is not None and steps != -1 and batches != float("inf"):
            needed = self.epochs * -(-int(batches) // trainer.accumulate_grad_batches)
            if needed >= steps:
                raise DebiasError(
                    f"Expected `epochs` of {self.state_key} to end before `max_steps={steps}`, but {self.epochs} epochs"
                    f" take {needed} steps. Train longer, or shorten stage one."
                )

    def _look(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Copies of all that goes back to the start, on the CPU."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        state = {
            "module": pl_module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "callbacks": {c.state_key: c.state_dict() for c in self._going_back(trainer)},
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return _on_cpu(state)

    def _going_back(self, trainer: Any) -> list[Any]:
        return [c for c in trainer.callbacks if c is not self and _RESET & {kind.__name__ for kind in type(c).__mro__}]

    # -- stage one ---------------------------------------------------------------------------------

    @property
    def reads_predictions(self) -> bool:
        """In stage one, unless a pass of its own records it."""
        return self.stage == 1 and self.observe_by == "training"

    def due(self, step: Step) -> bool:
        """Whether what this training step makes of its samples is recorded."""
        return self.reads_predictions and step.epoch == self.epochs - 1

    def note(self, call: LossCall, numbers: Tensor, stamp: int, features: Any = None) -> None:
        """Record what a step makes of its samples."""
        n = len(numbers)
        losses, counts = sample_losses(call, n)
        if self.classifies:  # of a pass, in which no loss is settled
            refuse_regression(call, self.state_key)
        logits, targets = predictions(call, n, self.state_key)
        values = {"logits": logits, "targets": targets, "loss": losses}
        if self.records_features:
            values["features"] = check_features(features).detach()
        self.module.record(numbers, stamp, keep=counts, **values)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin stage two with the first batch after the epochs of stage one."""
        # Not at the end of an epoch: schedulers step after that hook, and a run that is resumed there never sees it.
        if self.stage == 1 and trainer.current_epoch >= self.epochs:
            self._switch(trainer, pl_module)
        if self._stale:
            self._remove_stale(trainer)

    def _switch(self, trainer: Any, pl_module: Any) -> None:
        if self.observe_by == "pass":
            self._pass(trainer, pl_module)
        self.module.merge()
        seen = self.module.seen.cpu()
        if not bool(seen.any()):
            raise DebiasError(
                f"Expected {self.state_key} to have recorded stage one, but it has seen no sample: the run was resumed"
                " behind it. Resume from an earlier checkpoint, or start afresh."
            )
        record = {name: self.module[name].cpu()[seen] for name in self.module.columns}
        ids = torch.full((self.module.size,), -1, dtype=torch.int64)
        ids[seen] = self.decide(record, trainer).to(torch.int64)
        self.ids = ids.to(pl_module.device)
        if is_distributed():  # every rank has decided on the same data; rounding must not part them
            dist.broadcast(self.ids, 0)
        self._go_back(trainer, pl_module)
        self.stage = 2
        self.module = SampleTable(self.module.size).to(pl_module.device)
        self.begin_stage_two(trainer, pl_module)

    def _go_back(self, trainer: Any, pl_module: Any) -> None:
        start: Any = self._start
        pl_module.load_state_dict(start["module"])
        for optimizer, state in zip(trainer.optimizers, start["optimizers"], strict=True):
            optimizer.zero_grad()
            optimizer.load_state_dict(copy.deepcopy(state))
        for config, state in zip(trainer.lr_scheduler_configs, start["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.load_state_dict(start["scaler"])
        for callback in trainer.callbacks:
            if callable(forget := getattr(callback, "forget_stage", None)):
                forget()
        for callback in self._going_back(trainer):
            if callback.state_key in start["callbacks"]:
                # Files of stage-one networks go when there is one of stage two: a run that is killed before has to
                # find something to resume from.
                self._stale[callback.state_key] = [str(p) for p in getattr(callback, "best_k_models", {})] or [
                    p for p in [getattr(callback, "best_model_path", "")] if p
                ]
                last = getattr(callback, "last_model_path", None)
                callback.load_state_dict(copy.deepcopy(start["callbacks"][callback.state_key]))
                if last is not None:  # so that the next one takes its place, and not a name beside it
                    callback.last_model_path = last
        self._stale = {key: paths for key, paths in self._stale.items() if paths}
        self._start = None
        trainer.should_stop = False
        trainer.fit_loop.min_epochs = self._min_epochs

    def _remove_stale(self, trainer: Any) -> None:
        for callback in trainer.callbacks:
            if getattr(callback, "best_model_path", "") and callback.state_key in self._stale:
                if getattr(callback, "save_top_k", 1) == -1:  # who wants to keep all, keeps all
                    self._stale.pop(callback.state_key)
                    continue
                kept = {str(Path(p)) for p in (*getattr(callback, "best_k_models", {}), callback.best_model_path)}
                for path in self._stale.pop(callback.state_key):
                    if str(Path(path)) not in kept and path != str(trainer.ckpt_path):
                        trainer.strategy.remove_checkpoint(path)

    def _pass(self, trainer: Any, pl_module: Any) -> None:
        """Record the training set in evaluation mode."""
        loaders = trainer.train_dataloader
        loader = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders
        loader = loader[0] if isinstance(loader, list | tuple) else loader
        self.module = SampleTable(self.module.size).to(pl_module.device)
        for call, numbers, features in self.run(trainer, pl_module, loader, "training_step"):
            self.note(call, numbers, 1, features)

    def run(self, trainer: Any, pl_module: Any, loader: Any, name: str) -> Iterator[tuple[LossCall, Tensor, Any]]:
        """The user's step on every batch of a set, in evaluation mode, unwatched and without logs."""
        dataset = loader.dataset
        options = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
        mine = range(global_rank(), len(dataset), world_size())
        batches = DataLoader(dataset, loader.batch_size or 1, sampler=mine, **options)
        step_of = getattr(pl_module, name)
        step_of = getattr(step_of, "__wrapped__", step_of)
        given: list[Any] = []  # what a named head was given
        takes = 2 if takes_index(step_of) else 1
        with _evaluating(pl_module), undisturbed(), torch.no_grad(), ExitStack() as stack:
            if self.records_features and self.head is not None:
                named = submodule(pl_module, self.head, argument="head")
                handle = named.register_forward_pre_hook(lambda module, args: given.append(args[0]))
                stack.callback(handle.remove)
            evaluated = Evaluated()
            watch_outputs(pl_module, lambda _, *seen: evaluated.predictions.saw(*seen), stack)
            for i, raw in enumerate(batches):
                batch, tags = split_tags(raw)
                batch = self.engine.transferred(batch)  # type: ignore[union-attr]
                step = Step(trainer, pl_module, "train", batch, tags, i, epoch=trainer.current_epoch)
                numbers = self.sample_ids(step)
                finder = HeadFinder() if self.records_features else None
                tracker = RowTracker(batch, len(numbers))
                tap = LossTap(training=False, tracker=tracker, rows=self.rows, finder=finder, evaluated=evaluated)
                with tap, trainer.precision_plugin.train_step_context():
                    step_of(*(batch, i)[:takes])
                if not tap.calls:
                    raise DebiasError(
                        f"Expected `{name}` to compute a torch loss for {self.state_key}, but got none. Compute one, or"
                        " pass `observe='training'`."
                    )
                call = select_calls(tap.calls, self.loss, self.state_key)[0]
                _ = call.rows  # found while the tracker is there
                found = None if call.record.linear is None else call.record.linear.given
                yield call, numbers, given.pop() if given else found
                tap.close()

    # -- state -------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Rank 0 saves for all: it has to know what the others have seen."""
        if self.stage == 1 and self.module is not None and self._stash is None:
            self.module.merge()
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Stage, ids, and in stage one the table and the start."""
        if self._stash is not None:
            return self._stash
        state = {**super().state_dict(), "stage": self.stage, "ids": self.ids, "stale": copy.deepcopy(self._stale)}
        return {**state, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the table when the size of the training set is known."""
        self._epoch = state_dict["epoch"]
        self.stage, self.ids = state_dict["stage"], state_dict["ids"]
        self._start, self._stale = state_dict["start"], dict(state_dict["stale"])
        self.module = self._fitted = None
        self._stash = state_dict if "module" in state_dict else None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave module and Trainer as they were."""
        if self._min_epochs is not None or self._start is not None:
            trainer.fit_loop.min_epochs = self._min_epochs
            self._min_epochs = None
        super().teardown(trainer, pl_module, stage)


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(value) for value in state)
    return copy.deepcopy(state)


def nothing(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What stands in for a function that is not to run."""


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode, without logs."""
    proxies = [attach(module, name, nothing) for name in ("log", "log_dict")]
    try:
        with Evaluating(module):
            yield
    finally:
        for proxy in proxies:
            detach(proxy)
