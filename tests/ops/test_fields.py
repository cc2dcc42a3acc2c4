"""Arguments stated once: constructors, signatures and docstrings made from fields."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import KW_ONLY, field

import numpy as np
import pytest
import torch
from torch import nn

import debias
import debias.methods
from debias.cli.listing import methods
from debias.errors import DebiasError
from debias.ops.arguments import checked
from debias.ops.fields import arguments, field_values


@arguments
class Options:
    """Options.

    Args:
        rate: how fast,
            on two lines.
        kind: which.
    """

    rate: float = 0.1
    kind: str = "a"


@arguments(kw_only=False)
class Places:
    """Places.

    Args:
        first: where it begins.
        last: where it ends.
    """

    first: int = 0
    _: KW_ONLY
    last: int = 1


@arguments
class Sized(nn.Module):
    """Sized.

    Args:
        size: how many.
    """

    size: int = field(kw_only=False)

    def __post_init__(self):
        nn.Module.__init__(self)


@arguments
class Whole(Options, Places, Sized):
    """A module.

    Args:
        rate: another text.

    Returns:
        Nothing.
    """

    rate: float = 0.5
    network: nn.Module | None = None
    made: torch.Tensor = field(init=False)


@arguments
class Other(Options):
    """Has the same options and no more."""


def test_the_signature_has_positional_arguments_first_and_ones_own_before_the_bases():
    assert list(inspect.signature(Whole).parameters) == ["size", "first", "rate", "network", "kind", "last"]
    assert str(inspect.signature(Whole)).startswith("(size: int, first: int = 0, *, rate: float = 0.5, network: torch.")
    module = Whole(3, 4, last=5)
    assert (module.size, module.first, module.last, module.rate, module.kind) == (3, 4, 5, 0.5, "a")


def test_every_argument_is_described_once_as_the_nearest_class_does():
    assert Whole.__doc__ == textwrap.dedent(
        """\
        A module.

        Args:
            size: how many.
            first: where it begins.
            rate: another text.
            kind: which.
            last: where it ends.

        Returns:
            Nothing.
        """
    )
    assert "rate: how fast,\n        on two lines.\n" in Other.__doc__


@checked(share="(0, 1]", count="[2, inf)", weights="[0, inf)")
def formula(x, *, share=0.5, count=2, weights=None):
    """A formula.

    Args:
        x: what it is of.
        share: of the whole.
        count: how many.
        weights: one each.
    """


@arguments(of=formula, rate="[0, inf)")
class Ranged:
    """Options.

    Args:
        rate: how fast.
        count: how many times.

    Logs:
        ``train/<key>``.
    """

    rate: float = 0.1
    share: float | None = None
    count: int = 3
    weights: Sequence[float] | None = None


@arguments(rate="(0, inf)")
class Narrow(Ranged):
    """Narrower."""

    key = "narrow"


def test_numbers_are_refused_outside_of_the_intervals_that_were_stated_once():
    made = Ranged(rate=np.float32(0.5), share=1, count=np.int64(2), weights=[0, np.float64(0.5)])
    assert [made.rate, made.share, made.count, made.weights] == [0.5, 1, 2, [0, 0.5]]
    assert [type(x) for x in (made.rate, made.count, made.weights[1])] == [float, int, float]
    assert Ranged(rate=0).share is None
    for wrong, message in [
        ({"rate": -1}, "`rate` to be a number >= 0, but got -1"),
        ({"rate": None}, "`rate` to be a number >= 0, but got None"),
        ({"share": 0.0}, r"`share` to be a number in \(0, 1], but got 0.0"),
        ({"count": 2.5}, "`count` to be an integer >= 2, but got 2.5"),
        ({"weights": [1, -1]}, "`weights` to be a number >= 0, but got -1"),
        ({"weights": []}, "`weights` to hold at least one number"),
        ({"weights": "many"}, "`weights` to be"),
    ]:
        with pytest.raises(DebiasError, match=message):
            Ranged(**wrong)
    with pytest.raises(DebiasError, match="`rate` to be a number > 0"):
        Narrow(rate=0)
    with pytest.raises(DebiasError, match="`share` to be"):
        Narrow(share=2.0)


def test_arguments_are_described_as_the_function_does_that_they_go_by():
    assert Narrow.__doc__ == textwrap.dedent(
        """\
        Narrower.

        Args:
            rate: how fast.
            share: of the whole.
            count: how many times.
            weights: one each.

        Logs:
            ``train/narrow``.
        """
    )


def test_a_network_among_the_arguments_is_no_part_of_the_module():
    module = Whole(1, network=nn.Linear(2, 2))
    assert list(module.parameters()) == []
    assert module.network.in_features == 2


def test_what_two_classes_share_is_handed_on_by_name():
    assert field_values(Whole(1, kind="b"), Other) == {"rate": 0.5, "kind": "b"}


def test_instances_are_copied_and_pickled():
    module = Other(kind="b")
    assert [x.kind for x in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))] == ["b", "b"]


def test_wrong_arguments():
    with pytest.raises(DebiasError, match=r"arguments of Whole \(size, .*got `ratee`. Did you mean `rate`\?"):
        Whole(1, ratee=2)
    with pytest.raises(TypeError, match=r"Whole\(\) missing a required argument: 'size'"):
        Whole()
    with pytest.raises(TypeError, match=r"Whole\(\) too many positional arguments"):
        Whole(1, 2, 3)


PUBLIC = [name for name in debias.__all__[1:] if name in vars(debias.methods) and not name.endswith("Mixin")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_of_every_public_class_is_described(name):
    cls = getattr(debias, name)
    lines = re.findall(r"^    ([\w*, ]+): ", inspect.getdoc(cls), re.M)  # several may share one
    described = {name.strip(" *") for line in lines for name in line.split(",")}
    assert set(inspect.signature(cls).parameters) <= described


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_callback_has_what_its_module_has(name):
    """But for what the callback reads from the run: the network's width, and how the loss was called."""
    cls = methods()[name]
    module = getattr(cls, "module_class", None)
    read = {"in_features", "loss", "weight", "pos_weight", "label_smoothing", "ignore_index", "head_bias"}
    if module is not None:
        assert set(inspect.signature(module).parameters) - read <= set(inspect.signature(cls).parameters)


@pytest.mark.slow  # it reads torch
def test_the_type_checker_sees_every_argument(tmp_path):
    pytest.importorskip("mypy", reason="the type checker is one of the developers' tools")
    (tmp_path / "user.py").write_text(
        "import torch; from debias import GroupDRO, GroupDROLoss, VREx, GroupDROMixin, VRExMixin\n"
        "GroupDRO('place', 4, ema_rate=0.5, minimum_weight=0.1, loss='sum')\n"
        "VREx(('a', 'b'), (2, 3), penalty_weight=1.0, divide_loss=True)\n"
        "GroupDROMixin().configure_group_dro(n_groups=4, step_size=0.1)\n"
        "GroupDRO('place', 4, absent='sometimes')\n"
        "VREx('place', 4, penalty_wieght=1.0)\n"
        "GroupDROLoss()\n"
        "VRExMixin().configure_vrex(4, penalty_weight='much')\n"
        "VRExMixin().vrex_penalty(torch.zeros(2), domains=torch.zeros(2), step=3)\n"
        "VRExMixin().vrex_penalty(torch.zeros(2), groups=torch.zeros(2))\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--ignore-missing-imports", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    lines = [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line]
    assert lines == ["5", "6", "7", "8", "10"], done.stdout + done.stderr
