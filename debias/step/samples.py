"""Which samples of a dataset a step sees, and what it makes of each of them; for :mod:`debias.ops.samples`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from debias.errors import BatchKeyError, DebiasError
from debias.step.agreement import flat_loaders, tags_of
from debias.step.context import Step
from debias.tap.calls import LossCall
from debias.tap.losses import SYMMETRIC
from debias.tap.predictions import SOFTMAX

__all__ = [
    "INDEX",
    "check_length",
    "numbered_dataset",
    "predictions",
    "refuse_regression",
    "sample_losses",
    "sample_numbers",
    "train_set",
]

_OF_NUMBERS = {loss.__name__ for loss in SYMMETRIC} | {"gaussian_nll_loss", "poisson_nll_loss", "ctc_loss"}

INDEX = "index"
"""The tag that holds the number of a sample in its dataset."""


def sample_numbers(step: Step, who: str) -> Tensor:
    """Numbers of the samples of a batch in their dataset, int64 ``(N,)``.

    Raises:
        BatchKeyError: the batch carries none.
    """
    if not isinstance(step.tags.get(INDEX), Tensor):
        raise BatchKeyError(
            f"Expected every sample to carry its number in the dataset for {who}, but the batch has none. Wrap the"
            " dataset, `train = tag(train)`, outside of everything else."
        )
    return step.ids(INDEX, 1, argument=INDEX)


def train_set(trainer: Any, who: str) -> Any:
    """The tagged training set whose samples are numbered.

    Raises:
        DebiasError: there are several loaders, a stream, or no numbers.
    """
    loaders = flat_loaders(trainer.train_dataloader)
    if len(loaders) != 1:
        raise DebiasError(
            f"Expected one training loader for {who}, whose samples have one numbering, but got {len(loaders)}. Join"
            " the sets, `tag(ConcatDataset([...]))`."
        )
    return numbered_dataset(getattr(loaders[0], "dataset", None), who)


def check_length(trainer: Any, size: int, who: str) -> None:
    """Refuse a training set of another length than it had before.

    Raises:
        DebiasError: its length is not ``size``.
    """
    if (found := len(train_set(trainer, who))) != size:
        raise DebiasError(
            f"Expected the training set to keep its length, {size} samples when {who} saw it first, but got {found}:"
            " numbers of samples would mean other ones. Use the same set, or a new instance."
        )


def numbered_dataset(dataset: Any, who: str, what: str = "training") -> Any:
    """The tagged dataset inside of one, whose numbers its samples carry; ``what`` says which set it is in messages.

    Raises:
        DebiasError: there is none, or more than one.
    """
    if isinstance(dataset, IterableDataset):
        raise DebiasError(
            f"Expected a map-style {what} set for {who}, which knows samples by their number, but got the stream"
            f" {type(dataset).__name__}. Use a dataset with `__len__` and `__getitem__`."
        )
    inner = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    if isinstance(inner, ConcatDataset):
        raise DebiasError(
            f"Expected one numbering of the {what} samples for {who}, but the {what} set joins"
            f" {len(inner.datasets)} sets. Tag the joined one, `tag(ConcatDataset([...]))`, outside of everything else."
        )
    if not isinstance((tags_of(inner) or {}).get(INDEX), Tensor):
        raise DebiasError(
            f"Expected every {what} sample to carry its number in the dataset for {who}, but got"
            f" {type(dataset).__name__} without. Wrap it, `tag(dataset)`, outside of everything else."
        )
    return inner


def sample_losses(call: LossCall, n: int) -> tuple[Tensor, Tensor]:
    """Mean loss of each sample of a batch, and whether anything of it counts.

    Args:
        call: the loss.
        n: number of samples.

    Returns:
        float64 ``(n,)`` without gradient (float32 on MPS), and boolean ``(n,)``.

    Raises:
        DebiasError: samples were mixed, so that no loss is of one sample.
    """
    if call.parts > 1:
        raise DebiasError(
            "Expected losses of single samples, but an augmentation mixes them. Remove it, or what records samples."
        )
    # An evaluation step divides losses that it reduces itself by those that count.
    counted = None if call.record.source is None else call.counted
    if counted is not None and counted.shape == call.record.elements[0].shape:
        parts = [torch.where(counted, x, 0) for x in call.record.elements]
        call = replace(call, record=replace(call.record, compute=lambda: (parts[0], parts[1]), divisor=None))
    # `call.num` keeps its graph for others: it is made here, and must not be made without gradients.
    dtype = torch.float32 if call.num.device.type == "mps" else torch.float64
    num, den = call.num.detach().to(dtype), call.den.detach().to(dtype)
    if call.rows is not None:
        num, den = (torch.zeros(n, dtype=dtype, device=x.device).index_add(0, call.rows, x) for x in (num, den))
    return num / torch.where(den == 0, 1, den), den != 0


_INSTEAD = (
    "Choose a loss of classes, `loss=<index>`, or remove the method; one that takes `target=` and `n_classes=` can be"
    " told both instead."
)


def refuse_regression(call: LossCall, who: str, instead: str = _INSTEAD) -> None:
    """Refuse to read classes of a loss of numbers.

    Raises:
        DebiasError: the loss compares numbers.
    """
    if call.name in _OF_NUMBERS:
        what = "sequences" if call.name == "ctc_loss" else "numbers"
        raise DebiasError(
            f"Expected a classification loss for {who}, which takes its numbers for those of classes, but the step"
            f" computes `{call.name}`, which compares {what}. {instead}"
        )


def predictions(call: LossCall, n: int, who: str) -> tuple[Tensor, Tensor]:
    """Logits and targets of the samples of a batch, in their order; of probabilities the logits that they have.

    Of several labels those are -1 that the loss has no weight for, or that an evaluation step leaves out of it.

    Raises:
        DebiasError: they are not one row a sample, or come from a submodule that was given the labels.
    """
    logits, target = call.logits if call.predicted is None else call.predicted, call.target
    if call.from_labels:
        raise DebiasError(
            f"Expected the logits of `{call.name}` to be predictions for {who}, but the submodule that returns them is"
            " given the target, as one that adds a margin: they tell the label. Add the margin in the step itself,"
            " where it can be told from the prediction."
        )
    if call.rows is not None:
        raise DebiasError(
            f"Expected one row of `{call.name}` for each of the {n} samples, in the order of the batch for {who}, but"
            f" got {len(call.rows)} that are not known to be these. Leave the order as it is; take a mask from the"
            " batch, or give it to the loss, `weight=mask`; or choose another loss, `loss=`."
        )
    if logits is None or target is None or len(logits) != n or len(target) != n:
        raise DebiasError(
            f"Expected logits and targets with one row for each of the {n} samples for {who}, but `{call.name}` has"
            f" logits {None if logits is None else tuple(logits.shape)}. Choose another loss, `loss=`."
        )
    if call.name in SOFTMAX and target.is_floating_point() and target.shape == logits.shape:
        target = target.argmax(1)  # shares of the classes, and no labels of which several may hold
    counted, weight = call.counted, call.arguments.get("weight")
    if isinstance(weight, Tensor) and weight.shape == target.shape:
        counted = weight != 0
    if counted is not None and counted.shape == target.shape == logits.shape:
        target = torch.where(counted, target, -1)  # labels that nobody gave
    if call.name == "binary_cross_entropy":
        logits = logits.logit()  # it reads probabilities
    return logits.detach(), target.detach()
