"""Small face-like images whose texture says who it is, with an expression that goes with the identity in training."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from debias.data._common import GroupDataModule, check_fraction, check_stated
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DebiasError
from debias.ops.arguments import checked

__all__ = ["IdentityShortcut"]

SIZE = 24


class IdentityShortcut(GroupDataModule):
    """Drawn faces, smiling or not; everybody has a texture of their own. Needs no download.

    A face is a disc with two eyes and a mouth, bent up (label 1) or down (label 0) and shifted by up to a pixel; its
    skin is a smooth random texture that belongs to the identity; pixels are noisy. In training an identity shows its
    own habitual expression in ``agreement`` of its images, so knowing who it is pays; validation and test have other
    people, who smile in half of theirs: there, recognising faces helps nobody.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 1, 24, 24)``, ``y`` int64 ``(N,)`` in {0, 1}. Tags, int64 ``(N,)``:
    ``identity`` (0 .. ``n_identities`` - 1 in each set, which has people of its own), ``habit`` (the identity's
    habitual expression, -1 outside training), and ``group`` = 2 * label + habit (as if habit were label where there is
    none). After
    ``setup``: ``group_names``, ``train_groups`` ``(N,)``, ``group_counts`` ``(4,)`` of the training set.

    Args:
        batch_size: samples per batch and rank.
        seed: seed of identities, images and the order of training samples.
        n_identities: people in training.
        n_test_identities: people in validation, and others in test.
        images: images of each.
        agreement: share of a training identity's images with its habitual expression.
        texture: contrast of the texture; 0 leaves nothing to recognise people by.
        expression: contrast of the mouth.
        noise: standard deviation of a pixel.
        n_groups: always 4; stated so that other parts of a configuration can refer to it.
        balance: None, or "group", "identity" or "habit" to draw training batches with a ``GroupBalancedSampler``.
        num_workers: worker processes of each loader.

    Raises:
        DebiasError: an argument is out of range.

    Example:
        >>> from debias.data import IdentityShortcut
        >>> faces = IdentityShortcut(n_identities=10, images=8)
        >>> faces.setup()
        >>> len(faces.train_set), faces.group_names[0]
        (80, 'neutral by habit, neutral')
    """

    balances = ("group", "identity", "habit")

    @checked()
    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        n_identities: int = 24,
        n_test_identities: int = 24,
        images: int = 40,
        agreement: float = 0.9,
        texture: float = 1.0,
        expression: float = 1.5,
        noise: float = 0.5,
        n_groups: int = 4,
        balance: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 4, "label x habit")
        check_fraction("agreement", agreement)
        for name, value, least in (
            ("n_identities", n_identities, 2),
            ("n_test_identities", n_test_identities, 1),
            ("images", images, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DebiasError(f"Expected argument `{name}` to be an integer >= {least}, but got {value!r}.")
        for name, level in (("texture", texture), ("expression", expression), ("noise", noise)):
            if not level >= 0:
                raise DebiasError(f"Expected argument `{name}` to be a number >= 0, but got {level!r}.")
        self.n_identities = n_identities
        self.n_test_identities = n_test_identities
        self.images = images
        self.agreement = agreement
        self.texture = texture
        self.expression = expression
        self.noise = noise
        self.n_groups = n_groups

    def setup(self, stage: str | None = None) -> None:
        """Draw the three sets; the same ones whatever the stage."""
        # RandomState, because its stream is frozen: results are the same with every version of NumPy.
        random = np.random.RandomState(self.seed)
        self.train_set = self._draw(self.n_identities, self.agreement, random)
        self.val_set = self._draw(self.n_test_identities, None, random)
        self.test_set = self._draw(self.n_test_identities, None, random)
        self._describe_groups(
            ["neutral by habit, neutral", "smiling by habit, neutral", "neutral by habit, smiling", "smiling by habit"]
        )

    def _draw(self, people: int, agreement: float | None, random: np.random.RandomState) -> TaggedDataset:
        """Images of new people; without ``agreement`` they have no habit."""
        identity = np.repeat(np.arange(people), self.images)
        habits = random.permutation(people) % 2
        share = 0.5 if agreement is None else agreement
        kept = np.stack([random.permutation(self.images) < round(share * self.images) for _ in range(people)]).ravel()
        label = np.where(kept, habits[identity], 1 - habits[identity])
        skins = np.stack([_smooth(random) for _ in range(people)])
        pixels = np.stack([self._face(skins[i], int(y), random) for i, y in zip(identity, label, strict=True)])
        x = torch.from_numpy(pixels).float().unsqueeze(1)
        y, ids = _ids(label), _ids(identity)
        habit = torch.full_like(ids, -1) if agreement is None else _ids(habits[identity])
        group = 2 * y + habit if agreement is not None else 3 * y
        return cast(TaggedDataset, tag(TensorDataset(x, y), identity=ids, habit=habit, group=group))

    def _face(self, skin: np.ndarray, label: int, random: np.random.RandomState) -> np.ndarray:
        row, column = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
        down, right = random.uniform(-1, 1, size=2)
        row, column = row - down, column - right
        face = 1.0 / (1 + np.exp(row**2 / 4 + column**2 / 4 - 25))
        eyes = sum(np.exp(-((row + 3.5) ** 2 + (column - side) ** 2) / 2) for side in (-3.5, 3.5))
        bend = (1 if label else -1) * (1 - (column / 4) ** 2)  # a smile is lowest in its middle
        mouth = np.exp(-((row - 4 - bend) ** 2)) * (np.abs(column) < 5)
        image = face * (1 + self.texture * skin) - eyes - self.expression * mouth
        return image + self.noise * random.standard_normal((SIZE, SIZE))


def _smooth(random: np.random.RandomState) -> np.ndarray:
    """A random field of unit variance without fine detail."""
    frequency = np.fft.fftfreq(SIZE)
    radius = np.sqrt(frequency[:, None] ** 2 + frequency[None] ** 2)
    spectrum = np.fft.fft2(random.standard_normal((SIZE, SIZE))) * np.exp(-((radius / 0.15) ** 2))
    field = np.fft.ifft2(spectrum).real
    return (field - field.mean()) / field.std()


def _ids(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).long()
