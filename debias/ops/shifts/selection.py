"""Choosing among runs by their accuracy under shifts that they were not trained on.

The two-fold protocol of arXiv 2409.19774: the ten families are split in two folds. A setting is trained twice, each
time with one fold as augmentation; its score is the mean over all families of the accuracy in the run that did *not*
train on that family. The best setting is then trained with all families. Without augmentation one run is enough.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from debias.errors import DebiasError
from debias.ops.arguments import checked

__all__ = ["held_out_mean", "select_setting", "two_fold_score"]

Setting = TypeVar("Setting", bound=Hashable)


@checked()
def held_out_mean(accuracy: Mapping[str, Any], trained_on: Iterable[str] = ()) -> Any:
    """The score of one run: mean accuracy over the families that it was not trained on.

    Args:
        accuracy: accuracy of each family.
        trained_on: families that the run was trained on.

    Raises:
        DebiasError: it was trained on all of them.

    Example:
        >>> from debias.ops.shifts import held_out_mean
        >>> held_out_mean({"blur": 0.9, "edges": 0.5, "weather": 0.7}, trained_on=["blur"])
        0.6
    """
    trained = set(trained_on)
    held_out = [value for family, value in accuracy.items() if family not in trained]
    if not held_out:
        raise DebiasError(
            f"Expected a family that the run was not trained on, but got only {sorted(accuracy)}. Train on one fold of"
            " the families, `families='first'`, and score on the other."
        )
    return sum(held_out) / len(held_out)


@checked()
def two_fold_score(runs: Iterable[tuple[Iterable[str], Mapping[str, Any]]]) -> float:
    """The score of a setting: for each family the mean over the runs that did not train on it, then the mean of those.

    Args:
        runs: of each run the families it was trained on, and its accuracy by family, the same families for all.

    Raises:
        DebiasError: a family was trained on in all runs, or the runs do not report the same families.

    Example:
        >>> from debias.ops.shifts import two_fold_score
        >>> two_fold_score([(["blur"], {"blur": 0.9, "edges": 0.5}), (["edges"], {"blur": 0.7, "edges": 0.8})])
        0.6
    """
    runs = [(set(trained_on), dict(accuracy)) for trained_on, accuracy in runs]
    families = list(runs[0][1]) if runs else []
    if any(set(accuracy) != set(families) for _, accuracy in runs):
        raise DebiasError("Expected runs that report the same families, but they differ. Use one monitor for all runs.")
    means = []
    for family in families:
        values = [float(accuracy[family]) for trained_on, accuracy in runs if family not in trained_on]
        if not values:
            raise DebiasError(
                f"Expected a run that was not trained on {family!r}, but all {len(runs)} were. Train one run on each"
                " fold, `families='first'` and `families='second'`."
            )
        means.append(sum(values) / len(values))
    if not means:
        raise DebiasError("Expected at least one run with at least one family, but got none.")
    return sum(means) / len(means)


@checked()
def select_setting(scores: Mapping[Setting, float]) -> Setting:
    """The setting with the highest score; of tied ones the middle, in their order, as the paper does.

    Args:
        scores: score of each setting, in the order of the hyperparameter.

    Raises:
        DebiasError: there is no setting, or a score is NaN.
    """
    if not scores or any(score != score for score in scores.values()):
        raise DebiasError(f"Expected a score for at least one setting, and no NaN, but got {dict(scores)}.")
    best = max(scores.values())
    tied = [setting for setting, score in scores.items() if score == best]
    return tied[(len(tied) - 1) // 2]
