"""What becomes of the losses of a step, once it has returned: they are reweighed once, and penalties are added once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debias.errors import SPLIT, AmbiguousLossError, DebiasError, DebiasWarning, RowsError, UntappedLossError
from debias.ops import arguments
from debias.ops.distributed import alike, gather_objects, is_distributed
from debias.ops.groups import summed
from debias.step.context import Step
from debias.step.samples import refuse_regression
from debias.tap import adapters
from debias.tap.calls import LossCall, LossRecord, sum_of
from debias.tap.head import FeatureTap, HeadTap, check_features, rows_of_features
from debias.tap.rows import RowTracker
from debias.tap.selection import Reaching, ambiguous, height, means, of_batch, reaching, select_calls, untapped
from debias.tap.stated import check_registered, check_stated, stated_losses
from debias.tap.tap import LossTap, no_loss_error

if TYPE_CHECKING:
    from debias.step.watcher import Debiaser

__all__ = ["Learned", "Settlement", "loss_of", "with_loss"]


@dataclass
class Learned:
    """What the steps of a run have shown so far.

    Attributes:
        rows_needed: by stage and loader, whether rows have to be followed everywhere: until a step has shown that row i
            of what is read is sample i.
        epoch: in which a step was settled last.
        as_ddp: losses stay as DDP treats them: no method means one, and the step computes several or not the same on
            all ranks.
        only: name of the loss that is averaged over ranks where no method means one.
        names: the losses that ``loss=<index>`` of a method has pointed to.
        warned: a term beside the losses has been told of.
        constant_terms: terms beside the losses are of parameters alone, which the graph by itself does not tell.
    """

    rows_needed: dict[tuple[str, int], bool] = field(default_factory=dict)
    epoch: int | None = None
    as_ddp: bool = False
    only: str | None = None
    names: dict[tuple[str, int], str] = field(default_factory=dict)
    warned: bool = False
    constant_terms: bool = False

    def note_rows(self, step: Step, tracker: RowTracker | None) -> None:
        """Keep whether a step needed its rows to be followed."""
        if tracker is not None:
            self.rows_needed[step.stage, step.dataloader_idx] = tracker.needed


@dataclass(eq=False)
class Settlement:
    """Settles the losses of one step; ``learned`` is kept from step to step."""

    step: Step
    methods: list[Debiaser]
    learned: Learned

    def __post_init__(self) -> None:
        self.reweigher = next((method for method in self.methods if method.reweighs), None)
        self.penalisers = [method for method in self.methods if method.penalises]
        self.needing = [w for w in (self.reweigher, *self.penalisers) if w is not None and w.needs_loss]
        # Who means a loss: which one, and its name in messages.
        self.choices: dict[Any, tuple[Any, str]] = {w: (w.loss, type(w).__name__) for w in self.needing}
        if (mixture := self.step.mixture) is not None:
            self.choices[None] = mixture.loss, mixture.owner
        self.selected: dict[Any, list[LossCall]] = {}
        self.first = self.learned.epoch != self.step.epoch  # in an epoch
        self.checks = self.first or self.step.logging
        self.used: list[tuple[LossCall, Any]] = []  # and what each was divided by

    @property
    def changes_loss(self) -> bool:
        """Whether methods make another loss of the step's."""
        return self.reweigher is not None or bool(self.penalisers) or self.step.mixture is not None

    # -- manual optimisation: a loss is used up inside the step ------------------------------------

    def at_once(self, call: LossCall) -> Tensor | None:
        """The debiased loss in the place of a loss, while the step runs."""
        method = self.reweigher
        if method is None or not means(method.loss, call):
            return None
        if method.loss is None and call.position:
            raise ambiguous(["(the first loss)", call.name], type(method).__name__, manual=True)
        if call.record.undivided:
            raise UntappedLossError(
                f"Expected a mean under manual optimisation, but `{call.name}` is a sum, and what the step divides it"
                " by comes too late. Use `.mean()` or `reduction='mean'`, or automatic optimisation."
            )
        if call.record.of_batch:
            raise of_batch(call, manual=True)
        self._check_meant([call], method)
        call.multiply(None)
        self.used.append((call, call.record.divisor))
        return method.reweigh([call], self.step)[0]

    def _finish_manual(self, tap: LossTap) -> None:
        """Refuse a step in which nothing was found, or which has multiplied a loss by a number of the whole batch."""
        if (self.reweigher is not None and not self.used) or (self.step.mixture is not None and not tap.calls):
            raise no_loss_error(_set_losses(self.step.module), manual=True)
        if self.checks:
            check_registered(call for call, _ in self.used)
        for call, divisor in self.used:  # since it was handed back
            if call.record.of_batch or call.record.divisor is not divisor:
                raise of_batch(call, manual=True)

    # -- automatic optimisation --------------------------------------------------------------------

    def settle(self, tap: LossTap, output: Any, heads: Mapping[Any, HeadTap | FeatureTap]) -> Tensor | None:
        """The loss to return instead of the user's, or None to return the step's output as it is.

        Args:
            tap: has watched the step.
            output: what the step has returned.
            heads: deliver features, by what methods read.
        """
        loss = loss_of(output)
        if not self.step.module.automatic_optimization:
            self._finish_manual(tap)
            loss = None
        elif isinstance(loss, Tensor):
            found = reaching(tap, loss)
            self._compare(found)
            if self.choices:
                loss = self._settled(found, tap, output)
            elif is_distributed() and not self.learned.as_ddp:
                loss = self._averaged(found)
            loss = self._penalised(loss, found, tap, heads)
        elif is_distributed():
            raise DebiasError(
                "Expected the training step to return a loss on every rank, but got None: the other ranks would"
                " wait for this one. Return a loss of zero, e.g. `0 * logits.sum()`, instead of skipping."
            )
        else:
            return None
        self.learned.epoch = self.step.epoch
        self.learned.note_rows(self.step, tap.tracker)
        return loss

    def _settled(self, found: Reaching, tap: LossTap, output: Any) -> Tensor:
        plain = None
        stated = stated_losses(output, tap, beside=bool(found.calls))
        if stated is not None:
            call, plain = stated
            if self.checks:
                check_stated(found.loss, call, plain)
            found.calls = [call]
            self.selected = {method: [call] for method in self.choices}
        elif found.lost:
            raise untapped(found.lost, bool(found.calls))
        elif not found.calls:
            raise no_loss_error(_set_losses(self.step.module))
        else:
            self.selected = {method: self._selected(found.calls, tap, method) for method in self.choices}
        meant = [call for call in found.calls if any(call in calls for calls in self.selected.values())]
        if self.checks:
            check_registered(meant)
        if plain is None:
            found.multiply(meant)
            self._check_other_terms(found, tap)
        reweighed = [] if self.reweigher is None else self.selected[self.reweigher]
        values = [] if self.reweigher is None else self.reweigher.reweigh(reweighed, self.step)
        others = []
        if is_distributed() or (plain is not None and self.step.mixture is not None):
            others = [call for call in meant if call not in reweighed]
        if not (values or others):
            return found.loss
        new = summed([*values, *(call.mean() for call in others)])
        if plain is not None:
            return found.loss + (new - plain)
        return found.replaced(reweighed + others, new)

    def _averaged(self, found: Reaching) -> Tensor:
        """The mean of the global batch, where no method means a loss and the first step computed one.

        A loss that is not linear in it stays as DDP treats it.
        """
        if self.learned.only is None and len(found.calls) == 1:
            self.learned.only = found.calls[0].name
        calls = [call for call in found.calls if call.name == self.learned.only][:1]
        if self.checks:
            check_registered(calls)
        try:
            found.multiply(calls)
        except UntappedLossError:
            return found.loss
        return found.replaced(calls, calls[0].mean()) if calls else found.loss

    def _penalised(
        self, loss: Tensor, found: Reaching, tap: LossTap, heads: Mapping[Any, HeadTap | FeatureTap]
    ) -> Tensor:
        """Add the penalties, then the factors their protocols put on the whole loss."""
        for watcher in self.penalisers:
            calls = self.selected[watcher] if watcher.needs_loss else _followed(found.calls, watcher.loss)
            head = heads[watcher.reads] if watcher.needs_features else None
            # A loss has not the rows of every run, nor of every loader.
            if not calls or (not watcher.needs_loss and head is not None and (head.several or self.step.of_several)):
                calls = [_of_features()]
            elif len(calls) > 1 and not watcher.needs_features:  # else each loss has a head of its own
                calls = [sum_of(calls, check=self.checks)]
            for call in calls:
                if head is not None:
                    having, of_loss = self.step.having(watcher), tap.loaders_of(call)
                    head.resolve(call, join=watcher.only_features, having=having, of_loss=of_loss)
                loss = loss + watcher.penalise(call, self.step)
        for watcher in self.penalisers:
            if (factor := watcher.loss_factor(self.step)) != 1:
                loss = loss * factor
        return loss

    # -- what is meant -----------------------------------------------------------------------------

    def _with_ids(self, calls: list[LossCall], tap: LossTap, method: Any) -> list[LossCall]:
        """Losses of samples that have the ids which a method reads; those of other loaders' alone are the user's.

        Raises:
            RowsError: a loss is of both kinds of samples.
        """
        loss, who = self.choices[method]
        if (having := self.step.having(method)) is None:
            return calls
        kept = []
        for call in calls:
            loaders = tap.loaders_of(call)
            if loaders is None or loaders <= set(having):
                kept.append(call)
            elif (loaders & set(having) or isinstance(loss, int)) and means(loss, call):
                raise RowsError(
                    f"Expected all samples of `{call.name}` to have the ids that {who} reads, but those of a loader"
                    f" without them are among them: only {', '.join(having.values())} have. Tag the other loader too"
                    " (-1 = unlabelled, left out of the loss), or compute a loss for the samples of each loader."
                )
        if not kept:
            raise RowsError(
                f"Expected a loss of the samples that have the ids which {who} reads, those of"
                f" {', '.join(having.values())}, but the rows of {', '.join(f'`{call.name}`' for call in calls)} are of"
                " other loaders' samples. Tag these (-1 = unlabelled), or remove the method."
            )
        return kept

    def _selected(self, calls: list[LossCall], tap: LossTap, method: Any) -> list[LossCall]:
        """The calls that ``loss=`` means, which must be the same in every step, and those of whole samples."""
        (loss, who), n = self.choices[method], self.step.n
        selected = select_calls(self._with_ids(calls, tap, method), loss, who)
        self._check_meant(selected, method)
        if len(selected) > 1 and n is not None and self._are_parts(selected, tap):
            raise AmbiguousLossError(
                f"Expected the losses that `loss={loss!r}` of {who} means to be no chunks, and one to be of all {n}"
                f" samples of the batch, but got {len(selected)} of {', '.join(str(height(x)) for x in selected[:8])}"
                f"{', ...' if len(selected) > 8 else ''} rows, each of some samples: means by group of parts of a batch"
                " do not add up to those of the batch. Join the logits of the parts and compute one loss, or multiply"
                f" the losses of all samples by masks. {SPLIT}"
            )
        return selected

    def _are_parts(self, calls: list[LossCall], tap: LossTap) -> bool:
        """Whether losses are of parts of the batch: of different samples, and none of all those of its loaders, or by
        their places, so that a group alone has other parts.

        Rows are read: beyond the CPU in an epoch's first step and on logging steps.
        """
        if not self.checks and not arguments.on_host(self.step.module):
            return False
        parts: dict[LossCall, Tensor | None] = {}
        for call in calls:
            loaders = tap.loaders_of(call) if self.step.of_several else None
            n = self.step.n or 0 if loaders is None else sum(self.step.followed[i].n or 0 for i in loaders)
            found = None
            with suppress(RowsError):  # said where a method reads them
                found = None if call.rows is None else call.rows.unique()
            if height(call) < n or (found is not None and len(found) != n):
                parts[call] = found
        if len(parts) < len(calls):
            parts = {call: found for call, found in parts.items() if _is_chunk(call, tap.tracker)}
        samples = list(parts.values())
        return any(x is None or samples[0] is None or not torch.equal(x, samples[0]) for x in samples)

    def _check_meant(self, selected: list[LossCall], method: Any) -> None:
        """Refuse a loss of numbers for a method of classes; remember which stands where ``loss=<index>`` points to."""
        loss, who = self.choices[method]
        for call in selected if method is not None and method.classifies else ():
            refuse_regression(call, who)
        if not isinstance(loss, int):
            return
        for call in selected:
            if (first := self.learned.names.setdefault((who, loss), call.name)) != call.name:
                raise AmbiguousLossError(
                    f"Expected `loss={loss}` of {who} to point to the same loss in every step, but got `{call.name}`"
                    f" where `{first}` was. Compute the losses in the same order in every step, or choose by name:"
                    f" `loss=callable(call) -> bool`."
                )

    def _compare(self, found: Reaching) -> None:
        """All ranks reduce the same losses, or none does; before any is, in an epoch's first step and on logging steps.

        Raises:
            AmbiguousLossError: ranks differ in losses that a method means.
        """
        if not (is_distributed() and self.checks) or self.learned.as_ddp:
            return
        meant = [c for c in found.calls if not self.choices or any(means(loss, c) for loss, _ in self.choices.values())]
        same = alike(" ".join(f"{call.name} {call.record.is_sum}" for call in meant), self.step.module.device)
        if not self.choices:
            self.learned.as_ddp = not same or len(meant) != 1
        elif not same:
            names = gather_objects(", ".join(f"`{call.name}`" for call in meant) or "none")
            parts = [f"{name} on rank {names.index(name)}" for name in dict.fromkeys(names)]
            raise AmbiguousLossError(
                f"Expected all ranks to compute the same losses where a method means them, but got"
                f" {' and '.join(parts)}: their sums over ranks would be of different things. Compute them on every"
                " rank, with a mask where samples have no label for one, or choose one that every rank computes:"
                " `loss=<index>`, or `loss=callable(call) -> bool`."
            )

    def _check_other_terms(self, found: Reaching, tap: LossTap) -> None:
        """A term of the step's own that depends on the network's outputs is no regulariser: it is a part of the loss.

        Raises:
            UntappedLossError: a penalty needs the whole loss.
        """
        asking = [w for w in self.needing if w.loss in (None, "sum")]
        if not asking or found.same or not self.checks or self.learned.warned:
            return
        terms = found.has_other_terms(tap.constant_nodes)
        if self.first:  # later ones do not know what is constant
            self.learned.constant_terms = not terms and found.has_other_terms()
        if not terms or (self.learned.constant_terms and not self.first):
            return
        names = ", ".join(f"`{call.name}`" for call in found.calls)
        penalty = next((w for w in asking if w.penalises), None)
        who = type(penalty or asking[0]).__name__
        ways = (
            "Teach it with `debias.register_loss`, return {'loss': loss, 'losses': per_sample} for the whole,"
            f" or say that only {names} is meant: `loss={found.calls[0].position}`. {SPLIT}"
        )
        if penalty is not None:
            raise UntappedLossError(
                f"Expected the whole loss to be one that can be taken apart per sample for {who}, but the step adds a"
                f" term to {names} that depends on the outputs of the network in maths of its own, such as a Dice loss."
                f" {ways}"
            )
        self.learned.warned = True
        warnings.warn(
            f"The training step adds a term to {names} that depends on the outputs of the network in maths of its own,"
            f" such as a Dice loss. {who} leaves it as it is: it is neither reweighed nor part of a group's loss."
            f" {ways}",
            DebiasWarning,
            stacklevel=2,
        )


def _is_chunk(call: LossCall, tracker: RowTracker | None) -> bool:
    """Whether a loss is of rows that were taken by their places, as in a loop over samples."""
    made_of = [x for x in (call.target, call.logits, call.record.source) if isinstance(x, Tensor)]
    return tracker is not None and any(tracker.is_part(x, tracker.n) for x in made_of)


def _followed(calls: list[LossCall], loss: Any) -> list[LossCall]:
    """The loss that tells the rows of features, if there is one whose own rows are known; else they tell themselves."""
    meant = [call for call in calls if means(loss, call)]
    try:
        return meant if len(meant) == 1 and meant[0].num is not None else []
    except DebiasError:
        return []


def _of_features() -> LossCall:
    """What a method is given that reads features, and no loss: their rows, which are bad where one is not finite."""
    call = LossCall("features", 0, None, None, LossRecord(tuple))  # type: ignore[arg-type]

    def compute() -> tuple[Tensor, Tensor]:
        features = call.features if isinstance(call.features, Tensor) else check_features(call.features)
        rows = rows_of_features(features.detach(), call.head).float().sum(1)
        return rows, torch.ones_like(rows)

    call.record.compute = compute
    call.record.samples = lambda shape: None if (of := call.record.feature_rows) is None else of(call)
    return call


def loss_of(output: Any) -> Any:
    """What a step returned as its loss."""
    return output.get("loss") if isinstance(output, Mapping) else output


def with_loss(output: Any, loss: Tensor) -> Any:
    """A step's output with another loss."""
    if not isinstance(output, Mapping):
        return loss
    changed: Any = copy.copy(output)
    changed["loss"] = loss
    return changed


def _set_losses(module: Any) -> list[str]:
    return [type(m).__name__ for m in module.modules() if type(m).__name__ in adapters.SET_LOSSES]
