"""Annotations in COCO's JSON, with a domain for each image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from debias.data._common import check_folder
from debias.data._detection import Boxed, DetectionDataModule, read_text
from debias.errors import DataError
from debias.ops.arguments import checked

__all__ = ["COCOFolder"]


class COCOFolder(DetectionDataModule):
    """COCO's ``images``, ``annotations`` and ``categories``, where every image has a field with its domain.

    Batches, tags and attributes are those of :class:`debias.data.GWHD`; labels number the categories from 1 in the
    order of their ids. Boxes are ``[x, y, width, height]`` in pixels; crowd regions (``iscrowd``) are left out.

    Args:
        root: folder that everything else is relative to.
        train: JSON file of the training set.
        val: JSON file of the validation set.
        test: JSON file of the test set.
        images: folder of the images.
        domain_field: field of an image that holds its domain, a text or a number.
        batch_size: images per batch and rank.
        augment: flip half of the training images left to right.
        invalid: ``"error"``, or ``"clip"`` to cut boxes at the border and drop empty ones.
        n_domains: number of training domains; checked if given.
        balance: None, or "domain" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the order of training images.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: a file, a field, a box, a category or an image is missing or wrong; the message names
            the file and the id.
    """

    @checked()
    def __init__(
        self,
        root: str | Path,
        train: str = "train.json",
        val: str = "val.json",
        test: str = "test.json",
        images: str = "images",
        domain_field: str = "domain",
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
        self.root = Path(root).expanduser()
        self.files = (train, val, test)
        self.images = images
        self.domain_field = domain_field

    def setup(self, stage: str | None = None) -> None:
        """Read and check the files; the same whatever the stage."""
        check_folder(self.root, "COCO's JSON files and the images")
        contents = [_load(self.root / file) for file in self.files]
        categories = {c["id"]: str(c["name"]) for content in contents for c in content["categories"]}
        ids = sorted(categories)
        self.class_names = [categories[i] for i in ids]
        self._use([self._read(file, content, ids) for file, content in zip(self.files, contents, strict=True)])

    def _read(self, file: str, content: dict[str, Any], categories: list[int]) -> list[Boxed]:
        objects: dict[Any, list[Any]] = {image.get("id"): [] for image in content["images"]}
        for item in content["annotations"]:
            where = f"{file}, annotation {item.get('id')}"
            if item.get("image_id") not in objects:
                raise DataError(f"Expected {where} to belong to an image of {file}, but got {item.get('image_id')!r}.")
            if item.get("category_id") not in categories:
                raise DataError(
                    f"Expected the category of {where} to be one of {categories}, but got {item.get('category_id')!r}."
                )
            box = item.get("bbox")
            if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
                raise DataError(f"Expected `bbox` of {where} to be [x, y, width, height], but got {box!r}.")
            if not item.get("iscrowd", 0):
                objects[item["image_id"]].append(item)
        samples = []
        for image in content["images"]:
            where = f"{file}, image {image.get('id')}"
            for field in ("file_name", self.domain_field):
                if image.get(field) in (None, ""):
                    raise DataError(
                        f"Expected {where} to have the field `{field}`, but got {sorted(image)}. Add it, or pass"
                        " `domain_field`."
                    )
            found = objects[image["id"]]
            boxes = tuple((x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in found))
            labels = tuple(1 + categories.index(item["category_id"]) for item in found)
            path = self.root / self.images / image["file_name"]
            samples.append(Boxed(path, boxes, labels, str(image[self.domain_field]), where))
        return samples


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, "COCO annotations"))
    except json.JSONDecodeError as error:
        raise DataError(f"Expected {path} to be JSON, but got: {error}. Download the file again.") from None
    lacking = [name for name in ("images", "annotations", "categories") if name not in content]
    if lacking or not content["images"]:
        raise DataError(f"Expected {path} to hold images, annotations and categories, but {lacking or 'images'} lacks.")
    return content
