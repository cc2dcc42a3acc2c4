"""Handwritten digits whose colour is a shortcut: ColoredMNIST in small, from data that comes with scikit-learn.

Arjovsky et al., Invariant Risk Minimization, 2019, sec. 5.1: the label is noisy, the colour agrees with the noisy label
more often than the digit's shape does in training, and hardly ever at test.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import TensorDataset

from debias.data._common import GroupDataModule, check_fraction, check_stated
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DebiasError
from debias.extras import needs_extra
from debias.ops.arguments import checked

__all__ = ["ColoredDigits"]

_GROUP_NAMES = ("digit 0-4 red", "digit 0-4 green", "digit 5-9 red", "digit 5-9 green")


class ColoredDigits(GroupDataModule):
    """1797 handwritten digits of 8 x 8 pixels, "below 5 or not", with colour as a shortcut. Needs no download.

    Label 0 means a digit below 5, label 1 one from 5 on; ``label_noise`` of the labels are flipped, so nobody who looks
    at the shape can be right more often than ``1 - label_noise`` (0.75). The image lies in one of two colour channels,
    red = 0 and green = 1, and the colour equals the noisy label for 80 % and 90 % of the samples of two training
    environments: there, colour (85 %) pays better than shape (75 %). At test it does for 10 %. Flips and
    agreements are exact shares of each environment, at random places.

    The validation set is drawn like the training environments, so choosing a checkpoint by its *validation* worst group
    is honest: nothing of the test distribution is used. 40 % of the digits are for training, 20 % for validation, 40 %
    for test, where the two groups on which colour is right are small.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 2, 8, 8)`` in [0, 1], ``y`` int64 ``(N,)`` in {0, 1}. Tags, all int64
    ``(N,)``: ``group`` = 2 * label + colour, ``color``, and ``environment`` (0 and 1; -1, none of the training
    environments, at test), also under the name ``domain``. After ``setup``: ``group_names``, ``train_groups`` ``(N,)``,
    ``group_counts`` ``(4,)`` of the training set, ``n_domains``, also under the name ``n_environments``.

    Args:
        batch_size: samples per batch and rank.
        seed: seed of the split, the noise, the colours and the order of training samples.
        n_domains: number of values of ``agreement``; stated so that other parts of a configuration can refer to it.
        n_groups: always 4; stated so that other parts of a configuration can refer to it.
        label_noise: share of flipped labels.
        agreement: share of samples whose colour is their noisy label, for each training environment.
        test_agreement: the same at test.
        balance: None, or "group" to draw training batches with a ``GroupBalancedSampler``.
        num_workers: worker processes of each loader.

    Raises:
        DebiasError: an argument is out of range, or scikit-learn is not installed (extra ``recipes``).

    Example:
        >>> from debias.data import ColoredDigits
        >>> digits = ColoredDigits(batch_size=32)
        >>> digits.setup()
        >>> digits.group_names[0], len(digits.train_set)
        ('digit 0-4 red', 719)
    """

    @checked()
    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        n_groups: int = 4,
        n_domains: int | None = None,
        label_noise: float = 0.25,
        agreement: tuple[float, ...] = (0.8, 0.9),
        test_agreement: float = 0.1,
        balance: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 4, "label x colour")
        check_fraction("label_noise", label_noise)
        check_fraction("test_agreement", test_agreement)
        if not agreement:
            raise DebiasError("Expected argument `agreement` to be one share per training environment, but got none.")
        for share in agreement:
            check_fraction("agreement", share)
        check_stated("n_domains", n_domains, len(agreement), "one per value of `agreement`")
        self.n_groups = n_groups
        self.label_noise = label_noise
        self.agreement = tuple(agreement)
        self.test_agreement = test_agreement
        self.n_domains = self.n_environments = len(self.agreement)

    def setup(self, stage: str | None = None) -> None:
        """Make the three datasets; the same ones whatever the stage."""
        images, digits = load_digits()
        # RandomState, because its stream is frozen: results are the same with every version of NumPy.
        random = np.random.RandomState(self.seed)
        order = random.permutation(len(images))
        train, val, test = np.split(order, [round(0.4 * len(order)), round(0.6 * len(order))])
        self.train_set = self._make(images[train], digits[train], self.agreement, range(self.n_environments), random)
        self.val_set = self._make(images[val], digits[val], self.agreement, range(self.n_environments), random)
        self.test_set = self._make(images[test], digits[test], (self.test_agreement,), (-1,), random)
        self._describe_groups(_GROUP_NAMES)

    def _make(
        self,
        images: np.ndarray,
        digits: np.ndarray,
        agreement: tuple[float, ...],
        environments: Any,
        random: np.random.RandomState,
    ) -> TaggedDataset:
        """Equal parts of the digits for each environment; noise and colours are drawn in each on its own."""
        labels, colors, ids = [], [], []
        for share, environment, part in zip(
            agreement, environments, np.array_split(digits, len(agreement)), strict=True
        ):
            noisy = (part >= 5) ^ _chosen(self.label_noise, len(part), random)
            labels.append(noisy)
            colors.append(noisy ^ _chosen(1 - share, len(part), random))
            ids.append(np.full(len(part), environment))
        label, color, environment_id = (torch.from_numpy(np.concatenate(a)).long() for a in (labels, colors, ids))
        x = torch.zeros(len(images), 2, 8, 8)
        x[torch.arange(len(images)), color] = torch.from_numpy(images).float()
        tagged = tag(
            TensorDataset(x, label), group=2 * label + color, color=color, environment=environment_id,
            domain=environment_id,
        )  # fmt: skip
        return cast(TaggedDataset, tagged)


def _chosen(share: float, size: int, random: np.random.RandomState) -> np.ndarray:
    """A boolean mask with exactly ``round(share * size)`` True."""
    mask = np.zeros(size, dtype=bool)
    mask[random.permutation(size)[: round(share * size)]] = True
    return mask


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images ``(1797, 8, 8)`` in [0, 1] and digits ``(1797,)``."""
    with needs_extra("recipes"):
        from sklearn.datasets import load_digits as load
    bunch = load()
    return bunch.images / 16, bunch.target
