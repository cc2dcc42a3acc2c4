"""Global Wheat Head Detection 2021: wheat heads in fields around the world, a domain for each session.

David et al., Global Wheat Head Detection 2021, Plant Phenomics 2021; the out-of-distribution benchmark of WILDS
(Koh et al., ICML 2021), whose training, validation and test sessions are disjoint.
"""

from __future__ import annotations

import csv
from pathlib import Path

from debias.data._common import check_folder
from debias.data._detection import Boxed, DetectionDataModule, read_text
from debias.errors import DataError
from debias.ops.arguments import checked

__all__ = ["GWHD"]

_COLUMNS = ("image_name", "BoxesString", "domain")
_TABLES = ("competition_train.csv", "competition_val.csv", "competition_test.csv")


class GWHD(DetectionDataModule):
    """The folder of GWHD 2021: one class, boxes as strings, the official split by session.

    ``root`` holds the tables ``competition_train.csv``, ``competition_val.csv`` and ``competition_test.csv`` with the
    columns ``image_name``, ``BoxesString`` (``"x1 y1 x2 y2;x1 y1 x2 y2"``, or ``no_box``) and ``domain``, and the
    images in ``images/``. The full data has 18 training sessions.

    Batches are ``(images, targets)``, two lists: images float32 ``(3, H, W)`` in [0, 1]; targets with ``boxes`` float32
    ``(n, 4)``, x1, y1, x2, y2 in pixels, and ``labels`` int64 ``(n,)``, all 1. Tag: ``domain``, int64 ``(N,)``. After
    ``setup``: ``domain_names`` (of training first, then what is new in validation and at test), ``group_counts`` of the
    training set by domain, ``n_domains`` of training.

    Args:
        root: folder of the tables.
        batch_size: images per batch and rank; WILDS: 4.
        augment: flip half of the training images left to right.
        invalid: ``"error"``, or ``"clip"`` to cut boxes at the border and drop empty ones.
        n_domains: number of training domains; checked if given, so that other parts of a configuration can refer to it.
        balance: None, or "domain" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the order of training images.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: a table, a column, a row, a box or an image is missing or wrong; a box outside the
            image when it is read. The message names the file and the row.
    """

    @checked()
    def __init__(
        self,
        root: str | Path,
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

    def setup(self, stage: str | None = None) -> None:
        """Read and check the tables; the same whatever the stage."""
        check_folder(self.root, "the tables and the images of GWHD 2021")
        self._use([_read(self.root, table) for table in _TABLES])


def _read(root: Path, table: str) -> list[Boxed]:
    path = root / table
    reader = csv.DictReader(read_text(path, "the images, boxes and domains").splitlines())
    if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or [])]:
        raise DataError(
            f"Expected {path} to have the columns {', '.join(_COLUMNS)}, but {', '.join(missing)} is missing from"
            f" {list(reader.fieldnames or [])}. Use the tables of the release of 2021."
        )
    samples = []
    for record in reader:
        where = f"{table}, line {reader.line_num}"
        if not record["image_name"] or not record["domain"]:
            raise DataError(
                f"Expected an image and a domain in {where}, but got image_name {record['image_name']!r} and domain"
                f" {record['domain']!r}. Correct the table."
            )
        name = record["image_name"]
        file = root / "images" / (name if Path(name).suffix else f"{name}.png")
        boxes = _boxes(record["BoxesString"] or "", where)
        samples.append(Boxed(file, boxes, (1,) * len(boxes), record["domain"], where))
    if not samples:
        raise DataError(f"Expected {path} to hold images, but got none. Use the tables of the release of 2021.")
    return samples


def _boxes(text: str, where: str) -> tuple[tuple[float, float, float, float], ...]:
    if text.strip() in ("", "no_box", "[]"):
        return ()
    boxes = []
    for part in text.strip().strip(";").split(";"):
        try:
            x1, y1, x2, y2 = map(float, part.split())
        except ValueError:
            raise DataError(
                f"Expected BoxesString in {where} to be boxes 'x1 y1 x2 y2' separated by ';', or 'no_box', but got"
                f" {part!r}. Correct the table."
            ) from None
        boxes.append((x1, y1, x2, y2))
    return tuple(boxes)
