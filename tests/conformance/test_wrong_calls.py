"""Every wrong call of a public name is refused with the argument, the rule and what was received; none hangs."""

import resource
import signal
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import debias.functional as functional
from _support.wrong_calls import IDS, LEFT_OUT, SPECIAL, G, N, calls, parameters, public, right
from debias import GroupBalancedSampler, GroupDROLoss, VRExPenalty
from debias.data.samplers import check_batches
from debias.errors import BadRowsError, DebiasError
from debias.metrics import GroupAccuracy, GroupedMetric
from debias.ops.arguments import MOST, check_choice, check_count, check_instance, checked, shown

PUBLIC = public()
SECONDS = 5
BYTES = 2**30
# What is accepted by its nature: places in a batch, from behind; seeds; logits' thresholds; signs that mean something.
NEGATIVE = {
    "adjustment", "attribute", "domain", "group", "identity", "ignore_index", "images", "index", "input", "seed",
    "strength", "target", "targets", "threshold", "unit",
}  # fmt: skip
ACCEPTED = {
    ("EvalSampler", "dataset"): "anything with a length",
    ("FacialActionUnits", "units"): "an empty list are no units, refused with the files at hand",
    ("Settings", "columns"): "an empty list are no metadata",
    ("VOCFolder", "domain_names"): "an empty list are no names",
    ("audit", "layers"): "an empty list are no layers",
    ("gradient_reversal", "x"): "of any shape",
    ("held_out_mean", "trained_on"): "families that are not scored count for nothing",
}


def accepted(name: str, argument: str, kind: str) -> bool:
    return (name, argument) in ACCEPTED or (kind == "negative" and argument in NEGATIVE)


class Hangs(BaseException):
    """It took longer than :data:`SECONDS`."""


@pytest.fixture
def limits():
    """Neither time without end nor memory without bound."""

    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    unit = 1 if sys.platform == "darwin" else 1024
    assert unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) < BYTES


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_wrong_call_is_refused_with_its_argument(name, limits):
    value = PUBLIC[name]
    if name in ("CraftedShifts", "ShiftedValidation", "crafted_shift"):
        pytest.importorskip("kornia", reason="it needs Python 3.11")
    value(**right(name, value, SPECIAL))
    wrong = []
    for argument, kind, bad in calls(name, value, SPECIAL):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            value(**right(name, value, SPECIAL) | {argument: bad})
        except DebiasError as error:
            # A tensor of another shape may be told by the one that it does not fit.
            named = f"`{argument}`" in str(error) or argument in str(error) or kind in ("tensor", "list", "dict")
            if not (named and "xpected" in str(error)):
                wrong.append(f"{argument}={kind}: {error}")
        except Exception as error:
            wrong.append(f"{argument}={kind}: {type(error).__name__}: {error}")
        else:
            if not accepted(name, argument, kind):
                wrong.append(f"{argument}={kind} is accepted")
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert not wrong, "\n".join(wrong)


def test_there_are_enough_calls_and_nothing_public_is_forgotten():
    number = sum(1 for name, value in PUBLIC.items() for _ in calls(name, value, SPECIAL))
    assert number >= 800
    assert all(reason for reason in [*LEFT_OUT.values(), *ACCEPTED.values()])
    assert {name for name, _ in ACCEPTED} <= set(PUBLIC)
    untyped = [f"{n}.{p}" for n, v in PUBLIC.items() for p, q in parameters(v).items() if q.annotation is q.empty]
    assert not untyped


# Numbers and words that gave another formula


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.irm_penalty(torch.zeros(N, 3), IDS, IDS, G, form="unbiassed"), "`form`"),
        (lambda: functional.mmd_penalty(torch.zeros(N, 3), IDS, G, kernel="gauss"), "`kernel`"),
        (lambda: functional.domain_penalisation_weights(torch.zeros(G), normalize="average"), "`normalize`"),
        (lambda: functional.fishr_penalty(torch.zeros(G, 2), torch.ones(G).bool(), reduction="avg"), "`reduction`"),
        (lambda: functional.identity_losses(torch.zeros(N, G), IDS, identity_loss="cross_entropy"), "`identity_loss`"),
        (lambda: GroupDROLoss(G, adjustment=float("nan"), group_counts=[1, 2, 3]), "`adjustment`"),
        (lambda: GroupDROLoss(G, group_counts=[1, float("nan"), 2]), "`group_counts` to be"),
        (lambda: GroupDROLoss(G).set_counts([1, float("inf"), 2]), "`group_counts` to be 3 numbers >= 0 and finite"),
        (lambda: GroupDROLoss(10**30), "`n_groups` to be an integer"),
        (lambda: GroupDROLoss((1000, 1000, 1000)), "`n_groups`"),
        (lambda: GroupAccuracy(10**9), "`n_groups`"),
        (lambda: GroupedMetric(GroupAccuracy, 2), "`metric`.*instance"),
        (lambda: functional.vrex_penalty(torch.zeros(3), torch.zeros(4).long(), 2), "`domains`.*N = 3 from `losses`"),
        (lambda: functional.coral_penalty(torch.zeros(3, 2), torch.zeros(4).long(), 2), "`domains`"),
    ],
)  # fmt: skip
def test_what_was_taken_for_something_else(call, message):
    with pytest.raises(DebiasError, match=message):
        call()


def test_a_saved_state_that_is_not_finite_is_refused():
    saved = GroupDROLoss(G).state_dict()
    saved["log_weights"][1] = torch.nan
    with pytest.raises(DebiasError, match=r"saved `log_weights` of GroupDROLoss to be finite.*resume from an earlier"):
        GroupDROLoss(G).load_state_dict(saved)


@given(st.lists(st.floats(0, 1e308), min_size=2, max_size=4), st.floats(0, 1e300))
@settings(max_examples=50, deadline=None)
def test_a_step_of_group_dro_cannot_overflow(losses, step_size):
    losses = torch.tensor(losses, dtype=torch.float64)
    found = functional.group_dro_weights(torch.zeros_like(losses), losses, step_size=step_size).exp()
    assert found.sum() == pytest.approx(1)
    module = GroupDROLoss(len(losses), step_size=step_size)
    for _ in range(3):
        module._update(losses, [])  # as a batch with these means of groups
    assert module.weights.sum() == pytest.approx(1)


def test_batches_of_another_size_than_the_sampler_balances_are_refused():
    sampler = GroupBalancedSampler([0, 1] * 20, batch_size=6)
    check_batches(torch.utils.data.DataLoader(range(40), batch_size=6, sampler=sampler))
    check_batches(torch.utils.data.DataLoader(range(40), batch_size=7))
    with pytest.raises(DebiasError, match=r"to have its `batch_size` 6, but got 7: its batches would not be balanced"):
        check_batches(torch.utils.data.DataLoader(range(40), batch_size=7, sampler=sampler))


BAD = torch.tensor([0, 1, 7, 0, 1, 2])


@pytest.mark.parametrize(
    ("call", "name", "limit"),
    [
        (lambda x: functional.irm_penalty(x, BAD, IDS, G), "targets", "C = 3"),
        (lambda x: functional.irm_penalty(x, IDS, BAD, G), "domains", "n_domains = 3"),
        (lambda x: functional.hessian_alignment_penalty(x, x, BAD, IDS, G), "targets", "C = 3"),
        (lambda x: functional.vrex_penalty(x[:, 0], BAD, G), "domains", "n_domains = 3"),
        (lambda x: functional.coral_penalty(x, BAD, G), "domains", "n_domains = 3"),
        (lambda x: functional.mmd_penalty(x, BAD, G), "domains", "n_domains = 3"),
        (lambda x: functional.identity_losses(x, BAD), "identities", "K = 3"),
        (lambda x: functional.mixup(x, BAD, x[:, 0]), "partners", "N = 6"),
    ],
)
def test_ids_beyond_their_number_are_refused_also_after_a_right_call(call, name, limit):
    for _ in range(2):
        with pytest.raises(BadRowsError, match=f"`{name}` to hold ids below {limit}, but got 7 at position 2"):
            call(torch.rand(N, 3))
        functional.vrex_penalty(torch.rand(N), IDS, G)


def test_ids_are_not_looked_at_where_there_is_nothing_to_see():
    @checked("x: float N, y: int N < n_groups")
    def function(x: torch.Tensor, y: torch.Tensor, n_groups: int) -> torch.Tensor:
        return (x * y).sum()

    x = torch.ones(2, N)
    assert torch.vmap(lambda row, ids: function(row, ids, G))(x, torch.stack([IDS, BAD])).tolist() == [6, 11]
    with pytest.raises(BadRowsError, match="`y` to hold ids below n_groups = 3, but got 7"):
        function(x[0], BAD, G)


# The checks themselves


def test_checks_of_each_kind():
    assert check_choice("x", "a", ("a", "b")) == "a"
    with pytest.raises(DebiasError, match="`x` to be one of 'a', 'b', but got 'c'"):
        check_choice("x", "c", ("a", "b"))
    with pytest.raises(DebiasError, match="`x` to be one of 1, but got True"):
        check_choice("x", True, (1,))
    assert isinstance(check_instance("x", nn.ReLU(), nn.Module), nn.ReLU)
    with pytest.raises(DebiasError, match=r"`x` to be a Module, but got .* Pass an instance, `ReLU\(...\)`"):
        check_instance("x", nn.ReLU, nn.Module)
    with pytest.raises(DebiasError, match="`n` to be an integer >= 1 and <= 1000000, but got"):
        check_count("n", 10**5000, 1, MOST)
    assert shown(torch.zeros(2, 3)) == "a tensor of shape (2, 3) and float32"
    assert len(shown("x" * 10_000)) < 250


def test_what_a_function_refuses_itself_comes_first_and_other_errors_stay():
    @checked("x: float N, y: int N", factor="[0, 1]")
    def function(x: torch.Tensor, y: torch.Tensor, factor: float = 1.0, flag: bool = False) -> None:
        if factor == -1:
            raise DebiasError("its own words")
        if flag:
            raise ZeroDivisionError

    x, y = torch.zeros(2), torch.zeros(2).long()
    function(x, y)
    with pytest.raises(DebiasError, match="its own words"):
        function(x, y, factor=-1)
    with pytest.raises(ZeroDivisionError):
        function(x, y, flag=True)
    for args, message in (
        ((x, y.float()), r"`y` to be int of shape \(N,\), but got a tensor .* float32, with N = 2 from `x`"),
        ((x, y[:1]), r"but got a tensor of shape \(1,\) and int64, with N = 2 from `x`"),
        ((x, y, 2.0), r"`factor` to be a number in \[0, 1\], but got 2.0"),
        ((x, y, "a"), r"`factor` to be a finite number, but got 'a'"),
        ((x, y, 1.0, 1), r"`flag` to be True or False, but got 1"),
        (([0.0, 0.0], y), r"`x` to be a tensor, but got \[0.0, 0.0\]"),
    ):
        with pytest.raises(DebiasError, match=message):
            function(*args)


def test_a_penalty_module_is_checked_as_the_function_is():
    with pytest.raises(DebiasError, match="`domains`"):
        VRExPenalty(G)(torch.zeros(N), IDS[:2])
