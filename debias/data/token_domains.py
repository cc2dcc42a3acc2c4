"""Documents of several domains, of which most are of one: in small what language models learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from debias.data._common import GroupDataModule, check_stated
from debias.data.tagging import TaggedDataset, tag
from debias.ops.arguments import check_count, checked

__all__ = ["TokenDomains"]

_DOMAINS = ("web", "books", "code")


class TokenDomains(GroupDataModule):
    """Documents of three domains, made from a seed. No download.

    Each domain has a random chain of its own, which says how likely each token follows the one before: in ``web`` the
    most likely one of four follows in 85 % of the cases, in ``books`` in 70 % and in ``code`` in 55 %. Of the training
    documents 80 % are of ``web``, 15 % of ``books`` and 5 % of ``code``; validation and test hold as many of each.

    Batches are token ids, int64 ``(N, length)``. Tags: ``group``, the domain. After ``setup``: what a
    :class:`GroupDataModule` has.

    Args:
        batch_size: documents per batch and rank.
        seed: seed of the chains, the documents and the order of training documents.
        n_groups: always 3; stated so that other parts of a configuration can refer to it.
        n_documents: training documents; validation and test have a fifth each.
        length: tokens of a document, at least 2.
        vocabulary: number of tokens, at least 8.
        balance: None, or "group" to draw training batches with each domain equally often.
        num_workers: worker processes of each loader.

    Raises:
        DebiasError: an argument is out of range.

    Example:
        >>> from debias.data import TokenDomains
        >>> tokens = TokenDomains()
        >>> tokens.setup()
        >>> tokens.group_counts.tolist(), tokens.train_set[0].sample.shape
        ([960, 180, 60], torch.Size([32]))
    """

    @checked()
    def __init__(
        self,
        batch_size: int = 32,
        seed: int = 0,
        n_groups: int = 3,
        n_documents: int = 1200,
        length: int = 32,
        vocabulary: int = 64,
        balance: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, len(_DOMAINS), "one group for each domain")
        self.n_groups = n_groups
        self.n_documents = check_count("n_documents", n_documents, 20)
        self.length = check_count("length", length, 2)
        self.vocabulary = check_count("vocabulary", vocabulary, 8)

    def setup(self, stage: str | None = None) -> None:
        """Make the documents; the same ones whatever the stage."""
        # RandomState, because its stream is frozen: documents are the same with every version of NumPy.
        random = np.random.RandomState(self.seed)
        following = [random.randint(self.vocabulary, size=(self.vocabulary, 4)) for _ in _DOMAINS]
        train = np.array([0] * round(0.8 * self.n_documents) + [1] * round(0.15 * self.n_documents))
        train = np.concatenate([train, np.full(self.n_documents - len(train), 2)])
        held_out = np.arange(self.n_documents // 5) % len(_DOMAINS)
        self.train_set, self.val_set, self.test_set = (
            self._documents(domains, following, random) for domains in (train, held_out, held_out)
        )
        self._describe_groups(_DOMAINS)

    def _documents(self, domains: Any, following: list[Any], random: Any) -> TaggedDataset:
        chance = np.array([0.85, 0.7, 0.55])[domains]
        tokens = random.randint(self.vocabulary, size=(len(domains), self.length))
        for i in range(1, self.length):
            choice = np.where(random.rand(len(domains)) < chance, 0, random.randint(1, 4, size=len(domains)))
            tokens[:, i] = np.stack(following)[domains, tokens[:, i - 1], choice]
        return tag(_Documents(torch.from_numpy(tokens)), group=torch.from_numpy(domains))  # type: ignore[return-value]


class _Documents(Dataset[Tensor]):
    """Documents of one length."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]
