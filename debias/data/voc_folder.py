"""Folders in the layout of Pascal VOC, with a domain for each image."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from debias.data._common import check_folder
from debias.data._detection import Boxed, DetectionDataModule, known, read_text
from debias.errors import DataError, DebiasError
from debias.ops.arguments import checked

__all__ = ["VOCFolder", "read_voc"]

_SPLITS = ("train", "val", "test")


class VOCFolder(DetectionDataModule):
    """``JPEGImages``, ``Annotations``, ``ImageSets/Main/<split>.txt``, and a table of domains.

    The table has the columns ``image`` (name without suffix) and ``domain`` (any text). Batches, tags and attributes
    are those of :class:`debias.data.GWHD`; labels number ``class_names`` from 1. VOC counts pixels from 1: 1 is taken
    off x1 and y1, and a 0 there stays.

    Args:
        root: the folder.
        class_names: names of the objects, in the order of their labels.
        domains: table of domains, relative to ``root``.
        domain_names: if given, the domains that may occur; another one is an error.
        batch_size: images per batch and rank.
        augment: flip half of the training images left to right.
        invalid: ``"error"``, or ``"clip"`` to cut boxes at the border and drop empty ones.
        n_domains: number of training domains; checked if given.
        balance: None, or "domain" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the order of training images.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: a file, a class, a box, a domain or an image is missing or wrong; the message names the
            file and the object.
    """

    @checked()
    def __init__(
        self,
        root: str | Path,
        class_names: Sequence[str],
        domains: str = "domains.csv",
        domain_names: Sequence[str] | None = None,
        batch_size: int = 4,
        augment: bool = True,
        invalid: str = "error",
        n_domains: int | None = None,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 4,
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
        if not class_names:
            raise DebiasError("Expected `class_names` to name at least one class, but got none.")
        self.root = Path(root).expanduser()
        self.class_names = list(class_names)
        self.domains = domains
        self.allowed = None if domain_names is None else list(domain_names)

    def setup(self, stage: str | None = None) -> None:
        """Read and check the folder; the same whatever the stage."""
        check_folder(self.root, "JPEGImages, Annotations and ImageSets")
        domains = self._domains()
        self._use([read_voc(self.root, split, self.class_names, domains) for split in _SPLITS])

    def _domains(self) -> dict[str, str]:
        path = self.root / self.domains
        reader = csv.DictReader(read_text(path, "the domain of each image").splitlines())
        if not {"image", "domain"} <= set(reader.fieldnames or []):
            raise DataError(f"Expected {path} to have the columns image and domain, but got {reader.fieldnames}.")
        found = {}
        for record in reader:
            where = f"{path.name}, line {reader.line_num}"
            if self.allowed is not None:
                known(record["domain"], self.allowed, where, "domain")
            found[record["image"]] = record["domain"]
        return found


def read_voc(root: Path, split: str, class_names: Sequence[str], domains: dict[str, str]) -> list[Boxed]:
    """The images of a split, with their boxes.

    Raises:
        DataError: a file is missing or malformed, a class is not known, or an image has no domain.
    """
    names = read_text(root / "ImageSets" / "Main" / f"{split}.txt", f"the images of {split}").split()
    if not names:
        raise DataError(f"Expected images in {split}.txt of {root}, but got none.")
    samples = []
    for line, name in enumerate(names, 1):
        if name not in domains:
            raise DataError(
                f"Expected a domain for the image {name!r} of {split}.txt, line {line}, but there is none. Add it to"
                " the table of domains."
            )
        samples.append(_annotation(root, name, class_names, domains[name]))
    return samples


def _annotation(root: Path, name: str, class_names: Sequence[str], domain: str) -> Boxed:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ET.fromstring(read_text(path, "the boxes of the image"))
    except ET.ParseError as error:
        raise DataError(f"Expected {path} to be XML, but got: {error}. Download the file again.") from None
    boxes, labels = [], []
    for number, item in enumerate(tree.iter("object")):
        where = f"{path.name}, object {number}"
        labels.append(1 + known((item.findtext("name") or "").strip(), class_names, where, "class"))
        try:
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{end}") or "") for end in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            raise DataError(f"Expected four numbers in the bndbox of {where}, but one is missing.") from None
        boxes.append((x1 - 1 if x1 >= 1 else x1, y1 - 1 if y1 >= 1 else y1, x2, y2))
    images = [root / "JPEGImages" / f"{name}{suffix}" for suffix in (".jpg", ".jpeg", ".png")]
    image = next((file for file in images if file.is_file()), images[0])
    return Boxed(image, tuple(boxes), tuple(labels), domain, path.name)
