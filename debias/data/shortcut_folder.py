"""Two classes of real images in two styles; in training the style gives the class away, at test it says nothing.

Made from any folder in the layout ``root/<style>/<class>/<image>``, such as PACS (Li et al., ICCV 2017).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from debias.data._common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GroupDataModule,
    check_fraction,
    check_stated,
    nearest,
    tagged_images,
)
from debias.data.domain_folder import _eval_transform, _read_tree, _train_transform
from debias.errors import DataError, DebiasError
from debias.ops.arguments import check_count, checked

__all__ = ["ShortcutFolder"]


class ShortcutFolder(GroupDataModule):
    """Binary labels from two sets of class folders, in two styles that agree with them in most training images.

    Of each label and style a fifth of the images is for the test, a fifth for validation. Of the rest as many are drawn
    as there can be with a share ``agreement`` of each label in its own style, and of both labels as many; validation
    likewise, so that its worst group is small. The test set holds as many of each label in each style.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 3, image_size, image_size)``, normalised by ``mean`` and ``std``, ``y``
    int64 ``(N,)``. Tags, int64 ``(N,)``: ``style``, ``domain`` = style, ``label`` = y, ``group`` = 2 * label + style.
    After ``setup``: ``group_names``, ``train_groups`` ``(N,)``, ``group_counts`` ``(4,)``.

    Args:
        root: folder of the styles.
        styles: the style of label 0, and that of label 1.
        classes_0: class folders of label 0.
        classes_1: class folders of label 1.
        agreement: share of each label in its own style, in training and validation.
        batch_size: samples per batch and rank.
        image_size: height and width of the inputs.
        mean: of each colour channel, for pixels in [0, 1]; by default ImageNet's. Some pretrained networks expect
            inputs in [-1, 1]: a mean of 0.5 and an ``std`` of 0.5.
        std: likewise.
        augment: crops, flips and colours as in :class:`debias.data.DomainFolder`.
        n_groups: 4; so that other parts of a configuration can refer to it.
        n_domains: 2, likewise.
        balance: None, or ``"group"`` for balanced training batches.
        seed: seed of the split and of the order of training samples.
        num_workers: worker processes of each loader.

    Raises:
        DataError: in ``setup``: a folder is missing, or a label has too few images in a style.
        DebiasError: an argument is out of range, or torchvision is not installed (extra ``images``).
    """

    balances = ("group", "domain")

    @checked()
    def __init__(
        self,
        root: str | Path,
        styles: tuple[str, str] = ("photo", "sketch"),
        classes_0: tuple[str, ...] = ("dog", "elephant"),
        classes_1: tuple[str, ...] = ("giraffe", "horse"),
        agreement: float = 0.95,
        batch_size: int = 32,
        image_size: int = 128,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        augment: bool = False,
        n_groups: int = 4,
        n_domains: int = 2,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 4, "label x style")
        check_stated("n_domains", n_domains, 2, "two styles")
        check_fraction("agreement", agreement, open_ends=True)
        check_count("image_size", image_size)
        if set(classes_0) & set(classes_1) or not classes_0 or not classes_1:
            raise DebiasError(
                f"Expected `classes_0` and `classes_1` to be different folders, at least one each, but got"
                f" {list(classes_0)} and {list(classes_1)}."
            )
        self.root = Path(root).expanduser()
        self.styles: tuple[str, ...] = tuple(styles)
        self.classes = tuple(classes_0), tuple(classes_1)
        self.agreement = agreement
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.augment = augment
        self.n_groups, self.n_domains = n_groups, n_domains

    def setup(self, stage: str | None = None) -> None:
        """Read and check the folders, and draw; the same whatever the stage."""
        tree = _read_tree(self.root)
        classes = list(tree[next(iter(tree))])
        for argument, names, known in [
            ("styles", tuple(self.styles), list(tree)),
            *((f"classes_{label}", self.classes[label], classes) for label in (0, 1)),
        ]:
            for name in names:
                if name not in known:
                    raise DataError(
                        f"Expected `{argument}` to name folders in {self.root}, of {known}, but got"
                        f" {name!r}.{nearest(name, known)}"
                    )
        # RandomState, because its stream is frozen: splits are the same with every version of NumPy.
        random = np.random.RandomState(self.seed)
        cells: dict[tuple[int, int], list[Path]] = {}
        for label in (0, 1):
            for style in (0, 1):
                paths = [path for name in self.classes[label] for path in tree[self.styles[style]][name]]
                cells[label, style] = [paths[i] for i in random.permutation(len(paths))]
        fifth = {cell: len(paths) // 5 for cell, paths in cells.items()}
        test = {cell: min(fifth.values()) for cell in cells}
        val, train = self._shares(fifth), self._shares({cell: len(cells[cell]) - 2 * fifth[cell] for cell in cells})
        views = self.image_size, self.mean, self.std
        transform = _eval_transform(*views)
        parts: dict[str, list[tuple[Path, int, int]]] = {"test": [], "val": [], "train": []}
        for (label, style), paths in cells.items():
            start = 0
            for part, counts in (("test", test), ("val", val), ("train", train)):
                chosen = paths[start : start + counts[label, style]]
                parts[part] += [(path, label, style) for path in chosen]
                # Each split has its own images, however many of them it draws.
                start += fifth[label, style]
        self.test_set, self.val_set = self._make(parts["test"], transform), self._make(parts["val"], transform)
        self.train_set = self._make(parts["train"], _train_transform(*views) if self.augment else transform)
        titles = ["+".join(names) for names in self.classes]
        self._describe_groups([f"{label} in {style}" for label in titles for style in self.styles])

    def _shares(self, available: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
        """Images of each label and style: as many as there can be."""
        share = {cell: self.agreement if cell[0] == cell[1] else 1 - self.agreement for cell in available}
        each = min(int(available[cell] / share[cell]) for cell in available)
        counts = {cell: round(each * share[cell]) for cell in available}
        counts = {cell: min(count, available[cell]) for cell, count in counts.items()}
        if empty := [cell for cell, count in counts.items() if not count]:
            label, style = empty[0]
            raise DataError(
                f"Expected enough images to draw some of label {label} in {self.styles[style]!r}, but with"
                f" `agreement={self.agreement}` there is none of {available[empty[0]]}. Lower it, or add classes."
            )
        return counts

    def _make(self, samples: list[tuple[Path, int, int]], transform: Any) -> Any:
        paths, labels, styles = zip(*samples, strict=True)
        groups = [2 * label + style for label, style in zip(labels, styles, strict=True)]
        return tagged_images(paths, labels, transform, group=groups, style=styles, domain=styles, label=labels)
