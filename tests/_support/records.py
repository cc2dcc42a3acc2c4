"""Made-up runs: what a comparison leaves behind, without training anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from debias.compare.records import Candidate, RunRecord

GROUPS = ("land bird", "land water", "water bird", "water land")


def logged(stage: str, values: Sequence[float], names: Sequence[str] = GROUPS, metric: str = "accuracy", of="group"):
    """What a monitor logs of groups of equal size; the worst is the least."""
    found = {f"{stage}/{metric}": float(np.nanmean(values)), f"{stage}/worst_{of}_{metric}": float(np.nanmin(values))}
    return found | {f"{stage}/{metric}_by_{of}/{name}": float(v) for name, v in zip(names, values, strict=True)}


def record(
    method: str,
    seed: int,
    val: Sequence[float] | Mapping[str, float] = (0.9, 0.8, 0.7, 0.6),
    test: Sequence[float] | Mapping[str, float] = (0.9, 0.8, 0.7, 0.6),
    *,
    params: dict[str, Any] | None = None,
    held_out: int | None = None,
    names: Sequence[str] = GROUPS,
    recipe: str = "made_up",
    recipe_hash: str = "0123",
    rules: Sequence[str] = ("val_average", "val_worst_group", "val_shift", "last"),
    **options: Any,
) -> RunRecord:
    """One finished run, whose candidates are all alike."""
    val = val if isinstance(val, Mapping) else logged("val", val, names)
    test = test if isinstance(test, Mapping) else logged("test", test, names)
    test = {} if held_out is not None else test
    params = params or {}
    end = "".join(f"-{k}={v}" for k, v in params.items()) + (f"-without{held_out}" if held_out is not None else "")
    candidates = {rule: Candidate(i + 1, 10 * (i + 1), dict(val), dict(test)) for i, rule in enumerate(rules)}
    options = {
        "steps": 100,
        "seconds_per_step": 0.01 + 0.001 * seed,
        "seconds": 2.0,
        "peak_memory": 100 * 2**20,
        "device": "a CPU",
        "versions": {"python": "3.12", "debias": "0.1", "torch": "2.9"},
        "git": {"revision": "abcdef0123456789", "changed": False},
        "warnings": [],
        "started": "2026-03-04T05:06:07+00:00",
    } | options
    return RunRecord(
        f"{method}-{seed}{end}", recipe, recipe_hash, method, seed, "finished", params, held_out,
        candidates=candidates, **options,
    )  # fmt: skip


def failed(method: str, seed: int, error: str = "ValueError: no", params: dict[str, Any] | None = None, **options: Any):
    """One failed run."""
    return RunRecord(
        f"{method}-{seed}-failed", options.pop("recipe", "made_up"), options.pop("recipe_hash", "0123"), method, seed,
        "failed", params or {}, error=error, **options,
    )  # fmt: skip


def save(records: Sequence[RunRecord], folder: Path) -> Path:
    """Write each run's ``result.json`` below ``folder``."""
    for run in records:
        (folder / run.id).mkdir(parents=True, exist_ok=True)
        run.save(folder / run.id)
    return folder


def made_up(methods: Sequence[str], seeds: Sequence[int] = (0, 1, 2), groups: Sequence[str] = GROUPS, seed: int = 0):
    """Finished runs with random figures of each group."""
    random = np.random.RandomState(seed)
    records = []
    for method in methods:
        level = random.uniform(0.3, 0.95, len(groups))
        for s in seeds:
            val, test = (np.clip(level + random.normal(0, 0.03, len(groups)), 0, 1) for _ in range(2))
            records.append(record(method, s, val, test, names=groups))
    return records


def log_weights(folder: Path, run: RunRecord, key: str = "group_weight", names: Sequence[str] = GROUPS) -> None:
    """Write a CSVLogger's file with weights that move away from equal ones, every other row without any."""
    place = folder / run.id / "csv"
    place.mkdir(parents=True, exist_ok=True)
    lines = ["epoch,step,train/loss," + ",".join(f"train/{key}/{name}" for name in names)]
    for step in range(0, 200, 10):
        logits = np.linspace(0, 1 + 0.2 * run.seed, len(names)) * step / 100
        weights = np.exp(logits) / np.exp(logits).sum()
        lines.append(f"0,{step},0.5," + ",".join(f"{w:.6f}" for w in weights))
        lines.append(f"0,{step + 5},0.5," + "," * (len(names) - 1))
    (place / "metrics.csv").write_text("\n".join(lines) + "\n")
