"""What would it learn? How well each column predicts the label, and how easily a network reads it, before training.

Networks prefer what is predictive and *available*, easy to read, to what is merely predictive (Hermann et al., On the
Foundations of Shortcut Learning, ICLR 2024). A column that tells the label and is read from an untrained network better
than the label itself is where a shortcut will come from.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from debias.audit.columns import Column, encode
from debias.audit.features import probe_table
from debias.audit.groups import target_column
from debias.audit.model import collect, own_steps, quiet
from debias.audit.statistics import wilson_interval
from debias.errors import DebiasError
from debias.ops.arguments import check_count, checked

__all__ = ["before_training", "predictivity"]

Array = np.ndarray[Any, Any]
PREDICTIVE = 0.1  # of what chance leaves to tell


@checked(first=True, confidence="(0, 1)")
def before_training(
    model: nn.Module,
    loader: Any,
    *,
    metadata: pd.DataFrame | None = None,
    epochs: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Say which columns a network is likely to use as a shortcut, before the GPU hours.

    Args:
        model: a LightningModule of a classifier, untrained; a copy is trained.
        loader: the training loader.
        metadata: a row for each sample of its dataset, in its order; tags are columns, too.
        epochs: how long the copy is trained; 0 for not at all.
        confidence: of the intervals.
        seed: of the halves that predict and are predicted.
        progress: show bars.
        **options: see :func:`debias.audit.model.audit`: ``target``, ``logits``, ``loss``, ``task``, ``classes``.

    Returns:
        One row a column, the riskiest first, and one for the label itself: ``predictivity``, the share of labels that
        are told by the column alone, with ``low`` and ``high``, and ``chance``; ``untrained`` and ``trained``, how
        much of the column a linear probe reads from the features beyond the shuffled baseline, 0 to 1; ``warning``.

    Raises:
        DebiasError: the model is no classifier with features.
    """
    check_count("epochs", epochs, 0)
    check_count("seed", seed, 0)
    network = copy.deepcopy(model)
    tables = {}
    for when in ("untrained", "trained"):
        if when == "trained":
            if not epochs:
                continue
            with quiet():
                pytorch = import_module(_package(model))
                trainer = pytorch.Trainer(
                    max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
                    enable_model_summary=False, enable_progress_bar=progress, limit_val_batches=0,
                    num_sanity_val_steps=0,
                )  # fmt: skip
                # Lightning warns of a validation step without a loader, though none is wanted.
                trainer.fit(network, loader, loader if "validation_step" in own_steps(network) else None)
        samples = collect(network, loader, metadata=metadata, progress=progress, **options)
        if samples.task != "classification" or not samples.features:
            raise DebiasError(
                f"Expected a classifier whose logits are made by a linear layer, but got {samples.task}"
                f" {'with' if samples.features else 'without'} features. Name a layer: `layers=['dotted.path']`."
            )
        samples.columns, _ = encode(samples.metadata)
        label = target_column(samples)
        samples.columns = [*label, *samples.columns]
        found = probe_table(samples, confidence=confidence, seed=seed)
        beyond = (found["accuracy"] - found["shuffled_accuracy"]) / (1 - found["shuffled_accuracy"])
        tables[when] = beyond.groupby(found["column"]).max().clip(lower=0)
    assert samples.target is not None
    rows = [
        {"column": c.name} | predictivity(samples.target, c, confidence=confidence, seed=seed) for c in samples.columns
    ]
    table = pd.DataFrame(rows)
    for when, values in tables.items():
        table[when] = table["column"].map(values)
    return _warned(table, label[0].name)


def predictivity(target: Array, column: Column, *, confidence: float, seed: int) -> dict[str, float]:
    """How often the most frequent label of each value is right: learned on one half, scored on the other."""
    fit = np.random.default_rng(seed).random(len(target)) < 0.5
    k = int(target.max()) + 1
    counts = np.bincount(column.codes[fit] * k + target[fit], minlength=len(column) * k).reshape(-1, k)
    common = int(np.bincount(target[fit], minlength=k).argmax())
    guess = np.where(counts.sum(1) > 0, counts.argmax(1), common)[column.codes[~fit]]
    right, n = int((guess == target[~fit]).sum()), int((~fit).sum())
    low, high = wilson_interval(np.array(right), np.array(n), confidence)
    chance = float((target[~fit] == common).mean())
    return {"predictivity": right / n, "low": float(low), "high": float(high), "chance": chance, "count": n}


def _warned(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """Say which columns are predictive, and at least as easy to read as the label."""
    own = table.set_index("column").loc[label]
    told = (table["predictivity"] - table["chance"]) / (1 - table["chance"])
    easy = table["untrained"] >= own["untrained"]
    risky = (table["low"] > table["chance"]) & (told > PREDICTIVE) & easy & (table["column"] != label)
    table["warning"] = [
        f"{row.column} tells the label in {row.predictivity:.1%} and is read from the untrained network better than the"
        " label itself: expect a shortcut."
        if bad else ""
        for row, bad in zip(table.itertuples(), risky, strict=True)
    ]  # fmt: skip
    order = np.lexsort([-(told * table["untrained"]), ~risky, table["column"] == label])
    return table.iloc[order].reset_index(drop=True)


def _package(model: Any) -> str:
    bases = [cls.__module__ for cls in type(model).__mro__ if cls.__name__ == "LightningModule"]
    if not bases:
        raise DebiasError(
            f"Expected a LightningModule, which says how it is trained, but got {type(model).__name__}. Pass `epochs=0`"
            " to look at the untrained network alone."
        )
    return "lightning.pytorch" if bases[0].startswith("lightning") else "pytorch_lightning"
