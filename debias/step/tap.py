"""The loss tap: sees every torch loss of a step, takes it apart per sample, hands back a debiased one.

No Lightning here. A ``TorchFunctionMode`` sees ``F.cross_entropy`` and its like in any call style. Per sample it
keeps ``num_i`` and ``den_i``, with ``mean = sum num / sum den``: with class weights, ``ignore_index``, spatial
targets or label smoothing a per-sample *mean* loss would be wrong. A loss computed with ``reduction="none"`` is
followed through masks, weights and reshapes to the ``.mean()`` or ``.sum()`` that ends it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from debias.errors import DebiasError, LossNotFoundError, RowsError, UntappedLossError
from debias.step.counted import both
from debias.step.distributed import as_global, global_sum, is_distributed, world_size
from debias.step.evaluated import Evaluated, counted_by
from debias.step.losses import (
    COMPARING,
    FORM,
    LOSSES,
    NAMES,
    NOT_PER_SAMPLE,
    SECOND,
    class_weights,
    reduction_of,
    unreduced,
)
from debias.step.mixing import Mixture, row_sources, unmixable
from debias.step.predictions import CLASSIFYING
from debias.step.rows import CASTS, MOVES, RECORDED, Move, RowTracker, apply_move, arranged_rows, keeps_rows

__all__ = ["LossCall", "LossTap", "no_loss_error"]

_T = torch.Tensor


@dataclass(eq=False)
class LossCall:
    """One loss of one step, taken apart.

    Attributes:
        name: name of the loss function, e.g. ``"cross_entropy"``.
        logits: what the loss was computed from, as the step passed it.
        target: the target, as the step passed it.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for losses reduced by the step itself.
        position: how many losses came before it in this step.
        ignore_index: target that does not count, for cross-entropy and NLL.
        arguments: what else the loss was called with, e.g. ``weight`` or ``label_smoothing``.
        features: input of the classifier head, shape ``(N, d)``, or output of the module that is named, where a method
            asked for it; see :meth:`of_features`.
        head: the classifier head, where a method asked for it.
        parts: how many labels every row of ``logits`` counts with, more than 1 where samples were mixed. ``num``,
            ``den`` and ``rows`` then hold the rows with their own labels first, then with those of their partners.
        targets: the targets of these rows.
        shares: what the losses of these rows were multiplied by, shaped like the elements.
        predicted: in evaluation, what the network predicted, shaped like ``logits``, where the step or its criterion
            has changed that before the loss; None where ``logits`` are it. See :mod:`debias.step.predictions`.
        from_labels: in evaluation, whether ``logits`` come from a part of the network that was given the target.
    """

    name: str
    logits: Tensor | None
    target: Tensor | None
    reduction: str
    position: int
    _elements: Callable[[], tuple[Tensor, Tensor]]
    _sample_of: Callable[[LossCall, Tensor], Tensor | None]
    _mean_over: int | None = None  # `reduction="none"` then `.mean()`: the number of elements the step divides by
    ignore_index: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    # As it was computed, where the step took it unreduced and did more to it than the function's own arguments say.
    computed: LossCall | None = None
    reordered: bool = False  # and its rows are not where they were
    features: Tensor | None = None
    head: nn.Module | None = None
    # Of the layer that made the logits, while it is looked for: output, input, weight, and what was done to the output.
    linear: tuple[Tensor, Tensor, Tensor, list[Move]] | None = None
    _own_rows: Tensor | None = None
    feature_rows: Callable[[LossCall], Tensor | None] | None = None  # tells the sample of each row of the features
    edge: Any = None  # of the tensor handed back, before the step may have changed it in place
    late: _Late | None = None
    ordinal: int = 0  # how many losses of its name came before it in this step
    parts: int = 1
    targets: Any = None
    shares: Tensor | None = None
    predicted: Tensor | None = None
    from_labels: bool = False
    _counted: list[Callable[[], Tensor | None]] = field(default_factory=list)

    @cached_property
    def counted(self) -> Tensor | None:
        """In evaluation, after the step: which elements count, boolean, in the shape of ``reduction="none"``.

        Neither do those that the loss ignores or weighs with 0, nor those that the step masks, selects or replaces
        afterwards. None where all count.
        """
        return functools.reduce(both, (counts() for counts in self._counted), None)

    @property
    def followed(self) -> bool:
        """Whether the step computed it unreduced and reduced it itself."""
        return self.computed is not None

    @cached_property
    def elements(self) -> tuple[Tensor, Tensor]:
        """Numerator and denominator per element, at least float32, in the shape of ``reduction="none"``."""
        num, den = self._elements()
        if num.dtype in (torch.float16, torch.bfloat16):
            num = num.float()
        den = den.to(num.dtype)
        return num, den if den.shape == num.shape else den.expand(num.shape)

    @cached_property
    def _per_row(self) -> tuple[Tensor, Tensor, Tensor | None]:
        num, den = self.elements
        if num.ndim == 0:
            num, den = num.reshape(1), den.reshape(1)
        index = self._sample_of(self, num)
        if index is not None and index.shape == num.shape:
            return num.flatten(), den.flatten(), index.flatten()
        if num.ndim > 1:
            num, den = num.flatten(1).sum(1), den.flatten(1).sum(1)
        return num, den, index

    @property
    def num(self) -> Tensor:
        """Numerators, shape ``(rows,)``, differentiable."""
        return self._per_row[0]

    @property
    def den(self) -> Tensor:
        """Denominators, shape ``(rows,)``; the mean loss is ``num.sum() / den.sum()``."""
        return self._per_row[1]

    @property
    def rows(self) -> Tensor | None:
        """Sample of each row, int64 ``(rows,)``; None where row i is sample i."""
        return self._per_row[2]

    @property
    def own_rows(self) -> Tensor | None:
        """Sample of each row with its own label: :attr:`rows`, unless samples were mixed."""
        return self.rows if self.shares is None else self._own_rows

    def of_rows(self, per_sample: Tensor) -> Tensor:
        """Values per row from values per sample, e.g. group ids ``(N,)`` or membership ``(N, G)``."""
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
        rows = None if self.feature_rows is None else self.feature_rows(self)
        if rows is None:
            return per_sample
        none = per_sample.new_full((1, *per_sample.shape[1:]), 0 if per_sample.dtype == torch.bool else -1)
        return torch.cat((per_sample, none))[rows]

    @property
    def features_in_rows(self) -> bool:
        """Whether row i of the features is known to be of the sample of row i of the logits."""
        return self.feature_rows is None or self.feature_rows(self) is (self.computed or self).own_rows

    def scaled(self, mean: Tensor) -> Tensor:
        """From a (debiased) mean loss to what the step's own reduction would have returned for it."""
        if self.reduction == "mean":
            return mean
        total = self.elements[1].detach().sum()
        if self.reduction == "sum":
            # By this rank's own denominator: a step that sums divides by a count or a mask of its own rank next.
            return mean * total
        total = global_sum(total)
        count = global_sum(total.new_full((), self._mean_over or 1))
        return mean * (total / count)

    def local(self) -> Tensor:
        """What the step's own reduction makes of this rank's rows alone, as in plain training."""
        num, den = self.elements
        if self.reduction == "mean":
            return num.sum() / den.sum()
        return num.sum() if self.reduction == "sum" else num.sum() / (self._mean_over or 1)

    def mean(self) -> Tensor:
        """The mean loss of the global batch; its gradient is this rank's share of it.

        Of nothing it is NaN where torch reduces, and 0 where the step does it itself and may have guarded its divisor.
        """
        num, den = self.elements
        local, total = num.sum(), den.sum()
        if is_distributed():
            summed, total = global_sum(torch.stack((local.detach(), total.detach())))
        if self.reduction != "mean":
            total = total + (total == 0)
        if not is_distributed():
            return local / total
        return as_global(local * (world_size() / total), summed / total)


class _LateGradient(torch.autograd.Function):
    """A loss whose per-element weights are only known once the step has ended, and are read in backward."""

    @staticmethod
    def forward(ctx: Any, num: Tensor, value: Tensor, late: _Late) -> Tensor:
        ctx.late = late
        return value.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.late.gradient is None:
            raise DebiasError(
                "Expected the loss of the first step, or of any step with `loss='sum'`, to be differentiated after the"
                " step has returned, but the step does it itself. Choose the loss by its position: `loss=0`."
            )
        return grad * ctx.late.gradient, None, None


@dataclass(eq=False)
class _Late:
    value: Tensor
    gradient: Tensor | None = None


@dataclass(eq=False)
class _Pending:
    """A tensor of losses that nobody has reduced yet, with denominators and sample numbers of the same shape."""

    tensor: Tensor
    den: Tensor
    index: Tensor | None
    call: LossCall
    version: int = 0
    # Where samples were mixed: the losses with each label, of which `tensor` is the sum, and their shares in it.
    parts: list[_Pending] = field(default_factory=list)
    share: Tensor | None = None
    reordered: bool = False

    def __post_init__(self) -> None:
        self.version = self.tensor._version

    @property
    def num(self) -> Tensor:
        """Numerators."""
        return self.tensor if self.share is None else self.tensor * self.share


_MUL = frozenset({_T.mul, torch.mul, torch.multiply, _T.multiply})
_DIV = frozenset({_T.div, torch.div, torch.true_divide, _T.true_divide, torch.divide, _T.divide})
_SUM = frozenset({_T.sum, torch.sum})
_MEAN = frozenset({_T.mean, torch.mean})
_WHERE = frozenset({torch.where})
_FILL = frozenset({_T.masked_fill, torch.masked_fill})
_ADD = frozenset({_T.add, torch.add})
_FOLLOWED = MOVES | CASTS | _MUL | _DIV | _SUM | _MEAN | _WHERE | _FILL | _ADD
_WATCHED = frozenset(LOSSES) | _FOLLOWED | RECORDED | NOT_PER_SAMPLE


class Finder(Protocol):
    """Notes operations and tells which linear layer made the logits; see :mod:`debias.step.head`."""

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note one operation."""
        ...

    def match(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Move]] | None:
        """Output, input and weight of the layer, and the moves from its output to the logits."""
        ...


@dataclass(eq=False)
class LossTap(TorchFunctionMode):
    """Watches the losses of one step; make a fresh one for every step.

    Args:
        combine: makes the loss to hand back from a call; where it is None, or returns None, the step receives what it
            would without a tap.
        late: hand back a provisional value, and read the gradient in backward: for steps whose right loss is only known
            once all losses have been seen.
        training: only losses that require a gradient count, and unreduced losses are followed.
        tracker: tells which sample a row belongs to; None where nobody asks.
        rows: the user's own answer to that question.
        finder: records what the classifier head needs to be found by; None where nobody asks.
        mixture: which labels the samples count with; None where augmentation has mixed none.
        evaluated: in evaluation, follows what counts and what was predicted.
    """

    combine: Callable[[LossCall], Tensor | None] | None = None
    late: bool = False
    training: bool = True
    tracker: RowTracker | None = None
    rows: Callable[[LossCall, int], Tensor] | str | None = None
    finder: Finder | None = None
    mixture: Mixture | None = None
    evaluated: Evaluated | None = None
    calls: list[LossCall] = field(default_factory=list)
    # Losses that reach the returned loss unseen if nothing reduces them in a way that can be followed: name and node.
    untapped: list[tuple[str, Any]] = field(default_factory=list)
    suspended: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._pending: list[_Pending] = []

    def close(self) -> None:
        """Let go of every tensor; calls and tap refer to each other, and only the garbage collector would notice."""
        self.calls, self.untapped, self._pending = [], [], []
        self.combine = self.tracker = self.finder = None
        if self.evaluated is not None:
            self.evaluated.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = _run if self.evaluated is None else self.evaluated.run
        if self.suspended or (func not in _WATCHED and self.finder is None):
            return func(*args, **kwargs) if self.suspended else run(func, args, kwargs)
        if func in LOSSES:
            return self._loss(func, args, kwargs)
        if not args and func in _FOLLOWED | RECORDED:
            args, kwargs = _first_by_position(func, kwargs)
        if self._pending and func in _FOLLOWED:
            followed = self._follow(func, args, kwargs)
            if followed is not None:
                return followed
        out = run(func, args, kwargs)
        if self.tracker is not None and func in RECORDED:
            self.tracker.record(func, args, kwargs, out)
        elif func in NOT_PER_SAMPLE and isinstance(out, Tensor) and out.requires_grad:
            self.untapped.append((func.__name__, out.grad_fn))
        if self.finder is not None:
            self.finder.record(func, args, kwargs, out)
        return out

    # -- losses ------------------------------------------------------------------------------------

    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # Without `strict=`, which Dynamo cannot follow in torch 2.9 where the whole module is compiled.
        arguments = dict(zip(NAMES[func], args)) | kwargs  # noqa: B905
        logits, target = arguments[NAMES[func][0]], arguments.get(SECOND[func])
        if self.training and not (torch.is_grad_enabled() and _requires_grad(*arguments.values())):
            return func(*args, **kwargs)
        if self.training and _requires_grad(arguments.get("weight"), arguments.get("pos_weight")):
            raise UntappedLossError(
                f"Expected `weight` of `{func.__name__}` to be constant, but got one that is learned: it would enter"
                " what the loss is divided by. Multiply the unreduced losses by it instead (`reduction='none'`)."
            )
        reduction = reduction_of(arguments)

        def elements() -> tuple[Tensor, Tensor]:
            losses = unreduced(func, arguments)
            return losses, LOSSES[func](losses, arguments)

        call = self._call(func.__name__, logits, target, "mean" if reduction == "batchmean" else reduction, elements)
        call.ignore_index = arguments.get("ignore_index")
        call.arguments = {k: v for k, v in arguments.items() if k in FORM and v is not None}
        call._counted.append(counted_by(func, arguments))
        if self.training and self.mixture is not None and self.mixture.meant(call):
            return self._mixed_loss(func, arguments, call)
        if reduction != "none":
            self._add(call)
            return self._hand_back(call, lambda: func(*args, **kwargs))
        out = func(*args, **kwargs)
        if self.training:
            den = LOSSES[func](out.detach(), arguments).expand(out.shape)
            call._elements = lambda: (out, den)
            self._pending.append(_Pending(out, den, self._element_numbers(call, out), call))
            self.untapped.append((f"{func.__name__}(reduction='none')", out.grad_fn))
        else:
            if self.evaluated is not None:
                call._counted.append(self.evaluated.elements.start(out))
            self._add(call)
        return out

    def adapted(self, name: str, args: tuple[Any, ...], per_sample: Callable[..., Any], original: Tensor) -> Tensor:
        """Take a loss that torch's functions do not show from an adapter: per-sample losses ``(rows, ...)``."""
        call, requires_grad = self.stated(name, args, per_sample)
        if self.training and not (torch.is_grad_enabled() and requires_grad):
            return original
        self._add(call)
        return self._hand_back(call, call.local if call.shares is not None else lambda: original)

    def stated(self, name: str, args: tuple[Any, ...], per_sample: Callable[..., Any]) -> tuple[LossCall, bool]:
        """A loss given by a function of ``args``, logits and target first, and whether it requires a gradient."""

        def compute(*args: Any) -> tuple[Tensor, Tensor]:
            self.suspended += 1  # the losses inside are not losses of the step
            try:
                losses = per_sample(*args)
            finally:
                self.suspended -= 1
            losses, den = losses if isinstance(losses, tuple) else (losses, losses.new_ones(()))
            return losses, den.expand(losses.shape)

        logits, target = (args[0] if args else None), (args[1] if len(args) > 1 else None)
        losses, den = compute(*args)
        call = self._call(name, logits, target, "mean", lambda: (losses, den))
        call._counted.append(lambda: None if bool((den != 0).all()) else den != 0)
        if self.training and self.mixture is not None and self.mixture.meant(call):
            if not isinstance(target, Tensor):
                raise unmixable(name, "it has no target tensor as second argument")
            self._mix(call, lambda moved: compute(args[0], moved(target), *args[2:]))
        return call, losses.requires_grad

    def _add(self, call: LossCall) -> None:
        call.ordinal = sum(other.name == call.name for other in self.calls)
        self.calls.append(call)

    def _call(self, name: str, logits: Any, target: Any, reduction: str, elements: Any) -> LossCall:
        call = LossCall(name, logits, target, reduction, len(self.calls), elements, self._sample_numbers)
        if self.finder is not None and isinstance(logits, Tensor):
            call.linear = self.finder.match(logits)
        if self.evaluated is not None and name in CLASSIFYING:
            call.predicted, call.from_labels = self.evaluated.predictions.of(logits, target)
        return call

    def _hand_back(self, call: LossCall, original: Callable[[], Tensor]) -> Tensor:
        out: Any = None
        if self.combine is not None and self.training:
            if self.late:
                # Of all ranks where they share it: what a step makes of its value is linearised there. Of a rank where
                # nothing counts the mean is NaN, but what replaces it need not be.
                value = self.combine(call)
                value = (call.local() if value is None else value).detach()
                call.late = _Late(torch.where((call.elements[1].sum() == 0) & value.isnan(), 0, value))
                out = _LateGradient.apply(call.elements[0], call.late.value, call.late)
            else:
                out = self.combine(call)
        if out is None:
            out = original()
        if self.training and out.grad_fn is not None:
            # What get_gradient_edge(out) returns, without its checks.
            call.edge = torch.autograd.graph.GradientEdge(out.grad_fn, out.output_nr)
        return out

    def _sample_numbers(self, call: LossCall, num: Tensor) -> Tensor | None:
        """Sample numbers for ``num`` (shaped like it, or one per row); None if row i is sample i or nobody asks."""
        if self.tracker is None:
            return None
        n, shape = self.tracker.n, num.shape
        if self.rows is not None:
            return _given_rows(self.rows, call, n, shape, num.device)
        # A loss that compares inputs is that of the first one's sample, the anchor's.
        trusted = (call.logits,) if call.name in COMPARING else (call.target, call.logits)
        candidates = [x for x in trusted if isinstance(x, Tensor)]
        # A single number is no row that could be found among others of the step.
        single = num.numel() == 1 and n > 1 and call.elements[0].ndim == 0
        index = self.tracker.resolve(candidates, 0 if single else shape[0] if shape else 1)
        if index is None:
            return None
        if isinstance(index, bool):
            raise _rows_error(call, n, shape)
        self.tracker.needed = True
        return _aligned(index, shape)

    def _element_numbers(self, call: LossCall, losses: Tensor) -> Tensor | None:
        """Sample numbers in the shape of unreduced losses; None only if nobody asks."""
        if self.tracker is None:
            return None
        index = self._sample_numbers(call, losses)
        if losses.ndim == 0:
            return torch.zeros((), dtype=torch.long, device=losses.device)
        if index is None:
            return self.tracker.start(losses.shape, losses.device)
        return index if index.shape == losses.shape else index.view(-1, *[1] * (losses.ndim - 1)).expand(losses.shape)

    # -- mixed samples -----------------------------------------------------------------------------

    def _mixed_loss(self, func: Any, arguments: dict[str, Any], call: LossCall) -> Tensor:
        """A loss of samples that count with several labels."""
        target: Any = call.target
        if SECOND[func] != "target" or not isinstance(target, Tensor):
            raise unmixable(call.name, "it compares inputs with each other")
        weight: Any = arguments.get("weight")
        # Weights of the elements, unlike those of the classes, belong to the labels.
        of_rows = isinstance(weight, Tensor) and weight.ndim > 0 and weight.shape == target.shape
        of_rows = of_rows and LOSSES[func] is not class_weights

        def compute(moved: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            changed = {"target": moved(target)} | ({"weight": moved(weight)} if of_rows else {})
            losses = unreduced(func, arguments | changed)
            return losses, LOSSES[func](losses, arguments | changed).expand(losses.shape)

        parts = self._mix(call, compute)
        if call.reduction != "none":
            self._add(call)
            return self._hand_back(call, call.local)
        out = torch.stack([part.num for part in parts]).sum(0)
        first = parts[0]
        self._pending.append(_Pending(out, first.den, first.index, call, parts=parts))
        self.untapped.append((f"{call.name}(reduction='none')", out.grad_fn))
        return out

    def _mix(
        self, call: LossCall, compute: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]
    ) -> list[_Pending]:
        """Give a call the rows of all parts of the mixture; the parts, unreduced.

        Args:
            call: the loss.
            compute: losses and denominators with the targets that its argument makes of the step's own.
        """
        mixture: Mixture = self.mixture  # type: ignore[assignment]
        losses, den = compute(lambda target: target)
        if losses.ndim == 0:
            raise unmixable(call.name, "it is a single number")
        index = self._sample_numbers(call, losses)
        if index is not None and index.ndim > 1:  # one sample a row, unless the elements are those of the target
            index = index.flatten() if call.target.shape == losses.shape else index.flatten(1)[:, 0]  # type: ignore[union-attr]
        check = index is not None and (index.device.type == "cpu" or self.tracker is None or self.tracker.everything)
        elementwise = index is not None and len(index) != len(losses)
        parts, targets, sources = [], [], []
        for part in mixture.parts:
            rows = None if part.source is None else row_sources(part.source, index, mixture.n, check=check)

            def moved(target: Tensor, rows: Tensor | None = rows) -> Tensor:
                if rows is None:
                    return target
                return target.flatten()[rows].view(target.shape) if elementwise else target[rows]

            if rows is not None:
                losses, den = compute(moved)
            shares = [x if index is None else x[index] for x in (part.num, part.den)]
            shape = losses.shape if elementwise else (-1, *[1] * (losses.ndim - 1))
            num_share, den_share = (x.to(losses.dtype).view(shape).expand(losses.shape) for x in shares)
            source = torch.arange(mixture.n, device=mixture.device) if part.source is None else part.source
            sources.append(source if index is None else source[index])
            of_elements = sources[-1].view(shape).expand(losses.shape)
            parts.append(_Pending(losses, den.to(losses.dtype) * den_share, of_elements, call, share=num_share))
            targets.append(moved(call.target))  # type: ignore[arg-type]
        call.parts, call.targets, call._own_rows = len(parts), torch.cat(targets), index
        _set_parts(call, parts)
        if not elementwise:
            samples = torch.cat(sources)
            call._sample_of = lambda call, num: samples
        return parts

    # -- unreduced losses --------------------------------------------------------------------------

    def _find(self, x: Any) -> _Pending | None:
        for pending in self._pending:
            if pending.tensor is x:
                if x._version != pending.version:
                    raise UntappedLossError(
                        f"Expected the losses of `{pending.call.name}(reduction='none')` to stay as they are, but they"
                        " were changed in place, so what they are divided by is not known any more. Write"
                        " `losses = losses * mask` or `losses.masked_fill(~mask, 0)` instead."
                    )
                return pending
        return None

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry denominators and sample numbers through one operation on an unreduced loss; None if it is none."""
        place = next((i for i, x in enumerate(args[:3]) if isinstance(x, Tensor) and self._find(x) is not None), None)
        if place is None or (place and func not in _MUL and func not in _WHERE and func not in _ADD):
            return None
        pending = self._find(args[place])
        if pending is None:
            return None
        if (func in _SUM or func in _MEAN) and _over_all(args, kwargs, pending.tensor.ndim):
            return self._reduced(func in _MEAN, pending, lambda: func(*args, **kwargs))
        out, followed = self._followed(func, args, kwargs, place, pending)
        for part in pending.parts:
            moved = self._followed(func, (*args[:place], part.tensor, *args[place + 1 :]), kwargs, place, part)[1]
            for whole, of_part in zip(followed, moved, strict=True):
                whole.parts.append(of_part)
        self._pending.extend(followed)
        return out

    def _followed(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], place: int, pending: _Pending
    ) -> tuple[Any, list[_Pending]]:
        """The result of an operation on an unreduced loss, and the unreduced losses in it."""
        other = next((x for i, x in enumerate(args[:2]) if i != place), kwargs.get("other"))
        out = func(*args, **kwargs)
        den, index, share = pending.den, pending.index, pending.share
        if func in MOVES:
            outs = list(out) if isinstance(out, tuple | list) else [out]
            made = []
            for i, x in enumerate(outs):
                part = None if x is out else i
                den_, index_, share_ = (
                    None if y is None else apply_move(func, args, kwargs, y, part) for y in (den, index, share)
                )
                reordered = pending.reordered or not keeps_rows(func, args, x)
                made.append(_Pending(x, den_, index_, pending.call, share=share_, reordered=reordered))  # type: ignore[arg-type]
            return out, made
        if func in _SUM or func in _MEAN:
            den = func(den, *args[1:], **kwargs)
            index = None if index is None else self._reduced_index(index, out, args, kwargs)
            share = None if share is None else share.mean(_dims(args, kwargs, share.ndim)).view(out.shape)
        elif func in _MUL or func in _DIV:
            # A tensor of weights or a mask weighs numerator and denominator alike; a scalar only scales the loss. What
            # is learned from (the focal term) or has signs (an advantage) is part of the loss, not a weight.
            if isinstance(other, Tensor) and other.ndim and not other.requires_grad:
                weight = other.to(den.dtype)
                weight = torch.where((weight >= 0).all(), weight, 1)
                den = den * weight if func in _MUL else den / weight
        elif func in _WHERE:
            if place == 0:
                return out, []
            other = args[1] if place == 2 else args[2] if len(args) > 2 else kwargs["other"]
            second = self._with_same_samples(pending, other)
            counts = self._counts(den, other) if second is None else _rescaled(second.den, den)
            den = torch.where(args[0], den, counts) if place == 1 else torch.where(args[0], counts, den)
        elif func in _FILL:
            mask, value = (*args[1:], *(kwargs[name] for name in ("mask", "value") if name in kwargs))
            den = torch.where(mask, self._counts(den, value), den)
        elif func in _ADD and isinstance(other, Tensor):
            second = self._with_same_samples(pending, other)
            if second is None:
                return out, []  # only losses of the same samples are added, and numbers
            if self._reads(den) and not torch.allclose(_rescaled(second.den, den), den):
                raise UntappedLossError(
                    f"Expected unreduced losses that are added, here of `{pending.call.name}` and `{second.call.name}`,"
                    " to have the same masks and weights, but they differ: what the sum is to be divided by is not"
                    " known. Reduce each on its own and add the means, or return {'loss': loss, 'losses': per_sample}."
                )
        den = den.expand(out.shape)
        index = None if index is None else index.expand(out.shape)
        share = None if share is None else share.expand(out.shape)
        return out, [_Pending(out, den, index, pending.call, share=share, reordered=pending.reordered)]

    def _reads(self, x: Tensor) -> bool:
        """Whether values may be read: that waits for the device, so beyond the CPU only in the first step."""
        return x.device.type == "cpu" or (self.tracker is not None and self.tracker.everything)

    @staticmethod
    def _counts(den: Tensor, value: Any) -> Tensor:
        """Denominators of elements that a value has taken the place of: zeros are masked out, others count."""
        if isinstance(value, Tensor):
            return torch.where(value == 0, 0, den)
        return den if value else torch.zeros_like(den)

    def _with_same_samples(self, pending: _Pending, other: Any) -> _Pending | None:
        """The unreduced loss that another operand is, if any.

        Raises:
            RowsError: its rows are of other samples.
        """
        second = self._find(other) if isinstance(other, Tensor) else None
        if second is None or pending.index is None or second.index is None:
            return second
        first = pending.index
        if self._reads(first) and first.shape == second.index.shape and not torch.equal(first, second.index):
            raise RowsError(
                f"Expected unreduced losses that are combined, here of `{pending.call.name}` and"
                f" `{second.call.name}`, to be of the same samples row by row, but they are not. Reduce each on its"
                " own and add the means."
            )
        return second

    def _reduced(self, is_mean: bool, pending: _Pending, original: Callable[[], Tensor]) -> Tensor:
        num, den, index, first = pending.tensor, pending.den, pending.index, pending.call
        if not num.requires_grad:
            return original()
        call = self._call(first.name, first.logits, first.target, "none" if is_mean else "sum", lambda: (num, den))
        call._sample_of = lambda call, flat: None if index is None else index.reshape(flat.shape)
        call._mean_over, call.reordered = num.numel() if is_mean else None, pending.reordered
        call.ignore_index, call.arguments, call.computed = first.ignore_index, first.arguments, first
        if pending.parts:
            call.parts, call.targets = len(pending.parts), first.targets
            _set_parts(call, pending.parts)
        self._add(call)
        return self._hand_back(call, original)

    def _reduced_index(self, index: Tensor, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Sample numbers after a sum or mean over some axes, which must not run over samples."""
        kept = index
        for d in sorted(_dims(args, kwargs, index.ndim), reverse=True):
            first = kept.select(d, 0)
            constant = index.stride(d) == 0 or index.shape[d] == 1
            if not constant and self._reads(index):
                constant = bool((kept == first.unsqueeze(d)).all())
                if not constant:
                    raise RowsError(
                        "Expected an unreduced loss to be summed over the elements of a sample or over everything, but"
                        f" got a sum over axis {d} of shape {tuple(index.shape)}, which mixes samples. Reduce the axes"
                        " of a sample first, then all."
                    )
            kept = first
        return kept.reshape(out.shape)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _first_by_position(func: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``torch.squeeze(input=x, dim=1)`` and its like with what the operation is done to in front."""
    names = ("condition", "input", "other") if func in _WHERE else ("input", "tensors", "tensor")
    first = [name for name in names if name in kwargs]
    if len(first) != (3 if func in _WHERE else 1):
        return (), kwargs
    return tuple(kwargs[name] for name in first), {k: v for k, v in kwargs.items() if k not in first}


def _rescaled(den: Tensor, other: Tensor) -> Tensor:
    """Denominators of the largest value of others: a loss summed over an axis has its size in all of them."""
    largest = den.max()
    return den * (other.max() / (largest + (largest == 0)))


def _set_parts(call: LossCall, parts: list[_Pending]) -> None:
    """Rows of a call from those of its parts."""
    num = torch.cat([part.num for part in parts])
    den = torch.cat([part.den for part in parts])
    index = torch.cat([part.index for part in parts])  # type: ignore[misc]
    call._elements = lambda: (num, den)
    call._sample_of = lambda call, num: index
    call.shares = torch.cat([part.share for part in parts])  # type: ignore[misc]


def _requires_grad(*tensors: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _aligned(index: Tensor, shape: torch.Size) -> Tensor:
    """Sample numbers in the shape of the losses, or one per row."""
    if index.ndim == len(shape) + 1:  # logits or soft targets: the class axis is gone in the loss
        index = index.select(1, 0)
    if index.shape == shape:
        return index
    return index.flatten(1)[:, 0] if index.ndim > 1 else index


def _given_rows(rows: Any, call: LossCall, n: int, shape: torch.Size, device: torch.device) -> Tensor | None:
    count = shape[0] if shape else 1
    if callable(rows):
        index = torch.as_tensor(rows(call, n), device=device)
        if index.is_floating_point() or index.shape not in (shape, shape[:1]):
            raise RowsError(
                f"Expected `rows` to return int64 sample numbers of shape {tuple(shape[:1])} or {tuple(shape)}, but got"
                f" {index.dtype} of shape {tuple(index.shape)}. Return for each row of the loss the sample it"
                f" belongs to."
            )
        return index
    if count % n:
        raise RowsError(
            f"Expected the rows of the loss to be a multiple of the {n} samples with `rows={rows!r}`, but got {count}."
            " Pass `rows=callable(call, n)` that returns the sample of each row."
        )
    return arranged_rows(rows, n, count // n, device)


def _rows_error(call: LossCall, n: int, shape: torch.Size) -> RowsError:
    if shape and shape[0] < n:
        return RowsError(
            f"Expected the rows of `{call.name}` to be those of the batch, but the loss has shape {tuple(shape)} and"
            f" the batch {n} ids. If a `collate_fn` leaves samples out, leave them out of the dataset instead, as ids"
            " cannot follow; if the step does, index the batch inside it; else say which sample each row belongs to:"
            " `rows=callable(call, n)`."
        )
    return RowsError(
        f"Expected the rows of `{call.name}` to be those of the batch, but the loss has shape {tuple(shape)} and the"
        f" batch {n} ids. If the rows are built from the samples, say how: `rows='tiled'` (all samples, then all"
        " again), `rows='interleaved'` (all rows of a sample together), or `rows=callable(call, n)` that returns"
        " the sample of each row."
    )


def _dims(args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> list[int]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None:
        return list(range(ndim))
    return [d % max(ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def _over_all(args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> bool:
    keeps = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return len(set(_dims(args, kwargs, ndim))) == ndim and not keeps


def no_loss_error(seen: list[str], *, reweighs: bool = True) -> LossNotFoundError:
    """What to say where a training step shows no loss that can be taken apart."""
    hint = (
        f" It computes {', '.join(sorted(set(seen)))}, which has no per-sample form (it compares whole sets)."
        if seen
        else ""
    )
    per_batch = (
        "pass `losses='heads'` (torchvision's detectors) or `losses='split'`"
        if reweighs
        else "as torchvision's detectors, only methods that reweigh have a way (`losses='heads'`, `losses='split'`)"
    )
    return LossNotFoundError(
        "Expected the training step to compute its loss with a torch loss function (cross_entropy, mse_loss, ...), but"
        f" none that requires a gradient reaches the returned loss.{hint} Ways out: return {{'loss': loss, 'losses':"
        " per_sample} with losses of shape (N,); or return {'loss', 'logits', 'targets'}; or register the loss once"
        " with `debias.register_loss(LossClass, per_sample)`, and hold the instance in the module"
        " (`self.loss = LossClass()` in `__init__`), where it is looked for; for models that only give a"
        f" loss per batch, {per_batch}."
    )
