"""Group DRO against the formula written out with plain floats, for every option, over batches that lack groups."""

import itertools
import math

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from _support.fits import Classifier, make_trainer, problem, train
from debias import DomainPenalisation, GroupDRO, GroupDROLoss, GroupDROMixin, GroupReweighting, tag
from debias.errors import BadRowsError, DebiasError
from debias.functional import greedy_group_weights, group_dro_weights
from debias.step.watcher import MAX_LOGGED_GROUPS

G = 4
COUNTS = [50, 30, 15, 5]


def batches(steps=12, seed=0):
    """Losses and groups; some groups are absent from some batches, some samples are unlabelled."""
    g = torch.Generator().manual_seed(seed)
    for t in range(steps):
        n = int(torch.randint(1, 9, (), generator=g))
        groups = torch.randint(-1, G if t % 3 else 2, (n,), generator=g)
        yield 3 * torch.rand(n, generator=g, dtype=torch.float64), groups


class Oracle:
    """Sagawa et al. as written: plain floats, loops, no tensors shared with the implementation."""

    def __init__(
        self, step_size=0.01, adjustment=0.0, normalize_loss=False, alpha=None, absent="zero", minimum_weight=0.0
    ):
        self.eta, self.normalize, self.alpha, self.absent, self.mvw = (
            step_size,
            normalize_loss,
            alpha,
            absent,
            minimum_weight,
        )
        constants = [adjustment] * G if isinstance(adjustment, float) else adjustment
        self.adjustment = [c / math.sqrt(n) for c, n in zip(constants, COUNTS, strict=True)]
        self.q = [1 / G] * G
        self.running = [0.0] * G
        self.seen = [False] * G

    def __call__(self, losses, groups):
        mean, present = [0.0] * G, [False] * G
        for k in range(G):
            mine = [float(x) for x, i in zip(losses, groups, strict=True) if int(i) == k]
            if mine:
                mean[k], present[k] = math.fsum(mine) / len(mine), True
        for k in range(G):
            if present[k]:
                self.running[k] = 0.9 * self.running[k] + 0.1 * mean[k] if self.seen[k] else mean[k]
                self.seen[k] = True
        if self.alpha is not None:
            self.q = self.greedy()
        else:
            a = [mean[k] if present[k] or self.absent != "ema" else self.running[k] for k in range(G)]
            a = [x + c for x, c in zip(a, self.adjustment, strict=True)]
            if self.absent == "skip":
                a = [x if p else 0.0 for x, p in zip(a, present, strict=True)]
            if self.normalize:
                total = sum(a)
                a = [x / total if total else x for x in a]
            q = [x * math.exp(self.eta * y) for x, y in zip(self.q, a, strict=True)]
            self.q = [x / math.fsum(q) for x in q]
        return math.fsum(q * m for q, m in zip(self.q, mean, strict=True))

    def greedy(self):
        fraction = [n / sum(COUNTS) for n in COUNTS]
        value = [r + c for r, c in zip(self.running, self.adjustment, strict=True)]
        weights, left = [0.0] * G, 1.0
        for k in sorted(range(G), key=lambda k: -value[k]):
            weights[k] = min(fraction[k] / self.alpha, left)
            left -= weights[k]
        return [self.mvw * f + (1 - self.mvw) * w for f, w in zip(fraction, weights, strict=True)]


OPTIONS = [
    {},
    {"step_size": 0.7},
    {"step_size": 0.0},
    {"step_size": 0.3, "adjustment": 2.0},
    {"step_size": 0.3, "adjustment": [1.0, 0.0, -0.5, 3.0]},
    {"step_size": 0.3, "adjustment": 2.0, "absent": "skip"},
    {"step_size": 0.3, "absent": "ema"},
    {"step_size": 0.3, "adjustment": 1.0, "absent": "ema"},
    {"step_size": 0.5, "normalize_loss": True},
    {"step_size": 0.5, "normalize_loss": True, "adjustment": 1.0},
    {"alpha": 0.2},
    {"alpha": 1.0},
    {"alpha": 0.37, "adjustment": 1.5},
    {"alpha": 0.2, "minimum_weight": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_the_formula_over_a_sequence(options):
    oracle = Oracle(**options)
    criterion = GroupDROLoss(G, group_counts=COUNTS, **options)
    for losses, groups in batches():
        expected = oracle(losses, groups)
        assert float(criterion(losses, groups)) == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert criterion.weights.tolist() == pytest.approx(oracle.q, rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_treats_the_weights_as_constants(options):
    criterion = GroupDROLoss(G, group_counts=COUNTS, **options)
    for losses, groups in batches(4):
        losses.requires_grad_()
        (grad,) = torch.autograd.grad(criterion(losses, groups), losses)
        q = criterion.weights
        for i, k in enumerate(groups.tolist()):
            expected = float(q[k]) / int((groups == k).sum()) if k >= 0 else 0.0
            assert float(grad[i]) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_gradcheck():
    criterion = GroupDROLoss(G).eval()  # the objective at fixed weights
    losses, groups = torch.rand(6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 1, 3, -1, 0])
    assert torch.autograd.gradcheck(lambda x: criterion(x, groups), losses)
    assert torch.autograd.gradgradcheck(lambda x: criterion(x**2, groups), losses)


def test_evaluation_mode_leaves_the_weights():
    criterion = GroupDROLoss(G, step_size=1.0).eval()
    criterion(torch.tensor([5.0]), torch.tensor([2]))
    assert criterion.weights.tolist() == [0.25] * 4


# -- invariants
# ----------------------------------------------------------------------------------------------------------

losses_and_groups = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 5), min_size=n, max_size=n), st.lists(st.integers(-1, G - 1), min_size=n, max_size=n)
    )
)


def as_tensors(example):
    losses, groups = example
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(groups)


def run(sequence, n_groups=G, **options):
    criterion = GroupDROLoss(n_groups, step_size=0.4, **options)
    return [float(criterion(*as_tensors(b))) for b in sequence], criterion.weights


@settings(deadline=None, max_examples=50)
@given(st.lists(losses_and_groups, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(sequence, random):
    shuffled = []
    for losses, groups in sequence:
        order = random.sample(range(len(losses)), len(losses))
        shuffled.append(([losses[i] for i in order], [groups[i] for i in order]))
    a, b = run(sequence), run(shuffled)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=50)
@given(st.lists(losses_and_groups, min_size=1, max_size=4), st.permutations(range(G)))
def test_the_numbering_of_groups_does_not_matter(sequence, new):
    renamed = [(losses, [new[k] if k >= 0 else k for k in groups]) for losses, groups in sequence]
    (values, weights), (other_values, other_weights) = run(sequence), run(renamed)
    torch.testing.assert_close(values, other_values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, other_weights[list(new)], rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_one_group_is_plain_training(sequence):
    values, weights = run([(losses, [0] * len(losses)) for losses in sequence], n_groups=1)
    assert values == pytest.approx([math.fsum(x) / len(x) for x in sequence], rel=1e-12, abs=1e-14)
    assert weights.tolist() == [1.0]


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 5), st.integers(1, 5))
def test_equal_groups_are_plain_training(loss, repeats):
    values, weights = run([([loss] * G * repeats, list(range(G)) * repeats)] * 3)
    assert values == pytest.approx([loss] * 3, rel=1e-12, abs=1e-14)
    assert weights.tolist() == pytest.approx([1 / G] * G)


@settings(deadline=None, max_examples=50)
@given(st.lists(losses_and_groups, min_size=1, max_size=6))
def test_weights_are_a_distribution(sequence):
    _, weights = run(sequence)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
    assert (weights > 0).all()


@settings(deadline=None, max_examples=30)
@given(losses_and_groups)
def test_membership_and_ids_agree(example):
    losses, groups = as_tensors(example)
    a, b = GroupDROLoss(G, step_size=0.4), GroupDROLoss(G, step_size=0.4)
    members = groups.unsqueeze(1) == torch.arange(G)
    torch.testing.assert_close(a(losses, groups), b(losses, members), rtol=1e-13, atol=0)


def test_overlapping_membership():
    members = torch.tensor([[True, True], [False, True], [False, False]])
    criterion = GroupDROLoss(2, step_size=0.0)
    value = criterion(torch.tensor([2.0, 4.0, 99.0], dtype=torch.float64), members)
    assert float(value) == pytest.approx(0.5 * 2.0 + 0.5 * 3.0)


# -- numerics and state
# --------------------------------------------------------------------------------------------------


def test_large_steps_do_not_overflow():
    criterion = GroupDROLoss(2, step_size=1000.0)
    for _ in range(5):
        value = criterion(torch.tensor([50.0, 1.0]), torch.tensor([0, 1]))
    assert float(value) == pytest.approx(50.0)
    assert criterion.weights.tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_losses_and_modules_keep_a_precise_state(dtype):
    criterion, exact = GroupDROLoss(G).to(dtype), GroupDROLoss(G)
    for losses, groups in batches(5):
        rounded = losses.to(dtype)
        value = criterion(rounded, groups)
        exact(rounded.double(), groups)
        assert value.dtype == dtype
    assert criterion.log_weights.dtype == torch.float64
    torch.testing.assert_close(criterion.weights, exact.weights, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0)


def test_state_dict_resumes_bitwise(tmp_path):
    whole, first = GroupDROLoss(G, 0.3, 1.0, COUNTS, absent="ema"), GroupDROLoss(G, 0.3, 1.0, COUNTS, absent="ema")
    data = list(batches())
    for batch in data[:6]:
        whole(*batch), first(*batch)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = GroupDROLoss(G, 0.3, 1.0, absent="ema")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in data[6:]:
        assert torch.equal(whole(*batch), second(*batch))
    assert torch.equal(whole.log_weights, second.log_weights)


def test_step_size_may_change_on_resume_but_groups_may_not():
    state = GroupDRO("place", 3, step_size=0.1).state_dict()
    GroupDRO("place", 3, step_size=0.5).load_state_dict(state)
    with pytest.raises(DebiasError, match="number of groups the checkpoint was made with"):
        GroupDRO("place", 4).load_state_dict(state)


def test_greedy_weights_are_filled_from_the_worst_group():
    losses, fractions = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0.6, 0.1, 0.3])
    assert greedy_group_weights(losses, fractions, alpha=0.2).tolist() == pytest.approx([0, 0.5, 0.5])
    assert greedy_group_weights(losses, fractions, alpha=1.0).tolist() == pytest.approx(fractions.tolist())


def test_pure_update():
    log_q = torch.log_softmax(torch.randn(G, dtype=torch.float64), 0)
    a = torch.rand(G, dtype=torch.float64)
    q = log_q.exp() * torch.exp(0.3 * a)
    torch.testing.assert_close(group_dro_weights(log_q, a, step_size=0.3).exp(), q / q.sum(), rtol=1e-13, atol=0)


# -- arguments and bad rows
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_groups": 0}, "`n_groups` to be a positive integer"),
        ({"n_groups": 2.5}, "`n_groups` to be a positive integer"),
        ({"n_groups": True}, "`n_groups` to be a positive integer"),
        ({"n_groups": 2, "step_size": -1}, "`step_size` to be a number >= 0, but got -1"),
        ({"n_groups": 2, "step_size": float("nan")}, "`step_size`"),
        ({"n_groups": 2, "alpha": 0.0}, r"`alpha` to be a number in \(0, 1\]"),
        ({"n_groups": 2, "absent": "drop"}, "`absent` to be 'zero', 'skip' or 'ema', but got 'drop'"),
        ({"n_groups": 2, "adjustment": [1.0]}, "`adjustment` to be one number or 2, but got 1"),
        ({"n_groups": 2, "group_counts": [3, -1]}, r"numbers >= 0.*\[3.0, -1.0\]"),
        ({"n_groups": 2, "group_counts": [3]}, "`group_counts` to be 2 numbers"),
        ({"n_groups": 2, "group_counts": [3, 0], "group_names": ["a", "b"]}, "training samples, but got none of b"),
        ({"n_groups": 2, "group_names": ["a", "a"]}, "`group_names` to hold 2 different names"),
        ({"n_groups": 2, "ema_rate": 0.0}, "`ema_rate`"),
    ],
)
def test_wrong_arguments(kwargs, match):
    with pytest.raises(DebiasError, match=match):
        GroupDROLoss(**kwargs)


def test_wrong_arguments_of_the_callback():
    with pytest.raises(DebiasError, match="one number for each key"):
        GroupDRO(("a", "b"), 4)
    with pytest.raises(DebiasError, match="`name` to be given where `group` is a callable"):
        GroupDRO(lambda batch: batch[1], 4)
    with pytest.raises(DebiasError, match="`loss` to be None, 'sum', an index"):
        GroupDRO("a", 4, loss="mean")
    with pytest.raises(DebiasError, match="`rows` to be"):
        GroupDRO("a", 4, rows="stacked")
    with pytest.raises(DebiasError, match="`losses` to be"):
        GroupDRO("a", 4, losses="group")


def test_missing_counts():
    with pytest.raises(DebiasError, match="`group_counts` with `adjustment` or `alpha`"):
        GroupDROLoss(2, adjustment=1.0)(torch.ones(2), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("losses", "groups", "match"),
    [
        (torch.ones(2, 2), torch.zeros(2).long(), r"`losses` to have shape \(N,\)"),
        (torch.ones(2), torch.zeros(3).long(), "`groups` to be integer ids"),
        (torch.ones(2), torch.zeros(2), "`groups` to be integer ids"),
        (torch.ones(2), torch.zeros(2, 3, dtype=torch.bool), "`groups` to be integer ids"),
    ],
)
def test_wrong_shapes(losses, groups, match):
    with pytest.raises(DebiasError, match=match):
        GroupDROLoss(2)(losses, groups)


@pytest.mark.parametrize(
    ("losses", "groups", "match"),
    [
        ([1.0, 2.0], [0, 2], "ids below `n_groups=2`, but 1 rows"),
        ([1.0, float("nan")], [0, 1], "finite losses, but 1 rows"),
        ([float("inf"), float("nan")], [0, 1], "finite losses, but 2 rows"),
    ],
)
def test_bad_rows_raise_before_the_state_changes(losses, groups, match):
    criterion = GroupDROLoss(2, step_size=1.0)
    with pytest.raises(BadRowsError, match=match):
        criterion(torch.tensor(losses), torch.tensor(groups))
    assert criterion.weights.tolist() == [0.5, 0.5]
    criterion(torch.ones(2), torch.tensor([0, 1]))  # and the count starts afresh


def test_unlabelled_rows_with_a_bad_loss_are_said_too():
    """They take no part in the value, but their NaN would reach the gradients of whatever they share."""
    with pytest.raises(BadRowsError, match="finite losses, but 1 rows"):
        GroupDROLoss(2)(torch.tensor([1.0, float("nan")]), torch.tensor([0, -1]))


def test_batch_without_any_labelled_row():
    losses = torch.ones(3, requires_grad=True)
    value = GroupDROLoss(2)(losses, torch.full((3,), -1))
    value.backward()
    assert value.item() == 0.0
    assert losses.grad.tolist() == [0.0] * 3


# -- in a LightningModule
# ------------------------------------------------------------------------------------------------


def test_mixin_equals_callback():
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(3, 2).double()

        def training_step(self, batch, batch_idx):
            x, y = batch[:2]
            return torch.nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Mixed(GroupDROMixin, Plain):
        def __init__(self):
            super().__init__()
            self.configure_group_dro(n_groups=3, step_size=0.5)

        def training_step(self, batch, batch_idx):
            x, y, place = batch
            return self.group_dro_loss(torch.nn.functional.cross_entropy(self.net(x), y, reduction="none"), place)

    g = torch.Generator().manual_seed(0)
    x, y, place = torch.randn(12, 3, generator=g).double(), torch.arange(12) % 2, torch.arange(12) % 3
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    plain, mixed = Plain(), Mixed()
    callback = GroupDRO("place", 3, step_size=0.5)
    data = TensorDataset(x, y)
    L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback], **quiet).fit(
        plain, DataLoader(tag(data, place=place), 4)
    )
    L.Trainer(max_epochs=3, accelerator="cpu", **quiet).fit(mixed, DataLoader(TensorDataset(x, y, place), 4))
    torch.testing.assert_close(plain.net.weight, mixed.net.weight, rtol=1e-13, atol=0)
    torch.testing.assert_close(callback.module.weights, mixed.group_dro.weights, rtol=1e-13, atol=0)
    assert "group_dro.log_weights" in mixed.state_dict()


@pytest.mark.parametrize("key", ["place", ("place", "y"), 2])
def test_counts_are_taken_from_the_training_set_once(key):
    place, y = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 0, 0, 1, 1])
    n_groups = (3, 2) if isinstance(key, tuple) else 3
    callback = GroupDRO(key, n_groups, adjustment=1.0)
    data = tag(TensorDataset(torch.randn(6, 3), y, place), place=place, y=y)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 2)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    if isinstance(key, tuple):
        with pytest.raises(DebiasError, match="but got none of 1_1"):
            trainer.fit(Module(), DataLoader(data, 3))
        return
    trainer.fit(Module(), DataLoader(torch.utils.data.Subset(data, [0, 2, 3, 4]), 2))
    assert callback.module.counts.tolist() == [1, 1, 2]


def test_every_option_reaches_the_module():
    """No argument of the callback is dropped on its way."""
    options = {"step_size": 0.2, "adjustment": 1.0, "normalize_loss": True, "alpha": 0.3, "absent": "skip"}
    for size in range(len(options) + 1):
        for chosen in itertools.combinations(options, size):
            module = GroupDRO("place", 2, **{name: options[name] for name in chosen}).module
            for name in set(chosen) - {"adjustment"}:
                assert getattr(module, name) == options[name]
            assert module.adjusts == ("adjustment" in chosen)


def test_a_group_that_the_batch_lacks_has_no_loss():
    """Its zero would look like the best group's."""
    module = GroupDROLoss(3)
    module(torch.tensor([1.0, 3.0]), torch.tensor([0, 2]))
    losses = module.by_group()["loss_by_group"]
    assert losses[[0, 2]].tolist() == [1, 3]
    assert losses[1].isnan()


@pytest.mark.parametrize("n", [MAX_LOGGED_GROUPS, MAX_LOGGED_GROUPS + 1])
@pytest.mark.parametrize(
    ("method", "weight", "loss"),
    [
        (GroupDRO, "group_weight", "loss_by_group"),
        (GroupReweighting, "group_weight", None),
        (DomainPenalisation, "domain_weight", "loss_by_domain"),
    ],
)
def test_many_groups_are_logged_by_their_extremes(method, weight, loss, n):
    ids = torch.arange(3 * n) % n
    x, y = problem(3 * n).tensors
    callback = method("site", n)
    trainer = make_trainer([callback], max_epochs=1)
    loader = DataLoader(tag(TensorDataset(x, y), site=ids), 3 * n)
    trainer.fit(Classifier(), loader, loader)
    logged = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("train/")}
    expected = callback.module.by_group()
    assert logged.pop("train/average_loss") > 0
    if n <= MAX_LOGGED_GROUPS:
        each = {f"train/{key}/{g}": float(v) for key in expected for g, v in enumerate(expected[key])}
        assert logged == pytest.approx(each)
    else:
        worst = {} if loss is None else {f"train/worst_{loss[8:]}_loss": float(expected[loss].max())}
        assert logged == pytest.approx({f"train/max_{weight}": float(expected[weight].max())} | worst)


def test_the_callback_has_the_options_of_the_module():
    """The greedy form with a floor, and its running losses, on an unmodified module as in a loop of one's own."""
    options = {"alpha": 0.4, "ema_rate": 0.7, "minimum_weight": 0.25, "group_counts": [9, 5, 2]}
    callback, plain = GroupDRO("place", 3, **options), GroupDRO("place", 3, **options | {"minimum_weight": 0.0})
    for method in (callback, plain):
        train(Classifier(), [method])
    assert (callback.module.ema_rate, callback.ema_rate) == (0.7, 0.7)
    fractions = torch.tensor([9.0, 5.0, 2.0], dtype=torch.float64) / 16
    expected = 0.25 * fractions + 0.75 * greedy_group_weights(callback.module.losses, fractions, alpha=0.4)
    torch.testing.assert_close(callback.module.weights, expected, rtol=1e-12, atol=0)
    assert not torch.equal(callback.module.weights, plain.module.weights)
