"""One engine per run: wraps the user's steps once, feeds every watcher, and puts everything back.

The first watcher in ``trainer.callbacks`` makes the engine; the others join it. Everything here that reaches into
Lightning does so at one of five places: the step methods, the hook before batch transfer, the strategy's
``process_dataloader``, forward hooks on submodules, and the Trainer's loop counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from debias.errors import UnsupportedStrategyError
from debias.ops.distributed import is_distributed, use_group
from debias.step.agreement import Agreement, flat_loaders, refuse_contradictions
from debias.step.context import Step
from debias.step.detection import DetectorStep, detectors
from debias.step.guards import data_group, refuse_duplicating_sampler, takes_iterator, warn_padding
from debias.step.loaders import Part, open_batch
from debias.step.proxy import as_written, attach, detach, watch_outputs
from debias.step.seen import Seen
from debias.step.settle import Learned, Settlement, loss_of, with_loss
from debias.step.split import split_losses
from debias.step.tagged import TagCollate
from debias.tap import adapters
from debias.tap.head import FeatureTap, HeadFinder, HeadTap
from debias.tap.predictions import Evaluated
from debias.tap.rows import RowTracker
from debias.tap.tap import LossTap

if TYPE_CHECKING:
    from debias.step.watcher import Debiaser, StepWatcher

__all__ = ["StepEngine"]

_STEPS = {"fit": ("training_step", "validation_step"), "validate": ("validation_step",), "test": ("test_step",)}
_STAGES = {"training_step": "train", "validation_step": "validate", "test_step": "test"}

Run: TypeAlias = Callable[[Any], Any]
"""The user's step as a function of its batch."""

Heads: TypeAlias = dict[Any, HeadTap | FeatureTap]
"""What delivers features to the watchers of a step, by what they read."""


class StepEngine:
    """Watches and rewrites the steps of one module in one run of one Trainer."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self.module = module
        self.parts: list[Part] = []
        self._open = False
        self._undo = ExitStack()  # puts back what is wrapped
        self._collates: list[tuple[TagCollate, int | None]] = []  # and the epoch that its loader was set up to train in
        self._heads: dict[Any, HeadTap | FeatureTap] = {}
        self._tap: LossTap | None = None
        self._detector: DetectorStep | None = None
        self.seen: Seen | None = None
        self._learned = Learned()
        self._counter: int | None = None
        self._agreement = Agreement()

    # -- opening and closing -----------------------------------------------------------------------

    def open(self, stage: str) -> None:
        """Wrap what this stage needs."""
        if self._open:
            return
        self._open = True
        use_group(data_group(self.trainer.strategy))
        for name in _STEPS.get(stage, ()):
            self._put(self.module, name, partial(self._around, _STAGES[name]))
        self._put(self.module, "_on_before_batch_transfer", self._strip_tags)
        self._put(self.trainer.strategy, "process_dataloader", self._process_dataloader)
        if any(getattr(callback, "reads_predictions", False) for callback in self.trainer.callbacks):
            watch_outputs(self.module, self._keep_output, self._undo)
        for model in detectors(self.module) if stage == "fit" else ():
            self._put(model, "forward", partial(self._detect, model))
        for submodule in self.module.modules():
            if (per_sample := adapters.adapter_of(submodule)) is not None:
                self._put(submodule, "forward", partial(self._adapt, submodule, per_sample))
            for name in ("update", "compute") if isinstance(submodule, Metric) else ():
                self._put(submodule, name, self._measure)

    def _put(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._undo.callback(detach, attach(owner, name, around))

    def close(self) -> None:
        """Put everything back as it was. Safe to call twice."""
        use_group(None)
        self._undo.close()
        self._heads.clear()
        self._collates.clear()
        self._open, self.parts = False, []

    def check_optimizers(self, watcher: StepWatcher, *, again: bool = False) -> None:
        """LBFGS calls the step several times per batch; other optimisers that do (SAM) are known when they do it
        again.

        Raises:
            UnsupportedStrategyError: the method has a state, which would be updated several times per batch.
        """
        found = [type(o).__name__ for o in self.trainer.optimizers if again or isinstance(o, torch.optim.LBFGS)]
        if found and watcher.stateful and watcher.updates:
            raise UnsupportedStrategyError(
                f"Expected an optimiser that runs the step once per batch for {type(watcher).__name__}, but got"
                f" {' and '.join(found)}, which would update the method's state several times per batch. Use another"
                " optimiser."
            )

    # -- what is wrapped ---------------------------------------------------------------------------

    def _around(self, stage: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:  # called by name: the batch comes first
            args = (kwargs.pop(next(iter(kwargs))),)

        def run(batch: Any) -> Any:
            # What is compiled cannot be looked at.
            step = as_written(original) if self._tap is not None and self._tap.careful else original
            return step(batch, *args[1:], **kwargs)

        given = dict(zip(("batch", "batch_idx", "dataloader_idx"), args, strict=False)) | kwargs
        return self._train(run, given) if stage == "train" else self._evaluate(stage, run, given)

    def _strip_tags(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, self.parts = open_batch(args[0])
        return original(batch, *args[1:], **kwargs)

    def transferred(self, batch: Any) -> Any:
        """A bare batch as the Trainer would give it to a step: in its precision, and through all hooks of transfer."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        # Of the class: what is wrapped here would take the tags of the step that is running for those of this batch.
        batch = type(self.module)._on_before_batch_transfer(self.module, batch)
        return self.trainer.strategy.batch_to_device(batch)

    def _process_dataloader(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loader = original(*args, **kwargs)
        refuse_duplicating_sampler(loader, self.trainer)
        if not self.trainer.training and any(watcher.monitors for watcher in self.watchers()):
            warn_padding(loader)
        collate_fn = getattr(loader, "collate_fn", None)
        if collate_fn is None:
            return loader
        if all(collate_fn is not ours for ours, _ in self._collates):
            loader.collate_fn = TagCollate(collate_fn.collate_fn if isinstance(collate_fn, TagCollate) else collate_fn)
            self._undo.callback(setattr, loader, "collate_fn", collate_fn)
        epoch = self.trainer.current_epoch
        trains = self.trainer.training and not takes_iterator(self.module.training_step)
        self._collates.append((loader.collate_fn, epoch if trains else None))
        # Batches of several training loaders say how many samples each of them has; one loader needs no such.
        together = [ours for ours, of_epoch in self._collates if of_epoch == epoch]  # those of others were reloaded
        for ours in together:
            ours.counts = len(together) > 1
        return loader

    def _keep_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Of the module and its children."""
        if self._tap is not None and self._tap.evaluated is not None:
            self._tap.evaluated.predictions.saw(args, kwargs, output)
            if module is self.module and self.seen is not None:
                self.seen.keep(args, output)

    def _adapt(
        self,
        loss: nn.Module,
        per_sample: adapters.PerSample,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        run = partial(original, *args, **kwargs)
        if self._tap is None:
            return run()
        return adapters.take(self._tap, type(loss).__name__, args, run, partial(per_sample, loss, **kwargs))

    def _measure(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a metric: nothing tells in evaluation that its value is the loss, as training tells of a criterion."""
        if (tap := self._tap) is None or tap.training:
            return original(*args, **kwargs)
        tap.measuring += 1
        try:
            return original(*args, **kwargs)
        finally:
            tap.measuring -= 1

    def _detect(
        self, model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a detector of torchvision; the losses inside are of anchors and proposals, which the tap must not see."""
        if self._detector is not None:
            return self._detector(model, original, args, kwargs)
        if self._tap is None:
            return original(*args, **kwargs)
        self._tap.suspended += 1
        try:
            return original(*args, **kwargs)
        finally:
            self._tap.suspended -= 1

    # -- training ----------------------------------------------------------------------------------

    def _train(self, run: Run, given: dict[str, Any]) -> Any:
        # Also while a tuner has taken our callbacks away, or a validation step calls this one: the user's own step.
        if not self.trainer.training or not (watchers := self.watchers()):
            return run(given["batch"])
        debiasers: list[Debiaser] = [w for w in watchers if w.trains]  # type: ignore[misc]
        if not debiasers:
            with self._agreement.on_begin(self.trainer, []):
                pass
            with self._agreement.on_ends(self.trainer):
                return run(given["batch"])
        step = self._step("train", given)
        again, self._counter = step.counter == self._counter, step.counter
        for watcher in debiasers if again else ():
            self.check_optimizers(watcher, again=True)
        with self._agreement.on_begin(self.trainer, step.parts) as first:
            for watcher in debiasers:
                watcher.start(step)
            self._read_ids(step, debiasers)
            if first and step.keys:
                refuse_contradictions(flat_loaders(self.trainer.train_dataloader), sorted(step.keys))
        with self._agreement.on_ends(self.trainer):
            return self._changed(step, debiasers, run)

    def _changed(self, step: Step, debiasers: list[Debiaser], run: Run) -> Any:
        """The user's step, with what the methods make of its loss."""
        settlement = Settlement(step, debiasers, self._learned)
        reweigher = settlement.reweigher
        if reweigher is not None and reweigher.losses != "whole":
            output = self._with_losses_of_batch(step, reweigher, run)
        elif settlement.changes_loss or (is_distributed() and not self._learned.as_ddp):
            return self._settled(step, settlement, run)
        else:
            output = run(step.batch)
        self._end_forward(debiasers)
        return output

    def _with_losses_of_batch(self, step: Step, reweigher: Debiaser, run: Run) -> Any:
        """A step whose losses exist only per batch."""
        if step.mixture is not None:
            raise UnsupportedStrategyError(
                f"Expected `losses='whole'` together with {step.mixture.owner}, but got {reweigher.losses!r}: a loss"
                " that exists only per batch cannot be mixed from the labels of two samples. Remove one of them."
            )
        if reweigher.losses != "heads":
            return split_losses(run, step, reweigher)
        self._detector = detector = DetectorStep(step, reweigher)
        try:
            output = run(step.batch)
        finally:
            self._detector = None
        detector.finish()
        return output

    def _settled(self, step: Step, settlement: Settlement, run: Run) -> Any:
        """A step whose losses are watched, and settled when it has returned."""
        debiasers = settlement.methods
        rows = next((w.loss_rows for w in debiasers if w.loss_rows is not None), None)  # of all, or refused before
        arranged = rows if isinstance(rows, str) else None
        tracker = self._row_tracker(step, arranged)
        heads, finder = self._start_heads(step, debiasers, tracker)
        tap = LossTap(
            tracker=tracker,
            rows=rows,
            finder=finder,
            mixture=step.mixture,
            strict=bool(settlement.choices),
            careful=settlement.first,
            constants=self.module.buffers() if settlement.first else (),
            evaluated=Evaluated() if any(w.reads_predictions for w in debiasers) else None,
            # Under manual optimisation the loss is used up inside the step: nothing can be settled afterwards.
            at_once=None if self.module.automatic_optimization else settlement.at_once,
        )
        output = self._watched(tap, heads, run, step)
        self._end_forward(debiasers)
        loss = settlement.settle(tap, output, heads)
        self._forget(tap, heads)
        return output if loss is None else with_loss(output, loss)

    def _row_tracker(self, step: Step, arranged: str | None = None) -> RowTracker | None:
        """What follows rows of the numbered samples, if there are any."""
        if step.n is None:
            return None
        first, *others = step.numbered
        strangers = [part.batch_in(step.batch) for part in step.strangers]
        joined = [(part.batch_in(step.batch), part.n or 0) for part in others]
        return RowTracker(
            first.batch_in(step.batch),
            step.n - sum(size for _, size in joined),
            everything=self._learned.rows_needed.get((step.stage, step.dataloader_idx), True),
            arranged=arranged,
            joined=joined,
            strangers=strangers,
        )

    def _watched(self, tap: LossTap, heads: Heads, run: Run, step: Step) -> Any:
        """Run the user's step under a tap."""
        self._tap = tap
        adapters._active.append(tap)
        try:
            with tap:
                output = run(step.batch)
        finally:
            adapters._active.pop()
            self._tap = None
        for head in heads.values():
            head.stop()
        return output

    def _forget(self, tap: LossTap, heads: Heads) -> None:
        """Let go of every tensor of a step."""
        tap.close()
        for head in heads.values():
            head.forget()

    def _end_forward(self, debiasers: list[Debiaser]) -> None:
        for watcher in debiasers:
            watcher.random.end_forward()

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, stage: str, run: Run, given: dict[str, Any]) -> Any:
        monitors = [w for w in self.watchers() if w.monitors]
        if not monitors or self.trainer.training:  # a training step may call the validation step
            return run(given["batch"])
        step = self._step(stage, given)
        self._read_ids(step, monitors)
        tracker = self._row_tracker(step)
        self.seen = seen = Seen(tracker)
        heads, finder = self._start_heads(step, monitors, tracker)
        evaluated = Evaluated()
        tap = LossTap(training=False, tracker=tracker, finder=finder, evaluated=evaluated)
        try:
            output = self._watched(tap, heads, run, step)
            evaluated.elements.returned = loss_of(output)
            for monitor in monitors:
                if monitor.needs_features:
                    step.features = seen.features(monitor, heads[monitor.reads], tap, step)
                monitor.observe(step, tap.calls, seen.output, output)
            self._learned.note_rows(step, tracker)
        finally:
            self.seen = None
            self._forget(tap, heads)
        return output

    # -- shared ------------------------------------------------------------------------------------

    @property
    def in_evaluation_step(self) -> bool:
        """Whether an evaluation step of the user's is running; monitors may run the module when it has ended."""
        return self._tap is not None and not self._tap.training

    def watchers(self) -> list[StepWatcher]:
        """The watchers that are in the Trainer's list right now; a tuner may have taken them out."""
        return [callback for callback in self.trainer.callbacks if getattr(callback, "engine", None) is self]

    def _step(self, stage: str, given: dict[str, Any]) -> Step:
        trainer, module = self.trainer, self.module
        parts, device = self.parts or [Part()], module.device
        names = [name for part in parts for name in part.tags]
        tags = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for part in parts
            for name, value in part.tags.items()
            if names.count(name) == 1  # else it depends on the loader
        }
        training = stage == "train"
        idx = 0 if training else given.get("dataloader_idx", 0)
        step = Step(
            trainer=trainer,
            module=module,
            stage=stage,
            batch=given["batch"],
            tags=tags,
            parts=parts,
            batch_idx=given.get("batch_idx", 0),
            dataloader_idx=idx,
            epoch=trainer.current_epoch,
            global_step=trainer.global_step,
            counter=trainer.fit_loop.epoch_loop.total_batch_idx if training else 0,
            logging=trainer._logger_connector.should_update_logs if training else False,
        )
        if not step.of_several:
            parts[0].loader = idx
        return step

    def _read_ids(self, step: Step, watchers: Sequence[StepWatcher]) -> None:
        for watcher in watchers:
            step.asking = watcher
            watcher.begin(step)
        step.asking = None

    def _start_heads(
        self, step: Step, watchers: Sequence[StepWatcher], tracker: RowTracker | None
    ) -> tuple[Heads, HeadFinder | None]:
        """Let heads and features that watchers read listen to the step; and what finds a head, where that is sought."""
        heads: Heads = {}
        found = None
        for reads in dict.fromkeys(w.reads for w in watchers if w.needs_features):
            path, features, pool = reads
            key = (*reads, step.stage)  # losses of an evaluation may have another head than those of training
            if key not in self._heads:
                self._heads[key] = (
                    HeadTap(self.module, path, compiled=_is_compiled(self.module))
                    if features is None
                    else FeatureTap(self.module, features, pool)
                )
                self._undo.callback(self._heads[key].close)
            head = heads[reads] = self._heads[key]
            # In evaluation the rows of a head that is looked for are those of the logits.
            follows = step.stage == "train" or step.of_several or isinstance(head, FeatureTap)
            finder = head.start(tracker if follows else None)
            found = found or finder
        return heads, found


def _is_compiled(module: nn.Module) -> bool:
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    ) or (hasattr(module, "_compiler_ctx") and module._compiler_ctx is not None)
