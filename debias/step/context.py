"""What a method is told about the step it takes part in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from debias.errors import BatchKeyError, DebiasError
from debias.step import batch as batches
from debias.step.batch import BatchKey
from debias.step.ids import plain_key, read_ids
from debias.step.loaders import Part, holders, join_ids
from debias.tap.mixing import Mixture

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
        parts: what each loader gave to the batch.
        asking: the method that reads the batch.
        asked: of several loaders, those whose samples have the ids that each method reads.
        keys: of several loaders, the names of the ids that were read.
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
    parts: list[Part] = field(default_factory=lambda: [Part()])
    asking: Any = None
    asked: dict[Any, list[Part]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    _numbered: list[Part] = field(default_factory=list)
    _ids: dict[Any, Tensor] = field(default_factory=dict)
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def of_several(self) -> bool:
        """Whether the batch is of several loaders."""
        return bool(self.parts[0].path)

    def read(self, key: BatchKey, *, argument: str = "key") -> Any:
        """What ``key`` names among the tags and in the batch; of several loaders integers, as :meth:`ids`."""
        if len(self._numbered) > 1 and isinstance(key, str) and any(key in part.tags for part in self.parts):
            return self.ids(key, 1, argument=argument)
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
        key = plain_key(key)
        # Of several keys the counts are part of the question: they decide how the ids are crossed.
        question = (key, tuple(count) if isinstance(count, Sequence) else count) if isinstance(key, tuple) else key
        having = self._numbered_with(key, argument) if self.of_several else self.parts
        if question not in self._ids:
            what, look = f"`{argument}={key!r}`", self.stage != "train"
            found = {}
            for part in having:
                tags = self._tags_of(part, key)
                found[part] = read_ids(self.batch, tags, key, count, self.module.device, argument=argument, look=look)
            ids = join_ids(self._numbered, found, what) if len(self._numbered) > 1 else found[having[0]]
            self.count(len(ids), what)
            self._ids[question] = ids
        return self._ids[question]

    def _tags_of(self, part: Part, key: Any) -> dict[str, Any]:
        """The tags of a loader's samples, as an augmenter has left them, and its number where that is asked for."""
        tags = self.tags
        if self.of_several:
            tags = {name: tags.get(name, x) for name, x in part.tags.items()}
        if part.n is None or batches.LOADER not in (key if isinstance(key, tuple) else (key,)):
            return tags
        if isinstance(self.batch, Mapping) and batches.LOADER in self.batch:
            return tags
        return {batches.LOADER: torch.full((part.n,), part.loader, device=self.module.device)} | tags

    def _numbered_with(self, key: Any, argument: str) -> list[Part]:
        """Of several loaders, those whose samples have these ids; to number them too changes the numbers of all."""
        having = holders(self.parts, key, self.batch, argument)
        self.keys |= {name for name in (key if isinstance(key, tuple) else (key,)) if isinstance(name, str)}
        if self.asking is not None:
            before = self.asked.get(self.asking, having)
            self.asked[self.asking] = [part for part in having if part in before]
        numbered = [part for part in self.parts if part in self._numbered or part in having]
        if numbered == self._numbered:
            return having
        if len(numbered) > 1 and self.mixture is not None:
            raise BatchKeyError(
                f"Expected the samples of one loader where {self.mixture.owner} mixes or repeats them, but methods read"
                f" those of {' and '.join(part.name for part in numbered)}. Remove one of them, or"
                " join the datasets: `ConcatDataset`."
            )
        self._numbered = numbered
        if len(numbered) > 1:
            self._ids.clear()
            self.n = None if any(part.n is None for part in numbered) else sum(part.n or 0 for part in numbered)
        return having

    def count(self, n: int, what: str = "the values of the samples") -> None:
        """Say how many samples the batch has, so that their rows are followed.

        Raises:
            BatchKeyError: another number is known already.
        """
        if self.n is not None and self.n != n:
            raise BatchKeyError(
                f"Expected {what} to be one for each of the {self.n} samples, but got {n}. Check that all come from"
                " the same loader."
            )
        self.n = n

    @property
    def numbered(self) -> list[Part]:
        """The parts of the batch whose samples are numbered, one after the other."""
        return self._numbered or [Part(n=self.n)]

    @property
    def strangers(self) -> list[Part]:
        """The parts of the batch that come from other loaders than the ids."""
        return [part for part in self.parts if part not in self._numbered] if self._numbered else []

    @property
    def followed(self) -> list[Part]:
        """The parts of the batch whose rows are followed, as these number them."""
        return [*self.numbered, *self.strangers]

    def having(self, method: Any) -> dict[int, str] | None:
        """Of several loaders, number and name of those whose samples have the ids that a method reads; None of one."""
        if method not in self.asked:
            return None
        return {i: part.name for i, part in enumerate(self.followed) if part in self.asked[method]}

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
