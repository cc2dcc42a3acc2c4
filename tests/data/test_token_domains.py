"""Documents of three domains: how many there are, and how hard they are to guess."""

from __future__ import annotations

import pytest
import torch

from debias.data import TokenDomains
from debias.errors import DebiasError


def test_domains_are_uneven_in_training_and_even_in_validation():
    data = TokenDomains(n_documents=200)
    data.setup()
    assert data.group_counts.tolist() == [160, 30, 10]
    assert data.group_names == ["web", "books", "code"]
    for held_out in (data.val_set, data.test_set):
        assert torch.bincount(held_out.tags["group"]).tolist() == [14, 13, 13]
    assert not torch.equal(data.val_set.dataset.tokens, data.test_set.dataset.tokens)
    batch = next(iter(data.train_dataloader()))
    assert batch.batch.shape == (32, 32)
    assert batch.batch.dtype == torch.int64


def test_the_most_likely_token_follows_as_often_as_stated():
    data = TokenDomains(n_documents=9000, length=40)
    data.setup()
    tokens, domain = data.test_set.dataset.tokens, data.test_set.tags["group"]
    for g, chance in enumerate((0.85, 0.7, 0.55)):
        before, after = tokens[domain == g, :-1].flatten(), tokens[domain == g, 1:].flatten()
        table = torch.zeros(64, 64).index_put_((before, after), torch.ones(len(before)), accumulate=True)
        best = float(table.amax(1).sum() / table.sum())
        assert chance - 0.01 < best < chance + 0.05  # two of the four may be the same token


def test_a_seed_makes_the_documents():
    first, second, other = (TokenDomains(seed=seed, n_documents=20) for seed in (0, 0, 1))
    for data in (first, second, other):
        data.setup()
    assert torch.equal(first.train_set.dataset.tokens, second.train_set.dataset.tokens)
    assert not torch.equal(first.train_set.dataset.tokens, other.train_set.dataset.tokens)


@pytest.mark.parametrize("wrong", [{"n_groups": 2}, {"n_documents": 5}, {"length": 1}, {"vocabulary": 4}])
def test_wrong_arguments(wrong):
    with pytest.raises(DebiasError, match=next(iter(wrong))):
        TokenDomains(**wrong)
