"""The loss tap: records every torch loss of a step, and hands back what plain training would have given.

A ``TorchFunctionMode`` sees ``F.cross_entropy`` and its like in any call style. A loss computed with
``reduction="none"`` is followed (:mod:`debias.tap.following`) to the ``.mean()`` or ``.sum()`` that ends it. What
becomes of the losses is settled once the step has returned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from debias.errors import SPLIT, LossNotFoundError, RowsError, UntappedLossError
from debias.tap.batches import arranged_rows
from debias.tap.calls import LossCall, LossRecord
from debias.tap.counted import counted_by
from debias.tap.following import FOLLOWED, Following
from debias.tap.head import HeadFinder
from debias.tap.losses import COMPARING, FORM, LOSSES, NAMES, NOT_PER_SAMPLE, SYMMETRIC, reduction_of, unreduced
from debias.tap.mixing import Mixture, mix_parts, relabelled
from debias.tap.moves import MAY_CHANGE, RECORDED, is_irregular, named
from debias.tap.predictions import CLASSIFYING, Evaluated
from debias.tap.rows import RowTracker
from debias.tap.sharded import refuse_sharded_loss

__all__ = ["LossTap", "no_loss_error"]

# What an operation is watched for, a bit each.
_WATCHED = (LOSSES, RECORDED, FOLLOWED, MAY_CHANGE, NOT_PER_SAMPLE, named("log_softmax"))
_LOSS, _RECORDED, _FOLLOWED, _CHANGING, _NOT_PER_SAMPLE, _LOG_SOFTMAX = _BITS = [1 << i for i in range(len(_WATCHED))]
_KINDS = {
    function: sum(bit for bit, functions in zip(_BITS, _WATCHED, strict=True) if function in functions)
    for function in set().union(*_WATCHED)
}


@torch.compiler.assume_constant_result
def _kinds_of(func: Any) -> int:
    """What an operation is watched for; see :func:`debias.tap.moves.among`."""
    return _KINDS.get(func, 0)


@dataclass(eq=False)
class LossTap(TorchFunctionMode):
    """Watches the losses of one step; make a fresh one for every step.

    Args:
        training: only losses that require a gradient count.
        tracker: tells which sample a row belongs to; None where nobody asks.
        rows: the user's own answer to that question.
        finder: records what the classifier head needs to be found by; None where nobody asks.
        mixture: which labels the samples count with; None where augmentation has mixed none.
        evaluated: follows what was predicted, where somebody asks, and in evaluation what counts.
        strict: refuse losses that cannot be taken apart.
        careful: look for numbers of the whole batch in all operations, as in the first step of an epoch.
        constants: buffers of the network, in which no sample is.
        at_once: makes what a loss is replaced by while the step runs, for steps that use their losses up themselves.

    Attributes:
        calls: the losses, reduced by torch or by the step.
        untapped: losses that reach the returned loss unseen if nothing reduces them in a way that can be followed: name
            and node.
        suspended: above 0 while nothing is to be recorded.
        measuring: above 0 while losses that are computed are none of the step's, but a metric's.
    """

    training: bool = True
    tracker: RowTracker | None = None
    rows: Callable[[LossCall, int], Tensor] | str | None = None
    finder: HeadFinder | None = None
    mixture: Mixture | None = None
    at_once: Callable[[LossCall], Tensor | None] | None = None
    strict: bool = True
    careful: bool = False
    constants: Iterable[Tensor] = ()
    evaluated: Evaluated | None = None
    calls: list[LossCall] = field(default_factory=list)
    untapped: list[tuple[str, Any]] = field(default_factory=list)
    suspended: int = 0
    measuring: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._following = Following(self.tracker, self.mixture, self.add, self.constants, careful=self.careful)
        self._normalised: list[tuple[Tensor, Tensor]] = []  # log-probabilities and their logits

    def close(self) -> None:
        """Let go of every tensor; calls and tap refer to each other, and only the garbage collector would notice."""
        for call in self.calls:
            call.forget()
        self.calls, self.untapped, self._normalised = [], [], []
        self._following.close()
        self.at_once = self.tracker = self.finder = None
        if self.evaluated is not None:
            self.evaluated.close()

    @property
    def constant_nodes(self) -> set[Any]:
        """See :class:`debias.tap.whole_batch.WholeBatch`."""
        return self._following.batch.constant_nodes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        kinds, compiling = _kinds_of(func), torch.compiler.is_compiling()
        evaluated = None if self.training and compiling else self.evaluated  # following predictions would cut the graph
        looks = not compiling and self._following.batch.careful
        if not (kinds or looks) and evaluated is None and self.finder is None:
            return func(*args, **kwargs)
        if args and not compiling and is_irregular(args[0]):
            out = func(*args, **kwargs)
            if self.training:
                self._following.batch.see(func, (None, *args[1:]), kwargs, out)
            return out
        if kinds & _LOSS:
            return self._loss(func, args, kwargs)
        if kinds and not args:
            args, kwargs = _first_by_position(func, kwargs)
        if kinds & _CHANGING and self.calls and args and not compiling:
            for call in self.calls:
                call.keep(args[0])
        out = func(*args, **kwargs) if evaluated is None else evaluated.run(func, args, kwargs)
        if kinds & _RECORDED and self.tracker is not None:
            self.tracker.record(func, args, kwargs, out)
        elif kinds & _NOT_PER_SAMPLE and isinstance(out, Tensor) and out.requires_grad:
            self.untapped.append((func.__name__, out.grad_fn))
        if kinds & _LOG_SOFTMAX:
            self._normalised.append((out, args[0]))
        if self.finder is not None:
            self.finder.record(func, args, kwargs, out)
        return self._following.see(func, args, kwargs, out) if self.training and (kinds & _FOLLOWED or looks) else out

    # -- losses ------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _loss(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # Without `strict=`, which Dynamo cannot follow in torch 2.9 where the whole module is compiled.
        arguments = dict(zip(NAMES[func], args)) | kwargs  # noqa: B905
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        batch = self._following.batch
        if not self._counts(*tensors) or (func is F.ctc_loss and not self.training):  # which monitors cannot score
            out = func(*args, **kwargs)
            batch.see(func, args, kwargs, out)
            return out
        weights = [x for name in ("weight", "pos_weight") if isinstance(x := arguments.get(name), Tensor)]
        if self.training and any(x.requires_grad for x in weights):
            if not self.strict:
                return func(*args, **kwargs)
            raise UntappedLossError(
                f"Expected `weight` of `{func.__name__}` to be constant, but got one that is learned: it would enter"
                " what the loss is divided by. Multiply the unreduced losses by it instead (`reduction='none'`)."
            )
        refuse_sharded_loss(func.__name__, *tensors)
        given, labels = NAMES[func][:2]  # the second is the target, except of the ranking losses
        if func in SYMMETRIC and self._is_prediction(arguments[labels], arguments[given]):
            given, labels = labels, given
        if func is F.ctc_loss and arguments[labels].ndim == 1:  # of all samples, one after the other
            labels = "target_lengths"
        prediction = arguments[given]
        if self.training and func is F.nll_loss:  # of the log-probabilities of some logits
            prediction = next((x for y, x in self._normalised if y is prediction), prediction)
        reduction = reduction_of(arguments)

        def compute(moved: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
            """Losses and denominators, perhaps with the labels of other samples."""
            given = arguments
            if moved is not None:
                target, options = relabelled(arguments[labels], arguments, moved)
                given = {**arguments, **options, labels: target}
            losses = unreduced(func, given)
            return losses, losses.new_ones(()) if reduction in ("none", "sum") else LOSSES[func](losses, given)

        of_pairs = batch.of_pairs(*tensors)
        if func.__name__ in COMPARING and self.tracker is not None:
            of_pairs = of_pairs or self.tracker.compares(tensors)
        rows = {"of_pairs": of_pairs, "along_first": reduction == "batchmean"}
        call = self._call(func.__name__, prediction, arguments.get(labels), compute, **rows)
        call.arguments = {k: v for k, v in arguments.items() if k in FORM and v is not None}
        if not self.training:
            call.counts.append(counted_by(func, arguments))
        call.record.is_sum = reduction == "sum"
        call.record.of_batch = batch.holds(weights) or batch.makes(call.target)
        samples, parts = call.record.samples, mix_parts(self, call, compute)
        if reduction != "none":
            return self.add(call, call.record.value() if parts else func(*args, **kwargs))
        if parts:
            out = call.record.elements[0].view(len(parts), *parts[0].shape).sum(0)
        else:
            out = func(*args, **kwargs)
            call.record.compute = lambda: (out, out.new_ones(()))
        batch.see(func, args, kwargs, out)
        self._following.add(replace(call.record, source=out, function=call, parts=parts, scale=None))
        if self.tracker is not None:
            index = functools.partial(self._of_elements, samples, out.shape, out.device)
            self.tracker.follow(out, functools.cache(index))
        if self.training:
            self.untapped.append((f"{call.name}(reduction='none')", out.grad_fn))
        else:
            call.record.source = out
            if self.evaluated is not None:
                call.counts.append(self.evaluated.elements.start(out))
            self.calls.append(call)
        return out

    def _counts(self, *tensors: Tensor) -> bool:
        """Whether what reads, or is, these is a loss of the step: in training one to differentiate."""
        if self.training:
            return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return not self.measuring

    def _is_prediction(self, second: Any, first: Any) -> bool:
        """Whether it is the second argument of a symmetric loss that is the prediction."""
        if first.requires_grad or second.requires_grad:
            return not first.requires_grad
        return self.tracker is not None and self.tracker.is_of_batch(first) and not self.tracker.is_of_batch(second)

    def adapted(self, name: str, args: tuple[Any, ...], per_sample: Callable[..., Any], original: Tensor) -> Tensor:
        """Take a loss that torch's functions do not show from an adapter: per-sample losses ``(rows, ...)``."""
        call, losses, den = self.stated(name, args, per_sample)
        if not self._counts(losses):
            return original
        if self.training:  # copied, as the step may change it in place before it is compared
            call.record.registered = original.detach().clone(), losses, den
        return self.add(call, original if call.record.targets is None else call.record.value())

    def stated(
        self, name: str, args: tuple[Any, ...], per_sample: Callable[..., Any]
    ) -> tuple[LossCall, Tensor, Tensor]:
        """A loss given by a function of ``args``, logits and target first, its losses and their denominators."""

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
        call = self._call(name, logits, target, lambda: (losses, den))
        if not self.training:
            call.counts.append(lambda: None if bool((den != 0).all()) else den != 0)
        mix_parts(self, call, lambda moved: compute(args[0], moved(args[1]), *args[2:]))
        return call, losses, den

    def _call(
        self, name: str, logits: Any, target: Any, compute: Callable[[], tuple[Tensor, Tensor]], **rows: Any
    ) -> LossCall:
        call = LossCall(name, len(self.calls), logits, target, LossRecord(compute))
        call.record.samples = None if self.tracker is None else functools.partial(self.samples, call, **rows)
        if self.finder is not None and isinstance(logits, Tensor):
            call.record.linear = self.finder.match(logits)
        if self.evaluated is not None and name in CLASSIFYING:
            call.predicted, call.from_labels = self.evaluated.predictions.of(logits, target, name)
        return call

    def add(self, call: LossCall, out: Tensor) -> Tensor:
        """Record a loss that the step receives as ``out``; what it receives."""
        call.position = len(self.calls)
        self.calls.append(call)
        if self.training and self.at_once is not None and (changed := self.at_once(call)) is not None:
            out = changed
        if self.training and out.grad_fn is not None:
            # What get_gradient_edge(out) returns, without its checks.
            call.record.edge = torch.autograd.graph.GradientEdge(out.grad_fn, out.output_nr)
            call.record.received = out, out._version
        self._following.divide_later(out, call)
        return out

    def loaders_of(self, call: LossCall) -> set[int] | None:
        """Of which loaders' samples a loss is, by their numbers in the tracker; None where that is not known."""
        if self.tracker is None or self.rows is not None:
            return None
        found = map(self.tracker.loaders_of, _trusted(call))
        return next((loaders for loaders in found if loaders is not None), None)

    # -- samples of rows ---------------------------------------------------------------------------

    def samples(
        self, call: LossCall, shape: torch.Size, *, of_pairs: bool = False, along_first: bool = False, of: Any = None
    ) -> Tensor | None:
        """Sample numbers of losses, of their shape or one per row; None if row i is sample i.

        Args:
            call: the loss.
            shape: of the losses.
            of_pairs: it reads a number for each two samples, or rows of several.
            along_first: it is divided by the length of its first axis, so that samples have to lie along that.
            of: the tensor that tells their rows, where that is neither its target nor its logits.
        """
        tracker = self.tracker
        assert tracker is not None  # else a loss has no `samples`, and never row i for sample i
        if self.rows is not None:
            index = _given_rows(self.rows, call, tracker.n, shape, call.record.computed[0].device)
        else:
            index = _followed_rows(tracker, call, shape, _trusted(call) if of is None else [of], of_pairs)
        whole = along_first and index is not None and index.shape == shape and index.numel() > 0
        if whole and tracker.by_row(index) is None:  # type: ignore[arg-type]
            raise RowsError(
                f"Expected samples along the first axis of a loss of shape {tuple(shape)} with `reduction='batchmean'`,"
                " which divides by its length, but they lie along another one, so that nothing divides by their number."
                " Put them first: `x.transpose(0, 1)`."
            )
        return index

    def _of_elements(self, samples: Any, shape: torch.Size, device: torch.device) -> Tensor:
        """Sample numbers in the shape of unreduced losses; not the tracker's own, which would keep itself alive."""
        assert self.tracker is not None
        return self.tracker.of_elements(samples(shape), shape, device)


def _trusted(call: LossCall) -> list[Tensor]:
    """The tensors that tell the rows of a loss, in the order in which they are trusted."""
    # A loss that compares inputs is that of the first one's sample, the anchor's.
    trusted = (call.logits,) if call.name in COMPARING else (call.target, call.logits)
    return [x for x in trusted if isinstance(x, Tensor)]


def _first_by_position(func: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``torch.squeeze(input=x, dim=1)`` and its like with what the operation is done to in front."""
    names = ("condition", "input", "other") if func is torch.where else ("input", "tensors", "tensor", "x")
    first = [name for name in names if name in kwargs]
    return tuple(kwargs[name] for name in first), {k: v for k, v in kwargs.items() if k not in first}


def _refuse_spread(tracker: RowTracker, call: LossCall, shape: torch.Size, trusted: list[Tensor]) -> None:
    """Refuse targets ``(N, ...)`` that torch spreads over predictions ``(M, N, ...)``: rows are no samples then."""
    for x in trusted:
        if 0 < x.ndim < len(shape) and tracker.is_of_batch(x) and tracker.keeps_rows(x):
            raise RowsError(
                f"Expected the target of `{call.name}` to have as many axes as its losses, so that it tells where"
                f" the samples lie, but got shape {tuple(x.shape)} for losses of shape {tuple(shape)}. Spread it"
                " over them yourself: `target.expand_as(prediction)`."
            )


def _followed_rows(
    tracker: RowTracker, call: LossCall, shape: torch.Size, trusted: list[Tensor], of_pairs: bool
) -> Tensor | None:
    """Sample numbers of losses, see :meth:`LossTap.samples`, as what the loss reads was followed to the batch."""
    n = tracker.n
    # Broadcast over each other, each row is of all samples.
    mixed = of_pairs or (len(shape) == 2 and n > 1 and {tuple(x.shape) for x in trusted} == {(n,), (n, 1)})
    if not mixed:
        if n > 1 or shape[:1] != (1,):
            _refuse_spread(tracker, call, shape, trusted)
        # A single number is no row that could be found among others of the step.
        single = n > 1 and shape.numel() == 1 and call.record.computed[0].ndim == 0
        index = tracker.resolve(trusted, 0 if single else shape[0] if shape else 1)
        if index is None and (shape[0] if shape else 1) == n:  # a registered loss may have any shape
            return None
        mixed = tracker.mixed
        if isinstance(index, Tensor):
            tracker.needed = True
            # Of logits or soft targets: the class axis is gone in the loss.
            if index.ndim == len(shape) + 1 and (kept := tracker.without(index, [1])) is not None:
                index = kept
            if index.shape == shape:
                return index
            rows, mixed = tracker.by_row(index), False
            if rows is not None and rows.shape[:1] == (shape[:1] or (1,)):
                return rows
    raise _rows_error(call, n, shape, mixed=mixed)


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


def _rows_error(call: LossCall, n: int, shape: torch.Size, *, mixed: bool = False) -> RowsError:
    what = "the loss has" if call.record.registered is None else "its `per_sample` returns losses of"
    expected = (
        f"Expected the rows of `{call.name}` to be those of the batch, but {what} shape {tuple(shape)} and the"
        f" batch {n} ids"
    )
    if mixed:
        return RowsError(
            f"{expected}, and the step mixes samples with each other (mixup? similarities of pairs? a change in"
            " place?), so that a row is of several. Mix with `GroupMixup`, which tells whose labels count, or compute a"
            " loss with each label: `share * cross_entropy(logits, labels) + (1 - share) * cross_entropy(logits,"
            " labels[partners])`, with `loss='sum'`, which methods that reweigh can take. Penalties need unmixed"
            f" samples. {SPLIT}"
        )
    if shape and shape[0] < n:
        return RowsError(
            f"{expected}. If all samples together make what it reads (a mean over the batch), choose another loss,"
            " `loss=<index>`. If a `collate_fn` leaves samples out, leave them out of the dataset instead, as ids"
            " cannot follow; if the step does, index the batch inside it; else say which sample each row belongs to:"
            f" `rows=callable(call, n)`. {SPLIT}"
        )
    return RowsError(
        f"{expected}, and it cannot be followed which sample each row is of. If the rows are built from the samples,"
        " say how: `rows='tiled'` (all samples, then all again), `rows='interleaved'` (all rows of a sample together),"
        " or `rows=callable(call, n)` that returns the sample of each row."
    )


def no_loss_error(seen: list[str], *, manual: bool = False) -> LossNotFoundError:
    """What to say where a training step shows no loss that can be taken apart."""
    hint = (
        f" It computes {', '.join(sorted(set(seen)))}, which has no per-sample form where it compares whole sets of"
        " samples; one that averages over them can be registered."
        if seen
        else ""
    )
    stated = (
        "{'loss': loss, 'losses': per_sample} with losses of shape (N,), or {'loss', 'logits', 'targets'}"
        f"{' under automatic optimisation' if manual else ''}"
    )
    split = "Methods that reweigh groups or domains also take" if manual else f"{SPLIT[:-1]}, and"
    return LossNotFoundError(
        "Expected the training step to compute its loss with a torch loss function (cross_entropy, mse_loss, ...), but"
        f" none that requires a gradient reaches the returned loss.{hint} Ways out: return {stated}; or register the"
        " loss once with `debias.register_loss(LossClass, per_sample)`, and hold the instance in the module (`self.loss"
        f" = LossClass()` in `__init__`), where it is looked for. {split} `losses='heads'` for torchvision's detectors."
    )
