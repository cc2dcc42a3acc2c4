"""Numbers as arguments: bounds, NumPy's numbers, and what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from debias.errors import DebiasError
from debias.ops.arguments import check_count, check_number


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
