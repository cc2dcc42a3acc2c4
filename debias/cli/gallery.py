"""``debias gallery``: every family of crafted shifts and every style augmentation, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from debias.data.colored_digits import load_digits
from debias.errors import DataError, DebiasError
from debias.extras import needs_extra
from debias.ops.shifts import FAMILIES, crafted_shift, sample_keys

__all__ = ["draw", "example_images", "read_images", "rows", "run"]

# Augmentations that are layers, here of the images themselves, with arguments that make them act in every pass; a new
# one is a line here. What an installation lacks is left out.
_LAYERS: tuple[tuple[str, str, str, Callable[[int], dict[str, Any]]], ...] = (
    ("MixStyle", "debias.methods.mixstyle", "MixStyleLayer", lambda channels: {"p": 1.0}),
    ("DSU", "debias.methods.dsu", "DSULayer", lambda channels: {"p": 1.0}),
    (
        "AdvStyle",
        "debias.methods.adv_style",
        "AdvStyleLayer",
        lambda channels: {"num_channels": channels, "p_adversarial": 1.0, "p_dsu": 0.0},
    ),
    ("Mixup", "debias.methods.group_mixup", "GroupMixupLayer", lambda channels: {"pairs": "any"}),
    ("CutMix", "debias.methods.group_mixup", "GroupMixupLayer", lambda channels: {"pairs": "any", "mix": "cutmix"}),
    ("EdgeView", "debias.methods.edge_view", "EdgeViewLayer", lambda channels: {}),
)


def run(out: Path, images: Sequence[Path] = (), *, size: int = 160, draws: int = 2, seed: int = 0) -> None:
    """Write the picture.

    Args:
        out: the PNG file; its folder is made if it is not there.
        images: image files, cropped to squares; by default two photographs and two digits that come with scikit-learn.
        size: side of the images in pixels.
        draws: columns for each image, each with a draw of its own.
        seed: another one gives other draws.

    Raises:
        DebiasError: a number is out of range, or an extra is not installed.
        DataError: a file is no readable image.
    """
    if size < 8 or draws < 1 or seed < 0:
        raise DebiasError(
            f"Expected `size` >= 8, `draws` >= 1 and `seed` >= 0, but got size {size}, draws {draws} and seed {seed}."
        )
    batches = [read_images(images, size)] if images else example_images(size)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows(batches, draws=draws, seed=seed)).savefig(out, dpi=100)
    print(out)


def rows(batches: Sequence[Tensor], *, draws: int = 1, seed: int = 0) -> dict[str, list[Tensor]]:
    """Images of each row by its name: the originals, the ten families, the style augmentations that are there.

    Args:
        batches: images of one size each, ``(N, C, H, W)`` in [0, 1].
        draws: how often each image is drawn.
        seed: seed of the draws.
    """
    repeated = [batch.repeat_interleave(draws, 0) for batch in batches]
    found = {"original": [image for batch in repeated for image in batch]}
    for family in FAMILIES:
        made: list[Tensor] = []
        start = 0
        for batch in repeated:
            keys = sample_keys(torch.arange(start, start + len(batch)), family, seed=seed)
            made.extend(crafted_shift(batch, family, keys))
            start += len(batch)
        found[family] = made
    for title, module, name, options in _LAYERS:
        if find_spec(module) is None:
            continue
        layer = getattr(import_module(module), name)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            outputs = [layer(**options(batch.shape[1])).train()(batch) for batch in repeated]
        tensors = [output[0] if isinstance(output, tuple) else output for output in outputs]
        found[title] = [image.clamp(0, 1) for made in tensors for image in made]
    return found


def draw(found: dict[str, list[Tensor]]) -> Figure:
    """A row for each name, a column for each image."""
    n = len(next(iter(found.values())))
    narrow = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, hspace=0, wspace=0)
    figure = Figure(figsize=(1.1 * n + 1.2, 1.1 * len(found)), layout=narrow)
    axes = figure.subplots(len(found), n, squeeze=False)
    for row, (name, images) in zip(axes, found.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest", aspect="equal")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def example_images(size: int) -> list[Tensor]:
    """Two photographs and, at 8 x 8 whatever ``size``, two digits; all of them come with scikit-learn."""
    with needs_extra("recipes"):
        from sklearn.datasets import load_sample_images
    photographs = [_square(torch.from_numpy(image.copy()), size) for image in load_sample_images().images]
    digits = torch.from_numpy(load_digits()[0][[2, 4]]).float()
    return [torch.stack(photographs), digits[:, None]]


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """The middle squares of image files, ``(N, 3, size, size)`` in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(_square(torch.from_numpy(np.array(image.convert("RGB"))), size))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"Expected {path} to be a readable image, but got: {error}. Correct `--images`.") from error
    return torch.stack(images)


def _square(image: Tensor, size: int) -> Tensor:
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side].permute(2, 0, 1)[None].float() / 255
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
