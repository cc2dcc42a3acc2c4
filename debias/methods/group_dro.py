"""Group DRO: reweigh groups online towards the worst one. Sagawa et al., ICLR 2020, arXiv 1911.08731, algorithm 1.

With ``l_g`` the mean loss of group g in the batch (0 if absent)::

    a_g = l_g + C_g / sqrt(N_g)             optional generalisation adjustment (section 3.3)
    q_g = q_g exp(step_size * a_g) / Z      starting from q_g = 1 / G
    loss = sum_g q_g l_g                    with the new q, no gradient through q

Differences from the authors' code: ``C`` also counts where some ``C_g <= 0`` (there it is then ignored silently);
weights are kept as logarithms, up to a constant, in double precision, where large ``step_size * l_g`` cannot overflow;
they are saved and resumed; ``alpha=1`` works. Published: step size 0.01 with strong weight decay or early stopping,
group-balanced batches (``GroupBalancedSampler``), Waterbirds lr 1e-3, CelebA lr 1e-4, SGD momentum 0.9, weight decay
1e-4, batch 128.

A group absent from a batch has ``l_g = 0``: its weight falls against the groups that had a loss, or grows by
``exp(step_size * C_g / sqrt(N_g))`` under an adjustment, as in the authors' code (``absent="zero"``). Costs: one
all-reduce of 3G + 9 doubles a step, a few small kernels. Needs per-sample losses and group ids; no features, no second
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.methods.base import GroupDebiaser, calls, configures
from debias.ops.arguments import checked
from debias.ops.fields import arguments
from debias.ops.groups import GroupSums, summed
from debias.ops.reweighing import GroupLoss

__all__ = ["GroupDRO", "GroupDROLoss", "GroupDROMixin", "group_dro_weights", "greedy_group_weights"]


@checked("log_weights: float G, group_losses: float G, adjustment: float G, present: bool G", step_size="[0, inf)")
def group_dro_weights(
    log_weights: Tensor,
    group_losses: Tensor,
    *,
    step_size: float,
    adjustment: Tensor | None = None,
    normalize_loss: bool = False,
    present: Tensor | None = None,
) -> Tensor:
    """One exponentiated-gradient update of the group weights.

    Args:
        log_weights: logarithms of the weights, ``(G,)``; they need not be normalised.
        group_losses: mean loss by group, ``(G,)``, 0 for absent groups.
        step_size: eta.
        adjustment: ``C_g / sqrt(N_g)``, ``(G,)``, added to the losses.
        normalize_loss: divide the (adjusted) losses by their sum first.
        present: boolean ``(G,)``; groups that are not present keep their unnormalised weight, adjustment or not.

    Returns:
        Normalised logarithms of the new weights, ``(G,)``.

    Example:
        >>> import torch
        >>> from debias.functional import group_dro_weights
        >>> group_dro_weights(torch.zeros(2), torch.tensor([0.0, 1.0]), step_size=1.0).exp()
        tensor([0.2689, 0.7311])
    """
    scores = _scores(group_losses, adjustment, normalize_loss, present)
    return torch.log_softmax(_bounded(torch.add(log_weights, scores, alpha=step_size)), dim=0)


def _bounded(log_weights: Tensor) -> Tensor:
    """In place: infinite ones would be NaN once they are compared."""
    largest = torch.finfo(log_weights.dtype).max / 4
    return log_weights.clamp_(-largest, largest)


def _scores(losses: Tensor, adjustment: Tensor | None, normalize_loss: bool, present: Tensor | None) -> Tensor:
    """What the logarithms of the weights grow by, before the step size."""
    scores = losses if adjustment is None else losses + adjustment
    if present is not None:
        scores = torch.where(present, scores, 0)
    if normalize_loss:
        total = scores.sum()
        scores = scores / torch.where(total == 0, 1, total)
    return scores


@checked("losses: float G, fractions: float G", alpha="(0, 1]", minimum_weight="[0, 1]")
def greedy_group_weights(losses: Tensor, fractions: Tensor, *, alpha: float, minimum_weight: float = 0.0) -> Tensor:
    """Weights of the worst groups that make up a fraction ``alpha`` of the data: CVaR over groups.

    Args:
        losses: (adjusted, averaged) loss by group, ``(G,)``.
        fractions: share of each group in the training set, ``(G,)``, sum 1.
        alpha: fraction of the data, in (0, 1].
        minimum_weight: share of the plain average mixed in.

    Returns:
        Weights ``(G,)``, sum 1: ``fraction / alpha`` for the worst groups, the remainder for the next one.
    """
    order = losses.argsort(descending=True, stable=True)
    sizes = fractions[order]
    before = sizes.cumsum(0) - sizes
    filled = torch.minimum((alpha - before).clamp_min(0), sizes) / alpha
    weights = torch.zeros_like(fractions).scatter(0, order, filled)
    return minimum_weight * fractions + (1 - minimum_weight) * weights


@arguments(kw_only=False, step_size="[0, inf)", alpha="(0, 1]", ema_rate="(0, 1]", minimum_weight="[0, 1]")
class GroupDROOptions:
    """Options of Group DRO.

    Args:
        step_size: eta, how fast the weights follow the losses; 10^U(-3, -1) is searched in the literature.
        adjustment: generalisation adjustment C, one number or one per group; it counts more for small groups, through
            ``1 / sqrt(N_g)``.
        group_counts: training samples per group N_g, ``(G,)``; needed by ``adjustment`` and ``alpha``. The callback
            counts them in the training set where they are needed and not given.
        normalize_loss: divide the losses by their sum before the update.
        alpha: use the greedy form instead: only the worst groups that make up this fraction of the data.
        absent: what a group absent from a batch counts as in the update: ``"zero"`` (the authors' code), ``"skip"``
            (its unnormalised weight stays, also under an adjustment), ``"ema"`` (its running loss).
        ema_rate: gamma of the running loss, used by ``alpha`` and ``absent="ema"``.
        minimum_weight: share of the plain average mixed into the greedy form.
        group_names: one name per group, for logs and messages.
    """

    step_size: float = 0.01
    adjustment: float | Sequence[float] = 0.0
    group_counts: Sequence[int] | None = None
    normalize_loss: bool = False
    alpha: float | None = None
    _: KW_ONLY
    absent: Literal["zero", "skip", "ema"] = "zero"
    ema_rate: float = 0.1
    minimum_weight: float = 0.0
    group_names: Sequence[str] | None = None


@arguments
class GroupDROLoss(GroupDROOptions, GroupLoss):
    """The Group DRO objective with its state, for any training loop.

    Shape:
        losses ``(N,)`` floating point, unreduced; groups ``(N,)`` int64 (negative = left out) or boolean ``(N, G)``;
        output: scalar. Under DDP its value and its gradient are those of the global batch.

    Raises:
        DebiasError: an argument is out of range, counts are missing, or a group has no training sample.
        BadRowsError: an id is out of range or a loss is not finite.

    Example:
        >>> import torch
        >>> from debias import GroupDROLoss
        >>> criterion = GroupDROLoss(n_groups=2, step_size=0.1)
        >>> criterion(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
        tensor(2.0997)
    """

    constants: Tensor = field(init=False)
    log_weights: Tensor = field(init=False)
    losses: Tensor = field(init=False)
    seen: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        given, total = self.adjustment, len(self.counts)
        self.adjustment = float(given) if isinstance(given, int | float | Real) else [float(c) for c in given]
        constants = [self.adjustment] * total if isinstance(self.adjustment, float) else self.adjustment
        if len(constants) != total:
            raise DebiasError(f"Expected `adjustment` to be one number or {total}, but got {len(constants)}.")
        self.adjusts = any(constants)
        self.register_buffer("constants", torch.tensor(constants, dtype=torch.float64), persistent=False)
        self.register_buffer("log_weights", torch.full((total,), 1 / total, dtype=torch.float64).log())
        self.register_buffer("losses", torch.zeros(total, dtype=torch.float64))  # running, for alpha and absent="ema"
        self.register_buffer("seen", torch.zeros(total, dtype=torch.bool))
        self._last: tuple[Tensor, list[Tensor]] = torch.zeros(total), [torch.zeros(total)]
        if self.group_counts is not None:
            self.set_counts(self.group_counts)

    @property
    def needs_counts(self) -> bool:
        """Whether the training samples per group have to be known."""
        return self.adjusts or self.alpha is not None

    @property
    def weights(self) -> Tensor:
        """The group weights q, ``(G,)``, sum 1; in the greedy form those of the last step's running losses."""
        return self._greedy() if self.alpha is not None and self.has_counts else self.log_weights.softmax(0)

    def reweigh(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """The objective for several losses of one batch, with one update from their sum."""
        if self.needs_counts and not self.has_counts:
            raise DebiasError(
                "Expected `group_counts` with `adjustment` or `alpha`, but got none. Pass the number of training"
                " samples of each group (the callback counts them itself)."
            )
        sums = self.sums(calls)
        if self.training:
            self._update(summed([s.losses for s in sums]).to(self.log_weights.dtype), sums)
        weights = self.weights
        return [s.weighted(weights) for s in sums]

    def by_group(self) -> dict[str, Tensor]:
        """What is worth logging: weights and the last batch's losses, NaN for an absent group, ``(G,)`` each."""
        losses, den = self._last
        present = summed([d.abs() for d in den]) > 0
        return {"group_weight": self.weights, "loss_by_group": torch.where(present, losses, torch.nan)}

    def _update(self, losses: Tensor, sums: Sequence[GroupSums]) -> None:
        # Past nn.Module.__setattr__, which looks for parameters first.
        vars(self)["_last"] = losses, [s.den for s in sums]
        present = None
        if self.alpha is not None or self.absent != "zero":
            present = summed([s.den.abs() for s in sums]) > 0
            self._average(losses, present)
        if self.alpha is not None:
            return
        if present is not None and self.absent == "ema":
            losses = torch.where(present, losses, self.losses)
        # As in group_dro_weights, but in place; what the weights are divided by is left to be read off.
        adjustment = self._adjustment() if self.adjusts else None
        scores = _scores(losses, adjustment, self.normalize_loss, present if self.absent == "skip" else None)
        _bounded(self.log_weights.add_(scores, alpha=self.step_size))

    def _average(self, losses: Tensor, present: Tensor) -> None:
        """Running losses; a group's first loss is taken as it is."""
        rate = torch.where(self.seen, self.losses.new_full((), self.ema_rate), 1.0) * present
        self.losses += rate * (losses - self.losses)
        self.seen |= present

    def _adjustment(self) -> Tensor:
        return self.constants / self.counts.sqrt()

    def _greedy(self) -> Tensor:
        losses = self.losses + self._adjustment() if self.adjusts else self.losses
        fractions = self.counts / self.counts.sum()
        return greedy_group_weights(losses, fractions, alpha=float(self.alpha or 1), minimum_weight=self.minimum_weight)


@arguments
class GroupDRO(GroupDROOptions, GroupDebiaser):
    """Reweigh groups online towards the worst one.

    A shortcut fails in some groups, whose loss stays high while the network relies on it; as they count more, the
    network has to learn what serves them, too.

    Logs:
        On logging steps ``train/group_weight/<name>`` and ``train/loss_by_group/<name>``, of more than 100 groups
        ``train/max_group_weight`` and ``train/worst_group_loss``, the largest ones, instead; and
        ``train/average_loss``, unweighted: the loss that the step logs itself is the reweighted one.

    Example:
        >>> from debias import GroupDRO
        >>> GroupDRO(group=("target", "place"), n_groups=(2, 2)).state_key
        'GroupDRO(target_place)'
    """

    reference = "Sagawa et al., ICLR 2020, arXiv 1911.08731"
    works = (
        "Groups are known, small ones are in most batches, and weight decay or early stopping keeps the network "
        "from fitting its training set."
    )
    fails = (
        "The network fits its training set: then no group is worse than another. Groups that are rare stay out of "
        "most batches; balance them. Label noise looks like a hard group."
    )
    module_class = GroupDROLoss


class GroupDROMixin:
    """Group DRO inside a LightningModule, for those who prefer explicit code.

    Example:
        >>> import lightning as L, torch
        >>> from debias import GroupDROMixin
        >>> class Model(GroupDROMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 2)
        ...         self.configure_group_dro(n_groups=4)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, group = batch
        ...         losses = torch.nn.functional.cross_entropy(self.net(x), y, reduction="none")
        ...         return self.group_dro_loss(losses, group)
    """

    group_dro: GroupDROLoss
    configure_group_dro = configures("group_dro", GroupDROLoss)
    group_dro_loss = calls("group_dro", GroupDROLoss.forward)
