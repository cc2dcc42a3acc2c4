"""V-REx, IRM, Fishr, CORAL and MMD against independent float64 computations."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _support import head_oracle as oracle
from _support import runs
from _support.fits import (
    Classifier,
    deviation,
    loader,
    make_trainer,
    parameters,
    places,
    problem,
    same,
    train,
    val_loader,
)
from _support.flat import EdgeView
from debias import (
    CORAL,
    IRM,
    MMD,
    CORALPenalty,
    Debiaser,
    Fishr,
    FishrMixin,
    FishrPenalty,
    HessianAlignment,
    HessianAlignmentMixin,
    HessianAlignmentPenalty,
    IRMMixin,
    IRMPenalty,
    MMDPenalty,
    VREx,
    VRExPenalty,
)
from debias.errors import BadRowsError, DebiasError, HeadNotFoundError, RowsError
from debias.functional import coral_penalty, hessian_alignment_penalty, irm_penalty, mmd_penalty, vrex_penalty
from debias.ops.domains import halves, make_members
from debias.ops.head_losses import make_head_loss
from debias.ops.head_statistics import HeadStatistics

EXACT = 1e-10
KINDS = pytest.mark.parametrize("kind", oracle.LOSSES)


def check(p: oracle.Problem, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, p.leaves), oracle.gradients(theirs, p.leaves)) < EXACT


# -- V-REx ---------------------------------------------------------------------------------------------


@KINDS
def test_vrex(kind: str) -> None:
    p = oracle.problem(kind)
    loss = make_head_loss(p.loss, p.logits, p.targets, **p.options)
    mine = vrex_penalty(loss.num(p.logits), p.domains, p.n_domains, den=loss.den)
    check(p, mine, torch.stack(oracle.domain_losses(p)).var(unbiased=False))


# -- IRM -----------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("form", ["squared", "unbiased"])
def test_irm(kind: str, form: str) -> None:
    p = oracle.problem(kind)
    mine = irm_penalty(p.logits, p.targets, p.domains, p.n_domains, form=form, loss=p.loss, **p.options)
    terms = []
    for e in p.present:
        rows = p.rows(e)
        if "ignore_index" in p.options:
            rows = rows[p.targets[rows] != p.options["ignore_index"]]
        if form == "squared":
            terms.append(oracle.scale_derivative(p, rows).square())
        elif len(rows) > 1:
            terms.append(oracle.scale_derivative(p, rows[::2]) * oracle.scale_derivative(p, rows[1::2]))
    check(p, mine, torch.stack(terms).mean())


def test_halves_of_ids_are_those_of_a_membership() -> None:
    """By sorting, against a count along the rows; unlabelled rows and rows that do not count have no position."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 5, (200,), generator=generator)
    counts = torch.rand(200, generator=generator) > 0.2
    members = ids.unsqueeze(1) == torch.arange(5)
    by_id, by_member = halves(ids, 5, counts), halves(members, 5, counts)
    kept = counts & (ids >= 0)
    assert torch.equal(by_member[kept], by_id[kept].unsqueeze(1) == torch.arange(10))
    seen = [0] * 5
    for domain, half in zip(ids[kept].tolist(), by_id[kept].tolist(), strict=True):
        assert half == 2 * domain + seen[domain] % 2
        seen[domain] += 1


@pytest.mark.parametrize("form", ["squared", "unbiased"])
def test_irm_with_classes_that_are_masked(form: str) -> None:
    """Logits of -inf where a class is ruled out: as if the sample had no such class."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, domains = torch.arange(8) % 3, torch.arange(8) // 4
    rows = torch.arange(8) % 2 == 0
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[:, 3] = rows

    def penalty(low: float) -> torch.Tensor:
        return irm_penalty(logits.masked_fill(mask, low), targets, domains, 2, form=form)

    mine, theirs = penalty(-torch.inf), penalty(-1000.0)
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, [logits]), oracle.gradients(theirs, [logits])) < EXACT
    loss = make_head_loss("cross_entropy", logits.masked_fill(mask, -torch.inf), targets)
    losses = F.cross_entropy(loss.logits, targets, reduction="none")
    assert torch.allclose(loss.num(loss.logits), losses, rtol=1e-14)
    ours, torchs = (oracle.gradients(x.sum(), [logits]) for x in (loss.num(loss.logits), losses))
    assert oracle.distance(ours, torchs) < EXACT
    module = IRMPenalty(2, penalty_weight=1.0, form=form)
    assert torch.equal(module(loss.logits, targets, domains), mine)
    with pytest.raises(BadRowsError, match="finite"):  # the class of the target is masked
        module(loss.logits, torch.full_like(targets, 3), domains)


CLASSES_ARE_MASKED = [
    (IRM, {"form": "squared"}),
    (Fishr, {}),
    *((HessianAlignment, {"statistic": statistic}) for statistic in ("hgp", "diagonal", "frobenius")),
]


@pytest.mark.parametrize(("method", "options"), CLASSES_ARE_MASKED)
def test_modules_with_classes_that_are_masked(method: type[Debiaser], options: dict[str, Any]) -> None:
    """As if the sample had no such class; what has no loss is refused."""
    module_of = {IRM: IRMPenalty, Fishr: FishrPenalty, HessianAlignment: HessianAlignmentPenalty}[method]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, domains = torch.arange(8) % 3, torch.arange(8) // 4
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[::2, 3] = True

    def penalty(low: float, targets: Tensor = targets, logits: Tensor | None = None) -> Tensor:
        logits = (features @ weight.T).masked_fill(mask, low) if logits is None else logits
        module = module_of(2, penalty_weight=1.0, **options)
        return module(logits, targets, domains) if method is IRM else module(features, logits, targets, domains)

    mine, theirs = penalty(-torch.inf), penalty(-1000.0)
    assert oracle.distance([mine], [theirs]) < EXACT
    leaves = [features, weight]
    assert oracle.distance(oracle.gradients(mine, leaves), oracle.gradients(theirs, leaves)) < EXACT
    with pytest.raises(BadRowsError, match="finite losses, but 4 rows"):  # the class of the target is masked
        penalty(-torch.inf, torch.full_like(targets, 3))
    for value in (torch.nan, torch.inf):  # also where the loss ignores the row: its gradient would be NaN
        logits = (features @ weight.T).index_fill(0, torch.tensor([1]), value)
        with pytest.raises(BadRowsError, match="finite losses, but 1 rows"):
            penalty(0.0, targets.index_fill(0, torch.tensor([1]), -100), logits)


class Masked(Classifier):
    """Class 2 is masked behind the head, in every other row, by logits that are low or -inf."""

    def __init__(self, low: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3).double()
        self.low = low

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x)).unsqueeze(1) % 2 == 0
        return self.head(self.backbone(x)).masked_fill(rows & torch.tensor([False, False, True]), self.low)


@pytest.mark.parametrize(("method", "options"), CLASSES_ARE_MASKED)
def test_callbacks_with_classes_that_are_masked_behind_the_head(
    method: type[Debiaser], options: dict[str, Any]
) -> None:
    head = {} if method is IRM else {"head": "head"}
    model = Masked(-torch.inf)
    reference = copy.deepcopy(model)
    train(model, [method("place", 3, penalty_weight=2.0, **options, **head)], limit_train_batches=1)

    x, y = (part[:16] for part in problem(39).tensors)
    features = reference.backbone(x)
    place = loader().dataset.tags["place"][:16]
    reference.low = -1000.0
    logits = reference(x)
    module_of = {IRM: IRMPenalty, Fishr: FishrPenalty, HessianAlignment: HessianAlignmentPenalty}[method]
    module = module_of(3, penalty_weight=2.0, **options)
    penalty = module(logits, y, place) if method is IRM else module(features, logits, y, place)
    loss = F.cross_entropy(logits, y) + penalty
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        (gradient,) = torch.autograd.grad(loss, q, retain_graph=True)
        torch.testing.assert_close(p, q - 0.1 * gradient, rtol=1e-10, atol=1e-12)


class MaskedHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)


@pytest.mark.parametrize("temperature", [1.0, 1.1])
def test_a_mask_inside_of_a_head_that_is_differentiated(temperature: float) -> None:
    """It is as if there were no such class; what else stands behind the head is still seen."""

    class Tempered(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x)) / temperature

    plain, masked = Classifier(), Tempered()
    masked.head = MaskedHead(6, 3).double()
    with torch.no_grad():
        masked.head.weight[:2], masked.head.bias[:2] = plain.head.weight, plain.head.bias
    options = {"head": "head", "derivatives": "autograd", "reduction": "sum"}
    if temperature != 1:
        with pytest.raises(HeadNotFoundError, match=r"differ by .*% of the largest"):
            train(masked, [Fishr("place", 3, **options)])
        return
    for model in (plain, masked):
        train(model, [Fishr("place", 3, **options)])
    state = parameters(masked)
    ours = {k: v[:2] if k.startswith("head") else v for k, v in state.items()}
    assert deviation(parameters(plain), ours) < EXACT


def test_masks_behind_a_head_that_is_differentiated_are_refused() -> None:
    with pytest.raises(HeadNotFoundError, match="differ by inf%"):
        train(Masked(-torch.inf), [Fishr("place", 3, head="head", derivatives="autograd")])


def test_irm_does_not_wait_for_the_device() -> None:
    """The backward of torch's own product looks for zeros on the host."""
    p = oracle.problem()
    value = irm_penalty(p.logits, p.targets, p.domains, p.n_domains)
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
    assert {"MulBackward0"} <= {node.name() for node in seen}
    assert not any("Prod" in node.name() for node in seen)


# -- Fishr ---------------------------------------------------------------------------------------------


def statistics(p: oracle.Problem) -> HeadStatistics:
    loss = make_head_loss(p.loss, p.logits, p.targets, **p.options)
    return HeadStatistics(p.features, loss, make_members(p.domains, p.n_domains, len(p.domains)), p.bias is not None)


@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fishr_without_average(kind: str, reduction: str) -> None:
    p = oracle.problem(kind)
    mine = FishrPenalty(p.n_domains, ema=0.0, reduction=reduction).of(statistics(p))
    variances = torch.stack(oracle.variances(p))
    squared = (variances - variances.mean(0)).square()
    check(p, mine, squared.sum() if reduction == "sum" else squared.mean())


@pytest.mark.parametrize("bias", ["corrected", "reference"])
def test_fishr_averages_over_steps(bias: str) -> None:
    """Four batches in which domains come and go; the gradient is that of the last batch's variances."""
    module = FishrPenalty(3, ema=0.8, ema_bias=bias)
    kept: dict[int, torch.Tensor] = {}
    seen: dict[int, int] = {}
    for seed, sizes in enumerate([(4, 3, 0), (2, 0, 3), (3, 3, 3), (5, 2, 2)]):
        p = oracle.problem(sizes=sizes, seed=seed)
        mine = module.of(statistics(p))
        hats = []
        for e, variance in zip(p.present, oracle.variances(p), strict=True):
            past = kept.get(e, torch.zeros_like(variance))
            new = 0.8 * past + 0.2 * variance
            kept[e], seen[e] = new.detach(), seen.get(e, 0) + 1
            hats.append(new / (1 - 0.8 ** seen[e] if bias == "corrected" else 0.2))
        hats = torch.stack(hats)
        check(p, mine, (hats - hats.mean(0)).square().mean())
    fresh = FishrPenalty(3, ema=0.8, ema_bias=bias)
    fresh.load_state_dict(module.state_dict())
    p = oracle.problem(sizes=(3, 2, 2), seed=9)
    assert torch.equal(fresh.of(statistics(p)), module.of(statistics(p)))


def test_fishr_keeps_its_averages_while_it_waits() -> None:
    method = Fishr("place", 3, start_step=3)
    train(Classifier(), [method])
    assert method.module.updates.tolist() == [3, 3, 1]  # only the first batch has a place 2
    plain = Classifier()
    train(plain, [], bare=True)
    waited = Classifier()
    train(waited, [Fishr("place", 3, start_step=3)])
    assert all(torch.equal(v, parameters(waited)[k]) for k, v in parameters(plain).items())


def test_fishr_on_another_head_is_refused() -> None:
    module = FishrPenalty(3)
    p = oracle.problem(sizes=(3, 2, 2))
    module.of(statistics(p))
    other = oracle.problem(sizes=(3, 2, 2), bias=False)
    with pytest.raises(DebiasError, match=r"head with 16 parameters.*got 12"):
        module.of(statistics(other))


# -- CORAL and MMD -------------------------------------------------------------------------------------


def pairs(p: oracle.Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p.features[p.rows(a)], p.features[p.rows(b)]) for a, b in itertools.combinations(p.present, 2)]


@pytest.mark.parametrize("by_pairs", [True, False, None])
@pytest.mark.parametrize("sizes", [(4, 7, 0, 1, 5), (3, 2), (9, 8, 7)])
def test_coral(by_pairs: bool | None, sizes: tuple[int, ...]) -> None:
    p = oracle.problem(sizes=sizes)
    terms = []
    for a, b in pairs(p):
        term = (a.mean(0) - b.mean(0)).square().mean()
        if len(a) > 1 and len(b) > 1:
            term = term + (a.T.cov() - b.T.cov()).square().mean()
        terms.append(term)
    mine = coral_penalty(p.features, p.domains, p.n_domains, by_pairs=by_pairs)
    theirs = torch.stack(terms).mean()
    assert oracle.distance([mine], [theirs]) < EXACT
    leaves = [p.features]
    assert oracle.distance(oracle.gradients(mine, leaves), oracle.gradients(theirs, leaves)) < EXACT


@pytest.mark.parametrize("kernel", ["gaussian", "scaled_gaussian"])
def test_mmd(kernel: str) -> None:
    p = oracle.problem()
    gammas = [0.01, 0.3, 2.0]
    labelled = p.features[p.domains >= 0].detach()
    scale = 1.0
    if kernel == "scaled_gaussian":
        scale = float((labelled.unsqueeze(0) - labelled.unsqueeze(1)).square().sum(-1).mean())

    def similarity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        distances = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1) / scale
        return torch.stack([(-g * distances).exp() for g in gammas]).sum(0).mean()

    theirs = torch.stack([similarity(a, a) + similarity(b, b) - 2 * similarity(a, b) for a, b in pairs(p)]).mean()
    mine = mmd_penalty(p.features, p.domains, p.n_domains, kernel=kernel, gammas=gammas)
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, [p.features]), oracle.gradients(theirs, [p.features])) < EXACT


def test_kernels_of_raw_features_vanish_and_scaled_ones_do_not() -> None:
    """Distances in the thousands, as between raw pooled features: the published kernels see hardly any."""
    generator = torch.Generator().manual_seed(0)
    features = 30 * torch.randn(20, 64, generator=generator)
    features[10:] += 6
    domains = torch.arange(20) // 10
    own = 2 * 0.7  # what comparing each sample with itself gives: 7 kernels / 10 samples, twice
    plain = mmd_penalty(features, domains, 2)
    assert float(plain) == pytest.approx(own, rel=1e-3)  # nothing but that: no gradient
    other = features.clone()
    other[10:] += 60
    assert float(mmd_penalty(other, domains, 2)) == pytest.approx(own, rel=1e-3)
    scaled = [float(mmd_penalty(x, domains, 2, kernel="scaled_gaussian")) for x in (features, other)]
    assert scaled[1] > scaled[0] + 0.1


def overlapping(sizes: tuple[int, ...] = (5, 6, 4), *, rows: int = 12) -> torch.Tensor:
    """Boolean membership of rows in domains of these sizes, many in several of them."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(rows, generator=generator) for _ in sizes], 1)
    return order < torch.tensor(sizes)


@pytest.mark.parametrize("by_pairs", [True, False, None])
@pytest.mark.parametrize("sizes", [(5, 6, 4), (5, 1, 0, 7), (2, 2)])
def test_coral_of_samples_in_several_domains(by_pairs: bool | None, sizes: tuple[int, ...]) -> None:
    members = overlapping(sizes)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    terms = []
    for a, b in itertools.combinations([features[column] for column in members.T if column.any()], 2):
        term = (a.mean(0) - b.mean(0)).square().mean()
        if len(a) > 1 and len(b) > 1:
            term = term + (a.T.cov() - b.T.cov()).square().mean()
        terms.append(term)
    mine = coral_penalty(features, members, len(sizes), by_pairs=by_pairs)
    theirs = torch.stack(terms).mean()
    assert oracle.distance([mine], [theirs]) < EXACT
    assert oracle.distance(oracle.gradients(mine, [features]), oracle.gradients(theirs, [features])) < EXACT
    assert coral_penalty(features[:0], members[:0], len(sizes), by_pairs=by_pairs) == 0


@pytest.mark.parametrize("penalty", [coral_penalty, mmd_penalty])
def test_no_table_of_pairs_of_domains(penalty: Callable[..., torch.Tensor]) -> None:
    """The largest tensor made is one of samples x samples, or of domains x the larger of samples and features."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if hasattr(x, "numel"))
            return out

    n, d, e = 12, 8, 300
    features = torch.randn(n, d, requires_grad=True)
    with Watch():
        penalty(features, torch.arange(n) * 20, e).backward()
    assert 0 < max(sizes) <= e * max(n, d)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("width", [3, 512])
def test_mmd_of_samples_and_their_copies_is_zero(scale: float, width: int) -> None:
    """In single precision, where rounding times a gamma of 1000 would tell them apart."""
    half = scale * torch.randn(50, width, generator=torch.Generator().manual_seed(0)) + 1
    features = torch.cat((half, half)).requires_grad_()
    value = mmd_penalty(features, torch.arange(100) // 50, 2)
    value.backward()
    assert value.abs() < 1e-6
    assert features.grad is not None
    assert features.grad.isfinite().all()


# -- all of them ---------------------------------------------------------------------------------------

EVERY = {
    "vrex": lambda p: vrex_penalty(F.cross_entropy(p.logits, p.targets, reduction="none"), p.domains, p.n_domains),
    "irm": lambda p: irm_penalty(p.logits, p.targets, p.domains, p.n_domains),
    "irm squared": lambda p: irm_penalty(p.logits, p.targets, p.domains, p.n_domains, form="squared"),
    "fishr": lambda p: FishrPenalty(p.n_domains).of(statistics(p)),
    "coral": lambda p: coral_penalty(p.features, p.domains, p.n_domains),
    "mmd": lambda p: mmd_penalty(p.features, p.domains, p.n_domains),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("sizes", [(3, 0, 0), (1, 1, 0), (0, 0, 0)], ids=["one domain", "one sample each", "none"])
def test_finite_where_domains_are_missing(name: str, sizes: tuple[int, ...]) -> None:
    p = oracle.problem(sizes=sizes)
    value = EVERY[name](p)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in oracle.gradients(value, p.leaves))
    if sizes != (1, 1, 0) and not name.startswith("irm"):
        assert value.abs() < 1e-20


@pytest.mark.parametrize("name", [n for n in EVERY if n != "fishr"])
def test_gradcheck(name: str) -> None:
    p = oracle.problem(sizes=(3, 3))

    def penalty(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return EVERY[name](oracle.Problem(p.loss, features, weight, bias, p.targets, p.domains, 2))

    assert torch.autograd.gradcheck(penalty, p.leaves)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([n for n in EVERY if n != "irm"]))
def test_order_of_samples_and_numbers_of_domains_change_nothing(seed: int, name: str) -> None:
    """The unbiased IRM halves a domain by position, so the order counts there."""
    p = oracle.problem(sizes=(4, 2, 5), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(p.domains), generator=generator)
    numbers = torch.cat((torch.randperm(3, generator=generator), torch.tensor([-1])))
    q = oracle.Problem(
        p.loss, p.features[order], p.weight, p.bias, p.targets[order], numbers[p.domains[order]], p.n_domains
    )
    a, b = float(EVERY[name](p).detach()), float(EVERY[name](q).detach())
    assert a == pytest.approx(b, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("method", [VREx, IRM, Fishr, CORAL, MMD])
def test_through_a_trainer_a_membership_is_the_same_as_ids(method: type) -> None:
    membership = torch.stack([torch.tensor([0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 2]) == g for g in range(3)], 1)
    ids = membership.int().argmax(1)
    ends = []
    for tags in (ids, membership):
        model = Classifier()
        batches = loader(16, place=tags)
        make_trainer([method("place", 3, penalty_weight=0.5)], max_epochs=2).fit(model, batches, val_loader())
        ends.append(parameters(model))
    assert deviation(*ends) < 1e-14  # rows are added up in another order


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VREx("d", 1), "`n_domains` to be at least 2"),
        (lambda: VREx("d", 2, penalty_weight=-1), "`penalty_weight`"),
        (lambda: IRM("d", 2, form="cubed"), "`form` to be 'unbiased' or 'squared'"),
        (lambda: Fishr("d", 2, ema=1.0), r"`ema` to be a number in \[0, 1\)"),
        (lambda: Fishr("d", 2, ema=-0.1), "`ema`"),
        (lambda: Fishr("d", 2, ema_bias="none"), "`ema_bias`"),
        (lambda: Fishr("d", 2, loss="sum"), "`loss` of Fishr to choose one loss"),
        (lambda: Fishr("d", 2, reduction="max"), "`reduction`"),
        (lambda: MMD("d", 2, kernel="linear"), "`kernel`"),
        (lambda: MMD("d", 2, gammas=[]), "`gammas`"),
        (lambda: MMD("d", 2, gammas=[-1.0]), "`gammas`"),
        (lambda: MMD("d", 2, features="net", loss="sum"), "`loss` of MMD to choose one loss with `features='net'`"),
    ],
)
def test_wrong_arguments(make, match: str) -> None:
    with pytest.raises(DebiasError, match=match):
        make()


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("fishr", "vrex")])
def test_half_precision_inputs_are_computed_with_in_single_precision(name: str) -> None:
    """300 samples a domain: in bfloat16, counts above 256 and sums of squares would be rounded."""
    p = oracle.problem(sizes=(301, 299))
    p = oracle.Problem(p.loss, p.features.bfloat16(), p.weight.bfloat16(), None, p.targets, p.domains, 2)
    q = oracle.Problem(p.loss, p.features.float(), p.weight.float(), None, p.targets, p.domains, 2)
    q_logits = p.logits.float()
    penalties = {
        "irm": lambda x, z: irm_penalty(z, p.targets, p.domains, 2),
        "irm squared": lambda x, z: irm_penalty(z, p.targets, p.domains, 2, form="squared"),
        "coral": lambda x, z: coral_penalty(x, p.domains, 2),
        "mmd": lambda x, z: mmd_penalty(x, p.domains, 2),
    }
    with torch.autocast("cpu", torch.bfloat16):
        mine = penalties[name](p.features, p.logits)
    assert mine.dtype == torch.float32
    assert torch.equal(mine, penalties[name](q.features, q_logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_given_by_name(dtype: torch.dtype) -> None:
    p = oracle.problem(sizes=(301, 299))
    features, logits = p.features.to(dtype), p.logits.to(dtype)
    for penalty, inputs in [
        (coral_penalty, {"features": features}),
        (mmd_penalty, {"features": features}),
        (irm_penalty, {"logits": logits, "targets": p.targets}),
        (vrex_penalty, {"losses": logits[:, 0]}),
        (hessian_alignment_penalty, {"features": features, "logits": logits, "targets": p.targets}),
    ]:
        options = {"domains": p.domains, "n_domains": 2}
        with torch.autocast("cpu", torch.bfloat16):
            by_name = penalty(**inputs, **options)
        assert by_name.dtype == torch.float32
        assert torch.equal(
            by_name, penalty(*(x.float() if x.is_floating_point() else x for x in inputs.values()), **options)
        )


@pytest.mark.parametrize("module", [FishrPenalty(2), HessianAlignmentPenalty(2, statistic="frobenius"), VRExPenalty(2)])
def test_modules_compute_in_single_precision_under_autocast(module: torch.nn.Module) -> None:
    p = oracle.problem(sizes=(301, 299))
    features, logits = p.features.bfloat16(), p.logits.bfloat16()
    results = []
    for f, z, autocast in [(features, logits, True), (features.float(), logits.float(), False)]:
        arguments = (f, z, p.targets, p.domains)
        if isinstance(module, VRExPenalty):
            arguments = (z[:, 0], p.domains)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(module.eval()(*arguments))
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


class Positions(Classifier):
    """A head that reads every position of a grid, the features last."""

    def __init__(self, grid: tuple[int, ...], *, averaged: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.averaged = averaged

    def training_step(self, batch, batch_idx):
        x, y = batch
        positions = torch.Size(self.grid).numel()
        features = torch.stack([self.backbone(x + 0.1 * i) for i in range(positions)], 1)
        logits = self.head(features.view(len(x), *self.grid, 6))
        if self.averaged:
            return F.cross_entropy(logits.flatten(1, -2).mean(1), y)
        return F.cross_entropy(logits.reshape(-1, 2), y.repeat_interleave(positions))


@pytest.mark.parametrize("method", [CORAL, MMD, Fishr])
def test_features_of_a_linear_head_are_its_last_axis(method: type) -> None:
    ends = []
    for grid in ((4,), (2, 2)):
        model = Positions(grid)
        train(model, [method("place", 3)])
        ends.append(parameters(model))
    assert all(torch.allclose(value, ends[1][name], rtol=1e-10, atol=1e-12) for name, value in ends[0].items())


class Dense(Classifier):
    """Logits of three positions of each sample: ``(N, C, 3, 1)``, as of a convolution, or with a row for each."""

    def __init__(self, loss: Callable[..., torch.Tensor], dense: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 2, 1).double()
        with torch.no_grad():
            self.conv.weight.copy_(self.head.weight[:, :, None, None])
            self.conv.bias.copy_(self.head.bias)
        self.loss, self.dense = loss, dense

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = torch.stack([self.backbone(x + 0.1 * i) for i in range(3)], 2)
        target = torch.stack([y, 1 - y, y], 1)
        target[:, 2] = -100
        if self.dense:
            return self.loss(self.conv(features.unsqueeze(-1)), target.unsqueeze(-1))
        rows = features.transpose(1, 2).reshape(-1, 6)
        return self.loss(self.head(rows), target.flatten())


def masked(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    mask = (y >= 0) * (1.0 + (y == 1))
    return (F.cross_entropy(z, y, reduction="none") * mask).sum() / mask.sum()


def of_elements(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the logits of one class, with weights of the elements."""
    z = z[:, 0]
    return F.binary_cross_entropy_with_logits(
        z, (y == 1).to(z.dtype), weight=1.0 + (y == 0), pos_weight=z.new_tensor(3)
    )


DENSE = {
    "classes": lambda z, y: 0.5 * F.cross_entropy(z, y, weight=z.new_tensor([1, 2]), label_smoothing=0.1),
    "probabilities": lambda z, y: F.cross_entropy(z, torch.stack([y == 1, y != 1], 1).to(z.dtype) * 0.8 + 0.1),
    "a mask": masked,
    "a mean of means": lambda z, y: F.cross_entropy(z, y.clamp(min=0), reduction="none").mean(0).mean(),
    "elements": of_elements,
}


# The logits of one class are not what a head makes.
HEADS = [(method, name) for method in (IRM, Fishr, HessianAlignment) for name in DENSE if name != "elements"]


@pytest.mark.parametrize(("method", "name"), [*HEADS, (IRM, "elements")])
def test_dense_logits_have_a_row_for_each_position(method: type, name: str) -> None:
    ends = []
    for dense in (True, False):
        model = Dense(DENSE[name], dense)
        train(model, [method("place", 3)])
        ends.append(parameters(model))
    backbone = [key for key in ends[0] if key.startswith("backbone")]
    assert all(torch.allclose(ends[0][key], ends[1][key], rtol=1e-9, atol=1e-11) for key in backbone)


class Tokens(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.head(torch.stack([self.backbone(x + 0.1 * i) for i in range(3)], 1))
        return F.binary_cross_entropy_with_logits(z, F.one_hot(y, 2).unsqueeze(1).expand(z.shape).to(z.dtype))


@pytest.mark.parametrize("derivatives", ["closed_form", "autograd"])
def test_which_elements_are_of_one_position_is_asked(derivatives: str) -> None:
    with pytest.raises(HeadNotFoundError, match=r"flatten the positions before the loss: `logits.flatten\(0, 1\)`"):
        train(Tokens(), [Fishr("place", 3, derivatives=derivatives)])


def test_a_convolution_is_no_head_of_rows() -> None:
    with pytest.raises(HeadNotFoundError, match=r"one row of features.*Conv2d.*`derivatives='closed_form'`"):
        train(Dense(DENSE["classes"], True), [Fishr("place", 3, derivatives="autograd")])


# -- which samples features belong to ------------------------------------------------------------------

PENALTIES = {CORAL: coral_penalty, MMD: mmd_penalty}


class Rows(Classifier):
    """A step of the test's own, which says which features are meant and the sample of each of their rows."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.neck = nn.Linear(6, 6).double()
            self.conv = nn.Conv2d(1, 2, 1).double()
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch, self.order(len(batch[0]), batch_idx))[0]

    @staticmethod
    def order(n: int, batch_idx: int) -> torch.Tensor:
        """In the first batch that of the batch, so that later ones differ from what was learned there."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(batch_idx)) if batch_idx else torch.arange(n)


Step = Callable[[Rows, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def in_front_of_the_head(m, x, y, order):
    features = m.backbone(x)[order]
    return F.cross_entropy(m.head(features), y[order]), features, order


def behind_the_head(m, x, y, order):
    features = m.backbone(x)
    return F.cross_entropy(m.head(features)[order], y[order]), features, torch.arange(len(x))


def behind_the_network(m, x, y, order):
    features = m.backbone[:3](x)
    return F.cross_entropy(m.head(m.backbone(x)[order]), y[order]), features, torch.arange(len(x))


def of_the_batch(m, x, y, order):
    features = m.backbone[:3](x[order])
    return F.cross_entropy(m.head(m.backbone(x[order])), y[order]), features, order


def of_two_views(m, x, y, order):
    order = torch.cat([order, order + len(x)]).flip(0)
    views, samples = torch.cat([x, 1 - x])[order], order % len(x)
    return F.cross_entropy(m.head(m.backbone(views)), torch.cat([y, y])[order]), m.backbone[:3](views), samples


def of_two_views_behind_the_network(m, x, y, order):
    views = torch.cat([x, 1 - x])
    order = torch.cat([order, order + len(x)])
    loss = F.cross_entropy(m.head(m.backbone(views)[order]), torch.cat([y, y])[order])
    return loss, m.backbone[:3](views), torch.arange(len(x)).repeat(2)


def of_repeated_samples(m, x, y, order):
    kept = order[: len(x) // 2].repeat_interleave(2)
    return F.cross_entropy(m.head(m.backbone(x[kept])), y[kept]), m.backbone[:3](x[kept]), kept


def of_several_rows_a_sample(m, x, y, order):
    parts = torch.stack([x, x + 0.1, 1 - x], 1).flatten(0, 1)
    logits = m.head(m.backbone(parts)).view(len(x), 3, 2).mean(1)
    return F.cross_entropy(logits, y), m.backbone[:3](parts), torch.arange(len(x)).repeat_interleave(3)


def whose_logits_are_repeated(m, x, y, order):
    features = m.backbone(x)
    return F.cross_entropy(m.head(features).repeat(2, 1), y.repeat(2)), features, torch.arange(len(x))


def of_time_first_logits(m, x, y, order):
    features = torch.stack([m.backbone(x), m.backbone(1 - x)], 1)
    logits = m.head(features).transpose(0, 1).reshape(-1, 2)
    return F.cross_entropy(logits, y.repeat(2)), features.view(-1, 6), torch.arange(len(x)).repeat_interleave(2)


def of_time_first_features(m, x, y, order):
    features = torch.stack([m.backbone(x), m.backbone(1 - x)])
    logits = m.head(features).reshape(-1, 2)
    return F.cross_entropy(logits, y.repeat(2)), features.view(-1, 6), torch.arange(len(x)).repeat(2)


def of_an_average_over_positions(m, x, y, order):
    features = torch.stack([m.backbone(x), m.backbone(1 - x)], 1)
    loss = F.cross_entropy(m.head(features).mean(1), y)
    return loss, features.view(-1, 6), torch.arange(len(x)).repeat_interleave(2)


def that_the_loss_leaves_out(m, x, y, order):
    features, keep = m.backbone(x), x[:, 0] > 0
    samples = torch.where(keep, torch.arange(len(x)), len(x))
    return F.cross_entropy(m.head(features)[keep], y[keep]), features, samples


def of_unreduced_losses(m, x, y, order):
    features = m.backbone(x)
    losses = F.cross_entropy(m.head(features), y, reduction="none")[order]
    return (losses * losses.detach()).mean(), features, torch.arange(len(x))


def of_several_labels(m, x, y, order):
    features = m.backbone(x)
    logits, target = m.head(features)[order] / 2, F.one_hot(y, 2).double()[order]
    return F.binary_cross_entropy_with_logits(logits, target), features, torch.arange(len(x))


def of_maps(m, x, y, order):
    maps = x[order].view(-1, 1, 2, 2) * m.neck.weight.sum()
    target = y[order].view(-1, 1, 1).expand(-1, 2, 2)
    return F.cross_entropy(m.conv(maps), target), maps.view(-1, 1), order.repeat_interleave(4)


STEPS: dict[Step, str | None] = {  # and the name of the head
    in_front_of_the_head: "head",
    behind_the_head: "head",
    behind_the_network: "backbone.3",
    of_the_batch: "backbone.3",
    of_two_views: "backbone.3",
    of_two_views_behind_the_network: "backbone.3",
    of_repeated_samples: "backbone.3",
    of_several_rows_a_sample: "backbone.3",
    whose_logits_are_repeated: "head",
    of_time_first_logits: None,
    of_time_first_features: None,
    of_an_average_over_positions: "head",
    that_the_loss_leaves_out: "head",
    of_unreduced_losses: "head",
    of_several_labels: "head",
    of_maps: "conv",
}


def by_hand(
    step: Step, penalty: Callable[..., torch.Tensor], module: Callable[[Step], Rows] = Rows
) -> dict[str, torch.Tensor]:
    """Trained by a plain loop on the step's loss and the penalty of the features that it means."""
    model = module(step)
    optimizer = model.configure_optimizers()
    for i, batch in enumerate(loader()):
        (x, y), domains = batch.batch, torch.cat((batch.tags["place"], torch.tensor([-1])))
        loss, features, samples = step(model, x, y, model.order(len(x), i))
        optimizer.zero_grad()
        (loss + penalty(features, domains[samples], 3)).backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("method", PENALTIES)
def test_rows_of_features_are_followed_on_their_own(method: type, step: Step) -> None:
    model, theirs = Rows(step), by_hand(step, PENALTIES[method])
    train(model, [method("place", 3, head=STEPS[step])])
    plain = Rows(step)
    train(plain, bare=True)
    for name, value in parameters(model).items():
        assert torch.allclose(value, theirs[name], rtol=1e-10, atol=1e-13), name
    assert deviation(parameters(plain), theirs) > 1e-6


@pytest.mark.parametrize("step", [behind_the_network, of_the_batch], ids=lambda step: step.__name__)
def test_a_network_that_is_given_what_cannot_be_followed_in_a_step_that_reorders_samples(step: Step) -> None:
    """Its rows may be those of the batch or those of the loss: nobody knows."""

    def hidden(m, x, y, order):
        return step(m, torch.from_numpy(x.numpy()), y, order)

    with pytest.raises(RowsError, match=r"rows can be followed to the 16 samples.*\(16, 6\).*another order"):
        train(Rows(hidden), [CORAL("place", 3, head="backbone.3")])


def test_a_network_that_is_given_sorted_rows() -> None:
    def step(m, x, y, order):
        return F.cross_entropy(m.head(m.backbone(x.sort(0)[0])), y), None, None

    with pytest.raises(RowsError, match="followed to the 16 samples"):
        train(Rows(step), [CORAL("place", 3, head="backbone.3")])


@pytest.mark.parametrize("arranged", ["tiled", "interleaved"])
def test_several_rows_a_sample_that_cannot_be_followed_are_arranged_as_is_said(arranged: str) -> None:
    def unseen(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy((x.repeat(2, 1) if arranged == "tiled" else x.repeat_interleave(2, 0)).numpy())

    def step(m, x, y, order):
        views = unseen(x)
        samples = torch.arange(len(x))
        samples = samples.repeat(2) if arranged == "tiled" else samples.repeat_interleave(2)
        loss = F.cross_entropy(m.head(m.backbone(views)), torch.from_numpy(y[samples].numpy()))
        return loss, m.backbone[:3](views), samples

    model, theirs = Rows(step), by_hand(step, coral_penalty)
    train(model, [CORAL("place", 3, head="backbone.3", rows=arranged)])
    assert deviation(parameters(model), theirs) < 1e-10
    with pytest.raises(RowsError, match="rows="):
        train(Rows(step), [CORAL("place", 3, head="backbone.3", rows=lambda call, n: samples_of(call, n, arranged))])


def samples_of(call, n: int, arranged: str) -> torch.Tensor:
    return torch.arange(n).repeat(2) if arranged == "tiled" else torch.arange(n).repeat_interleave(2)


@pytest.mark.parametrize("head", [None, "backbone.3"])
def test_features_of_a_batch_that_an_augmenter_has_doubled(head: str | None) -> None:
    """The edge maps stand behind the images, with the same domains."""
    seen = []

    class Seeing(CORAL):
        def feature_rows(self, call, domains):
            features, of_rows = super().feature_rows(call, domains)
            seen.append((len(features), of_rows.tolist()))
            return features, of_rows

    train(Classifier(), [EdgeView(), Seeing("place", 3, head=head)], limit_train_batches=1)
    assert seen == [(32, places(39)[:16].tolist() * 2)]


# -- the output of a named module --------------------------------------------------------------------


class Averaged(Rows):
    """No layer makes the logits, and the features are not what any layer reads."""

    def __init__(self, step: Step | None = None) -> None:
        super().__init__(step or averaged)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.other_head = nn.Linear(6, 2).double()


def averaged(m, x, y, order):
    features = m.backbone(x)
    mean = (m.head(features.relu()) + m.other_head(features.sigmoid())) / 2
    return F.nll_loss(mean.log_softmax(1), y), features, torch.arange(len(x))


@pytest.mark.parametrize("method", PENALTIES)
def test_the_output_of_a_named_module(method: type) -> None:
    model, theirs = Averaged(), by_hand(averaged, PENALTIES[method], Averaged)
    train(model, [method("place", 3, features="backbone")])
    assert deviation(parameters(model), theirs) < 1e-10
    plain = Averaged()
    train(plain, bare=True)
    assert deviation(parameters(plain), theirs) > 1e-6
    with pytest.raises(
        HeadNotFoundError, match=r"no layer was found.*`features=.dotted.path.`, of maps with `pool=.mean.`"
    ):
        train(Averaged(), [method("place", 3)])


NAMED = [behind_the_network, of_the_batch, of_two_views, of_repeated_samples, of_several_rows_a_sample]


@pytest.mark.parametrize("step", NAMED, ids=lambda step: step.__name__)
def test_rows_of_a_named_module_are_followed(step: Step) -> None:
    """The last layer of the backbone takes the hyperbolic tangent of what these steps call features."""
    model, theirs = Rows(step), by_hand(step, lambda f, domains, n: coral_penalty(f.tanh(), domains, n))
    train(model, [CORAL("place", 3, features="backbone")])
    assert deviation(parameters(model), theirs) < 1e-10


def through(module: str) -> Step:
    def step(m, x, y, order):
        m.get_submodule(module)(x.view(-1, 8)[:, :6] if module == "neck" else m.neck(m.backbone(x)))
        return averaged(m, x, y, order)

    return step


@pytest.mark.parametrize(
    ("features", "step", "error", "match"),
    [
        ("bakbone", averaged, HeadNotFoundError, r"`features`.*'bakbone'. Did you mean 'backbone'"),
        ("backbone.1", averaged, HeadNotFoundError, r"shape \(N, D\), one row per sample, but got shape \(16, 3, 2\)"),
        ("neck", averaged, HeadNotFoundError, r"`features='neck'` to run once in a step, but it ran 0 times"),
        ("neck", through("neck"), RowsError, r"followed to the 16 samples, but got shape \(8, 6\)"),
        ("norm", through("norm"), HeadNotFoundError, r"but got tuple.*features='dotted.path'"),
    ],
)
def test_named_modules_that_are_refused(features: str, step: Step, error: type, match: str) -> None:
    model = Averaged(step)
    model.norm = Pair()
    with pytest.raises(error, match=match):
        train(model, [CORAL("place", 3, features=features)])


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def _fit(rank: int, name: str, sizes: tuple[int, ...], last: tuple[int, ...]) -> dict:
    return runs.fit(rank, name, sizes, last, method={"features": "backbone"})


@pytest.mark.parametrize("name", ["CORAL", "MMD"])
def test_named_modules_on_uneven_ranks_are_one_process(ranks, name: str) -> None:
    first, second = ranks.run(_fit, name, (5, 11), (2, 5))
    assert same(first, second)
    assert deviation(_fit(0, name, (16,), (7,)), first) < 1e-12
    assert deviation(runs.fit(0, name), first) < 1e-12  # it is what the head reads


@pytest.mark.parametrize("name", ["CORAL", "MMD"])
def test_yaml_names_the_module(name: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["program"])
    arguments = {"domain": "place", "n_domains": 3, "features": "neck"}
    trainer = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "callbacks": [{"class_path": f"debias.{name}", "init_args": arguments}],
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"trainer": trainer}))  # JSON is YAML
    cli = LightningCLI(
        Classifier, run=False, args=["--config", str(path)], save_config_callback=None, seed_everything_default=False
    )
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == name]
    assert callback.features == "neck"
    ends = []
    for method in (callback, type(callback)("place", 3, features="neck")):
        model = Rows(lambda m, x, y, order: (F.cross_entropy(m.head(m.neck(m.backbone(x))), y), None, None))
        train(model, [method])
        ends.append(parameters(model))
    assert same(*ends)


# -- modules that are told of the loss --------------------------------------------------------------


def hessian_alignment(p: oracle.Problem) -> torch.Tensor:
    return hessian_alignment_penalty(
        p.features, p.logits, p.targets, p.domains, p.n_domains, loss=p.loss, alpha=0.7, beta=0.3, **p.options
    )


TOLD = {  # each module, and what its function makes of the same arguments
    "hessian_alignment": (lambda *args, **options: HessianAlignmentPenalty(*args, alpha=0.7, beta=0.3, **options),
                          hessian_alignment),
    "fishr": (lambda *args, **options: FishrPenalty(*args, penalty_weight=1.0, ema=0.0, **options),
              lambda p: FishrPenalty(p.n_domains, penalty_weight=1.0, ema=0.0).of(statistics(p))),
    "irm": (lambda *args, **options: IRMPenalty(*args, penalty_weight=1.0, **options),
            lambda p: irm_penalty(p.logits, p.targets, p.domains, p.n_domains, loss=p.loss, **p.options)),
}  # fmt: skip


def arguments_of(name: str, p: oracle.Problem) -> tuple[torch.Tensor, ...]:
    return (p.logits, p.targets, p.domains) if name == "irm" else (p.features, p.logits, p.targets, p.domains)


@KINDS
@pytest.mark.parametrize("name", TOLD)
def test_modules_take_the_options_of_the_loss(name: str, kind: str) -> None:
    p = oracle.problem(kind)
    make, function = TOLD[name]
    options = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in p.options.items()}
    for told in (p.options, options):
        check(p, make(p.n_domains, loss=p.loss, **told)(*arguments_of(name, p)), function(p))
    if p.options:
        plain = make(p.n_domains, loss=p.loss)(*arguments_of(name, p))
        assert not torch.allclose(plain, function(p), rtol=1e-6)


def through_a_module(mixin: type, configure: Callable[[Any], None], penalty: Callable[..., torch.Tensor]) -> type:
    class Model(mixin, Classifier):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            configure(self)

        def training_step(self, batch, batch_idx):
            x, y, domains = batch
            features = self.backbone(x)
            logits = self.head(features)
            return F.cross_entropy(logits, y, **OPTIONS) + penalty(self, features, logits, y, domains)

    return Model


OPTIONS = {"weight": torch.tensor([0.3, 2.0], dtype=torch.float64), "label_smoothing": 0.2}
MIXINS = {
    "hessian_alignment": (
        HessianAlignmentMixin, HessianAlignment, {"alpha": 1.0, "beta": 1.0},
        lambda m, f, z, y, d: m.hessian_alignment_penalty(f, z, y, d),
    ),
    "fishr": (FishrMixin, Fishr, {"penalty_weight": 5.0}, lambda m, f, z, y, d: m.fishr_penalty(f, z, y, d)),
    "irm": (IRMMixin, IRM, {"penalty_weight": 0.5}, lambda m, f, z, y, d: m.irm_penalty(z, y, d)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXINS)
def test_mixins_with_options_of_the_loss_are_the_callback(name: str) -> None:
    mixin, callback, own, penalty = MIXINS[name]

    def configure(model: Any, **options: Any) -> None:
        getattr(model, f"configure_{name}")(3, **own, **options)

    class Weighted(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x), y, **OPTIONS)

    theirs = Weighted()
    train(theirs, [callback("place", 3, **own)])
    ends = {}
    for told in (True, False):
        make = through_a_module(mixin, lambda m, told=told: configure(m, **(OPTIONS if told else {})), penalty)
        model = make()
        batches = [(*b.batch, b.tags["place"]) for b in loader()]
        make_trainer().fit(model, DataLoader(batches, batch_size=None), val_loader(bare=True))
        ends[told] = {k: v for k, v in parameters(model).items() if not k.startswith(name)}
    assert deviation(parameters(theirs), ends[True]) < 1e-12
    assert deviation(parameters(theirs), ends[False]) > 1e-6


@pytest.mark.parametrize("name", MIXINS)
def test_options_of_the_loss_are_no_part_of_a_checkpoint(name: str) -> None:
    """Arguments are not state: what was saved without them loads with them, and the reverse."""
    make = {"hessian_alignment": HessianAlignmentPenalty, "fishr": FishrPenalty, "irm": IRMPenalty}[name]
    told, plain = make(3, **OPTIONS), make(3)
    assert told.state_dict().keys() == plain.state_dict().keys()
    told.load_state_dict(plain.state_dict())
    plain.load_state_dict(told.state_dict())
    assert told.loss_weight.tolist() == [0.3, 2.0]
    assert plain.loss_weight is None


@pytest.mark.parametrize("make", [HessianAlignmentPenalty, FishrPenalty, IRMPenalty])
def test_weights_of_the_loss_follow_the_module(make: type) -> None:
    weight = torch.tensor([0.25, 2.0], requires_grad=True)
    module = make(2, weight=weight)
    weight.data.zero_()  # it has its own
    copied = copy.deepcopy(nn.Sequential(module).half())[0]
    assert copied.loss_weight.tolist() == [0.25, 2.0]
    assert copied.loss_weight.dtype == torch.float64
    assert not copied.loss_weight.requires_grad
    binary = make(2, loss="binary_cross_entropy", weight=[0.3, 2.0], pos_weight=(3.0, 4.0))
    assert binary.loss_weight.tolist() == [0.3, 2.0]
    moved = nn.Sequential(module, binary).to("meta")
    assert {moved[0].loss_weight.device.type, moved[1].loss_weight.device.type} == {"meta"}
    assert moved[1].loss_pos_weight.device.type == "meta"


@pytest.mark.parametrize("make", [HessianAlignmentPenalty, FishrPenalty, IRMPenalty])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "l1_loss"}, "`loss` to be one of cross_entropy, .*whose derivatives .*'l1_loss'"),
        (
            {"loss": "mse_loss", "label_smoothing": 0.1},
            r"options of `loss='mse_loss'`: weight, but got label_smoothing",
        ),
        ({"pos_weight": [1.0]}, "weight, label_smoothing, ignore_index, but got pos_weight"),
        (
            {"penalty_wieght": 2.0},
            r"arguments of \w+Penalty \(n_domains, .*got `penalty_wieght`. Did you mean `penalty_weight`",
        ),
        ({"weight": 10.0}, r"`weight` .*one for each class, .*got 10.0. The weight of the penalty is `penalty_weight`"),
        ({"weight": [[1.0, 2.0]]}, "`weight`"),
        ({"weight": [1.0, -2.0]}, "`weight`"),
        ({"weight": [1.0, float("nan")]}, "`weight`"),
        ({"weight": "balanced"}, "`weight`.*'balanced'"),
        ({"loss": "binary_cross_entropy", "pos_weight": [float("inf")]}, "`pos_weight` to be weights of the loss, a"),
        ({"label_smoothing": 1.5}, r"`label_smoothing` to be a number in \[0, 1\]"),
        ({"ignore_index": 1.0}, "`ignore_index` to be an integer"),
    ],
)
def test_wrong_options_of_the_loss(make: type, options: dict[str, Any], match: str) -> None:
    with pytest.raises(DebiasError, match=match):
        make(3, **options)


@pytest.mark.parametrize("name", TOLD)
def test_weights_of_another_number_of_classes(name: str) -> None:
    p = oracle.problem()
    with pytest.raises(DebiasError, match=r"one number for each class of the logits \(18, 4\), but got 1"):
        TOLD[name][0](p.n_domains, weight=[2.0])(*arguments_of(name, p))


def _reductions(rank: int, methods: dict[str, type], domain: str) -> int:
    """All-reduces of counts by domain in three steps, the methods together; of five domains no other has this shape."""
    seen = []
    plain = torch.distributed.all_reduce

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(x.shape)
        return plain(x, *args, **kwargs)

    callbacks = [method("place", 5, name=name) for name, method in methods.items()]
    trainer = make_trainer(callbacks, devices=2, strategy=runs.ddp(), use_distributed_sampler=False)
    tags = {} if domain == "ids" else {"place": places(39).unsqueeze(1) == torch.arange(5)}
    with mock.patch.object(torch.distributed, "all_reduce", counted):
        trainer.fit(Classifier(), loader(sizes=(5, 11), last=(2, 5), rank=rank, **tags), val_loader())
    return seen.count((3, 5 + 3))


@pytest.mark.parametrize("domain", ["ids", "membership"])
def test_penalties_of_the_same_domains_count_bad_rows_once(ranks, domain: str) -> None:
    methods = {"a": CORAL, "b": MMD, "c": IRM, "d": Fishr, "e": CORAL}
    assert ranks.run(_reductions, methods, domain) == [3, 3]
    assert ranks.run(_reductions, {"a": VREx, **methods}, domain) == [3, 3]  # whose losses are in the same sums


def test_penalties_of_other_domains_or_losses_count_their_own_bad_rows() -> None:
    """Each error names what the method itself was given."""
    batches = loader(other=torch.arange(39) % 4)
    for callbacks, match in (
        ([VREx("place", 3), VREx("other", 3)], r"rows had a higher one.*VREx\(other\)"),
        ([VREx("other", 4, name="a"), VREx("other", 3, name="b")], r"`n_domains=3`.*VREx\(b\)"),
    ):
        with pytest.raises(BadRowsError, match=match):
            make_trainer(callbacks).fit(Classifier(), batches, val_loader())

    class TwoLosses(Classifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            return loss + F.mse_loss(self(torch.where(x == x[0, 0], torch.nan, x)), F.one_hot(y, 2).double())

    methods = [VREx("place", 3, loss=0, name="a"), VREx("place", 3, loss=1, name="b")]
    with pytest.raises(BadRowsError, match=r"NaN or infinite.*VREx\(b\)"):
        train(TwoLosses(), methods)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in (IRM, Fishr, HessianAlignment, VREx, CORAL, MMD)),
        *((method, {"derivatives": "autograd"}) for method in (Fishr, HessianAlignment)),
    ],
)
def test_steps_that_keep_no_row(method: type, options: dict[str, Any]) -> None:
    class Filtered(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            kept = x[:, 0] > (100 if batch_idx < 2 else -100)
            losses = F.cross_entropy(self(x[kept]), y[kept], reduction="none")
            return losses.sum() / max(len(losses), 1)

    model = Filtered()
    before = parameters(model)
    train(model, [method("place", 3, **options)])
    after = parameters(model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after["head.weight"], before["head.weight"])  # by the third batch


def test_modules_in_a_plain_loop() -> None:
    p = oracle.problem(sizes=(4, 5))
    losses = F.cross_entropy(p.logits, p.targets, reduction="none")
    inputs = {
        VRExPenalty: (losses, p.domains),
        IRMPenalty: (p.logits, p.targets, p.domains),
        FishrPenalty: (p.features, p.logits, p.targets, p.domains),
        CORALPenalty: (p.features, p.domains),
        MMDPenalty: (p.features, p.domains),
    }
    for module, arguments in inputs.items():
        plain = module(2, penalty_weight=3.0)(*arguments)
        assert plain.requires_grad
        assert float(plain.detach()) == pytest.approx(
            3 * float(module(2, penalty_weight=1.0)(*arguments).detach()), rel=1e-12
        )
        assert float(module(2, penalty_weight=3.0, weight_before=0.0, start_step=2)(*arguments, step=1)) == 0
        with pytest.raises(DebiasError, match="`step`"):
            module(2, penalty_weight=3.0, start_step=2)(*arguments)
        with pytest.raises(BadRowsError, match="below"):
            module(2, penalty_weight=3.0)(*arguments[:-1], p.domains + 2)
