"""Handwritten digits with a real shift: other writers, another country, another scanner.

The digits that come with scikit-learn (Alpaydin and Kaynak, UCI 1998: 13 writers in Turkey, bitmaps reduced to 8 x 8)
and MNIST (LeCun et al., 1998: clerks and pupils in the United States, 28 x 28) show the same ten classes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from debias.data._common import GroupDataModule, check_fraction, check_stated
from debias.data.colored_digits import load_digits
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DataError, DebiasError
from debias.ops.arguments import checked

__all__ = ["DigitsShift"]


class DigitsShift(GroupDataModule):
    """Train on one kind of handwritten digits; test on other writers of it and, with MNIST at hand, on the other kind.

    ``source="digits"``, the default, needs no download: scikit-learn's 1797 digits. Their order follows the writers
    (the nearest neighbour lies within 140 places for 59 % of the images, against 15 % in a random order), so the last
    40 %, the test set, are of other people than the first 60 %, of which a random ``val_fraction`` is held out for
    validation. With ``mnist``, MNIST's test set is a second test loader: a real shift of writers and scanner.

    ``source="mnist"`` trains on MNIST's training set, less ``val_fraction``. The test set is MNIST's own, and the
    second test loader holds scikit-learn's digits.

    MNIST is reduced to ``image_size`` by averaging its middle 20 x 20 pixels, the box that its digits were fitted into,
    as those of scikit-learn fill their frame; at 28 it is as it is, and scikit-learn's digits get its margin of 4.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 1, image_size, image_size)`` in [0, 1], ``y`` int64 ``(N,)``, 0 to 9.
    Tag ``group``, int64 ``(N,)``: the digit. After ``setup``: ``group_names``, ``train_groups`` ``(N,)``,
    ``group_counts`` ``(10,)`` of the training set, and ``other_set``, the second test set or None.

    Args:
        batch_size: samples per batch and rank.
        seed: seed of the validation split and of the order of training samples.
        n_groups: always 10; stated so that other parts of a configuration can refer to it.
        source: ``"digits"`` or ``"mnist"``.
        mnist: an ``mnist.npz`` with x_train, y_train, x_test and y_test, as Keras ships it.
        image_size: height and width of all images, from 8 to 28.
        val_fraction: share of the source that is held out.
        train_size: train on this many samples only; all by default.
        balance: None, or "group" to draw training batches with each digit equally often.
        num_workers: worker processes of each loader.

    Raises:
        DebiasError: an argument is out of range, or scikit-learn is not installed (extra ``recipes``).
        DataError: ``mnist`` is missing, or no such file.

    Example:
        >>> from debias.data import DigitsShift
        >>> digits = DigitsShift()
        >>> digits.setup()
        >>> len(digits.train_set), len(digits.val_set), len(digits.test_set)
        (862, 216, 719)
    """

    @checked()
    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        n_groups: int = 10,
        source: str = "digits",
        mnist: str | None = None,
        image_size: int = 8,
        val_fraction: float = 0.2,
        train_size: int | None = None,
        balance: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 10, "one group for each digit")
        check_fraction("val_fraction", val_fraction, open_ends=True)
        if source not in ("digits", "mnist"):
            raise DebiasError(f"Expected argument `source` to be 'digits' or 'mnist', but got {source!r}.")
        if source == "mnist" and mnist is None:
            raise DataError(
                "Expected argument `mnist` to be the path of an `mnist.npz` where `source='mnist'`, but got None."
                " Download https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz, and set `mnist`."
            )
        if not 8 <= image_size <= 28:
            raise DebiasError(f"Expected argument `image_size` to be from 8 to 28, but got {image_size}.")
        if train_size is not None and train_size < 1:
            raise DebiasError(f"Expected argument `train_size` to be at least 1, or None, but got {train_size}.")
        self.n_groups = n_groups
        self.source = source
        self.mnist = None if mnist is None else Path(mnist)
        self.image_size = image_size
        self.val_fraction = val_fraction
        self.train_size = train_size
        self.other_set: TaggedDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split; the same sets whatever the stage."""
        arrays = None if self.mnist is None else _read_mnist(self.mnist)
        images, labels = load_digits()
        digits = _enlarged(torch.from_numpy(images).float()[:, None], self.image_size), torch.from_numpy(labels).long()
        if self.source == "digits":
            # In the order of the writers; only the one at the border may be on both sides.
            cut = round(0.6 * len(labels))
            source, test = _cut(digits, slice(0, cut)), _cut(digits, slice(cut, None))
            other = None if arrays is None else self._reduced(*arrays[2:])
        else:
            assert arrays is not None
            source, test, other = self._reduced(*arrays[:2]), self._reduced(*arrays[2:]), digits
        order = np.random.RandomState(self.seed).permutation(len(source[1]))  # frozen: the same in all NumPy versions
        held_out = round(self.val_fraction * len(order))
        train = order[held_out:][: self.train_size]
        self.train_set, self.val_set = _tagged(_cut(source, train)), _tagged(_cut(source, order[:held_out]))
        self.test_set, self.other_set = _tagged(test), None if other is None else _tagged(other)
        self._describe_groups([str(digit) for digit in range(10)])

    def test_dataloader(self) -> Any:
        """Other samples of the source; with MNIST at hand, also the other kind of digits."""
        loaders: list[DataLoader] = [self._eval_dataloader(self.test_set)]
        return loaders if self.other_set is None else [*loaders, self._eval_dataloader(self.other_set)]

    def _reduced(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images).float()[:, None] / 255
        if self.image_size < 28:
            x = F.adaptive_avg_pool2d(x[:, :, 4:24, 4:24], self.image_size)
        return x, torch.from_numpy(labels).long()


def _enlarged(x: Tensor, size: int) -> Tensor:
    """Digits with the margin that MNIST has at that size."""
    if size == 8:
        return x
    inner = size if size < 28 else 20
    x = F.interpolate(x, (inner, inner), mode="bilinear", align_corners=False)
    return F.pad(x, (4, 4, 4, 4)) if size == 28 else x


def _cut(part: tuple[Tensor, Tensor], rows: Any) -> tuple[Tensor, Tensor]:
    return part[0][rows], part[1][rows]


def _tagged(part: tuple[Tensor, Tensor]) -> TaggedDataset:
    return cast(TaggedDataset, tag(TensorDataset(*part), group=part[1]))


def _read_mnist(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, their labels, test images, their labels."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = tuple(arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"Expected `mnist` to be an `mnist.npz` with x_train, y_train, x_test and y_test, but reading {path}"
            f" failed: {error}. Download https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz."
        ) from error
    for images, labels in (found[:2], found[2:]):
        if images.shape[1:] != (28, 28) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise DataError(
                f"Expected {path} to hold bytes of shape (N, 28, 28) and N labels, but got {images.shape} of"
                f" {images.dtype} and {labels.shape}. Download the file again."
            )
    return cast("tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]", found)
