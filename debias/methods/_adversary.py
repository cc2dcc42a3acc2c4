"""What the adversarial methods share: which rows count, the strength of the reversal, the adversary and its optimiser.

What is added to the loss is the adversary's own loss at weight 1; only its gradient into the features is reversed and
scaled.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from debias.errors import BadRowsError, BatchKeyError, DebiasError, RowsError
from debias.ops.arguments import check_count, check_number
from debias.ops.distributed import global_sum
from debias.ops.gradient_reversal import dann_ramp, gradient_reversal
from debias.ops.groups import GroupState, group_losses
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.step.owned import OwnedModule
from debias.step.watcher import Debiaser, default_name
from debias.tap.head import check_features
from debias.tap.tap import LossCall

__all__ = ["AdversarialDebiaser", "AdversaryLoss", "make_mlp"]

Network = str | nn.Module | Callable[[int], nn.Module]


def make_mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of these widths, with an activation between them."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


class AdversaryLoss(GroupState):
    """The loss of an adversary that guesses an attribute from reversed features: the mean over labelled rows.

    Args:
        in_features: width D of the features, or None where the network is handed to :meth:`objective`.
        count: number of ids.
        what: the attribute, for messages: ``"identity"`` or ``"domain"``.
        argument: the user's argument that holds the number of ids.
        strength: lambda of the reversal.
    """

    labelled: Tensor

    def __init__(self, in_features: int | None, count: int, *, what: str, argument: str, strength: float) -> None:
        count = check_count(argument, count)
        if in_features is not None:
            check_count("in_features", in_features)
        super().__init__(count)
        self.what, self.argument = what, argument
        self.strength = float(check_number("strength", strength))
        self.accuracy: Tensor | None = None
        if in_features is None:  # only the callback knows epochs
            self.register_buffer("labelled", torch.zeros(1, dtype=torch.float64))

    def build(self, width: int) -> nn.Module:
        """The adversary for features of this width."""
        raise NotImplementedError

    def losses(
        self, network: nn.Module, features: Tensor, ids: Tensor, strata: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, bool]]]:
        """The adversary's logits ``(N, count)``, and losses ``(N,)`` whose means are added up.

        With each loss whether it is averaged within each stratum first. Ids and strata are those of :meth:`objective`,
        0 in rows that do not count.
        """
        raise NotImplementedError

    def strata(self, targets: Tensor | None) -> Tensor | None:
        """The stratum of each row, int64 ``(N,)`` below :attr:`n_strata`, negative = left out; None for one of all."""
        return None

    @property
    def n_strata(self) -> int:
        """Number of strata."""
        return 1

    def objective(
        self,
        network: nn.Module,
        features: Tensor,
        ids: Tensor,
        *,
        strength: float | None = None,
        targets: Tensor | None = None,
        log: bool = False,
    ) -> Tensor:
        """The mean loss of the global batch; its gradient is this rank's share.

        Args:
            network: the adversary.
            features: ``(N, D)``.
            ids: int64 ``(N,)``, negative = unlabelled, left out.
            strength: lambda of this batch.
            targets: of the main task, where :meth:`strata` wants them.
            log: compute :attr:`accuracy` too, the adversary's share of right guesses among the rows of the global batch
                that count.

        Raises:
            BadRowsError: an id is out of range or a feature not finite; on CPU at once, elsewhere from
                :meth:`raise_if_bad`.
        """
        features = _checked(features, ids)
        finite = features.detach().isfinite().all(1)
        counts = finite & (ids >= 0) & (ids < self.n_groups)
        strata = self.strata(targets)
        if strata is not None:
            counts = counts & (strata >= 0)
            strata = torch.where(counts, strata, 0)
        # A NaN times zero is a NaN, so rows that do not count leave before the network, not after it.
        features = torch.where(finite.unsqueeze(1), features, 0)
        features = gradient_reversal(features, self.strength if strength is None else strength)
        logits, terms = self.losses(network, features, torch.where(counts, ids, 0), strata)
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for losses, stratified in terms:
            groups = torch.where(counts, strata if stratified and strata is not None else 0, -1)
            if not calls:  # bad rows are counted once
                groups = torch.where(ids < self.n_groups, groups, self.n_strata)
                losses = torch.where(finite, losses, torch.nan)
            calls.append((losses, torch.ones_like(losses), groups))
        sums, counted = group_losses(calls, self.n_strata)
        self.count_bad(counted)
        total = features.new_zeros(())
        for (_, stratified), of in zip(terms, sums, strict=True):
            weights = (of.den > 0).to(of.den.dtype) if stratified else of.den
            total = total + of.weighted(weights / weights.sum().clamp_min(1))
        if "labelled" in self._buffers and self.training:
            self.labelled += sums[0].den.sum()
        if log:
            hits = (logits.detach().argmax(1) == ids) & counts
            self.accuracy = global_sum(hits.sum().to(total.dtype)) / sums[0].den.sum().clamp_min(1)
        return total

    def network_of(self, adversary: Network, width: int, made: dict[str, Callable[[int], nn.Module]]) -> nn.Module:
        """The named network, a copy of the user's own, or what the user's function makes."""
        if isinstance(adversary, str):
            return made[adversary](width)
        return copy.deepcopy(adversary) if isinstance(adversary, nn.Module) else adversary(width)

    def guess(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """The adversary's logits, in the dtype of the first input; the network is called in its own.

        Raises:
            DebiasError: a network of the user's own has another number of outputs.
        """
        dtype = next((p.dtype for p in network.parameters()), inputs[0].dtype)
        logits = network(*(x.to(dtype) if x.is_floating_point() else x for x in inputs)).to(inputs[0].dtype)
        if logits.shape != (len(inputs[0]), self.n_groups):
            raise DebiasError(
                f"Expected the adversary to return logits of shape {(len(inputs[0]), self.n_groups)}, one per"
                f" {self.what}, but got {tuple(logits.shape)}. Correct its last layer, or `{self.argument}`."
            )
        return logits

    def raise_if_unlabelled(self) -> None:
        """Raise if no row since the last :meth:`start_epoch` was labelled; waits for the device."""
        if not float(self.labelled):
            raise BadRowsError(
                f"Expected samples with a known {self.what} (an id >= 0), but a whole epoch had none, so nothing was"
                f" debiased. Check the ids of the training set."
            )

    def start_epoch(self) -> None:
        """Count labelled rows afresh."""
        self.labelled.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The counters keep their dtype; the network, where there is one, is cast and moved like any other.
        for child in self.children():
            child._apply(fn)
        return super()._apply(fn, recurse)

    def _raise(self, bad: list[float]) -> None:
        ids, rows = (int(x) for x in bad)
        if ids:
            raise BadRowsError(
                f"Expected {self.what} ids below `{self.argument}={self.n_groups}`, but {ids} rows had a higher one."
                f" They took no part in the adversary's loss. Number them 0 .. {self.argument} - 1 (-1 = unlabelled),"
                f" or raise `{self.argument}`."
            )
        if rows:
            raise BadRowsError(
                f"Expected finite losses, but {rows} rows had features or an adversary's loss that are not. They took"
                " no part in it. Check the inputs of this batch and the learning rate;"
                " `Trainer(detect_anomaly=True)` finds the operation."
            )


class AdversarialDebiaser(Debiaser):
    """A method with an adversary on the features; its module does the maths.

    Args:
        key: where the ids are.
        module: the adversary's loss.
        schedule: ``"constant"``, or ``"dann"``: the strength grows from 0 by :func:`debias.functional.dann_ramp`.
        warmup_steps: optimiser steps during which the adversary learns and nothing is reversed.
        ramp_steps: optimiser steps from the end of the warm-up to the full strength; to the end of training by default.
        lr: the adversary's learning rate, or None for the user's current one times ``lr_ratio``.
        lr_ratio: see ``lr``.
        optimizer: makes its optimiser from parameters and ``lr=``; by default one of the user's class and options.
        **options: see :class:`debias.Debiaser`.
    """

    stateful: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True
    module: Any

    def __init__(
        self,
        key: BatchKey,
        module: AdversaryLoss,
        *,
        schedule: Literal["constant", "dann"],
        warmup_steps: int,
        ramp_steps: int | None,
        lr: float | None,
        lr_ratio: float,
        optimizer: Callable[[Iterable], Optimizer] | None,
        name: str | None,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(name=default_name(name, key, module.what), seed=seed, **options)
        if options.get("loss") == "sum":
            raise DebiasError(
                "Expected `loss` to choose the one loss whose features the adversary reads, but got 'sum'. Pass its"
                " position."
            )
        if schedule not in ("constant", "dann"):
            raise DebiasError(f"Expected `schedule` to be 'constant' or 'dann', but got {schedule!r}.")
        warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        ramp_steps = None if ramp_steps is None else check_count("ramp_steps", ramp_steps)
        lr = None if lr is None else check_number("lr", lr, "(0, inf)")
        lr_ratio = check_number("lr_ratio", lr_ratio, "(0, inf)")
        self.key = key
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.ramp_steps = ramp_steps
        self.optimizer = optimizer
        self.module = module
        self.owned = {
            "adversary": OwnedModule(module.build, seed=seed, lr=lr, lr_ratio=lr_ratio, optimizer=self._make_optimizer)
        }
        self._end: int | None = None

    def sample_ids(self, step: Step) -> Tensor:
        """Ids of the samples, int64 ``(N,)``."""
        ids = step.ids(self.key, self.module.n_groups, argument=self.module.what)
        if ids.ndim != 1:
            raise BatchKeyError(
                f"Expected `{self.module.what}={self.key!r}` to hold one id per sample, shape (N,), but got a"
                f" membership of shape {tuple(ids.shape)}."
            )
        return ids

    def strength_at(self, global_step: int) -> float:
        """The strength in one optimiser step: a function of the step alone, the same on all ranks."""
        done = global_step - self.warmup_steps
        if done < 0:
            return 0.0
        if self.schedule == "constant":
            return self.module.strength
        return self.module.strength * dann_ramp(done / (self.ramp_steps or self._end or 1))

    def targets(self, call: LossCall, step: Step, n_rows: int) -> Tensor | None:
        """What the module's losses need beside features and ids."""
        return None

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """The adversary's loss on the features that the classifier reads."""
        device = call.features.device if isinstance(call.features, Tensor) else step.module.device
        with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext():
            features = _precise(call.features)
            ids = call.of_features(self.sample_ids(step))
            targets = self.targets(call, step, len(features))
            network = self.owned["adversary"].create(features.shape[1], device, features.dtype)
            strength = self.strength_at(step.global_step)
            loss = self.module.objective(network, features, ids, strength=strength, targets=targets, log=step.logging)
        if step.logging:
            self.module.raise_if_bad()
            values = {"loss": loss.detach(), "accuracy": self.module.accuracy, "strength": torch.tensor(strength)}
            for key, value in values.items():
                self.log_value(f"{self.name}_adversary/{key}", value, step)
        return loss

    def _log_name(self, key: str, step: Step) -> str:
        """With the class where adversaries of another have the same name, whose values would overwrite each other."""
        callbacks = step.trainer.callbacks
        several = sum(isinstance(c, AdversarialDebiaser) and c.name == self.name for c in callbacks) > 1
        return super()._log_name(key, step) + (f"/{type(self).__qualname__}" if several else "")

    def new_epoch(self, epoch: int) -> None:
        """Count labelled rows afresh."""
        self.module.start_epoch()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the length of training, where a ramp needs it."""
        if self.schedule == "dann" and self.ramp_steps is None:
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise DebiasError(
                    "Expected `ramp_steps` to be given where training has no end (`max_epochs=-1`), but got None."
                )
            self._end = max(int(steps) - self.warmup_steps, 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows, or the absence of every label, unsaid."""
        self.module.raise_if_bad()
        self.module.raise_if_unlabelled()

    def _make_optimizer(self, parameters: Any, lr: float) -> Optimizer:
        if self.optimizer is not None:
            return self.optimizer(parameters, lr=lr)  # type: ignore[call-arg]
        users = self.engine.trainer.optimizers[0]  # type: ignore[union-attr]
        taken = inspect.signature(type(users).__init__).parameters
        try:
            return type(users)(parameters, **{k: v for k, v in users.defaults.items() if k in taken} | {"lr": lr})
        except (TypeError, ValueError, AttributeError) as error:
            raise DebiasError(
                f"Expected an optimiser that can be made a second time from its `defaults`, but got"
                f" {type(users).__name__}: {error}. Pass the adversary's own: `optimizer=torch.optim.AdamW`."
            ) from error


def _one_each(per_sample: Tensor, n_rows: int) -> Tensor:
    if len(per_sample) != n_rows:
        raise RowsError(
            f"Expected one row of features for each of the {len(per_sample)} samples, but got {n_rows}. Name a module"
            " that runs on the whole batch and keeps its rows: `features='dotted.path'`."
        )
    return per_sample


def _precise(features: Any) -> Tensor:
    features = check_features(features)
    return features if features.dtype == torch.float64 else features.float()


def _checked(features: Tensor, ids: Tensor) -> Tensor:
    features = _precise(features)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DebiasError(f"Expected integer ids of shape (N,), but got {ids.dtype} of shape {tuple(ids.shape)}.")
    _one_each(ids, len(features))
    return features
