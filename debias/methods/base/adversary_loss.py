"""The module of the adversarial methods: which rows count, gradient reversal, the adversary's loss.

What is added to the loss is the adversary's own loss at weight 1; only its gradient into the features is reversed and
scaled.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias.errors import BadRowsError, DebiasError, RowsError
from debias.ops.arguments import check_count
from debias.ops.distributed import global_sum
from debias.ops.fields import arguments
from debias.ops.gradient_reversal import gradient_reversal
from debias.ops.groups import GroupState, group_losses
from debias.tap.head import check_features

__all__ = ["AdversaryLoss", "AdversaryOptions", "Network", "make_mlp", "precise"]

Network = str | nn.Module | Callable[[int], nn.Module]


def make_mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of these widths, with an activation between them."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


@arguments(strength="[0, inf)")
class AdversaryOptions:
    """The strength of an adversary.

    Args:
        strength: lambda of the reversal; at 0 the network trains as without the method, and the adversary is an online
            probe.
    """

    strength: float = 1.0


class AdversaryLoss(GroupState):
    """The loss of an adversary that guesses an attribute from reversed features: the mean over labelled rows.

    It has the fields ``in_features``, the width D of the features, or None where the network is handed to
    :meth:`objective`; the number of ids, which ``ids`` names; ``strength``; and the adversary, which
    ``adversary_field`` names: one of :meth:`networks`, a module of which a copy is trained, or a function that makes
    one from D.

    Raises:
        DebiasError: an argument is out of range, or classes are missing that the loss needs.
        HeadNotFoundError: features are not ``(N, D)``.
        BadRowsError: an id is out of range or a feature is not finite.
    """

    ids: ClassVar[tuple[str, str]]  # the attribute, and the argument that holds the number of ids
    adversary_field: ClassVar[str]
    in_features: int | None
    strength: float
    labelled: Tensor

    def __post_init__(self) -> None:
        self.what, self.argument = self.ids
        count = check_count(self.argument, vars(self)[self.argument])
        if self.in_features is not None:
            check_count("in_features", self.in_features)
        GroupState.__init__(self, count)
        self.strength = float(self.strength)
        self.accuracy: Tensor | None = None
        adversary, known = vars(self)[self.adversary_field], self.networks(1)
        if isinstance(adversary, str) and adversary not in known:
            raise DebiasError(
                f"Expected `{self.adversary_field}` to be {', '.join(map(repr, known))}, a module or a function of the"
                f" features' width, but got {adversary!r}."
            )
        if self.in_features is None:  # only the callback knows epochs
            self.register_buffer("labelled", torch.zeros(1, dtype=torch.float64))
        self.network = None if self.in_features is None else self.build(self.in_features)

    def networks(self, width: int) -> dict[str, Callable[[], nn.Module]]:
        """What makes the adversaries that have a name, for features of this width."""
        raise NotImplementedError

    def build(self, width: int) -> nn.Module:
        """The adversary for features of this width: the named one, a copy of the user's, or what a function makes."""
        adversary: Network = vars(self)[self.adversary_field]
        if isinstance(adversary, str):
            return self.networks(width)[adversary]()
        return copy.deepcopy(adversary) if isinstance(adversary, nn.Module) else adversary(width)

    def losses(
        self, network: nn.Module, features: Tensor, ids: Tensor, strata: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, bool]]]:
        """The adversary's logits ``(N, count)``, and losses ``(N,)`` whose means are added up.

        With each loss whether it is averaged within each stratum first. Ids and strata are those of :meth:`objective`,
        0 in rows that do not count.
        """
        raise NotImplementedError

    def strata(self, targets: Tensor | None) -> Tensor | None:
        """The stratum of each row, int64 ``(N,)`` below :attr:`n_strata`, negative = left out; None for one of all."""
        return None

    @property
    def n_strata(self) -> int:
        """Number of strata."""
        return 1

    def objective(
        self,
        network: nn.Module,
        features: Tensor,
        ids: Tensor,
        *,
        strength: float | None = None,
        targets: Tensor | None = None,
        log: bool = False,
    ) -> Tensor:
        """The mean loss of the global batch; its gradient is this rank's share.

        Args:
            network: the adversary.
            features: ``(N, D)``.
            ids: int64 ``(N,)``, negative = unlabelled, left out.
            strength: lambda of this batch.
            targets: of the main task, where :meth:`strata` wants them.
            log: compute :attr:`accuracy` too, the adversary's share of right guesses among the rows of the global batch
                that count.

        Raises:
            BadRowsError: an id is out of range or a feature not finite; on CPU at once, elsewhere from
                :meth:`raise_if_bad`.
        """
        features = _checked(features, ids)
        finite = features.detach().isfinite().all(1)
        counts = finite & (ids >= 0) & (ids < self.n_groups)
        strata = self.strata(targets)
        if strata is not None:
            counts = counts & (strata >= 0)
            strata = torch.where(counts, strata, 0)
        # A NaN times zero is a NaN, so rows that do not count leave before the network, not after it.
        features = torch.where(finite.unsqueeze(1), features, 0)
        features = gradient_reversal(features, self.strength if strength is None else strength)
        logits, terms = self.losses(network, features, torch.where(counts, ids, 0), strata)
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for losses, stratified in terms:
            groups = torch.where(counts, strata if stratified and strata is not None else 0, -1)
            if not calls:  # bad rows are counted once
                groups = torch.where(ids < self.n_groups, groups, self.n_strata)
                losses = torch.where(finite, losses, torch.nan)
            calls.append((losses, torch.ones_like(losses), groups))
        sums, counted = group_losses(calls, self.n_strata)
        self.count_bad(counted)
        total = features.new_zeros(())
        for (_, stratified), of in zip(terms, sums, strict=True):
            weights = (of.den > 0).to(of.den.dtype) if stratified else of.den
            total = total + of.weighted(weights / weights.sum().clamp_min(1))
        if "labelled" in self._buffers and self.training:
            self.labelled += sums[0].den.sum()
        if log:
            hits = (logits.detach().argmax(1) == ids) & counts
            self.accuracy = global_sum(hits.sum().to(total.dtype)) / sums[0].den.sum().clamp_min(1)
        return total

    def forward(self, features: Tensor, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """The loss to add for one batch."""
        network: Any = self.network
        if network is None:
            raise DebiasError("Expected `in_features` to be given, but got None: there is no network to call.")
        return self.objective(network, features, ids, targets=targets)

    def guess(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """The adversary's logits, in the dtype of the first input; the network is called in its own.

        Raises:
            DebiasError: a network of the user's own has another number of outputs.
        """
        dtype = next((p.dtype for p in network.parameters()), inputs[0].dtype)
        logits = network(*(x.to(dtype) if x.is_floating_point() else x for x in inputs)).to(inputs[0].dtype)
        if logits.shape != (len(inputs[0]), self.n_groups):
            raise DebiasError(
                f"Expected the adversary to return logits of shape {(len(inputs[0]), self.n_groups)}, one per"
                f" {self.what}, but got {tuple(logits.shape)}. Correct its last layer, or `{self.argument}`."
            )
        return logits

    def raise_if_unlabelled(self) -> None:
        """Raise if no row since the last :meth:`start_epoch` was labelled; waits for the device."""
        if not float(self.labelled):
            raise BadRowsError(
                f"Expected samples with a known {self.what} (an id >= 0), but a whole epoch had none, so nothing was"
                f" debiased. Check the ids of the training set."
            )

    def start_epoch(self) -> None:
        """Count labelled rows afresh."""
        self.labelled.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The counters keep their dtype; the network, where there is one, is cast and moved like any other.
        for child in self.children():
            child._apply(fn)
        return super()._apply(fn, recurse)

    def _raise(self, bad: list[float]) -> None:
        ids, rows = (int(x) for x in bad)
        if ids:
            raise BadRowsError(
                f"Expected {self.what} ids below `{self.argument}={self.n_groups}`, but {ids} rows had a higher one."
                f" They took no part in the adversary's loss. Number them 0 .. {self.argument} - 1 (-1 = unlabelled),"
                f" or raise `{self.argument}`."
            )
        if rows:
            raise BadRowsError(
                f"Expected finite losses, but {rows} rows had features or an adversary's loss that are not. They took"
                f" no part in it. Check the inputs of this batch, the learning rates and {self.weight_in_words()};"
                " `Trainer(detect_anomaly=True)` finds the operation."
            )

    def weight_in_words(self) -> str:
        """The weight under which losses may have diverged, for messages."""
        return f"`strength={self.strength:g}`"


def _one_each(per_sample: Tensor, n_rows: int) -> Tensor:
    if len(per_sample) != n_rows:
        raise RowsError(
            f"Expected one row of features for each of the {len(per_sample)} samples, but got {n_rows}. Name a module"
            " that runs on the whole batch and keeps its rows: `features='dotted.path'`."
        )
    return per_sample


def precise(features: Any) -> Tensor:
    """Features ``(N, D)``, checked, in at least float32."""
    features = check_features(features)
    return features if features.dtype == torch.float64 else features.float()


def _checked(features: Tensor, ids: Tensor) -> Tensor:
    features = precise(features)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DebiasError(f"Expected integer ids of shape (N,), but got {ids.dtype} of shape {tuple(ids.shape)}.")
    _one_each(ids, len(features))
    return features
