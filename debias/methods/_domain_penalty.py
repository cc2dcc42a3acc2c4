"""What domain penalties share on Lightning's side: ids, head and features of the loss, schedule, bad rows, logging."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.data.counting import tag_counts
from debias.errors import BadRowsError, BatchKeyError, DebiasError, HeadNotFoundError, RowsError
from debias.ops.domains import make_members
from debias.ops.groups import GroupSums, group_losses
from debias.ops.head_autograd import AutogradHeadStatistics
from debias.ops.head_losses import HeadLoss, make_head_loss
from debias.ops.head_statistics import HeadStatistics
from debias.ops.penalties import LOSS_OPTIONS
from debias.step.batch import BatchKey
from debias.step.context import Step
from debias.step.ids import plain_n_groups
from debias.step.watcher import Debiaser, default_name
from debias.tap.head import check_features, rows_of_features
from debias.tap.tap import LossCall

__all__ = ["DomainPenalty", "features_of", "head_loss", "rows_of"]

_HALF = (torch.float16, torch.bfloat16)


class DomainPenalty(Debiaser):
    """A method that adds a penalty on how domains differ; its module does the maths.

    Args:
        domain: where the domain ids are: a BatchKey, or a tuple of them whose ids are crossed.
        n_domains: number of domains, one per key.
        module: a :class:`debias.ops.penalties.DomainPenaltyModule`.
        divide_loss: while the weight is above 1, divide the whole loss by it, as the IRM protocol does.
        reset_optimizer: forget the optimiser's running averages at ``start_step``, as DomainBed does.
        derivatives: how a method on the head takes them: ``"closed_form"`` or ``"autograd"``.
        **options: see :class:`Debiaser`.
    """

    needs: ClassVar[tuple[str, ...]] = ("domain",)
    of_one_domain: ClassVar[str] = ": the penalty will be 0"  # what becomes of it without others
    key: ClassVar[str]  # what its values are called in logs
    module: Any

    def __init__(
        self,
        domain: tuple[BatchKey, ...] | BatchKey,
        n_domains: int | Sequence[int],
        module: nn.Module,
        *,
        name: str | None,
        divide_loss: bool = False,
        reset_optimizer: bool = False,
        derivatives: Literal["closed_form", "autograd"] = "closed_form",
        **options: Any,
    ) -> None:
        super().__init__(name=default_name(name, domain, "domain"), **options)
        if self.features is not None and self.loss == "sum":
            raise DebiasError(
                f"Expected `loss` of {type(self).__name__} to choose one loss with `features={self.features!r}`, but"
                " got 'sum': these features are the same for every loss, and would be counted as often. Pass `loss=0`."
            )
        keys = len(domain) if isinstance(domain, tuple | list) else 1
        sizes = len(n_domains) if isinstance(n_domains, tuple | list) else 1
        if keys != sizes:
            raise DebiasError(
                f"Expected `n_domains` to hold one number for each key of `domain={domain!r}`, but got {n_domains!r}."
                " Write e.g. `domain=('hospital', 'scanner'), n_domains=(3, 2)`."
            )
        self.domain = domain
        self.n_domains = plain_n_groups(n_domains)
        self.module = module
        self.divide_loss = divide_loss
        self.reset_optimizer = reset_optimizer
        if derivatives not in ("closed_form", "autograd"):
            raise DebiasError(
                f"Expected `derivatives` to be 'closed_form' or 'autograd', but got {derivatives!r}. Closed forms need"
                " a linear head."
            )
        self.derivatives = derivatives
        self._warned = self._checked = self._said_unlabelled = False

    # -- what a method overrides -------------------------------------------------------------------

    def penalty(self, call: LossCall, domains: Tensor, step: Step) -> Tensor:
        """The module's penalty for this loss, not yet weighted; ``domains`` are those of the loss's samples."""
        raise NotImplementedError

    # -- the engine's side -------------------------------------------------------------------------

    def sample_ids(self, step: Step) -> Tensor:
        """Domain ids ``(N,)`` or membership ``(N, E)``."""
        ids = step.ids(self.domain, self.n_domains, argument="domain")
        if ids.dtype == torch.bool and ids.shape[1] != self.module.n_domains:
            raise BatchKeyError(
                f"Expected the membership `domain={self.domain!r}` to have shape (N, {self.module.n_domains}), but got"
                f" {tuple(ids.shape)}. Correct `n_domains`."
            )
        return ids

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """The weighted penalty; bad rows raise on CPU at once, elsewhere on logging steps."""
        ids = self.sample_ids(step)
        device = call.num.device.type
        weight = self.module.schedule(step.global_step)
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            self._count_rows(call, ids, step)
            if weight:
                value = self.penalty(call, ids, step)
                self._check_reach(value)
            elif self.module.always:
                with torch.no_grad():
                    value = self.penalty(call, ids, step)
            else:
                return call.num.new_zeros(())
        if step.logging:
            self.log_value(f"{self.key}_penalty", value.detach(), step)
            if self.module.schedule.changes:
                self.log_value(f"{self.key}_penalty_weight", value.new_full((), weight), step)
        return weight * value if weight else value.new_zeros(())

    def _log_name(self, key: str, step: Step) -> str:
        """With the instance's name where there are several of a class, whose values would overwrite each other."""
        several = sum(type(callback) is type(self) for callback in step.trainer.callbacks) > 1
        return super()._log_name(key, step) + (f"/{self.name}" if several else "")

    def loss_factor(self, step: Step) -> float:
        """``1 / weight`` where the protocol divides the loss by a weight above 1."""
        weight = self.module.schedule(step.global_step) if self.divide_loss else 1.0
        return 1 / weight if weight > 1 else 1.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Forget the optimisers' state at the switch; again in every micro-batch of that step, where it is empty."""
        if self.reset_optimizer and 0 < self.module.schedule.start_step == trainer.global_step:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the tags of the training set hold fewer than two domains."""
        counts = tag_counts(trainer, trainer.train_dataloader, self.domain, self.n_domains)
        if counts is not None and int((counts > 0).sum()) < 2 and trainer.is_global_zero:
            warnings.warn(
                f"{self.state_key} compares domains, but the tags of the training set hold samples of"
                f" {int((counts > 0).sum())} only{self.of_one_domain}. Check the ids of `domain={self.domain!r}`.",
                stacklevel=2,
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """No epoch ends with bad rows unsaid, nor the first one with unlabelled rows alone."""
        self._raise_if_bad(trainer.global_step)
        if self.module.only_unlabelled() and not self._said_unlabelled:
            self._said_unlabelled = True
            if trainer.is_global_zero:
                warnings.warn(
                    f"{self.state_key} has seen no labelled sample in this epoch: all ids of `domain={self.domain!r}`"
                    " were negative, so there was no penalty. Check the ids; -1 stands for unlabelled.",
                    stacklevel=2,
                )

    def loss_sums(self, call: LossCall, ids: Tensor, step: Step) -> GroupSums:
        """Sums of this loss by domain, made once for all penalties on the same domains; ``ids`` are the samples'."""
        return self._sums(call, ids, step)[0][0]

    def _sums(self, call: LossCall, ids: Tensor, step: Step) -> tuple[list[GroupSums], Tensor | list[float]]:
        n = self.module.n_domains
        return step.once((call, ids, n), lambda: group_losses([(call.num, call.den, call.of_rows(ids))], n))

    def _count_rows(self, call: LossCall, ids: Tensor, step: Step) -> None:
        try:
            self.module.count_bad(self._sums(call, ids, step)[1])
        except BadRowsError as error:
            raise self._at(error, step.global_step) from None
        if step.logging:
            self._raise_if_bad(step.global_step)

    def _raise_if_bad(self, step: int) -> None:
        try:
            self.module.raise_if_bad()
        except BadRowsError as error:
            raise self._at(error, step) from None

    def _at(self, error: BadRowsError, step: int) -> BadRowsError:
        return BadRowsError(f"{error} (Seen by {self.state_key} at optimiser step {step}.)")

    def _check_reach(self, value: Tensor) -> None:
        """A penalty without a gradient is plain training, which nobody would notice."""
        if value.requires_grad or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"The penalty of {type(self).__name__} reaches no trainable parameter: it changes nothing, and this is"
            " plain training. It is computed from the features or the logits, and everything below them is"
            " frozen or detached, or its own weights are 0. Unfreeze the backbone, or choose a penalty on the head"
            " (HessianAlignment, Fishr).",
            stacklevel=2,
        )

    def feature_rows(self, call: LossCall, domains: Tensor) -> tuple[Tensor, Tensor]:
        """The features ``(rows, d)``, at least float32, and the domains of their rows.

        Raises:
            HeadNotFoundError: those of a named module are not ``(N, d)``.
            RowsError: it is not known which samples they belong to.
        """
        features = call.features
        if self.features is not None:
            features = check_features(features)
        assert features is not None
        features = rows_of_features(features, call.head)
        features = features.float() if features.dtype in _HALF else features
        return features, call.of_features(domains)

    def _checks(self, step: Step) -> bool:
        """Whether to wait for the device and check what is taken for granted: at first, and on logging steps."""
        first, self._checked = not self._checked, True
        return first or step.logging

    def head_statistics(self, call: LossCall, domains: Tensor, step: Step) -> HeadStatistics:
        """Statistics of the head that made the logits of this loss.

        Raises:
            HeadNotFoundError: the logits are not what the head makes of its input.
        """
        check = self._checks(step)
        loss = head_loss(call, check=check)
        rows = len(loss.logits)
        members = make_members(rows_of(call, domains, rows), self.module.n_domains, rows)
        logits = loss.logits[: rows // call.parts]  # as the head made them, where mixed samples count several times
        if self.derivatives == "autograd":
            assert call.head is not None
            assert call.features is not None
            features = call.features.float() if call.features.dtype in _HALF else call.features
            if check:
                _refuse_batch_norm(call.head)
                check_head(call, features, logits)
            return AutogradHeadStatistics(call.head, call.of_logits(features), loss, members)
        features = features_of(call, len(logits))
        if check:
            check_linear(call, features, logits)
        return HeadStatistics(call.of_logits(features), loss, members, getattr(call.head, "bias", None) is not None)


def head_loss(call: LossCall, *, check: bool = False) -> HeadLoss:
    """The loss of a call, taken apart as a function of its logits.

    Args:
        call: the loss.
        check: whether to compare it with the losses that a step has worked on, which waits for the device.

    Raises:
        DebiasError: it is a loss whose derivatives are not known, or its logits are not ``(N, C)``.
        RowsError: the step has made something else of the losses than masks and weights can.
    """
    loss = _rebuilt(call)
    if check and call.followed:
        _check_losses(call, loss)
    return loss


def _rebuilt(call: LossCall) -> HeadLoss:
    logits, target, name = call.logits, call.target, call.name
    if logits is None or target is None:
        raise DebiasError(
            f"Expected logits and targets of the loss, but the step states `{call.name}` only. Return {{'loss',"
            " 'logits', 'targets'}}, or use a penalty that only needs losses (VREx)."
        )
    if name == "logits":  # stated by the step as {"logits", "targets"}
        binary = target.is_floating_point() and target.shape == logits.shape
        name = "binary_cross_entropy" if binary else "cross_entropy"
    logits = logits.float() if logits.dtype in _HALF else logits
    mixed = call.shares is not None  # augmentation has made rows count with the labels of others
    if mixed:
        logits, target = call.of_logits(logits), call.targets
    loss = make_head_loss(name, logits, target, **_options(name, call.arguments))
    if not call.followed and not mixed:
        return loss
    # Masks, weights and shares that the step or augmentation put on losses: the denominators, over the loss's own.
    den = call.elements[1].to(logits.dtype)
    rows = len(loss.logits)
    if den.shape == (rows,):
        factors = den / torch.where(loss.den != 0, loss.den, 1)
    elif loss.kind != "cross_entropy" and den.numel() == loss.logits.numel() and den.shape[:1] == (rows,):
        factors = den.reshape(loss.logits.shape) / loss.element_den
    else:
        factors = None
    if factors is None or call.reordered or (mixed and call.followed):
        which = " of mixed samples" if mixed else " of rows in another order" if call.reordered else ""
        raise RowsError(
            f"Expected the unreduced losses of `{call.name}` to have one value a row of the logits"
            f" {tuple(logits.shape)}, in their order, where the step reduces them, and not to be those of mixed"
            f" samples, but got shape {tuple(den.shape)}{which}. Leave the reduction to the loss function, or use a"
            " penalty that only needs losses (VREx)."
        )
    if call.shares is None:
        return loss.weighted(factors)
    return loss.weighted(call.shares.to(logits.dtype).reshape(factors.shape), den=factors)


def rows_of(call: LossCall, per_sample: Tensor, rows: int) -> Tensor:
    """Values of the rows of the logits, from values of the samples.

    Raises:
        RowsError: the rows are not those of the loss.
    """
    index = call.rows
    count = len(per_sample) if index is None else index.numel()
    if count != rows and (index is None or count % max(rows, 1)):
        raise RowsError(
            f"Expected {rows} rows that belong to the {count} of `{call.name}`, but they do not divide it. The loss is"
            " computed from other rows than the head reads (a mean over tokens?); name a layer that sees one row a"
            " sample: `head='dotted.path'`."
        )
    if index is None:
        return per_sample
    if count != rows:  # one number per element of a multi-label loss, all of a row the same
        index = index.view(rows, -1)[:, 0]
    return per_sample[index]


def features_of(call: LossCall, rows: int) -> Tensor:
    """Input of the head as ``(rows, d)``, at least float32.

    Raises:
        HeadNotFoundError: it has another number of rows.
    """
    features = call.features
    assert features is not None
    width = features.shape[1] if features.ndim == 4 and features.shape[2:] == (1, 1) else features.shape[-1]
    if features.numel() != rows * width:
        raise HeadNotFoundError(
            f"Expected the head to have one input row for each of the {rows} rows of the loss, but got features of"
            f" shape {tuple(features.shape)}. Name the layer that makes the logits of the loss: `head='dotted.path'`."
        )
    features = features.reshape(rows, width)
    return features.float() if features.dtype in _HALF else features


def check_linear(call: LossCall, features: Tensor, logits: Tensor) -> None:
    """Refuse closed forms where the logits are not ``features @ W.T + b``; waits for the device.

    Raises:
        HeadNotFoundError: they are not.
    """
    with _steady(call.head):
        weight, bias = getattr(call.head, "weight", None), getattr(call.head, "bias", None)
    who = type(call.head).__name__
    if not isinstance(weight, Tensor) or weight.flatten(1).shape != (logits.shape[1], features.shape[1]):
        raise HeadNotFoundError(
            f"Expected a linear head that makes logits of shape {tuple(logits.shape)} from features of shape"
            f" {tuple(features.shape)}, but got {who}. Name the last linear layer (`head='dotted.path'`), or take"
            " `derivatives='autograd'`, which works for any head."
        )
    with torch.no_grad():
        made = F.linear(
            features, weight.flatten(1).to(features.dtype), None if bias is None else bias.to(features.dtype)
        )
        # To a class that is masked behind the head nothing is passed back, nor do the closed forms.
        _check_logits(call, made, logits, who, masked=logits == -torch.inf)


def check_head(call: LossCall, features: Tensor, logits: Tensor) -> None:
    """Refuse derivatives of a head that does not make the logits from its input; waits for the device.

    Raises:
        HeadNotFoundError: it does not, also where it draws random numbers.
    """
    head = call.head
    assert head is not None
    features = features.to(next((p.dtype for p in head.parameters()), features.dtype))
    with torch.no_grad():
        made = head.forward(features).reshape(logits.shape)
        _check_logits(call, made, logits, type(head).__name__, masked=(made == logits) & (logits == -torch.inf))


@contextmanager
def _steady(head: nn.Module | None) -> Iterator[None]:
    """Parametrizations that change whenever the weight is read in training, such as spectral norms, do not here."""
    parts = getattr(head, "parametrizations", None)
    modules = [m for m in parts.modules() if m.training] if isinstance(parts, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True


def _refuse_batch_norm(head: nn.Module) -> None:
    """A sample's logits must not depend on the others: its derivatives would not be its own, nor the same by rank."""
    for module in head.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise HeadNotFoundError(
                f"Expected a head in which a sample's logits depend on that sample alone, but got {type(head).__name__}"
                f" with a {type(module).__name__} in training mode. Name the layers behind it"
                " (`head='dotted.path'`), or use a penalty that needs no head (IRM, VREx)."
            )


def _check_losses(call: LossCall, loss: HeadLoss) -> None:
    """The derivatives are those of the function's own formula, so the losses must be, too, up to one factor for all."""
    if not len(loss.logits):
        return
    with torch.no_grad():
        own = call.elements[0].reshape(len(loss.logits), -1).sum(1)
        made = loss.num(loss.logits).to(own.dtype)
        made = made * (own.dot(made) / made.dot(made).clamp_min(torch.finfo(made.dtype).tiny))
        error = float((made - own).abs().max() / own.abs().max().clamp_min(1e-6))
    half = call.logits is not None and call.logits.dtype in _HALF
    if error > (0.05 if half else 1e-3):
        raise RowsError(
            f"Expected the losses of `{call.name}` to be what that function makes of the logits, with masks and"
            f" weights, but the step has made something else of them (a focal factor? another loss added?): they differ"
            f" by {error:.1%} of the largest. Use a penalty that only needs losses (VREx)."
        )


def _check_logits(call: LossCall, made: Tensor, logits: Tensor, who: str, *, masked: Tensor) -> None:
    if not logits.numel():
        return
    given = call.logits
    half = (given is not None and given.dtype in _HALF) or torch.is_autocast_enabled(made.device.type)
    made, logits = made.masked_fill(masked, 0), logits.masked_fill(masked, 0)
    scale = made.abs().max().clamp_min(1e-6)
    error = float((made - logits).abs().max() / scale)
    if error > (0.05 if half else 1e-3):
        raise HeadNotFoundError(
            f"Expected the logits of `{call.name}` to be what the head {who} makes of its input, but they differ by"
            f" {error:.1%} of the largest. Something stands between them (a temperature, a mean over heads, dropout)."
            " Move it in front of the head, or use a penalty that needs no head (IRM, VREx)."
        )


def _options(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: arguments[k] for k in LOSS_OPTIONS.get(name, ()) if k in arguments}
