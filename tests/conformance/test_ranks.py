"""Two ranks of any sizes are one process: parameters, optimiser and method state, metrics; errors come on all ranks."""

from __future__ import annotations

import pytest
import torch

from _support.cases import METHODS, exact, has_groups
from _support.fits import deviation, places, same
from _support.runs import fit
from debias.errors import BadRowsError, UnsupportedStrategyError
from debias.step.owned import OwnedModule  # noqa: F401

SPLITS = [((5, 11), (2, 5)), ((8, 8), (4, 3))]


@pytest.mark.parametrize("sizes", SPLITS, ids=["uneven", "even"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_are_one_process(ranks, method, sizes, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    first, second = ranks.run(_fit, method, *sizes, options)
    assert same(first, second)
    if exact(method):
        assert deviation(_fit(0, method, (16,), (7,), options), first) < 1e-12


def test_two_ranks_are_one_process_with_adam(ranks, method):
    first, second = ranks.run(_fit, method, (5, 11), (2, 5), {"optimizer": "adam"})
    assert same(first, second)
    if exact(method):
        assert deviation(_fit(0, method, (16,), (7,), {"optimizer": "adam"}), first) < 1e-9


def test_find_unused_parameters_changes_nothing(ranks, method):
    plain = ranks.run(_fit, method, (5, 11), (2, 5), {})[0]
    found = ranks.run(_fit, method, (5, 11), (2, 5), {"strategy": {"find_unused_parameters": True}})[0]
    assert deviation(plain, found) < 1e-12


def _fit(rank, name, sizes, last, options):
    return fit(rank, name, sizes, last, **options)
