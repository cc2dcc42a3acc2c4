"""Colored MNIST: the label is noisy, the colour is a better guide to it in training and a wrong one at test.

Arjovsky et al., Invariant Risk Minimization, 2019, sec. 5.1 and ``code/colored_mnist`` of
``facebookresearch/InvariantRiskMinimization``. The class-imbalanced environments are those of Hemati et al., ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from debias.data._common import GroupDataModule, check_fraction, check_stated, nearest
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DataError, DebiasError
from debias.extras import needs_extra
from debias.ops.arguments import checked
from debias.ops.distributed import global_rank, world_size
from debias.step.tagged import TaggedBatch

__all__ = ["ColoredMNIST"]

_SIDE = 28
_GROUP_NAMES = ("digit 5-9 red", "digit 5-9 green", "digit 0-4 red", "digit 0-4 green")
_SPLITS = ("even", "imbalanced", "imbalanced_reference")
_SHARE = 0.97  # of the digits below 5 that the first class-imbalanced environment holds
_GET = (
    "Set `root` to an `mnist.npz` in the layout of Keras (x_train, y_train, x_test, y_test), to a folder with that"
    " file, or to a folder in which torchvision has put `MNIST/raw`; or pass `download=True`."
)


class ColoredMNIST(GroupDataModule):
    """MNIST in two colours, "below 5 or not": two training environments, and a test where the colour misleads.

    Label 1 means a digit below 5, as in the published code, and each label is flipped with probability ``label_noise``,
    so nobody who looks at the shape can be right more often than 75 %. The image lies in one of two colour channels,
    red = 0 and green = 1: the noisy label, flipped with probability 0.2 and 0.1 in the two training environments. There
    colour (85 %) pays better than shape (75 %); at test it is flipped with probability 0.9. All flips are independent.

    The environments share the first five sixths of MNIST's training set (50000) at random; the test is the last sixth
    (10000), as in the published code, or MNIST's own test set. The test loaders are two, unless ``grey_test`` is False:
    coloured images, then the same images with the same labels in grey, that is in both channels, without colour or
    group (-1). The published protocol has no validation set; with ``val_fraction`` a share of each training environment
    is held out, drawn like it, while the noise and the colour of every image stay what they were.

    ``full_batch`` trains as published, all environments in one batch: it is made once, is not collated, and stays on
    the device, so an epoch is one step. On ``W`` ranks each takes every ``W``-th sample of it, without repetition;
    where ``W`` does not divide the number of samples, DDP's mean over ranks is the mean over samples with a method of
    debias, but only nearly so without one.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 2, image_size, image_size)`` in [0, 1]; ``y`` int64 ``(N,)`` in {0, 1},
    or float32 ``(N, 1)`` with ``target="binary"``. Tags, all int64 ``(N,)``: ``domain`` (0 and 1; -1, none of the
    training environments, at test), also under the name ``environment``, ``color``, and ``group`` = 2 * label + color.
    After ``setup``: ``group_names``, ``train_groups`` ``(N,)``, ``group_counts`` ``(4,)`` of the training set,
    ``n_domains``, ``grey_set``; ``val_set`` is empty without ``val_fraction``.

    ``split="imbalanced"`` gives the first environment 97 % of the digits below 5 and 3 % of the others, the second one
    the rest. The published code (``cmnist/cmnist_HGP_imbalanced.py`` of Hemati et al.) computes these numbers of images
    from all 50000 instead of those of the class: its first environment holds every digit below 5 and 1500 of the
    others, its second one no digit below 5. ``split="imbalanced_reference"`` is that split.

    Args:
        root: an ``mnist.npz`` file in the layout of Keras, a folder with that file, or the folder that torchvision
            calls ``root``, with ``MNIST/raw`` in it.
        download: let torchvision download MNIST into the folder ``root`` if it is not there. Done in ``prepare_data``.
        batch_size: samples per batch and rank; with ``full_batch``, of validation and test only.
        full_batch: train on one batch of all environments.
        split: how the training images are shared out: ``"even"``, ``"imbalanced"`` or ``"imbalanced_reference"``.
        target: ``"class"`` for int64 labels ``(N,)``, ``"binary"`` for float32 ``(N, 1)``, the shape of one logit.
        image_size: 14, every second pixel, as published, or 28.
        label_noise: probability that a label is flipped.
        color_flips: probability that the colour is not the noisy label, for each training environment.
        test_color_flip: the same at test.
        test_images: ``"held_out"``, the last sixth of the training set, or ``"official"``, MNIST's test set.
        grey_test: whether to test in grey, too, with a second loader.
        val_fraction: share of each training environment that is held out for validation.
        n_domains: number of training environments; stated so that other parts of a configuration can refer to it.
        n_groups: always 4; stated for the same reason.
        balance: None, or ``"group"``, ``"domain"`` or ``"environment"`` to draw training batches with a
            ``GroupBalancedSampler``.
        seed: seed of the environments, the noise, the colours and the order of training samples. A second MNIST with
            the same seed is the same, whatever ``batch_size``, ``full_batch``, ``target`` and ``val_fraction`` are.
        num_workers: worker processes of each loader but the full batch's.

    Raises:
        DataError: MNIST is not at ``root``, cannot be read or downloaded, or has other shapes than MNIST; in
            ``prepare_data`` and ``setup``.
        DebiasError: an argument is out of range, or torchvision is needed and not installed (extra ``images``).
    """

    balances = ("group", "domain", "environment")

    val_set: TaggedDataset
    grey_set: TaggedDataset

    @checked()
    def __init__(
        self,
        root: str | Path,
        download: bool = False,
        batch_size: int = 256,
        full_batch: bool = False,
        split: Literal["even", "imbalanced", "imbalanced_reference"] = "even",
        target: Literal["class", "binary"] = "class",
        image_size: Literal[14, 28] = 14,
        label_noise: float = 0.25,
        color_flips: tuple[float, ...] = (0.2, 0.1),
        test_color_flip: float = 0.9,
        test_images: Literal["held_out", "official"] = "held_out",
        grey_test: bool = True,
        val_fraction: float = 0.0,
        n_domains: int | None = None,
        n_groups: int = 4,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 4, "label x colour")
        check_fraction("label_noise", label_noise)
        check_fraction("test_color_flip", test_color_flip)
        if not color_flips:
            raise DebiasError("Expected argument `color_flips` to be one share per training environment, but got none.")
        for flip in color_flips:
            check_fraction("color_flips", flip)
        check_stated("n_domains", n_domains, len(color_flips), "one per value of `color_flips`")
        for name, value, choices in (
            ("split", split, _SPLITS),
            ("target", target, ("class", "binary")),
            ("test_images", test_images, ("held_out", "official")),
        ):
            if value not in choices:
                raise DebiasError(
                    f"Expected argument `{name}` to be one of {', '.join(choices)}, but got {value!r}."
                    f"{nearest(str(value), choices)}"
                )
        if split != "even" and len(color_flips) != 2:
            raise DebiasError(
                f"Expected two values of `color_flips` under `split={split}`, but got {len(color_flips)}. The"
                " class-imbalanced environments are two."
            )
        if image_size not in (_SIDE // 2, _SIDE):
            raise DebiasError(f"Expected argument `image_size` to be 14 or 28 pixels, but got {image_size}.")
        if not 0 <= val_fraction < 1:
            raise DebiasError(f"Expected argument `val_fraction` to be at least 0 and below 1, but got {val_fraction}.")
        if full_batch and balance is not None:
            raise DebiasError(
                f"Expected no `balance` with `full_batch`, which holds every sample once, but got {balance!r}. Leave"
                " one of them out."
            )
        self.root = Path(root).expanduser()
        self.download = download
        self.full_batch = full_batch
        self.split = split
        self.target = target
        self.image_size = image_size
        self.label_noise = label_noise
        self.color_flips = tuple(color_flips)
        self.test_color_flip = test_color_flip
        self.test_images = test_images
        self.grey_test = grey_test
        self.val_fraction = val_fraction
        self.n_groups = n_groups
        self.n_domains = len(self.color_flips)
        self._full: _FullBatch | None = None
        self._moved: tuple[Tensor, Any] | None = None

    def prepare_data(self) -> None:
        """Download MNIST if that is allowed and needed; Lightning calls this in one process per node."""
        if self.download and _find_npz(self.root) is None and not _has_idx(self.root):
            if self.root.suffix == ".npz":
                raise DataError(
                    f"Expected `root` to be a folder to download MNIST into, but got {self.root}, which names a file."
                    " Set `root` to a folder, or put the file there."
                )
            try:
                _torchvision_mnist()(self.root, download=True)
            except (OSError, RuntimeError) as error:  # RuntimeError: a checksum, or no mirror answered
                raise DataError(
                    f"Expected torchvision to download MNIST into {self.root}, but got: {error}. Try again, or put the"
                    " files there yourself."
                ) from error

    def setup(self, stage: str | None = None) -> None:
        """Read MNIST and draw the environments; the same ones whatever the stage."""
        images, digits, test_images, test_digits = _read(self.root, self.download)
        if self.image_size != _SIDE:
            images, test_images = images[:, ::2, ::2], test_images[:, ::2, ::2]
        n = len(images) * 5 // 6
        if self.test_images == "held_out":
            test_images, test_digits = images[n:], digits[n:]
        # RandomState, because its stream is frozen: results are the same with every version of NumPy. Each set has a
        # stream of its own, so that no option of one changes another.
        random = np.random.RandomState([self.seed, 0])
        parts = self._share_out(random.permutation(n), digits)
        if empty := [str(number) for number, part in enumerate(parts) if not len(part)]:
            raise DataError(
                f"Expected images for each training environment, but got none for environment {', '.join(empty)} from"
                f" {n} training images of {self.root}. Use the whole of MNIST."
            )
        labels, colors = zip(
            *(self._draw(digits[part], flip, random) for part, flip in zip(parts, self.color_flips, strict=True)),
            strict=True,
        )
        ids = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        sample, label, color = (np.concatenate(a) for a in (parts, labels, colors))
        held_out = self._held_out(ids)
        for name, here in (("train_set", ~held_out), ("val_set", held_out)):
            tagged = self._make(images[sample[here]], label[here], color[here], ids[here])
            setattr(self, name, tagged)

        label, color = self._draw(test_digits, self.test_color_flip, np.random.RandomState([self.seed, 1]))
        none = np.full(len(label), -1)
        self.test_set = self._make(test_images, label, color, none)
        self.grey_set = self._make(test_images, label, none, none)
        self._describe_groups(_GROUP_NAMES)
        self._full = self._moved = None

    def train_dataloader(self) -> DataLoader:
        """Batches ``(x, y)``, shuffled by ``seed`` or balanced; or one batch of everything."""
        if not self.full_batch:
            return super().train_dataloader()
        if self._full is None:
            self._full = _FullBatch(self.train_set)
        # One index on every rank: Lightning leaves a DistributedSampler in place, and the share is cut in the dataset.
        sampler: Any = DistributedSampler(self._full, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(self._full, batch_size=None, sampler=sampler)

    @property
    def val_dataloader(self) -> Callable[[], DataLoader]:  # type: ignore[override]
        """Batches ``(x, y)`` of the validation set; as if this class had no such method without ``val_fraction``."""
        # Lightning asks whether the method is overridden. An empty list instead would bring its warning in every run.
        return super().val_dataloader if self.val_fraction else super(GroupDataModule, self).val_dataloader

    def test_dataloader(self) -> Any:
        """Loaders of batches ``(x, y)``: coloured and grey; the coloured one alone without ``grey_test``."""
        color = self._eval_dataloader(self.test_set)
        return [color, self._eval_dataloader(self.grey_set)] if self.grey_test else color

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; the full batch is moved once and kept there."""
        bare = batch.batch if isinstance(batch, TaggedBatch) else batch
        own = self._full is not None and isinstance(bare, list | tuple) and self._full.is_current(bare[0])
        if not own:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self._moved is None or self._moved[0] is not bare[0] or self._moved[1][0].device != device:
            self._moved = bare[0], super().transfer_batch_to_device(bare, device, dataloader_idx)
        moved = tuple(self._moved[1])
        return TaggedBatch(moved, {k: v.to(device) for k, v in batch.tags.items()}) if bare is not batch else moved

    def teardown(self, stage: str) -> None:
        """Free the copy on the device."""
        self._moved = None

    def _share_out(self, order: np.ndarray, digits: np.ndarray) -> list[np.ndarray]:
        """Positions of the training images of each environment, from a random order of them."""
        if self.split == "even":
            return [order[number :: self.n_domains] for number in range(self.n_domains)]
        below = digits[order] < 5
        low, high = order[below], order[~below]
        of_low, of_high = (len(order),) * 2 if self.split == "imbalanced_reference" else (len(low), len(high))
        cut_low, cut_high = round(_SHARE * of_low), round((1 - _SHARE) * of_high)
        return [
            np.concatenate([low[:cut_low], high[:cut_high]]),
            np.concatenate([low[cut_low:], high[cut_high:]]),
        ]

    def _draw(self, digits: np.ndarray, flip: float, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Noisy labels and colours, int64 ``(N,)``."""
        label = (digits < 5) ^ (random.random_sample(len(digits)) < self.label_noise)
        color = label ^ (random.random_sample(len(digits)) < flip)
        return label.astype(np.int64), color.astype(np.int64)

    def _held_out(self, environments: np.ndarray) -> np.ndarray:
        """A mask of the samples held out for validation, ``val_fraction`` of each environment."""
        mask = np.zeros(len(environments), dtype=bool)
        random = np.random.RandomState([self.seed, 2])
        for number in range(self.n_domains):
            here = random.permutation(np.flatnonzero(environments == number))
            n = round(self.val_fraction * len(here))
            if self.val_fraction and not 0 < n < len(here):
                raise DataError(
                    f"Expected samples of every environment to train on and to hold out, but `val_fraction="
                    f"{self.val_fraction}` holds out {n} of the {len(here)} of environment {number}. Change it."
                )
            mask[here[:n]] = True
        return mask

    def _make(self, images: np.ndarray, label: np.ndarray, color: np.ndarray, domain: np.ndarray) -> TaggedDataset:
        """Images in their colour channel; those of colour -1 in both."""
        grey = torch.from_numpy(images).float() / 255
        y, channel, domains = (torch.from_numpy(np.ascontiguousarray(a)) for a in (label, color, domain))
        x = grey[:, None] * ((channel[:, None] == torch.arange(2)) | (channel[:, None] < 0))[:, :, None, None]
        group = torch.where(channel < 0, -1, 2 * y + channel)
        target = y[:, None].float() if self.target == "binary" else y
        tagged = tag(TensorDataset(x, target), group=group, color=channel, domain=domains, environment=domains)
        return cast(TaggedDataset, tagged)


class _FullBatch(Dataset[TaggedBatch]):
    """A tagged dataset of tensors as one batch; under several ranks each reads its own share of it."""

    def __init__(self, tagged: TaggedDataset) -> None:
        self.tensors: tuple[Tensor, ...] = tagged.dataset.tensors
        self.tags = tagged.tags  # of all ranks' samples, so that methods can count groups
        self._share: tuple[tuple[int, int], TaggedBatch] | None = None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> TaggedBatch:
        if index:  # ends a plain `for batch in dataset`
            raise IndexError(index)
        here = global_rank(), world_size()
        if self._share is None or self._share[0] != here:
            cut = slice(here[0], None, here[1])
            tensors = tuple(tensor[cut].contiguous() for tensor in self.tensors)
            self._share = here, TaggedBatch(tensors, {name: ids[cut] for name, ids in self.tags.items()})
        return self._share[1]

    def is_current(self, x: Any) -> bool:
        return self._share is not None and x is self._share[1].batch[0]


def _read(root: Path, download: bool) -> tuple[np.ndarray, ...]:
    """``x_train, y_train, x_test, y_test`` from whichever layout is there, checked."""
    if (npz := _find_npz(root)) is not None:
        source, arrays = npz, _read_npz(npz)
    elif _has_idx(root):
        source, arrays = root / "MNIST" / "raw", _read_idx(root)
    else:
        found = "a file" if root.is_file() else "neither of them there" if root.is_dir() else "nothing there"
        looked = f"{root} as a file, {root / 'mnist.npz'} and {root / 'MNIST' / 'raw'}"
        hint = " `download=True` takes effect in `prepare_data()`, which a Trainer calls." if download else ""
        raise DataError(f"Expected MNIST at `root`: looked for {looked}, but found {found}. {_GET}{hint}")
    for part in ("train", "test"):
        _check_arrays(source, part, arrays[f"x_{part}"], arrays[f"y_{part}"])
    return arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"]


def _find_npz(root: Path) -> Path | None:
    if root.is_file():
        return root
    return root / "mnist.npz" if (root / "mnist.npz").is_file() else None


def _has_idx(root: Path) -> bool:
    raw = root / "MNIST" / "raw"
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return all((raw / f"{name}-ubyte").is_file() for name in names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        # A bare .npy loads as an array, and a pickle is refused by NumPy: neither is a table of arrays.
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in names if name not in file]:
                raise DataError(
                    f"Expected {path} to hold the arrays {', '.join(names)}, but {', '.join(missing)} is missing from"
                    f" {list(file)}. {_GET}"
                )
            return {name: file[name] for name in names}
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds
        raise DataError(f"Expected {path} to be a readable `.npz` file, but got: {error}. {_GET}") from error


def _read_idx(root: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for part in ("train", "test"):
        try:
            data = _torchvision_mnist()(root, train=part == "train")
        except DebiasError:
            raise
        except Exception as error:  # torchvision asserts, or fails while it unpacks the header
            raise DataError(
                f"Expected torchvision to read the files in {root / 'MNIST' / 'raw'}, but got: {error!r}. Remove them"
                " and download again."
            ) from error
        arrays[f"x_{part}"], arrays[f"y_{part}"] = data.data.numpy(), data.targets.numpy()
    return arrays


def _check_arrays(source: Path, part: str, images: np.ndarray, digits: np.ndarray) -> None:
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE) or images.dtype != np.uint8 or not len(images):
        raise DataError(
            f"Expected the {part} images of {source} to be uint8 of shape (N, 28, 28), but got {images.dtype} of shape"
            f" {images.shape}. {_GET}"
        )
    if digits.shape != (len(images),) or digits.dtype.kind not in "iu" or digits.min() < 0 or digits.max() > 9:
        raise DataError(
            f"Expected the {part} labels of {source} to be {len(images)} integers from 0 to 9, one per image, but got"
            f" {digits.dtype} of shape {digits.shape}. {_GET}"
        )


def _torchvision_mnist() -> Any:
    with needs_extra("images"):
        from torchvision.datasets import MNIST
    return MNIST
