"""Domain penalisation against the paper's formula in plain floats, over epochs that lack domains."""

import itertools
import math

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from _support.fits import Classifier, make_trainer, problem, same
from debias import DomainPenalisation, DomainPenalisationLoss, DomainPenalisationMixin, tag
from debias.errors import BadRowsError, DebiasError
from debias.functional import domain_penalisation_weights

D = 4


def epochs(n=5, steps=4, seed=0):
    """Losses and domains of every batch of every epoch; domain 3 is new in the third, domain 1 lacks in the second."""
    g = torch.Generator().manual_seed(seed)
    for epoch in range(n):
        batches = []
        for _ in range(steps):
            size = int(torch.randint(1, 9, (), generator=g))
            domains = torch.randint(-1, D if epoch > 1 else D - 1, (size,), generator=g)
            if epoch == 1:
                domains[domains == 1] = 0
            batches.append((3 * torch.rand(size, generator=g, dtype=torch.float64), domains))
        yield batches


class Oracle:
    """The paper as written, and its extensions: lists of losses, plain floats."""

    def __init__(self, update="epoch", temperature=1.0, normalize="mean", ema=0.0):
        self.options = update, temperature, normalize, ema
        self.weights = [1.0] * D
        self.known = [None] * D
        self.kept = [[] for _ in range(D)]
        self.batches = 0

    def __call__(self, losses, domains):
        pairs = [(float(x), int(d)) for x, d in zip(losses, domains, strict=True) if int(d) >= 0]
        value = math.fsum(self.weights[d] * x for x, d in pairs) / len(pairs) if pairs else 0.0
        for x, d in pairs:
            self.kept[d].append(x)
        self.batches += 1
        if self.batches == self.options[0]:
            self.settle()
        return value

    def settle(self):
        _, temperature, normalize, ema = self.options
        for d, kept in enumerate(self.kept):
            if kept:
                mean = math.fsum(kept) / len(kept)
                self.known[d] = mean if self.known[d] is None else ema * self.known[d] + (1 - ema) * mean
        found = any(self.kept)
        self.kept, self.batches = [[] for _ in range(D)], 0
        if not found:
            return
        seen = [x for x in self.known if x is not None]
        losses = [math.fsum(seen) / len(seen) if x is None else x for x in self.known]
        exps = [math.exp(x / temperature) for x in losses]
        scale = D if normalize == "mean" else 1
        self.weights = [scale * x / math.fsum(exps) for x in exps]


OPTIONS = [
    {},
    {"normalize": "sum"},
    {"temperature": 0.3},
    {"ema": 0.7},
    {"update": 3},
    {"update": 1, "ema": 0.9, "temperature": 2.0, "normalize": "sum"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_the_formula_over_epochs(options):
    oracle, criterion = Oracle(**options), DomainPenalisationLoss(D, **options)
    for epoch in epochs():
        for losses, domains in epoch:
            assert float(criterion(losses, domains)) == pytest.approx(oracle(losses, domains), rel=1e-12, abs=1e-14)
            if oracle.options[0] != "epoch":
                assert criterion.weights.tolist() == pytest.approx(oracle.weights, rel=1e-12)
        if oracle.options[0] == "epoch":
            oracle.settle()
            criterion.update_weights()
        assert criterion.weights.tolist() == pytest.approx(oracle.weights, rel=1e-12)


def test_the_papers_weights_by_hand():
    """exp(L_d) / sum exp(L_k) with L = (1, 2, 4); the first epoch has ones."""
    criterion = DomainPenalisationLoss(3, normalize="sum")
    assert criterion.weights.tolist() == [1, 1, 1]
    criterion(torch.tensor([0.5, 1.5, 2.0, 4.0], dtype=torch.float64), torch.tensor([0, 0, 1, 2]))
    assert criterion.weights.tolist() == [1, 1, 1]
    criterion.update_weights()
    e = [math.exp(1), math.exp(2), math.exp(4)]
    assert criterion.weights.tolist() == pytest.approx([x / sum(e) for x in e], rel=1e-14)
    assert float(DomainPenalisationLoss(3).weights.mean()) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_treats_the_weights_as_constants(options):
    criterion = DomainPenalisationLoss(D, **options)
    for epoch in epochs(3):
        for losses, domains in epoch:
            weights, labelled = criterion.weights.clone(), max(int((domains >= 0).sum()), 1)
            losses.requires_grad_()
            (grad,) = torch.autograd.grad(criterion(losses, domains), losses)
            expected = [float(weights[d]) / labelled if d >= 0 else 0.0 for d in domains.tolist()]
            assert grad.tolist() == pytest.approx(expected, rel=1e-12)
        criterion.update_weights()


def test_gradcheck():
    criterion = DomainPenalisationLoss(D)
    criterion(torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.arange(4))
    criterion.update_weights()
    criterion.eval()
    losses, domains = torch.rand(6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 1, 3, -1, 0])
    assert torch.autograd.gradcheck(lambda x: criterion(x, domains), losses)


def test_gradcheck_of_the_weights():
    losses = torch.rand(D, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([True, True, False, True])
    for normalize in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, n=normalize: domain_penalisation_weights(x, temperature=0.5, normalize=n, seen=seen), losses
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
def test_a_temperature_near_zero_leaves_the_worst_domain(dtype, temperature):
    for losses, expected in [([0.4, 12.0, 3.0], [0, 3, 0]), ([2.0, 2.0], [1, 1]), ([0.0, 0.0], [1, 1])]:
        found = domain_penalisation_weights(torch.tensor(losses, dtype=dtype), temperature=temperature)
        assert found.tolist() == expected


def test_evaluation_mode_adds_nothing():
    criterion = DomainPenalisationLoss(D).eval()
    criterion(torch.ones(2), torch.tensor([0, 1]))
    assert criterion.running.tolist() == [[0] * D] * 2


def test_several_losses_add_up():
    """Two losses of the same samples are one loss, their sum."""
    two, one = DomainPenalisationLoss(2), DomainPenalisationLoss(2)
    g = torch.Generator().manual_seed(0)
    domains = torch.tensor([0, 1, 1, 0])
    for _ in range(3):
        a, b = torch.rand(2, 4, generator=g, dtype=torch.float64)
        ones = torch.ones_like(a)
        values = two.reweigh([(a, ones, domains), (b, ones, domains)])
        assert float(sum(values)) == pytest.approx(float(one(a + b, domains)), rel=1e-13)
    torch.testing.assert_close(two.running, one.running, rtol=1e-13, atol=0)
    two.update_weights(), one.update_weights()
    torch.testing.assert_close(two.weights, one.weights, rtol=1e-13, atol=0)


# -- invariants
# --------------------------------------------------------------------------------------------------

batch = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 5), min_size=n, max_size=n), st.lists(st.integers(-1, D - 1), min_size=n, max_size=n)
    )
)


def run(sequence, n_domains=D):
    """An update after every second batch."""
    criterion = DomainPenalisationLoss(n_domains, update=2)
    values = [float(criterion(torch.tensor(x, dtype=torch.float64), torch.tensor(d))) for x, d in sequence]
    return values, criterion.weights


@settings(deadline=None, max_examples=50)
@given(st.lists(batch, min_size=1, max_size=5), st.permutations(range(D)))
def test_the_numbering_of_domains_does_not_matter(sequence, new):
    renamed = [(losses, [new[d] if d >= 0 else d for d in domains]) for losses, domains in sequence]
    (values, weights), (other_values, other_weights) = run(sequence), run(renamed)
    torch.testing.assert_close(values, other_values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, other_weights[list(new)], rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=50)
@given(st.lists(batch, min_size=1, max_size=6))
def test_weights_average_one(sequence):
    _, weights = run(sequence)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_one_domain_is_plain_training(sequence):
    values, weights = run([(losses, [0] * len(losses)) for losses in sequence], n_domains=1)
    assert values == pytest.approx([math.fsum(x) / len(x) for x in sequence], rel=1e-12, abs=1e-14)
    assert weights.tolist() == [1.0]


# -- state
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["epoch", 3])
def test_state_in_the_middle_of_an_epoch_resumes_bitwise(tmp_path, update):
    whole, first = (DomainPenalisationLoss(D, update, ema=0.5) for _ in range(2))
    data = [(i, *b) for i, epoch in enumerate(epochs()) for b in epoch]
    for i, losses, domains in data[:6]:  # four batches an epoch
        for criterion in (whole, first):
            criterion.start_epoch(i)
            criterion(losses, domains)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = DomainPenalisationLoss(D, update, ema=0.5)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for i, losses, domains in data[6:]:
        whole.start_epoch(i), second.start_epoch(i)
        assert torch.equal(whole(losses, domains), second(losses, domains))
    assert same(whole.state_dict(), second.state_dict())
    assert not torch.equal(whole.weights, torch.ones(D, dtype=torch.float64))


def test_an_epoch_without_losses_leaves_the_weights():
    criterion = DomainPenalisationLoss(2, normalize="sum")
    criterion.update_weights()
    assert criterion.weights.tolist() == [1, 1]
    criterion(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    criterion.update_weights()
    weights = criterion.weights.clone()
    criterion.update_weights()
    assert torch.equal(criterion.weights, weights)
    assert not torch.equal(weights, torch.ones_like(weights))


def test_what_is_logged_are_the_losses_since_the_update_or_the_last_known():
    criterion = DomainPenalisationLoss(2)
    criterion(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1]))
    assert criterion.by_group()["loss_by_domain"].tolist() == [1, 3]
    criterion.update_weights()
    criterion(torch.tensor([7.0]), torch.tensor([0]))
    assert criterion.by_group()["loss_by_domain"].tolist() == [7, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_losses_keep_a_precise_state(dtype):
    criterion, exact = DomainPenalisationLoss(D).to(dtype), DomainPenalisationLoss(D)
    for epoch in epochs(3):
        for losses, domains in epoch:
            assert criterion(losses.to(dtype), domains).dtype == dtype
            exact(losses.to(dtype).double(), domains)
        criterion.update_weights(), exact.update_weights()
    assert criterion.running.dtype == criterion.weights.dtype == torch.float64
    torch.testing.assert_close(criterion.weights, exact.weights, rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=0)


# -- arguments and bad rows
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"n_domains": 0}, "`n_domains` to be a positive integer"),
        ({"n_domains": 2, "update": "step"}, "`update` to be 'epoch' or a number of batches >= 1, but got 'step'"),
        ({"n_domains": 2, "update": 0}, "`update`"),
        ({"n_domains": 2, "temperature": 0}, "`temperature` to be a number > 0, but got 0"),
        ({"n_domains": 2, "normalize": "max"}, "`normalize` to be 'mean' or 'sum', but got 'max'"),
        ({"n_domains": 2, "ema": 1.0}, r"`ema` to be a number in \[0, 1\), but got 1.0"),
        ({"n_domains": 2, "domain_counts": [3]}, "`domain_counts` to be 2 numbers"),
        ({"n_domains": 2, "domain_counts": [3, 0], "domain_names": ["a", "b"]}, "every domain .* but got none of b"),
        ({"n_domains": 2, "domain_names": ["a", "a"]}, "`domain_names` to hold 2 different names"),
    ],
)
def test_wrong_arguments(kwargs, match):
    with pytest.raises(DebiasError, match=match):
        DomainPenalisationLoss(**kwargs)


def test_wrong_arguments_of_the_callback():
    with pytest.raises(DebiasError, match=r"`n_domains` to hold one number for each key of `domain="):
        DomainPenalisation(("a", "b"), 4)
    with pytest.raises(DebiasError, match="`name` to be given where `domain` is a callable"):
        DomainPenalisation(lambda batch: batch[1], 4)


@pytest.mark.parametrize(
    ("losses", "domains", "match"),
    [
        ([1.0, 2.0], [0, 2], "domain ids below `n_domains=2`, but 1 rows"),
        ([1.0, float("nan")], [0, 1], "finite losses, but 1 rows"),
    ],
)
def test_bad_rows_raise_before_the_state_changes(losses, domains, match):
    criterion = DomainPenalisationLoss(2)
    with pytest.raises(BadRowsError, match=match):
        criterion(torch.tensor(losses), torch.tensor(domains))
    assert criterion.running.tolist() == [[0, 0]] * 2


def test_batch_without_any_labelled_row():
    losses = torch.ones(3, requires_grad=True)
    value = DomainPenalisationLoss(2)(losses, torch.full((3,), -1))
    value.backward()
    assert value.item() == 0.0
    assert losses.grad.tolist() == [0.0] * 3


# -- as a callback
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["site", 2])
def test_a_domain_without_a_training_sample_is_an_error_before_the_first_step(key):
    x, y = problem(12).tensors
    site = torch.arange(12) % 3
    data = tag(TensorDataset(x, y, site), site=site)
    model = Triples()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(DebiasError, match=r"every domain to have training samples, but got none of 3 \(counts"):
        make_trainer([DomainPenalisation(key, 4)]).fit(model, DataLoader(data, 4))
    assert same(before, [p.detach() for p in model.parameters()])
    make_trainer([DomainPenalisation(key, 3)]).fit(model, DataLoader(data, 4))


def test_a_stream_is_not_counted():
    class Stream(IterableDataset):
        def __iter__(self):
            x, y = problem(12).tensors
            yield from zip(x, y, torch.arange(12) % 3, strict=True)

    callback = DomainPenalisation(2, 4)
    make_trainer([callback], max_epochs=2).fit(Triples(), DataLoader(Stream(), 4))
    assert not callback.module.has_counts
    assert callback.module.seen.tolist() == [True, True, True, False]


class Pairs(Classifier):
    """Without validation."""

    validation_step = L.LightningModule.validation_step


class Triples(Pairs):
    """Batches (x, y, site)."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def test_the_callback_follows_the_formula_over_epochs():
    """The weights of every epoch from a plain loop over the losses that the network really had."""

    class Recorded(Triples):
        def training_step(self, batch, batch_idx):
            losses = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none").detach()
            seen.append((self.current_epoch, losses, batch[2], callback.module.weights.clone()))
            return super().training_step(batch, batch_idx)

    x, y = problem(20).tensors
    seen, callback = [], DomainPenalisation(2, 3, temperature=0.1)
    make_trainer([callback], max_epochs=3).fit(Recorded(), DataLoader(TensorDataset(x, y, torch.arange(20) % 3), 6))
    for epoch in range(3):
        expected = [1.0] * 3
        if epoch:
            last = [(x, d) for i, x, d, _ in seen if i == epoch - 1]
            losses, domains = torch.cat([x for x, _ in last]), torch.cat([d for _, d in last])
            exps = [math.exp(float(losses[domains == d].mean()) / 0.1) for d in range(3)]
            expected = [3 * e / sum(exps) for e in exps]
        for _, _, _, weights in [s for s in seen if s[0] == epoch]:
            assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert max(expected) / min(expected) > 1.01


def test_mixin_equals_callback():
    class Mixed(DomainPenalisationMixin, Pairs):
        def __init__(self):
            super().__init__()
            self.configure_domain_penalisation(3, ema=0.3, temperature=0.1)

        def training_step(self, batch, batch_idx):
            x, y, site = batch
            losses = torch.nn.functional.cross_entropy(self(x), y, reduction="none")
            return self.domain_penalisation_loss(losses, site)

    x, y = problem(12).tensors
    data = TensorDataset(x, y, torch.arange(12) % 3)
    plain, mixed = Triples(), Mixed()
    callback = DomainPenalisation(2, 3, ema=0.3, temperature=0.1)
    make_trainer([callback], max_epochs=3).fit(plain, DataLoader(data, 4))
    make_trainer(max_epochs=3).fit(mixed, DataLoader(data, 4))
    torch.testing.assert_close(plain.head.weight, mixed.head.weight, rtol=1e-13, atol=0)
    torch.testing.assert_close(callback.module.weights, mixed.domain_penalisation.weights, rtol=1e-13, atol=0)
    assert float(callback.module.weights.std()) > 1e-3
    assert "domain_penalisation.running" in mixed.state_dict()


def test_logs_names_of_domains():
    logged = []

    class Logger(L.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(metrics)

    x, y = problem(12).tensors
    data = tag(TensorDataset(x, y), site=torch.arange(12) % 2)
    callback = DomainPenalisation("site", 2, domain_names=["field", "lab"])
    make_trainer([callback], logger=Logger(), max_epochs=2).fit(Pairs(), DataLoader(data, 4))
    assert {f"train/{k}/{n}" for k in ("domain_weight", "loss_by_domain") for n in ("field", "lab")} <= set(logged[0])
    assert all(math.isfinite(v) for m in logged for v in m.values())


def test_every_option_reaches_the_module():
    options = {"update": 7, "temperature": 0.2, "normalize": "sum", "ema": 0.3}
    for size in range(len(options) + 1):
        for chosen in itertools.combinations(options, size):
            module = DomainPenalisation("place", 2, **{name: options[name] for name in chosen}).module
            for name in chosen:
                assert getattr(module, name) == options[name]
