"""Closed forms of the head against torch's losses differentiated twice."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from _support import head_oracle as oracle
from _support.ranks import Ranks
from debias.errors import DebiasError
from debias.ops import head_distances
from debias.ops.distributed import is_distributed
from debias.ops.domains import make_members
from debias.ops.head_autograd import AutogradHeadStatistics
from debias.ops.head_losses import make_head_loss
from debias.ops.head_statistics import HeadStatistics

EXACT = 1e-10
KINDS = pytest.mark.parametrize("kind", oracle.LOSSES)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def statistics(p: oracle.Problem) -> HeadStatistics:
    loss = make_head_loss(p.loss, p.logits, p.targets, **p.options)
    return HeadStatistics(p.features, loss, make_members(p.domains, p.n_domains, len(p.domains)), p.bias is not None)


def by_autograd(p: oracle.Problem) -> AutogradHeadStatistics:
    head = nn.Linear(3, 4, bias=p.bias is not None).double()
    head.weight = nn.Parameter(p.weight.detach())
    if p.bias is not None:
        head.bias = nn.Parameter(p.bias.detach())
    p.weight, p.bias = head.weight, head.bias
    loss = make_head_loss(p.loss, head(p.features), p.targets, **p.options)
    return AutogradHeadStatistics(head, p.features, loss, make_members(p.domains, p.n_domains, len(p.domains)))


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor holds that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def as_matrix(p: oracle.Problem, vector: torch.Tensor) -> torch.Tensor:
    """The oracle's vector (weights, then biases) as ``(C, D)``."""
    weight, bias = vector[: p.weight.numel()].view(p.weight.shape), vector[p.weight.numel() :]
    return weight if p.bias is None else torch.cat((weight, bias.unsqueeze(1)), 1)


def agree(p: oracle.Problem, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Values, and gradients of a fixed combination of them, to the features, W and b."""
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert oracle.distance([ours], [theirs]) < EXACT
    if theirs.requires_grad:
        left = oracle.gradients((weights * ours).sum(), p.leaves)
        right = oracle.gradients((weights * theirs).sum(), p.leaves)
        assert oracle.distance(left, right) < EXACT


@KINDS
@BIAS
def test_gradients(kind: str, bias: bool) -> None:
    p = oracle.problem(kind, bias=bias)
    ours = statistics(p).gradients
    theirs = [as_matrix(p, oracle.gradient(p, loss)) for loss in oracle.domain_losses(p)]
    agree(p, ours[p.present], torch.stack(theirs))
    assert ours[2].eq(0).all()


@KINDS
@BIAS
def test_hessian_vector_products(kind: str, bias: bool) -> None:
    p = oracle.problem(kind, bias=bias)
    s = statistics(p)
    generator = torch.Generator().manual_seed(2)
    n_domains, *shape = s.gradients.shape
    vectors = torch.randn(n_domains + 1, *shape, generator=generator, dtype=torch.float64)
    losses = oracle.domain_losses(p)
    flat = [torch.cat((v[:, :3].reshape(-1), v[:, 3:].reshape(-1))) for v in vectors]
    theirs = [as_matrix(p, oracle.hessian(p, loss) @ flat[e]) for e, loss in zip(p.present, losses, strict=True)]
    mean = oracle.hessian(p, torch.stack(losses).mean())
    products = s.products(vectors)
    agree(p, products[:-1][p.present], torch.stack(theirs))
    agree(p, products[-1], as_matrix(p, mean @ flat[-1]))


@KINDS
@BIAS
def test_diagonals(kind: str, bias: bool) -> None:
    p = oracle.problem(kind, bias=bias)
    hessians = [oracle.hessian(p, loss) for loss in oracle.domain_losses(p)]
    theirs = torch.stack([as_matrix(p, h.diagonal()) for h in hessians])
    agree(p, statistics(p).diagonals[p.present], theirs)


@KINDS
@BIAS
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "moving"])
def test_frobenius_distances(kind: str, bias: bool, detach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = oracle.problem(kind, bias=bias)
    hessians = torch.stack([oracle.hessian(p, loss) for loss in oracle.domain_losses(p)])
    mean = hessians.mean(0)
    theirs = (hessians - (mean.detach() if detach else mean)).square().sum((1, 2))
    norm = hessians.square().sum((1, 2)).mean().detach()
    gradients = oracle.gradients(theirs.sum(), p.leaves)
    for fit, at_once in ((True, 2**22), (True, 50), (False, 2**22), (False, 50)):  # all at once, and in blocks of rows
        monkeypatch.setattr(HeadStatistics, "hessians_fit", lambda self, fit=fit: fit)
        monkeypatch.setattr(head_distances, "_AT_ONCE", at_once)
        for relative, scale in ((False, 1.0), (True, norm)):
            ours = statistics(p).hessian_distances(detach_target=detach, relative=relative)[p.present] * scale
            assert oracle.distance([ours], [theirs]) < EXACT
            assert oracle.distance(oracle.gradients(ours.sum(), p.leaves), gradients) < EXACT


@pytest.mark.parametrize("n", [64, 5000])
def test_frobenius_distances_take_the_cheaper_side_in_bounded_memory(n: int) -> None:
    """Of 5,000 rows a table of pairs would be 25 million numbers; of 64 rows and 700 features the Hessians would."""
    d, classes, n_domains = (6, 3, 3) if n > 64 else (700, 3, 3)
    features = torch.randn(n, d, requires_grad=True)
    logits = features @ torch.randn(classes, d).T
    with LargestTensor() as watch:
        loss = make_head_loss("cross_entropy", logits, torch.arange(n) % classes)
        s = HeadStatistics(features, loss, make_members(torch.arange(n) % n_domains, n_domains, n))
        s.hessian_distances().sum().backward()
    assert watch.numbers <= max(n * (d + 1) ** 2 if n > 64 else 0, n * (d + 1), n * n if n == 64 else 0)


def test_pairs_are_compared_in_blocks() -> None:
    """Wide heads and many rows: neither side is small, and no table of all pairs is made."""
    n, d = 3000, 300
    features = torch.randn(n, d, requires_grad=True)
    loss = make_head_loss("cross_entropy", features @ torch.randn(8, d).T, torch.arange(n) % 8)
    s = HeadStatistics(features, loss, make_members(torch.arange(n) % 3, 3, n))
    assert not s.hessians_fit()
    with LargestTensor() as watch:
        s.hessian_distances().sum().backward()
    assert watch.numbers <= 2**22 < n * n


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "moving"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fit", [True, False], ids=["Hessians", "pairs"])
def test_frobenius_distances_in_single_precision(
    detach: bool, seed: int, fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of domains that are nearly aligned: less than the rounding error of the Hessians' own squared norms, near 3."""
    monkeypatch.setattr(HeadStatistics, "hessians_fit", lambda self: fit)
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 16, generator=generator, dtype=torch.float64) / 4
    members = make_members(torch.arange(80) // 40, 2, 80)

    def distances(size: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.cat((half, half + size * noise)).to(dtype).requires_grad_()
        loss = make_head_loss("cross_entropy", features @ weight.to(dtype).T, torch.arange(80) % 4)
        found = HeadStatistics(features, loss, members).hessian_distances(detach_target=detach)
        return found, torch.autograd.grad(found.sum(), features)[0]

    for size in (0.0, 1e-5, 1e-4, 1e-3):
        (found, gradient), (exact, its) = distances(size, torch.float32), distances(size, torch.float64)
        assert found.ge(0).all()
        assert torch.allclose(found.double(), exact, rtol=0, atol=2e-7)
        assert torch.allclose(gradient.double(), its, rtol=0, atol=2e-7)


@KINDS
@BIAS
def test_gradient_variances(kind: str, bias: bool) -> None:
    p = oracle.problem(kind, bias=bias)
    ours = statistics(p).gradient_variances
    agree(p, ours[p.present], torch.stack([as_matrix(p, v) for v in oracle.variances(p)]))
    assert ours[3].abs().max() < 1e-14  # one sample does not vary


@KINDS
@BIAS
def test_the_autograd_route_equals_the_closed_form(kind: str, bias: bool) -> None:
    p = oracle.problem(kind, bias=bias)
    route = by_autograd(p)
    closed = statistics(p)

    def flat(x: torch.Tensor) -> torch.Tensor:  # closed form (E, C, D) in the order of the parameters
        return torch.cat((x[..., :3].flatten(1), x[..., 3:].flatten(1)), 1).unsqueeze(1)

    agree(p, route.gradients, flat(closed.gradients))
    vectors = torch.cat((closed.gradients, closed.mean(closed.gradients).unsqueeze(0)))
    agree(p, route.products(flat(vectors)), flat(closed.products(vectors)))
    agree(p, route.gradient_variances, flat(closed.gradient_variances))


def test_a_head_of_two_layers() -> None:
    p = oracle.problem()
    head = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    loss = make_head_loss(p.loss, head(p.features), p.targets)
    s = AutogradHeadStatistics(head, p.features, loss, make_members(p.domains, p.n_domains, len(p.domains)))
    rows = p.rows(1)
    parameters = list(head.parameters())
    mean = torch.nn.functional.cross_entropy(head(p.features[rows]), p.targets[rows])
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters, create_graph=True)])
    assert oracle.distance([s.gradients[1, 0]], [theirs]) < EXACT
    product = torch.autograd.grad(theirs @ theirs.detach(), parameters, create_graph=True)
    ours = s.products(torch.cat((s.gradients, s.gradients[:1])).detach())[1, 0]
    assert oracle.distance([ours], [torch.cat([g.flatten() for g in product])]) < EXACT
    leaves = [*parameters, p.features]
    left = oracle.gradients(ours.square().sum(), leaves)
    right = oracle.gradients(torch.cat([g.flatten() for g in product]).square().sum(), leaves)
    assert oracle.distance(left, right) < EXACT


@KINDS
@pytest.mark.parametrize("shape", [(2, -1), (-1, 2)], ids=str)
def test_a_head_that_makes_several_rows_of_its_features(kind: str, shape: tuple[int, int]) -> None:
    p = oracle.problem(kind)
    rows = by_autograd(p)
    even = len(p.features) // 2 * 2
    loss, members = rows.loss.map(lambda x: x[:even]), rows.members[:even]
    of_rows, of_tokens = (
        AutogradHeadStatistics(rows.head, x, loss, members)
        for x in (p.features[:even], p.features[:even].unflatten(0, shape))
    )
    agree(p, of_tokens.gradient_variances, of_rows.gradient_variances)


@pytest.mark.parametrize("what", ["diagonal_distances", "hessian_distances"])
def test_the_autograd_route_refuses_what_it_has_not(what: str) -> None:
    with pytest.raises(DebiasError, match="linear head"):
        getattr(by_autograd(oracle.problem()), what)()


def test_no_tensor_of_samples_by_parameters() -> None:
    """The largest tensor made is one of domains x classes x features, or of samples x domains x classes."""
    n, d, c, e = 40, 64, 30, 2
    features = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(c, d, requires_grad=True)
    logits = features @ weight.T
    with LargestTensor() as watch:
        loss = make_head_loss("cross_entropy", logits, torch.arange(n) % c)
        s = HeadStatistics(features, loss, make_members(torch.arange(n) % e, e, n))
        products = s.products(torch.cat((s.gradients, s.gradients[:1])))
        (products.sum() + s.diagonals.sum() + s.gradient_variances.sum()).backward()
    assert 0 < watch.numbers <= max((e + 1) * c * (d + 1), n * (e + 1) * c) < n * c * d


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: make_head_loss("hinge", torch.zeros(2, 2), torch.zeros(2)), "cross_entropy, binary"),
        (lambda: make_head_loss("cross_entropy", torch.zeros(2, 2, 2), torch.zeros(2).long()), r"\(N, C\)"),
        (lambda: make_head_loss("cross_entropy", torch.zeros(2, 3), torch.zeros(3).long()), "classes, int64"),
        (lambda: make_head_loss("cross_entropy", torch.zeros(2, 3), torch.zeros(2)), "probabilities"),
        (lambda: make_head_loss("binary_cross_entropy", torch.zeros(2, 3), torch.zeros(2, 3).long()), "floating-point"),
        (lambda: make_head_loss("squared_error", torch.zeros(2, 3), torch.zeros(2)), "floating-point of shape"),
        (lambda: make_members(torch.zeros(2), 2, 2), "integer ids"),
        (lambda: make_members(torch.zeros(3).long(), 2, 2), "integer ids"),
        (lambda: make_members(torch.zeros(2, 3, dtype=torch.bool), 2, 2), "integer ids"),
    ],
)
def test_wrong_arguments(call, match: str) -> None:
    with pytest.raises(DebiasError, match=match):
        call()


def _frobenius(rank: int, fit: bool, kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Five rows on the first of two ranks, the others on the second; all of them in one process."""
    p = oracle.problem(kind)
    rows = slice(None) if not is_distributed() else slice(5) if rank == 0 else slice(5, None)
    loss = make_head_loss(p.loss, p.logits[rows], p.targets[rows], **p.options)
    with mock.patch.object(HeadStatistics, "hessians_fit", return_value=fit):
        s = HeadStatistics(p.features[rows], loss, make_members(p.domains[rows], p.n_domains, len(loss.den)))
        found = s.hessian_distances(detach_target=True, relative=True)
    return found.detach(), oracle.gradients((found * torch.arange(p.n_domains)).sum(), p.leaves)


@pytest.mark.parametrize("fit", [True, False], ids=["Hessians", "pairs"])
@pytest.mark.parametrize("kind", ["ce weighted", "bce weighted"])
def test_frobenius_distances_on_two_ranks_are_those_of_one(ranks: Ranks, fit: bool, kind: str) -> None:
    value, gradients = _frobenius(0, fit, kind)
    outcomes = ranks.run(_frobenius, fit, kind)
    for found, _ in outcomes:
        assert oracle.distance([found], [value]) < EXACT
    averaged = [(a + b) / 2 for a, b in zip(*(of_rank for _, of_rank in outcomes), strict=True)]
    assert oracle.distance(averaged, gradients) < EXACT


def _products(rank: int, before: bool) -> list[torch.Tensor]:
    p = oracle.problem("ce")
    rows = slice(None) if not is_distributed() else slice(5) if rank == 0 else slice(5, None)
    loss = make_head_loss(p.loss, p.logits[rows], p.targets[rows])
    s = HeadStatistics(p.features[rows], loss, make_members(p.domains[rows], p.n_domains, len(loss.den)))
    found = s.gradient_distances() if before else torch.zeros(())
    with mock.patch.object(HeadStatistics, "by_pairs", return_value=False):
        return oracle.gradients((s.product_distances() + found).sum(), p.leaves)


@pytest.mark.parametrize("before", [True, False])
def test_gradients_are_those_of_one_process_whatever_is_asked_first(ranks: Ranks, before: bool) -> None:
    """Products take the mean gradients back to the rows, distances between them do not."""
    outcomes = ranks.run(_products, before)
    averaged = [(a + b) / 2 for a, b in zip(*outcomes, strict=True)]
    assert oracle.distance(averaged, _products(0, before)) < EXACT
