"""Crafted distribution shifts: ten families of image changes, drawn for each image on its own.

Crafting Distribution Shifts for Validation and Training in Single Source Domain Generalization, WACV 2025,
arXiv 2409.19774. One transform of a family is drawn for each image, at a strength that avoids the identity on purpose.
A model that holds up under shifts nobody trained it on is more likely to hold up under the next one, so the mean
accuracy over the families can choose methods and hyperparameters without any target data.

Differences from the authors' code, which writes images to disk once with imgaug 0.4 (unmaintained, and broken with
NumPy from 1.24 on): images are made on the device, in batches, from a key for each image; transforms are kornia's where
it has them and else written here; some variants that differ little are one transform (69 here, 76 there); lengths are
shares of the shorter side with a least length in pixels, so that 8 x 8 images work; and what is the identity on
images of one channel (hue, saturation, temperature) is not drawn for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from debias.errors import DebiasError
from debias.ops.arguments import checked
from debias.ops.precision import float32_by_default
from debias.ops.shifts import _kornia, filters, pixels, scenes
from debias.ops.shifts.draws import Draws, sample_keys
from debias.ops.shifts.selection import held_out_mean, select_setting, two_fold_score

__all__ = [
    "FAMILIES",
    "FOLDS",
    "UnitImages",
    "crafted_shift",
    "families_of",
    "held_out_mean",
    "sample_keys",
    "select_setting",
    "shifted_batch",
    "transforms_of",
    "two_fold_score",
]

_TRANSFORMS: dict[str, tuple[Callable[[Tensor, Draws], Tensor], ...]] = {
    "arithmetic": pixels.ARITHMETIC,
    "artistic": filters.ARTISTIC,
    "blur": filters.BLUR,
    "colour": pixels.COLOUR,
    "contrast": pixels.CONTRAST,
    "convolutional": filters.CONVOLUTIONAL,
    "edges": filters.EDGES,
    "geometric": scenes.GEOMETRIC,
    "segmentation": scenes.SEGMENTATION,
    "weather": scenes.WEATHER,
}

FAMILIES: tuple[str, ...] = tuple(_TRANSFORMS)
"""The ten families."""

FOLDS: dict[str, tuple[str, ...]] = {"first": FAMILIES[:5], "second": FAMILIES[5:], "all": FAMILIES}
"""The two folds of the families, and both: train on one, select on the other."""


def transforms_of(family: str, channels: int) -> tuple[Callable[[Tensor, Draws], Tensor], ...]:
    """The transforms of a family that change images of so many channels."""
    return pixels.GREY_COLOUR if family == "colour" and channels == 1 else _TRANSFORMS[family]


@checked("images: any N C H W, keys: int N")
def crafted_shift(images: Tensor, family: str, keys: Tensor) -> Tensor:
    """Every image under one transform of the family, drawn by its key.

    What an image becomes depends on itself, the family and its key, not on the other images of the batch (to the
    rounding of the device's convolutions). Which transform it gets is decided on the host, where the keys are, so the
    device is not waited for.

    Args:
        images: floating point, ``(N, C, H, W)`` with C 1 or 3, in [0, 1], at least 4 x 4.
        family: one of :data:`FAMILIES`.
        keys: int64 ``(N,)`` in [0, 2**32), on the CPU; see :func:`sample_keys`.

    Returns:
        Images of the same shape and dtype, in [0, 1]; float32 is used on the way, whatever the default dtype.

    Raises:
        DebiasError: there is no such family, the images have another shape or are not floating point, or kornia is
            not installed.

    Example:
        >>> import torch
        >>> from debias.ops.shifts import crafted_shift, sample_keys
        >>> keys = sample_keys(torch.tensor([0, 1]), "blur")
        >>> crafted_shift(torch.rand(2, 3, 16, 16), "blur", keys).shape
        torch.Size([2, 3, 16, 16])
    """
    if family not in _TRANSFORMS:
        raise DebiasError(f"Expected `family` to be one of {', '.join(FAMILIES)}, but got {family!r}.")
    check_images(images)
    transforms = transforms_of(family, images.shape[1])
    choices = Draws(keys).bits() % len(transforms)
    shifted = torch.empty_like(images)
    # kornia's filters have autocast rules of their own, and grids and kernels the default dtype; here everything is
    # computed in float32.
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), float32_by_default():
        for i, transform in enumerate(transforms):
            rows = (choices == i).nonzero().squeeze(1)
            if not len(rows):
                continue
            # The transform's number is part of the streams, so that two transforms do not share their draws.
            draws = Draws(sample_keys(keys[rows], f"{family}/{i}"), images.device)
            rows = rows.to(images.device, non_blocking=True)
            made = transform(images[rows].float(), draws).clamp(0, 1)
            shifted.index_copy_(0, rows, made.to(images.dtype))
    return shifted


def shifted_batch(images: Tensor, families: Sequence[str], sources: Tensor, keys: Tensor) -> Tensor:
    """Every image as it is, or under a shift of the family that it was given.

    Args:
        images: as in :func:`crafted_shift`.
        families: names of families.
        sources: int64 ``(N,)`` on the CPU: 0 for the image as it is, ``i`` for ``families[i - 1]``.
        keys: int64 ``(N,)`` on the CPU, as in :func:`crafted_shift`.

    Returns:
        New images of the same shape and dtype.
    """
    check_images(images)
    made = images.clone()
    for i, family in enumerate(families, start=1):
        rows = (sources == i).nonzero().squeeze(1)
        if len(rows):
            there = rows.to(images.device, non_blocking=True)
            made.index_copy_(0, there, crafted_shift(images[there], family, keys[rows]))
    return made


def check_images(images: Tensor) -> None:
    """Raise unless these can be shifted."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 4:
        raise DebiasError(
            "Expected images of shape (N, C, H, W) with C 1 or 3, and H and W at least 4, for crafted shifts, but got"
            f" {tuple(images.shape)}. Name the images with `input=`, or add the channel with `images.unsqueeze(1)`."
        )
    if not images.is_floating_point():
        raise DebiasError(f"Expected floating-point images in [0, 1], but got {images.dtype}. Divide by 255.")


def check_targets(images: Tensor, others: Any, families: Sequence[str]) -> None:
    """Refuse to move images where something else of the batch lies at their pixels, and would stay behind.

    Args:
        images: ``(N, C, H, W)``.
        others: what there is beside them, in lists, tuples and dictionaries; may hold the images, too.
        families: names of families.

    Raises:
        DebiasError: ``"geometric"`` is among them, and a tensor ``(..., H, W)`` of three axes or more, or ``boxes``.
    """
    if "geometric" in families and (found := _at_pixels(others, images)):
        kept = [family for family in families if family != "geometric"]
        raise DebiasError(
            f"Expected nothing in the batch to lie at the pixels of the images, {tuple(images.shape)}, which the family"
            f" 'geometric' moves, but got {found}, which would stay where it is (a mask, boxes, another image)."
            f" {f'Leave the family out: `families={kept}`' if kept else 'Choose other families, `families=`'}."
        )


def _at_pixels(value: Any, images: Tensor) -> str:
    """What lies at the pixels of the images; "" for nothing."""
    if isinstance(value, Tensor):
        dense = value is not images and value.ndim > 2 and value.shape[-2:] == images.shape[-2:]
        return f"a tensor of shape {tuple(value.shape)}" if dense else ""
    if isinstance(value, Mapping):
        if "boxes" in value:
            return "`boxes`"
        value = list(value.values())
    parts = value if isinstance(value, list | tuple) else ()
    return next(filter(None, (_at_pixels(part, images) for part in parts)), "")


def families_of(families: str | Sequence[str], *, argument: str = "families") -> tuple[str, ...]:
    """The families that an argument names: ``"first"``, ``"second"``, ``"all"``, one family, or several.

    Raises:
        DebiasError: a name is unknown, comes twice, or there is none.
    """
    if isinstance(families, str):
        families = FOLDS.get(families, (families,))
    names = tuple(families)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DebiasError(
            f"Expected `{argument}` to be 'first', 'second', 'all' or different names of {', '.join(FAMILIES)}, but"
            f" got {list(names)}."
        )
    return names


class UnitImages:
    """Brings images to [0, 1] and back: normalised ones by their mean and standard deviation, bytes by 255.

    Args:
        mean: what was subtracted, one number a channel or one for all; None if nothing was.
        std: what it was divided by.

    Raises:
        DebiasError: only one of the two is given, a standard deviation is not positive, or kornia, without which
            nothing can be shifted, is not installed.
    """

    tolerance = 1e-3  # interpolation and half precision leave [0, 1] by a little

    def __init__(self, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> None:
        _kornia.filters()
        if (mean is None) != (std is None):
            raise DebiasError(f"Expected both `mean` and `std`, or neither, but got mean={mean} and std={std}.")
        self.mean, self.std = _per_channel(mean), _per_channel(std)
        if self.std is not None and min(self.std) <= 0:
            raise DebiasError(f"Expected `std` to be positive, but got {std}.")

    def open(self, images: Tensor) -> Tensor:
        """Images in [0, 1], if they are what the arguments say; ``outside`` counts where they are not."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
            check_images(images)
            return images
        check_images(images)
        if self.mean is not None and self.std is not None:
            wide = images if images.dtype == torch.float64 else images.float()
            return wide * self._shaped(self.std, wide) + self._shaped(self.mean, wide)
        return images

    def close(self, images: Tensor, original: Tensor) -> Tensor:
        """Back to the range and the dtype of the original images."""
        if original.dtype == torch.uint8:
            return (images * 255).round().to(torch.uint8)
        if self.mean is not None and self.std is not None:
            images = (images - self._shaped(self.mean, images)) / self._shaped(self.std, images)
        return images.to(original.dtype)

    def outside(self, images: Tensor) -> Tensor:
        """How many of the opened images leave [0, 1], or hold NaN; on their device."""
        flat = images.flatten(1)
        return ((flat.amin(1) >= -self.tolerance) & (flat.amax(1) <= 1 + self.tolerance)).logical_not().sum()

    def error(self, count: int, images: Tensor, where: str) -> DebiasError:
        """What to raise where ``outside`` is not zero."""
        found = f"values from {images.min().item():.4g} to {images.max().item():.4g}"
        told = "after undoing `mean` and `std`" if self.mean is not None else "and neither `mean` nor `std` was given"
        return DebiasError(
            f"Expected {where} images in [0, 1] for crafted shifts, but {count} of them leave it: {found}, {told}. If"
            " the images are normalised, pass the `mean` and `std` of the normalisation; if they lie in [0, 255],"
            " divide by 255."
        )

    def _shaped(self, values: tuple[float, ...], images: Tensor) -> Tensor:
        if len(values) not in (1, images.shape[1]):
            raise DebiasError(
                f"Expected `mean` and `std` to hold one number, or one for each of the {images.shape[1]} channels, but"
                f" got {len(values)}."
            )
        return pixels.constant(values, images).view(1, -1, 1, 1)


def _per_channel(values: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None or isinstance(values, int | float):
        return None if values is None else (float(values),)
    return tuple(float(value) for value in values)
