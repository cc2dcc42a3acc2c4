"""Frames of faces with action units: BP4D, BP4D+, DISFA and whatever has a table of image, subject and units.

Folds are subject-exclusive. The published three-fold partitions are those that most papers share (Zhao et al., CVPR
2016; Shao et al., ECCV 2018; Luo et al., IJCAI 2022). Those papers pick epoch and threshold on the test fold; here both
are chosen on subjects that are taken out of the training folds.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from debias.data._common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GroupDataModule,
    ImageFiles,
    check_folder,
    check_fraction,
    check_stated,
    nearest,
    transforms,
)
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DataError, DebiasError
from debias.ops.arguments import checked

__all__ = ["PARTITIONS", "FacialActionUnits"]

# Subjects of each of three folds.
PARTITIONS: dict[str, tuple[str, ...]] = {
    "bp4d": (
        "F001 F002 F008 F009 F010 F016 F018 F023 M001 M004 M007 M008 M012 M014",
        "F003 F005 F011 F013 F020 F022 M002 M005 M010 M011 M013 M016 M017 M018",
        "F004 F006 F007 F012 F014 F015 F017 F019 F021 M003 M006 M009 M015",
    ),
    "disfa": (
        "SN001 SN002 SN009 SN010 SN016 SN026 SN027 SN030 SN032",
        "SN006 SN011 SN012 SN013 SN018 SN021 SN024 SN028 SN031",
        "SN003 SN004 SN005 SN007 SN008 SN017 SN023 SN025 SN029",
    ),
}
_UNIT = re.compile(r"AU\d+[A-Z]*", re.IGNORECASE)


class FacialActionUnits(GroupDataModule):
    """Images in folders and a table of ``image``, ``subject`` and one column per action unit; one fold is the test set.

    ``table`` is CSV with a header, or JSON: a list of records. ``image`` is a path below ``root``, ``subject`` any
    name, and a unit (``AU1``, ``AU12``, ...) is a number: at least ``threshold`` means active. An empty cell, -1, or 9
    (the code of BP4D for "cannot be seen") means not annotated. ``clip``, a column that may be missing, names the
    recording of that subject; by default it is the image's folder.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 3, image_size, image_size)``, normalised by ImageNet's mean and standard
    deviation; ``y`` float32 ``(N, A)`` in {0, 1}, and -1 where not annotated. Tags, int64 ``(N,)``: ``identity``
    (training subjects are 0 .. ``n_identities`` - 1; the subjects of validation and of test are each numbered from 0
    too), ``group``, the same, and ``clip``, the recordings numbered from 0: their frames are nearly the same image, and
    :class:`debias.AttributeProbe` keeps them together with ``unit="clip"``. After ``setup``: ``unit_names``,
    ``subjects`` (of ``"train"``, ``"val"`` and ``"test"``), ``n_identities``, ``group_names``, ``train_groups``
    ``(N,)``, ``group_counts`` of the training set.

    Training flips at random and takes a random crop (scale 0.8 to 1), unless ``augment`` is False; evaluation resizes.

    Args:
        root: folder of the images.
        table: the table's path, below ``root`` or absolute.
        fold: which fold is the test set, from 0.
        partition: ``"bp4d"`` or ``"disfa"`` (the published three folds of 41 and 27 subjects), a list of folds, each a
            list of subjects, or a number of folds to divide the subjects into by ``seed``.
        units: the units to use, in this order; all columns that are called AU<number> by default.
        threshold: from which value on a unit is active: 1 for occurrence (BP4D), 2 for intensities (DISFA).
        val_fraction: share of the training folds' subjects that are kept for validation; at least one is.
        batch_size: samples per batch and rank.
        image_size: height and width of the inputs.
        augment: whether to augment training images.
        n_identities: number of training subjects; checked if given, so that other parts of a configuration can refer to
            it.
        clip_frames: cut each clip into stretches of that many frames, in the order of the table, each a clip of its
            own; for data with one long recording of a subject. Frames on both sides of a cut are still alike.
        balance: None, or "identity" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of validation subjects, folds and the order of training samples.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: the folder, the table, a column, a value, an image or a subject is missing or wrong, or
            a subject is in two folds; the message names it.
        DebiasError: an argument is out of range, or torchvision is not installed (extra ``images``).
    """

    balances = ("group", "identity")

    @checked(threshold="[0, inf)")
    def __init__(
        self,
        root: str | Path,
        table: str | Path = "labels.csv",
        fold: int = 0,
        partition: str | int | list[list[str]] = 3,
        units: list[str] | None = None,
        threshold: float = 1.0,
        val_fraction: float = 0.2,
        batch_size: int = 64,
        image_size: int = 224,
        augment: bool = True,
        n_identities: int | None = None,
        clip_frames: int | None = None,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_fraction("val_fraction", val_fraction, open_ends=True)
        if image_size < 1:
            raise DebiasError(f"Expected argument `image_size` to be at least 1 pixel, but got {image_size}.")
        if clip_frames is not None and (isinstance(clip_frames, bool) or clip_frames < 1):
            raise DebiasError(f"Expected argument `clip_frames` to be an integer >= 1, but got {clip_frames!r}.")
        if isinstance(partition, str) and partition not in PARTITIONS:
            raise DebiasError(
                f"Expected argument `partition` to be a number of folds, a list of folds or one of"
                f" {', '.join(PARTITIONS)}, but got {partition!r}.{nearest(partition, PARTITIONS)}"
            )
        if isinstance(partition, int) and (isinstance(partition, bool) or partition < 2):
            raise DebiasError(f"Expected argument `partition` to be at least 2 folds, but got {partition!r}.")
        folds = partition if isinstance(partition, int) else len(_listed(partition))
        if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < folds:
            raise DebiasError(f"Expected argument `fold` to be from 0 to {folds - 1}, but got {fold!r}.")
        if not isinstance(partition, int):
            _refuse_shared_subjects(_listed(partition))
        self.root = Path(root).expanduser()
        self.table = self.root / table
        self.fold = fold
        self.partition = partition
        self.units = units
        self.threshold = threshold
        self.val_fraction = val_fraction
        self.image_size = image_size
        self.augment = augment
        self.n_identities = n_identities
        self.clip_frames = clip_frames

    def setup(self, stage: str | None = None) -> None:
        """Read and check the table and the files; the same whatever the stage."""
        check_folder(self.root, "the images and the table of action units")
        rows, self.unit_names = _read(self.table, self.root, self.units, self.threshold)
        self.subjects = self._divided(sorted({row.subject for row in rows}))
        check_stated("n_identities", self.n_identities, len(self.subjects["train"]), "the subjects in training")
        self.n_identities = len(self.subjects["train"])
        evaluation = _eval_transform(self.image_size)
        self.train_set = self._make(rows, "train", _train_transform(self.image_size) if self.augment else evaluation)
        self.val_set = self._make(rows, "val", evaluation)
        self.test_set = self._make(rows, "test", evaluation)
        self._describe_groups(self.subjects["train"])

    def _divided(self, subjects: list[str]) -> dict[str, list[str]]:
        """Subjects of training, validation and test."""
        random = np.random.RandomState(self.seed)
        if isinstance(self.partition, int):
            if len(subjects) < self.partition:
                raise DataError(
                    f"Expected at least {self.partition} subjects for as many folds, but got {len(subjects)}."
                )
            folds = [list(part) for part in np.array_split(random.permutation(subjects), self.partition)]
        else:
            folds = _listed(self.partition)
            known = {subject for fold in folds for subject in fold}
            if strangers := [subject for subject in subjects if subject not in known]:
                raise DataError(
                    f"Expected every subject of {self.table} to be in a fold of `partition`, but {', '.join(strangers)}"
                    f" are in none.{nearest(strangers[0], known)} Correct the table or pass the folds."
                )
        here = set(subjects)
        test = sorted(here & set(folds[self.fold]))
        rest = sorted(here & {s for i, fold in enumerate(folds) if i != self.fold for s in fold})
        if not test or len(rest) < 2:
            raise DataError(
                f"Expected subjects in fold {self.fold} and at least two outside it, but got {len(test)} and"
                f" {len(rest)}. Choose another `fold` or `partition`."
            )
        n_val = min(max(1, round(self.val_fraction * len(rest))), len(rest) - 1)
        val = sorted(random.permutation(rest)[:n_val].tolist())
        return {"train": [s for s in rest if s not in val], "val": val, "test": test}

    def _make(self, rows: list[_Row], part: str, transform: Callable[[Any], Any]) -> TaggedDataset:
        numbers = {subject: i for i, subject in enumerate(self.subjects[part])}
        rows = [row for row in rows if row.subject in numbers]
        labels = torch.tensor([row.units for row in rows], dtype=torch.float32)
        ids = torch.tensor([numbers[row.subject] for row in rows])
        images = _Frames([row.path for row in rows], labels, transform)
        return cast(TaggedDataset, tag(images, identity=ids, group=ids, clip=self._clips(rows)))

    def _clips(self, rows: list[_Row]) -> Tensor:
        """The number of each frame's clip, or of its stretch."""
        frames: dict[tuple[str, str], int] = {}  # seen so far
        numbers: dict[tuple[str, str, int], int] = {}
        clips = []
        for row in rows:
            frame = frames[row.subject, row.clip] = frames.get((row.subject, row.clip), -1) + 1
            stretch = frame // self.clip_frames if self.clip_frames else 0
            clips.append(numbers.setdefault((row.subject, row.clip, stretch), len(numbers)))
        return torch.tensor(clips)


class _Frames(ImageFiles):
    """Images whose label is a vector."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, transform: Callable[[Any], Any]) -> None:
        super().__init__(paths, [], transform)
        self.labels = labels  # type: ignore[assignment]


@dataclass
class _Row:
    path: Path
    subject: str
    clip: str
    units: list[float]


def _listed(partition: str | list[list[str]]) -> list[list[str]]:
    return [fold.split() for fold in PARTITIONS[partition]] if isinstance(partition, str) else partition


def _refuse_shared_subjects(folds: list[list[str]]) -> None:
    seen: dict[str, int] = {}
    shared = []
    for i, fold in enumerate(folds):
        for subject in fold:
            if seen.setdefault(subject, i) != i:
                shared.append(f"{subject} (folds {seen[subject]} and {i})")
    if shared:
        raise DataError(
            f"Expected folds without a common subject, but got {', '.join(shared)}: a network would be tested on people"
            " it has seen. Correct `partition`."
        )


def _read(table: Path, root: Path, units: list[str] | None, threshold: float) -> tuple[list[_Row], list[str]]:
    if not table.is_file():
        raise DataError(f"Expected the table {table}, but it is missing. Correct `table`.")
    records = _records(table)
    columns = list(dict.fromkeys(key for record in records for key in record))
    names = units if units is not None else [name for name in columns if _UNIT.fullmatch(name)]
    for name in ("image", "subject", *names):
        if name not in columns:
            raise DataError(
                f"Expected {table} to have the column {name!r}, but it has {', '.join(columns) or 'none'}."
                f"{nearest(name, columns)}"
            )
    if not names:
        raise DataError(f"Expected {table} to have columns AU1, AU2, ..., but got {', '.join(columns)}. Pass `units`.")
    rows = [_row(root, table, number, record, names, threshold) for number, record in enumerate(records, start=1)]
    absent = [row.path for row in rows if not row.path.is_file()]
    if absent:
        raise DataError(
            f"Expected the {len(rows)} images that {table} names, but {len(absent)} are missing, the first of them"
            f" {absent[0]}. Correct `root` or the table."
        )
    return rows, list(names)


def _records(table: Path) -> list[dict[str, Any]]:
    if table.suffix.lower() == ".json":
        try:
            records = json.loads(table.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise DataError(f"Expected {table} to be JSON, but got: {error}.") from error
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(f"Expected {table} to be a list of records, but got {type(records).__name__}.")
        return records
    with table.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _row(root: Path, table: Path, number: int, record: dict[str, Any], names: list[str], threshold: float) -> _Row:
    image, subject = (str(record.get(name) or "").strip() for name in ("image", "subject"))
    if not image or not subject:
        raise DataError(f"Expected an `image` and a `subject` in record {number} of {table}, but got {record}.")
    units = []
    for name in names:
        cell = record.get(name)
        text = "" if cell is None else str(cell).strip()
        try:
            value = float(text) if text else -1.0
        except ValueError:
            value = float("nan")
        if not (value == 9 or value == -1 or 0 <= value <= 5):
            raise DataError(
                f"Expected column `{name}` of {table} to be from 0 to 5, or empty, -1 or 9 where not annotated, but"
                f" got {text!r} in record {number}."
            )
        units.append(-1.0 if value in (-1, 9) else float(value >= threshold))
    clip = str(record.get("clip") or "").strip() or str(Path(image).parent)
    return _Row(root / image, subject, clip, units)


def _eval_transform(size: int) -> Callable[[Any], Any]:
    T = transforms()
    return T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _train_transform(size: int) -> Callable[[Any], Any]:
    T = transforms()
    crop = [T.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.9, 1.1)), T.RandomHorizontalFlip()]
    return T.Compose([*crop, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
