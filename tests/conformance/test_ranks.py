"""Two ranks of any sizes are one process: parameters, optimiser and method state, metrics."""

from __future__ import annotations

import functools
from unittest import mock

import pytest

from _support.cases import exact
from _support.fits import deviation, same
from _support.runs import fit

# How the global batch of 16 rows, and the last one of 7, is divided; and what else varies.
RUNS = {
    "uneven": (((5, 11), (2, 5)), {"max_epochs": 3}),
    "uneven, accumulated": (((5, 11), (2, 5)), {"accumulate_grad_batches": 2}),
    "even": (((8, 8), (4, 3)), {}),
    "adam": (((5, 11), (2, 5)), {"optimizer": "adam"}),
}
TOLERANCE = {"adam": 1e-9}


@functools.cache
def _alone(name, **options):
    """In one process; once, however the batches are divided."""
    return fit(0, name, **options)


@pytest.mark.parametrize("kind", RUNS)
def test_two_ranks_are_one_process(ranks, method, kind):
    sizes, options = RUNS[kind]
    first, second = ranks.run(_fit, method, *sizes, options)
    assert same(first, second)
    if exact(method):
        found = deviation(_alone(method, **options), first)
        assert found < TOLERANCE.get(kind, 1e-12)


VARIANTS = [
    ("HessianAlignment", {"statistic": "diagonal", "detach_target": False}),
    ("HessianAlignment", {"statistic": "frobenius"}),
    ("HessianAlignment", {"statistic": "frobenius", "detach_target": False, "scale_free": True}),
    ("HessianAlignment", {"statistic": "hutchinson", "n_samples": 3}),
    ("HessianAlignment", {"derivatives": "autograd"}),
    ("Fishr", {"derivatives": "autograd", "ema_bias": "reference", "ema": 0.5}),
    ("IRM", {"form": "squared"}),
    ("MMD", {"kernel": "scaled_gaussian"}),
]


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in VARIANTS]
)
def test_two_ranks_are_one_process_for_every_variant(ranks, name, options):
    """Three rows against thirteen, so that the first rank lacks domains."""
    first, second = ranks.run(_fit, name, (3, 13), (2, 5), {"method": options, "max_epochs": 2})
    assert same(first, second)
    assert deviation(fit(0, name, method=options, max_epochs=2), first) < 1e-12


def test_find_unused_parameters_changes_nothing(ranks, method):
    plain = _alone(method) if exact(method) else ranks.run(_fit, method, (5, 11), (2, 5), {})[0]
    options = {"strategy": {"find_unused_parameters": True}, "module": "unused"}
    unused = ranks.run(_fit, method, (5, 11), (2, 5), options)[0]
    assert deviation(_without_spare(plain), _without_spare(unused)) < 1e-12


def test_two_ranks_need_each_other(ranks):
    """Without what the other rank holds the result is another one: the comparison above can fail."""
    (first, _), whole = ranks.run(_fit_alone, "GroupDRO"), _alone("GroupDRO")
    assert deviation(whole["methods"], first["methods"]) > 1e-3


def _fit(rank, name, sizes, last, options):
    return fit(rank, name, sizes, last, **options)


def _fit_alone(rank, name):
    with mock.patch("debias.ops.groups.global_sum", lambda x: x):
        return fit(rank, name, (5, 11), (2, 5))


def _without_spare(run):
    if "twin" in run["methods"][0].get("owned", {}):  # a copy of the module has spare ones too
        run = run | {"methods": [{k: v for k, v in run["methods"][0].items() if k != "owned"}]}
    return run | {"parameters": {k: v for k, v in run["parameters"].items() if not k.startswith("spare")}}
