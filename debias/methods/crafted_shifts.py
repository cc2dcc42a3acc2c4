"""Crafted distribution shifts as training augmentation: one source for each sample.

The source of sample i is drawn uniformly from {original, family 1, ..., family F}, and a family's transform and
strength by a key of the sample: x_i' = x_i or T_{f(i), key(i)}(x_i). Labels stay as they are.

Crafting Distribution Shifts for Validation and Training in Single Source Domain Generalization, WACV 2025,
arXiv 2409.19774, sec. 4. The authors write one version of each image and family to disk and train on these; here every
epoch draws anew. Their second view, of edges, is a method of its own. The families: ``debias.ops.shifts``.

Needs batches of images, ``(N, C, H, W)``. Costs a transform of each image in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debias.errors import BatchKeyError, DebiasError
from debias.methods.base import Method
from debias.ops.distributed import global_sum, is_distributed
from debias.ops.fields import arguments
from debias.ops.shifts import UnitImages, check_targets, families_of, shifted_batch
from debias.step.batch import BatchKey, describe, replace
from debias.step.context import Step

__all__ = ["CraftedShifts"]

_HOST = torch.device("cpu")


@arguments
class CraftedShifts(Method):
    """Train on images as they are and under crafted distribution shifts.

    The shifts change quality, colour and scene but not the label; clues that do not survive them stop paying.

    With a :class:`ShiftedValidation` in the same list, ``val_shift/held_out_mean`` leaves out the families that this
    trains on. The two-fold protocol trains a setting with ``families="first"`` and with ``families="second"``, scores
    it by :func:`debias.functional.two_fold_score`, and trains the best one with ``families="all"``.

    The transform of each image is decided on the host, so nothing waits for the device, but for kornia's bilateral
    filter (in ``"blur"`` and ``"artistic"``) and its Canny edges, which look at values. A batch of one works. In one
    process on CPU every batch is checked to lie in [0, 1]; else the first one of a fit, on all ranks together.

    Args:
        families: ``"all"``, the fold ``"first"`` (arithmetic, artistic, blur, colour, contrast) or ``"second"``
            (convolutional, edges, geometric, segmentation, weather), or names of families.
        original: share of the samples that stay as they are; by default as much as each family, the published value.
        input: where the images are in a batch: floating point ``(N, C, H, W)`` with C 1 or 3, or bytes in [0, 255].
        mean: mean of the images' normalisation, a number or one a channel; it is undone, and done again.
        std: its standard deviation; without both, images must lie in [0, 1].
        seed: seed of the draws, which differ by rank and resume exactly.

    Raises:
        DebiasError: a family is unknown, ``original`` is no share, images leave [0, 1] or have another shape, kornia
            (extra ``augment``) is not installed, or the batch holds boxes, or a tensor ``(..., H, W)`` such as a mask,
            with the family ``"geometric"``, which would move the images away from them.
        BatchKeyError: the images are not where ``input`` says.

    Example:
        >>> from debias import CraftedShifts
        >>> CraftedShifts(families="first").shift_families
        ('arithmetic', 'artistic', 'blur', 'colour', 'contrast')
    """

    needs = ("images",)
    reference = "Efthymiadis et al., WACV 2025, arXiv 2409.19774"
    works = "One source is all there is, and the target differs in quality, colour or scene."
    fails = "The target looks like the validation set, or a shift changes the label."

    families: str | list[str] = "all"
    original: float | None = None
    input: BatchKey = 0
    mean: float | list[float] | None = None
    std: float | list[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shift_families = families_of(self.families)
        original = 1 / (1 + len(self.shift_families)) if self.original is None else self.original
        if not 0 <= original <= 1:
            raise DebiasError(f"Expected `original` to be a share from 0 to 1, but got {self.original}.")
        self.original = original
        self._unit = UnitImages(self.mean, self.std)
        self._checked = False

    def setup(self, trainer: object, pl_module: object, stage: str) -> None:
        """Join the engine; the first batch of a fit is looked at."""
        super().setup(trainer, pl_module, stage)
        self._checked = False

    def augment(self, step: Step) -> None:
        """Shift the images of one micro-batch."""
        images = step.read(self.input, argument="input")
        if not isinstance(images, Tensor):
            raise BatchKeyError(
                f"Expected `input={self.input!r}` to name a tensor of images, but got {describe(images)}. Correct the"
                " key."
            )
        unit = self._unit.open(images)
        check_targets(images, step.batch, self.shift_families)
        self._check_range(unit, step)
        sources, keys = self.random.draw("shifts", _HOST, lambda g: self._draw(images.shape[0], g))
        shifted = shifted_batch(unit, self.shift_families, sources, keys)
        # What stays as it is stays so to the last bit, also through a normalisation that is undone and done again.
        kept = (sources == 0).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        step.batch = replace(step.batch, self.input, torch.where(kept, images, self._unit.close(shifted, images)))

    def _draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kept = torch.rand(n, generator=generator, dtype=torch.float32) < (self.original or 0)
        sources = torch.randint(1, 1 + len(self.shift_families), (n,), generator=generator)
        return torch.where(kept, 0, sources), torch.randint(0, 2**32, (n,), generator=generator)

    def _check_range(self, unit: Tensor, step: Step) -> None:
        if self._checked and (is_distributed() or unit.device.type != "cpu"):
            return
        self._checked = True
        if count := int(global_sum(self._unit.outside(unit).float())):
            raise self._unit.error(count, unit, f"training batch {step.batch_idx} to hold")
