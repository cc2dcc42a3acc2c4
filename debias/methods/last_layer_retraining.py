"""Repair a trained network by refitting its last layer on a few held-out samples.

The network is not trained any more: its features of the held-out set are computed once, in evaluation mode, and the
linear head that reads them is fitted anew and written into the module, which stays an ordinary one.

============  =======================================  ===============================================================
``method``    needs                                    what it does
============  =======================================  ===============================================================
``dfr``       a group label of each held-out sample    L1 logistic regressions on group-balanced subsets, averaged over
                                                       20 refits; strength chosen on one half. Kirichenko et al., 2023
``afr``       none                                     weights ``exp(-gamma p_y)`` from the network's own confidence,
                                                       gradient descent from the old head, ridge to it. Qiu et al., 2023
``self``      an earlier checkpoint                    only the samples on which it disagrees most, classes balanced,
                                                       gradient descent from the old head. LaBonte et al., 2023
``balanced``  none, or a group label                   logistic regression in which classes (or groups) count the same
``plain``     none                                     logistic regression
============  =======================================  ===============================================================

Differences from the authors' code. DFR: the features are standardised by the whole held-out set in tuning and in the
refits alike (there by a half, then by the training set), halves hold half of each group, and class weights are not
tuned; several classes are one multinomial fit. AFR: its held-out set is what is given, where the paper splits off 20 %
of the training set, and there is no early stopping by groups. SELF: full-batch steps with class weights, where the
authors draw balanced batches. Published for AFR on Waterbirds: ``lr=0.01, steps=500``, gamma 4 to 20, ridge 0 to 0.3.

Costs: one pass over the held-out set, N d doubles of memory on every rank, and seconds of fitting. The callback reads
the labels of the held-out set before training, too, so that a set that will not do is an error then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from debias.errors import DebiasError
from debias.methods.base.held_out import Evaluating, Keys, find_head, held_out, labels, moved, refuse_empty, run_head
from debias.ops.arguments import checked, shown
from debias.ops.distributed import gather, is_distributed
from debias.ops.fields import arguments, field_values
from debias.ops.groups import check_n_groups
from debias.ops.last_layer import (
    LinearHead,
    afr_weights,
    balanced_subset,
    check_fit,
    class_balance,
    descend,
    disagreement_scores,
    element_losses,
    fit_dfr,
    fit_logistic,
)
from debias.step.batch import BatchKey, input_of
from debias.step.ids import check_keys
from debias.step.random import undisturbed
from debias.step.reference import second_network
from debias.step.watcher import StepWatcher

__all__ = ["LastLayerFit", "LastLayerRetraining", "afr_weights", "balanced_subset", "disagreement_scores"]

RetrainMethod: TypeAlias = Literal["dfr", "afr", "self", "balanced", "plain"]
"""How the last layer is refitted."""

DFR_STRENGTHS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)  # the authors' for Waterbirds


@dataclass
class LastLayerFit:
    """What a refit has done.

    Attributes:
        head: dotted path of the layer that was refitted.
        method: how.
        n_samples: number of held-out samples.
        weight: the new weight, float64 ``(C, d)``.
        bias: the new bias ``(C,)``, None where there is none.
        strength: of DFR, the chosen one.
        scores: of DFR, the worst group's accuracy on the other half, for each strength.
        selected: of SELF, the chosen samples in the order of the set.
    """

    head: str
    method: str
    n_samples: int
    weight: Tensor
    bias: Tensor | None
    strength: float | None = None
    scores: dict[float, float] = field(default_factory=dict)
    selected: Tensor | None = None


@checked(
    first=True, strengths="(0, inf)", refits="[1, inf)", gamma="[0, inf)", ridge="[0, inf)", lr="(0, inf)",
    steps="[1, inf)",
)  # fmt: skip
def retrain_last_layer(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    method: RetrainMethod = "dfr",
    group: tuple[BatchKey, ...] | BatchKey | None = None,
    n_groups: int | tuple[int, ...] | None = None,
    head: str | None = None,
    input: BatchKey = 0,
    target: BatchKey = 1,
    strengths: list[float] | None = None,
    refits: int = 20,
    gamma: float = 4.0,
    ridge: float = 0.0,
    lr: float = 0.01,
    steps: int = 500,
    early: Any = None,
    n_selected: int = 100,
    seed: int = 0,
    transfer: Callable[[Any], Any] | None = None,
) -> LastLayerFit:
    """Fit the last layer of a trained network anew on held-out samples, in place.

    Args:
        module: its ``forward`` returns logits, ``(N, C)`` or of one binary output ``(N,)`` or ``(N, 1)``.
        loader: yields batches of the held-out set, also tagged ones; with the transform of the test. Where ranks share
            it, samples that padding repeats count once if the set is tagged (``tag(dataset)`` numbers its samples).
        method: ``"dfr"``, ``"afr"``, ``"self"``, ``"balanced"`` or ``"plain"``.
        group: where the group ids are, for ``"dfr"`` and ``"balanced"``: a key, or a tuple of keys that are crossed;
            negative ids are left out.
        n_groups: number of groups, one per key.
        head: dotted path of the linear layer; found automatically where its output is what the module returns.
        input: where the network's input is in the batch; or a callable of the batch that returns it: a tuple of several
            arguments, or a dictionary of them by name, ``lambda batch: {"ids": batch["ids"], "mask": batch["mask"]}``.
        target: where the targets are: class ids ``(N,)``, labels ``(N, K)`` in {0, 1}, negative = missing.
        strengths: inverse weights of the penalty, scikit-learn's ``C``: of ``"dfr"`` those to choose from, of
            ``"balanced"`` and ``"plain"`` one, 1 by default.
        refits: of ``"dfr"``: balanced subsets that the head is averaged over.
        gamma: of ``"afr"``: how much less confident samples count.
        ridge: of ``"afr"``: weight of the distance to the old head.
        lr: of ``"afr"`` and ``"self"``: learning rate.
        steps: of ``"afr"`` and ``"self"``: steps of full-batch gradient descent.
        early: of ``"self"``: the earlier network: a module, a state dict, or the path of a checkpoint.
        n_selected: of ``"self"``: number of samples that are kept.
        seed: of halves and subsets.
        transfer: moves a batch to the module's device; by default as the module's own hooks do it.

    Returns:
        What was fitted.

    Raises:
        HeadNotFoundError: the head is not found, or is not linear.
        DebiasError: a group or a class has no sample, or an argument does not fit the method.

    Example:
        >>> import torch
        >>> from debias import retrain_last_layer
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> retrain_last_layer(net, [(x, (x[:, 0] > 0).long())], method="balanced").head
        '2'
    """
    chosen = _check_arguments(method, group, n_groups, strengths, early)
    keys = Keys(input, target, group, n_groups)
    other = second_network(module, early, "early") if method == "self" else None
    found, data = held_out(module, loader, head, keys, transfer, other)
    path = next(name for name, m in module.named_modules() if m is found)
    old = LinearHead(found.weight.detach().double().cpu(), _double(found.bias))
    options: dict[str, Any] = {"n_classes": found.out_features, "bias": found.bias is not None}
    fit = LastLayerFit(path, method, len(data.targets), old.weight, old.bias)
    if data.groups is not None:
        refuse_empty(data.groups, n_groups, twice=method == "dfr" and len(chosen) > 1)
    x, y = data.features, data.targets
    if method == "dfr":
        groups: Any = data.groups
        new, fit.strength, fit.scores = fit_dfr(x, y, groups, strengths=chosen, refits=refits, seed=seed, **options)
    elif method == "afr":
        weights = afr_weights((-element_losses(old(x), y)).exp().view(y.shape), y, gamma=gamma)
        new = descend(old, x, y, weights.view(len(y), -1), lr=lr, steps=steps, ridge=ridge)
    elif method == "self":
        scores = disagreement_scores(_class_logits(data.other_logits, y), _class_logits(data.logits, y))
        fit.selected = scores.argsort(descending=True, stable=True)[:n_selected].sort().values
        few = y[fit.selected]
        weights = class_balance(few)
        weights = weights / weights.sum()
        new = descend(old, x[fit.selected], few, weights, lr=lr, steps=steps, clip=None)
    else:
        weights = None
        if method == "balanced":
            weights = class_balance(y) if data.groups is None else _group_balance(data.groups)
            weights = weights.squeeze(1) if weights.shape[1] == 1 else weights
            weights = weights * (len(y) / weights.sum(0))
        new = fit_logistic(x, y, strength=chosen[0], weights=weights, **options)
    fit.weight, fit.bias = new
    _write(found, new)
    return fit


@arguments(of=retrain_last_layer)
class RetrainingOptions:
    """How the last layer is refitted."""

    method: RetrainMethod = "dfr"
    group: tuple[BatchKey, ...] | BatchKey | None = None
    n_groups: int | tuple[int, ...] | None = None
    head: str | None = None
    input: BatchKey = 0
    target: BatchKey = 1
    strengths: list[float] | None = None
    refits: int = 20
    gamma: float = 4.0
    ridge: float = 0.0
    lr: float = 0.01
    steps: int = 500
    early: Any = None
    n_selected: int = 100
    seed: int = 0


@arguments
class LastLayerRetraining(RetrainingOptions, StepWatcher):
    """Refit the last layer on held-out samples at the end of the fit.

    A network that leans on a shortcut has often learnt what else tells the class; a last layer that is fitted where the
    shortcut fails reads that instead.

    It changes the module when training has ended: checkpoints that were saved before hold the old head. Save the new
    one by ``trainer.save_checkpoint(path)``, or refit a checkpoint by ``debias retrain --ckpt_path``.

    Args:
        on: ``"val"``, the validation set, or ``"train"``, the training set; of several loaders the first.

    Attributes:
        fit: what was fitted, None before the end.
    """

    shardable = False
    needs = ("features", "head")
    reference = "Kirichenko et al. (DFR), Qiu et al. (AFR), LaBonte et al. (SELF), 2023"
    works = "The features of a trained network hold what matters, and only its last layer leans on the shortcut."
    fails = "The features do not hold it, or few held-out samples of a group are there."

    on: Literal["val", "train"] = field(default="val", kw_only=False)
    early: str | None = None
    name: str | None = None
    allow_untested_strategy: bool = False

    def __post_init__(self) -> None:
        self.options = field_values(self, RetrainingOptions)
        StepWatcher.__init__(self, name=self.name, allow_untested_strategy=self.allow_untested_strategy)
        _check_arguments(self.method, self.group, self.n_groups, self.strengths, self.early)
        self.fit: LastLayerFit | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse now what would fail at the end: no set, no linear head, a group or a class without samples."""
        self.fit = None
        loader, options = self._loader(trainer), self.options
        keys = Keys(options["input"], options["target"], options["group"], options["n_groups"])
        found: list[tuple[Tensor, Tensor]] = []
        with undisturbed():
            for raw in loader:
                batch, tags = moved(raw, pl_module, self.engine.transferred)  # type: ignore[union-attr]
                if first := not found:
                    given = input_of(pl_module, batch, keys.input)
                    with Evaluating(pl_module):
                        head = find_head(pl_module, options["head"], *given)
                        logits = run_head(pl_module, head, *given)[1]
                found.append(labels(batch, tags, keys, logits, alike=first))
        if found:
            targets, groups = (gather(torch.cat(parts)).cpu() for parts in zip(*found, strict=True))
            self._check_labels(targets, groups if keys.group is not None else None, head.out_features)

    def _check_labels(self, targets: Tensor, groups: Tensor | None, n_classes: int) -> None:
        options = self.options
        if groups is not None:
            tuned = options["strengths"] is None or len(options["strengths"]) > 1
            refuse_empty(groups, options["n_groups"], twice=options["method"] == "dfr" and tuned)
        if options["method"] in ("dfr", "balanced", "plain"):
            check_fit(targets, n_classes)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Refit, on all ranks."""
        transfer = self.engine.transferred  # type: ignore[union-attr]
        self.fit = retrain_last_layer(pl_module, self._loader(trainer), transfer=transfer, **self.options)
        for callback in trainer.callbacks:  # what keeps checkpoints of `debias compare`
            if callable(changed := getattr(callback, "module_changed", None)):
                changed()

    def _loader(self, trainer: Any) -> Any:
        loaders = trainer.val_dataloaders if self.on == "val" else trainer.train_dataloader
        while isinstance(loaders, list | tuple | dict) and loaders:
            loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
        if loaders is None or isinstance(loaders, list | tuple | dict):  # not its truth value, the length of a stream
            raise DebiasError(
                f"Expected a {'validation' if self.on == 'val' else 'training'} set to refit the last layer on"
                f" (`on={self.on!r}`), but got none. Give `trainer.fit` one, or refit afterwards by"
                " `retrain_last_layer(module, loader)`."
            )
        return loaders


def _check_arguments(method: str, group: Any, n_groups: Any, strengths: Any, early: Any) -> list[float]:
    """Refuse arguments that do not fit together; the strengths to use."""
    if method == "dfr" and group is None:
        raise DebiasError(
            "Expected `group` and `n_groups` for `method='dfr'`, which balances the groups of the held-out set, but got"
            " none. Name them, or choose `method='afr'`, which needs no group labels."
        )
    if group is not None:
        if n_groups is None:
            raise DebiasError(f"Expected `n_groups`, the number of groups of `group={group!r}`, but got none.")
        check_keys(group, n_groups)
    if n_groups is not None:
        check_n_groups(n_groups)
    if method == "self" and early is None:
        raise DebiasError(
            "Expected `early` for `method='self'`, a checkpoint from early in the training, but got none. Keep one by"
            " `ModelCheckpoint(every_n_epochs=1, save_top_k=-1)`."
        )
    if not isinstance(early, nn.Module | Mapping | str | Path | None):
        raise DebiasError(
            f"Expected `early` to be a module, a state dict or the path of a checkpoint, but got {shown(early)}."
        )
    default = DFR_STRENGTHS if method == "dfr" else (1.0,)
    found = list(default if strengths is None else strengths)
    if method in ("balanced", "plain") and len(found) > 1:
        raise DebiasError(f"Expected one number in `strengths` for `method={method!r}`, but got {found}.")
    return found


def _class_logits(logits: Any, targets: Tensor) -> Tensor:
    """Logits of classes, of a binary output too."""
    if targets.ndim == 1:
        return logits
    if logits.shape[1] > 1:
        raise DebiasError(
            f"Expected classes for `method='self'`, but got {logits.shape[1]} labels. Choose `method='afr'`, or 'dfr'."
        )
    return torch.cat([torch.zeros_like(logits), logits], 1)


def _group_balance(groups: Tensor) -> Tensor:
    counts = torch.bincount(groups.clamp_min(0)[groups >= 0]).double()
    return torch.where(groups >= 0, 1 / counts[groups.clamp_min(0)], 0).unsqueeze(1)


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().double().cpu()


@torch.no_grad()
def _write(head: nn.Linear, new: LinearHead) -> None:
    for parameter, value in ((head.weight, new.weight), (head.bias, new.bias)):
        if parameter is not None and value is not None:
            parameter.copy_(value)
            if is_distributed():  # every rank has fitted the same data; rounding must not part them
                whole = parameter.detach().clone()
                dist.broadcast(whole, 0)
                parameter.copy_(whole)
