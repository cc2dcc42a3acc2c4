"""Random images with boxes, and tiny detectors of torchvision to train on them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from _support.fits import Share
from debias import tag
from debias.models.detector import Detector

KINDS = ("fcos", "retinanet", "ssd", "faster_rcnn", "mask_rcnn")
SAMPLED = {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 8}  # fewer than there are: a draw decides
# Domain of each image: the third batch of four holds one domain only.
DOMAINS = torch.tensor([0, 1, 1, 0, 2, 1, 0, 0, 1, 1])


def scene(i: int, *, size: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Image i and its target: i modulo 3 boxes with masks."""
    g = torch.Generator().manual_seed(i)
    image = torch.rand(3, *size, generator=g, dtype=torch.float64).to(dtype)
    corners = torch.rand(i % 3, 2, generator=g, dtype=torch.float64) * 30
    sides = 12 + torch.rand(i % 3, 2, generator=g, dtype=torch.float64) * 20
    boxes = torch.cat([corners, corners + sides], 1).to(dtype)
    masks = torch.zeros(i % 3, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return image, {"boxes": boxes, "labels": torch.arange(i % 3) + 1, "masks": masks}


def scenes(n: int = 4, *, first: int = 1, sizes: Any = ((64, 64),), **options: Any) -> tuple[list[Any], list[Any]]:
    """Images and targets; the third has no box."""
    pairs = [scene(first + i, size=sizes[i % len(sizes)], **options) for i in range(n)]
    return [image for image, _ in pairs], [target for _, target in pairs]


class Scenes(Dataset):
    """Ten scenes."""

    def __len__(self) -> int:
        return len(DOMAINS)

    def __getitem__(self, i: int) -> Any:
        return scene(i)


def pairs(items: Any) -> Any:
    """The collate function of detection: lists, since images and boxes differ in size."""
    return [image for image, _ in items], [target for _, target in items]


def scene_loader(*, sizes: tuple[int, ...] = (4,), last: tuple[int, ...] = (2,), rank: int = 0) -> DataLoader:
    """Batches of four images over all ranks, in order."""
    data = tag(Scenes(), site=DOMAINS)
    return DataLoader(data, sizes[rank], sampler=Share(data, sizes, last, rank), collate_fn=pairs)


class Trained(Detector):
    """A detector in double precision, without validation; SGD."""

    validation_step = Detector.__bases__[0].validation_step
    test_step = Detector.__bases__[0].test_step

    def __init__(self, kind: str = "fcos", **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(f"tiny_{kind}", 3, options=options)
        self.double()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)
