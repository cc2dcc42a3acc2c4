"""Independent computations of head statistics and penalties: torch's own losses, differentiated twice, by domain.

Nothing here uses a closed form, a segment sum or anything of ``debias``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Problem:
    """A linear head, the rows that it sees, and their loss; leaves that gradients are asked for."""

    loss: str
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    domains: Tensor
    n_domains: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.features, self.weight, self.bias) if x is not None]

    @property
    def parameters(self) -> list[Tensor]:
        return [x for x in (self.weight, self.bias) if x is not None]

    @property
    def logits(self) -> Tensor:
        return F.linear(self.features, self.weight, self.bias)

    def mean_loss(self, rows: Tensor | slice) -> Tensor:
        """Torch's own mean loss of some rows."""
        logits = F.linear(self.features[rows], self.weight, self.bias)
        return self.of_logits(logits, rows)

    def of_logits(self, logits: Tensor, rows: Tensor | slice, reduction: str = "mean") -> Tensor:
        targets, options = self.targets[rows], dict(self.options)
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits, targets, reduction=reduction, **options)
        if isinstance(weight := options.get("weight"), Tensor) and weight.shape == self.targets.shape:
            options["weight"] = weight[rows]
        if self.loss == "binary_cross_entropy":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction, **options)
        return F.mse_loss(logits, targets, reduction=reduction, **options)

    def rows(self, domain: int) -> Tensor:
        return (self.domains == domain).nonzero()[:, 0]

    @property
    def present(self) -> list[int]:
        return [e for e in range(self.n_domains) if len(self.rows(e))]


LOSSES = {
    "ce": ("cross_entropy", "classes", {}),
    "ce smoothed": ("cross_entropy", "classes", {"label_smoothing": 0.1}),
    "ce weighted": ("cross_entropy", "classes", {"weight": torch.tensor([0.5, 2.0, 1.0, 1.5]).double()}),
    "ce weighted, smoothed, ignored": (
        "cross_entropy", "ignored",
        {"weight": torch.tensor([0.5, 2.0, 1.0, 1.5]).double(), "label_smoothing": 0.2, "ignore_index": 1},
    ),
    "ce soft": ("cross_entropy", "soft", {}),
    "ce soft, smoothed": ("cross_entropy", "soft", {"label_smoothing": 0.3}),
    "bce": ("binary_cross_entropy", "labels", {}),
    "bce weighted": (
        "binary_cross_entropy", "labels",
        {"pos_weight": torch.tensor([0.5, 2.0, 1.0, 3.0]).double(),
         "weight": torch.tensor([1.0, 2.0, 0.5, 1.0]).double()},
    ),
    "mse": ("squared_error", "values", {}),
}  # fmt: skip


def problem(kind: str = "ce", *, bias: bool = True, sizes: tuple[int, ...] = (4, 7, 0, 1, 5), seed: int = 0) -> Problem:
    """Rows of domains of these sizes in random order, one row without a domain, four logits, three features."""
    loss, targets, options = LOSSES[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    domains = torch.cat([torch.full((n,), e) for e, n in enumerate(sizes)] + [torch.tensor([-1])])
    domains = domains[torch.randperm(len(domains), generator=generator)]
    n, classes = len(domains), 4
    made = {
        "classes": lambda: torch.randint(0, classes, (n,), generator=generator),
        "ignored": lambda: torch.randint(0, classes, (n,), generator=generator),
        "soft": lambda: normal(n, classes).softmax(1),
        "labels": lambda: (normal(n, classes) > 0).double(),
        "values": lambda: normal(n, classes),
    }[targets]()
    if targets == "ignored":  # the one row of a domain must count
        made[(domains == 3).nonzero()[:, 0]] = 2
    return Problem(
        loss, (normal(n, 3) * 1.5).requires_grad_(), normal(classes, 3).requires_grad_(),
        normal(classes).requires_grad_() if bias else None, made, domains, len(sizes), options,
    )  # fmt: skip


def _flat(parts: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def gradient(p: Problem, loss: Tensor) -> Tensor:
    """With respect to the head, one vector."""
    return _flat(torch.autograd.grad(loss, p.parameters, create_graph=True, materialize_grads=True))


def hessian(p: Problem, loss: Tensor) -> Tensor:
    """With respect to the head, one matrix."""
    g = gradient(p, loss)
    rows = [
        _flat(torch.autograd.grad(x, p.parameters, create_graph=True, materialize_grads=True))
        if x.requires_grad else torch.zeros_like(g)
        for x in g
    ]  # fmt: skip
    return torch.stack(rows)


def domain_losses(p: Problem) -> list[Tensor]:
    """Torch's mean loss of every domain in the batch."""
    return [p.mean_loss(p.rows(e)) for e in p.present]


def alignment(
    p: Problem, statistic: str, alpha: float, beta: float, *, detach: bool, scale_free: bool = False, mean: bool = True
) -> Tensor:
    """Hessian alignment as the paper writes it."""
    losses = domain_losses(p)
    shared = torch.stack(losses).mean()
    target_g = gradient(p, shared)
    hessians = [hessian(p, loss) for loss in losses]
    target_h = hessian(p, shared)
    of: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "hgp": lambda h, g: h @ g,
        "diagonal": lambda h, g: h.diagonal(),
        "frobenius": lambda h, g: h.reshape(-1),
    }
    target_q = of[statistic](target_h, target_g)
    if detach:
        target_q, target_g = target_q.detach(), target_g.detach()
    total = torch.zeros((), dtype=torch.float64)
    gs = [gradient(p, loss) for loss in losses]
    qs = [of[statistic](h, g) for h, g in zip(hessians, gs, strict=True)]
    for weight, own, target in ((alpha, qs, target_q), (beta, gs, target_g)):
        norm = max(
            sum(float(x.detach() @ x.detach()) for x in own) / len(own), float(target.detach() @ target.detach())
        )
        for x in own:
            total = total + weight * (x - target).square().sum() / (norm if scale_free else 1)
    return total / len(losses) if mean else total


def sample_gradients(p: Problem, domain: int) -> Tensor:
    """Gradients of the single samples' losses, ``(n, P)``; a multi-label loss is its mean over the labels."""
    rows = p.rows(domain)
    if p.loss == "cross_entropy" and "ignore_index" in p.options:
        rows = rows[p.targets[rows] != p.options["ignore_index"]]
    out = []
    for i in rows:
        one = i.view(1)
        losses = p.of_logits(F.linear(p.features[one], p.weight, p.bias), one, "none")
        out.append(gradient(p, losses.mean()))
    return torch.stack(out)


def variances(p: Problem) -> list[Tensor]:
    """Variance of the samples' gradients of every domain in the batch."""
    return [((g := sample_gradients(p, e)) - g.mean(0)).square().mean(0) for e in p.present]


def scale_derivative(p: Problem, rows: Tensor) -> Tensor:
    """Derivative of the mean loss of some rows with respect to a scale on the logits, at 1."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    logits = F.linear(p.features[rows], p.weight, p.bias)
    (d,) = torch.autograd.grad(p.of_logits(logits * scale, rows), scale, create_graph=True)
    return d


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a penalty."""
    return list(torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True))


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest deviation relative to the largest entry of each tensor."""
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-12))
        for a, b in zip(ours, theirs, strict=True)
    )
