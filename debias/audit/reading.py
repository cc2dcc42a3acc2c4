"""A table of predictions, and metadata beside it: read and checked before anything is counted."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from debias.audit.samples import TASKS, Samples
from debias.errors import DebiasError
from debias.ops.arguments import check_choice

__all__ = ["SCORES", "join", "read_table"]

SCORES = ("probabilities", "logits")
Array = np.ndarray[Any, Any]


def read_table(
    frame: pd.DataFrame,
    *,
    target: str = "target",
    prediction: str = "prediction",
    score: str = "score",
    scores: str | None = None,
    task: str | None = None,
    positive: str | None = None,
) -> Samples:
    """Read targets and predictions from a table; what is left of it is metadata.

    Args:
        frame: one row a sample. Classification and regression have the columns ``target`` and ``prediction``;
            classification may have ``score`` (of the positive class) or ``score_<class>`` for each class, then
            ``prediction`` may be absent. Multi-label has ``target_<label>`` and ``prediction_<label>`` or
            ``score_<label>`` for each label.
        target: another name of that column, or what comes before the label.
        prediction: likewise.
        score: likewise.
        scores: what the scores are, ``"probabilities"`` or ``"logits"``: asked, as a guess would be wrong silently.
        task: one of ``TASKS``; by default told by the columns.
        positive: name of the positive class of two; by default the last in order.

    Raises:
        DebiasError: a column is missing or holds what it must not; the message says which and what to do.
    """
    if not len(frame):
        raise DebiasError("Expected a table with a row for each sample, but it has none.")
    frame = frame.reset_index(drop=True)
    labels = _behind(frame, target) if target not in frame else []
    task = task or _task(frame, target, prediction, labels)
    check_choice("task", task, TASKS)
    if scores is not None:
        check_choice("scores", scores, SCORES)
    if task == "multilabel":
        return _multilabel(frame, labels or _behind(frame, target), target, prediction, score, scores)
    _need(frame, target)
    if task == "regression":
        return _regression(frame, target, prediction)
    return _classification(frame, target, prediction, score, scores, positive)


def _task(frame: pd.DataFrame, target: str, prediction: str, labels: list[str]) -> str:
    if labels:
        return "multilabel"
    _need(frame, target)
    true = frame[target]
    if not pd.api.types.is_float_dtype(true) and (prediction not in frame or _whole(frame[prediction])):
        return "classification"
    if _whole(true) and (prediction not in frame or _whole(frame[prediction])):
        return "classification"
    if not _whole(true):
        return "regression"
    raise DebiasError(
        f"Expected `task` to say what is predicted, but `{target}` holds whole numbers and `{prediction}` does not."
        " Pass `task='regression'`; of a classifier give class names or ids, or its scores as `score_<class>`."
    )


def _whole(series: pd.Series[Any]) -> bool:
    """Whether all values are names or whole numbers."""
    if not pd.api.types.is_float_dtype(series):
        return True
    known = series.dropna()
    return bool((known == known.round()).all())


def _classification(
    frame: pd.DataFrame, target: str, prediction: str, score: str, scores: str | None, positive: str | None
) -> Samples:
    true = _names(frame[target], target)
    named = {name: f"{score}_{name}" for name in _behind(frame, score)} if score not in frame else {}
    used = [target]
    if prediction in frame:
        used.append(prediction)
        guess = _names(frame[prediction], prediction)
        classes = _in_order({*true, *guess, *named})
        if not set(true) & set(guess):
            raise DebiasError(
                f"Expected `{prediction}` to hold classes of `{target}`, but they have none in common: {_some(guess)}"
                f" against {_some(true)}. Write both alike."
            )
    else:
        guess, classes = None, _in_order({*true, *named})
        if score not in frame and not named:
            _need(frame, prediction)
    if len(set(true)) < 2:
        raise DebiasError(
            f"Expected `{target}` to hold at least two classes, but all {len(frame)} samples are {true[0]!r}."
        )
    table: Array | None = None
    if score in frame:
        used.append(score)
        if len(classes) != 2:
            raise DebiasError(
                f"Expected one score of two classes, but there are {len(classes)}: {_some(classes)}. Give a column for"
                f" each, `{score}_<class>`."
            )
        one = _numbers(frame[score], score)
        kind = _check_scores(one[:, None], scores, f"`{score}`", exclusive=False)
        chosen = classes.index(_positive(positive, classes))
        table = np.stack([-one, one], 1) if chosen == 1 else np.stack([one, -one], 1)
        decided = one > (0.5 if kind == "probabilities" else 0.0)
        guess = guess or [classes[chosen if yes else 1 - chosen] for yes in decided]
    elif named:
        used += list(named.values())
        if absent := [name for name in classes if name not in named]:
            raise DebiasError(
                f"Expected a score for each class, but there is no column for {_some(absent)}. Write"
                f" `{score}_{absent[0]}`."
            )
        table = np.stack([_numbers(frame[named[name]], named[name]) for name in classes], 1)
        _check_scores(table, scores, f"`{score}_<class>`", exclusive=True)
        guess = guess or [classes[i] for i in table.argmax(1)]
    assert guess is not None
    ids = {name: i for i, name in enumerate(classes)}
    y, z = (np.array([ids[name] for name in each]) for each in (true, guess))
    return Samples(
        "classification", y, z, tuple(classes), table, "accuracy", y == z, True, frame.drop(columns=used),
        positive=classes.index(_positive(positive, classes)) if len(classes) == 2 else -1,
    )  # fmt: skip


def _multilabel(
    frame: pd.DataFrame, labels: list[str], target: str, prediction: str, score: str, scores: str | None
) -> Samples:
    if not labels:
        raise DebiasError(f"Expected the columns `{target}_<label>` of a multi-label table, but there is none.")
    true, table, guess = [], [], []
    used = []
    for label in labels:
        true.append(_binary(frame[f"{target}_{label}"], f"{target}_{label}"))
        used.append(f"{target}_{label}")
        if f"{score}_{label}" in frame:
            used.append(f"{score}_{label}")
            table.append(_numbers(frame[used[-1]], used[-1]))
        if f"{prediction}_{label}" in frame:
            used.append(f"{prediction}_{label}")
            guess.append(_binary(frame[used[-1]], used[-1]))
        elif f"{score}_{label}" not in frame:
            _need(frame, f"{prediction}_{label}")
    found = np.stack(table, 1) if len(table) == len(labels) else None
    if found is not None:
        kind = _check_scores(found, scores, f"`{score}_<label>`", exclusive=False)
    if len(guess) < len(labels):
        if found is None:
            raise DebiasError("Expected a prediction or a score for each label, but some labels lack both kinds.")
        guess = list((found > (0.5 if kind == "probabilities" else 0)).T)
    y, z = np.stack(true, 1), np.stack(guess, 1).astype(bool)
    right = (y == z).mean(1)
    return Samples(
        "multilabel", y, z, tuple(labels), found, "share of right labels", right, True, frame.drop(columns=used)
    )


def _regression(frame: pd.DataFrame, target: str, prediction: str) -> Samples:
    _need(frame, prediction)
    y, z = _numbers(frame[target], target), _numbers(frame[prediction], prediction)
    rest = frame.drop(columns=[target, prediction])
    return Samples("regression", y, z, (), None, "absolute error", np.abs(y - z), False, rest)


def join(frame: pd.DataFrame, metadata: pd.DataFrame, key: str | None) -> pd.DataFrame:
    """Put metadata beside the samples: by ``key``, or row by row.

    Raises:
        DebiasError: the numbers of rows differ, an id occurs twice or is missing, or a column is in both.
    """
    if key is None:
        if len(frame) != len(metadata):
            raise DebiasError(
                f"Expected the metadata to have a row for each of the {len(frame)} samples, in their order, but it has"
                f" {len(metadata)}. Name a column that both have, such as an id or a file name: `id='image_id'`."
            )
        metadata = metadata.reset_index(drop=True)
        both = [name for name in metadata if name in frame]
        other = metadata.drop(columns=both)
        for name in both:
            if not (frame[name].reset_index(drop=True).astype(str) == metadata[name].astype(str)).all():
                raise DebiasError(
                    f"Expected the metadata to be in the order of the samples, but their columns `{name}` differ. Join"
                    f" by a column of ids, `id='{name}'` if it is one, or rename it."
                )
        return pd.concat([frame.reset_index(drop=True), other], axis=1)
    for what, table in (("the samples", frame), ("the metadata", metadata)):
        if key not in table:
            raise DebiasError(f"Expected `id={key!r}` to be a column of {what}{_nearest(key, table.columns)}")
        if table[key].duplicated().any():
            twice = table[key][table[key].duplicated()].iloc[0]
            raise DebiasError(
                f"Expected every id of `{key}` to occur once in {what}, but {twice} occurs"
                f" {int((table[key] == twice).sum())} times."
            )
    absent = ~frame[key].isin(metadata[key])
    if absent.any():
        raise DebiasError(
            f"Expected the metadata to hold every id of `{key}`, but {int(absent.sum())} of {len(frame)} samples have"
            f" none, e.g. {frame[key][absent].iloc[0]}."
        )
    twice = [name for name in metadata if name in frame and name != key]
    return frame.merge(metadata.drop(columns=twice), on=key, how="left", validate="one_to_one")


def _need(frame: pd.DataFrame, name: str) -> None:
    if name not in frame:
        raise DebiasError(f"Expected the column `{name}`, but the table has none{_nearest(name, frame.columns)}")


def _nearest(name: str, columns: Any) -> str:
    known = [str(each) for each in columns]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is `{close[0]}`." if close else f". There are: {', '.join(known[:20])}."


def _behind(frame: pd.DataFrame, prefix: str) -> list[str]:
    return [str(name)[len(prefix) + 1 :] for name in frame if str(name).startswith(f"{prefix}_")]


def _known(series: pd.Series[Any], name: str) -> None:
    missing = series.isna()
    if missing.any():
        raise DebiasError(
            f"Expected `{name}` to have a value for every sample, but {int(missing.sum())} of {len(series)} are"
            f" missing, the first in row {int(missing.to_numpy().argmax())} (counted from 0). Leave these rows out, or"
            " mend them."
        )


def _names(series: pd.Series[Any], name: str) -> list[str]:
    _known(series, name)
    if pd.api.types.is_float_dtype(series) and _whole(series):
        series = series.astype(int)
    return [str(value) for value in series]


def _numbers(series: pd.Series[Any], name: str) -> Array:
    _known(series, name)
    try:
        found = series.to_numpy(dtype=float)
    except (TypeError, ValueError) as error:
        raise DebiasError(f"Expected `{name}` to hold numbers, but got {series.iloc[0]!r}.") from error
    if not np.isfinite(found).all():
        raise DebiasError(f"Expected `{name}` to hold finite numbers, but {int((~np.isfinite(found)).sum())} are not.")
    return found


def _binary(series: pd.Series[Any], name: str) -> Array:
    found = _numbers(series, name)
    if not np.isin(found, (0, 1)).all():
        raise DebiasError(f"Expected `{name}` to hold 0 and 1, but got {found[~np.isin(found, (0, 1))][0]:g}.")
    return found.astype(bool)


def _check_scores(table: Array, scores: str | None, what: str, *, exclusive: bool) -> str:
    if scores not in SCORES:
        raise DebiasError(
            f"Expected `scores` to say what {what} holds, but got {scores!r}. Pass `scores='probabilities'` or"
            " `scores='logits'`."
        )
    if scores == "probabilities":
        if table.min() < 0 or table.max() > 1:
            raise DebiasError(
                f"Expected probabilities in {what} to lie in [0, 1], but they reach from {table.min():.3g} to"
                f" {table.max():.3g}. If they are logits, pass `scores='logits'`."
            )
        off = np.abs(table.sum(1) - 1)
        if exclusive and off.max() > 0.01:
            raise DebiasError(
                f"Expected the probabilities in {what} to sum to 1, but those of row {int(off.argmax())} sum to"
                f" {table.sum(1)[off.argmax()]:.3g}."
            )
    return scores


def _positive(positive: str | None, classes: Sequence[str]) -> str:
    if positive is not None and positive not in classes:
        raise DebiasError(f"Expected `positive` to be one of the classes {_some(classes)}, but got {positive!r}.")
    return classes[-1] if positive is None else positive


def _in_order(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
