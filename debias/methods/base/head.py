"""The loss and the head of a :class:`debias.LossCall`, as the penalties on the head need them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import DebiasError, HeadNotFoundError, RowsError
from debias.ops.head_losses import HeadLoss, make_head_loss
from debias.ops.penalties import LOSS_OPTIONS
from debias.tap.calls import LossCall
from debias.tap.features import rows_of_features
from debias.tap.sharded import has_shards, whole

__all__ = [
    "check_head",
    "check_linear",
    "features_of",
    "float32",
    "head_loss",
    "refuse_batch_norm",
    "refuse_sharded",
    "rows_of",
]

_HALF = (torch.float16, torch.bfloat16)


def float32(x: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return x.float() if x.dtype in _HALF else x


def head_loss(call: LossCall, *, check: bool = False) -> HeadLoss:
    """The loss of a call, taken apart as a function of its logits.

    Args:
        call: the loss.
        check: whether to compare it with the losses that a step has worked on, which waits for the device.

    Raises:
        DebiasError: it is a loss whose derivatives are not known, its logits are not ``(N, C)``, or they are a
            difference from the target.
        RowsError: the step has made something else of the losses than masks and weights can.
    """
    loss = _rebuilt(call)
    if check and (call.record.function is not None or call.name == "nll_loss"):  # of any scores, normalised or not
        _check_losses(call, loss)
    if check and loss.kind == "squared_error" and _is_difference(call.logits) and not bool(loss.target.any()):
        raise DebiasError(
            f"Expected `{call.name}` to compare a prediction with its target, but got a difference and targets that are"
            f" all 0, which hide the prediction that a penalty needs. Write `{call.name}(prediction, target)`."
        )
    return loss


def _rebuilt(call: LossCall) -> HeadLoss:
    logits, target, name = call.logits, call.target, call.name
    if logits is None or target is None:
        raise DebiasError(
            f"Expected the logits and targets of one loss, but got `{call.name}` without. Choose one of several losses,"
            " `loss=<index>`; return {'loss', 'logits', 'targets'}; or use a penalty that needs losses only (VREx)."
        )
    if name == "binary_cross_entropy":
        raise DebiasError(
            "Expected a loss of logits, but `binary_cross_entropy` reads probabilities, of which the derivatives are"
            " others. Use `binary_cross_entropy_with_logits` (and no sigmoid before it), or a penalty that needs losses"
            " only (VREx)."
        )
    if name == "logits":  # stated by the step as {"logits", "targets"}
        binary = target.is_floating_point() and target.shape == logits.shape
        name = "binary_cross_entropy" if binary else "cross_entropy"
    name = "cross_entropy" if name == "nll_loss" else name  # the same, of log-probabilities
    logits = float32(logits)
    record = call.record
    followed, mixed = record.function is not None, record.targets is not None  # reduced by the step; by augmentation
    if mixed:  # rows count with the labels of others
        logits, target = call.of_logits(logits), record.targets
    logits, target, options = _in_rows(name, logits, target, _options(name, call.arguments))
    loss = make_head_loss(name, logits, target, **options)
    rows, dense = len(loss.logits), call.logits.ndim > 2  # type: ignore[union-attr]
    den = (record.elements[1].flatten() if dense else call.den).to(logits.dtype)
    if followed and loss.kind != "cross_entropy":  # the step may have summed the labels of a sample
        loss = replace(loss, summed=record.computed[0].ndim == 1)
    factors = _factors(loss, record.scale)
    unknown = followed and (record.scale is False or (record.scale is not None and factors is None))
    if unknown or (mixed and followed) or den.numel() % max(rows, 1):
        raise RowsError(
            f"Expected the losses of `{call.name}` to be what that function makes of the logits"
            f" {tuple(logits.shape)}, row by row, with masks and weights only, but the step has made something else of"
            f" them{' of mixed samples' if mixed else ''} (a focal factor? another loss added? rows left out? rows in"
            " another order?). Leave the reduction to the loss function, or use a penalty that only needs losses"
            " (VREx)."
        )
    factor = record.factor
    if record.kept is not None and record.divisor is None:  # a mean of means: what each is divided by cancels out
        size = record.kept.numel()
        den, factor = den * size, logits.new_full((), size) if factor is None else factor * size
    if factor is not None:
        factor = factor.expand(record.elements[0].shape).flatten() if factor.ndim and dense else factor
        factors = factor if factors is None else factors * factor
    loss = loss if factors is None else loss.weighted(factors.expand(rows) if factors.ndim == 0 else factors)
    return replace(loss, den=den.view(rows, -1).sum(1) if den.numel() != rows else den)


def _in_rows(
    name: str, logits: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Dense logits ``(N, C, ...)``, of pixels or tokens, with a row for each position, or for each element of a loss
    that has one for each.
    """
    shape = logits.shape
    if len(shape) < 3:
        return logits, target, options
    if name != "cross_entropy":
        flat = {k: x.expand(shape).flatten() if isinstance(x, Tensor) else x for k, x in options.items()}
        return logits.flatten(), target.flatten() if target.shape == shape else target, flat
    soft = target.shape == shape
    target = target.movedim(1, -1).reshape(-1, shape[1]) if soft else target.flatten()
    return logits.movedim(1, -1).reshape(-1, shape[1]), target, options


def _factors(loss: HeadLoss, scale: Any) -> Tensor | None:
    """What rows ``(rows,)`` or elements ``(rows, C)`` were multiplied by; None if it is neither."""
    if scale is None or scale is False:
        return None
    scale = torch.as_tensor(scale, device=loss.logits.device).to(loss.logits.dtype)
    if scale.numel() in (1, len(loss.logits)) and (scale.ndim < 2 or loss.kind == "cross_entropy"):
        return scale.flatten().expand(len(loss.logits))
    fits = loss.kind != "cross_entropy" and scale.numel() == loss.logits.numel()
    return scale.reshape(loss.logits.shape) if fits else None


def rows_of(call: LossCall, per_sample: Tensor, rows: int) -> Tensor:
    """Values of the rows of the logits, from values of the samples.

    Raises:
        RowsError: the rows are not those of the loss.
    """
    index = call.rows
    count = len(per_sample) if index is None else index.numel()
    if call.logits is not None and call.logits.ndim > 2 and rows % max(count, 1) == 0:  # a row for each position
        return (per_sample if index is None else per_sample[index]).repeat_interleave(rows // max(count, 1), 0)
    if count != rows and (index is None or count % max(rows, 1)):
        raise RowsError(
            f"Expected {rows} rows that belong to the {count} of `{call.name}`, but they do not divide it. The loss is"
            " computed from other rows than the head reads (a mean over tokens?); name a layer that sees one row a"
            " sample: `head='dotted.path'`."
        )
    if index is None:
        return per_sample
    if count != rows:  # one number per element of a multi-label loss, all of a row the same
        of_rows = index.view(rows, -1)
        index = of_rows[:, 0]
        if index.device.type == "cpu" and not torch.equal(of_rows, index.unsqueeze(1).expand_as(of_rows)):
            raise RowsError(
                f"Expected a row of the logits of `{call.name}` to be of one sample, but the samples lie along another"
                " axis. Put them first: `logits.transpose(0, 1)`, and the targets likewise."
            )
    return per_sample[index]


def features_of(call: LossCall, rows: int) -> Tensor:
    """Input of the head as ``(rows, d)``, at least float32, and as precise as the logits.

    Raises:
        HeadNotFoundError: it has another number of rows.
    """
    features = rows_of_features(call.features, call.head)
    if len(features) != rows:
        raise HeadNotFoundError(
            f"Expected the head to have one input row for each of the {rows} rows of the loss, but got features of"
            f" shape {tuple(call.features.shape)}. Name the layer that makes the logits of the loss,"
            " `head='dotted.path'`; where that gives several numbers for each position (N, T, C), flatten the positions"
            " before the loss: `logits.flatten(0, 1)`, and the targets likewise."
        )
    precise = torch.float32 if call.logits is None else torch.promote_types(torch.float32, call.logits.dtype)
    return features.to(torch.promote_types(features.dtype, precise))


def check_linear(call: LossCall, features: Tensor, logits: Tensor) -> None:
    """Refuse closed forms where the logits are not ``features @ W.T + b``; waits for the device.

    Raises:
        HeadNotFoundError: they are not.
    """
    with _steady(call.head):
        weight, bias = (whole(getattr(call.head, name, None)) for name in ("weight", "bias"))
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
    if isinstance(head, nn.modules.conv._ConvNd):
        raise HeadNotFoundError(
            "Expected a head that reads one row of features for each row of the loss with `derivatives='autograd'`,"
            f" but got a {type(head).__name__}. Take `derivatives='closed_form'`, to which a convolution of size 1 is a"
            " linear layer."
        )
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


def refuse_sharded(head: nn.Module) -> None:
    """Derivatives by autograd run the head again, with parameters of their own.

    Raises:
        HeadNotFoundError: the parameters of the head are spread over processes.
    """
    if has_shards(head):
        raise HeadNotFoundError(
            f"Expected a head whose parameters are whole on every process for `derivatives='autograd'`, but those of"
            f" {type(head).__name__} are sharded. Take `derivatives='closed_form'`, or `strategy='ddp'`."
        )


def refuse_batch_norm(head: nn.Module) -> None:
    """A sample's logits must not depend on the others: its derivatives would not be its own, nor the same by rank.

    Raises:
        HeadNotFoundError: the head normalises by its batch.
    """
    for module in head.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise HeadNotFoundError(
                f"Expected a head in which a sample's logits depend on that sample alone, but got {type(head).__name__}"
                f" with a {type(module).__name__} in training mode. Name the layers behind it"
                " (`head='dotted.path'`), or use a penalty that needs no head (IRM, VREx)."
            )


def _is_difference(x: Tensor | None) -> bool:
    """Whether a constant was subtracted last, but for views and factors."""
    node = None if x is None else x.grad_fn
    while node is not None:
        inputs = [before for before, _ in node.next_functions if before is not None]
        if len(inputs) != 1 or node.name().startswith(("SubBackward", "RsubBackward")):
            return len(inputs) == 1
        node = inputs[0]
    return False


def _check_losses(call: LossCall, loss: HeadLoss) -> None:
    """The derivatives are those of the function's own formula, so the losses must be, too, up to one factor for all."""
    if not len(loss.logits):
        return
    with torch.no_grad():
        own = call.record.elements[0].reshape(len(loss.logits), -1).sum(1)
        made = loss.num(loss.logits).to(own.dtype)
        made = made * (own.dot(made) / made.dot(made).clamp_min(torch.finfo(made.dtype).tiny))
        error = float((made - own).abs().max() / own.abs().max().clamp_min(1e-6))
    half = call.logits is not None and call.logits.dtype in _HALF
    if error > (0.05 if half else 1e-3):
        raise RowsError(
            f"Expected the losses of `{call.name}` to be what that function makes of the logits, with masks and"
            " weights, but the step has made something else of them (a focal factor? another loss added? scores for"
            f" `nll_loss` that are no log-probabilities?): they differ by {error:.1%} of the largest. Use a penalty"
            " that only needs losses (VREx)."
        )


def _check_logits(call: LossCall, made: Tensor, logits: Tensor, who: str, *, masked: Tensor) -> None:
    if not logits.numel():
        return
    given = [x for x in (call.logits, call.features) if x is not None]  # a sharded head may compute in half precision
    half = any(x.dtype in _HALF for x in given) or torch.is_autocast_enabled(made.device.type)
    made, logits = made.masked_fill(masked, 0), logits.masked_fill(masked, 0)
    scale = made.abs().max().clamp_min(1e-6)
    error = float((made - logits).abs().max() / scale)
    if error > (0.05 if half else 1e-3):
        raise HeadNotFoundError(
            f"Expected the logits of `{call.name}` to be what the head {who} makes of its input, but they differ by"
            f" {error:.1%} of the largest. Something stands between them (a temperature, a mean over heads, dropout,"
            " another order of rows). Move it in front of the head, or use a penalty that needs no head (IRM, VREx)."
        )


def _options(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: arguments[k] for k in LOSS_OPTIONS.get(name, ()) if k in arguments}
