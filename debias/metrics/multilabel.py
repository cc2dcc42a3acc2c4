"""F1 of every label and group, at many thresholds at once."""

from __future__ import annotations

import torch
from torch import Tensor

from debias.metrics.group import say_not_finite
from debias.metrics.ranks import RankMetric
from debias.ops.arguments import checked

__all__ = ["MultilabelF1"]


class MultilabelF1(RankMetric):
    """F1 by threshold, group and label: ``2 TP / (2 TP + FP + FN)``, from counts that add up over batches and ranks.

    Args:
        n_labels: number of labels A.
        n_groups: number of groups G.
        thresholds: number of thresholds T, ``1 / (T + 1) .. T / (T + 1)``.

    Shape:
        probabilities and targets ``(N, A)``, targets in {0, 1} and negative where missing; groups ``(N,)``, where ids
        outside [0, G) count overall and in no group. :meth:`compute` returns ``(G + 1, T, A)``, overall last; NaN where
        there is no positive, neither true nor guessed. A probability that is NaN is a wrong guess; a warning says so.

    Example:
        >>> import torch
        >>> from debias.metrics import MultilabelF1
        >>> metric = MultilabelF1(n_labels=1, n_groups=1, thresholds=1)
        >>> metric.update(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[1], [0], [-1]]), torch.tensor([0, 0, 0]))
        >>> metric.compute()[-1, 0]
        tensor([0.6667])
    """

    higher_is_better = True
    full_state_update = False
    counts: Tensor
    not_finite: Tensor
    thresholds: Tensor

    @checked(thresholds="[1, 1000000]")
    def __init__(self, n_labels: int, n_groups: int = 1, thresholds: int = 99) -> None:
        super().__init__()
        self.n_groups = n_groups
        grid = torch.arange(1, thresholds + 1) / (thresholds + 1)
        self.register_buffer("thresholds", grid, persistent=False)
        shape = (n_groups + 1, thresholds, n_labels, 3)
        self.add_state("counts", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("not_finite", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.said: dict[str, Tensor] = {}

    def update(self, probabilities: Tensor, targets: Tensor, groups: Tensor) -> None:
        """Count true positives, false positives and false negatives."""
        self.not_finite += (probabilities.isnan() & (targets >= 0)).any(1).sum()
        n_thresholds, n_labels = self.counts.shape[1:3]
        places = n_thresholds + 1
        # How many thresholds a probability reaches: it is a guess at exactly the first so many.
        wide = probabilities.to(torch.promote_types(probabilities.dtype, self.thresholds.dtype)).contiguous()
        reached = torch.bucketize(wide, self.thresholds.to(wide.dtype), right=True)
        # One that is NaN is a wrong guess at each threshold.
        reached = torch.where(probabilities.isnan(), torch.where(targets == 0, n_thresholds, 0), reached)
        inside = (groups >= 0) & (groups < self.n_groups)
        group = torch.where(inside, groups, self.n_groups).unsqueeze(1)
        label = torch.arange(n_labels, device=groups.device)
        index = ((group * n_labels + label) * places + reached).flatten()
        shape = self.n_groups + 1, n_labels, places
        # By group, label and reached thresholds, those that reach at most so many; integers add up in any order.
        missed, rejected = (
            index.new_zeros(shape)
            .flatten()
            .index_add_(0, index, (targets == y).flatten().long())
            .view(shape)
            .cumsum(-1)
            for y in (1, 0)
        )
        for k, part in enumerate((missed[..., -1:] - missed, rejected[..., -1:] - rejected, missed)):
            found = part[..., :-1].transpose(1, 2)
            self.counts[:-1, ..., k] += found[:-1]
            self.counts[-1, ..., k] += found.sum(0)

    def compute(self) -> Tensor:
        """F1 ``(G + 1, T, A)``; :attr:`said` is then ``{"f1_not_finite": samples}``, or empty where all are finite."""
        self.said = say_not_finite("f1", self.not_finite, "They count as wrong.")
        true, false, missed = self.counts.float().unbind(-1)
        return 2 * true / (2 * true + false + missed)
