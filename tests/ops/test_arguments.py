"""Numbers as arguments: bounds, NumPy's numbers, and what is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from debias.errors import BadRowsError, DebiasError
from debias.functional import focal_loss, generalized_cross_entropy, ldam_loss
from debias.ops.arguments import MOST, check_count, check_ids, check_number, check_options, checked


@pytest.mark.parametrize(
    ("value", "within"),
    [(0, "[0, inf)"), (1e300, "[0, inf)"), (1, "(0, 1]"), (0.0, "[0, 1)"), (1e-300, "(0, 1]"), (-3, "(-inf, inf)")],
)
def test_bounds_belong_to_an_interval_where_the_bracket_is_square(value, within):
    assert check_number("x", value, within) == value


@pytest.mark.parametrize(
    ("value", "within", "rule"),
    [
        (-1e-300, "[0, inf)", ">= 0"),
        (0, "(0, inf)", "> 0"),
        (0, "(0, 1]", r"in \(0, 1\]"),
        (1, "[0, 1)", r"in \[0, 1\)"),
        (float("inf"), "[0, inf)", ">= 0"),
        (float("nan"), "[0, inf)", ">= 0"),
        (np.float32("nan"), "[0, 1]", r"in \[0, 1\]"),
        (True, "[0, 1]", r"in \[0, 1\]"),
        ("0.5", "[0, 1]", r"in \[0, 1\]"),
        (None, "[0, 1]", r"in \[0, 1\]"),
        (torch.tensor(0.5), "[0, 1]", r"in \[0, 1\]"),
        (1j, "[0, 1]", r"in \[0, 1\]"),
    ],
)
def test_other_values_are_refused_with_the_rule(value, within, rule):
    with pytest.raises(DebiasError, match=f"`x` to be a number {rule}, but got "):
        check_number("x", value, within)


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.int64(1), 1, 0.5])
def test_what_comes_back_is_a_number_of_python(value):
    assert type(check_number("x", value)) in (int, float)
    assert check_number("x", value) == value


@pytest.mark.parametrize("value", [1, 7, np.int32(3)])
def test_counts(value):
    assert type(check_count("n", value)) is int
    assert check_count("n", value) == value


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None, np.float64(2)])
def test_what_is_no_count(value):
    with pytest.raises(DebiasError, match="`n` to be an integer >= 1, but got"):
        check_count("n", value)


def test_the_message_says_what_is_counted():
    with pytest.raises(DebiasError, match="`n` to be a number of optimiser steps >= 0, but got -1"):
        check_count("n", -1, 0, what="a number of optimiser steps")


def test_ids_that_are_all_there():
    assert check_ids("x", torch.tensor([[0, 4], [2, 0]])) == 5
    for bad, got in (([0, -1], "from -1 to 0"), ([0, MOST], f"from 0 to {MOST}"), ([], "none")):
        with pytest.raises(BadRowsError, match=f"`x` to hold ids from 0 to 999999, but got (ids )?{got}"):
            check_ids("x", torch.tensor(bad, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 2.0}, r"`rate` to be a number in \[0, 1\], but got 2.0"),
        ({"rates": [0.5, 2.0]}, r"`rates` to be a number in \[0, 1\], but got 2.0"),
        ({"rates": []}, "`rates` to hold at least one number"),
        ({"rate": "fast"}, "`rate` to be a finite number, but got 'fast'"),
    ],
)
def test_what_takes_long_is_checked_before_it_runs_and_options_before_they_are_used(options, message):
    ran = []

    @checked(first=True, rate="[0, 1]", rates="[0, 1]")
    def function(loader: Iterable[Any], *, rate: float = 1.0, rates: Sequence[float] = (1.0,)) -> None:
        ran.append(loader)

    with pytest.raises(DebiasError, match=message):
        function(iter("ab"), **options)
    with pytest.raises(DebiasError, match=message):
        check_options("options", options, function)
    with pytest.raises(DebiasError, match="`loader` to be an iterable, but got 3"):
        function(3)
    assert not ran
    with pytest.raises(DebiasError, match="`options` to hold options of `function`, 'rate', 'rates', but got 'loader'"):
        check_options("options", {"loader": []}, function)
    assert check_options("options", {"rate": 0.5}, function) == {"rate": 0.5}


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: focal_loss(z, y),
        lambda z, y: generalized_cross_entropy(z, y),
        lambda z, y: ldam_loss(z, y, torch.tensor([0.1, 0.2, 0.5])),
    ],
    ids=["focal", "generalized", "ldam"],
)
def test_a_missing_label_is_said_by_a_criterion_that_has_no_use_for_it(loss):
    logits, targets = torch.zeros(3, 3), torch.tensor([0, -1, 2])
    for _ in range(2):  # of the same shapes a second time, too
        with pytest.raises(BadRowsError, match=r"`targets` to hold ids from 0 to 2, but got -1 at position 1"):
            loss(logits, targets)
    assert loss(logits, targets.clamp(min=0)).shape == (3,)
    with pytest.raises(BadRowsError, match="-1 at position 1"):
        loss(logits, targets)
