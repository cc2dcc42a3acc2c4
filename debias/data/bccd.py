"""BCCD: blood cells under one microscope, from which domains are made by stain, brightness and blur."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from debias.data._common import check_folder
from debias.data._detection import Boxed, DetectionDataModule
from debias.data.voc_folder import read_voc
from debias.ops.arguments import checked

__all__ = ["BCCD"]

_DOMAINS = ("as taken", "other stain", "dark", "blurred")
_SHARES = (5, 3, 2, 1)  # of the training images; validation and test images are spread evenly
_SPLITS = ("train", "val", "test")
CLASS_NAMES = ("RBC", "WBC", "Platelets")


class BCCD(DetectionDataModule):
    """364 images of blood cells in the layout of Pascal VOC, in four made domains.

    The images come from one site, so domains are made from them: as taken; another stain (colour channels mixed); dark
    (a third of the light); blurred (Gaussian, 4 pixels) and dark, the hard one. Image i of the training list is in the
    domain that i modulo 11 says, 5, 3, 2 and 1 of them; of the other lists in domain i modulo 4. Nothing is random.

    Batches, tags and attributes are those of :class:`debias.data.GWHD`; labels are 1 red cells, 2 white cells, 3
    platelets.

    Args:
        root: folder with ``JPEGImages``, ``Annotations`` and ``ImageSets``.
        batch_size: images per batch and rank.
        augment: flip half of the training images left to right.
        invalid: ``"error"``, or ``"clip"`` to cut boxes at the border and drop empty ones.
        n_domains: always 4; stated so that other parts of a configuration can refer to it.
        balance: None, or "domain" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the order of training images.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: a file, a class, a box or an image is missing or wrong; the message names it.
    """

    @checked()
    def __init__(
        self,
        root: str | Path,
        batch_size: int = 8,
        augment: bool = True,
        invalid: str = "error",
        n_domains: int = 4,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            balance=balance,
            num_workers=num_workers,
            invalid=invalid,
            augment=augment,
            n_domains=n_domains,
        )
        self.root = Path(root).expanduser()
        self.class_names = list(CLASS_NAMES)

    def setup(self, stage: str | None = None) -> None:
        """Read and check the folder; the same whatever the stage."""
        check_folder(self.root, "JPEGImages, Annotations and ImageSets of BCCD")
        order = [d for d, share in enumerate(_SHARES) for _ in range(share)]
        splits = []
        for split in _SPLITS:
            cycle = order if split == "train" else range(len(_DOMAINS))
            # The names carry a number, so that domains keep this order.
            plain = read_voc(self.root, split, CLASS_NAMES, _Anything())
            splits.append(
                [
                    Boxed(s.path, s.boxes, s.labels, f"{(d := cycle[i % len(cycle)])} {_DOMAINS[d]}", s.where)
                    for i, s in enumerate(plain)
                ]
            )
        self._use(splits, _change)


class _Anything(dict):
    """Every image is in some domain."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return ""


def _change(sample: Boxed, image: Any) -> Any:
    from PIL import ImageEnhance, ImageFilter

    domain = int(sample.domain[0])
    if domain == 1:
        image = image.convert("RGB", (0.4, 0.6, 0, 0, 0.2, 0, 0.8, 0, 0.7, 0.3, 0, 0))
    if domain == 3:
        image = image.filter(ImageFilter.GaussianBlur(4))
    return ImageEnhance.Brightness(image).enhance(0.33) if domain >= 2 else image
