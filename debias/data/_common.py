"""What the datamodules share: loaders with tags, images on disk, and their error messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from debias.data.samplers import EvalSampler, GroupBalancedSampler
from debias.data.tagging import TaggedDataset, tag
from debias.errors import DataError, DebiasError
from debias.extras import needs_extra

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GroupDataModule(L.LightningDataModule):
    """Loaders over tagged datasets; a subclass's ``setup`` fills the attributes below.

    Batches are plain ``(x, y)``. Training batches are shuffled, or group-balanced with ``balance``; validation and test
    sets are seen once and in order, without padding.
    """

    train_set: TaggedDataset
    val_set: TaggedDataset
    test_set: TaggedDataset
    group_names: list[str]
    group_counts: Tensor
    train_groups: Tensor

    # What `balance` may name, each a tag of the training set; subclasses with other tags extend it.
    balances: tuple[str, ...] = ("group",)
    # Groups without training samples on purpose, as their domain is left out.
    left_out: frozenset[int] = frozenset()
    collate_fn: Callable[[Any], Any] | None = None

    def __init__(self, *, batch_size: int, seed: int, balance: str | None, num_workers: int) -> None:
        super().__init__()
        if balance is not None and balance not in self.balances:
            names = " or ".join(f'"{name}"' for name in self.balances)
            raise DebiasError(f"Expected argument `balance` to be None or {names}, but got {balance!r}.")
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("num_workers", num_workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DebiasError(
                    f"Expected argument `{name}` to be an integer of at least {least}, but got {value!r}."
                )
        self.batch_size = batch_size
        self.seed = seed
        self.balance = balance
        self.num_workers = num_workers
        self._order: torch.Generator | None = None  # of the training samples
        self._resumed: Tensor | None = None

    def train_dataloader(self) -> DataLoader:
        """Batches ``(x, y)``, shuffled by ``seed`` or balanced."""
        sampler = generator = None
        if self.balance is not None:
            counts = enumerate(zip(self.group_names, self.group_counts.tolist(), strict=True))
            absent = [name for group, (name, n) in counts if not n and group not in self.left_out]
            if self.balance == "group" and absent:
                raise DataError(
                    "Expected training samples of every group under `balance=group`, but got none of"
                    f" {', '.join(absent)}. Add samples, or leave out `balance`."
                )
            sampler = GroupBalancedSampler(self.train_set.tags[self.balance], self.batch_size, seed=self.seed)
        else:
            generator = self._order = torch.Generator().manual_seed(self.seed)
            if self._resumed is not None:
                generator.set_state(self._resumed)
                self._resumed = None
        return DataLoader(
            cast("Dataset[Any]", self.train_set),
            batch_size=self.batch_size,
            sampler=sampler,
            shuffle=None if sampler else True,
            generator=generator,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )

    def val_dataloader(self) -> DataLoader:
        """Batches ``(x, y)`` of the validation set."""
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """Batches ``(x, y)`` of the test set."""
        return self._eval_dataloader(self.test_set)

    def state_dict(self) -> dict[str, Any]:
        """Where the shuffling is: a run that is resumed after an epoch goes on with the order of the next one."""
        return {} if self._order is None else {"order": self._order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, when training."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._resumed = state_dict.get("order")

    def _eval_dataloader(self, dataset: TaggedDataset) -> DataLoader:
        sampler = EvalSampler(dataset)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )

    def _describe_groups(self, names: Sequence[str]) -> None:
        self.group_names = list(names)
        self.train_groups = self.train_set.tags["group"]
        self.group_counts = torch.bincount(self.train_groups, minlength=len(names))


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images on disk and their labels; the file is opened when the sample is read.

    Args:
        paths: image files.
        labels: class of each image.
        transform: from a PIL image to the model's input.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: Callable[[Any], Any]) -> None:
        self.paths = list(paths)
        self.labels = list(labels)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with needs_extra("images"):
            from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.paths[index]) as image:
                rgb = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"Expected {self.paths[index]} to be a readable image, but got: {error}. Download or extract"
                " the file again."
            ) from error
        return self.transform(rgb), self.labels[index]


def tagged_images(
    paths: Sequence[Path], labels: Sequence[int], transform: Callable[[Any], Any], **tags: Sequence[int]
) -> TaggedDataset:
    """:class:`ImageFiles` with tags, which are kept as int64 tensors."""
    images = ImageFiles(paths, labels, transform)
    ids = {name: torch.tensor(ids, dtype=torch.int64) for name, ids in tags.items()}
    return cast(TaggedDataset, tag(images, **ids))


def transforms() -> ModuleType:
    """``torchvision.transforms``, or an error that says how to get it."""
    with needs_extra("images"):
        from torchvision import transforms
    return cast(ModuleType, transforms)


def check_fraction(name: str, value: float, *, open_ends: bool = False) -> None:
    """Raise unless ``value`` is a share: from 0 to 1, without the ends if ``open_ends``."""
    if not (0 < value < 1 if open_ends else 0 <= value <= 1):
        rule = "between 0 and 1, ends excluded" if open_ends else "from 0 to 1"
        raise DebiasError(f"Expected argument `{name}` to be {rule}, but got {value}.")


def check_stated(name: str, given: int | None, actual: int, what: str) -> None:
    """Raise if a number that a configuration states is not the one of the data."""
    if given is not None and given != actual:
        raise DataError(
            f"Expected argument `{name}` to be {actual}, {what}, but got {given}. Write `{name}: {actual}`, which"
            " other parts of a configuration can refer to."
        )


def check_folder(root: Path, content: str) -> None:
    """Raise unless ``root`` is a folder; ``content`` says what belongs there."""
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"Expected the folder {root} with {content}, but got {found} there. Correct `root`.")


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
