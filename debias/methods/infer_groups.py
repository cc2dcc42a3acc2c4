"""Infer groups that nobody labelled, then train with them: two stages in one fit, for any method that takes groups.

::

    callbacks=[InferGroups("eiil", epochs=2), GroupDRO(group="inferred", n_groups=2)]

The first ``epochs`` epochs train plainly: they are the network that groups are inferred from. Then every training
sample gets a group; module, optimisers, schedulers and the callbacks of debias go back to the start; and the rest of
the run trains with the groups as the tag ``inferred``. Until then methods that read this tag do nothing, and
monitors that read it see -1. How groups are inferred is described at the top of :mod:`debias.ops.group_inference`.

What else is in ``callbacks`` sees one run: epochs and steps count on, ``ModelCheckpoint`` forgets the networks of stage
one (their files go when one of stage two is there; under ``save_top_k=-1`` all are kept), ``EarlyStopping`` cannot stop
in stage one; a callback of your own that keeps networks needs a method ``forget_stage()``. Weight averaging is refused.
Learning-rate schedules begin again: make them as long as stage two.

Costs: stage one, with ``observe="pass"`` a pass over the training set, and a clustering. In a checkpoint of stage one
lies the start, as large again as the module. Two runs do the same: infer with a finished network by the functions of
``debias.functional``, keep the ids in a file, and ``tag(train, inferred=ids)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, Literal

import torch
from torch import Tensor

from debias.errors import BatchKeyError, DebiasError
from debias.extras import needs_extra
from debias.methods.base.two_stage import TwoStage, nothing
from debias.ops.arguments import check_options
from debias.ops.fields import arguments
from debias.ops.group_inference import (
    cluster_weights,
    eiil_groups,
    eiil_scores,
    error_groups,
    george_groups,
    spare_groups,
    useful_groups,
)
from debias.ops.samples import SampleTable
from debias.step.context import Step
from debias.step.proxy import attach, detach
from debias.step.samples import INDEX, numbered_dataset, train_set
from debias.step.watcher import Debiaser
from debias.tap.calls import LossCall

__all__ = [
    "InferGroups", "cluster_weights", "eiil_groups", "eiil_scores", "error_groups", "george_groups", "spare_groups",
    "useful_groups",
]  # fmt: skip

METHODS: dict[str, Callable[..., Any]] = {
    "errors": error_groups,
    "eiil": eiil_groups,
    "spare": spare_groups,
    "george": george_groups,
    "useful": useful_groups,
}
BY_SAMPLE = ("errors", "eiil")  # these say the group of any sample, of the validation set too
CLUSTERING = ("spare", "george", "useful")
# What waits with a method that reads the tag.
_HOOKS = ("on_train_start", "on_train_epoch_end", "on_before_optimizer_step")
_KEYS = {"group": "n_groups", "domain": "n_domains", "identity": "n_identities", "attribute": "n_values"}


@arguments(kw_only=False, epochs="[1, inf)")
class InferGroups(TwoStage):
    """Infer groups from a plainly trained network, and train with them from the start; needs no group labels.

    A plain network leans on the shortcut, so that its errors and features show which samples contradict it; methods for
    known groups then do the rest.

    It stands before the methods that read its groups.

    Args:
        method: ``"errors"``, ``"eiil"``, ``"spare"``, ``"george"``, ``"useful"``, or a callable ``(record, labels) ->
            ids``: ``record`` holds ``logits``, ``loss`` and where it has ``needs_features = True`` also ``features``,
            a row each training sample; the ids are int64 ``(N,)``, -1 for none.
        epochs: epochs of stage one.
        per_class: number groups inside each class, ``2 * class + group``; of ``"errors"``, ``"eiil"`` and ``"useful"``.
        options: further arguments of the inference, such as ``{"n_clusters": 2}``.
        observe: ``"pass"``: the training set is run through in evaluation mode when stage one has ended;
            ``"training"``: what its last epoch has made of the samples.
        validation: infer groups of the validation set too, for monitors; of ``"errors"`` and ``"eiil"``.
        tag: name of the tag.

    Attributes:
        ids: group of each training sample, int64 ``(N,)``, -1 where it was not seen; None in stage one.
    """

    reference = "Creager et al., ICML 2021 (EIIL); Liu et al., ICML 2021; Sohoni et al., NeurIPS 2020"
    works = (
        "A shortcut is easy to learn and labels are clean, so that the first network goes wrong where the "
        "shortcut misleads."
    )
    fails = (
        "The first network makes no errors or does not lean on the shortcut. Where labels are noisy, its errors "
        "are noise."
    )

    method: str | Callable[[dict[str, Tensor], Tensor], Any] = "eiil"
    epochs: int = 1
    _: KW_ONLY
    per_class: bool = False
    options: dict[str, Any] | None = None
    observe: Literal["training", "pass"] = "pass"  # type: ignore[assignment]
    validation: bool = False
    tag: str = "inferred"
    head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        method, options = self.method, self.options
        if not callable(method) and method not in METHODS:
            raise DebiasError(
                f"Expected `method` to be one of {', '.join(map(repr, METHODS))} or a callable, but got {method!r}."
            )
        if self.per_class and method not in ("errors", "eiil", "useful"):
            raise DebiasError(f"Expected `per_class` for 'errors', 'eiil' or 'useful' only, but got it for {method!r}.")
        if self.validation and method not in BY_SAMPLE:
            raise DebiasError(
                f"Expected `validation=True` for 'errors' or 'eiil' only, which say the group of any sample, but got it"
                f" for {method!r}: clusters of the training set have no say in the validation set."
            )
        if callable(method) and options:
            raise DebiasError(
                f"Expected no `options` where `method` is a callable, but got {options}. Bind them to it:"
                " `functools.partial(method, ...)`."
            )
        given = ({"per_class": True} if self.per_class else {}) | (options or {})
        # A wrong option is an error now, not after stage one.
        self.inference_options = {} if callable(method) else check_options("options", given, METHODS[method])
        self.monitors = self.validation  # type: ignore[misc]
        self.classifies = not callable(method)
        self.records_features = method == "george" or bool(getattr(method, "needs_features", False))  # type: ignore[misc]
        self.validation_ids: Tensor | None = None
        self._waiting: list[Any] = []
        self._proxies: list[Any] = []
        self._tagged: Any = None

    @property
    def penalises(self) -> bool:
        """In the training pass it looks at the loss, and adds nothing."""
        return self.observe_by == "training" and self.stage == 1

    @property
    def needs_features(self) -> bool:  # type: ignore[override]
        """Whether it reads features in the training pass."""
        return self.records_features and self.penalises

    # -- who reads the tag -------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine; methods that read the tag stand behind."""
        place = trainer.callbacks.index(self)
        for callback in trainer.callbacks[:place]:
            if _reads(callback, self.tag):
                raise DebiasError(
                    f"Expected {self.state_key} before {callback.state_key}, which reads its groups, in `callbacks`,"
                    " but got it behind. Put it first."
                )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let methods that read the tag wait for it."""
        super().on_fit_start(trainer, pl_module)
        if self.stage == 1:
            self._waiting = [c for c in trainer.callbacks if isinstance(c, Debiaser) and _reads(c, self.tag)]
            for callback in self._waiting:
                self.engine.check_optimizers(callback)  # type: ignore[union-attr]
                callback.engine = None  # as while a tuner has taken it out of the list
                self._proxies += [attach(callback, name, nothing) for name in _HOOKS]

    def begin_stage_two(self, trainer: Any, pl_module: Any) -> None:
        """Give the training set its tag, and wake those that have waited."""
        dataset: Any = train_set(trainer, self.state_key)
        ids: Any = self.ids
        if self.tag not in dataset.tags:
            dataset.tags[self.tag] = ids.cpu()  # for what counts groups; taken back at the end
            self._tagged = dataset
        for proxy in self._proxies:
            detach(proxy)
        waiting, self._waiting, self._proxies = self._waiting, [], []
        for callback in waiting:
            callback.engine = self.engine
            callback.on_train_start(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave module, callbacks and dataset as they were."""
        for proxy in self._proxies:
            detach(proxy)
        if self._tagged is not None:
            self._tagged.tags.pop(self.tag, None)
        self._waiting, self._proxies, self._tagged = [], [], None
        super().teardown(trainer, pl_module, stage)

    # -- stage one ---------------------------------------------------------------------------------

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """Note the samples of a training step; nothing is added."""
        if self.due(step):
            self.note(call, self.sample_ids(step), step.counter + 1, call.features)
        return call.num.new_zeros(())

    def decide(self, record: dict[str, Tensor], trainer: Any) -> Tensor:
        """Groups of the samples that were seen."""
        if self.validation:
            self.validation_ids = self._infer_validation(trainer)
        ids = self._infer(record)
        self._refuse_empty(ids, trainer)
        return ids

    def _infer(self, record: dict[str, Tensor]) -> Tensor:
        logits, targets, options = record["logits"], record["targets"], self.inference_options
        if callable(self.method):
            labels = record["targets"]
            ids = torch.as_tensor(self.method({k: v for k, v in record.items() if k != "targets"}, labels))
            if ids.shape != (len(labels),) or ids.is_floating_point() or ids.dtype == torch.bool:
                raise DebiasError(
                    f"Expected the callable of {self.state_key} to return integer ids of shape ({len(labels)},), but"
                    f" got {ids.dtype} of shape {tuple(ids.shape)}."
                )
            return ids
        if self.method in BY_SAMPLE:
            return METHODS[self.method](logits, targets, **options)
        if targets.ndim != 1 or logits.ndim != 2 or targets.is_floating_point():
            raise DebiasError(
                f"Expected class ids as targets for '{self.method}', which clusters class by class, but got logits"
                f" {tuple(logits.shape)} and targets {tuple(targets.shape)}. Choose 'errors' or 'eiil'."
            )
        if self.method == "spare":
            return spare_groups(logits.double().softmax(1), targets, **options)[0]
        if self.method == "george":
            return george_groups(record["features"], targets, **options)[0]
        return useful_groups(logits, targets, record["loss"], **options)

    def _validation_loader(self, trainer: Any) -> Any:
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        if loader is None:
            raise DebiasError(
                f"Expected a validation set for `validation=True` of {self.state_key}, but got none. Give `trainer.fit`"
                " one, or leave it out."
            )
        return loader

    def _infer_validation(self, trainer: Any) -> Tensor:
        loader = self._validation_loader(trainer)
        dataset = numbered_dataset(loader.dataset, self.state_key, "validation")
        table, training = SampleTable(len(dataset)), self.module
        self.module = table.to(training.stamps.device)
        try:
            for call, numbers, features in self.run(trainer, trainer.lightning_module, loader, "validation_step"):
                self.note(call, numbers, 1, features)
        finally:
            self.module = training
        table.merge()
        seen = table.seen.cpu()
        ids = torch.full((len(dataset),), -1, dtype=torch.int64)
        ids[seen] = self._infer({name: table[name].cpu()[seen] for name in table.columns})
        return ids.to(training.stamps.device)

    def _refuse_empty(self, ids: Tensor, trainer: Any) -> None:
        """Groups that a method asks for, and inference has left empty."""
        found = torch.bincount(ids[ids >= 0]) if bool((ids >= 0).any()) else torch.zeros(1)
        for callback in trainer.callbacks:
            size = _reads(callback, self.tag) if isinstance(callback, Debiaser) else 0
            if not size:
                continue
            counts = torch.nn.functional.pad(found, (0, max(0, size - len(found))))
            if len(counts) > size:
                raise DebiasError(
                    f"Expected {size} groups, as {callback.state_key} does, but {self.state_key} has found"
                    f" {len(found)}. Pass that number to {type(callback).__name__}, or ask for fewer by `options=`."
                )
            if empty := (counts == 0).nonzero().flatten().tolist():
                raise DebiasError(
                    f"Expected samples in each of the {size} groups that {callback.state_key} asks for, but"
                    f" {self.state_key} has left group {', '.join(map(str, empty))} empty ({counts.tolist()} samples)."
                    " Where these are errors, the network of stage one makes none: shorten it, `epochs=`. Else correct"
                    " the number of groups."
                )

    # -- handing out -------------------------------------------------------------------------------

    def start(self, step: Step) -> None:
        """Put the groups of the samples beside the batch."""
        super().start(step)
        if self.stage == 2:
            self._put(step, self.ids)

    def begin(self, step: Step) -> None:
        """Of an evaluation step too, if groups of the validation set are inferred."""
        if step.stage == "train":
            super().begin(step)
        elif step.stage == "validate" and step.dataloader_idx == 0:
            ids = self.validation_ids if self.stage == 2 else None
            self._put(step, torch.full((1,), -1, device=step.module.device) if ids is None else ids)

    def _put(self, step: Step, ids: Any) -> None:
        if not isinstance(step.tags.get(INDEX), Tensor):
            raise BatchKeyError(
                f"Expected every sample to carry its number in the dataset for {self.state_key}, but the batch has"
                " none. Wrap the dataset, `tag(dataset)`, outside of everything else."
            )
        numbers = self.sample_ids(step)
        step.tags[self.tag] = torch.where(numbers < len(ids), ids[numbers.clamp(0, len(ids) - 1)], -1)

    def state_dict(self) -> dict[str, Any]:
        """As of both stages, and the groups of the validation set."""
        return {**super().state_dict(), "validation_ids": self.validation_ids}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore."""
        super().load_state_dict(state_dict)
        self.validation_ids = state_dict["validation_ids"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make ready, in the stage that the run is in."""
        if self.tag in train_set(trainer, self.state_key).tags:
            raise DebiasError(
                f"Expected the training set to have no tag `{self.tag}` of its own, which {self.state_key} gives it."
                " Pass another name, `tag=`, or leave the inference out."
            )
        if self.stage == 1:  # what would fail after it
            if self.method in CLUSTERING:
                with needs_extra("sklearn"):
                    import sklearn  # noqa: F401
            if self.validation:
                numbered_dataset(self._validation_loader(trainer).dataset, self.state_key, "validation")
        super().on_train_start(trainer, pl_module)
        if self.validation_ids is not None:
            self.validation_ids = self.validation_ids.to(pl_module.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_waiting": [], "_proxies": [], "_tagged": None}


del InferGroups.observe  # the default: a callback has a function of that name


def _reads(callback: Any, tag: str) -> int:
    """The number of groups of the tag that a callback reads; 0 if it reads none."""
    for key, number in _KEYS.items():
        keys, sizes = getattr(callback, key, None), getattr(callback, number, None)
        if keys is None:
            continue
        keys = list(keys) if isinstance(keys, tuple | list) else [keys]
        sizes = list(sizes) if isinstance(sizes, tuple | list) else [sizes]
        for k, size in zip(keys, sizes, strict=False):
            if isinstance(k, str) and k == tag:
                return int(size or 1)
    return 0
