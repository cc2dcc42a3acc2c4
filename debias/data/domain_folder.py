"""Folders of domains and classes, one domain left out: PACS, VLCS, OfficeHome and whatever has their layout.

Leave-one-domain-out as in DomainBed (Gulrajani and Lopez-Paz, ICLR 2021): the test domain is never seen in training,
and checkpoints are chosen on held-out samples of the training domains.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from debias.data._common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    GroupDataModule,
    check_folder,
    check_fraction,
    check_stated,
    nearest,
    tagged_images,
    transforms,
)
from debias.errors import DataError, DebiasError
from debias.ops.arguments import checked

__all__ = ["DomainFolder"]

_EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class DomainFolder(GroupDataModule):
    """Images in ``root/<domain>/<class>/*``; one domain is the test set and the others train and validate, or, with
    ``train_domain``, one domain trains and validates and the others are the test set.

    Training domains are numbered 0, 1, ... in the alphabetical order of their names, classes too. Of each training
    domain ``val_fraction`` is held out for validation. Which samples depends on ``seed`` and on that domain's place
    among all domains, not on the test domain.

    Batches are ``(x, y)``: ``x`` float32 ``(N, 3, image_size, image_size)``, normalised by ImageNet's mean and standard
    deviation, ``y`` int64 ``(N,)``. Tags, int64 ``(N,)``: ``domain`` (0 to ``n_domains`` - 1; -1, none of the training
    domains, at test), ``label`` = y, and ``group`` = label * n_domains + domain (-1 at test). After ``setup``:
    ``domain_names`` (of training), ``class_names``, ``group_names``, ``train_groups`` ``(N,)``, ``group_counts``
    ``(n_groups,)`` of the training set, ``n_domains``, ``n_classes``, ``n_groups``.

    Transforms are DomainBed's: images are resized to a square; training takes a random crop (scale 0.7 to 1), flips,
    jitters colours by 0.3 and turns one image in ten grey, unless ``augment`` is False. Hidden files and files that are
    no images are passed over.

    Args:
        root: folder of the domains.
        test_domain: name of the domain to leave out; None with ``train_domain``.
        batch_size: samples per batch and rank.
        val_fraction: share of each training domain that is held out for validation.
        image_size: height and width of the inputs.
        augment: whether to augment training images.
        n_domains: number of training domains; checked if given, so that other parts of a configuration can refer to it.
        n_groups: number of classes x training domains; checked if given.
        balance: None, or "group" or "domain" to draw training batches with a ``GroupBalancedSampler``.
        seed: seed of the split and of the order of training samples.
        num_workers: worker processes of each loader.
        train_domain: name of the only domain to train on, for generalisation from a single source.

    Raises:
        DataError: in ``setup``: the folder, a domain, a class or its images are missing; the message names them.
        DebiasError: an argument is out of range, or torchvision is not installed (extra ``images``).
    """

    balances = ("group", "domain")

    @checked()
    def __init__(
        self,
        root: str | Path,
        test_domain: str | None = None,
        batch_size: int = 32,
        val_fraction: float = 0.2,
        image_size: int = 224,
        augment: bool = True,
        n_domains: int | None = None,
        n_groups: int | None = None,
        balance: str | None = None,
        seed: int = 0,
        num_workers: int = 4,
        train_domain: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        if (test_domain is None) == (train_domain is None):
            raise DebiasError(
                "Expected either `test_domain`, the domain to leave out, or `train_domain`, the only one to train on,"
                f" but got {test_domain!r} and {train_domain!r}."
            )
        check_fraction("val_fraction", val_fraction, open_ends=True)
        if image_size < 1:
            raise DebiasError(f"Expected argument `image_size` to be at least 1 pixel, but got {image_size}.")
        self.root = Path(root).expanduser()
        self.test_domain = test_domain
        self.train_domain = train_domain
        self.val_fraction = val_fraction
        self.image_size = image_size
        self.augment = augment
        self.n_domains = n_domains
        self.n_groups = n_groups

    def setup(self, stage: str | None = None) -> None:
        """Read and check the folders, and split; the same whatever the stage."""
        tree = _read_tree(self.root)
        argument, given = ("test_domain", self.test_domain) if self.test_domain else ("train_domain", self.train_domain)
        if given not in tree:
            raise DataError(
                f"Expected argument `{argument}` to be one of the domains {list(tree)} in {self.root}, but got"
                f" {given!r}.{nearest(str(given), tree) or ' Correct the name.'}"
            )
        self.domain_names = [name for name in tree if (name == given) == (argument == "train_domain")]
        self.class_names = list(tree[given])
        self.n_classes, n_domains = len(self.class_names), len(self.domain_names)
        check_stated("n_domains", self.n_domains, n_domains, "the number of training domains")
        check_stated("n_groups", self.n_groups, self.n_classes * n_domains, "classes x training domains")
        self.n_domains, self.n_groups = n_domains, self.n_classes * n_domains

        splits = {name: self._split(number, name, tree[name]) for number, name in enumerate(tree)}
        train = [(*sample, domain) for domain, name in enumerate(self.domain_names) for sample in splits[name][0]]
        val = [(*sample, domain) for domain, name in enumerate(self.domain_names) for sample in splits[name][1]]
        test = [(*sample, -1) for name in tree if name not in self.domain_names for sample in _samples(tree[name])]
        eval_transform = _eval_transform(self.image_size)
        self.train_set = self._make(train, _train_transform(self.image_size) if self.augment else eval_transform)
        self.val_set = self._make(val, eval_transform)
        self.test_set = self._make(test, eval_transform)
        self._describe_groups([f"{label} in {domain}" for label in self.class_names for domain in self.domain_names])

    def _split(self, number: int, name: str, classes: dict[str, list[Path]]) -> tuple[list[Any], list[Any]]:
        """Training and validation samples of a domain, in the order of the folders."""
        samples = _samples(classes)
        if len(samples) < 2:
            raise DataError(
                f"Expected the domain {name!r} to have images to train on and to hold out, but got {len(samples)}. Add"
                " images, or remove the folder."
            )
        n_val = min(max(round(self.val_fraction * len(samples)), 1), len(samples) - 1)
        held_out = np.zeros(len(samples), dtype=bool)
        # RandomState, because its stream is frozen: splits are the same with every version of NumPy.
        held_out[np.random.RandomState([self.seed, number]).permutation(len(samples))[:n_val]] = True
        train = [sample for sample, held in zip(samples, held_out, strict=True) if not held]
        return train, [sample for sample, held in zip(samples, held_out, strict=True) if held]

    def _make(self, samples: list[tuple[Path, int, int]], transform: Callable[[Any], Any]) -> Any:
        paths, labels = [path for path, _, _ in samples], [label for _, label, _ in samples]
        domains = [domain for _, _, domain in samples]
        groups = [
            -1 if domain < 0 else label * len(self.domain_names) + domain
            for label, domain in zip(labels, domains, strict=True)
        ]
        return tagged_images(paths, labels, transform, group=groups, domain=domains, label=labels)


def _samples(classes: dict[str, list[Path]]) -> list[tuple[Path, int]]:
    return [(path, label) for label, paths in enumerate(classes.values()) for path in paths]


def _read_tree(root: Path) -> dict[str, dict[str, list[Path]]]:
    """``{domain: {class: images}}``, sorted by name; checked to be complete."""
    check_folder(root, "one folder per domain and in it one per class")
    tree = {domain.name: {label.name: _images(label) for label in _folders(domain)} for domain in _folders(root)}
    if len(tree) < 2:
        raise DataError(
            f"Expected {root} to hold at least 2 domains, one of them to leave out, but got"
            f" {list(tree) or 'no folder'}. Set `root` to the folder of the domains."
        )
    classes = sorted({label for labels in tree.values() for label in labels})
    if not classes:
        raise DataError(
            f"Expected one folder per class in each domain of {root}, but got none in {', '.join(tree)}. The layout is"
            " `root/<domain>/<class>/<image>`."
        )
    if lacking := {name: missing for name in tree if (missing := [c for c in classes if c not in tree[name]])}:
        details = "; ".join(f"{name!r} lacks {', '.join(map(repr, missing))}" for name, missing in lacking.items())
        raise DataError(
            f"Expected all domains in {root} to have the same classes, but {details}. Add the folders, or remove the"
            " class from the other domains."
        )
    if empty := [root / name / label for name in tree for label in classes if not tree[name][label]]:
        raise DataError(
            f"Expected each class folder to hold images ({', '.join(sorted(_EXTENSIONS))}), but {len(empty)} hold none,"
            f" the first of them {empty[0]}. Extract the archive again, or remove the class from all domains."
        )
    return {name: {label: tree[name][label] for label in classes} for name in tree}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in _EXTENSIONS and not path.name.startswith(".")
    )


def _eval_transform(size: int, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> Callable[[Any], Any]:
    T = transforms()
    return T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(mean, std)])


def _train_transform(size: int, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> Callable[[Any], Any]:
    T = transforms()
    views = [
        T.RandomResizedCrop(size, scale=(0.7, 1.0)),
        T.RandomHorizontalFlip(),
        T.ColorJitter(0.3, 0.3, 0.3, 0.3),
        T.RandomGrayscale(0.1),
    ]
    return T.Compose([*views, T.ToTensor(), T.Normalize(mean, std)])
