"""What a run leaves behind: one JSON file, whole or not there, that tables and figures are made from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from debias.compare.schema import WHAT, check_record, check_spec, digest
from debias.errors import DebiasError, unwritable

__all__ = [
    "Candidate",
    "Measures",
    "RunRecord",
    "configs_hash",
    "default_group",
    "find_records",
    "measures",
    "read_record",
    "read_spec",
    "shift_score",
    "worst_of",
    "write_json",
]

FORMAT = 1
RECORD = "result.json"
SPEC = "spec.json"  # beside it: what the run is to do
PROGRESS = "progress.json"  # of a run that is being made: steps taken and to take
_WORST = re.compile(
    r"^(?P<stage>\w+)/(?P<prefix>(?:[^/]+/)?)worst_(?P<of>group|domain)_(?P<metric>[^/]+)(?P<loader>/.+)?$"
)


@dataclass(frozen=True)
class Candidate:
    """One checkpoint of a run, chosen by one rule, and its metrics.

    Attributes:
        epoch: epochs trained, from 1.
        step: optimiser steps taken.
        val: what a validation of it logged, by name (``val/worst_group_accuracy``, ``val_shift/mean``).
        test: what a test of it logged.
        checkpoint: its file, relative to the run's folder.
    """

    epoch: int
    step: int
    val: dict[str, float]
    test: dict[str, float]
    checkpoint: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One run: a method, a seed and a setting of hyperparameters on a recipe.

    Attributes:
        id: name of the run and of its folder, unique within a comparison.
        recipe: name of the recipe.
        recipe_hash: hash of what all runs of the comparison share; runs of another one are not comparable.
        method: name of the method's file, ``"group_dro"``.
        seed: seed of data, initialisation and order.
        status: ``"finished"`` or ``"failed"``.
        params: what differs from the recipe by the grid, by key; empty for the recipe's own values.
        held_out: the training domain that this run did not see, for leave-one-domain-out; else None.
        config_hash: hash of its config files; the same for all seeds of a method and setting. Empty where unknown.
        direction: ``"max"`` where higher metrics are better, else ``"min"``.
        candidates: checkpoints by the rule that chose them; ``"last"`` is always there.
        error: of a failed run: its last line.
        warnings: what debias said that would mislead a reader, each once.
        steps: optimiser steps of the whole training.
        seconds_per_step: wall-clock time of training, without validation, over steps.
        seconds: wall-clock time of the whole run, from the start of its process on; of a run that was killed and went
            on, without what was lost.
        peak_memory: bytes, until training ended; of the device, or of the process where that is the CPU.
        device: what it ran on, in words.
        versions: of python, debias, torch, lightning and others, by name.
        git: revision of the working folder and whether it was changed, or empty.
        started: time in UTC, ISO 8601.
        folder: where it lies; not in the file.
    """

    id: str
    recipe: str
    recipe_hash: str
    method: str
    seed: int
    status: str
    params: dict[str, Any] = field(default_factory=dict)
    held_out: int | None = None
    config_hash: str = ""
    direction: str = "max"
    candidates: dict[str, Candidate] = field(default_factory=dict)
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    steps: int = 0
    seconds_per_step: float = math.nan
    seconds: float = math.nan
    peak_memory: int = 0
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    folder: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether it trained and tested to the end."""
        return self.status == "finished"

    def save(self, folder: Path) -> None:
        """Write ``result.json``, whole or not at all.

        Args:
            folder: of the run.
        """
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        content = json.loads(json.dumps({"format": FORMAT} | content, default=str))
        write_json(folder / RECORD, content | {"checksum": digest(content)})


@dataclass(frozen=True)
class Measures:
    """The figures of one test (or validation), whatever monitor logged them.

    Attributes:
        metric: ``"accuracy"``, ``"map"``, ``"f1"``.
        average: over all samples; over the loaders where there are several.
        worst: of the worst group, domain or loader; NaN where nothing tells groups apart.
        by_group: of each group, NaN for one without samples.
        adjusted: mean over groups, weighted by their shares of the training set, as published for Waterbirds; NaN where
            the monitor was not told the training counts.
    """

    metric: str
    average: float
    worst: float
    by_group: dict[str, float]
    adjusted: float = math.nan


def default_group(recipe: str, recipe_hash: str) -> str:
    """The W&B group of a comparison: the recipe, and the hash of what its runs share."""
    return f"{recipe}-{recipe_hash[:8]}"


def measures(metrics: Mapping[str, float], stage: str, direction: str = "max") -> Measures:
    """Find the figures among what the monitors logged, by their names.

    ``<stage>/worst_group_<metric>`` or ``<stage>/worst_domain_<metric>`` gives the metric's name, and with it
    ``<stage>/<metric>``, ``<stage>/adjusted_<metric>`` and ``<stage>/<metric>_by_group/<name>``; the first one logged
    counts. With several loaders, each is a group: the averages are their means, the worst the worst of their averages.

    Args:
        metrics: by name, as logged.
        stage: ``"val"`` or ``"test"``.
        direction: ``"max"`` where higher is better, else ``"min"``.

    Returns:
        The figures; all NaN and without a name where no monitor logged any.

    Example:
        >>> from debias.compare.records import measures
        >>> logged = {"test/accuracy": 0.9, "test/worst_group_accuracy": 0.5}
        >>> logged |= {"test/accuracy_by_group/a": 0.5, "test/accuracy_by_group/b": 0.95}
        >>> found = measures(logged, "test")
        >>> found.metric, found.average, found.worst, found.by_group
        ('accuracy', 0.9, 0.5, {'a': 0.5, 'b': 0.95})
    """
    found = [m for m in map(_WORST.match, metrics) if m and m["stage"] == stage]
    if not found:
        return Measures("", math.nan, math.nan, {})
    first = found[0]
    metric, of, start = first["metric"], first["of"], f"{stage}/{first['prefix']}"
    loaders = [m["loader"] for m in found if (m["metric"], m["of"], m["prefix"]) == (metric, of, first["prefix"])]
    if loaders == [None]:
        place = f"{start}{metric}_by_{of}/"
        by_group = {key[len(place) :]: value for key, value in metrics.items() if key.startswith(place)}
        average, adjusted = (metrics.get(f"{start}{name}{metric}", math.nan) for name in ("", "adjusted_"))
        return Measures(metric, average, metrics[first.group()], by_group, adjusted)
    by_loader = {loader.strip("/"): metrics.get(f"{start}{metric}{loader}", math.nan) for loader in loaders}
    known = [value for value in by_loader.values() if not math.isnan(value)]
    worst = (min if direction == "max" else max)(known, default=math.nan)
    adjusted = _mean([metrics.get(f"{start}adjusted_{metric}{loader}", math.nan) for loader in loaders])
    return Measures(metric, _mean(known), worst, by_loader, adjusted)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def shift_score(metrics: Mapping[str, float]) -> float:
    """The crafted-shift score: over the families that the run was not trained on, where that is logged apart."""
    return metrics.get("val_shift/held_out_mean", metrics.get("val_shift/mean", math.nan))


def worst_of(metrics: Mapping[str, float], name: str) -> float:
    """The worst group on the validation set, as the GroupMonitor of that name logged it; NaN where there is none."""
    start = f"val/{name}/worst_group_"
    return next((value for key, value in metrics.items() if key.startswith(start)), math.nan)


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all, whatever happens meanwhile: beside it first, then in its place.

    Raises:
        DebiasError: it cannot be written, say because the disk is full.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def read_record(path: Path) -> RunRecord:
    """Read a run's ``result.json``, and check that it is what was written, and of the run that its folder is of.

    Args:
        path: the file.

    Raises:
        DebiasError: it is damaged, of another format, or of another run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number = content.pop("format")
        if number != FORMAT:
            raise DebiasError(
                f"Expected {path} to be of format {FORMAT}, but got {number}: use the debias that wrote it."
            )
        checksum = content.pop("checksum", None)
        check_record(content)
        if checksum is not None and checksum != digest({"format": FORMAT} | content):
            raise ValueError("it is not what was written: its checksum is another")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DebiasError(
            f"Expected {path} to be a run's result as `debias compare` writes it, but it cannot be read"
            f" ({type(error).__name__}: {error}). Nothing was changed. Delete that file, and the run is made again."
        ) from error
    if (path.parent / SPEC).exists():
        _refuse_another_run(path, content)
    candidates = {name: Candidate(**candidate) for name, candidate in content["candidates"].items()}
    return RunRecord(**content | {"candidates": candidates}, folder=path.parent)


def read_spec(folder: Path) -> dict[str, Any]:
    """Read what a run is to do.

    Args:
        folder: of the run.

    Raises:
        DebiasError: there is nothing of the kind.
    """
    try:
        spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        check_spec(spec)
    except (OSError, ValueError, RecursionError) as error:
        raise DebiasError(
            f"Expected {folder / SPEC} to say what the run does, but it cannot be read ({error}). Nothing was changed."
            f" Delete {folder}, and the run is made again."
        ) from error
    return dict(spec)


def configs_hash(spec: Mapping[str, Any]) -> str:
    """Of what a run is configured to do, but for its seed and the domain that it leaves out."""
    return hashlib.sha256(json.dumps(spec["configs"], sort_keys=True, default=str).encode()).hexdigest()[:12]


def _refuse_another_run(path: Path, content: Mapping[str, Any]) -> None:
    spec = read_spec(path.parent)
    wanted = {key: spec[key] for key in WHAT if key in content}
    if content.get("config_hash"):
        wanted["config_hash"] = configs_hash(spec)
    for key, value in wanted.items():
        if content[key] != value:
            raise DebiasError(
                f"Expected {path} to be the result of the run that {path.parent / SPEC} describes, but its `{key}` is"
                f" {content[key]!r} instead of {value!r}. Nothing was changed. Delete that file, and the run is made"
                " again."
            )


def find_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read all runs below ``folders``, at any depth, in the order of their paths; a run that lies there twice once.

    Args:
        folders: of comparisons, runs, or anything around them.

    Raises:
        DebiasError: a folder does not exist or holds no run, a file is damaged, or the runs are of several recipes, or
            those of one method and setting were configured differently.
    """
    records: dict[str, RunRecord] = {}
    found: list[RunRecord] = []
    for folder in folders:
        if not folder.is_dir():
            raise DebiasError(f"Expected a folder of runs, but there is none at {folder}.")
        files = sorted(folder.rglob(RECORD))
        if not files:
            raise DebiasError(f"Expected {folder} to hold runs of `debias compare`, but there is no {RECORD} below it.")
        for record in map(read_record, files):
            found.append(record)
            known = records.get(record.id)
            if known is None or (record.finished and not known.finished):
                records[record.id] = record
    _refuse_mixture(found)
    return list(records.values())


def _refuse_mixture(records: Iterable[RunRecord]) -> None:
    first: RunRecord | None = None
    configured: dict[tuple[str, str], RunRecord] = {}
    for record in records:
        first = first or record
        if record.recipe_hash != first.recipe_hash:
            raise DebiasError(
                f"Expected runs of one recipe, but {first.folder} is of `{first.recipe}` ({first.recipe_hash}) and"
                f" {record.folder} of `{record.recipe}` ({record.recipe_hash}): what the runs share differs. Report"
                " them separately."
            )
        if not record.config_hash:
            continue
        setting = json.dumps(record.params, sort_keys=True, default=str)
        other = configured.setdefault((record.method, setting), record)
        if record.config_hash != other.config_hash:
            raise DebiasError(
                f"Expected all runs of `{record.method}` with one setting to be configured alike, but {other.folder}"
                f" and {record.folder} are not: the method's file is another one. Report them separately."
            )
