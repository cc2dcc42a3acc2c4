"""One engine per run: wraps the user's steps once, feeds every watcher, and puts everything back.

The first watcher in ``trainer.callbacks`` makes the engine; the others join it. Everything here that reaches into
Lightning does so at one of five places: the step methods, the hook before batch transfer, the strategy's
``process_dataloader``, forward hooks on submodules, and the Trainer's loop counters.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from debias.errors import (
    AmbiguousLossError,
    DebiasError,
    RowsError,
    UnsupportedStrategyError,
)
from debias.step import adapters
from debias.step.batch import TagCollate, split_tags
from debias.step.context import Step
from debias.step.contract import Method, Watcher
from debias.step.detection import DetectorStep, detectors
from debias.step.distributed import global_rank, global_sum, is_distributed, world_size
from debias.step.evaluated import Evaluated
from debias.step.guards import refuse_duplicating_sampler, runs_again
from debias.step.head import FeatureTap, HeadTap
from debias.step.proxy import Hook, StepProxy, attach, detach
from debias.step.rows import RowTracker
from debias.step.selection import ambiguous, height, out_of_place, reaching, select_call, select_calls, untapped
from debias.step.shared import SharedLosses
from debias.step.split import split_losses
from debias.step.stated import check_stated, check_stated_losses, stated_losses
from debias.step.tap import LossCall, LossTap, no_loss_error

__all__ = ["StepEngine"]

_STEPS = {"fit": ("training_step", "validation_step"), "validate": ("validation_step",), "test": ("test_step",)}
_STAGES = {"training_step": "train", "validation_step": "validate", "test_step": "test"}


class StepEngine:
    """Watches and rewrites the steps of one module in one run of one Trainer."""

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer = trainer
        self.module = module
        self.tags: dict[str, Any] = {}
        self._proxies: list[StepProxy] = []
        self._handles: list[Any] = []
        self._collates: list[tuple[Any, Any]] = []
        self._heads: dict[Any, HeadTap | FeatureTap] = {}
        self._tap: LossTap | None = None
        self._detector: DetectorStep | None = None
        self._forward_output: Any = None
        self.forward_inputs: list[Tensor] = []
        self._tracker: RowTracker | None = None
        # How often the evaluation step has called the module's `forward`.
        self.forward_calls = 0
        # What the first step taught: the position of the one loss that is meant, and whether rows must be replayed.
        self._reweighed: list[LossCall] = []
        self._rows_needed = True
        self._rows_needed_in: dict[str, bool] = {}
        self._checked = self._sums_checked = False
        self._shared = SharedLosses()
        self._named: dict[tuple[Any, int], str] = {}
        self._counter: int | None = None

    # -- opening and closing -----------------------------------------------------------------------

    def open(self, stage: str) -> None:
        """Wrap what this stage needs."""
        if self._proxies:
            return
        for name in _STEPS.get(stage, ()):
            self._proxies.append(attach(self.module, name, self._around(name)))
        self._proxies.append(attach(self.module, "_on_before_batch_transfer", self._strip_tags))
        self._proxies.append(attach(self.trainer.strategy, "process_dataloader", self._process_dataloader))
        if any(getattr(callback, "monitors", False) for callback in self.trainer.callbacks):
            self._handles.append(self.module.register_forward_hook(Hook(self._keep_forward_output)))
            for child in self.module.children():
                if getattr(child, "_compiled_call_impl", None) is None:  # else the hook would be compiled, too
                    self._handles.append(child.register_forward_hook(Hook(self._keep_prediction), with_kwargs=True))
        for model in detectors(self.module) if stage == "fit" else ():
            self._proxies.append(attach(model, "forward", functools.partial(self._detect, model)))
        for submodule in self.module.modules():
            if (per_sample := adapters.adapter_of(submodule)) is not None:
                self._adapt(submodule, per_sample)

    def close(self) -> None:
        """Put everything back as it was. Safe to call twice."""
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
        self._tap, self._detector, self._forward_output, self.tags = None, None, None, {}
        self.forward_inputs, self._tracker = [], None

    def check_optimizers(self, watcher: Watcher) -> None:
        """LBFGS calls the step several times per batch, which would update a method's state several times."""
        if watcher.stateful and any(isinstance(o, torch.optim.LBFGS) for o in self.trainer.optimizers):
            raise runs_again(watcher, "LBFGS")

    def _check_counter(self, step: Step, debiasers: list[Method]) -> None:
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
        batch, self.tags = split_tags(args[0])
        return original(batch, *args[1:], **kwargs)

    def _process_dataloader(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loader = original(*args, **kwargs)
        refuse_duplicating_sampler(loader, self.trainer)
        collate_fn = getattr(loader, "collate_fn", None)
        if collate_fn is not None and not isinstance(collate_fn, TagCollate):
            loader.collate_fn = TagCollate(collate_fn)
            self._collates.append((loader, collate_fn))
        return loader

    def _keep_forward_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.in_evaluation_step:
            self._forward_output, self.forward_inputs = output, [x for x in args if isinstance(x, Tensor)]
            self.forward_calls += 1
            self._keep_prediction(module, args, {}, output)

    def _keep_prediction(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.in_evaluation_step and self._tap is not None and self._tap.evaluated is not None:
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
        debiasers: list[Method] = [w for w in self.watchers() if w.trains]  # type: ignore[misc]
        # Also while a tuner has taken our callbacks away, or a validation step calls this one: the user's own step.
        if not debiasers or not self.trainer.training:
            return original(*args, **kwargs)
        step = self._step(stage, args, kwargs)
        self._check_counter(step, debiasers)
        received = step.batch
        for watcher in debiasers:
            watcher.start(step)
        if step.batch is not received:
            args, kwargs = _with_batch(args, kwargs, step.batch)
        for watcher in debiasers:
            watcher.begin(step)
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
            return _with_loss(output, split)
        alone = reweigher is None and not penalisers and mixture is None
        if alone and (not is_distributed() or self._shared.as_ddp):
            output = original(*args, **kwargs)
            self._end_forward(debiasers)
            return output

        stated = [w.loss_rows for w in debiasers if w.loss_rows is not None]
        rows = stated[0] if stated else None  # the same for all, or refused before training
        tracker = None
        if step.n is not None:
            arranged = rows if isinstance(rows, str) else None
            tracker = RowTracker(step.batch, step.n, everything=self._rows_needed, arranged=arranged)
        heads = {(w.head, w.features): self._head(w.head, w.features) for w in debiasers if w.needs_features}
        finders = [finder for head in heads.values() if (finder := head.start(tracker)) is not None]
        combine, late = self._combiner(reweigher, penalisers, step)
        tap = LossTap(combine, late, True, tracker, rows, finders[0] if finders else None, mixture)
        output = self._watched(tap, original, args, kwargs)
        for head in heads.values():
            head.stop()
        self._end_forward(debiasers)
        loss = self._rewritten(step, tap, output, reweigher, penalisers, heads)
        self._reweighed = []
        tap.close()
        for head in heads.values():
            head.forget()
        return output if loss is None else _with_loss(output, loss)

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

    def _combiner(
        self, reweigher: Method | None, penalisers: list[Method], step: Step
    ) -> tuple[Callable[[LossCall], Tensor | None] | None, bool]:
        """What the step's losses are replaced by while it runs, and whether the right one is known only afterwards."""
        self._reweighed = []
        manual = not self.module.automatic_optimization
        methods = [] if reweigher is None else [reweigher]
        choices = [method.loss for method in methods + penalisers]
        if step.mixture is not None:
            choices.append(step.mixture.loss)
        # Under manual optimisation the loss is used up inside the step: nothing can be settled afterwards.
        shared = self._shared
        late = reweigher is not None and not manual and not isinstance(reweigher.loss, int) and shared.only is None
        shared.start(choices, self.module.device, first=manual, late=late, logging=step.logging)

        def combine(call: LossCall) -> Tensor | None:
            if reweigher is not None and manual and reweigher.loss is None and call.position:
                raise ambiguous(["(the first loss)", call.name], type(reweigher).__name__)
            if not late and reweigher is not None and shared.means(reweigher.loss, call):
                shared.take(call)
                self._check_name([call], reweigher.loss, type(reweigher).__name__)
                self._reweighed.append(call)
                return call.scaled(reweigher.reweigh([call], step)[0])
            return call.scaled(call.mean()) if is_distributed() and shared.take(call) else None

        return (combine if reweigher is not None or is_distributed() else None), late

    def _rewritten(
        self,
        step: Step,
        tap: LossTap,
        output: Any,
        reweigher: Method | None,
        penalisers: list[Method],
        heads: dict[Any, HeadTap | FeatureTap],
    ) -> Tensor | None:
        """The loss to return instead of the user's, or None to return the step's output as it is."""
        if not self.module.automatic_optimization:
            self._shared.end(None)
            if (reweigher is not None and not self._reweighed) or (step.mixture is not None and not tap.calls):
                raise no_loss_error(_set_losses(self.module))
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            if is_distributed():
                raise DebiasError(
                    "Expected the training step to return a loss on every rank, but got None: the other ranks would"
                    " wait for this one. Return a loss of zero, e.g. `0 * logits.sum()`, instead of skipping."
                )
            return None
        alone, shared = reweigher is None and not penalisers and step.mixture is None, self._shared
        if alone and not shared.comparing:
            return None  # what was handed back, the global mean, is all there is to do
        calls, lost = reaching(tap, loss)
        shared.end(calls)  # before anything else is reduced, so that all ranks raise or none
        if is_distributed() and (step.logging or not self._sums_checked):
            self._sums_checked = True
            _check_sums(loss, shared.calls)
        if alone:
            shared.settle_on(calls[0] if len(calls) == 1 else None)
            return _joined(loss, calls[0]) if shared.passed_over(calls) else None
        if lost:
            raise untapped(lost, bool(calls))
        if not calls:
            if (stated := stated_losses(output, tap)) is None:
                raise no_loss_error(_set_losses(self.module), reweighs=reweigher is not None)
            if step.logging or not self._checked:
                self._checked = True
                check = check_stated if stated[0].name == "logits" else check_stated_losses
                check(loss, *stated)
            if tap.finder is not None and isinstance(stated[0].logits, Tensor):
                stated[0].linear = tap.finder.match(stated[0].logits)
            return self._from_stated(step, loss, *stated, reweigher, penalisers, heads)
        if step.mixture is not None:  # several losses are an error unless `loss=` says which the labels belong to
            self._selected(calls, step.mixture.loss, step.mixture.owner, step)
        if reweigher is not None:
            selected = self._selected(calls, reweigher.loss, type(reweigher).__name__, step)
            if tap.late:
                loss = _settle(loss, calls, selected, shared.calls, reweigher, step)
                # From the next step on the one loss that is meant is reweighed at once, in the step itself.
                shared.settle_on(selected[0] if len(selected) == 1 and reweigher.loss != "sum" else None)
            elif len(selected) > 1 or self._reweighed != selected:
                raise out_of_place(self._reweighed, selected, tap.calls)
        elif len(calls) == 1:
            if is_distributed() and shared.misses(calls[0]):
                raise out_of_place(shared.calls, calls, tap.calls)
            shared.settle_on(calls[0])
            if shared.passed_over(calls):
                loss = _joined(loss, calls[0])
        loss = _penalised(
            loss, penalisers, lambda w: self._selected(calls, w.loss, type(w).__name__, step), heads, step
        )
        self._rows_needed = self._rows_needed and tap.tracker is not None and tap.tracker.needed
        return loss

    def _selected(self, calls: list[LossCall], loss: Any, who: str, step: Step) -> list[LossCall]:
        """The calls that ``loss=`` means, which must be the same in every step, and those of whole samples."""
        selected = select_calls(calls, loss, who)
        self._check_name(selected, loss, who)
        if len(selected) > 1 and step.n is not None and all(height(call) < step.n for call in selected):
            raise AmbiguousLossError(
                f"Expected at least one of the losses that `loss={loss!r}` of {who} means to be of all {step.n} samples"
                f" of the batch, but got {len(selected)} of {', '.join(str(height(call)) for call in selected[:8])}"
                f"{', ...' if len(selected) > 8 else ''} rows: means by group of parts of a batch do not add up to"
                " those of the batch. Join the logits of the parts and compute one loss."
            )
        return selected

    def _check_name(self, selected: list[LossCall], loss: Any, who: str) -> None:
        """Remember which loss stands where ``loss=<index>`` points to."""
        if not isinstance(loss, int):
            return
        for call in selected:
            if (first := self._named.setdefault((who, loss), call.name)) != call.name:
                raise AmbiguousLossError(
                    f"Expected `loss={loss}` of {who} to point to the same loss in every step, but got `{call.name}`"
                    f" where `{first}` was. Compute the losses in the same order in every step, or choose by name:"
                    f" `loss=callable(call) -> bool`."
                )

    def _from_stated(
        self,
        step: Step,
        loss: Tensor,
        call: LossCall,
        plain: Tensor,
        reweigher: Method | None,
        penalisers: list[Method],
        heads: dict[Any, HeadTap | FeatureTap],
    ) -> Tensor:
        """Swap the mean of the stated per-sample losses inside the returned loss for the debiased one."""
        if reweigher is not None:
            loss = loss + (reweigher.reweigh([call], step)[0] - plain)
        elif step.mixture is not None:
            loss = loss + (call.mean() - plain)
        return _penalised(loss, penalisers, lambda watcher: [call], heads, step)

    def _end_forward(self, debiasers: list[Method]) -> None:
        for watcher in debiasers:
            watcher.random.end_forward()

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self, stage: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        monitors = [w for w in self.watchers() if w.monitors]
        if not monitors or self.trainer.training:  # a training step may call the validation step
            return original(*args, **kwargs)
        step = self._step(stage, args, kwargs)
        self._forward_output, self.forward_inputs, self.forward_calls = None, [], 0
        for monitor in monitors:
            monitor.begin(step)
        if step.n is not None:
            self._tracker = RowTracker(step.batch, step.n, everything=self._rows_needed_in.get(stage, True))
        # Apart from those of training, whose losses may have another head.
        heads = {(w.head, w.features): self._head(w.head, w.features, stage) for w in monitors if w.needs_features}
        finders = [finder for head in heads.values() if (finder := head.start()) is not None]
        finder = finders[0] if finders else None
        tap = LossTap(training=False, tracker=self._tracker, finder=finder, evaluated=Evaluated())
        try:
            output = self._watched(tap, original, args, kwargs)
            for head in heads.values():
                head.stop()
            for monitor in monitors:
                if monitor.needs_features:
                    step.features = self._features(monitor, heads[monitor.head, monitor.features], tap)
                monitor.observe(step, tap.calls, self._forward_output, output)
            self._rows_needed_in[stage] = self._tracker is not None and self._tracker.needed
        finally:
            self._forward_output, self.forward_inputs, self._tracker = None, [], None
            tap.close()
            for head in heads.values():
                head.forget()
        return output

    def rows_of(self, tensor: Tensor, call: LossCall | None, who: str, inputs: Sequence[Tensor] = ()) -> Tensor | None:
        """Sample of each row of what a monitor reads in an evaluation step; None where row i is sample i.

        Args:
            tensor: the logits or features.
            call: the loss that was computed from them; None where none was.
            who: name of the monitor, for messages.
            inputs: what the network that made them was given.

        Returns:
            int64 ``(rows,)``.

        Raises:
            RowsError: rows come from samples in a way that cannot be followed.
        """
        tracker = self._tracker
        if tracker is None or not tensor.ndim:
            return None
        count = tensor.shape[0]
        candidates = [tensor, *inputs] if call is None else [call.target, tensor]
        rows = [x for x in candidates if isinstance(x, Tensor) and x.ndim and x.shape[0] == count]
        index = tracker.resolve(rows, count)
        if isinstance(index, bool):
            if count != tracker.n:
                raise RowsError(
                    f"Expected the rows of what {who} reads to be those of the {tracker.n} samples of the batch, or"
                    f" views of them, but got shape {tuple(tensor.shape)}, and where its rows come from cannot be"
                    " followed. Make them of tensors of the batch by reshapes and indexing; a `collate_fn` must not"
                    " leave samples out, as ids cannot follow."
                )
            if not tracker.puts_samples_elsewhere() and not any(map(tracker.is_sorted, rows)):
                return None
            raise _out_of_order(who)
        if index is None:
            return None
        tracker.needed = True
        index = index.flatten(1) if index.ndim > 1 else index.unsqueeze(1)
        if not torch.equal(index, index[:, :1].expand_as(index)):
            raise _out_of_order(who)
        return index[:, 0]

    def _features(self, monitor: Watcher, head: HeadTap | FeatureTap, tap: LossTap) -> Tensor | None:
        """Features of the loss that the monitor means, or of what the module's ``forward`` returned."""
        if tap.calls and isinstance(head, HeadTap):
            call = select_call(tap.calls, monitor.loss, type(monitor).__name__)
            read, of_call = call.logits, call
        else:
            call = LossCall("forward", self._forward_output, None, "none", 0, tuple, lambda call, num: None)  # type: ignore[arg-type]
            if tap.finder is not None and isinstance(self._forward_output, Tensor):
                call.linear = tap.finder.match(self._forward_output)
            read, of_call = self._forward_output, None
        if isinstance(read, Tensor) and read.ndim:
            rows = self.rows_of(read, of_call, type(monitor).__name__, self.forward_inputs)
            if rows is not None and not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
                raise _out_of_order(type(monitor).__name__)
        head.resolve(call)
        return call.features

    # -- shared ------------------------------------------------------------------------------------

    @property
    def in_evaluation_step(self) -> bool:
        """Whether an evaluation step of the user's is running; monitors may run the module when it has ended."""
        return self._tap is not None and not self._tap.training

    def watchers(self) -> list[Watcher]:
        """The watchers that are in the Trainer's list right now; a tuner may have taken them out."""
        return [callback for callback in self.trainer.callbacks if getattr(callback, "engine", None) is self]

    def _step(self, stage: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        trainer, module = self.trainer, self.module
        batch = args[0] if args else next(iter(kwargs.values()))
        batch_idx = args[1] if len(args) > 1 else kwargs.get("batch_idx", 0)
        tags = {name: _moved(value, module.device) for name, value in self.tags.items()}
        training = stage == "train"
        return Step(
            trainer=trainer,
            module=module,
            stage=stage,
            batch=batch,
            tags=tags,
            batch_idx=batch_idx,
            dataloader_idx=0 if training else (args[2] if len(args) > 2 else kwargs.get("dataloader_idx", 0)),
            epoch=trainer.current_epoch,
            global_step=trainer.global_step,
            counter=trainer.fit_loop.epoch_loop.total_batch_idx if training else 0,
            logging=trainer._logger_connector.should_update_logs if training else False,
        )

    def _head(self, path: str | None, features: str | None, stage: str = "train") -> HeadTap | FeatureTap:
        key = (path, features, stage)
        if key not in self._heads:
            self._heads[key] = (
                HeadTap(self.module, path, compiled=_is_compiled(self.module))
                if features is None
                else FeatureTap(self.module, features)
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


def _with_loss(output: Any, loss: Tensor) -> Any:
    if not isinstance(output, Mapping):
        return loss
    changed: Any = copy.copy(output)
    changed["loss"] = loss
    return changed


def _out_of_order(who: str) -> RowsError:
    return RowsError(
        f"Expected the evaluation step to keep the samples in the order of the batch for {who}, but it puts them in"
        " another one, where that cannot be followed to what is read. Leave the order as it is."
    )


def _settle(
    loss: Tensor,
    calls: list[LossCall],
    selected: list[LossCall],
    shared: list[LossCall],
    reweigher: Method,
    step: Step,
) -> Tensor:
    """After the step: give every loss handed back provisionally its gradient, and the returned loss its value.

    Args:
        loss: the returned loss.
        calls: the losses that it depends on.
        selected: those of them that are reweighed.
        shared: those of them that some method means.
        reweigher: the method.
        step: the running step.
    """
    means = reweigher.reweigh(selected, step)
    new = {call: call.scaled(mean) for call, mean in zip(selected, means, strict=True)}
    new |= {call: call.scaled(call.mean()) for call in shared if call not in new}
    for call in calls:
        if call.late is not None:
            value = new[call] if call in new else call.local()
            (call.late.gradient,) = torch.autograd.grad(value, call.elements[0], retain_graph=True)
    # The factors keep their graph: where a step weighs its losses with learned factors, those learn from the new value.
    factors = torch.autograd.grad(loss, [call.edge for call in new], create_graph=True)
    for call, factor in zip(new, factors, strict=True):
        if call.late is not None:
            loss = loss + factor * (new[call] - call.late.value).detach()
    return loss


def _joined(loss: Tensor, call: LossCall) -> Tensor:
    """The returned loss with the mean of all ranks where it has that of this rank, to first order."""
    (factor,) = torch.autograd.grad(loss, [call.edge], retain_graph=True)
    return loss + factor.detach() * (call.scaled(call.mean()) - call.local())


def _check_sums(loss: Tensor, calls: list[LossCall]) -> None:
    """Refuse, on all ranks or none, a sum over ranks that the step does not divide by what it runs over.

    A loss with ``reduction="sum"`` is handed back as the global mean times this rank's denominator. What the step makes
    of it is the objective of one process if it takes all of that back, or as much of it on every rank.
    """
    sums = [call for call in calls if call.reduction == "sum"]
    if not sums:  # then no rank has any: all have the same ones
        return
    places = [i for i, call in enumerate(sums) if call.edge is not None] if loss.requires_grad else []
    edges = [sums[i].edge for i in places]
    factors = torch.autograd.grad(loss.sum(), edges, retain_graph=True, allow_unused=True) if edges else ()
    found = torch.zeros(world_size(), len(sums), 2, dtype=torch.float64, device=loss.device)
    for i, factor in zip(places, factors, strict=True):
        total = sums[i].elements[1].detach().sum().double()
        share = torch.zeros_like(total) if factor is None else factor.detach().double() * total
        # A rank where nothing counts adds nothing, whatever it divides by.
        counts = (total != 0) & share.isfinite()
        found[global_rank(), i] = torch.stack((torch.where(counts, share, 0), counts.double()))
    shares, counts = global_sum(found).unbind(-1)
    highest = torch.where(counts > 0, shares, -torch.inf).amax(0)
    lowest = torch.where(counts > 0, shares, torch.inf).amin(0)
    half = any(t.dtype in (torch.float16, torch.bfloat16) for c in sums for t in (loss, c.logits) if t is not None)
    rounding = (2e-2 if half else 1e-5) * torch.maximum(highest.abs(), lowest.abs())
    wrong = ((highest - lowest > rounding) & (counts.sum(0) > 1)).tolist()
    if any(wrong):
        i = wrong.index(True)
        raise DebiasError(
            f"Expected the step to divide the sum of `{sums[i].name}` by what it runs over, but the returned loss takes"
            f" {float(lowest[i]):.4g} times their mean on one rank and {float(highest[i]):.4g} times on another, which"
            " is not the loss of one process. Divide by the sum of the weights or of the mask, `losses.sum() /"
            " mask.sum()`, or use `.mean()`."
        )


def _penalised(
    loss: Tensor,
    penalisers: list[Method],
    calls: Callable[[Method], list[LossCall]],
    heads: dict[Any, HeadTap | FeatureTap],
    step: Step,
) -> Tensor:
    """Add the penalties, then the factors their protocols put on the whole loss."""
    for watcher in penalisers:
        for call in calls(watcher):
            if watcher.needs_features:
                heads[watcher.head, watcher.features].resolve(call)
            loss = loss + watcher.penalise(call, step)
    for watcher in penalisers:
        if (factor := watcher.loss_factor(step)) != 1:
            loss = loss * factor
    return loss


def _set_losses(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if type(m).__name__ in adapters.SET_LOSSES]
