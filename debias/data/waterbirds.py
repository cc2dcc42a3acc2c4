"""Waterbirds: birds on backgrounds of land or water. Sagawa et al., ICLR 2020, sec. 3 and appendix C.1."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debias.data._common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GroupDataModule,
    check_folder,
    check_stated,
    tagged_images,
    transforms,
)
from debias.data.tagging import TaggedDataset
from debias.errors import DataError, DebiasError
from debias.ops.arguments import checked

__all__ = ["Waterbirds"]

_COLUMNS = {"y": 2, "place": 2, "split": 3}  # column: number of values
_SPLITS = ("training", "validation", "test")
_DOWNLOAD = "Download and extract `waterbird_complete95_forest2water2.tar.gz` and set `root` to its folder."


class Waterbirds(GroupDataModule):
    """The official Waterbirds folder: waterbirds and landbirds, mostly on the background they live on.

    ``root`` is the extracted archive ``waterbird_complete95_forest2water2``: ``metadata.csv`` with the columns
    ``img_filename``, ``y`` (0 landbird, 1 waterbird), ``place`` (0 land, 1 water) and ``split`` (0 training, 1
    validation, 2 test), and the images it names. In training 95 % of the birds are on their own background; in
    validation and test each class is on both equally often, which is why the published average accuracy is the
    *adjusted* one, weighted by training proportions (``GroupAccuracy(train_counts=data.group_counts)``).

    Batches are ``(x, y)``: ``x`` float32 ``(N, 3, image_size, image_size)``, normalised by ImageNet's mean and standard
    deviation, ``y`` int64 ``(N,)``. Tags, int64 ``(N,)``: ``group`` = 2 * y + place, and ``place``,
    also under the name ``domain``. After ``setup``:
    ``group_names``, ``train_groups`` ``(N,)``, ``group_counts`` ``(4,)`` of the training set.

    Transforms are those of the published code (``kohpangwei/group_DRO``, ``data/cub_dataset.py``): evaluation resizes
    to a square of 256 / 224 times ``image_size``, not keeping the aspect ratio, and crops the centre; training does
    the same, or with ``augment`` takes a random crop (scale 0.7 to 1, aspect ratio 3/4 to 4/3) and flips at random.

    Args:
        root: folder of ``metadata.csv``.
        batch_size: samples per batch and rank; published: 128.
        image_size: height and width of the inputs.
        augment: whether to augment training images.
        n_groups: always 4; stated so that other parts of a configuration can refer to it.
        n_domains: always 2, land and water; stated for the same reason.
        balance: None, or "group" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the order of training samples.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: the folder, the table, a column, a value or an image is missing or wrong; the message
            names it.
        DebiasError: an argument is out of range, or torchvision is not installed (extra ``images``).
    """

    @checked()
    def __init__(
        self,
        root: str | Path,
        batch_size: int = 128,
        image_size: int = 224,
        augment: bool = True,
        n_groups: int = 4,
        n_domains: int = 2,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 4, "bird x background")
        check_stated("n_domains", n_domains, 2, "land and water")
        if image_size < 1:
            raise DebiasError(f"Expected argument `image_size` to be at least 1 pixel, but got {image_size}.")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.augment = augment
        self.n_groups = n_groups
        self.n_domains = n_domains

    def setup(self, stage: str | None = None) -> None:
        """Read and check the table and the files; the same whatever the stage."""
        rows = _read_metadata(self.root)
        eval_transform = _eval_transform(self.image_size)
        train_transform = _train_transform(self.image_size) if self.augment else eval_transform
        self.train_set = _make(rows, 0, train_transform)
        self.val_set = _make(rows, 1, eval_transform)
        self.test_set = _make(rows, 2, eval_transform)
        self._describe_groups(["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"])


@dataclass
class _Row:
    path: Path
    y: int
    place: int
    split: int


def _make(rows: list[_Row], split: int, transform: Callable[[Any], Any]) -> TaggedDataset:
    rows = [row for row in rows if row.split == split]
    labels, places = [row.y for row in rows], [row.place for row in rows]
    groups = [2 * y + place for y, place in zip(labels, places, strict=True)]
    return tagged_images([row.path for row in rows], labels, transform, group=groups, place=places, domain=places)


def _read_metadata(root: Path) -> list[_Row]:
    check_folder(root, "`metadata.csv` and the images of Waterbirds")
    table = root / "metadata.csv"
    if not table.is_file():
        raise DataError(f"Expected the file {table}, but it is missing. {_DOWNLOAD}")
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if missing := [name for name in ("img_filename", *_COLUMNS) if name not in columns]:
            raise DataError(
                f"Expected {table} to have the columns img_filename, y, place and split, but {', '.join(missing)} is"
                f" missing from {list(columns)}. {_DOWNLOAD}"
            )
        rows = [_row(root, table, reader.line_num, record) for record in reader]
    for number, name in enumerate(_SPLITS):
        if not any(row.split == number for row in rows):
            raise DataError(f"Expected {table} to have {name} rows (`split` {number}), but got none. {_DOWNLOAD}")
    absent = [row.path for row in rows if not row.path.is_file()]
    if absent:
        raise DataError(
            f"Expected the {len(rows)} images that {table} names, but {len(absent)} are missing, the first of them"
            f" {absent[0]}. {_DOWNLOAD}"
        )
    return rows


def _row(root: Path, table: Path, line: int, record: dict[str, str | None]) -> _Row:
    values = {}
    for name, count in _COLUMNS.items():
        text = (record[name] or "").strip()
        if text not in map(str, range(count)):
            allowed = ", ".join(map(str, range(count)))
            raise DataError(
                f"Expected column `{name}` of {table} to be one of {allowed}, but got {record[name]!r} in line {line}."
                " Correct the table."
            )
        values[name] = int(text)
    if not record["img_filename"]:
        raise DataError(f"Expected column `img_filename` of {table} to name a file, but line {line} is empty there.")
    return _Row(root / record["img_filename"], **values)


def _eval_transform(size: int) -> Callable[[Any], Any]:
    T = transforms()
    resized = round(size * 256 / 224)
    crop = [T.Resize((resized, resized)), T.CenterCrop(size)]
    return T.Compose([*crop, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _train_transform(size: int) -> Callable[[Any], Any]:
    T = transforms()
    crop = [T.RandomResizedCrop(size, scale=(0.7, 1.0), ratio=(0.75, 4 / 3)), T.RandomHorizontalFlip()]
    return T.Compose([*crop, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
