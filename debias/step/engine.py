"""One engine per run: wraps the user's steps once, feeds every watcher, and puts everything back.

The first watcher in ``trainer.callbacks`` makes the engine; the others join it. Everything here that reaches into
Lightning does so at one of five places: the step methods, the hook before batch transfer, the strategy's
``process_dataloader``, forward hooks on submodules, and the Trainer's loop counters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from debias.errors import DebiasError, UnsupportedStrategyError
from debias.ops.distributed import is_distributed, use_group
from debias.step.agreement import Agreement, flat_loaders, refuse_contradictions
from debias.step.context import Step
from debias.step.detection import DetectorStep, detectors
from debias.step.guards import data_group, refuse_duplicating_sampler, runs_again, takes_iterator
from debias.step.loaders import Part, open_batch
from debias.step.proxy import StepProxy, attach, detach
from debias.step.seen import Seen
from debias.step.settle import Learned, Settlement, with_loss
from debias.step.split import split_losses
from debias.step.tagged import TagCollate
from debias.tap import adapters
from debias.tap.head import FeatureTap, HeadTap
from debias.tap.hooks import Hook
from debias.tap.predictions import Evaluated, hook_outputs
from debias.tap.rows import RowTracker
from debias.tap.selection import select_calls
from debias.tap.tap import LossTap

if TYPE_CHECKING:
    from debias.step.watcher import Debiaser, StepWatcher

__all__ = ["StepEngine"]

_STEPS = {"fit": ("training_step", "validation_step"), "validate": ("validation_step",), "test": ("test_step",)}
_STAGES = {"training_step": "train", "validation_step": "validate", "test_step": "test"}


class StepEngine:
    """Watches and rewrites the steps of one module in one run of one Trainer."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self.module = module
        self.parts: list[Part] = []
        self._proxies: list[StepProxy] = []
        self._handles: list[Any] = []
        self._collates: list[tuple[Any, Any]] = []
        self._training_collates: tuple[int, list[TagCollate]] = 0, []  # of the loaders set up last, and in which epoch
        self._heads: dict[Any, HeadTap | FeatureTap] = {}
        self._tap: LossTap | None = None
        self._detector: DetectorStep | None = None
        self.seen: Seen | None = None
        self._learned = Learned()
        self._rows_needed_in: dict[tuple[str, int], bool] = {}  # by stage and loader, in evaluation
        self._counter: int | None = None
        self._agreement = Agreement()

    # -- opening and closing -----------------------------------------------------------------------

    def open(self, stage: str) -> None:
        """Wrap what this stage needs."""
        if self._proxies:
            return
        use_group(data_group(self.trainer.strategy))
        for name in _STEPS.get(stage, ()):
            self._proxies.append(attach(self.module, name, self._around(name)))
        self._proxies.append(attach(self.module, "_on_before_batch_transfer", self._strip_tags))
        self._proxies.append(attach(self.trainer.strategy, "process_dataloader", self._process_dataloader))
        if any(getattr(callback, "reads_predictions", False) for callback in self.trainer.callbacks):
            self._handles.append(self.module.register_forward_hook(Hook(self._keep_forward_output)))
            self._handles += hook_outputs(self.module, Hook(self._keep_prediction))
        for model in detectors(self.module) if stage == "fit" else ():
            self._proxies.append(attach(model, "forward", functools.partial(self._detect, model)))
        for submodule in self.module.modules():
            if (per_sample := adapters.adapter_of(submodule)) is not None:
                self._adapt(submodule, per_sample)

    def close(self) -> None:
        """Put everything back as it was. Safe to call twice."""
        use_group(None)
        while self._proxies:
            detach(self._proxies.pop())
        while self._handles:
            self._handles.pop().remove()
        while self._collates:
            loader, collate_fn = self._collates.pop()
            loader.collate_fn = collate_fn
        for head in self._heads.values():
            head.close()
        self._heads.clear()
        self._tap, self._detector, self.seen, self.parts = None, None, None, []

    def check_optimizers(self, watcher: StepWatcher) -> None:
        """LBFGS calls the step several times per batch, which would update a method's state several times."""
        if watcher.stateful and any(isinstance(o, torch.optim.LBFGS) for o in self.trainer.optimizers):
            raise runs_again(watcher, "LBFGS")

    def _check_counter(self, step: Step, debiasers: list[Debiaser]) -> None:
        """Other optimisers that do (SAM) are known when they do it."""
        again, self._counter = step.counter == self._counter, step.counter
        stateful = next((watcher for watcher in debiasers if watcher.stateful), None)
        if again and stateful is not None:
            raise runs_again(stateful, " and ".join(type(o).__name__ for o in self.trainer.optimizers))

    # -- what is wrapped ---------------------------------------------------------------------------

    def _around(self, name: str) -> Callable[..., Any]:
        stage = _STAGES[name]
        run = self._train if stage == "train" else self._evaluate

        def around(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return run(stage, original, args, kwargs)

        return around

    def _strip_tags(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, self.parts = open_batch(args[0])
        return original(batch, *args[1:], **kwargs)

    def _process_dataloader(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loader = original(*args, **kwargs)
        refuse_duplicating_sampler(loader, self.trainer)
        collate_fn = getattr(loader, "collate_fn", None)
        if collate_fn is not None and all(of is not loader for of, _ in self._collates):
            loader.collate_fn = TagCollate(collate_fn.collate_fn if isinstance(collate_fn, TagCollate) else collate_fn)
            self._collates.append((loader, collate_fn))
        if collate_fn is not None and self.trainer.training and not takes_iterator(self.module):
            self._count_samples(loader.collate_fn)
        return loader

    def _count_samples(self, collate: TagCollate) -> None:
        """Let batches of several training loaders say how many samples each of them has; one loader needs no such."""
        epoch = self.trainer.current_epoch
        before = self._training_collates[1] if self._training_collates[0] == epoch else []  # else loaders are reloaded
        self._training_collates = epoch, [*before, collate]
        for each in self._training_collates[1]:
            each.counts = len(self._training_collates[1]) > 1

    def _keep_forward_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.in_evaluation_step and self.seen is not None:
            self.seen.keep(args, output)

    def _keep_prediction(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._tap is not None and self._tap.evaluated is not None:
            self._tap.evaluated.predictions.saw(args, kwargs, output)

    def _adapt(self, loss: nn.Module, per_sample: adapters.PerSample) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._tap is not None:
                self._tap.suspended += 1

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if (tap := self._tap) is None:
                return None
            tap.suspended -= 1
            if tap.suspended:
                return None
            compute = functools.partial(per_sample, module, **kwargs)
            return tap.adapted(type(module).__name__, args, compute, output)

        self._handles.append(loss.register_forward_pre_hook(Hook(before), with_kwargs=True))
        self._handles.append(loss.register_forward_hook(Hook(after), with_kwargs=True))

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

    def _train(self, stage: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Also while a tuner has taken our callbacks away, or a validation step calls this one: the user's own step.
        if not self.trainer.training or not (watchers := self.watchers()):
            return original(*args, **kwargs)
        debiasers: list[Debiaser] = [w for w in watchers if w.trains]  # type: ignore[misc]
        if debiasers:
            step = self._step(stage, args, kwargs)
            self._check_counter(step, debiasers)
            received = step.batch
            self._begin(step, debiasers)
            if step.batch is not received:
                args, kwargs = _with_batch(args, kwargs, step.batch)
        elif self._agreement.begins(self.trainer.current_epoch):
            self._agreement.check(self.trainer, [], None)
        self._agreement.start(self.trainer)
        output = self._changed(step, debiasers, original, args, kwargs) if debiasers else original(*args, **kwargs)
        self._agreement.end()
        return output

    def _begin(self, step: Step, debiasers: list[Debiaser]) -> None:
        """Augment the batch and read ids; in the first step of an epoch one rank's refusal is that of all."""
        first, problem = self._agreement.begins(step.epoch), None
        try:
            for watcher in debiasers:
                watcher.start(step)
            for watcher in debiasers:
                step.asking = watcher
                watcher.begin(step)
            if first and step.of_several:
                refuse_contradictions(flat_loaders(self.trainer.train_dataloader), sorted(step.keys))
        except DebiasError as error:
            if not first:
                raise
            problem = error
        step.asking = None
        if first:
            self._agreement.check(self.trainer, step.parts, problem)

    def _changed(
        self,
        step: Step,
        debiasers: list[Debiaser],
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The user's step, with what the methods make of its loss."""
        reweigher = next((w for w in debiasers if w.reweighs), None)
        penalisers = [w for w in debiasers if w.penalises]
        mixture = step.mixture
        if reweigher is not None and reweigher.losses != "whole" and mixture is not None:
            raise UnsupportedStrategyError(
                f"Expected `losses='whole'` together with {mixture.owner}, but got {reweigher.losses!r}: a loss that"
                " exists only per batch cannot be mixed from the labels of two samples. Remove one of them."
            )
        if reweigher is not None and reweigher.losses == "heads":
            output = self._with_detector(DetectorStep(step, reweigher, select_calls), original, args, kwargs)
            self._end_forward(debiasers)
            return output
        if reweigher is not None and reweigher.losses != "whole":
            split, output = split_losses(original, args, kwargs, step, reweigher)
            self._end_forward(debiasers)
            return with_loss(output, split)
        alone = reweigher is None and not penalisers and mixture is None
        if alone and (not is_distributed() or self._learned.as_ddp):
            output = original(*args, **kwargs)
            self._end_forward(debiasers)
            return output

        heads = {w.reads: self._head(*w.reads) for w in debiasers if w.needs_features}
        settlement = Settlement(step, reweigher, penalisers, heads, self._learned)
        stated = [w.loss_rows for w in debiasers if w.loss_rows is not None]
        rows = stated[0] if stated else None  # the same for all, or refused before training
        tracker = None
        if step.n is not None:
            arranged = rows if isinstance(rows, str) else None
            tracker = self._row_tracker(step, everything=self._learned.rows_needed, arranged=arranged)
        finders = [finder for head in heads.values() if (finder := head.start(tracker)) is not None]
        tap = LossTap(
            tracker=tracker,
            rows=rows,
            finder=finders[0] if finders else None,
            mixture=mixture,
            strict=bool(settlement.choices),
            careful=settlement.first,
            evaluated=Evaluated() if any(w.reads_predictions for w in debiasers) else None,
            # Under manual optimisation the loss is used up inside the step: nothing can be settled afterwards.
            at_once=None if self.module.automatic_optimization else settlement.at_once,
        )
        output = self._watched(tap, original, args, kwargs)
        for head in heads.values():
            head.stop()
        self._end_forward(debiasers)
        loss = None
        if self.module.automatic_optimization:
            loss = settlement.settle(tap, output)
        else:
            settlement.finish_manual(tap)
        tap.close()
        for head in heads.values():
            head.forget()
        return output if loss is None else with_loss(output, loss)

    def _row_tracker(self, step: Step, **options: Any) -> RowTracker:
        """What follows rows of the numbered samples."""
        first, *others = step.numbered
        strangers = [part.batch_in(step.batch) for part in step.strangers]
        joined = [(part.batch_in(step.batch), part.n or 0) for part in others]
        n = (step.n or 0) - sum(size for _, size in joined)
        return RowTracker(first.batch_in(step.batch), n, joined=joined, strangers=strangers, **options)

    def _with_detector(
        self, detector: DetectorStep, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._detector = detector
        try:
            output = original(*args, **kwargs)
        finally:
            self._detector = None
        detector.finish()
        return output

    def _watched(
        self, tap: LossTap, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._tap = tap
        adapters._active.append(tap)
        try:
            with tap:
                return original(*args, **kwargs)
        finally:
            adapters._active.pop()
            self._tap = None

    def _end_forward(self, debiasers: list[Debiaser]) -> None:
        for watcher in debiasers:
            watcher.random.end_forward()

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, stage: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        monitors = [w for w in self.watchers() if w.monitors]
        if not monitors or self.trainer.training:  # a training step may call the validation step
            return original(*args, **kwargs)
        step = self._step(stage, args, kwargs)
        for monitor in monitors:
            step.asking = monitor
            monitor.begin(step)
        step.asking = None
        of_loader = stage, step.dataloader_idx
        everything = self._rows_needed_in.get(of_loader, True)
        tracker = None if step.n is None else self._row_tracker(step, everything=everything)
        self.seen = seen = Seen(tracker)
        # Apart from those of training, whose losses may have another head.
        heads = {w.reads: self._head(*w.reads, stage) for w in monitors if w.needs_features}
        finders = []
        for head in heads.values():  # the rows of a head that is looked for are those of the logits
            follows = tracker if step.of_several or isinstance(head, FeatureTap) else None
            finders += [finder for finder in [head.start(follows)] if finder is not None]
        finder = finders[0] if finders else None
        evaluated = Evaluated()
        tap = LossTap(training=False, tracker=tracker, finder=finder, evaluated=evaluated)
        try:
            output = self._watched(tap, original, args, kwargs)
            evaluated.elements.returned = output.get("loss") if isinstance(output, Mapping) else output
            for head in heads.values():
                head.stop()
            for monitor in monitors:
                if monitor.needs_features:
                    step.features = seen.features(monitor, heads[monitor.reads], tap, step)
                monitor.observe(step, tap.calls, seen.output, output)
            self._rows_needed_in[of_loader] = tracker is not None and tracker.needed
        finally:
            self.seen = None
            tap.close()
            for head in heads.values():
                head.forget()
        return output

    # -- shared ------------------------------------------------------------------------------------

    @property
    def in_evaluation_step(self) -> bool:
        """Whether an evaluation step of the user's is running; monitors may run the module when it has ended."""
        return self._tap is not None and not self._tap.training

    def watchers(self) -> list[StepWatcher]:
        """The watchers that are in the Trainer's list right now; a tuner may have taken them out."""
        return [callback for callback in self.trainer.callbacks if getattr(callback, "engine", None) is self]

    def _step(self, stage: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        trainer, module = self.trainer, self.module
        batch = args[0] if args else next(iter(kwargs.values()))
        batch_idx = args[1] if len(args) > 1 else kwargs.get("batch_idx", 0)
        names = [name for part in self.parts for name in part.tags]
        tags = {
            name: _moved(value, module.device)
            for part in self.parts
            for name, value in part.tags.items()
            if names.count(name) == 1  # else it depends on the loader
        }
        training = stage == "train"
        idx = 0 if training else (args[2] if len(args) > 2 else kwargs.get("dataloader_idx", 0))
        parts = self.parts or [Part()]
        if len(parts) == 1 and not parts[0].path:  # the batch is of one loader
            parts[0].loader = idx
        return Step(
            trainer=trainer,
            module=module,
            stage=stage,
            batch=batch,
            tags=tags,
            parts=parts,
            batch_idx=batch_idx,
            dataloader_idx=idx,
            epoch=trainer.current_epoch,
            global_step=trainer.global_step,
            counter=trainer.fit_loop.epoch_loop.total_batch_idx if training else 0,
            logging=trainer._logger_connector.should_update_logs if training else False,
        )

    def _head(
        self, path: str | None, features: str | None, pool: str | None, stage: str = "train"
    ) -> HeadTap | FeatureTap:
        key = (path, features, pool, stage)
        if key not in self._heads:
            self._heads[key] = (
                HeadTap(self.module, path, compiled=_is_compiled(self.module))
                if features is None
                else FeatureTap(self.module, features, pool)
            )
        return self._heads[key]


def _is_compiled(module: nn.Module) -> bool:
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    ) or (hasattr(module, "_compiler_ctx") and module._compiler_ctx is not None)


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return value.to(device, non_blocking=True)


def _with_batch(args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (batch, *args[1:]), kwargs
    return args, {name: batch if i == 0 else value for i, (name, value) in enumerate(kwargs.items())}
