"""The features of a step: the runs of the layer that gives them, and which sample each of their rows is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from debias.errors import DebiasError, HeadNotFoundError, RowsError
from debias.tap.calls import LossCall
from debias.tap.notes import Note
from debias.tap.rows import RowTracker

__all__ = [
    "Having",
    "Pool",
    "Run",
    "check_features",
    "check_pool",
    "deliver",
    "moves_to_logits",
    "of_loaders",
    "own_weight",
    "pooled",
    "rows_of_features",
]

Pool: TypeAlias = Literal["mean", "first"] | None
Having: TypeAlias = Mapping[int, str] | None
"""Of several loaders, number and name of those whose samples have the ids that a method reads; None of one loader."""


@dataclass(eq=False)
class Run:
    """One run of a layer.

    Attributes:
        given: its input.
        output: what it made.
        around: the first tensors that it, and the modules that it lies in, were given, the innermost first.
        recorded: whether gradients were recorded.
        weight: of a linear layer whose run was noted: its weight.
        moves: likewise, what was done to its output to make the logits of a loss.
    """

    given: Any
    output: Any = None
    around: Sequence[Tensor] = ()
    recorded: bool = True
    weight: Any = None
    moves: list[Note] | None = None


def check_features(features: Any) -> Tensor:
    """Features of samples, ``(N, D)``.

    Raises:
        HeadNotFoundError: they have another shape, or are no tensor.
    """
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise HeadNotFoundError(
            f"Expected the features to have shape (N, D), one row per sample, but got {found}. Name a module whose"
            " output is pooled and flat, such as the one before the head, `features='dotted.path'`; or say how tokens"
            " (N, T, D) and maps (N, D, H, W) of a named module are pooled: `pool='mean'` or `pool='first'`."
        )
    return features


def check_pool(pool: Any, features: str | None) -> None:
    """Refuse a way of pooling that is unknown, or has no named module to pool the output of.

    Raises:
        DebiasError: it is.
    """
    if pool is not None and pool not in ("mean", "first"):
        raise DebiasError(f"Expected `pool` to be None, 'mean' or 'first', but got {pool!r}.")
    if pool is not None and features is None:
        raise DebiasError(
            f"Expected `features` to be named with `pool={pool!r}`, but got none: it says how the output of that module"
            " is pooled. Pass `features='dotted.path'`, or leave `pool` out."
        )


def pooled(features: Any, pool: str | None) -> Any:
    """One row a sample: the mean, or the first, of tokens ``(N, T, D)``; the mean over a map ``(N, D, H, W)``.

    Raises:
        HeadNotFoundError: the features have no tokens, or no such map.
    """
    if pool is None:
        return features
    ndim = features.ndim if isinstance(features, Tensor) else 0
    if ndim == 3:
        return features.mean(1) if pool == "mean" else features[:, 0]
    if ndim > 3 and pool == "mean":
        return features.flatten(2).mean(2)
    shape = "(N, T, D) or (N, D, H, W)" if pool == "mean" else "(N, T, D)"
    found = f"shape {tuple(features.shape)}" if ndim else type(features).__name__
    raise HeadNotFoundError(
        f"Expected the features to have shape {shape} with `pool={pool!r}`, but got {found}."
        f" {'Leave `pool` out.' if ndim == 2 else 'Name another module: `features=...`.'}"
    )


def rows_of_features(features: Tensor, head: nn.Module | None) -> Tensor:
    """Features as ``(rows, d)``: of maps ``(N, d, H, W)`` that a convolution reads, every position is a row."""
    if _by_channel(features, head):
        features = features.movedim(1, -1)
    return features.reshape(-1, features.shape[-1])


def _by_channel(x: Tensor, head: nn.Module | None) -> bool:
    weight = own_weight(head) if head is not None else None
    linear = isinstance(head, nn.Linear) or (isinstance(weight, Tensor) and weight.ndim == 2)
    return x.ndim == 4 and not linear


def moves_to_logits(tracker: RowTracker | None, run: Run, call: LossCall) -> list[Note] | None:
    """What was done to the output of a run to make the logits of a loss; None where it did not make them."""
    logits, output = (call.record.function or call).logits, run.output
    if run.moves is not None or logits is output:
        return run.moves or []
    if tracker is None or not isinstance(logits, Tensor) or not isinstance(output, Tensor):
        return None
    return tracker.moves(logits, output)


def of_loaders(tracker: RowTracker | None, runs: list[Run], having: Having, what: str) -> list[Run]:
    """The runs on samples that have ids, of a batch of several loaders.

    Raises:
        RowsError: there is none on the samples of one of the loaders.
    """
    if tracker is None or having is None:
        return runs
    of_runs = [next((x for x in map(tracker.loaders_of, run.around) if x is not None), None) for run in runs]
    seen: set[int] = set().union(*(loaders for loaders in of_runs if loaders is not None))
    missing = [name for loader, name in having.items() if loader not in seen]
    if missing and None not in of_runs:
        raise RowsError(
            f"Expected the module that gives the features (`{what}`) to run on the samples of every loader that has"
            f" ids, but it ran on none of {missing[0]}. Call it with them in the step, name a module that runs on all,"
            " `features='dotted.path'`, or leave the tag of that loader out."
        )
    return [run for run, loaders in zip(runs, of_runs, strict=True) if loaders is None or loaders & set(having)]


def deliver(call: LossCall, tracker: RowTracker | None, runs: list[tuple[Run, Any]]) -> None:
    """Give a call the features of the runs of a layer, one run after the other."""
    found = [features for _, features in runs]
    shapes = {tuple(x.shape[1:]) if isinstance(x, Tensor) else None for x in found}
    if len(runs) > 1 and (len(shapes) > 1 or None in shapes):
        raise HeadNotFoundError(
            "Expected the features of all runs of a layer in a step to be tensors of one width, but got"
            f" {' and '.join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in found[:8])}."
            " Name a module that gives as many features in each: `features='dotted.path'`."
        )
    call.features = found[0] if len(runs) == 1 else torch.cat(found)

    def rows(call: LossCall) -> Tensor | None:
        of_runs = [_rows_of_run(tracker, run, features, call) for run, features in runs]
        if len(runs) == 1:
            return of_runs[0]
        counts = [len(rows_of_features(features, call.head)) for features in found]
        in_order = [torch.arange(n, device=found[0].device) for n in counts]
        return torch.cat([own if rows is None else rows for rows, own in zip(of_runs, in_order, strict=True)])

    call.record.feature_rows = rows


def _rows_of_run(tracker: RowTracker | None, run: Run, features: Any, call: LossCall) -> Tensor | None:
    """Sample of each row of the features, int64 ``(rows,)``; the number of samples where the loss leaves the row out.

    They are those of the loss where the layer's output can be followed to the logits, else those of what the layer, or
    a network that it is in, was given.

    Returns:
        None where row i is sample i.

    Raises:
        RowsError: they are not known.
    """
    head, loss = call.head, call.record.function or call
    if tracker is None or not isinstance(features, Tensor):
        return None
    moves = moves_to_logits(tracker, run, call)
    count = len(rows_of_features(features, head))
    found: Tensor | bool | None = False
    if moves is not None:
        found = _rows_of_loss(loss, tracker.n, count, run.output, 1 if _by_channel(run.output, head) else -1, moves)
    if found is False:
        found = tracker.of_layer(features, run.around)
        times = count // max(len(features), 1)
        if times > 1 and not isinstance(found, bool):
            samples = torch.arange(tracker.n, device=features.device) if found is None else found
            found = samples.repeat_interleave(times)
    if isinstance(found, bool):
        raise RowsError(
            f"Expected features whose rows can be followed to the {tracker.n} samples, but got shape"
            f" {tuple(features.shape)} in a step that puts samples in another order, or makes several rows of each,"
            " where that cannot be seen. Name a module of a network that is given the batch itself, and keeps its rows:"
            " `features='dotted.path'`. If every sample has several rows, say how they are arranged: `rows='tiled'` or"
            " `rows='interleaved'`."
        )
    return found


def _rows_of_loss(
    loss: LossCall, n: int, count: int, output: Tensor, classes: int, moves: list[Note]
) -> Tensor | bool | None:
    """Samples of the ``count`` rows of a layer's output, the axis of classes aside, from those of the loss's rows.

    Returns:
        As :func:`_rows_of_run`, or False if the shapes do not fit.
    """
    if output.numel() != count * output.shape[classes]:
        return False
    rows = loss.logits_rows
    if count == len(output) == (n if rows is None else len(rows)) and all(move.same_rows for move in moves):
        return rows
    numbers = torch.arange(count, device=output.device).view(output.select(classes, 0).shape)
    numbers = numbers.unsqueeze(classes).expand(output.shape)
    for move in moves:
        numbers = move.done_to(numbers)
    if numbers.ndim == loss.record.computed[0].ndim + 1:  # the loss has no axis of classes
        numbers = numbers.select(1, 0)
    samples = torch.arange(n, device=output.device) if rows is None else rows
    if len(samples) == len(numbers):
        samples = samples.view(-1, *[1] * (numbers.ndim - 1)).expand(numbers.shape)
    if samples.numel() != numbers.numel():
        return False
    return samples.new_full((count,), n).scatter_(0, numbers.flatten(), samples.flatten())


def own_weight(module: nn.Module) -> Any:
    """The weight that a module holds itself, as it is: some parametrizations compute ``module.weight`` anew."""
    return module._parameters.get("weight", vars(module).get("weight"))
