"""Small images of shapes with boxes, in domains that differ by background, light, blur and colour. No download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from debias.data._common import check_stated
from debias.data._detection import DetectionDataModule, tag_domains
from debias.errors import DebiasError
from debias.ops.arguments import checked

__all__ = ["ShapesDetection"]

_DOMAINS = ("studio", "texture", "dusk", "fog")
CLASS_NAMES = ("disc", "square")


class ShapesDetection(DetectionDataModule):
    """Discs and squares on four kinds of background, drawn from a seed.

    ==========  ================================================================================
    domain      looks like
    ==========  ================================================================================
    studio      saturated colours on an even, light background
    texture     the same colours on stripes of random direction
    dusk        a fifth of the light, with noise
    fog         far away and grey behind drifting fog, blurred, with noise: rare and hard
    ==========  ================================================================================

    Each image holds ``0`` to ``max_boxes`` shapes that do not touch, with sides of 1/5 to 2/5 of the image. Training
    images are spread over the domains by ``shares``; validation and test images evenly.

    In fog the sides are 1/6 to 1/3, and of the contrast that a shape has with its background 10 to 25 % comes through,
    a share drawn for each image. The light of the fog itself differs between images, and within one by four waves,
    whose patches are about as large and as faint as the shapes: what the other domains teach does not tell them
    apart. Trained on few images of it a detector stays far behind there; trained on many it does not.

    Batches are ``(images, targets)``, two lists: images float32 ``(3, image_size, image_size)`` in [0, 1]; targets with
    ``boxes`` float32 ``(n, 4)``, x1, y1, x2, y2 in pixels, and ``labels`` int64 ``(n,)``: 1 disc, 2 square. Tag:
    ``domain``, int64 ``(N,)``. After ``setup``: ``domain_names``, ``group_counts`` of the training set by domain.

    Args:
        batch_size: images per batch and rank.
        n_train: number of training images.
        n_eval: number of validation images, and of test images.
        image_size: height and width in pixels.
        max_boxes: most shapes in an image.
        shares: relative numbers of training images of the four domains.
        n_domains: always 4; stated so that other parts of a configuration can refer to it.
        balance: None, or "domain" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the images and of the order of training images.
        num_workers: worker processes of each loader.

    Raises:
        DebiasError: an argument is out of range.

    Example:
        >>> from debias.data import ShapesDetection
        >>> shapes = ShapesDetection(n_train=40, n_eval=8)
        >>> shapes.setup()
        >>> dict(zip(shapes.domain_names, shapes.group_counts.tolist()))
        {'studio': 16, 'texture': 12, 'dusk': 8, 'fog': 4}
    """

    @checked()
    def __init__(
        self,
        batch_size: int = 8,
        n_train: int = 400,
        n_eval: int = 200,
        image_size: int = 64,
        max_boxes: int = 3,
        shares: Sequence[float] = (4, 3, 2, 1),
        n_domains: int = 4,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_domains", n_domains, len(_DOMAINS), "the kinds of background")
        for name, value, least in (
            ("n_train", n_train, 1), ("n_eval", n_eval, 1), ("image_size", image_size, 32), ("max_boxes", max_boxes, 1)
        ):  # fmt: skip
            if type(value) is not int or value < least:
                raise DebiasError(
                    f"Expected argument `{name}` to be an integer of at least {least}, but got {value!r}."
                )
        if len(shares) != len(_DOMAINS) or min(shares) < 0 or not sum(shares) > 0:
            raise DebiasError(f"Expected argument `shares` to be 4 numbers >= 0, not all 0, but got {list(shares)}.")
        self.n_domains = n_domains
        self.n_train, self.n_eval = n_train, n_eval
        self.image_size, self.max_boxes = image_size, max_boxes
        self.shares = tuple(shares)
        self.class_names = list(CLASS_NAMES)

    def setup(self, stage: str | None = None) -> None:
        """Draw the three datasets; the same ones whatever the stage."""
        # RandomState, because its stream is frozen: images are the same with every version of NumPy.
        random = np.random.RandomState(self.seed)
        even = [1.0] * len(_DOMAINS)
        self.train_set = self._make(self.n_train, self.shares, random)
        self.val_set = self._make(self.n_eval, even, random)
        self.test_set = self._make(self.n_eval, even, random)
        self._describe_domains(_DOMAINS)

    def _make(self, n: int, shares: Sequence[float], random: np.random.RandomState) -> Any:
        ends = np.round(np.cumsum(shares) / np.sum(shares) * n).astype(int)
        domains = np.searchsorted(ends, np.arange(n), side="right")
        scenes = [_scene(int(d), self.image_size, self.max_boxes, random) for d in domains]
        return tag_domains(_Scenes(scenes), domains.tolist())


class _Scenes(Dataset):
    def __init__(self, scenes: list[tuple[np.ndarray, list[Any], list[int]]]) -> None:
        self.images = torch.from_numpy(np.stack([image for image, _, _ in scenes]))
        self.boxes = [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) for _, boxes, _ in scenes]
        self.labels = [torch.tensor(labels, dtype=torch.int64) for _, _, labels in scenes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index].float() / 255, {"boxes": self.boxes[index], "labels": self.labels[index]}


def _scene(
    domain: int, size: int, max_boxes: int, random: np.random.RandomState
) -> tuple[np.ndarray, list[Any], list[int]]:
    """An image uint8 ``(3, size, size)``, boxes and labels."""
    y, x = np.mgrid[:size, :size] + 0.5
    fog = _DOMAINS[domain] == "fog"
    image = np.ones((3, size, size)) * (0.75 + 0.2 * random.rand(3, 1, 1))
    if _DOMAINS[domain] == "texture":
        angle, period = np.pi * random.rand(), 5 + 5 * random.rand()
        stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
        image = 0.55 + 0.3 * stripes * (0.5 + 0.5 * random.rand(3, 1, 1))
    boxes: list[Any] = []
    labels: list[int] = []
    for _ in range(random.randint(max_boxes + 1)):
        for _ in range(20):
            side = random.uniform(size / 6, size / 3) if fog else random.uniform(size / 5, size / 2.5)
            x1, y1 = random.uniform(1, size - side - 1, 2)
            if all(x1 > b[2] + 1 or x1 + side < b[0] - 1 or y1 > b[3] + 1 or y1 + side < b[1] - 1 for b in boxes):
                break
        else:
            continue
        label = random.randint(2)
        inside = (x > x1) & (x < x1 + side) & (y > y1) & (y < y1 + side)
        if label == 0:
            inside = (x - x1 - side / 2) ** 2 + (y - y1 - side / 2) ** 2 < (side / 2) ** 2
        color = random.rand(3) * 0.3
        color[random.randint(3)] += 0.5
        image = np.where(inside, color[:, None, None], image)
        boxes.append((x1, y1, x1 + side, y1 + side))
        labels.append(int(label) + 1)
    if _DOMAINS[domain] == "dusk":
        image = 0.2 * image + 0.02 * random.randn(3, size, size)
    if fog:
        image = _behind_fog(image, random)
    return np.round(255 * image.clip(0, 1)).astype(np.uint8), boxes, labels


def _behind_fog(image: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """What a camera sees of a scene ``(3, size, size)``: a share of its light, and that of the fog in between."""
    size = image.shape[-1]
    grey = np.pad(image.mean(0), 4, mode="edge")
    for _ in range(2):  # box filters, one after the other, are close to a Gaussian
        grey = np.mean([np.roll(grey, shift, axis) for axis in (0, 1) for shift in (-2, 0, 2)], axis=0)
    light, share = random.uniform(0.5, 0.8), random.uniform(0.1, 0.25)
    image = light + share * (grey[4:-4, 4:-4] - 0.85)  # 0.85: the background's mean
    y, x = np.mgrid[:size, :size] / size
    for _ in range(4):
        angle, phase, cycles = *random.uniform(0, 2 * np.pi, 2), random.uniform(1, 4)
        image = image + 0.015 * np.cos(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return image + 0.03 * random.randn(3, size, size)
