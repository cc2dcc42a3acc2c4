"""What a method is told about the step it takes part in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from debias.errors import BatchKeyError, DebiasError
from debias.step import batch as batches
from debias.step.batch import BatchKey
from debias.step.mixing import Mixture

__all__ = ["Step"]

T = TypeVar("T")


@dataclass(eq=False)
class Step:
    """One micro-batch on one rank.

    Attributes:
        trainer: the running Trainer.
        module: the user's LightningModule.
        stage: ``"train"``, ``"validate"`` or ``"test"``.
        batch: what the user's step receives; augmenters put a new batch here and never mutate the old one.
        tags: tags carried beside the batch, on the module's device.
        batch_idx: index of the batch in its epoch.
        dataloader_idx: which of several loaders it comes from.
        epoch: current epoch.
        global_step: optimiser steps taken so far.
        counter: micro-batches seen in this fit, resumed with the loop.
        n: number of samples, known once ids were read.
        logging: whether values logged in this step reach the logger.
        features: in evaluation, what a monitor that asks for features reads.
        mixture: what augmentation did to the labels, None if nothing.
    """

    trainer: Any
    module: Any
    stage: str
    batch: Any
    tags: dict[str, Any]
    batch_idx: int = 0
    dataloader_idx: int = 0
    epoch: int = 0
    global_step: int = 0
    counter: int = 0
    n: int | None = None
    logging: bool = False
    features: Tensor | None = None
    mixture: Mixture | None = None
    _ids: dict[Any, Tensor] = field(default_factory=dict)
    _made: dict[Any, Any] = field(default_factory=dict)

    def read(self, key: BatchKey, *, argument: str = "key") -> Any:
        """What ``key`` names among the tags and in the batch."""
        return batches.read(self.batch, key, self.tags, argument=argument)

    def ids(self, key: Any, count: int | Sequence[int], *, argument: str = "group") -> Tensor:
        """Group, domain or identity numbers of the samples.

        Args:
            key: a BatchKey, or a tuple of them whose ids are crossed: ``("target", "place")`` gives
                ``target * n_places + place``.
            count: number of groups, one per key.
            argument: the user's argument, for error messages.

        Returns:
            int64 ``(N,)``; negative where unlabelled, and the number of groups or more where an id is out of range. A
            boolean membership ``(N, G)`` is returned as it is.

        Raises:
            BatchKeyError: nothing is there, it is no integer ids ``(N,)`` and no boolean membership ``(N, G)``, or a
                membership is to be crossed.
        """
        # Of several keys the counts are part of the question: they decide how the ids are crossed.
        cached = key
        if isinstance(key, tuple | list):
            cached = tuple(key), tuple(count) if isinstance(count, Sequence) else (count,)
        if cached in self._ids:
            return self._ids[cached]
        if isinstance(key, tuple | list):
            counts = list(count) if isinstance(count, Sequence) else [count]
            parts = [self._one(k, argument) for k in key]
            shapes = [tuple(part.shape) for part in parts]
            if len(shapes[0]) != 1 or len(set(shapes)) > 1:
                raise BatchKeyError(
                    f"Expected the keys of the crossed `{argument}={key!r}` to hold ids of the same shape (N,), but got"
                    f" shapes {', '.join(map(str, shapes))}. A membership cannot be crossed with other ids: cross it"
                    " yourself, and give one membership (N, G) of all crossed groups."
                )
            ids = torch.zeros_like(parts[0])
            unlabelled = bad = torch.zeros_like(ids, dtype=torch.bool)
            total = 1
            for part, size in zip(parts, counts, strict=True):
                ids, total = ids * size + part, total * size
                unlabelled, bad = unlabelled | (part < 0), bad | (part >= size)
            ids = torch.where(bad, total, torch.where(unlabelled, -1, ids))
        else:
            ids = self._one(key, argument)
        n = ids.shape[0]
        if self.n is not None and self.n != n:
            raise BatchKeyError(
                f"Expected `{argument}={key!r}` to hold one id for each of the {self.n} samples, but got {n}."
                " Check that all ids come from the same loader."
            )
        self.n = n
        self._ids[cached] = ids
        return ids

    def mixed(self, n: int, *, loss: Any = None, owner: str = "") -> Mixture:
        """What the samples stand for, to be changed by an augmenter that mixes or repeats them.

        Args:
            n: number of samples.
            loss: which loss the augmenter means, as ``loss=``.
            owner: name of the augmenter, for messages.
        """
        if self.n is not None and self.n != n:
            raise BatchKeyError(
                f"Expected the input that {owner} changes to have one row for each of the {self.n} samples, but got"
                f" {n}. Correct `input=`."
            )
        self.n = n
        if self.mixture is None:
            self.mixture = Mixture(n, self.module.device, loss, owner)
        elif loss is not None:
            if self.mixture.loss not in (None, loss):
                raise DebiasError(
                    f"Expected {self.mixture.owner} and {owner} to mean the same loss, but got"
                    f" `loss={self.mixture.loss!r}` and `loss={loss!r}`: a mixed batch has one loss. Pass"
                    " the same to both, or remove one of them."
                )
            self.mixture.loss, self.mixture.owner = loss, owner
        return self.mixture

    def repeat(self, batch: Any, index: Tensor, weights: Tensor, **options: Any) -> None:
        """Put a batch in place that holds samples ``index`` of the present one, with ``weights`` on their losses."""
        self.mixed(self.n or len(index), **options).repeat(index, weights)
        self.batch = batch
        self.tags = {
            name: value[index] if isinstance(value, Tensor) and value.ndim else value
            for name, value in self.tags.items()
        }
        self.n = len(index)
        self._ids.clear()

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What several methods need alike, made for the first that asks.

        Args:
            key: what it is made of; tensors and losses are told apart by identity.
            make: makes it; every rank asks in the same order, so it may reduce over ranks.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _is_membership(self, ids: Tensor) -> bool:
        """Whether integers are 0 and 1. In training nothing is read from the device, so there it has to be said."""
        return self.stage != "train" and ids.shape[1] > 1 and bool(((ids == 0) | (ids == 1)).all())

    def _one(self, key: BatchKey, argument: str) -> Tensor:
        value = self.read(key, argument=argument)
        try:
            device = self.module.device
            here = isinstance(value, Tensor) and value.device == device
            ids = value if here else torch.as_tensor(value).to(device, non_blocking=device.type != "cpu")
        except (TypeError, ValueError, RuntimeError):
            ids = None
        if ids is None or ids.is_floating_point() or ids.is_complex():
            raise BatchKeyError(
                f"Expected `{argument}={key!r}` to hold integer ids of shape (N,), but got {batches.describe(value)}"
                f"{'' if ids is None else f' of {ids.dtype}'}. Number the groups 0, 1, 2, ..., -1 for unlabelled."
            )
        if ids.ndim == 2 and (ids.dtype == torch.bool or self._is_membership(ids)):
            return ids.bool()
        if ids.ndim != 1:
            hint = " Turn a membership of 0 and 1 into booleans: `membership.bool()`." if ids.ndim == 2 else ""
            raise BatchKeyError(
                f"Expected `{argument}={key!r}` to hold ids of shape (N,), or a boolean membership (N, G), but got"
                f" shape {tuple(ids.shape)} of {ids.dtype}. Give one id per sample.{hint}"
            )
        return ids.long()
