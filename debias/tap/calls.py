"""One loss of a step: what a method reads of it, and what the tap notes of it while the step runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from debias.errors import RowsError
from debias.ops import arguments
from debias.ops.distributed import weighted_mean
from debias.tap.counted import both
from debias.tap.losses import HALF

__all__ = ["LossCall", "LossRecord", "means", "shares_memory", "sum_of"]


@dataclass(eq=False)
class LossRecord:
    """The tap's own notes of one loss; authors of methods read :class:`LossCall`.

    Attributes:
        compute: numerators and denominators of the elements; the loss is ``num.sum() / den.sum()``.
        samples: tells the samples of numerators of some shape, int64 of that shape or ``(rows,)``; None where row i is
            sample i. None where nobody asked for them.
        edge: of the tensor that the step received, before it may have changed that in place.
        received: that tensor, and its version then.
        is_sum: what the step received is a sum.
        divisor: weights of the elements that the step divides by the sum or mean of, ones where it divides by a number
            of them; None if it does not.
        kept: shape of what the step received with the reduced axes kept, where it has not reduced all at once.
        factor: what the returned loss multiplies the loss by, known once the step has returned; None for 1. Where the
            step averaged over the samples only, there is one for each of the other elements.
        function: the loss as torch's function computed it, where the step took it unreduced.
        source: the elements as the step reduced them, likewise, or what it has made of them until then; in evaluation
            as torch's function made them.
        parts: where samples were mixed, the losses with each label, of which ``source`` is the weighted sum.
        scale: what the step, or augmentation, multiplied the elements by; None for 1, False if the step did something
            else to them, or put them in another order.
        mask: by which elements the step selected them; None if all are there, False if it is not known.
        of_batch: whether the step has multiplied them by a number that it made of the values of the whole batch.
        divided_by: numbers and totals (:class:`debias.tap.totals.Total`) that the step has divided them by.
        linear: while the head is looked for, the run of the layer that made the logits (:mod:`debias.tap.features`).
        feature_rows: tells the sample of each row of the features.
        targets: of the rows, where samples were mixed; else None.
        own_rows: sample of each row with its own label, likewise; None where row i is sample i.
        registered: of a registered loss: what it returned, and its losses and denominators as its adapter gives them.
    """

    compute: Callable[[], tuple[Tensor, Tensor]]
    samples: Callable[[torch.Size], Tensor | None] | None = lambda shape: None
    edge: Any = None
    received: tuple[Tensor, int] | None = None
    is_sum: bool = False
    divisor: Tensor | None = None
    kept: torch.Size | None = None
    factor: Tensor | None = None
    function: Any = None
    source: Any = None
    parts: list[Tensor] = field(default_factory=list)
    scale: Any = None
    mask: Any = None
    of_batch: bool = False
    divided_by: tuple[Any, ...] = ()
    linear: Any = None
    feature_rows: Callable[[LossCall], Tensor | None] | None = None
    targets: Any = None
    own_rows: Tensor | None = None
    registered: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def computed(self) -> tuple[Tensor, Tensor]:
        """What :attr:`compute` gives; it carries gradients whoever asks first, also under ``torch.no_grad``."""
        with torch.enable_grad():
            num, den = self.compute()
            return (num.float() if num.dtype in HALF else num), den

    @cached_property
    def elements(self) -> tuple[Tensor, Tensor]:
        """Numerators and denominators of the elements, at least float32, of the same shape."""
        num, den = self.computed
        if (weights := self.divisor) is not None:
            # Where samples were mixed, the rows stand there once for each label.
            den = weights if self.targets is None else torch.cat([weights] * (len(num) // len(weights))) * den
        den = den.to(num.dtype)
        return num, den if den.shape == num.shape else den.expand(num.shape)

    @property
    def undivided(self) -> bool:
        """Whether it is a sum that the step has not divided by what it runs over."""
        return self.is_sum and self.divisor is None

    @property
    def over(self) -> Tensor | float:
        """What the sum of the numerators is divided by in what the step received."""
        if self.is_sum:
            return 1.0
        num, den = self.computed
        return den.expand(num.shape).to(num.dtype).sum()

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Numerators and denominators of the rows, without the factor, and the samples of the rows."""
        with torch.enable_grad():
            num, den = self.elements
            if self.factor is not None and self.factor.ndim:
                num = num * self.factor
            if num.ndim == 0:
                num, den = num.reshape(1), den.reshape(1)
            index = None if self.samples is None else self.samples(num.shape)
            if index is not None and index.shape == num.shape:
                return num.flatten(), den.flatten(), index.flatten()
            if num.ndim > 1:
                num, den = num.flatten(1).sum(1), den.flatten(1).sum(1)
        return num, den, index

    def value(self) -> Tensor:
        """What the step received, of this rank's rows alone and but for rounding."""
        return self.elements[0].sum_to_size(self.kept or ()) / self.over


@dataclass(eq=False)
class LossCall:
    """One loss of a step, taken apart by sample.

    The loss is ``num.sum() / den.sum()``, as the step uses it: with the factor that the returned loss has for it. Rows
    are those of the loss: often the samples, but also tokens, pixels, or views of them.

    Attributes:
        name: name of the loss function, e.g. ``"cross_entropy"``.
        position: how many losses came before it in this step.
        logits: the prediction that the loss was computed from, as the step passed it.
        target: the target, as the step passed it.
        arguments: what else the loss was called with, e.g. ``weight`` or ``label_smoothing``.
        features: where a method asked for them: input of the classifier head, or output of the module that is named.
        head: the classifier head, where a method asked for it.
        parts: how many labels every row of ``logits`` counts with, more than 1 where samples were mixed. ``num``,
            ``den`` and ``rows`` then hold the rows with their own labels first, then with those of their partners.
        record: the tap's own notes.
        predicted: what the network predicted, shaped like ``logits``, where the step or its criterion has changed that
            before the loss; None where ``logits`` are it, or nobody asks. See :mod:`debias.tap.predictions`.
        from_labels: likewise, whether ``logits`` come from a part of the network that was given the target.
        counts: tell which elements count; see :attr:`counted`.
    """

    name: str
    position: int
    logits: Tensor | None
    target: Tensor | None
    record: LossRecord
    arguments: dict[str, Any] = field(default_factory=dict)
    features: Any = None
    head: nn.Module | None = None
    parts: int = 1
    predicted: Tensor | None = None
    from_labels: bool = False
    counts: list[Callable[[], Tensor | None]] = field(default_factory=list)

    @cached_property
    def counted(self) -> Tensor | None:
        """In evaluation, after the step: which elements count, boolean, in the shape of ``reduction="none"``.

        Neither do those that the loss ignores or weighs with 0, nor those that the step masks, selects or replaces
        afterwards. None where all count.
        """
        return functools.reduce(both, (counts() for counts in self.counts), None)

    @classmethod
    def of(cls, name: str, num: Tensor, den: Tensor, rows: Tensor | None = None, position: int = 0) -> LossCall:
        """A loss from numerators and denominators of its rows, ``(rows,)``, and the sample of each row."""
        return cls(name, position, None, None, LossRecord(lambda: (num, den), lambda shape: rows))

    def keep(self, changed: Any) -> None:
        """Keep what was read of a tensor, which the step is about to change in place for something else."""
        if shares_memory(self.record.divisor, changed):
            self.record.divisor = self.record.divisor.clone()  # type: ignore[union-attr]
        read = [name for name in ("logits", "target", "predicted") if shares_memory(getattr(self, name), changed)]
        if not read and not shares_memory(self.record.source, changed):
            return
        with contextlib.suppress(RowsError):  # said where it is read, if it is
            num, den = self.record.computed
            with torch.enable_grad():
                vars(self.record)["computed"] = num.clone(), den.clone()
            if self.record.samples is not None:
                index = self.record.samples(num.shape)
                self.record.samples = lambda shape: index
        for name in read:
            setattr(self, name, getattr(self, name).clone())

    def forget(self) -> None:
        """Let go of every tensor of the step: a loss and its notes refer to each other."""
        vars(self.record).clear()
        self.logits = self.target = self.features = self.head = None

    def multiply(self, factor: Tensor | None) -> None:
        """Say what the returned loss multiplies the received one by; None for 1."""
        record = self.record
        if factor is not None:
            factor = factor.reshape(record.kept or ())  # the step may have kept the axes of a single number
        if factor is not None and factor.ndim:
            vars(record).pop("rows", None)
        if record.is_sum or record.divisor is not None:
            total = record.elements[1].sum()
            over = (total + (total == 0)) / record.over  # of nothing, the step divides by its guard against 0
            factor = over if factor is None else factor * over
        record.factor = factor

    @property
    def num(self) -> Tensor:
        """Numerators, shape ``(rows,)``, differentiable."""
        factor, num = self.record.factor, self.record.rows[0]
        return num if factor is None or factor.ndim else num * factor

    @property
    def den(self) -> Tensor:
        """Denominators, shape ``(rows,)``."""
        return self.record.rows[1]

    @property
    def rows(self) -> Tensor | None:
        """Sample of each row, int64 ``(rows,)``; None where row i is sample i."""
        return self.record.rows[2]

    def of_rows(self, per_sample: Tensor) -> Tensor:
        """Values per row from values per sample, e.g. group ids ``(N,)`` or membership ``(N, G)``.

        Raises:
            RowsError: it is not known which samples the rows belong to.
        """
        if self.record.samples is None:
            raise RowsError(
                f"Expected to know before the step which values of its samples are read, so that the rows of"
                f" `{self.name}` are followed to them, but nobody asked for any. Return them from"
                " `sample_ids(step)`, or read them there once."
            )
        return per_sample if self.rows is None else per_sample[self.rows]

    def of_logits(self, per_row: Tensor) -> Tensor:
        """Values per row of ``num`` from values per row of the logits, e.g. the logits or features themselves."""
        return per_row if self.parts == 1 else torch.cat([per_row] * self.parts)

    def of_features(self, per_sample: Tensor) -> Tensor:
        """Values per row of the features from values per sample, e.g. ids ``(N,)`` or membership ``(N, G)``.

        Features ``(N, T, d)`` have ``N T`` rows, and maps ``(N, d, H, W)`` that a convolution reads ``N H W``. Rows
        that the loss leaves out get -1, or False.

        Raises:
            RowsError: it is not known which samples the rows belong to.
        """
        rows = None if self.record.feature_rows is None else self.record.feature_rows(self)
        if rows is None:
            return per_sample
        none = per_sample.new_full((1, *per_sample.shape[1:]), 0 if per_sample.dtype == torch.bool else -1)
        return torch.cat((per_sample, none))[rows]

    @property
    def features_in_rows(self) -> bool:
        """Whether row i of the features is known to be of the sample of row i of the logits."""
        rows = self.record.feature_rows
        return rows is None or rows(self) is (self.record.function or self).logits_rows

    @property
    def logits_rows(self) -> Tensor | None:
        """Sample of each row of the logits, with its own label: :attr:`rows`, unless samples were mixed."""
        return self.rows if self.record.targets is None else self.record.own_rows

    def mean(self) -> Tensor:
        """The loss of the global batch; its gradient is this rank's share of it."""
        factor, (num, den) = self.record.factor, self.record.elements
        # What the step divides by itself it may have guarded against nothing.
        guarded = self.record.function is not None or self.record.is_sum
        return weighted_mean(num if factor is None else num * factor, den, guarded=guarded)


def means(loss: Any, call: LossCall) -> bool:
    """Whether ``loss=`` of a method may mean a loss."""
    if callable(loss):
        return bool(loss(call))
    return call.position == loss if isinstance(loss, int) else True


def shares_memory(x: Any, changed: Any) -> bool:
    """Whether a change of one tensor may change another one; without looking at any value."""
    if x is changed or not (isinstance(x, Tensor) and isinstance(changed, Tensor)):
        return x is changed
    try:
        start = x.untyped_storage().data_ptr()
        return bool(start) and start == changed.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # of a tensor without memory of its own, as under vmap
        return False


def sum_of(calls: list[LossCall], *, check: bool) -> LossCall:
    """Several losses of a step as one, for methods that take their sum.

    Args:
        calls: the losses.
        check: whether to look that their rows and denominators are alike, which waits for the device; on the CPU they
            are looked at in every step.
    """
    first, *others = calls
    name = " + ".join(call.name for call in calls)

    def compute() -> tuple[Tensor, Tensor]:
        num, den, total = first.num, first.den, first.den.sum()
        for call in others:
            ratio = total / call.den.sum()
            alike = call.den.shape == den.shape and (call.rows is None) == (first.rows is None)
            if alike and (check or arguments.on_host(den)):
                same = call.rows is None or first.rows is None or torch.equal(call.rows, first.rows)
                alike = same and torch.allclose(call.den * ratio, den)
            if not alike:
                raise RowsError(
                    f"Expected the losses `{name}` that are added up to have the same rows, masks and weights, but"
                    " they differ: their sum has no value for a row. Choose one: `loss=<index>`, or"
                    " `loss=callable(call) -> bool`."
                )
            num = num + call.num * ratio
        return num, den

    samples = None if first.record.samples is None else lambda shape: first.rows
    return LossCall(name, first.position, None, None, LossRecord(compute, samples))
