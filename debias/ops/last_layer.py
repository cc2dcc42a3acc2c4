"""Refits of a linear head on features: logistic regressions, weights, and gradient descent from the old head.

Targets are class ids ``(N,)`` with logits ``(N, C)``, or labels ``(N, K)`` in {0, 1} with one logit each (a binary
head is one label), negative where missing. Everything is float64 on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from debias.errors import DebiasError
from debias.extras import needs_extra
from debias.ops.arguments import check_ids, checked, shown

__all__ = [
    "LinearHead",
    "afr_weights",
    "balanced_subset",
    "check_fit",
    "class_balance",
    "descend",
    "disagreement_scores",
    "element_losses",
    "fit_dfr",
    "fit_logistic",
    "worst_accuracy",
]


class LinearHead(NamedTuple):
    """Weight ``(C, d)`` and bias ``(C,)``, or None where there is none."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(N, C)``."""
        return F.linear(features, self.weight, self.bias)


def element_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy ``(N, 1)`` of class ids, or binary cross-entropy ``(N, K)`` of labels, 0 where they are missing."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none").unsqueeze(1)
    known = targets >= 0
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp_min(0).to(logits.dtype), reduction="none")
    return torch.where(known, losses, 0)


def class_balance(targets: Tensor) -> Tensor:
    """Inverse number of samples of each target's class, ``(N, 1)`` or ``(N, K)``; 0 where a label is missing."""
    if targets.ndim == 1:
        check_ids("targets", targets)
        return (1 / torch.bincount(targets).double())[targets].unsqueeze(1)
    counts = torch.stack([(targets == value).sum(0) for value in (0, 1)]).double()
    weights = 1 / counts.clamp_min(1)
    return torch.where(targets < 0, 0, torch.where(targets > 0, weights[1], weights[0]))


@checked("probabilities: float N | float N K, targets: int N | any N K", gamma="[0, inf)")
def afr_weights(probabilities: Tensor, targets: Tensor, *, gamma: float, balance: bool = True) -> Tensor:
    """Automatic feature reweighting: ``exp(-gamma p_i)``, p_i the network's probability of the true class. Qiu et al.,
    ICML 2023.

    Args:
        probabilities: of the true class ``(N,)``, or of the true value of each label ``(N, K)``.
        targets: class ids ``(N,)``, or labels ``(N, K)``, negative where missing.
        gamma: at least 0; 0 for equal weights. Published: 4 to 20 on Waterbirds, 1 to 3 on CelebA.
        balance: multiply by the inverse number of samples of the class. It does not make the classes' sums equal.

    Returns:
        Weights, shaped like the probabilities, sum 1 (of each label).

    Example:
        >>> import torch
        >>> from debias.functional import afr_weights
        >>> p, y = torch.tensor([0.95, 0.9, 0.3, 0.8, 0.2]), torch.tensor([0, 0, 0, 1, 1])
        >>> afr_weights(p, y, gamma=4.0)
        tensor([0.0206, 0.0252, 0.2773, 0.0563, 0.6206])
    """
    logs = -gamma * probabilities
    if balance:
        logs = logs + class_balance(targets).view(probabilities.shape).log().to(logs.dtype)
    elif targets.ndim > 1:
        logs = torch.where(targets < 0, -torch.inf, logs)
    return logs.softmax(0)  # gamma p may be hundreds: exp(-gamma p) would underflow


@checked("early: float N C, final: float N C")
def disagreement_scores(early: Tensor, final: Tensor) -> Tensor:
    """How much an early network disagrees with the final one: KL(early || final) / C. LaBonte et al., NeurIPS 2023.

    Args:
        early: logits of an early network ``(N, C)``.
        final: logits of the final one ``(N, C)``.

    Returns:
        ``(N,)``.

    Example:
        >>> import torch
        >>> from debias.functional import disagreement_scores
        >>> disagreement_scores(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.1556])
    """
    return F.kl_div(final.log_softmax(1), early.log_softmax(1), log_target=True, reduction="none").mean(1)


@checked("groups: int N")
def balanced_subset(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Rows drawn at random without replacement, as many of each group as the smallest has.

    Args:
        groups: int64 ``(N,)``, negative = left out; groups without a sample are passed over.
        generator: draws them.

    Returns:
        int64, in ascending order.
    """
    order = torch.randperm(len(groups), generator=generator)
    present = groups[groups >= 0].unique()
    if not len(present):
        raise DebiasError(f"Expected `groups` to hold ids from 0 on, but got none in {shown(groups)}. Label some rows.")
    size = min(int((groups == g).sum()) for g in present)
    return torch.cat([order[groups[order] == g][:size] for g in present]).sort().values


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    *,
    n_classes: int,
    penalty: str = "l2",
    strength: float = 1.0,
    weights: Tensor | None = None,
    rows: Tensor | None = None,
    bias: bool = True,
    max_iter: int = 1000,
) -> LinearHead:
    """Logistic regression by scikit-learn on standardised features, given back for the features as they are.

    Features are centred and divided by their standard deviation over all rows, also where it is fitted on some of them;
    without a bias they are only divided.

    Args:
        features: float64 ``(N, d)``.
        targets: class ids ``(N,)`` or labels ``(N, K)``.
        n_classes: C, or K.
        penalty: ``"l1"`` or ``"l2"``.
        strength: inverse of the penalty's weight, scikit-learn's ``C``.
        weights: of the samples ``(N,)`` or of the labels ``(N, K)``.
        rows: to fit on; all by default.
        bias: whether the head has one.
        max_iter: of the solver.

    Raises:
        DebiasError: a class has no sample among the rows.
    """
    mean = features.mean(0) if bias else torch.zeros(features.shape[1], dtype=features.dtype)
    deviation = features.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)
    chosen = slice(None) if rows is None else rows
    x, y = ((features - mean) / deviation)[chosen], targets[chosen]
    w = None if weights is None else weights[chosen]
    options: dict[str, Any] = {"penalty": penalty, "strength": strength, "bias": bias, "max_iter": max_iter}
    if y.ndim == 1:
        weight, intercept = _logistic(x, y, w, n_classes, "class", **options)
        if n_classes == 2:  # one logit: half of it for one class, minus half of it for the other
            weight, intercept = torch.cat([-weight, weight]) / 2, torch.cat([-intercept, intercept]) / 2
    else:
        fits = []
        for k in range(y.shape[1]):
            known = y[:, k] >= 0
            of_label = None if w is None else w[known, k] if w.ndim == 2 else w[known]
            fits.append(_logistic(x[known], y[known, k].long(), of_label, 2, _name_of(k, y), **options))
        weight, intercept = (torch.cat(parts) for parts in zip(*fits, strict=True))
    weight = weight / deviation
    return LinearHead(weight, intercept - weight @ mean if bias else None)


def check_fit(targets: Tensor, n_classes: int) -> None:
    """Refuse what :func:`fit_logistic` would, before there are features.

    Args:
        targets: as there.
        n_classes: as there.

    Raises:
        DebiasError: a class has no sample.
        ImportError: scikit-learn is not installed.
    """
    with needs_extra("sklearn"):
        import sklearn  # noqa: F401
    if targets.ndim == 1:
        _check_classes(targets[targets >= 0], n_classes, "class")
        return
    for k, column in enumerate(targets.T):
        _check_classes(column[column >= 0], 2, _name_of(k, targets))


def _name_of(label: int, targets: Tensor) -> str:
    return f"label {label}: value" if targets.shape[1] > 1 else "class"


def _check_classes(y: Tensor, n_classes: int, what: str) -> None:
    counts = torch.bincount(y, minlength=n_classes)
    if len(counts) > n_classes:
        raise DebiasError(
            f"Expected class ids below {n_classes}, the number of the head's classes, but got {int(y.max())}. Correct"
            " the targets, or name another head."
        )
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise DebiasError(
            f"Expected samples of each of the {n_classes} classes to fit the head on, but there is none of {what}"
            f" {', '.join(map(str, empty))}. Give a held-out set that holds all of them."
        )


def _logistic(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    n_classes: int,
    what: str,
    *,
    penalty: str,
    strength: float,
    bias: bool,
    max_iter: int,
) -> tuple[Tensor, Tensor]:
    _check_classes(y, n_classes, what)
    with needs_extra("sklearn"):
        from sklearn.linear_model import LogisticRegression
    lasso = penalty == "l1"
    solver = "lbfgs" if not lasso else "liblinear" if n_classes == 2 else "saga"
    options: dict[str, Any] = {"C": strength, "solver": solver, "fit_intercept": bias, "max_iter": max_iter}
    # From 1.8 on the penalty is said by the ratio of both norms.
    if inspect.signature(LogisticRegression).parameters["penalty"].default == "deprecated":
        options["l1_ratio"] = float(lasso)
    else:
        options["penalty"] = penalty
    model = LogisticRegression(random_state=0, tol=1e-6, **options)
    model.fit(x.numpy(), y.numpy(), None if weights is None else weights.numpy())
    intercept = model.intercept_ if bias else torch.zeros(len(model.coef_)).numpy()
    return torch.as_tensor(model.coef_).double(), torch.as_tensor(intercept).double()


def worst_accuracy(logits: Tensor, targets: Tensor, groups: Tensor) -> float:
    """The lowest accuracy of a group that is present; of labels the mean over those that are known."""
    if targets.ndim == 1:
        right, counts = (logits.argmax(1) == targets).double(), torch.ones(len(targets), dtype=torch.float64)
    else:
        known = targets >= 0
        right = (((logits > 0) == (targets > 0)) & known).sum(1).double()
        counts = known.sum(1).double()
    present = groups >= 0
    zeros = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    of_group = zeros.index_add(0, groups[present], right[present])
    total = zeros.index_add(0, groups[present], counts[present])
    return float((of_group[total > 0] / total[total > 0]).min())


def fit_dfr(
    features: Tensor,
    targets: Tensor,
    groups: Tensor,
    *,
    n_classes: int,
    strengths: Sequence[float],
    refits: int = 20,
    bias: bool = True,
    seed: int = 0,
    max_iter: int = 1000,
) -> tuple[LinearHead, float, dict[float, float]]:
    """Deep feature reweighting: L1 logistic regressions on group-balanced subsets, averaged. Kirichenko et al., ICLR
    2023.

    The strength is the one whose fit on one half, balanced, has the best worst group on the other half.

    Args:
        features: float64 ``(N, d)``.
        targets: class ids ``(N,)`` or labels ``(N, K)``.
        groups: int64 ``(N,)``; at least two samples of each group.
        n_classes: C, or K.
        strengths: inverse weights of the penalty to choose from; on ties the first.
        refits: number of balanced subsets of the whole set that the head is the mean over.
        bias: whether the head has one.
        seed: of the halves and subsets.
        max_iter: of the solver.

    Returns:
        The head, the chosen strength, and the worst group's accuracy for each strength.
    """
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"n_classes": n_classes, "penalty": "l1", "bias": bias, "max_iter": max_iter}
    scores: dict[float, float] = {}
    if len(strengths) > 1:
        order = torch.randperm(len(groups), generator=generator)
        # Half of each group, so that no group is missing on either side.
        sides = torch.zeros(len(groups), dtype=torch.bool)
        for g in groups[groups >= 0].unique():
            of_group = order[groups[order] == g]
            sides[of_group[: (len(of_group) + 1) // 2]] = True
        subset = balanced_subset(torch.where(sides, groups, -1), generator)
        rest = ~sides & (groups >= 0)
        for strength in strengths:
            head = fit_logistic(features, targets, strength=strength, rows=subset, **options)
            scores[strength] = worst_accuracy(head(features[rest]), targets[rest], groups[rest])
    best = max(scores, key=scores.__getitem__) if scores else strengths[0]
    heads = [
        fit_logistic(features, targets, strength=best, rows=balanced_subset(groups, generator), **options)
        for _ in range(refits)
    ]
    parts = zip(*[[x for x in head if x is not None] for head in heads], strict=True)
    weight, *intercept = [torch.stack(part).mean(0) for part in parts]
    return LinearHead(weight, intercept[0] if bias else None), best, scores


def descend(
    head: LinearHead,
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    lr: float,
    steps: int,
    ridge: float = 0.0,
    clip: float | None = 1.0,
) -> LinearHead:
    """Full-batch gradient descent on ``sum_i w_i l_i + ridge * (|W - W_0|^2 + |b - b_0|^2)`` from the old head.

    Args:
        head: W_0 and b_0.
        features: float64 ``(N, d)``.
        targets: class ids ``(N,)`` or labels ``(N, K)``.
        weights: ``(N, 1)`` or ``(N, K)``.
        lr: learning rate, constant.
        steps: number of steps.
        ridge: weight of the distance to the old head.
        clip: largest norm of a gradient; None for no limit.
    """
    start = [x for x in head if x is not None]
    now = [x.clone().requires_grad_() for x in start]
    for _ in range(steps):
        logits = F.linear(features, now[0], now[1] if len(now) > 1 else None)
        loss = (weights * element_losses(logits, targets)).sum()
        if ridge:
            loss = loss + ridge * torch.stack([(x - y).square().sum() for x, y in zip(now, start, strict=True)]).sum()
        grads = torch.autograd.grad(loss, now)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        factor = 1.0 if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
        now = [(x - lr * factor * g).detach().requires_grad_() for x, g in zip(now, grads, strict=True)]
    done = [x.detach() for x in now]
    return LinearHead(done[0], done[1] if len(done) > 1 else None)
