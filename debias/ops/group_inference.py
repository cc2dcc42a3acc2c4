"""Groups that nobody labelled, inferred from what a plainly trained network makes of the training set.

Each function takes what was recorded of N samples and returns one id per sample, int64 ``(N,)`` on the CPU, the same
whatever the order of ranks or batches was. scikit-learn does the clustering.

===============  ==============================================================================================
``errors``       right / wrong: "Just Train Twice", Liu et al., ICML 2021
``eiil``         the two environments that disagree most with the network: Creager et al., ICML 2021
``spare``        clusters of early outputs, class by class: Yang et al., arXiv 2305.18761
``george``       clusters of features, class by class: Sohoni et al., NeurIPS 2020
``useful``       fast / slow to learn, class by class: Nguyen et al., NeurIPS 2024
===============  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.extras import needs_extra
from debias.ops.arguments import check_count, check_ids, checked

__all__ = [
    "cluster_weights",
    "eiil_groups",
    "eiil_scores",
    "error_groups",
    "george_groups",
    "spare_groups",
    "useful_groups",
    "wrong_predictions",
]

# A silhouette takes memory and time in the square of the samples; above this many it is estimated on a fixed draw.
SILHOUETTE_SAMPLES = 10_000
SEEDS = "[0, 4294967295]"  # of scikit-learn


def wrong_predictions(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether a network gets a sample wrong.

    Args:
        logits: ``(N, C)`` of classes; ``(N,)`` of one binary output, or ``(N, K)`` of K labels, where the targets have
            the shape of the logits: a sample is then wrong if any of its labels is.
        targets: class ids ``(N,)``, or 0 / 1 in the shape of the logits, -1 for a label that nobody knows.

    Returns:
        Boolean ``(N,)``.
    """
    logits, targets = _outputs(logits, targets)
    if logits.shape == targets.shape:
        wrong = ((logits > 0) != (targets > 0.5)) & (targets >= 0)
        return wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong
    return logits.argmax(1) != targets


@checked("logits: float ..., targets: any ...")
def error_groups(logits: Tensor, targets: Tensor, *, per_class: bool = False) -> Tensor:
    """Group 1 holds the samples that the network gets wrong, group 0 the others.

    Args:
        logits: see :func:`wrong_predictions`.
        targets: see :func:`wrong_predictions`.
        per_class: cross them with the classes: ``2 * class + wrong``.

    Returns:
        int64 ``(N,)``.

    Example:
        >>> import torch
        >>> from debias.functional import error_groups
        >>> error_groups(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        tensor([0, 1])
    """
    return _crossed(wrong_predictions(logits, targets).long().cpu(), targets, per_class)


@checked("logits: float N C | float ..., targets: int N < C | any ...")
def eiil_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Derivative of each sample's loss by a factor on its logits: ``c_i = <dl_i/dz_i, z_i>``.

    Positive where the network's own confidence costs it: the true logit is below the one that it expects.

    Args:
        logits: see :func:`wrong_predictions`.
        targets: see :func:`wrong_predictions`; float targets may be probabilities.

    Returns:
        float64 ``(N,)``.
    """
    logits, targets = _outputs(logits, targets)
    logits = logits.double()
    if logits.shape == targets.shape:
        scores = (logits.sigmoid() - targets.double()) * logits
        return scores.flatten(1).sum(1) if scores.ndim > 1 else scores
    check_ids("targets", targets)
    expected = (logits.softmax(1) * logits).sum(1)
    return expected - logits.gather(1, targets.unsqueeze(1)).squeeze(1)


@checked("logits: float ..., targets: any ...")
def eiil_groups(logits: Tensor, targets: Tensor, *, per_class: bool = False) -> Tensor:
    """The two environments in which the network's invariance is violated most.

    The reference maximises ``((mean_i s_i c_i)^2 + (mean_i (1 - s_i) c_i)^2) / 2`` over soft memberships s by 10,000
    steps of Adam. The objective is convex in ``mean_i s_i c_i``, so its maximum is the split by the sign of c, inside
    each class as well as over all. For two classes this is the error set.

    Args:
        logits: see :func:`wrong_predictions`.
        targets: see :func:`wrong_predictions`.
        per_class: cross the environments with the classes, ``2 * class + environment``, as for Group DRO in the paper.

    Returns:
        int64 ``(N,)``: 1 where ``c_i > 0``.

    Example:
        >>> import torch
        >>> from debias.functional import eiil_groups
        >>> eiil_groups(torch.tensor([2.0, 1.5, -1.0, 0.8, -2.0, -0.5]), torch.tensor([1, 1, 1, 0, 0, 0]))
        tensor([0, 0, 1, 1, 0, 0])
    """
    return _crossed((eiil_scores(logits, targets) > 0).long().cpu(), targets, per_class)


@checked("outputs: float N C, targets: int N", first=True, n_clusters="[2, 1000000]", seed=SEEDS)
def spare_groups(
    outputs: Tensor, targets: Tensor, *, n_clusters: int | Sequence[int] = (2, 3, 4, 5), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """k-means of the outputs of an early network, class by class.

    Args:
        outputs: probabilities ``(N, C)`` after one or a few epochs.
        targets: class ids ``(N,)``.
        n_clusters: clusters a class; of several numbers each class takes the one with the best silhouette.
        seed: of the clustering.

    Returns:
        Ids ``(N,)``, numbered class by class, in each class the largest cluster first; and the silhouette of each
        class ``(C,)``, NaN for a class without two different samples.

    Raises:
        DebiasError: a class has fewer samples than clusters.
    """
    numbers = n_clusters if isinstance(n_clusters, Sequence) else [n_clusters]
    tries = [_k_means(n, seed) for n in numbers]
    return _by_class(outputs, targets, lambda x: _best_silhouette(x, tries, seed))


@checked("groups: int N, targets: int N < C, silhouettes: float C", high="[0, inf)")
def cluster_weights(
    groups: Tensor, targets: Tensor, *, silhouettes: Tensor | None = None, high: float = 2.0, threshold: float = 0.9
) -> Tensor:
    """SPARE's probabilities of drawing a sample: ``|cluster|^-power``, every class with the same mass.

    A power of 1 gives the clusters of a class equal mass; one of 2 gives them mass inverse to their size, which turns
    the imbalance round.

    Args:
        groups: ids ``(N,)``, each inside one class.
        targets: class ids ``(N,)``.
        silhouettes: of each class ``(C,)``: the power is 1 where it reaches ``threshold``, else ``high``. All 1 without
            them.
        high: see ``silhouettes``.
        threshold: see ``silhouettes``.

    Returns:
        float64 ``(N,)``, sum 1.
    """
    groups, targets = groups.long().cpu(), targets.long().cpu()
    check_ids("groups", groups)
    n_classes = check_ids("targets", targets)
    sizes = torch.bincount(groups).double()[groups]
    powers = torch.ones_like(sizes)
    if silhouettes is not None:
        powers = torch.where(silhouettes.cpu().double() >= threshold, 1.0, high)[targets]
    raw = sizes**-powers
    mass = torch.zeros(n_classes, dtype=torch.float64).index_add(0, targets, raw)
    return raw / mass[targets] / (mass > 0).sum()


@checked("features: float N D, targets: int N", first=True, max_clusters="[2, 1000000]", seed=SEEDS)
def george_groups(
    features: Tensor,
    targets: Tensor,
    *,
    max_clusters: int = 10,
    clusterer: Literal["gmm", "kmeans"] = "gmm",
    n_components: int | None = None,
    normalize: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Clusters of features, class by class; their number is the one with the best silhouette.

    The score of a clustering is the mean over clusters of their mean silhouette, so that small clusters count; on ties
    more clusters win. The reference reduces features by UMAP; here PCA, or nothing. Its overclustering is left out.

    Args:
        features: ``(N, D)``, what the head reads.
        targets: class ids ``(N,)``.
        max_clusters: the largest number of clusters of a class that is tried.
        clusterer: ``"gmm"`` (Gaussians with full covariance) or ``"kmeans"``.
        n_components: number of principal components that are clustered; all features by default.
        normalize: divide each sample's features by their length first.
        seed: of the clustering.

    Returns:
        As :func:`spare_groups`.
    """
    features = features.detach().double().cpu()
    if normalize:
        features = torch.nn.functional.normalize(features, dim=1)
    if n_components is not None:
        _, decomposition = _sklearn("decomposition")
        n_components = check_count("n_components", n_components, highest=min(features.shape))
        reduced = decomposition.PCA(n_components, svd_solver="full").fit_transform(features.numpy())
        features = torch.from_numpy(reduced)
    make = _mixture if clusterer == "gmm" else _k_means
    tries = [make(n, seed) for n in range(2, min(max_clusters, len(features)) + 1)]
    return _by_class(features, targets, lambda x: _best_silhouette(x, tries[::-1], seed, by_cluster=True))


@checked("outputs: float N C, targets: int N, losses: float N", first=True, seed=SEEDS)
def useful_groups(
    outputs: Tensor, targets: Tensor, losses: Tensor, *, per_class: bool = False, seed: int = 0
) -> Tensor:
    """Group 1 holds, in each class, the cluster of outputs that the network learns slowly; group 0 the other.

    Args:
        outputs: logits ``(N, C)`` after 5 to 10 % of the training.
        targets: class ids ``(N,)``.
        losses: of each sample ``(N,)``: of the two clusters of a class, the one with the higher mean is slow.
        per_class: cross them with the classes: ``2 * class + slow``.
        seed: of the clustering.

    Returns:
        int64 ``(N,)``.
    """
    clusters, _ = _by_class(outputs, targets, lambda x: (_k_means(2, seed)(x), float("nan")))
    losses = losses.detach().double().cpu()
    zeros = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64)
    means = zeros.index_add(0, clusters, losses) / zeros.index_add(0, clusters, torch.ones_like(losses))
    slow = means.view(-1, 2).argmax(1)  # clusters are numbered in pairs, class by class
    return _crossed((clusters % 2 == slow[clusters // 2]).long(), targets, per_class)


def _outputs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits, targets = logits.detach(), targets.detach()
    if logits.shape == (*targets.shape, 1):  # one binary output with an axis of its own
        logits = logits.squeeze(-1)
    if logits.shape == targets.shape and logits.ndim >= 1:
        return logits, targets
    if logits.ndim == 2 and targets.ndim == 1 and len(logits) == len(targets) and not targets.is_floating_point():
        return logits, targets.long()
    raise DebiasError(
        "Expected `logits` of shape (N, C) with class ids `targets` of shape (N,), or both of the same shape with 0 / 1"
        f" targets, but got {tuple(logits.shape)} and {tuple(targets.shape)} of {targets.dtype}."
    )


def _crossed(ids: Tensor, targets: Tensor, per_class: bool) -> Tensor:
    if per_class and targets.numel() != ids.numel():
        raise DebiasError(
            f"Expected one class of each sample with `per_class=True`, but got targets of shape {tuple(targets.shape)}."
            " Leave it out."
        )
    return 2 * targets.detach().long().cpu().reshape(ids.shape) + ids if per_class else ids


def _by_class(x: Tensor, targets: Tensor, cluster: Callable[[Any], tuple[Any, float]]) -> tuple[Tensor, Tensor]:
    """Ids numbered class by class, in each class the largest cluster first, and the score of each class."""
    rows, targets = x.detach().double().cpu(), targets.detach().long().cpu()
    if rows.ndim != 2 or targets.shape != rows.shape[:1]:
        raise DebiasError(
            "Expected one row and one class id per sample to cluster class by class, but got shapes"
            f" {tuple(rows.shape)} and {tuple(targets.shape)}."
        )
    ids, classes = torch.empty_like(targets), check_ids("targets", targets)
    scores = torch.full((classes,), float("nan"), dtype=torch.float64)
    first = 0
    for label in range(classes):
        members = (targets == label).nonzero().flatten()
        if not len(members):
            continue
        try:
            found, scores[label] = cluster(rows[members].numpy())
        except _TooFewError as few:
            raise DebiasError(
                f"Expected at least {few.args[0]} different rows in each class to be clustered, but class {label} has"
                f" {len(members)} samples with {few.args[1]}. Ask for fewer clusters, or observe later, when outputs"
                " differ."
            ) from None
        # Which number a cluster has must not depend on how the clustering started; of equal ones the first in the set.
        clusters = torch.as_tensor(found, dtype=torch.int64)
        sizes = torch.bincount(clusters)
        place = torch.arange(len(clusters))
        start = torch.full_like(sizes, len(clusters)).scatter_reduce(0, clusters, place, "amin")
        rank = torch.empty_like(sizes)
        rank[(sizes * len(clusters) - start).argsort(descending=True)] = torch.arange(len(sizes))
        ids[members] = first + rank[clusters]
        first += len(sizes)
    return ids, scores


class _TooFewError(Exception):
    """Fewer different rows than clusters."""


def _k_means(n: int, seed: int) -> Callable[[Any], Any]:
    def fit(x: Any) -> Any:
        np, cluster = _sklearn("cluster")
        if (different := len(np.unique(x, axis=0))) < n:
            raise _TooFewError(n, different)
        return cluster.KMeans(n, n_init=10, random_state=seed).fit_predict(x)

    return fit


def _mixture(n: int, seed: int) -> Callable[[Any], Any]:
    def fit(x: Any) -> Any:
        np, mixture = _sklearn("mixture")
        if (different := len(np.unique(x, axis=0))) < n:
            raise _TooFewError(n, different)
        found = mixture.GaussianMixture(n, n_init=3, random_state=seed).fit_predict(x)
        return np.unique(found, return_inverse=True)[1]  # a Gaussian may be no sample's most probable one

    return fit


def _best_silhouette(
    x: Any, tries: Sequence[Callable[[Any], Any]], seed: int, *, by_cluster: bool = False
) -> tuple[Any, float]:
    """The clustering with the best silhouette, on ties the first, and that silhouette."""
    np, metrics = _sklearn("metrics")
    chosen = slice(None)
    if len(x) > SILHOUETTE_SAMPLES:
        chosen = np.random.RandomState(seed).permutation(len(x))[:SILHOUETTE_SAMPLES]
    best: tuple[Any, float] | None = None
    few: _TooFewError | None = None
    for fit in tries:
        try:
            found = fit(x)
        except _TooFewError as error:
            few = error
            continue
        part = found[chosen]
        if not 1 < len(np.unique(part)) < len(part):
            score = float("-inf")
        else:
            each = metrics.silhouette_samples(x[chosen], part)
            score = np.mean([each[part == c].mean() for c in np.unique(part)]) if by_cluster else each.mean()
        if best is None or score > best[1]:
            best = found, float(score)
    if best is None:
        raise few or _TooFewError(2, 1)
    return best[0], best[1] if best[1] > float("-inf") else float("nan")


def _sklearn(name: str) -> tuple[Any, Any]:
    """NumPy and a part of scikit-learn, loaded when they are first needed."""
    from importlib import import_module

    with needs_extra("sklearn"):
        return import_module("numpy"), import_module(f"sklearn.{name}")
