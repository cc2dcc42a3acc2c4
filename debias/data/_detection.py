"""What the detection datamodules share: images with boxes, their checks, and loaders of lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from debias.data._common import GroupDataModule, check_stated, nearest
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DataError, DebiasError
from debias.extras import needs_extra
from debias.step.tagged import TagCollate

INVALID = ("error", "clip")


@dataclass(frozen=True)
class Boxed:
    """An image on disk and its boxes.

    Attributes:
        path: the image.
        boxes: x1, y1, x2, y2 in pixels.
        labels: class of each box, from 1.
        domain: name of its domain.
        where: file and row it comes from, for messages.
    """

    path: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    domain: str
    where: str


class BoxImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images on disk with boxes; a file is opened, and its boxes compared with its size, when the sample is read.

    Args:
        samples: the images.
        invalid: ``"error"``, or ``"clip"`` to cut boxes at the border and drop those of which nothing is left.
        augment: flip half of the images left to right.
        change: from a sample and its PIL image to the image to use.
    """

    def __init__(
        self,
        samples: Sequence[Boxed],
        invalid: str,
        *,
        augment: bool,
        change: Callable[[Boxed, Any], Any] | None = None,
    ) -> None:
        self.samples = list(samples)
        self.invalid = invalid
        self.augment = augment
        self.change = change

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        with needs_extra("detection"):
            from PIL import Image, UnidentifiedImageError
            from torchvision.transforms.functional import pil_to_tensor

        sample = self.samples[index]
        try:
            with Image.open(sample.path) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"Expected {sample.path} ({sample.where}) to be a readable image, but got: {error}. Download or extract"
                " the file again."
            ) from error
        boxes, labels = valid_boxes(sample, self.invalid, size=image.size)
        if self.change is not None:
            image = self.change(sample, image)
        pixels = pil_to_tensor(image).float() / 255
        if self.augment and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
            boxes = torch.stack((image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]), 1)
        return pixels, {"boxes": boxes, "labels": labels}


def valid_boxes(sample: Boxed, invalid: str, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Boxes float32 ``(n, 4)`` and labels int64 ``(n,)`` of a sample, checked against the width and height if given.

    Raises:
        DataError: a box is empty or outside the image, and ``invalid`` is ``"error"``.
    """
    boxes = torch.tensor(sample.boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(sample.labels, dtype=torch.int64)
    width, height = (math.inf, math.inf) if size is None else size
    if invalid == "clip":
        if size is not None:
            boxes = torch.stack((*_clamped(boxes, 0, width), *_clamped(boxes, 1, height)), 1)[:, [0, 2, 1, 3]]
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return boxes[kept], labels[kept]
    for number, (x1, y1, x2, y2) in enumerate(sample.boxes):
        rule = None
        if not (x2 > x1 and y2 > y1):
            rule = "to have x2 > x1 and y2 > y1"
        elif x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            rule = f"to lie inside the image of {width} x {height} pixels"
        if rule:
            raise DataError(
                f"Expected box {number} of {sample.where} (image {sample.path.name}) {rule}, but got"
                f" ({x1:g}, {y1:g}, {x2:g}, {y2:g}). Correct the annotation, or pass `invalid='clip'` to cut boxes at"
                " the border and drop empty ones."
            )
    return boxes, labels


def _clamped(boxes: Tensor, axis: int, end: float) -> tuple[Tensor, Tensor]:
    return boxes[:, axis].clamp(0, end), boxes[:, axis + 2].clamp(0, end)


def collate_boxes(samples: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """A batch of lists, as torchvision's detectors take it: images and targets differ in size."""
    return [image for image, _ in samples], [target for _, target in samples]


class DetectionDataModule(GroupDataModule):
    """Loaders of ``(images, targets)`` with a tag ``domain``; a subclass's ``setup`` calls :meth:`_use`."""

    balances = ("domain",)
    domain_names: list[str]

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        balance: str | None,
        num_workers: int,
        invalid: str = "error",
        augment: bool = False,
        n_domains: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        if invalid not in INVALID:
            raise DebiasError(f"Expected argument `invalid` to be 'error' or 'clip', but got {invalid!r}.")
        self.collate_fn = TagCollate(collate_boxes)
        self.invalid = invalid
        self.augment = augment
        self.n_domains = n_domains

    def _use(self, splits: Sequence[Sequence[Boxed]], change: Callable[[Boxed, Any], Any] | None = None) -> None:
        """Make the three datasets. Domains are numbered by name: those of training first, then what is new in
        validation, then what is new at test.
        """
        names: list[str] = []
        for number, split in enumerate(splits):
            names += sorted({sample.domain for sample in split} - set(names))
            if not number:
                check_stated("n_domains", self.n_domains, len(names), "the number of training domains")
                self.n_domains = len(names)
            for sample in split:
                valid_boxes(sample, self.invalid)
                if not sample.path.is_file():
                    raise DataError(
                        f"Expected the image {sample.path} that {sample.where} names, but it is missing. Download or"
                        " extract the images again."
                    )
        made = [
            tag_domains(
                BoxImages(split, self.invalid, augment=self.augment and not number, change=change),
                [names.index(sample.domain) for sample in split],
            )
            for number, split in enumerate(splits)
        ]
        self.train_set, self.val_set, self.test_set = made
        self._describe_domains(names)

    def _describe_domains(self, names: Sequence[str]) -> None:
        self.domain_names = list(names)
        self.group_names = list(names)
        self.train_groups = self.train_set.tags["domain"]
        self.group_counts = torch.bincount(self.train_groups, minlength=len(names))


def tag_domains(dataset: Any, domains: Sequence[int]) -> TaggedDataset:
    """The dataset with its domains as the tag ``domain``, int64."""
    return cast(TaggedDataset, tag(dataset, domain=torch.tensor(list(domains), dtype=torch.int64)))


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        DataError: it is missing.
    """
    if not path.is_file():
        raise DataError(f"Expected the file {path} with {what}, but it is missing. Correct `root`.")
    return path.read_text(encoding="utf-8-sig")


def known(name: str, names: Sequence[str], where: str, what: str) -> int:
    """The number of a name.

    Raises:
        DataError: it is none of the names.
    """
    if name not in names:
        raise DataError(
            f"Expected the {what} in {where} to be one of {', '.join(names)}, but got {name!r}."
            f"{nearest(name, names) or ' Correct it.'}"
        )
    return list(names).index(name)
